"""Checks whether the client that has started this worker on its own machine still exists."""

from __future__ import annotations

import os
import select

__all__ = ["Client"]


class Client:
    """The client's process, which none of its workers must outlive.

    Attributes:
        pid: The process id.

    Args:
        pid: The process id.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._parent = os.getppid()
        self._poll: select.poll | None = None
        self._is_gone = False
        try:
            file = os.pidfd_open(pid)
        except ProcessLookupError:
            self._is_gone = True
            return
        except (AttributeError, OSError):
            return  # the system is not Linux, or its kernel is too old
        self._poll = select.poll()
        self._poll.register(file, select.POLLIN)

    def is_gone(self) -> bool:
        """Say whether the client's process has ended."""
        if self._poll is None:
            return self._is_gone or os.getppid() != self._parent
        return bool(self._poll.poll(0))
