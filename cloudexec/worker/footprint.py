"""How much memory a slot and what it started have taken."""

from __future__ import annotations

import os

__all__ = ["memory_taken"]

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_MOST_PROCESSES = 1000


def memory_taken(pid: int, enough: int) -> int:
    """Return the bytes of memory that are a process's own, and its descendants'.

    Mapped files and shared memory do not count: they are not the task's, or not its alone. So this
    is what a limit on address space would miss: libraries map much that they never touch.

    Args:
        pid: Of the slot.
        enough: Up to here a quick look will do, which counts twice what a process shares with those
            that it forked and neither has written to. Past it, the kernel is asked to share it out,
            which takes it longer.

    Returns:
        Bytes; 0 where that cannot be known, which is everywhere but on Linux.
    """
    if not pid:
        return 0
    family = _family(pid)
    total = sum(map(_anonymous, family))
    if total > enough and len(family) > 1:
        total = sum(map(_proportional, family))
    return total


def _family(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        if len(found) >= _MOST_PROCESSES:
            break
        try:
            for thread in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{thread}/children") as file:
                    found += map(int, file.read().split())
        except (OSError, ValueError):
            continue  # it has ended, or the kernel does not tell
    return found


def _anonymous(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            _, resident, shared = map(int, file.read().split()[:3])
    except (OSError, ValueError):
        return 0
    return (resident - shared) * _PAGE


def _proportional(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss_Anon:"):
                    return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return _anonymous(pid)
