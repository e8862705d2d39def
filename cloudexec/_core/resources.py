"""The resources that tasks request and workers have, as whole numbers, so that sums are exact."""

from __future__ import annotations

import math
from typing import NamedTuple

from cloudexec._config import ScalingPolicy, TaskOptions, WorkerCapacity
from cloudexec._record_class import record

__all__ = ["Requirements", "ResourceRequest", "Resources", "plain_requests"]

_MICRO = 1_000_000
_UNKNOWN = 1 << 62
"""Stands for an unknown amount, which is enough for any request."""


class Resources(NamedTuple):
    """Amounts of CPUs, memory and GPUs, of a worker or for a task.

    CPUs are counted in millionths, so that ten tasks with ``cpus=0.1`` need exactly one.
    """

    cpus: int
    memory: int
    """Bytes."""
    gpus: int = 0

    @classmethod
    def of(cls, cpus: float, memory: int, gpus: int = 0) -> Resources:
        """Convert amounts that users give; a share that would be 0 becomes the smallest unit."""
        # Rounded down, because three thirds must fit into one.
        micro = math.floor(min(cpus, 1e9) * _MICRO + 1e-3)
        return cls(max(micro, 1), memory, gpus)

    @classmethod
    def had_by(cls, capacity: WorkerCapacity) -> Resources:
        """Return the resources of a worker; unknown memory counts as enough for any request."""
        return cls.of(capacity.cpus, capacity.memory or _UNKNOWN, capacity.gpus)

    def within(self, room: Resources) -> bool:
        """Say whether these amounts fit into others."""
        return self[0] <= room[0] and self[1] <= room[1] and self[2] <= room[2]

    def times_in(self, room: Resources) -> int:
        """Return how often these amounts fit into others."""
        return min(have // need for need, have in zip(self, room, strict=True) if need)

    def share(self, slots: int) -> Resources:
        """Return one slot's share, which has no GPUs."""
        return Resources(max(self.cpus // slots, 1), self.memory // slots)


@record
class ResourceRequest:
    """The resources that one task needs, and the size of worker that is launched for it.

    Attributes:
        need: The resources that the task takes of its worker while it runs.
        size: The launcher's size of worker for such tasks.
        whole: The resources of a worker of that size.
        slots: Number of such tasks for which a worker of that size is launched.
        floor: The resources that a worker must have in all for the task to be sent to it.
    """

    need: Resources
    size: int
    whole: Resources
    slots: int
    floor: Resources

    def fits(self, capacity: Resources) -> bool:
        """Say whether such tasks may be sent to workers with these resources in all."""
        return self.floor.within(capacity)

    @property
    def shape(self) -> tuple[int, int]:
        """The size and the slots of workers for it, which together are called a shape."""
        return self.size, self.slots


@record
class Requirements:
    """The requirements of tasks that were submitted with options (``with_options``).

    Attributes:
        options: The options.
        requests: The resources that a task requests; then those after it ran out of memory once,
            twice and so on. Empty if it asks for one slot.
        priority: The priority; higher ones are served first.
        judged: Whether ``retry_on`` decides about exceptions that they raise.
    """

    options: TaskOptions
    requests: tuple[ResourceRequest, ...] = ()
    priority: int = 0
    judged: bool = False

    # Equal is only what is the same: the functions of ``retry_on`` need not be hashable.
    __eq__ = object.__eq__
    __hash__ = object.__hash__


def plain_requests(scaling: ScalingPolicy) -> list[ResourceRequest]:
    """Return, for each size of worker, the request of a plain task, which is one slot's share."""
    # If the capacities of sizes are not known, each stands for more memory than the one before.
    sizes = scaling.sizes or [
        WorkerCapacity(cpus=1e6, memory=(size + 1) << 60) for size in range(scaling.size_count)
    ]
    slots = scaling.slots_per_worker
    # On one machine, all workers share the machine's resources.
    sharing = max(slots, scaling.max_slots) if scaling.one_machine else slots
    return [
        ResourceRequest(
            need=whole.share(sharing),
            size=size,
            whole=whole,
            slots=slots,
            # On a larger size, a plain task needs a worker that has at least that size in all, as a
            # smaller worker with fewer slots may have less memory.
            floor=whole._replace(gpus=0) if size else whole.share(scaling.max_slots),
        )
        for size, whole in enumerate(map(Resources.had_by, sizes))
    ]
