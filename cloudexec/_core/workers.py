"""A worker, a launch, and what a worker has for tasks, as the core sees them."""

from __future__ import annotations

import enum
from collections.abc import Callable

from cloudexec._core.queue import TaskQueue
from cloudexec._core.resources import ResourceRequest, Resources
from cloudexec._core.tasks import Task, TaskState

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
        tight: Whether tasks that ask for nothing do not fit into all of its slots.
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
        self.saving_for: TaskQueue | None = None
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

    def needs_only_a_slot(self, request: ResourceRequest) -> bool:
        """Say whether any free slot here has room for such a task, and nothing is counted."""
        return not (self.heavy or self.tight) and self.is_light(request)

    def room_left(self, request_of: Callable[[Task], ResourceRequest]) -> Resources | None:
        """Return what the tasks at hand leave; ``None`` while some were sent ahead of need.

        Those wait on their worker for a slot: when they begin is for the worker to say.
        """
        cpus, memory, gpus = self.capacity
        for worker in self.workers.values():
            if len(worker.leases) > worker.slots:
                return None
            for task in worker.leases.values():
                need = request_of(task).need
                cpus -= need.cpus
                memory -= need.memory
                gpus -= need.gpus
        return Resources(cpus, memory, gpus)

    def give_up_saving(self) -> None:
        """Save no room where no worker takes tasks: whoever waits for it may have it elsewhere."""
        if not any(worker.takes_tasks for worker in self.workers.values()):
            self.saving_for = None

    def free_gpus(self, count: int) -> tuple[str, ...]:
        """Return the first GPUs that no task has."""
        taken = {each for ids in self.heavy.values() for each in ids}
        return tuple([each for each in self.gpu_ids if each not in taken][:count])


class Worker:
    """A process that dialed back.

    Attributes:
        id: Its name.
        slots: Tasks it can run at once.
        launch: Which launch it came of.
        connected_at: When it dialed back.
        shape: Size and slots that it was launched with: those alike serve the same tasks.
        allocation: What it has for tasks, and who uses it.
        state: Whether it is to get tasks.
        leases: Lease -> task, in the order sent; cancelled tasks stay until the worker answers.
        load: Estimated seconds of work behind those leases.
        ready: Whether it may have begun any of its tasks.
        paused_until: Until then it gets nothing ahead of need.
        completed: Tasks it has answered for.
        idle_since: When its last lease went; ``None`` while it has one.
        heard_at: When it was last heard of.
        cut_at: When its connection was cut; ``None`` while it has one.
        over_at: When it was found to drain with nothing left to do; ``None`` otherwise.
    """

    def __init__(
        self,
        worker_id: str,
        slots: int,
        launch: str,
        now: float,
        shape: tuple[int, int],
        allocation: Allocation,
    ) -> None:
        self.id = worker_id
        self.slots = slots
        self.launch = launch
        self.connected_at = now
        self.shape = shape
        self.allocation = allocation
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

    @property
    def size(self) -> int:
        """Which of the launcher's sizes it has, from 0."""
        return self.shape[0]

    @property
    def is_active(self) -> bool:
        """Whether it is not told to end: it gets tasks, now or once it is back."""
        return self.state is WorkerState.ACTIVE

    @property
    def takes_tasks(self) -> bool:
        """Whether it can be sent tasks now."""
        return self.state is WorkerState.ACTIVE and self.cut_at is None

    @property
    def free(self) -> int:
        """Slots without a task."""
        return max(0, self.slots - len(self.leases))

    def sent_ahead(self) -> list[int]:
        """Return the leases of tasks that are not known to have begun."""
        return [lease for lease, task in self.leases.items() if task.state is TaskState.SENT]

    @property
    def has_work(self) -> bool:
        """Whether any of its tasks is not done."""
        return any(task.state is not TaskState.DONE for task in self.leases.values())

    def give(self, task: Task, lease: int) -> None:
        """Have this worker hold a task's lease."""
        task.lease = lease
        task.worker = self.id
        task.cost = task.stats.seconds
        self.load += task.cost
        self.leases[lease] = task
        self.idle_since = None

    def take_back(self, lease: int) -> Task | None:
        """Have this worker hold a lease no more; ``None`` if it has no such lease (any more)."""
        task = self.leases.pop(lease, None)
        if task is not None:
            self.allocation.heavy.pop(lease, None)
            self.load -= task.cost
            if task.lease == lease:
                task.worker = None
                task.lease = 0
        return task


class Launch:
    """A worker that was asked for and has not dialed back; what it has is as for a worker."""

    def __init__(
        self, launch_id: str, slots: int, now: float, shape: tuple[int, int], capacity: Resources
    ) -> None:
        self.id = launch_id
        self.slots = slots
        self.started_at = now
        self.shape = shape
        self.capacity = capacity

    @property
    def size(self) -> int:
        """Which of the launcher's sizes it has, from 0."""
        return self.shape[0]
