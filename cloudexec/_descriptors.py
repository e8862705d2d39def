"""How many files a process may have open, and the advice in messages when these are too few."""

from __future__ import annotations

import errno
import os

__all__ = [
    "BASE_FILES",
    "FILES_PER_SLOT",
    "can_open",
    "file_limits",
    "raise_file_limit",
    "too_many_files",
]

BASE_FILES = 24
"""Open files of a worker besides those of its slots, with a few in reserve."""
FILES_PER_SLOT = 6
"""Open files of a worker for each slot: four pipes, one for results, and one in reserve."""


def file_limits() -> tuple[int, int] | None:
    """Return the limit of open files of this process, and the limit up to which it may be raised.

    Returns:
        The soft and the hard limit, or ``None`` if the system has no limit or does not tell it.
    """
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    except (ImportError, OSError):
        return None
    if soft < 0 or soft == resource.RLIM_INFINITY:
        return None
    return soft, max(soft, (1 << 20) if hard < 0 or hard == resource.RLIM_INFINITY else hard)


def raise_file_limit(wanted: int) -> int | None:
    """Raise the limit of open files of this process to ``wanted``, or as far as possible.

    Returns:
        The limit before, or ``None`` if there is no limit.
    """
    limits = file_limits()
    if limits is None:
        return None
    soft, hard = limits
    if wanted > soft:
        import resource

        try:
            _, real = resource.getrlimit(resource.RLIMIT_NOFILE)
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(wanted, hard), real))
        except (OSError, ValueError):
            pass  # macOS has another limit, below the hard one
    return soft


def too_many_files(exc: OSError) -> str:
    """Return advice to append to an error's message if it says "too many open files", or ``""``."""
    if exc.errno == errno.ENFILE:
        return "; this machine has reached its limit of open files"
    if exc.errno != errno.EMFILE:
        return ""
    limits = file_limits()
    most = "no more" if limits is None else str(limits[0])
    return f"; this process may have {most} files open: raise the limit (ulimit -n 4096)"


def can_open(count: int) -> bool:
    """Return whether this process can probably open ``count`` more files."""
    opened: list[int] = []
    try:
        for _ in range(count):
            opened.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as exc:
        return exc.errno not in (errno.EMFILE, errno.ENFILE)
    finally:
        for fd in opened:
            os.close(fd)
    return True
