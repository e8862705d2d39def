"""Which queued tasks go to a worker that has room."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from cloudexec._config import SendingPolicy
from cloudexec._core.resources import ResourceRequest, Resources
from cloudexec._core.tasks import Input, Task, TaskState
from cloudexec._core.workers import Allocation, Worker

__all__ = [
    "TaskQueue",
    "best_holder",
    "bytes_held",
    "in_order",
    "room_left",
    "take_fitting",
    "take_tasks",
]

_WAITING, _SENT, _RUNNING = TaskState.WAITING, TaskState.SENT, TaskState.RUNNING


class TaskQueue:
    """Tasks that wait for the same: with one priority and one request.

    Attributes:
        key: What the machine finds it by.
        priority: Higher ones go first.
        request: Of each of its tasks.
        alone: Whether each of its tasks is to have a worker to itself.
        tasks: Those that wait, in the order they came; some may have been cancelled meanwhile.
        open: Its tasks that are not done, waiting or not. Not kept for plain tasks.
    """

    __slots__ = ("alone", "key", "open", "priority", "request", "tasks")

    def __init__(
        self, key: object, priority: int, request: ResourceRequest, *, alone: bool = False
    ) -> None:
        self.key = key
        self.priority = priority
        self.request = request
        self.alone = alone
        self.tasks: deque[Task] = deque()
        self.open = 0

    def head(self) -> Task | None:
        """Return the first task that still waits; those cancelled before it are dropped."""
        tasks = self.tasks
        while tasks:
            if tasks[0].state is _WAITING:
                return tasks[0]
            tasks.popleft()
        return None


def in_order(queues: Iterable[TaskQueue], worker: Worker) -> list[TaskQueue]:
    """Return the queues that a worker may serve, in the order in which it should.

    Higher priorities first; then what this size of worker was launched for, so that larger ones
    serve small tasks only when they have nothing else to do; then the largest size; then who came
    first.
    """
    found = []
    capacity, size = worker.allocation.capacity, worker.size
    for queue in queues:
        request = queue.request
        head = queue.head()
        if head is not None and request.floor.within(capacity):
            stranger = request.size != size
            least = -request.whole.memory if stranger else 0
            found.append(((-queue.priority, stranger, least, head.number), queue))
    found.sort(key=lambda entry: entry[0])
    return [queue for _, queue in found]


def room_left(
    allocation: Allocation, request_of: Callable[[Task], ResourceRequest]
) -> Resources | None:
    """Return what the tasks at hand leave; ``None`` while some were sent ahead of need.

    Those wait on their worker for a slot: when they begin is for the worker to say.
    """
    cpus, memory, gpus = allocation.capacity
    for worker in allocation.workers.values():
        if len(worker.leases) > worker.slots:
            return None
        for task in worker.leases.values():
            need = request_of(task).need
            cpus -= need.cpus
            memory -= need.memory
            gpus -= need.gpus
    return Resources(cpus, memory, gpus)


def take_fitting(
    queue: TaskQueue, worker: Worker, leases: Iterator[int], share: int, room: Resources
) -> tuple[list[Task], Resources]:
    """Move tasks from the head of a queue to free slots of a worker, as many as fit; none ahead.

    Args:
        queue: Whose tasks.
        worker: Who has free slots.
        leases: Where new lease numbers come from.
        share: Most tasks to take.
        room: What its allocation has left.

    Returns:
        The tasks, which begin at once, and what is left then.
    """
    taken: list[Task] = []
    request, allocation = queue.request, worker.allocation
    need = request.need
    light = allocation.is_light(request)
    while len(taken) < share and len(worker.leases) < worker.slots and need.within(room):
        task = queue.head()
        if task is None:
            break
        queue.tasks.popleft()
        lease = give(task, worker, leases)
        task.state = _RUNNING
        if not light:
            allocation.heavy[lease] = allocation.free_gpus(need.gpus) if need.gpus else ()
        room = Resources(room.cpus - need.cpus, room.memory - need.memory, room.gpus - need.gpus)
        taken.append(task)
    return taken, room


def give(task: Task, worker: Worker, leases: Iterator[int]) -> int:
    """Give a task's lease to a worker, and return the lease; its state is for the caller to set."""
    task.lease = lease = next(leases)
    task.worker = worker.id
    task.cost = task.stats.seconds
    worker.load += task.cost
    worker.leases[lease] = task
    worker.idle_since = None
    return lease


def bytes_held(inputs: Iterable[Input], worker: str) -> int:
    """Return how many bytes of a task's inputs a worker has already."""
    return sum(each.size for each in inputs if worker in each.workers)


def best_holder(inputs: Iterable[Input], workers: Iterable[Worker]) -> Worker | None:
    """Return the worker that has most of a task's inputs; ``None`` if none of them has any.

    Among equals the one with the least to do. The size of the machine does not matter: only those
    that hold something are looked at.

    Args:
        inputs: Of the task.
        workers: Those that may have it, in the order in which equals are preferred.
    """
    held: dict[str, int] = {}
    for each in inputs:
        if each.size > 0:
            for name in each.workers:
                held[name] = held.get(name, 0) + each.size
    if not held:
        return None
    holders = [worker for worker in workers if worker.id in held]
    return max(holders, key=lambda w: (held[w.id], -len(w.leases)), default=None)


def take_tasks(
    queue: deque[Task],
    worker: Worker,
    policy: SendingPolicy,
    leases: Iterator[int],
    share: int,
    now: float = 0.0,
) -> tuple[list[Task], int]:
    """Move tasks from the head of the queue to a worker.

    A free slot always gets a task. Beyond that, tasks are sent ahead only while the estimated work
    on the worker stays below ``policy.lookahead`` seconds per slot; a kind of task of which nothing
    is known counts as long, and look-ahead doubles with what is known. So no-ops travel by the
    thousand, and a task longer than the look-ahead leaves when a slot is free, not before.

    Args:
        queue: Waiting tasks; those cancelled meanwhile are dropped here.
        worker: Who has room.
        policy: How far ahead.
        leases: Where new lease numbers come from.
        share: Most tasks to take, so that others get theirs.
        now: The time, in seconds.

    Returns:
        The tasks, and how many of them (the first ones) begin at once in a free slot.
    """
    taken: list[Task] = []
    starting = 0
    slots = worker.slots
    held = worker.leases
    load = worker.load
    budget = policy.lookahead * slots
    cap = policy.max_lookahead * slots
    in_flight = len(held)
    if now < worker.paused_until:
        cap = slots
    if in_flight >= slots and (2 * load > budget or 2 * in_flight > cap):
        # Well supplied. Topping up for each result that comes would make messages of a few tasks.
        return [], 0
    name = worker.id
    while queue and len(taken) < share:
        task = queue[0]
        if task.state is not _WAITING:
            queue.popleft()
            continue
        kind = task.stats
        seconds = kind.seconds
        if in_flight < slots:
            starting += 1
            task.state = _RUNNING
        elif load + seconds <= budget and in_flight < cap and in_flight < slots + 2 * kind.samples:
            task.state = _SENT
        else:
            break
        queue.popleft()
        task.lease = lease = next(leases)
        task.worker = name
        task.cost = seconds
        load += seconds
        held[lease] = task
        in_flight += 1
        taken.append(task)
    worker.load = load
    if taken:
        worker.idle_since = None
    return taken, starting
