"""What tasks ask of a worker, and what a worker has: whole numbers, so that sums are exact."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from cloudexec._config import ScalingPolicy, TaskOptions, WorkerCapacity

__all__ = ["Requirements", "ResourceRequest", "Resources", "plain_requests"]

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
    def shape(self) -> tuple[int, int]:
        """Size and slots of the workers for it: those of one shape are launched alike."""
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


def plain_requests(scaling: ScalingPolicy) -> list[ResourceRequest]:
    """Return, for each size of worker, what a task takes there that asked for nothing: one slot."""
    # Of sizes that the launcher does not know, each stands for more memory than the one before.
    sizes = scaling.sizes or [
        WorkerCapacity(cpus=1e6, memory=(size + 1) << 60) for size in range(scaling.size_count)
    ]
    slots = scaling.slots_per_worker
    # On one machine, all workers share what there is.
    sharing = max(slots, scaling.max_slots) if scaling.one_machine else slots
    return [
        ResourceRequest(
            need=whole.share(sharing),
            size=size,
            whole=whole,
            slots=slots,
            # Of a larger size, the whole worker counts: with a share of more it may do worse.
            floor=whole._replace(gpus=0) if size else whole.share(scaling.max_slots),
        )
        for size, whole in enumerate(map(Resources.had_by, sizes))
    ]
