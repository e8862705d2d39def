"""The machine: events in, commands out."""

from __future__ import annotations

import heapq
import itertools
import math
import operator
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from cloudexec._config import ServerConfig, WorkerCapacity
from cloudexec._core.commands import (
    CancelTasks,
    Command,
    DrainWorker,
    FailTask,
    FailTasksUnlaunched,
    Finish,
    JudgeFailure,
    KillTasks,
    LaunchWorker,
    MarkRunning,
    RecallTasks,
    ResolveTasks,
    SendTasks,
    TerminateLaunch,
    TerminateWorker,
)
from cloudexec._core.events import (
    DeadlinePassed,
    Event,
    Failure,
    FailureJudged,
    FailureKind,
    FailuresReceived,
    InputsRestored,
    LaunchesRefused,
    LaunchesTakenOver,
    LaunchFailed,
    LeasesReturned,
    ResultsReceived,
    ShutdownRequested,
    TasksBlocked,
    TasksCancelled,
    TasksDropped,
    TasksRecalled,
    TasksReleased,
    TasksStarted,
    TasksSubmitted,
    TasksTakenOver,
    WorkerBack,
    WorkerConnected,
    WorkerCut,
    WorkerDraining,
    WorkerHeard,
    WorkerLost,
    WorkerReady,
)
from cloudexec._core.quarantine import PARTS, Quarantine
from cloudexec._core.resources import ResourceRequest, Resources
from cloudexec._core.scaling import sizes_to_launch
from cloudexec._core.scheduling import (
    TaskQueue,
    best_holder,
    give,
    in_order,
    room_left,
    take_fitting,
    take_tasks,
)
from cloudexec._core.tasks import FunctionStats, Task, TaskState
from cloudexec._core.workers import Allocation, Launch, Worker, WorkerState

__all__ = ["Machine"]

_WAITING, _SENT = TaskState.WAITING, TaskState.SENT
_RUNNING, _DONE = TaskState.RUNNING, TaskState.DONE
_BLOCKED, _BACKING_OFF = TaskState.BLOCKED, TaskState.BACKING_OFF
_requirements_of = operator.attrgetter("requirements")
_inputs_of = operator.attrgetter("inputs")

_REBALANCE_AFTER = 0.1
"""Seconds between looks at whether one worker sits on tasks that another could run."""
_LOOK_PAUSE = 1e-5
"""Seconds, for each worker there is or will be, between two looks at all of them: a look takes a
small part of that, and the times at which thousands are due come as close as they like."""
_SPARE = 16
"""Hungry workers that are listed beyond as many as tasks wait: a few turn out to be full."""
_CANCEL_PAUSE = 0.05
"""Seconds after a cancellation in which a worker gets nothing ahead of need."""
_SUSPICIONS = 10
"""Workers that may be lost before they were ready, under a task that they were to begin with,
before each further one costs it an attempt: a task whose mere presence kills workers comes to an
end all the same."""
_FAREWELL = 10.0
"""Seconds in which a worker must end at the end of the executor: it gives its slots five."""
_HAND_OVER = 90.0
"""The same before that: others may need what it keeps, and half a minute goes to handing it over,
as much to waiting until it was taken."""
_LATER = 60.0
"""Seconds until workers are launched again after launches failed while others are at work."""
_KILLED_LAUNCHES = 20
"""Workers that may be killed from outside in a row, with no task done, before we give up."""
_WINDOW = 64
"""Tasks, beyond those that free slots are there for, among which a worker finds those whose inputs
it has."""
_OVERTAKEN = 64
"""Tasks that may go before the first in queue because their inputs are where there is room."""
_JUDGED = (FailureKind.RAISED, FailureKind.TIMED_OUT)


