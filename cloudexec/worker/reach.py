"""Numbers of a slot's own files that its tasks do not meet by chance.

Tasks get small numbers from the system, receive some from elsewhere, and close them in loops. None
of these is to be a file that the slot talks to its supervisor through.
"""

from __future__ import annotations

import fcntl
import os

__all__ = ["out_of_reach"]

_FLOOR = 1000
"""A table of open files doubles from 1,024 on: further up, it would take memory."""
_BELOW_LIMIT = 32
"""Where the limit on open files (``ulimit -n``) is below that: so far from its end."""


def out_of_reach(fd: int) -> int:
    """Give an open file a large number in place of the one it has.

    Returns:
        The new number; the old one where the limit on open files leaves no other. It is closed on
        ``exec``.
    """
    limit = os.sysconf("SC_OPEN_MAX")
    for floor in (_FLOOR, limit - _BELOW_LIMIT, limit // 2):
        if fd < floor:
            try:
                moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, floor)
            except OSError:
                continue  # past the limit, or everything from there on is taken
            os.close(fd)
            return moved
    os.set_inheritable(fd, False)
    return fd
