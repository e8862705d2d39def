"""How many connections this process may have open at once: one for each worker, if that can be."""

from __future__ import annotations

from cloudexec._log import Log

__all__ = ["most_connections"]

_logger = Log()
_UNLIMITED = 65_536
_LEAST = 64
_RESERVE = 256
"""Descriptors that are left to the rest of the program, at least; or an eighth of all."""
_GUESTS = 256
"""Peers that may be in the middle of enrolment beside the workers that are connected."""


def most_connections(workers: int) -> int:
    """Say how many connections may be accepted; have more files allowed if workers need them.

    A process has a limit on its open files, often 1,024 or 256, that it may raise up to a second,
    hard one. It is raised only for executors with many workers, and only as far as they need: in
    programs that use ``select()``, which takes no descriptor past 1,023, it is better left alone.

    Args:
        workers: Most that may be connected at once.
    """
    try:
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    except (ImportError, OSError):
        return _UNLIMITED
    if soft < 0 or soft == resource.RLIM_INFINITY:
        return _UNLIMITED
    wanted = workers + min(workers, _GUESTS)
    if _connections(soft) >= wanted:
        return _connections(soft)
    enough = max(wanted + _RESERVE, -(-wanted * 8 // 7))
    allowed = enough if hard < 0 or hard == resource.RLIM_INFINITY else min(enough, hard)
    try:
        if allowed > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
            soft = allowed
    except (OSError, ValueError):
        pass  # macOS has a limit of its own below the hard one
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


def _connections(limit: int) -> int:
    return max(_LEAST, limit - max(_RESERVE, limit // 8))
