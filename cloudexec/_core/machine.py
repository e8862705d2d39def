"""The machine: events in, commands out."""

from __future__ import annotations

import itertools
import math
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cloudexec._config import ServerConfig
from cloudexec._core.commands import (
    CancelTasks,
    Command,
    DrainWorker,
    FailTask,
    FailTasksUnlaunched,
    Finish,
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
    FailureKind,
    FailuresReceived,
    LaunchesRefused,
    LaunchFailed,
    LeasesReturned,
    ResultsReceived,
    ShutdownRequested,
    TasksCancelled,
    TasksDropped,
    TasksHeld,
    TasksRecalled,
    TasksReleased,
    TasksStarted,
    TasksSubmitted,
    WorkerConnected,
    WorkerDraining,
    WorkerHeard,
    WorkerLost,
    WorkerReady,
)
from cloudexec._core.scaling import sizes_to_launch
from cloudexec._core.scheduling import take_tasks
from cloudexec._core.tasks import Task, TaskState
from cloudexec._core.workers import Launch, Worker, WorkerState

__all__ = ["Machine"]

_WAITING, _SENT = TaskState.WAITING, TaskState.SENT
_RUNNING, _DONE = TaskState.RUNNING, TaskState.DONE
_HELD = TaskState.HELD

_REBALANCE_AFTER = 0.1
"""Seconds between looks at whether one worker sits on tasks that another could run."""
_CANCEL_PAUSE = 0.05
"""Seconds after a cancellation in which a worker gets nothing ahead of need."""
_SUSPICIONS = 10
"""Workers that may be lost before they were ready, under a task that they were to begin with,
before each further one costs it an attempt: a task whose mere presence kills workers comes to an
end all the same."""
_LATER = 60.0
"""Seconds until workers are launched again after launches failed while others are at work."""
_KILLED_LAUNCHES = 20
"""Workers that may be killed from outside in a row, with no task done, before we give up."""


