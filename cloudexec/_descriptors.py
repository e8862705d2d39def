"""How many files a process may have open, and what it says when that is too few."""

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
"""Open files of a worker beside those of its slots, with a few to spare."""
FILES_PER_SLOT = 6
"""Four pipes, the results that are being read, and one to spare."""


def file_limits() -> tuple[int, int] | None:
    """Return how many files this process may have open, and up to which number it may raise that.

    ``None``: the system sets no limit, or does not tell.
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
    """Have this process allowed so many open files, or as many as can be.

    Returns:
        The limit that there was; ``None``: there is none.
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
            pass  # macOS has a limit of its own below the hard one
    return soft


def too_many_files(exc: OSError) -> str:
    """Return what to add to the message of an error: what to do, if it is for want of files."""
    if exc.errno == errno.ENFILE:
        return "; this machine has as many files open as it may"
    if exc.errno != errno.EMFILE:
        return ""
    limits = file_limits()
    most = "no more" if limits is None else str(limits[0])
    return f"; this process may have {most} files open: raise that (ulimit -n 4096)"


def can_open(count: int) -> bool:
    """Say whether this process may open so many more files, as far as one can tell."""
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
