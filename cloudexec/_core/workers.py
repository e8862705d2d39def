"""A worker, a launch, and the resources that a worker has for tasks, as the core sees them."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable

from cloudexec._core.events import ProcessEnded
from cloudexec._core.facts import Attempt
from cloudexec._core.queue import TaskQueue
from cloudexec._core.resources import ResourceRequest, Resources
from cloudexec._core.tasks import Task, TaskState

__all__ = ["STAGES", "Allocation", "Launch", "Stage", "Worker", "WorkerState"]


class WorkerState(enum.Enum):
    """Whether a worker gets tasks."""

    ACTIVE = "active"
    DRAINING = "draining"
    """The worker finishes its tasks, and gets no more."""


class Stage(enum.Enum):
    """How far the end of a worker has come. Only ``ends`` changes it."""

    CONNECTED = "connected"
    CUT = "cut"
    """The connection was cut. The worker may work on and connect again."""
    CLOSED = "closed"
    """The connection has ended for good. The report of the process's end is waited for."""
    REPORTED = "reported"
    """The process has ended. The connection may have messages that are not read yet."""
    LOST = "lost"
    """Nothing is waited for any more, and the session is closed."""


STAGES: dict[Stage, frozenset[Stage]] = {
    Stage.CONNECTED: frozenset({Stage.CUT, Stage.CLOSED, Stage.REPORTED, Stage.LOST}),
    Stage.CUT: frozenset({Stage.CONNECTED, Stage.CLOSED, Stage.LOST}),
    Stage.CLOSED: frozenset({Stage.LOST}),
    Stage.REPORTED: frozenset({Stage.LOST}),
    Stage.LOST: frozenset(),
}
"""By stage: the stages that may follow. ``ends`` refuses all other changes."""


_ACTIVE, _CONNECTED = WorkerState.ACTIVE, Stage.CONNECTED  # found faster, for each batch of tasks


class Allocation:
    """The resources of a worker, or of a machine that several workers share.

    Most tasks ask for no more than one slot's share. As many of these fit as there are slots, and
    resources are not added up. They are added up only while a task has more than that.

    Attributes:
        capacity: The resources in all.
        slots: Number of slots that share them.
        tight: Whether plain tasks do not fit into all of the slots.
        workers: The workers that share them.
        heavy: Leases of tasks with more than a slot's share, each with the task's GPUs.
        saving_for: The queue whose first task waits for room here. Tasks of later queues are not
            sent meanwhile.
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
        """Say whether a request asks for no more than one slot's share."""
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
        """Say whether such a task fits into any free slot, without adding up resources."""
        return not (self.heavy or self.tight) and self.is_light(request)

    def room_left(self, request_of: Callable[[Task], ResourceRequest]) -> Resources | None:
        """Return the resources that the present tasks leave; ``None`` while some were sent ahead.

        Only the worker knows when tasks that were sent ahead begin.
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
        """Stop saving room if no worker here takes tasks, so that another worker may save it."""
        if not any(worker.takes_tasks for worker in self.workers.values()):
            self.saving_for = None

    def free_gpus(self, count: int) -> tuple[str, ...]:
        """Return the first ``count`` GPUs that no task uses."""
        taken = {each for ids in self.heavy.values() for each in ids}
        return tuple([each for each in self.gpu_ids if each not in taken][:count])


class Worker:
    """A worker that has connected.

    Attributes:
        id: Its name.
        slots: Number of tasks that it can run at once.
        launch: The launch that it belongs to.
        connected_at: When it connected.
        shape: The size and slots with which it was launched. Workers of one shape serve the same
            tasks.
        allocation: Its resources, and the tasks that use them.
        state: Whether it gets tasks.
        leases: By lease, in the order sent: its tasks. Cancelled ones stay until it answers.
        load: Estimated seconds of work of these tasks.
        ready: Whether it may have begun any task.
        paused_until: The time until which no task is sent ahead to it.
        completed: Number of tasks that it has answered.
        idle_since: When its last lease ended; ``None`` while it has one.
        heard_at: When its last message came.
        cut_at: When its connection was cut, or when a worker that was taken over connected which
            has not said yet what it holds; ``None`` otherwise.
        over_at: When it was found to drain without tasks; ``None`` otherwise.
        reclaimed: Whether its platform wants it back.
        stage: How far its end has come.
        report: The launcher's report that its process has ended.
        why: Why its connection has ended, in words.
        unheard: Whether its connection has ended in such a way that its last messages may be lost.
        told_at: When it was told to end at once; ``None`` otherwise.
        until: The time at which it is lost if nothing else happens; ``None`` if there is none.
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
        self.reclaimed = False
        self.stage = Stage.CONNECTED
        self.report: ProcessEnded | None = None
        self.why = ""
        self.unheard = False
        self.told_at: float | None = None
        self.until: float | None = None

    @property
    def size(self) -> int:
        """Which of the launcher's sizes it has, from 0."""
        return self.shape[0]

    @property
    def is_active(self) -> bool:
        """Whether it was not told to end, so that it gets tasks, now or once it is connected."""
        return self.state is WorkerState.ACTIVE

    @property
    def is_within_reach(self) -> bool:
        """Whether messages reach it, so that it can be sent tasks or asked for them."""
        return self.cut_at is None and self.stage is _CONNECTED

    @property
    def takes_tasks(self) -> bool:
        """Whether tasks can be sent to it now."""
        return self.state is _ACTIVE and self.cut_at is None and self.stage is _CONNECTED

    @property
    def has_drained(self) -> bool:
        """Whether it was told to end and has no task left, so that its end is no loss."""
        return self.state is WorkerState.DRAINING and not self.leases

    @property
    def free(self) -> int:
        """Number of slots without a task."""
        return max(0, self.slots - len(self.leases))

    def sent_ahead(self) -> list[int]:
        """Return the leases of tasks that are not known to have begun."""
        return [lease for lease, task in self.leases.items() if task.state is TaskState.SENT]

    def attempts(self, leases: Iterable[int] | None = None) -> list[Attempt]:
        """Return the attempts of its tasks, or of those of some leases, that are not done."""
        held = self.leases
        return [
            Attempt(task, lease, task.lost + 1, task.state is TaskState.RUNNING)
            for lease in (held if leases is None else leases)
            if (task := held.get(lease)) is not None and task.state is not TaskState.DONE
        ]

    @property
    def has_work(self) -> bool:
        """Whether any of its tasks is not done."""
        return any(task.state is not TaskState.DONE for task in self.leases.values())

    def give(self, task: Task, lease: int) -> None:
        """Give this worker the lease of a task."""
        task.lease = lease
        task.worker = self.id
        task.cost = task.stats.seconds
        self.load += task.cost
        self.leases[lease] = task
        self.idle_since = None

    def take_back(self, lease: int) -> Task | None:
        """Take a lease back and return its task; ``None`` if this worker does not hold it."""
        task = self.leases.pop(lease, None)
        if task is not None:
            self.allocation.heavy.pop(lease, None)
            self.load -= task.cost
            if task.lease == lease:
                task.worker = None
                task.lease = 0
        return task


class Launch:
    """A worker that was launched and has not connected; its attributes are those of a worker."""

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
