"""Gives the files of a slot large descriptors, so that tasks do not use them by mistake.

The system gives small descriptors to files that tasks open, and some programs close whole ranges of
them. They must not close the files through which the slot talks to its supervisor.
"""

from __future__ import annotations

import fcntl
import os

__all__ = ["out_of_reach"]

_FLOOR = 1000
"""The lowest descriptor that is used. The system's table of open files doubles at 1,024, so higher
descriptors would cost memory."""
_BELOW_LIMIT = 32
"""If the limit of open files (``ulimit -n``) is lower, descriptors are this far below it."""


def out_of_reach(fd: int) -> int:
    """Give an open file a large descriptor, and close the old one.

    Returns:
        The new descriptor, which is closed on ``exec``; the old one if the limit of open files
        leaves no other.
    """
    limit = os.sysconf("SC_OPEN_MAX")
    for floor in (_FLOOR, limit - _BELOW_LIMIT, limit // 2):
        if fd < floor:
            try:
                moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, floor)
            except OSError:
                continue  # it is above the limit, or all descriptors from there on are used
            os.close(fd)
            return moved
    os.set_inheritable(fd, False)
    return fd
