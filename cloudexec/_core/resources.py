"""What tasks request of a worker, and what a worker has: whole numbers, so that sums are exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from cloudexec._config import TaskOptions, WorkerCapacity

__all__ = ["ResourceRequest", "Resources", "Requirements"]

_MICRO = 1_000_000
_UNKNOWN = 1 << 62
"""Stands for as much as anybody may want, where nothing is known."""


class Resources(NamedTuple):
    """An amount of each, of a worker or for a task.

    Processors count in millionths: ten tasks with ``cpus=0.1`` are exactly one.
    """

    cpus: int
    memory: int
    """Bytes."""
    gpus: int = 0

    @classmethod
    def of(cls, cpus: float, memory: int, gpus: int = 0) -> Resources:
        """Take amounts as people give them; a share too small to count is the least there is."""
        # Rounded down: three thirds must fit into one.
        micro = math.floor(min(cpus, 1e9) * _MICRO + 1e-3)
        return cls(max(micro, 1), memory, gpus)

    @classmethod
    def had_by(cls, capacity: WorkerCapacity) -> Resources:
        """Read what a worker has; memory of which nothing is known is enough for anybody."""
        return cls.of(capacity.cpus, capacity.memory or _UNKNOWN, capacity.gpus)

    def within(self, room: Resources) -> bool:
        """Say whether this fits into that."""
        return self[0] <= room[0] and self[1] <= room[1] and self[2] <= room[2]

    def times_in(self, room: Resources) -> int:
        """Say how often this fits into that."""
        return min(have // need for need, have in zip(self, room, strict=True) if need)

    def share(self, slots: int) -> Resources:
        """Return one slot's share; of GPUs, none."""
        return Resources(max(self.cpus // slots, 1), self.memory // slots)


@dataclass(frozen=True, slots=True)
class ResourceRequest:
    """What one task needs, and which size of worker is launched for it.

    Attributes:
        need: Taken from a worker while the task runs there.
        size: The launcher's size of a worker for such tasks.
        whole: What a worker of that size has.
        slots: How many such tasks a worker of that size is launched for.
        floor: What a worker must have in all for the task to be sent there.
    """

    need: Resources
    size: int
    whole: Resources
    slots: int
    floor: Resources

    def fits(self, capacity: Resources) -> bool:
        """Say whether workers that have this in all may be sent such tasks."""
        return self.floor.within(capacity)

    @property
    def pool(self) -> tuple[int, int]:
        """Workers that are launched alike: size and slots."""
        return self.size, self.slots


@dataclass(frozen=True, slots=True, eq=False)
class Requirements:
    """How the tasks of a view differ from those that nothing was said about.

    Attributes:
        options: What was said.
        requests: What they ask for, then what after they ran out of memory with that, once, twice
            and so on; empty: one slot.
        priority: Higher ones go first.
        judged: Whether what they raise may be a reason to run them again.
    """

    options: TaskOptions
    requests: tuple[ResourceRequest, ...] = ()
    priority: int = 0
    judged: bool = False