class Machine:
    """Decides for one executor. Single-threaded; holds no clock.

    Args:
        config: What to decide by.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.queues: list[deque[Task]] = [deque() for _ in range(config.scaling.rungs)]
        """Waiting tasks, by the least size of worker that they need."""
        self.workers: dict[str, Worker] = {}
        self.launches: dict[str, Launch] = {}
        self.counts: Counter[str] = Counter()
        self.open_tasks = 0
        """Tasks that are not done, nor held: waiting, sent or running."""
        self.held: dict[Task, None] = {}
        """Tasks that wait for what they depend on: no demand, but they are to be finished."""
        self.shutting_down = False
        self.killing = False
        self.finished = False
        self.refusing = False
        """Whether no worker may be launched any more."""
        self._open_by_rung = [0] * config.scaling.rungs  # kept where there is more than one
        self._waiting = 0
        self._active_slots = 0  # of launches and active workers
        self._active_by_rung = [0] * config.scaling.rungs
        self._total_slots = 0  # the same and of draining workers
        self._hungry: dict[str, None] = {}
        self._leases = itertools.count(1)
        self._launch_numbers = itertools.count(1)
        self._events = 0
        self._failed_launches = 0
        self._surplus_since: float | None = None
        self._killed_launches = 0
        self._launch_not_before = 0.0
        self._deadline: float | None = None
        self._out: list[Command] = []
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            TasksSubmitted: self._on_submitted,
            TasksHeld: self._on_held,
            TasksReleased: self._on_released,
            TasksDropped: self._on_dropped,
            TasksCancelled: self._on_cancelled,
            TasksRecalled: self._on_recalled,
            WorkerConnected: self._on_connected,
            WorkerHeard: self._on_heard,
            WorkerReady: self._on_ready,
            WorkerDraining: self._on_draining,
            WorkerLost: self._on_lost,
            ResultsReceived: self._on_results,
            FailuresReceived: self._on_failures,
            TasksStarted: self._on_started,
            LeasesReturned: self._on_returned,
            LaunchFailed: self._on_launch_failed,
            LaunchesRefused: self._on_launches_refused,
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
        if self._waiting and self._hungry:
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

    def _on_held(self, event: TasksHeld, now: float) -> None:
        self.counts["submitted"] += len(event.tasks)
        self.held.update(dict.fromkeys(event.tasks))

    def _on_released(self, event: TasksReleased, now: float) -> None:
        released = [task for task in event.tasks if task.state is _HELD]
        for task in released:
            del self.held[task]
            task.state = _WAITING
        self._enqueue(released)

    def _on_dropped(self, event: TasksDropped, now: float) -> None:
        for task in event.tasks:
            if task.state is not _DONE:
                self._close(task, "failed")

    def _enqueue(self, tasks: Sequence[Task]) -> None:
        if len(self.queues) == 1:
            self.queues[0].extend(tasks)
        else:
            for task in tasks:
                self._enter(task)
                self.queues[task.rung].append(task)
        self._waiting += len(tasks)
        self.open_tasks += len(tasks)

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
        for name in {task.worker for task in event.tasks if task.state is _SENT}:
            worker = self.workers.get(name or "")
            if worker is None:
                continue
            if now >= worker.paused_until:
                sent = [lease for lease, task in worker.leases.items() if task.state is _SENT]
                self._out.append(RecallTasks(worker.id, sent, self._events))
            worker.paused_until = now + _CANCEL_PAUSE
            self._remind(worker.paused_until)

    def _enter(self, task: Task) -> None:
        """Count an open task under the size of worker that it needs."""
        task.rung = min(max(task.rung, task.kind.rung), len(self.queues) - 1)
        self._open_by_rung[task.rung] += 1

    def _climb(self, task: Task, rung: int) -> None:
        """Have a task that ran out of memory on workers of this size go to larger ones."""
        kind = task.kind
        before = kind.rung
        kind.outgrew(rung)
        self._open_by_rung[task.rung] -= 1
        task.rung = rung + 1
        self._enter(task)
        if kind.rung > before and before < len(self.queues) - 1:
            moving = [task for task in self.queues[before] if task.kind is kind]
            if moving:
                rest = [task for task in self.queues[before] if task.kind is not kind]
                self.queues[before] = deque(rest)
                for other in moving:
                    if other.state is _WAITING:
                        self._open_by_rung[other.rung] -= 1
                        self._enter(other)
                        self.queues[other.rung].append(other)

    def waiting_tasks(self) -> list[Task]:
        """Tasks that no worker has."""
        return [task for queue in self.queues for task in queue if task.state is _WAITING]

    def _clear_queues(self) -> None:
        for queue in self.queues:
            queue.clear()

    def _close(self, task: Task, how: str) -> None:
        if task.state is _HELD:
            del self.held[task]
            task.state = _DONE
            self.counts[how] += 1
            return
        if task.state is _WAITING:
            self._waiting -= 1
        if len(self.queues) > 1:
            self._open_by_rung[task.rung] -= 1
        task.state = _DONE
        self.open_tasks -= 1
        self.counts[how] += 1

    def _release(self, worker: Worker, lease: int) -> Task | None:
        """Take a lease back from a worker; ``None`` if it has no such lease (any more)."""
        task = worker.leases.pop(lease, None)
        if task is not None:
            worker.load -= task.cost
            if task.lease == lease:
                task.worker = None
                task.lease = 0
        return task

    def _settle(self, worker: Worker, now: float) -> None:
        """After leases were released: is the worker hungry, idle?"""
        if not worker.leases:
            worker.load = 0.0
            worker.idle_since = now
            if self.config.scaling.idle_timeout is not None:
                self._remind(now + self.config.scaling.idle_timeout)
        if worker.state is WorkerState.ACTIVE:
            most = self.config.scaling.max_tasks_per_worker
            if most is not None and worker.completed >= most:
                self._retire(worker)
            else:
                self._hungry[worker.id] = None
        if len(self.workers) > 1 and self.open_tasks:
            self._remind(now + _REBALANCE_AFTER)

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
            task.kind.learn(seconds)
            task.worker = None
            if task.state is _DONE:
                continue
            task.state = _DONE
            tasks.append(task)
            results.append(result)
            times.append(seconds)
        worker.load -= released
        worker.completed += len(event.leases)
        self._failed_launches = self._killed_launches = 0
        if tasks:
            if len(self.queues) > 1:
                for task in tasks:
                    self._open_by_rung[task.rung] -= 1
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
                else:
                    self._fail(worker, task, failure)
        worker.completed += len(event.failures)
        self._settle(worker, now)

    def _fail(self, worker: Worker, task: Task, failure: Failure) -> None:
        self._close(task, "failed")
        self._out.append(FailTask(worker.id, task, failure, self._events))

    def _lose_attempt(self, worker: Worker, task: Task, failure: Failure) -> None:
        task.lost += 1
        self.counts["lost_attempts"] += 1
        if failure.out_of_memory and worker.rung + 1 < len(self.queues) and task.retries:
            # A larger worker is another try, not one more of the same.
            task.retries += 1
            self.counts["out_of_memory"] += 1
            self._climb(task, max(worker.rung, task.rung))
        if task.lost > task.retries or self.killing:
            self._fail(worker, task, failure)
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
        if len(self.queues) == 1:
            self.queues[0].extendleft(reversed(back))
        else:
            for task in reversed(back):
                self.queues[task.rung].appendleft(task)
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
        worker.heard_at = now
        tasks = [self._release(worker, lease) for lease in event.leases]
        self._requeue(task for task in tasks if task is not None)
        self._settle(worker, now)

    # Workers come and go.

    def _on_connected(self, event: WorkerConnected, now: float) -> None:
        launch = self.launches.get(event.launch)
        self._end_launch(event.launch)
        rung = 0 if launch is None else launch.rung
        worker = Worker(event.worker, event.slots, event.launch, now, rung)
        self.workers[event.worker] = worker
        self._count_active(worker.slots, worker.rung)
        self._total_slots += worker.slots
        self.counts["workers_connected"] += 1
        self._failed_launches = 0
        self._hungry[worker.id] = None
        self._remind(now + self.config.lease_timeout)
        if self.config.scaling.max_worker_lifetime is not None:
            self._remind(now + self.config.scaling.max_worker_lifetime)
        self._settle(worker, now)
        if self.killing:
            self._out.append(TerminateWorker(worker.id, self._events))

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

    def _count_active(self, slots: int, rung: int) -> None:
        self._active_slots += slots
        self._active_by_rung[rung] += slots

    def _drain(self, worker: Worker) -> None:
        if worker.state is WorkerState.ACTIVE:
            worker.state = WorkerState.DRAINING
            self._count_active(-worker.slots, worker.rung)
            self._hungry.pop(worker.id, None)

    def _retire(self, worker: Worker) -> None:
        """Have a worker finish what it has; another takes its place when there is need."""
        if worker.state is WorkerState.ACTIVE:
            self._drain(worker)
            self._out.append(DrainWorker(worker.id, self._events))

    def _end_launch(self, launch_id: str) -> bool:
        launch = self.launches.pop(launch_id, None)
        if launch is None:
            return False
        self._count_active(-launch.slots, launch.rung)
        self._total_slots -= launch.slots
        return True

    def _on_lost(self, event: WorkerLost, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is not None:
            self._lose_worker(worker, event, now)

    def _lose_worker(self, worker: Worker, event: WorkerLost, now: float) -> None:
        expected = worker.state is WorkerState.DRAINING and not worker.leases
        self._drain(worker)
        del self.workers[worker.id]
        self._total_slots -= worker.slots
        if not expected:
            self.counts["workers_lost"] += 1
        if event.reclaimed:
            self.counts["workers_reclaimed"] += 1
        detail = event.detail
        failure = Failure(FailureKind.WORKER_LOST, detail, event.out_of_memory)
        unblamed: list[Task] = []
        # Slots take tasks in the order sent: whatever else was known to have begun, the first
        # ones may have.
        for position, task in enumerate(list(worker.leases.values())):
            if task.state is _DONE:
                continue
            may_have_run = task.state is _RUNNING or position < worker.slots
            task.suspected += may_have_run
            task.worker = None
            task.lease = 0
            # Without retries, whatever the worker may have begun counts as begun.
            begun = worker.ready and (may_have_run or not task.retries)
            if event.reclaimed and task.retries:
                self.counts["reclaimed"] += begun
                unblamed.append(task)
            elif begun or task.suspected > _SUSPICIONS:
                self._lose_attempt(worker, task, failure)
            else:
                larger = worker.rung + 1 < len(self.queues)
                if event.out_of_memory and larger and position < worker.slots:
                    # It had no slot ready: what the tasks need before they begin is too much.
                    self._climb(task, max(worker.rung, task.rung))
                unblamed.append(task)
        worker.leases.clear()
        self._requeue(unblamed)
        if event.relaunched and not self.shutting_down:
            launch = Launch(worker.launch, worker.slots, now, worker.rung)
            self.launches[launch.id] = launch
            self._count_active(launch.slots, launch.rung)
            self._total_slots += launch.slots
            self._remind(now + self.config.scaling.launch_timeout)
        if not expected and not worker.completed and not event.reclaimed:
            self._count_failed_launch(str(detail), now, fatal=False, killed=True)

    def _on_launch_failed(self, event: LaunchFailed, now: float) -> None:
        if self._end_launch(event.launch) and not event.reclaimed:
            self._count_failed_launch(event.reason, now, fatal=event.fatal, killed=event.killed)

    def _on_launches_refused(self, event: LaunchesRefused, now: float) -> None:
        self.refusing = True
        for launch in event.launches:
            self._end_launch(launch)

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
        rungs = [w.rung for w in self.workers.values() if w.state is WorkerState.ACTIVE]
        rungs += [launch.rung for launch in self.launches.values()]
        served = max(rungs, default=-1) + 1
        hopeless = self.queues[served:]
        tasks = [task for queue in hopeless for task in queue if task.state is _WAITING]
        if served and not tasks:
            self._launch_not_before = now + _LATER
            self._remind(self._launch_not_before)
            return
        self._failed_launches = self._killed_launches = 0
        for queue in hopeless:
            queue.clear()
        for task in tasks:
            self._close(task, "failed")
        if tasks:
            self._out.append(FailTasksUnlaunched(tasks, reason, self._events))

    def _scale(self, now: float) -> None:
        if self.shutting_down and (self.killing or not (self.open_tasks or self.held)):
            self._wind_down()
            return
        if self.launches:
            self._withdraw_surplus(now)
        if now < self._launch_not_before or self.refusing:
            return
        policy = self.config.scaling
        if len(self.queues) > 1:
            self._scale_rungs(now)
            return
        active, total = self._active_slots, self._total_slots
        if active >= policy.max_slots or (active >= self.open_tasks and active >= policy.min_slots):
            return
        for slots in sizes_to_launch(policy, demand=self.open_tasks, active=active, total=total):
            self._launch(slots, 0, now)

    def _withdraw_surplus(self, now: float) -> None:
        """Give up workers that have not come, once nothing has waited for them for a while.

        As long as an idle worker would be kept: what is asked for next may need them.
        """
        scaling = self.config.scaling
        surplus = self._active_slots - max(self.open_tasks, scaling.min_slots)
        at_once = self.shutting_down and not self._waiting and not self.held
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
        for launch in reversed(list(self.launches.values())):
            rung = launch.rung
            needed = len(self.queues) > 1 and (
                self._active_by_rung[rung] - launch.slots < self._open_by_rung[rung]
            )
            if not at_once and (surplus < launch.slots or needed):
                continue
            surplus -= launch.slots
            self._end_launch(launch.id)
            self._out.append(TerminateLaunch(launch.id, self._events))
        self._surplus_since = None

    def _scale_rungs(self, now: float) -> None:
        """Scale each size of worker to the tasks that need it, the largest first."""
        policy = self.config.scaling
        active = self._active_by_rung
        spare = 0
        for rung in reversed(range(len(self.queues))):
            demand = self._open_by_rung[rung]
            if rung == 0:
                demand = max(demand, policy.min_slots - sum(active[1:]))
            # A large worker serves small tasks too, once it has nothing else to do.
            have = active[rung] + spare
            if rung and demand > have and self._total_slots >= policy.max_slots:
                self._make_room(rung)
            for slots in sizes_to_launch(
                policy, demand=demand, active=have, total=self._total_slots
            ):
                self._launch(slots, rung, now)
                have += slots
            spare = max(0, have - demand)

    def _make_room(self, rung: int) -> None:
        """Give up smaller workers that have nothing to do, for larger ones that tasks wait for."""
        for launch in list(self.launches.values()):
            if launch.rung < rung and not self._open_by_rung[launch.rung]:
                self._end_launch(launch.id)
                self._out.append(TerminateLaunch(launch.id, self._events))
        for worker in self.workers.values():
            if worker.rung < rung and not worker.leases and not self.queues[worker.rung]:
                self._retire(worker)

    def _launch(self, slots: int, rung: int, now: float) -> None:
        launch = Launch(str(next(self._launch_numbers)), slots, now, rung)
        self.launches[launch.id] = launch
        self._count_active(slots, rung)
        self._total_slots += slots
        self.counts["launches"] += 1
        self._remind(now + self.config.scaling.launch_timeout)
        self._out.append(LaunchWorker(launch.id, slots, self._events, rung))

    # The end.

    def _on_shutdown(self, event: ShutdownRequested, now: float) -> None:
        self.shutting_down = True
        if not (event.cancel or event.kill):
            return
        self.killing = self.killing or event.kill
        dropped = [*self.waiting_tasks(), *self.held]
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

    def _wind_down(self) -> None:
        """Stop whatever still runs; once it is all gone, finish."""
        for launch in list(self.launches):
            self._end_launch(launch)
            self._out.append(TerminateLaunch(launch, self._events))
        for worker in self.workers.values():
            if worker.state is WorkerState.ACTIVE:
                self._drain(worker)
                command = TerminateWorker if self.killing else DrainWorker
                self._out.append(command(worker.id, self._events))
            elif self.killing and worker.leases:
                self._out.append(TerminateWorker(worker.id, self._events))
        if not (self.workers or self.open_tasks or self.held or self.finished):
            self.finished = True
            self._out.append(Finish(self._events))

    # Time.

    def _remind(self, at: float) -> None:
        if self._deadline is None or at < self._deadline:
            self._deadline = at

    def _on_deadline(self, event: DeadlinePassed, now: float) -> None:
        config = self.config
        scaling = config.scaling
        self._deadline = None
        for launch in list(self.launches.values()):
            if now >= launch.started_at + scaling.launch_timeout:
                self._end_launch(launch.id)
                self._out.append(TerminateLaunch(launch.id, self._events))
                reason = f"no worker dialed back within {scaling.launch_timeout:g} s"
                self._count_failed_launch(reason, now, fatal=False, killed=False)
            else:
                self._remind(launch.started_at + scaling.launch_timeout)
        if now < self._launch_not_before:
            self._remind(self._launch_not_before)
        active = sum(w.slots for w in self.workers.values() if w.state is WorkerState.ACTIVE)
        for worker in list(self.workers.values()):
            if now >= worker.heard_at + config.lease_timeout:
                self._out.append(TerminateWorker(worker.id, self._events))
                silent = f"it was silent for {config.lease_timeout:g} s"
                self._lose_worker(worker, WorkerLost(worker.id, silent), now)
                continue
            self._remind(worker.heard_at + config.lease_timeout)
            if scaling.max_worker_lifetime is not None and worker.state is WorkerState.ACTIVE:
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
                        self._hungry[worker.id] = None
            if worker.idle_since is None or worker.state is not WorkerState.ACTIVE:
                continue
            if scaling.idle_timeout is None or active - worker.slots < scaling.min_slots:
                continue
            if now >= worker.idle_since + scaling.idle_timeout:
                active -= worker.slots
                self._retire(worker)
            else:
                self._remind(worker.idle_since + scaling.idle_timeout)
        self._rebalance(now)

    def _rebalance(self, now: float) -> None:
        """Recall what waits on one worker while another has a free slot."""
        if self._waiting or len(self.workers) < 2:
            return
        free = sum(
            max(0, self.workers[name].slots - len(self.workers[name].leases))
            for name in self._hungry
        )
        crowded = [w for w in self.workers.values() if len(w.leases) > w.slots]
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
        for name in list(self._hungry):
            if not self._waiting:
                break
            worker = self.workers[name]
            share = max(worker.slots, -(-self._waiting // len(self._hungry)))
            most = self.config.scaling.max_tasks_per_worker
            if most is not None:
                share = min(share, most - worker.completed - len(worker.leases))
                if share <= 0:
                    del self._hungry[name]
                    continue
            queue = self.queues[worker.rung]
            if worker.rung and not queue:
                queue = next((q for q in reversed(self.queues[: worker.rung]) if q), queue)
            tasks, starting = take_tasks(queue, worker, sending, self._leases, share, now)
            self._waiting -= len(tasks)
            if tasks:
                if starting:
                    self._out.append(MarkRunning(tasks[:starting], self._events))
                self._out.append(SendTasks(name, tasks, self._events))
            if len(tasks) < share and self._waiting and worker.leases:
                # It took less than it might have: it is full until it answers.
                del self._hungry[name]

    # For tests and for people.

    def validate(self) -> None:
        """Check every invariant.

        Raises:
            AssertionError: Naming the one that does not hold.
        """
        waiting = self.waiting_tasks()
        assert len(waiting) == self._waiting, "the count of waiting tasks is off"
        assert len(set(map(id, waiting))) == len(waiting), "a task waits twice"
        held: set[int] = set()
        open_held = 0
        for worker in self.workers.values():
            assert worker.id in self.workers
            cost = sum(task.cost for task in worker.leases.values())
            assert abs(cost - worker.load) < 1.0, "a worker's load is off"
            assert (worker.idle_since is None) == bool(worker.leases), "idle with leases"
            for lease, task in worker.leases.items():
                assert id(task) not in held or task.state is _DONE, "a task is leased twice"
                if task.state is _DONE:
                    continue
                held.add(id(task))
                open_held += 1
                assert task.lease == lease, "task and worker disagree on the lease"
                assert task.worker == worker.id, "task and worker disagree on who has it"
                assert task.state in (_SENT, _RUNNING), "a leased task is neither sent nor running"
                assert task.lost <= task.retries, "a task has more attempts than it may"
        assert not held & set(map(id, waiting)), "a task is both waiting and leased"
        assert self.open_tasks == len(waiting) + open_held, "open tasks are in neither place"
        if len(self.queues) > 1:
            assert sum(self._open_by_rung) == self.open_tasks, "open tasks by size are off"
            for rung, queue in enumerate(self.queues):
                misplaced = [t for t in queue if t.state is _WAITING and t.rung != rung]
                assert not misplaced, "a task waits for another size than it needs"
        for name in self._hungry:
            assert self.workers[name].state is WorkerState.ACTIVE, "a draining worker is hungry"
        active = sum(w.slots for w in self.workers.values() if w.state is WorkerState.ACTIVE)
        starting = sum(launch.slots for launch in self.launches.values())
        total = sum(w.slots for w in self.workers.values()) + starting
        assert self._active_slots == active + starting, "the count of active slots is off"
        assert self._active_slots == sum(self._active_by_rung), "active slots by size are off"
        assert self._total_slots == total, "the count of slots is off"
        assert total <= self.config.scaling.max_slots, "more slots than max_workers"
        assert all(task.state is _HELD for task in self.held), "a held task is in another state"
        if self.finished:
            assert not self.open_tasks, "finished with tasks left"
            assert not self.held, "finished with held tasks left"
            assert not self.workers, "finished with workers left"
