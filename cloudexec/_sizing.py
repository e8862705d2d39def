"""Finds the sizes of workers that a task needs, from its options and its launcher.

The sizes of a launcher are a ladder: each is larger than the one before, and a task that ran out of
memory goes to the next.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloudexec._config import ScalingPolicy, TaskOptions, WorkerCapacity

if TYPE_CHECKING:
    from cloudexec._core.resources import Requirements
    from cloudexec._launchers.base import Launcher

__all__ = ["ladder_of", "requirements_of"]


def ladder_of(launcher: Launcher) -> tuple[WorkerCapacity, ...]:
    """Return the resources of a worker of each size of the launcher; empty if not all are known."""
    found = [launcher.capacity(size) for size in range(launcher.size_count)]
    sizes = tuple(capacity for capacity in found if capacity is not None)
    return sizes if len(sizes) == len(found) else ()


def requirements_of(
    options: TaskOptions, launcher: Launcher, scaling: ScalingPolicy
) -> Requirements | None:
    """Return the resources that tasks with these options need; ``None`` for default options.

    Raises:
        ConfigError: If the launcher has no workers that could run the tasks.
    """
    if options == TaskOptions(retries=options.retries, key=options.key):
        return None  # this saves time for tasks without options
    from cloudexec._core.resources import Requirements, ResourceRequest, Resources

    requests: list[ResourceRequest] = []
    if not (options.cpus is None and options.memory is None and not options.gpus):
        gpus = options.gpus or 0
        share = WorkerCapacity(cpus=1.0)
        if scaling.sizes:
            base = scaling.sizes[0]
            slots = scaling.max_slots if scaling.one_machine else scaling.slots_per_worker
            share = WorkerCapacity(cpus=base.cpus / slots, memory=base.memory // slots)
        cpus = share.cpus if options.cpus is None else options.cpus
        memory = options.memory_bytes or share.memory

        def request(memory: int) -> ResourceRequest:
            size = launcher.size_for(cpus, memory, gpus)
            capacity = launcher.capacity(size) or WorkerCapacity(cpus=cpus, memory=memory)
            need, whole = Resources.of(cpus, memory, gpus), Resources.had_by(capacity)
            fitting = max(1, min(need.times_in(whole), launcher.most_slots(size)))
            if scaling.one_machine:
                fitting = scaling.slots_per_worker  # one worker has all resources of the machine
            return ResourceRequest(need, size, whole, fitting, need)

        requests.append(request(memory))
        # After the requested memory come the larger sizes; there a task gets a worker's whole
        # memory.
        for larger in scaling.sizes[1:]:
            if larger.memory > requests[-1].whole.memory:
                requests.append(request(larger.memory))
    return Requirements(options, tuple(requests), options.priority, options.retry_on is not None)
