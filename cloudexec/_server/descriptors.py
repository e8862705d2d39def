"""Limits on open files: how many connections fit, and warnings if the workers need more."""

from __future__ import annotations

import os

from cloudexec._descriptors import BASE_FILES, FILES_PER_SLOT, file_limits, raise_file_limit
from cloudexec._log import Log

__all__ = ["check_files", "most_connections"]

_logger = Log()
_UNLIMITED = 65_536
_LEAST = 64
_OWN_FILES = 32
"""Files that an executor opens in the client, without those for its workers."""
_FILES_PER_LOCAL_WORKER = 4
_FEW_WORKERS = 8
_RESERVE = 256
"""Descriptors left to the rest of the program: this number, or an eighth of all if that is more."""
_GUESTS = 256
"""Connections for peers that are enrolling (proving who they are), beside connected workers."""


def most_connections(workers: int) -> int:
    """Return how many connections may be accepted, and raise the limit of open files if needed.

    A process has a soft limit of open files, often 1,024 or 256, which it may raise up to its hard
    limit. It is raised only for executors with many workers, and only as far as these need it,
    because programs that use ``select()`` cannot handle descriptors above 1,023.

    Args:
        workers: The largest number of workers that may be connected at once.
    """
    limits = file_limits()
    if limits is None:
        return _UNLIMITED
    wanted = workers + min(workers, _GUESTS)
    if _connections(limits[0]) >= wanted:
        return _connections(limits[0])
    raise_file_limit(max(wanted + _RESERVE, -(-wanted * 8 // 7)))
    soft, _ = file_limits() or limits
    most = _connections(soft)
    if most < workers:
        _logger.warning(
            "%d workers may want to connect, and this process can take no more than %d: it may "
            "have %d files open; raise its limit (ulimit -Hn, LimitNOFILE=), or give the launcher "
            "more slots_per_worker",
            workers,
            most,
            soft,
        )
    return most


def check_files(workers: int, slots_per_worker: int, *, local: bool) -> None:
    """Warn at the start if the executor needs more open files than this process may have.

    Args:
        workers: The largest number of workers that may be connected at once.
        slots_per_worker: Number of tasks that each worker runs at once.
        local: Whether the workers are processes of this machine, which have the same limit.
    """
    limits = file_limits()
    if limits is None:
        return
    try:
        there = len(os.listdir("/dev/fd"))
    except OSError:
        there = 0
    # For many workers elsewhere, most_connections() checks the limit.
    each = _FILES_PER_LOCAL_WORKER * workers if local else min(workers, _FEW_WORKERS)
    here = there + _OWN_FILES + each
    in_worker = BASE_FILES + FILES_PER_SLOT * slots_per_worker if local else 0
    raise_file_limit(here)
    if limits[1] < max(here, in_worker):
        needed = max(here, in_worker)
        _logger.warning(
            "a process may have %d files open here, and this executor needs %d: fewer tasks run at "
            "once, or none. Raise the limit (ulimit -n %d), or give the executor a smaller "
            "max_workers",
            limits[1],
            needed,
            max(4096, needed),
        )


def _connections(limit: int) -> int:
    return max(_LEAST, limit - max(_RESERVE, limit // 8))