class Machine:
    """Decides for one executor. Single-threaded; holds no clock.

    Args:
        config: What to decide by.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        scaling = config.scaling
        self._wholes = [Resources.had_by(each) for each in scaling.sizes or _unknown(scaling.rungs)]
        self._gpu_ids = scaling.sizes[0].gpu_ids if scaling.sizes else ()
        self._plain_requests = [
            ResourceRequest(
                need=whole.share(max(scaling.slots_per_worker, self._sharing(whole))),
                size=size,
                whole=whole,
                slots=scaling.slots_per_worker,
                # On a ladder, the whole worker counts: with a share of more it may do worse.
                floor=whole._replace(gpus=0) if size else whole.share(scaling.max_slots),
            )
            for size, whole in enumerate(self._wholes)
        ]
        self._plain = TaskQueue(None, 0, self._plain_requests[0])
        self._queues: dict[object, TaskQueue] = {None: self._plain}
        """Waiting tasks, by what they wait for; queues without open tasks are dropped."""
        self._quarantine = Quarantine()
        # Lines that have, or had, tasks with inputs; not a set, whose order differs between runs.
        self._near: dict[TaskQueue, None] = {}
        self._passed: tuple[int, int] = (0, 0)  # who was overtaken last, and how often
        self._machine_allocation: Allocation | None = None  # where workers share one
        self.backing_off: dict[Task, float] = {}  # until when; infinite: not known yet
        self._awakenings: list[tuple[float, int, Task]] = []
        self.workers: dict[str, Worker] = {}
        self.launches: dict[str, Launch] = {}
        self.counts: Counter[str] = Counter()
        self.open_tasks = 0
        """Tasks that are not done, nor held: waiting, sent or running."""
        self.blocked: dict[Task, None] = {}
        """Tasks that wait for what they depend on: no demand, but they are to be finished."""
        self.shutting_down = False
        self.killing = False
        self.finished = False
        self.refusing = False
        """Whether no worker may be launched any more."""
        self._waiting = 0
        self._active_slots = 0  # of launches and active workers
        self._active_pools: dict[tuple[int, int], int] = {}  # the same by size and slots
        self._odd = 0  # how many of these pools are not the plain one
        self._total_slots = 0  # the same and of draining workers
        self.available: dict[str, None] = {}
        self._leases = itertools.count(1)
        self._launch_numbers = itertools.count(1)
        self._events = 0
        self._failed_launches = 0
        self._surplus_since: float | None = None
        self._killed_launches = 0
        self._launch_not_before = 0.0
        self._deadline: float | None = None
        self._look_not_before = 0.0
        self._to_wind_down = True
        self._out: list[Command] = []
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            TasksSubmitted: self._on_submitted,
            TasksBlocked: self._on_blocked,
            TasksReleased: self._on_released,
            TasksDropped: self._on_dropped,
            TasksCancelled: self._on_cancelled,
            TasksRecalled: self._on_recalled,
            TasksTakenOver: self._on_tasks_taken_over,
            WorkerConnected: self._on_connected,
            WorkerCut: self._on_cut,
            WorkerBack: self._on_back,
            WorkerHeard: self._on_heard,
            WorkerReady: self._on_ready,
            WorkerDraining: self._on_draining,
            WorkerLost: self._on_lost,
            ResultsReceived: self._on_results,
            FailuresReceived: self._on_failures,
            FailureJudged: self._on_judged,
            InputsRestored: self._on_restored,
            TasksStarted: self._on_started,
            LeasesReturned: self._on_returned,
            LaunchFailed: self._on_launch_failed,
            LaunchesRefused: self._on_launches_refused,
            LaunchesTakenOver: self._on_launches_taken_over,
            ShutdownRequested: self._on_shutdown,
            DeadlinePassed: self._on_deadline,
        }

    def handle(self, event: Event, now: float) -> list[Command]:
        """Take in one event.

        Args:
            event: What happened.
            now: Seconds on a clock that never goes back.

        Returns:
            What to do, in order.
        """
        self._events += 1
        self._handlers[type(event)](event, now)
        if self._waiting and (self.available or self._quarantine.kept):
            self._assign(now)
        self._scale(now)
        # Handed over: the commands hold results, which are not ours to keep alive.
        out, self._out = self._out, []
        return out

    def next_deadline(self) -> float | None:
        """When to send ``DeadlinePassed`` at the latest; ``None``: not needed."""
        return self._deadline

    @property
    def waiting(self) -> int:
        """Tasks in the queue that nobody cancelled."""
        return self._waiting

    # Tasks come and go.

    def _on_submitted(self, event: TasksSubmitted, now: float) -> None:
        self.counts["submitted"] += len(event.tasks)
        self._enqueue(event.tasks)

    def _on_blocked(self, event: TasksBlocked, now: float) -> None:
        self.counts["submitted"] += len(event.tasks)
        self.blocked.update(dict.fromkeys(event.tasks))

    def _on_released(self, event: TasksReleased, now: float) -> None:
        released = [task for task in event.tasks if task.state is _BLOCKED]
        for task in released:
            del self.blocked[task]
            task.state = _WAITING
        # First: what they depend on lies about until they have run.
        self._enqueue(released, first=True)

    def _on_tasks_taken_over(self, event: TasksTakenOver, now: float) -> None:
        worker = self.workers.get(event.worker)
        running: list[Task] = []
        lost: list[Task] = []
        for task, lease in zip(event.tasks, event.leases, strict=True):
            if task.state is not _BLOCKED:
                continue
            if worker is None or lease in worker.leases:
                lost.append(task)
                continue
            request = self._enter(task).request
            if not self._has_place(worker, request):
                self._leave(task)
                lost.append(task)
                continue
            del self.blocked[task]
            give(task, worker, iter((lease,)))
            task.state = _RUNNING
            allocation = worker.allocation
            if not allocation.is_light(request):
                allocation.heavy[lease] = allocation.free_gpus(request.need.gpus)
            running.append(task)
        self.open_tasks += len(running)
        if running:
            self._out.append(MarkRunning(running, self._events))
        self._on_released(TasksReleased(lost), now)

    def _has_place(self, worker: Worker, request: ResourceRequest) -> bool:
        """Say whether a worker may have such a task by what is known here, also of its size."""
        allocation = worker.allocation
        room = room_left(allocation, self.request_of)
        return (
            len(worker.leases) < worker.slots
            and request.floor.within(allocation.capacity)
            and room is not None
            and request.need.within(room)
        )

    def _on_dropped(self, event: TasksDropped, now: float) -> None:
        for task in event.tasks:
            if task.state is not _DONE:
                self._close(task, "failed")

    def _enqueue(self, tasks: Sequence[Task], *, first: bool = False) -> None:
        """Have tasks wait, behind those that do, or before them."""
        if len(self._wholes) == 1 and not any(map(_requirements_of, tasks)):
            if first:
                self._plain.tasks.extendleft(reversed(tasks))
            else:
                self._plain.tasks.extend(tasks)
        elif first:
            for task in reversed(tasks):
                self._enter(task).tasks.appendleft(task)
        else:
            for task in tasks:
                self._enter(task).tasks.append(task)
        if any(map(_inputs_of, tasks)):
            self._near.update((self._queue_of(task), None) for task in tasks if task.inputs)
        self._waiting += len(tasks)
        self.open_tasks += len(tasks)

    # Lines: which tasks wait for the same.

    def _sharing(self, whole: Resources) -> int:
        """Among how many slots what there is is shared: on one machine, those of all workers."""
        scaling = self.config.scaling
        return scaling.max_slots if scaling.one_machine else scaling.slots_per_worker

    def request_of(self, task: Task) -> ResourceRequest:
        """Return what a task requests of the worker that it runs on."""
        requirements = task.requirements
        if requirements is not None and requirements.requests:
            return requirements.requests[min(task.size, len(requirements.requests) - 1)]
        return self._plain_requests[task.size]

    def _queue_of(self, task: Task) -> TaskQueue:
        """Return the queue of a task, a new one if there is none."""
        requirements = task.requirements
        suspects = self._quarantine.suspects
        alone = bool(suspects) and task in suspects
        if requirements is None and not task.size and not alone:
            return self._plain
        request = self.request_of(task)
        priority = 0 if requirements is None else requirements.priority
        if not priority and request is self._plain_requests[0] and not alone:
            return self._plain
        key = (priority, request, alone)
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = TaskQueue(key, priority, request, alone=alone)
        return queue

    def _enter(self, task: Task) -> TaskQueue:
        """Count an open task where it belongs, and return its queue."""
        requirements = task.requirements
        if requirements is None or not requirements.requests:
            task.size = min(max(task.size, task.stats.size), len(self._wholes) - 1)
        queue = self._queue_of(task)
        queue.open += queue is not self._plain
        return queue

    def _leave(self, task: Task) -> None:
        """Count an open task no more."""
        queue = self._queue_of(task)
        if queue is not self._plain:
            queue.open -= 1
            if queue.open <= 0:
                del self._queues[queue.key]
                self._near.pop(queue, None)

    def _open_of(self, queue: TaskQueue) -> int:
        if queue is not self._plain:
            return queue.open
        return self.open_tasks - sum(each.open for each in self._queues.values())

    def _on_cancelled(self, event: TasksCancelled, now: float) -> None:
        leases: dict[str, list[int]] = {}
        for task in event.tasks:
            if task.state is _DONE:
                continue
            if task.worker is not None:
                leases.setdefault(task.worker, []).append(task.lease)
            self._close(task, "cancelled")
        if not self._waiting:
            self._clear_queues()
        for worker, numbers in leases.items():
            command = KillTasks if event.kill else RecallTasks
            self._out.append(command(worker, numbers, self._events))

    def _on_recalled(self, event: TasksRecalled, now: float) -> None:
        # Whoever cancels one task often cancels more: all that were sent ahead come back, and for
        # a moment none is sent ahead, so that the others can be cancelled here.
        for name in dict.fromkeys(task.worker for task in event.tasks if task.state is _SENT):
            worker = self.workers.get(name or "")
            if worker is None:
                continue
            if now >= worker.paused_until:
                sent = [lease for lease, task in worker.leases.items() if task.state is _SENT]
                self._out.append(RecallTasks(worker.id, sent, self._events))
            worker.paused_until = now + _CANCEL_PAUSE
            self._remind(worker.paused_until)

    def _climb(self, task: Task, size: int) -> None:
        """Have a task that ran out of memory on workers of this size go to larger ones."""
        self._leave(task)
        task.size = size + 1
        if task.requirements is not None and task.requirements.requests:
            self._enter(task)
            return
        kind = task.stats
        before = kind.size
        kind.outgrew(size)
        self._enter(task)
        if kind.size > before and before < len(self._wholes) - 1:
            for queue in list(self._queues.values()):
                if queue.request is self._plain_requests[before]:
                    self._move_on(queue, kind)

    def _move_on(self, queue: TaskQueue, kind: FunctionStats) -> None:
        """Have the waiting tasks of a function go where its new ones go."""
        moving = [task for task in queue.tasks if task.stats is kind and task.state is _WAITING]
        if moving:
            rest = [task for task in queue.tasks if task.stats is not kind]
            queue.tasks = deque(rest)
            for task in moving:
                self._leave(task)
                self._enter(task).tasks.append(task)

    def waiting_tasks(self) -> list[Task]:
        """Tasks that no worker has."""
        queues = self._queues.values()
        return [task for queue in queues for task in queue.tasks if task.state is _WAITING]

    def backing_off_tasks(self) -> list[Task]:
        """Tasks between two attempts."""
        return list(self.backing_off)

    def runs_apart(self, task: Task) -> bool:
        """Say whether a task is among the suspects of a worker's death."""
        return task in self._quarantine.suspects

    def waiting_by_size(self) -> dict[int, int]:
        """Return how many tasks wait for each size of worker."""
        found: Counter[int] = Counter()
        for queue in self._queues.values():
            if queue is not self._plain:  # that one is long
                found[queue.request.size] += sum(task.state is _WAITING for task in queue.tasks)
        found[0] += self._waiting - found.total()
        return +found

    def _clear_queues(self) -> None:
        for queue in self._queues.values():
            queue.tasks.clear()

    def _close(self, task: Task, how: str) -> None:
        if task.state is _BLOCKED:
            del self.blocked[task]
            task.state = _DONE
            self.counts[how] += 1
            return
        if task.state is _WAITING:
            self._waiting -= 1
        elif task.state is _BACKING_OFF:
            del self.backing_off[task]
        task.state = _DONE
        if len(self._queues) > 1:
            self._leave(task)
            self._quarantine.suspects.pop(task, None)
        self.open_tasks -= 1
        self.counts[how] += 1

    def _release(self, worker: Worker, lease: int) -> Task | None:
        """Take a lease back from a worker; ``None`` if it has no such lease (any more)."""
        task = worker.leases.pop(lease, None)
        if task is not None:
            worker.allocation.heavy.pop(lease, None)
            worker.load -= task.cost
            if task.lease == lease:
                task.worker = None
                task.lease = 0
        return task

    def _settle(self, worker: Worker, now: float) -> None:
        """After leases were released: is the worker available, idle?"""
        if not worker.leases:
            worker.load = 0.0
            worker.idle_since = now
            if self._quarantine.kept:
                self._quarantine.kept.pop(worker.id, None)
            if self.config.scaling.idle_timeout is not None:
                self._remind(now + self.config.scaling.idle_timeout)
        if worker.state is WorkerState.ACTIVE:
            most = self.config.scaling.max_tasks_per_worker
            if most is not None and worker.completed >= most:
                self._retire(worker)
            else:
                self._welcome(worker)
        if len(self.workers) > 1 and self.open_tasks:
            self._remind(now + _REBALANCE_AFTER)

    def _welcome(self, worker: Worker) -> None:
        """Have an active worker get tasks again, unless it is cut off, or kept for a suspect."""
        if worker.cut_at is None:
            kept = self._quarantine.kept
            if not kept or worker.id not in kept:
                self.available[worker.id] = None

    def _on_results(self, event: ResultsReceived, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is None:
            self.counts["duplicates"] += len(event.leases)
            return
        worker.heard_at = now
        held = worker.leases
        tasks: list[Task] = []
        results: list[Any] = []
        times: list[float] = []
        released = 0.0
        for lease, result, seconds in zip(event.leases, event.results, event.seconds, strict=True):
            task = held.pop(lease, None)
            if task is None:
                self.counts["duplicates"] += 1
                continue
            released += task.cost
            task.stats.learn(seconds)
            task.worker = None
            if task.state is _DONE:
                continue
            task.state = _DONE
            tasks.append(task)
            results.append(result)
            times.append(seconds)
        worker.load -= released
        heavy = worker.allocation.heavy
        if heavy:
            for lease in event.leases:
                heavy.pop(lease, None)
        worker.completed += len(event.leases)
        self._failed_launches = self._killed_launches = 0
        if tasks:
            if len(self._queues) > 1:
                suspects = self._quarantine.suspects
                for task in tasks:
                    if task.requirements is not None or task.size or task in suspects:
                        self._leave(task)
                        suspects.pop(task, None)
            self.open_tasks -= len(tasks)
            self.counts["succeeded"] += len(tasks)
            self._out.append(ResolveTasks(worker.id, tasks, results, times, self._events))
        self._settle(worker, now)

    def _on_failures(self, event: FailuresReceived, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is None:
            self.counts["duplicates"] += len(event.failures)
            return
        worker.heard_at = now
        for lease, failure in event.failures:
            task = self._release(worker, lease)
            if task is None:
                self.counts["duplicates"] += 1
            elif task.state is not _DONE:
                if failure.kind is FailureKind.SLOT_LOST:
                    self._lose_attempt(worker, task, failure)
                elif failure.kind is FailureKind.RECLAIMED and task.retries:
                    self.counts["reclaimed"] += 1
                    self._requeue([task])
                elif failure.kind is FailureKind.OUTGREW and self._may_climb(worker, task):
                    task.lost += 1
                    self._lose_to_memory(worker, task)
                    self._requeue([task])
                elif failure.kind is FailureKind.INPUT_LOST and not self.killing:
                    task.state = _BACKING_OFF
                    self.backing_off[task] = math.inf
                elif self._is_judged(task, failure):
                    task.state = _BACKING_OFF
                    self.backing_off[task] = math.inf
                    self._out.append(JudgeFailure(worker.id, task, failure, self._events))
                else:
                    self._fail(worker.id, task, failure)
        worker.completed += len(event.failures)
        self._settle(worker, now)

    def _is_judged(self, task: Task, failure: Failure) -> bool:
        requirements = task.requirements
        return (
            requirements is not None
            and requirements.judged
            and failure.kind in _JUDGED
            and task.lost < task.retries
            and not self.killing
        )

    def _on_judged(self, event: FailureJudged, now: float) -> None:
        task = event.task
        if task.state is not _BACKING_OFF:
            return
        if not event.again or self.killing:
            self._fail(event.worker, task, event.failure)
            return
        policy = self.config.retry
        # Spread a little, by number: what failed together does not come back together.
        spread = 1.0 + task.number * 7 % 16 / 32
        pause = min(policy.task_backoff * 2.0 ** min(task.lost, 30), policy.longest_backoff)
        task.lost += 1
        self.counts["retried_errors"] += 1
        due = now + pause * spread
        self.backing_off[task] = due
        heapq.heappush(self._awakenings, (due, task.number, task))
        self._remind(due)

    def _on_restored(self, event: InputsRestored, now: float) -> None:
        ready = [task for task in event.tasks if self.backing_off.get(task) == math.inf]
        for task in ready:
            del self.backing_off[task]
        self._requeue(ready)

    def _awake(self, now: float) -> None:
        """Put back into their queues the tasks that have rested long enough."""
        awakenings = self._awakenings
        ready = []
        while awakenings and awakenings[0][0] <= now:
            due, _, task = heapq.heappop(awakenings)
            if self.backing_off.get(task) == due:
                del self.backing_off[task]
                ready.append(task)
        if awakenings:
            self._remind(awakenings[0][0])
        if ready:
            self._requeue(ready)

    def _fail(self, worker: str, task: Task, failure: Failure) -> None:
        self._close(task, "failed")
        self._out.append(FailTask(worker, task, failure, self._events))

    def _may_climb(self, worker: Worker, task: Task) -> bool:
        """Say whether there is a larger size for a task that ran out of memory on this worker."""
        requirements = task.requirements
        if requirements is not None and requirements.requests:
            return task.size + 1 < len(requirements.requests) and task.retries > 0
        return self._size_of(worker, task) + 1 < len(self._wholes) and task.retries > 0

    def _size_of(self, worker: Worker, task: Task) -> int:
        """Return the size of the ladder that a task ran out of memory on."""
        if (task.requirements is not None and task.requirements.requests) or worker.size >= len(
            self._wholes
        ):
            return task.size
        return max(worker.size, task.size)

    def _lose_to_memory(self, worker: Worker, task: Task) -> None:
        """Have a task try a larger size: another try, not one more of the same."""
        task.retries += 1
        self.counts["out_of_memory"] += 1
        self._climb(task, self._size_of(worker, task))

    def _lose_attempt(self, worker: Worker, task: Task, failure: Failure) -> None:
        task.lost += 1
        self.counts["lost_attempts"] += 1
        if failure.out_of_memory and self._may_climb(worker, task):
            self._lose_to_memory(worker, task)
        if task.lost > task.retries or self.killing:
            self._fail(worker.id, task, failure)
        else:
            self.counts["retries"] += 1
            self._requeue([task])

    def _requeue(self, tasks: Iterable[Task]) -> None:
        """Put tasks back at the head of the queue, keeping their order."""
        back = [task for task in tasks if task.state is not _DONE]
        for task in back:
            task.state = _WAITING
            task.worker = None
            task.lease = 0
        for task in reversed(back):
            queue = self._queue_of(task)
            queue.tasks.appendleft(task)
            if task.inputs and not queue.alone:
                self._near[queue] = None
        self._waiting += len(back)

    def _on_started(self, event: TasksStarted, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is None:
            return
        worker.heard_at = now
        started = []
        for lease in event.leases:
            task = worker.leases.get(lease)
            if task is not None and task.state is _SENT:
                task.state = _RUNNING
                started.append(task)
        if started:
            self._out.append(MarkRunning(started, self._events))

    def _on_returned(self, event: LeasesReturned, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is None:
            return
        if event.heard:
            worker.heard_at = now
        tasks = [self._release(worker, lease) for lease in event.leases]
        self._requeue(task for task in tasks if task is not None)
        self._settle(worker, now)

    # Workers come and go.

    def _on_connected(self, event: WorkerConnected, now: float) -> None:
        launch = self.launches.get(event.launch)
        self._end_launch(event.launch)
        pool = self._plain_pool if launch is None else launch.pool
        capacity = self._wholes[0] if launch is None else launch.capacity
        allocation = self._allocation(capacity, event.slots)
        worker = Worker(event.worker, event.slots, event.launch, now, pool, allocation)
        allocation.workers[worker.id] = worker
        self.workers[event.worker] = worker
        self._count_active(worker.slots, pool)
        self._total_slots += worker.slots
        self.counts["workers_connected"] += 1
        self._failed_launches = 0
        self._remind(now + self.config.lease_timeout)
        if self.config.scaling.max_worker_lifetime is not None:
            self._remind(now + self.config.scaling.max_worker_lifetime)
        if event.taken_over:
            worker.cut_at = now
            self._remind(now + self.config.reconnect_grace)
        self._settle(worker, now)
        if self.killing:
            self._out.append(TerminateWorker(worker.id, self._events))

    def _on_cut(self, event: WorkerCut, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is None or worker.cut_at is not None:
            return
        self.counts["workers_cut"] += 1
        self._to_wind_down = True
        worker.cut_at = now
        self.available.pop(worker.id, None)
        self._quarantine.release(worker)
        self._unhold(worker.allocation)
        if self.config.reconnect_grace:
            self._remind(now + self.config.reconnect_grace)
        else:
            self._give_up(worker, now)

    def _on_back(self, event: WorkerBack, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is None or worker.cut_at is None:
            return
        self.counts["workers_back"] += 1
        worker.cut_at = None
        worker.heard_at = now
        self._remind(now + self.config.lease_timeout)
        lifetime = self.config.scaling.max_worker_lifetime
        if lifetime is not None:
            self._remind(max(now, worker.connected_at + lifetime))
        self._settle(worker, now)

    def _give_up(self, worker: Worker, now: float) -> None:
        """Lose a worker whose connection was cut, and that is not waited for any longer."""
        assert worker.cut_at is not None
        self._out.append(TerminateWorker(worker.id, self._events))
        grace = self.config.reconnect_grace
        reason = "its connection was cut"
        if grace:
            reason += f", and it did not come back within {grace:g} s (reconnect_grace)"
        self._lose_worker(worker, WorkerLost(worker.id, reason), now)

    def _on_heard(self, event: WorkerHeard, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None:
            worker.heard_at = now

    def _on_ready(self, event: WorkerReady, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None:
            worker.heard_at = now
            worker.ready = True

    def _on_draining(self, event: WorkerDraining, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None:
            self._drain(worker)

    @property
    def _plain_pool(self) -> tuple[int, int]:
        return 0, self.config.scaling.slots_per_worker

    def _allocation(self, capacity: Resources, slots: int) -> Allocation:
        plain = self._plain_requests[0]
        scaling = self.config.scaling
        if not scaling.one_machine:
            return Allocation(capacity, slots, plain)
        if self._machine_allocation is None:
            self._machine_allocation = Allocation(capacity, scaling.max_slots, plain, self._gpu_ids)
        return self._machine_allocation

    def _count_active(self, slots: int, pool: tuple[int, int]) -> None:
        self._active_slots += slots
        active = self._active_pools.get(pool, 0) + slots
        if active:
            self._active_pools[pool] = active
        else:
            self._active_pools.pop(pool, None)
        self._odd = len(self._active_pools) - (self._plain_pool in self._active_pools)

    def _drain(self, worker: Worker) -> None:
        if worker.state is WorkerState.ACTIVE:
            worker.state = WorkerState.DRAINING
            self._count_active(-worker.slots, worker.pool)
            self.available.pop(worker.id, None)
            self._quarantine.release(worker)
            self._unhold(worker.allocation)

    def _unhold(self, allocation: Allocation) -> None:
        """Hold nothing for tasks that wait for room where no worker takes any: others are held."""
        if allocation.saving_for is not None and not any(
            each.state is WorkerState.ACTIVE and each.cut_at is None
            for each in allocation.workers.values()
        ):
            allocation.saving_for = None

    def _retire(self, worker: Worker) -> None:
        """Have a worker finish what it has; another takes its place when there is need."""
        if worker.state is WorkerState.ACTIVE:
            self._drain(worker)
            self._out.append(DrainWorker(worker.id, self._events))

    def _overstays(self, worker: Worker, now: float) -> bool:
        """Give up a draining worker that has nothing left to do for anybody and does not end."""
        if any(task.state is not _DONE for task in worker.leases.values()):
            worker.over_at = None
            return False
        if worker.over_at is None:
            worker.over_at = now
        # Once all tasks are done, nobody needs what it keeps.
        winding_down = self.shutting_down and not (self.open_tasks or self.blocked)
        limit = _FAREWELL if winding_down else _HAND_OVER
        if now < worker.over_at + limit:
            self._remind(worker.over_at + limit)
            return False
        self._out.append(TerminateWorker(worker.id, self._events))
        reason = f"it did not end within {limit:g} s although it had nothing left to do"
        self._lose_worker(worker, WorkerLost(worker.id, reason), now)
        return True

    def _end_launch(self, launch_id: str) -> bool:
        launch = self.launches.pop(launch_id, None)
        if launch is None:
            return False
        self._count_active(-launch.slots, launch.pool)
        self._total_slots -= launch.slots
        return True

    def _on_lost(self, event: WorkerLost, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None:
            self._lose_worker(worker, event, now)

    def _lose_worker(
        self, worker: Worker, event: WorkerLost, now: float, *, silent: bool = False
    ) -> None:
        unheard = silent or worker.cut_at is not None
        expected = worker.state is WorkerState.DRAINING and not worker.leases
        self._drain(worker)
        del self.workers[worker.id]
        allocation = worker.allocation
        allocation.workers.pop(worker.id, None)
        self._unhold(allocation)
        for lease in worker.leases:
            allocation.heavy.pop(lease, None)
        self._total_slots -= worker.slots
        if not expected:
            self.counts["workers_lost"] += 1
        if event.reclaimed:
            self.counts["workers_reclaimed"] += 1
        detail = event.detail
        aboard = len(worker.leases)
        suspects = 0 if event.reclaimed else aboard
        failure = Failure(FailureKind.WORKER_LOST, detail, event.out_of_memory, suspects)
        self._quarantine.kept.pop(worker.id, None)
        unblamed: list[Task] = []
        for position, task in enumerate(list(worker.leases.values())):
            if task.state is _DONE:
                continue
            # Slots take tasks in the order sent. One that was not ready may have died of what it
            # does before it begins with the first.
            first = task.state is _RUNNING or position < worker.slots
            task.suspected += worker.ready or first
            task.worker = None
            task.lease = 0
            # Without retries, whatever the worker may have begun counts as begun; and where the
            # link failed, the news that it was ready may be what was lost.
            begun = (worker.ready and first) or (not task.retries and (worker.ready or unheard))
            if event.reclaimed and task.retries:
                self.counts["reclaimed"] += begun
                unblamed.append(task)
                continue
            larger = event.out_of_memory and first and self._may_climb(worker, task)
            exposed = worker.ready or task.suspected > _SUSPICIONS
            if (exposed and aboard == 1) or (begun and (larger or not task.retries)):
                self._lose_attempt(worker, task, failure)
                continue
            if larger:
                # It had no slot ready: what the tasks need before they begin is too much.
                self._climb(task, self._size_of(worker, task))
            elif exposed and (aboard <= max(worker.slots, PARTS) or task.suspected > 1):
                self._suspect(task, aboard, worker.slots)
            unblamed.append(task)
        worker.leases.clear()
        self._requeue(unblamed)
        if event.relaunched and not self.shutting_down:
            launch = Launch(worker.launch, worker.slots, now, worker.pool, allocation.capacity)
            self.launches[launch.id] = launch
            self._count_active(launch.slots, launch.pool)
            self._total_slots += launch.slots
            self._remind(now + self.config.scaling.launch_timeout)
        if not expected and not worker.completed and not event.reclaimed:
            self._count_failed_launch(str(detail), now, fatal=False, killed=True)

    def _suspect(self, task: Task, aboard: int, slots: int) -> None:
        """Have a task run apart from now on: it was aboard, with others, when a worker died."""
        if task in self._quarantine.suspects:
            self._quarantine.narrow(task, aboard, slots)
        else:
            self.counts["suspects"] += 1
            self._leave(task)
            self._quarantine.narrow(task, aboard, slots)
            self._enter(task)

    def _on_launch_failed(self, event: LaunchFailed, now: float) -> None:
        if self._end_launch(event.launch) and not event.reclaimed:
            self._count_failed_launch(event.reason, now, fatal=event.fatal, killed=event.killed)

    def _on_launches_refused(self, event: LaunchesRefused, now: float) -> None:
        self.refusing = True
        for launch in event.launches:
            self._end_launch(launch)

    def _on_launches_taken_over(self, event: LaunchesTakenOver, now: float) -> None:
        self._leases = itertools.count(event.last_lease + 1)
        self._launch_numbers = itertools.count(event.last_launch + 1)
        for number, slots, size, capacity in event.launches:
            if self._total_slots + slots > self.config.scaling.max_slots:
                self._out.append(TerminateLaunch(number, self._events))
                continue
            whole = self._wholes[0] if capacity is None else Resources.had_by(capacity)
            self._expect(Launch(number, slots, now, (size, slots), whole))

    def _count_failed_launch(self, reason: str, now: float, *, fatal: bool, killed: bool) -> None:
        self.counts["launch_failures"] += 1
        policy = self.config.retry
        if killed:
            self._killed_launches += 1
            failures, most = self._killed_launches, _KILLED_LAUNCHES
            pause = 0.0
        else:
            self._failed_launches += 1
            failures, most = self._failed_launches, policy.launch_failures
            pause = policy.backoff * 2 ** min(failures - 1, 6)
        if not (fatal or failures >= most):
            self._launch_not_before = now + pause
            self._remind(self._launch_not_before)
            return
        # What workers that are there, or may still come, can do is not given up.
        served = {self._capacity_of(pool) for pool in self._active_pools}
        hopeless = [
            queue
            for queue in self._queues.values()
            if not any(queue.request.floor.within(capacity) for capacity in served)
        ]
        tasks = [task for queue in hopeless for task in queue.tasks if task.state is _WAITING]
        if served and not tasks:
            self._launch_not_before = now + _LATER
            self._remind(self._launch_not_before)
            return
        self._failed_launches = self._killed_launches = 0
        for queue in hopeless:
            queue.tasks.clear()
        for task in tasks:
            self._close(task, "failed")
        if tasks:
            self._out.append(FailTasksUnlaunched(tasks, reason, self._events))

    def _scale(self, now: float) -> None:
        if self.shutting_down and (self.killing or not (self.open_tasks or self.blocked)):
            self._wind_down(now)
            return
        if self.launches:
            self._withdraw_surplus(now)
        if now < self._launch_not_before or self.refusing or self._is_emptying():
            return
        policy = self.config.scaling
        if len(self._queues) > 1 or self._odd:
            self._scale_pools(now)
            return
        active, total = self._active_slots, self._total_slots
        if active >= policy.max_slots or (active >= self.open_tasks and active >= policy.min_slots):
            return
        wanted = min(policy.max_slots, max(self.open_tasks, policy.min_slots))
        room = policy.max_slots - total
        for slots in sizes_to_launch(wanted - active, room, policy.slots_per_worker):
            self._launch(slots, self._plain.request, now)

    def _is_emptying(self) -> bool:
        """Say whether all that is left to do is on workers, and no more will come."""
        return self.shutting_down and not (self._waiting or self.blocked or self.backing_off)

    def _withdraw_surplus(self, now: float) -> None:
        """Give up workers that have not come, once nothing has waited for them for a while.

        As long as an idle worker would be kept: what is asked for next may need them.
        """
        scaling = self.config.scaling
        surplus = self._active_slots - max(self.open_tasks, scaling.min_slots)
        at_once = self._is_emptying()
        if surplus <= 0 and not at_once:
            self._surplus_since = None
            return
        if not at_once:
            if scaling.idle_timeout is None:
                return
            if self._surplus_since is None:
                self._surplus_since = now
            until = self._surplus_since + scaling.idle_timeout
            if now < until:
                self._remind(until)
                return
        demand = self._demand() if len(self._queues) > 1 or self._odd else {}
        for launch in reversed(list(self.launches.values())):
            pool = launch.pool
            needed = self._active_pools.get(pool, 0) - launch.slots < demand.get(pool, 0)
            if not at_once and (surplus < launch.slots or needed):
                continue
            surplus -= launch.slots
            self._withdraw(launch)
        self._surplus_since = None

    def _demand(self) -> dict[tuple[int, int], int]:
        """Return how many tasks there are for each pool of workers, waiting or not."""
        demand: dict[tuple[int, int], int] = {}
        shared = self.config.scaling.one_machine
        for queue in self._queues.values():
            count = self._open_of(queue)
            if count:
                if shared:
                    count = min(count, queue.request.need.times_in(queue.request.whole))
                if queue.alone:
                    count *= queue.request.slots
                demand[queue.request.pool] = demand.get(queue.request.pool, 0) + count
        return demand

    def _scale_pools(self, now: float) -> None:
        """Scale each size of worker to the tasks that need it, the largest first."""
        policy = self.config.scaling
        demand = self._demand()
        plain = self._plain_pool
        demand.setdefault(plain, 0)
        queues: dict[tuple[int, int], TaskQueue] = {plain: self._plain}
        for queue in self._queues.values():
            best = queues.get(queue.request.pool)
            if best is None or queue.priority > best.priority:
                queues[queue.request.pool] = queue

        def rank(queue: TaskQueue) -> tuple[int, ...]:
            whole = queue.request.whole
            return -queue.priority, -whole.gpus, -whole.memory, -whole.cpus

        spare: list[list[Any]] = []  # capacity, and slots that have nothing to do there
        for pool, slots in self._active_pools.items():
            if pool not in queues:
                spare.append([self._capacity_of(pool), slots])
        for pool, queue in sorted(queues.items(), key=lambda item: rank(item[1])):
            request = queue.request
            wanted, have = demand[pool], self._active_pools.get(pool, 0)
            if pool == plain:
                wanted = max(wanted, policy.min_slots - (self._active_slots - have))
            # A large worker serves small tasks too, once it has nothing else to do.
            for entry in spare:
                if have < wanted and entry[1] and request.floor.within(entry[0]):
                    lent = min(entry[1], wanted - have)
                    entry[1] -= lent
                    have += lent
            if wanted > have and self._total_slots >= policy.max_slots:
                self._make_room(queue, wanted - have, alone=not have)
            room = policy.max_slots - self._total_slots
            for slots in sizes_to_launch(wanted - have, room, request.slots):
                self._launch(slots, request, now)
                have += slots
            if have > wanted:
                spare.append([request.whole, have - wanted])

    def _capacity_of(self, pool: tuple[int, int]) -> Resources:
        """Return what workers of a pool have of which there is at least one."""
        for worker in self.workers.values():
            if worker.pool == pool:
                return worker.allocation.capacity
        return next(each.capacity for each in self.launches.values() if each.pool == pool)

    def _make_room(self, queue: TaskQueue, missing: int, *, alone: bool) -> None:
        """Give up workers that are of no use for a queue, for those that it waits for.

        First those that nobody has a use for. If none at all serves the queue, and it is its turn,
        one that others have a use for, too: or it would wait for as long as others have work.

        Args:
            queue: What waits.
            missing: Slots that it could use.
            alone: Whether no worker serves it, nor will.
        """
        floor = queue.request.floor
        demand = self._demand()
        for launch in reversed(list(self.launches.values())):
            if missing > 0 and not demand.get(launch.pool) and not floor.within(launch.capacity):
                missing -= launch.slots
                self._withdraw(launch)
        drained = sum(w.slots for w in self.workers.values() if w.state is not WorkerState.ACTIVE)
        missing -= drained
        # Whoever is idle now had its chance: what waits is not for it.
        for worker in list(self.workers.values()):
            if (
                missing > 0
                and worker.state is WorkerState.ACTIVE
                and not worker.leases
                and worker.cut_at is None
                and not floor.within(worker.allocation.capacity)
            ):
                missing -= worker.slots
                drained += worker.slots
                self._retire(worker)
        room = self.config.scaling.max_slots - self._total_slots
        head = queue.head()
        if not alone or drained or room > 0 or head is None:
            return
        turns = [
            (-each.priority, first.number)
            for each in self._queues.values()
            if (first := each.head()) is not None
        ]
        if min(turns) < (-queue.priority, head.number):
            return
        for launch in reversed(list(self.launches.values())):
            if not floor.within(launch.capacity):
                self._withdraw(launch)
                return
        busy = [
            worker
            for worker in self.workers.values()
            if worker.cut_at is None and not floor.within(worker.allocation.capacity)
        ]
        if busy:
            self._retire(min(busy, key=lambda worker: worker.load))

    def _withdraw(self, launch: Launch) -> None:
        """Give up a worker that has not come."""
        self._end_launch(launch.id)
        self._out.append(TerminateLaunch(launch.id, self._events))

    def _launch(self, slots: int, request: ResourceRequest, now: float) -> None:
        launch = Launch(str(next(self._launch_numbers)), slots, now, request.pool, request.whole)
        self._expect(launch)
        self.counts["launches"] += 1
        self._out.append(LaunchWorker(launch.id, slots, self._events, request.size))

    def _expect(self, launch: Launch) -> None:
        self.launches[launch.id] = launch
        self._count_active(launch.slots, launch.pool)
        self._total_slots += launch.slots
        self._remind(launch.started_at + self.config.scaling.launch_timeout)

    # The end.

    def _on_shutdown(self, event: ShutdownRequested, now: float) -> None:
        self.shutting_down = self._to_wind_down = True
        if not (event.cancel or event.kill):
            return
        self.killing = self.killing or event.kill
        dropped = [*self.waiting_tasks(), *self.blocked, *self.backing_off]
        self._clear_queues()
        recalls: dict[str, list[int]] = {}
        for worker in self.workers.values():
            for lease, task in worker.leases.items():
                if task.state is _SENT or (event.kill and task.state is _RUNNING):
                    dropped.append(task)
                    recalls.setdefault(worker.id, []).append(lease)
        for task in dropped:
            self._close(task, "cancelled")
        if dropped:
            self._out.append(CancelTasks(dropped, self._events))
        if not event.kill:  # else the workers end anyway
            for name, leases in recalls.items():
                self._out.append(RecallTasks(name, leases, self._events))

    def _wind_down(self, now: float) -> None:
        """Stop whatever still runs; once it is all gone, finish."""
        # Events come from each worker: of thousands, not all are looked at for each of them.
        if self._to_wind_down or self._active_slots:
            self._to_wind_down = False
            for launch in list(self.launches.values()):
                self._withdraw(launch)
            for worker in list(self.workers.values()):
                if worker.cut_at is not None:
                    self._drain(worker)
                    self._give_up(worker, now)  # nothing that it has is of use any more
                elif self.killing:
                    # Also one that drains and has nothing left: it may never end by itself.
                    self._drain(worker)
                    self._out.append(TerminateWorker(worker.id, self._events))
                elif worker.state is WorkerState.ACTIVE:
                    self._drain(worker)
                    self._out.append(DrainWorker(worker.id, self._events))
                self._remind(now)  # how long it takes to end is limited
                if worker.leases and not self.killing:
                    # Cancelled, all of them; some may have begun, and would be waited for.
                    leases = list(worker.leases)
                    self._out.append(KillTasks(worker.id, leases, self._events))
        if not (self.workers or self.open_tasks or self.blocked or self.finished):
            self.finished = True
            self._out.append(Finish(self._events))

    # Time.

    def _remind(self, at: float) -> None:
        at = max(at, self._look_not_before)
        if self._deadline is None or at < self._deadline:
            self._deadline = at

    def _on_deadline(self, event: DeadlinePassed, now: float) -> None:
        config = self.config
        scaling = config.scaling
        self._deadline = None
        everybody = len(self.workers) + len(self.launches)
        self._look_not_before = now + everybody * _LOOK_PAUSE
        for launch in list(self.launches.values()):
            if now >= launch.started_at + scaling.launch_timeout:
                self._withdraw(launch)
                reason = f"no worker dialed back within {scaling.launch_timeout:g} s"
                self._count_failed_launch(reason, now, fatal=False, killed=False)
            else:
                self._remind(launch.started_at + scaling.launch_timeout)
        if now < self._launch_not_before:
            self._remind(self._launch_not_before)
        if self._awakenings:
            self._awake(now)
        active = sum(w.slots for w in self.workers.values() if w.state is WorkerState.ACTIVE)
        for worker in list(self.workers.values()):
            is_active = worker.state is WorkerState.ACTIVE
            if worker.cut_at is not None:
                if now >= worker.cut_at + config.reconnect_grace:
                    active -= worker.slots if is_active else 0
                    self._give_up(worker, now)
                else:
                    self._remind(worker.cut_at + config.reconnect_grace)
                continue
            if now >= worker.heard_at + config.lease_timeout:
                self._out.append(TerminateWorker(worker.id, self._events))
                active -= worker.slots if is_active else 0
                reason = f"it was silent for {config.lease_timeout:g} s"
                self._lose_worker(worker, WorkerLost(worker.id, reason), now, silent=True)
                continue
            self._remind(worker.heard_at + config.lease_timeout)
            if not is_active and self._overstays(worker, now):
                continue
            if scaling.max_worker_lifetime is not None and is_active:
                end_of_life = worker.connected_at + scaling.max_worker_lifetime
                if now >= end_of_life:
                    active -= worker.slots
                    self._retire(worker)
                    continue
                self._remind(end_of_life)
            if worker.paused_until:
                if now < worker.paused_until:
                    self._remind(worker.paused_until)
                else:
                    worker.paused_until = 0.0
                    if worker.state is WorkerState.ACTIVE:
                        self._welcome(worker)
            if worker.idle_since is None or not is_active:
                continue
            if scaling.idle_timeout is None or active - worker.slots < scaling.min_slots:
                continue
            if now >= worker.idle_since + scaling.idle_timeout:
                active -= worker.slots
                self._retire(worker)
            else:
                self._remind(worker.idle_since + scaling.idle_timeout)
        self._rebalance(now)

    def _in_turn(self) -> Iterator[str]:
        """Go through the available workers: of thousands, no more are listed than may be needed."""
        most = self._waiting + _SPARE
        some = list(itertools.islice(self.available, most))
        yield from some
        if self._waiting and len(some) == most:
            before = set(some)
            yield from [name for name in self.available if name not in before]

    def _rebalance(self, now: float) -> None:
        """Recall what waits on one worker while another has a free slot."""
        if len(self.workers) < 2 or (self._waiting and self._others_wait()):
            return
        free = sum(
            max(0, self.workers[name].slots - len(self.workers[name].leases))
            for name in self.available
        )
        crowded = [w for w in self.workers.values() if len(w.leases) > w.slots and w.cut_at is None]
        if not crowded:
            return
        self._remind(now + _REBALANCE_AFTER)
        if not free:
            return
        for worker in sorted(crowded, key=lambda w: len(w.leases) - w.slots, reverse=True):
            sent = [lease for lease, task in worker.leases.items() if task.state is _SENT]
            some = sent[-math.ceil(len(sent) / 2) :] if sent else []
            if some:
                self._out.append(RecallTasks(worker.id, some, self._events))
                free -= len(some)
            if free <= 0:
                break

    def _assign(self, now: float) -> None:
        sending = self.config.sending
        if self._quarantine.suspects or self._quarantine.kept:
            self._assign_suspects(now)
            if not self._others_wait():
                return
        near = bool(self._near) and self._assign_near(now)
        simple = len(self._queues) == 1 and not near
        plain = self._plain.tasks
        for name in self._in_turn():
            if not self._waiting:
                break
            worker = self.workers[name]
            share = max(worker.slots, -(-self._waiting // len(self.available)))
            most = self.config.scaling.max_tasks_per_worker
            if most is not None:
                share = min(share, most - worker.completed - len(worker.leases))
                if share <= 0:
                    del self.available[name]
                    continue
            allocation = worker.allocation
            if not simple or allocation.heavy or allocation.tight:
                self._serve_queues(worker, share, now)
                continue
            tasks, starting = take_tasks(plain, worker, sending, self._leases, share, now)
            self._waiting -= len(tasks)
            if tasks:
                if starting:
                    self._out.append(MarkRunning(tasks[:starting], self._events))
                self._out.append(SendTasks(name, tasks, self._events))
            if len(tasks) < share and self._waiting and worker.leases:
                # It took less than it might have: it is full until it answers.
                del self.available[name]
        if near and self._waiting:
            self._assign_near(now)  # whoever was idle has work now
        if not simple:
            for name in list(self.available):
                worker = self.workers[name]
                saving_for = worker.allocation.saving_for
                if saving_for is not None and saving_for.head() is None:
                    # Somebody else has taken what it was held for.
                    worker.allocation.saving_for = None
                    share = worker.slots
                    most = self.config.scaling.max_tasks_per_worker
                    if most is not None:
                        share = min(share, most - worker.completed - len(worker.leases))
                    self._serve_queues(worker, share, now)

    def _serve_queues(self, worker: Worker, share: int, now: float) -> None:
        """Send a worker what it has room for, from one queue or several.

        A queue whose first task does not fit yet is not passed by: the worker takes nothing from
        those behind it, until it does. One worker is held for each task that waits like that.
        """
        allocation = worker.allocation
        taken: list[Task] = []
        saving_for: TaskQueue | None = None
        for queue in in_order(self._queues.values(), worker):
            if share <= 0:
                break
            if queue.alone and (len(allocation.workers) == 1 or self._has_room(worker, queue)):
                continue  # it is for ``_assign_suspects`` to say who is to have it
            if allocation.is_light(queue.request) and not allocation.heavy and not allocation.tight:
                ahead = share
                if queue in self._near:
                    ahead = min(share, worker.slots - len(worker.leases))
                if ahead > 0:
                    some, _ = take_tasks(
                        queue.tasks, worker, self.config.sending, self._leases, ahead, now
                    )
                    taken += some
                    share -= len(some)
                if len(worker.leases) >= worker.slots:
                    break
                continue
            room = room_left(allocation, self.request_of)
            if room is not None and not queue.alone:
                some, room = take_fitting(queue, worker, self._leases, share, room)
                taken += some
                share -= len(some)
            if queue.head() is None:
                continue
            if room is not None and len(worker.leases) >= worker.slots:
                break
            if allocation.saving_for is queue or self._holders(queue) < len(queue.tasks):
                saving_for = queue
                break
        allocation.saving_for = saving_for
        self._waiting -= len(taken)
        if taken:
            begun = [task for task in taken if task.state is _RUNNING]
            if begun:
                self._out.append(MarkRunning(begun, self._events))
            self._out.append(SendTasks(worker.id, taken, self._events))
        if len(worker.leases) >= worker.slots and not self._near:
            self.available.pop(worker.id, None)

    def _has_room(self, worker: Worker, queue: TaskQueue) -> bool:
        """Say whether a task of a queue fits beside all that is on this machine or worker."""
        allocation, request = worker.allocation, queue.request
        if allocation.is_light(request) and not (allocation.heavy or allocation.tight):
            return True
        if len(allocation.workers) == 1 and not worker.leases:
            return True
        room = room_left(allocation, self.request_of)
        return room is not None and request.need.within(room)

    def _others_wait(self) -> bool:
        """Say whether tasks wait that are no suspects."""
        return any(not queue.alone and queue.head() is not None for queue in self._queues.values())

    def _assign_suspects(self, now: float) -> None:
        """Send suspects to workers of their own; keep workers for those that wait."""
        quarantine = self._quarantine
        queues = [
            queue for queue in self._queues.values() if queue.alone and queue.head() is not None
        ]
        queues.sort(key=lambda queue: (-queue.priority, queue.tasks[0].number))
        room = 0
        if queues:  # else nobody has to be looked at but those that are kept
            for name, hosts in quarantine.kept.items():
                if hosts:
                    self._top_up(self.workers[name], now)
            room = quarantine.room(self.workers.values(), shared=self._others_wait())
        wanting: list[TaskQueue] = []  # one entry for each worker that is to be emptied
        for queue in queues:
            while room > 0 and (task := queue.head()) is not None:
                able = [self.workers[name] for name in self.available]
                able = [worker for worker in able if self._may_quarantine(worker, queue)]
                if not able:
                    break
                self._send_apart(queue, best_holder(task.inputs, able) or able[0], now)
                room -= 1
            # Who comes has nothing to finish.
            coming = [each for each in self.launches.values() if queue.request.fits(each.capacity)]
            if queue.head() is not None:
                groups = -(-len(queue.tasks) // quarantine.group(queue))
                wanting += [queue] * (groups - len(coming))
        del wanting[max(room, 0) :]
        emptied = [self.workers[name] for name, hosts in quarantine.kept.items() if not hosts]
        for worker in emptied[len(wanting) :]:
            quarantine.release(worker)
            self._welcome(worker)
        for queue in wanting[len(emptied) :]:
            busy = [w for w in self.workers.values() if not self._outranked(w, queue)]
            chosen = quarantine.to_empty(queue, busy)
            if chosen is None:
                continue
            quarantine.kept[chosen.id] = False
            self.available.pop(chosen.id, None)
            sent = [lease for lease, task in chosen.leases.items() if task.state is _SENT]
            if sent:
                self._out.append(RecallTasks(chosen.id, sent, self._events))

    def _may_quarantine(self, worker: Worker, queue: TaskQueue) -> bool:
        """Say whether a worker may be given a suspect now, to have it alone."""
        most = self.config.scaling.max_tasks_per_worker
        return (
            not worker.leases
            and (most is None or worker.completed < most)
            and queue.request.fits(worker.allocation.capacity)
            and self._has_room(worker, queue)
            and not self._outranked(worker, queue)
        )

    def _outranked(self, worker: Worker, queue: TaskQueue) -> bool:
        """Say whether a worker could serve others that wait, and that go before this queue."""
        return any(
            each.priority > queue.priority
            and each.head() is not None
            and each.request.fits(worker.allocation.capacity)
            for each in self._queues.values()
        )

    def _send_apart(self, queue: TaskQueue, worker: Worker, now: float) -> None:
        """Send the first tasks of a queue to a worker that has none but their like."""
        size, allocation = self._quarantine.group(queue, worker.leases.values()), worker.allocation
        most = self.config.scaling.max_tasks_per_worker
        if most is not None:
            size = min(size, most - worker.completed - len(worker.leases))
        if allocation.is_light(queue.request) and not (allocation.heavy or allocation.tight):
            tasks, starting = take_tasks(
                queue.tasks, worker, self.config.sending, self._leases, size, now
            )
        elif not worker.leases:
            tasks, _ = take_fitting(queue, worker, self._leases, 1, queue.request.need)
            starting = 1
        else:
            return
        self._waiting -= len(tasks)
        self._quarantine.kept[worker.id] = True
        self.available.pop(worker.id, None)
        if starting:
            self._out.append(MarkRunning(tasks[:starting], self._events))
        if tasks:
            self._out.append(SendTasks(worker.id, tasks, self._events))

    def _top_up(self, worker: Worker, now: float) -> None:
        """Send a worker that has a group of suspects more of their kind, as room comes."""
        if worker.cut_at is not None or worker.state is not WorkerState.ACTIVE:
            return
        some = next((task for task in worker.leases.values() if task.state is not _DONE), None)
        if some is None or 2 * len(worker.leases) > self._quarantine.suspects[some]:
            return
        queue = self._queue_of(some)
        if queue.head() is not None and not self._outranked(worker, queue):
            self._send_apart(queue, worker, now)

    def _holders(self, queue: TaskQueue) -> int:
        """How many workers, or machines, take nothing until a task of this queue fits."""
        allocations = {id(w.allocation): w.allocation for w in self.workers.values()}
        return sum(allocation.saving_for is queue for allocation in allocations.values())

    def _assign_near(self, now: float) -> bool:
        """Send tasks to workers that have their inputs.

        Only where there is a free slot: a task whose holder is full goes to whoever is idle, at
        once, because moving the bytes begins then, and nobody knows how long the holder takes. Only
        when no slot is free anywhere are tasks sent ahead, to their holders.

        Returns:
            Whether there are tasks left that would rather go elsewhere than just anywhere.
        """
        left = False
        for queue in list(self._near):
            if queue.head() is None:
                self._near.pop(queue, None)
            elif self._place(queue, now):
                left = True
        return left

    def _place(self, queue: TaskQueue, now: float) -> bool:
        available = [self.workers[name] for name in self.available]
        workers = [w for w in available if self._takes_freely(w, queue)]
        free = sum(max(0, worker.slots - len(worker.leases)) for worker in workers)
        head = queue.head()
        assert head is not None
        passed = self._passed[1] if self._passed[0] == head.number else 0
        most = free + (_WINDOW if passed < _OVERTAKEN else 0)
        window = [task for task in itertools.islice(queue.tasks, most) if task.state is _WAITING]
        given: dict[str, list[Task]] = {}
        picky = False
        for task in window:
            if not task.inputs:
                continue
            room = [w for w in workers if len(w.leases) < w.slots]
            holder = best_holder(task.inputs, room)
            if holder is None and not free:
                holder = best_holder(
                    task.inputs, [w for w in workers if self._takes_ahead(w, task)]
                )
            if holder is None:
                picky = picky or any(each.workers for each in task.inputs)
                continue
            begins = len(holder.leases) < holder.slots
            free -= begins
            give(task, holder, self._leases)
            task.state = _RUNNING if begins else _SENT
            given.setdefault(holder.id, []).append(task)
        if given:
            first = queue.tasks[0]
            queue.tasks = deque(task for task in queue.tasks if task.state is _WAITING)
            if queue.tasks and queue.tasks[0] is first:
                self._passed = (first.number, passed + sum(map(len, given.values())))
        for name, tasks in given.items():
            self._waiting -= len(tasks)
            begun = [task for task in tasks if task.state is _RUNNING]
            if begun:
                self._out.append(MarkRunning(begun, self._events))
            self._out.append(SendTasks(name, tasks, self._events))
        if not any(task.inputs for task in window):
            return False
        return picky

    def _takes_freely(self, worker: Worker, queue: TaskQueue) -> bool:
        """Say whether a task of this queue may have any free slot of a worker."""
        allocation, request = worker.allocation, queue.request
        most = self.config.scaling.max_tasks_per_worker
        if most is not None and worker.completed + len(worker.leases) >= most:
            return False
        return (
            request.floor.within(allocation.capacity)
            and allocation.is_light(request)
            and not (allocation.heavy or allocation.tight)
            and allocation.saving_for in (None, queue)
        )

    def _takes_ahead(self, worker: Worker, task: Task) -> bool:
        """Say whether a worker may have a task before it has a free slot for it; as elsewhere."""
        sending, slots, kind = self.config.sending, worker.slots, task.stats
        return (
            worker.load + kind.seconds <= sending.lookahead * slots
            and len(worker.leases) < min(sending.max_lookahead * slots, slots + 2 * kind.samples)
            and not worker.paused_until
        )

    def validate(self) -> None:
        """Check every invariant; for tests.

        Raises:
            AssertionError: Naming the one that does not hold.
        """
        from cloudexec._core.invariants import check

        check(self)


def _unknown(rungs: int) -> list[WorkerCapacity]:
    """Stand for sizes of which nothing is known but that each has more memory than the last."""
    return [WorkerCapacity(cpus=1e6, memory=(size + 1) << 60) for size in range(rungs)]
