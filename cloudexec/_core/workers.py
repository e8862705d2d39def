"""Workers and launches as the core sees them."""

from __future__ import annotations

import enum
from typing import Any

from cloudexec._core.resources import ResourceRequest, Resources
from cloudexec._core.tasks import Task

__all__ = ["Allocation", "Launch", "Worker", "WorkerState"]


class WorkerState(enum.Enum):
    """What a connected worker is for."""

    ACTIVE = "active"
    DRAINING = "draining"
    """Finishes what it has, gets nothing new."""


class Allocation:
    """What a worker, or a machine with several, has for tasks.

    Most tasks ask for no more than one slot's share: any of them fit, as many as there are slots,
    and nothing is counted. Only while a heavier one is there, all are.

    Attributes:
        capacity: What there is.
        slots: Among how many slots.
        tight: Whether tasks that request nothing do not fit into all of its slots.
        workers: Whose it is.
        heavy: Leases of tasks with more than a slot's share, each with the GPUs that are its.
        saving_for: The queue whose first task waits for room here; nothing behind it is sent.
    """

    __slots__ = (
        "_light",
        "capacity",
        "gpu_ids",
        "heavy",
        "saving_for",
        "slots",
        "tight",
        "workers",
    )

    def __init__(
        self, capacity: Resources, slots: int, plain: ResourceRequest, gpu_ids: tuple[str, ...] = ()
    ) -> None:
        self.capacity = capacity
        self.slots = slots
        self.gpu_ids = gpu_ids or tuple(map(str, range(capacity.gpus)))
        self.workers: dict[str, Worker] = {}
        self.heavy: dict[int, tuple[str, ...]] = {}
        self.saving_for: Any = None
        self._light: dict[ResourceRequest, bool] = {}
        self.tight = not self.is_light(plain)

    def is_light(self, request: ResourceRequest) -> bool:
        """Say whether a request is no more than one slot's share."""
        known = self._light.get(request)
        if known is None:
            need, have, slots = request.need, self.capacity, self.slots
            known = not need.gpus and (
                need.cpus * slots <= have.cpus and need.memory * slots <= have.memory
            )
            if len(self._light) > 1000:
                self._light.clear()
            self._light[request] = known
        return known

    def free_gpus(self, count: int) -> tuple[str, ...]:
        """Return the first GPUs that no task has."""
        taken = {each for ids in self.heavy.values() for each in ids}
        return tuple([each for each in self.gpu_ids if each not in taken][:count])


class Worker:
    """A process that dialed back.

    Attributes:
        id: Its name.
        slots: Tasks it can run at once.
        leases: Lease -> task, in the order sent; cancelled tasks stay until the worker answers.
        load: Estimated seconds of work behind those leases.
        ready: Whether it may have begun any of its tasks.
        size: Which size it has, from 0.
        pool: Size and slots that it was launched with: those alike serve the same tasks.
        allocation: What it has for tasks, and who uses it.
        connected_at: When it dialed back.
        paused_until: Until then it gets nothing ahead of need.
        completed: Tasks it has answered for.
        idle_since: When its last lease went; ``None`` while it has one.
        heard_at: When it was last heard of.
        cut_at: When its connection was cut; ``None`` while it has one.
        over_at: When it was found to drain with nothing left to do; ``None`` otherwise.
    """

    __slots__ = (
        "allocation",
        "completed",
        "connected_at",
        "cut_at",
        "heard_at",
        "id",
        "idle_since",
        "launch",
        "leases",
        "load",
        "over_at",
        "paused_until",
        "pool",
        "ready",
        "size",
        "slots",
        "state",
    )

    def __init__(
        self,
        worker_id: str,
        slots: int,
        launch: str,
        now: float,
        pool: tuple[int, int],
        allocation: Allocation,
    ) -> None:
        self.id = worker_id
        self.pool = pool
        self.size = pool[0]
        self.allocation = allocation
        self.connected_at = now
        self.slots = slots
        self.launch = launch
        self.state = WorkerState.ACTIVE
        self.leases: dict[int, Task] = {}
        self.load = 0.0
        self.ready = False
        self.paused_until = 0.0
        self.completed = 0
        self.idle_since: float | None = now
        self.heard_at = now
        self.cut_at: float | None = None
        self.over_at: float | None = None


class Launch:
    """A worker that was asked for and has not dialed back."""

    __slots__ = ("capacity", "id", "pool", "size", "slots", "started_at")

    def __init__(
        self, launch_id: str, slots: int, now: float, pool: tuple[int, int], capacity: Resources
    ) -> None:
        self.id = launch_id
        self.slots = slots
        self.pool = pool
        self.size = pool[0]
        self.capacity = capacity
        self.started_at = now
