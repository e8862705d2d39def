"""The client of a worker that it has started on its own machine: whether it is still there."""

from __future__ import annotations

import os
import select

__all__ = ["Client"]


class Client:
    """A process that is to be outlived by none of its workers.

    Attributes:
        pid: Its number.

    Args:
        pid: Its number.
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
            return  # not Linux, or an old one
        self._poll = select.poll()
        self._poll.register(file, select.POLLIN)

    def is_gone(self) -> bool:
        """Whether that process has ended."""
        if self._poll is None:
            return self._is_gone or os.getppid() != self._parent
        return bool(self._poll.poll(0))
