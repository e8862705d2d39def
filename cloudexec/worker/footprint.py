"""Enforces limits of time and memory, for a task and the processes that it has started."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable

from cloudexec._record_class import record
from cloudexec.worker.child import Child
from cloudexec.worker.frames import CURRENT
from cloudexec.worker.tasks import OUTGREW, TIMED_OUT, WorkItem

__all__ = ["Footprint", "memory_taken"]

_MEMORY_TICK = 0.02
"""Seconds between two measurements of tasks that have a limit."""
_FULL = 0.8
"""A killed slot counts as out of memory if it had this part of its share of the container."""

_PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
_MOST_PROCESSES = 1000


def memory_taken(pid: int, enough: int) -> int:
    """Return the bytes of private memory of a process and its descendants.

    Mapped files and shared memory do not count, because they do not belong to the task alone. A
    limit on the address space would not serve: libraries map much memory that they never use.

    Args:
        pid: The slot's process id.
        enough: Bytes up to which a quick measurement suffices. It counts memory twice that a
            process shares with its forked children. Above this number the kernel is asked for exact
            shares, which takes longer.

    Returns:
        Bytes; 0 if they are not known, which is so on all systems except Linux.
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
            continue  # the process has ended, or the kernel does not tell
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


_CONTAINER_EVENTS = (
    "/sys/fs/cgroup/memory.events",  # version 2
    "/sys/fs/cgroup/memory/memory.oom_control",  # version 1
)


def _oom_kills(*, alone: bool) -> int:
    """Return how many processes the kernel has killed for lack of memory, as far as it tells.

    Args:
        alone: Whether this is a container with a limit of its own, so that kills on the rest of the
            machine do not count.
    """
    count = 0
    for path in _CONTAINER_EVENTS if alone else (*_CONTAINER_EVENTS[:1], "/proc/vmstat"):
        try:
            with open(path) as file:
                for line in file:
                    if line.startswith("oom_kill "):
                        count += int(line.split()[1])
        except (OSError, ValueError):
            continue
    return count


@record(frozen=False)
class _Limit:
    """The limit of one task, and what its slot had taken when the task was sent, in bytes."""

    most: int
    before: int


class Footprint:
    """Kills tasks that exceed their limit of time or memory, and tells which slots ran out of it.

    Args:
        memory: Bytes of the container's memory; 0 if it is not known, or is shared with others.
        slots: Number of slots that share the memory.
        kill: Called with leases, and with the kind of failure that they get.
    """

    def __init__(self, memory: int, slots: int, kill: Callable[[list[int], int], None]) -> None:
        self._is_container = memory > 0
        self._share = memory / slots
        self._kill = kill
        self._loop = asyncio.get_running_loop()
        self._timers: dict[Child, asyncio.TimerHandle] = {}
        self._limits: dict[Child, _Limit] = {}
        self._look_handle: asyncio.TimerHandle | None = None
        self._oom_kills = _oom_kills(alone=self._is_container)

    def begin(self, slot: Child, item: WorkItem) -> None:
        """Begin to watch a task, which is about to be sent to a slot that holds no other."""
        if item.timeout > 0:
            kill = self._loop.call_later(item.timeout, self._kill, [item.lease], TIMED_OUT)
            self._timers[slot] = kill
        most = 0 if item.requirements is None else item.requirements.memory
        if most:
            self._limits[slot] = _Limit(most, memory_taken(slot.pid, most))
            if self._look_handle is None:
                self._look_handle = self._loop.call_later(_MEMORY_TICK, self._look)

    def end(self, slot: Child) -> None:
        """Stop watching a slot, which has answered all its tasks or is gone."""
        if (timer := self._timers.pop(slot, None)) is not None:
            timer.cancel()
        self._limits.pop(slot, None)

    def _look(self) -> None:
        """Kill the slots whose tasks exceed their limit."""
        self._look_handle = None
        for slot, limit in list(self._limits.items()):
            item = slot.held.get(slot.cells[CURRENT])
            if item is None or slot.is_over:
                continue
            taken = memory_taken(slot.pid, limit.most + limit.before) - limit.before
            if taken > limit.most:
                slot.kill_message = str(taken)
                self._kill([item.lease], OUTGREW)
        if self._limits:
            self._look_handle = self._loop.call_later(_MEMORY_TICK, self._look)

    def ran_out(self, code: int, peak: int) -> bool:
        """Say whether a slot that this worker has not killed was killed for lack of memory.

        Args:
            code: The slot's exit code, or the negative number of the signal that ended it.
            peak: The most memory that the slot had, in bytes.
        """
        kills = _oom_kills(alone=self._is_container)
        before, self._oom_kills = self._oom_kills, kills
        # If the container's counters cannot be read, the slot's own share of memory must decide.
        filled = 0 < _FULL * self._share <= peak
        return code == -signal.SIGKILL and (kills > before or filled)
