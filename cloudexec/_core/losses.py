"""What happens when an attempt, a worker or a launch is lost; it reads from top to bottom.

An attempt is lost with its slot, or with its worker. It counts against the task, which runs again
until its retries are used up. Three kinds of loss do not count: the platform wanted the worker
back; the task ran out of memory, and there is a larger size for it; a worker died with several
tasks aboard, of which nobody knows the guilty one. Those run apart from now on, see ``quarantine``.

A worker is lost when its stream or its process ends, when it was cut off or silent for too long,
or when it does not end although it has nothing left to do.

A launch is lost when its worker does not come. After a few in a row, tasks that no other worker can
do are failed with the reason: nothing is to wait for ever for what does not come.
"""

from __future__ import annotations

from cloudexec._config import ServerConfig
from cloudexec._core import commands, events
from cloudexec._core.decisions import Decisions
from cloudexec._core.events import Failure, FailureKind
from cloudexec._core.pool import Pool
from cloudexec._core.quarantine import PARTS, Quarantine
from cloudexec._core.queue import Queues
from cloudexec._core.tasks import Task, TaskState
from cloudexec._core.workers import Launch, Worker

__all__ = ["Losses"]

_RUNNING, _DONE = TaskState.RUNNING, TaskState.DONE

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
_JUDGED = (FailureKind.RAISED, FailureKind.TIMED_OUT)


class Losses:
    """Decides what becomes of whatever was lost.

    Attributes:
        launch_not_before: Until then no worker is launched, because launches have failed.
    """

    def __init__(
        self,
        config: ServerConfig,
        queues: Queues,
        pool: Pool,
        quarantine: Quarantine,
        decisions: Decisions,
    ) -> None:
        self.launch_not_before = 0.0
        self._failed_in_a_row = 0
        self._failed_at = float("-inf")
        self._killed_in_a_row = 0
        self._config = config
        self._queues = queues
        self._pool = pool
        self._quarantine = quarantine
        self._do = decisions.commands.append
        self._counts = decisions.counts
        self._remind = decisions.remind

    # An attempt brought no result.

    def on_failures(self, event: events.FailuresReceived, now: float) -> None:
        worker = self._pool.workers.get(event.worker)
        if worker is None:
            self._counts["duplicates"] += len(event.failures)
            return
        worker.heard_at = now
        for lease, failure in event.failures:
            task = worker.take_back(lease)
            if task is None:
                self._counts["duplicates"] += 1
            elif task.state is not _DONE:
                self._attempt_failed(worker, task, failure)
        worker.completed += len(event.failures)
        self._pool.settle(worker, now)

    def _attempt_failed(self, worker: Worker, task: Task, failure: Failure) -> None:
        kind, queues = failure.kind, self._queues
        if kind is FailureKind.SLOT_LOST:
            self._lose_attempt(worker, task, failure)
        elif kind is FailureKind.RECLAIMED and task.retries:
            self._counts["reclaimed"] += 1
            queues.requeue([task])
        elif kind is FailureKind.OUTGREW and queues.can_grow(task, worker.size):
            task.lost += 1
            self._lose_to_memory(worker, task)
            queues.requeue([task])
        elif kind is FailureKind.INPUT_LOST and not queues.killing:
            queues.back_off(task)  # until it is restored
        elif self._is_judged(task, failure):
            queues.back_off(task)  # until somebody has looked at what it raised
            self._do(commands.JudgeFailure(worker.id, task, failure))
        else:
            self._fail(worker.id, task, failure)

    def _lose_attempt(self, worker: Worker, task: Task, failure: Failure) -> None:
        """Have a task lose an attempt: it runs again, or this was the last one."""
        task.lost += 1
        self._counts["lost_attempts"] += 1
        if failure.out_of_memory and self._queues.can_grow(task, worker.size):
            self._lose_to_memory(worker, task)
        if task.lost > task.retries or self._queues.killing:
            self._fail(worker.id, task, failure)
        else:
            self._counts["retries"] += 1
            self._queues.requeue([task])

    def _lose_to_memory(self, worker: Worker, task: Task) -> None:
        """Have a task try a larger size: another try, not one more of the same."""
        task.retries += 1
        self._counts["out_of_memory"] += 1
        self._queues.grow(task, worker.size)

    def _fail(self, worker: str, task: Task, failure: Failure) -> None:
        self._queues.close(task, "failed")
        self._do(commands.FailTask(worker, task, failure))

    # A task raised what may be worth another attempt.

    def _is_judged(self, task: Task, failure: Failure) -> bool:
        requirements = task.requirements
        return (
            requirements is not None
            and requirements.judged
            and failure.kind in _JUDGED
            and task.lost < task.retries
            and not self._queues.killing
        )

    def on_judged(self, event: events.FailureJudged, now: float) -> None:
        task = event.task
        if task.state is not TaskState.BACKING_OFF:
            return
        if not event.again or self._queues.killing:
            self._fail(event.worker, task, event.failure)
            return
        policy = self._config.retry
        # Spread a little, by number: what failed together does not come back together.
        spread = 1.0 + task.number * 7 % 16 / 32
        pause = min(policy.task_backoff * 2.0 ** min(task.lost, 30), policy.longest_backoff)
        task.lost += 1
        self._counts["retried_errors"] += 1
        self._queues.back_off_until(task, now + pause * spread)

    # A worker is lost.

    def on_lost(self, event: events.WorkerLost, now: float) -> None:
        worker = self._pool.workers.get(event.worker)
        if worker is not None:
            self._lose_worker(worker, event, now)

    def on_cut(self, event: events.WorkerCut, now: float) -> bool:
        """Wait for a worker whose connection was cut, for a while; say whether this is news."""
        worker = self._pool.workers.get(event.worker)
        if worker is None or worker.cut_at is not None:
            return False
        self._counts["workers_cut"] += 1
        self._pool.cut_off(worker, now)
        if self._config.reconnect_grace:
            self._remind(now + self._config.reconnect_grace)
        else:
            self.give_up(worker, now)
        return True

    def give_up(self, worker: Worker, now: float) -> None:
        """Lose a worker whose connection was cut, and that is not waited for any longer."""
        grace = self._config.reconnect_grace
        reason = "its connection was cut"
        if grace:
            reason += f", and it did not come back within {grace:g} s (reconnect_grace)"
        self._terminate(worker, reason, now)

    def has_lost(self, worker: Worker, now: float) -> bool:
        """Look whether a worker was away, silent or in the way for too long.

        Returns:
            Whether it is lost, or cut off: there is nothing else to look at.
        """
        config = self._config
        if worker.cut_at is not None:
            if now >= worker.cut_at + config.reconnect_grace:
                self.give_up(worker, now)
            else:
                self._remind(worker.cut_at + config.reconnect_grace)
            return True
        if now >= worker.heard_at + config.lease_timeout:
            reason = f"it was silent for {config.lease_timeout:g} s"
            self._terminate(worker, reason, now, silent=True)
            return True
        self._remind(worker.heard_at + config.lease_timeout)
        return not worker.is_active and self._overstays(worker, now)

    def _overstays(self, worker: Worker, now: float) -> bool:
        """Give up a draining worker that has nothing left to do for anybody and does not end."""
        if worker.has_work:
            worker.over_at = None
            return False
        if worker.over_at is None:
            worker.over_at = now
        # Once all tasks are done, nobody needs what it keeps.
        winding_down = self._queues.shutting_down and not self._queues.has_work
        limit = _FAREWELL if winding_down else _HAND_OVER
        if now < worker.over_at + limit:
            self._remind(worker.over_at + limit)
            return False
        reason = f"it did not end within {limit:g} s although it had nothing left to do"
        self._terminate(worker, reason, now)
        return True

    def _terminate(self, worker: Worker, reason: str, now: float, *, silent: bool = False) -> None:
        """Lose a worker of which nobody has said that it is gone."""
        self._do(commands.TerminateWorker(worker.id))
        self._lose_worker(worker, events.WorkerLost(worker.id, reason), now, silent=silent)

    def _lose_worker(
        self, worker: Worker, event: events.WorkerLost, now: float, *, silent: bool = False
    ) -> None:
        """Have a worker be gone, and its tasks run again, unless that costs them an attempt.

        Args:
            worker: Which.
            event: How it was lost, in the words of whoever noticed it.
            now: The time.
            silent: Whether nothing was heard of it for a while before.
        """
        unheard = silent or worker.cut_at is not None
        expected = not worker.is_active and not worker.leases
        self._pool.remove(worker)
        if not expected:
            self._counts["workers_lost"] += 1
        if event.reclaimed:
            self._counts["workers_reclaimed"] += 1
        tasks = list(worker.leases.values())
        worker.leases.clear()
        again: list[Task] = []
        for position, task in enumerate(tasks):
            # Slots take tasks in the order sent: of those that were sent ahead, the first may have
            # begun although nobody has said so.
            first = task.state is _RUNNING or position < worker.slots
            if task.state is not _DONE and not self._costs_attempt(
                worker, event, task, aboard=len(tasks), first=first, unheard=unheard
            ):
                again.append(task)
        self._queues.requeue(again)
        if event.relaunched and not self._queues.shutting_down:
            capacity = worker.allocation.capacity
            self._pool.expect(Launch(worker.launch, worker.slots, now, worker.shape, capacity))
        if not expected and not worker.completed and not event.reclaimed:
            # It died before it was of use to anybody, as if it had not come.
            self._count_failed_launch(str(event.detail), now, killed=True)

    def _costs_attempt(
        self,
        worker: Worker,
        event: events.WorkerLost,
        task: Task,
        *,
        aboard: int,
        first: bool,
        unheard: bool,
    ) -> bool:
        """Decide what the loss of a worker means for a task aboard.

        It costs an attempt where there is nobody else to blame, because the task was alone; where
        it may have begun, and must not run twice; and where it may have begun, memory was the
        reason, and there is a larger size. In all other cases the task just runs again: apart from
        others if it may have been the cause, on a larger size if that may help.

        Args:
            worker: Which is gone.
            event: How it was lost.
            task: One of those that it had.
            aboard: How many there were.
            first: Whether it may have begun, or would have been among the first to begin.
            unheard: Whether what the worker said last may be lost, too.

        Returns:
            Whether it has lost an attempt, and is dealt with; otherwise it is to run again.
        """
        # A worker that was not ready has begun nothing. But it may have died of what it does
        # before it begins with its first tasks: loading what they need.
        task.suspected += worker.ready or first
        task.worker = None
        task.lease = 0
        # Without retries, whatever the worker may have begun counts as begun; and where the
        # link failed, the news that it was ready may be what was lost.
        begun = (worker.ready and first) or (not task.retries and (worker.ready or unheard))
        if event.reclaimed and task.retries:
            self._counts["reclaimed"] += begun
            return False
        larger = event.out_of_memory and first and self._queues.can_grow(task, worker.size)
        exposed = worker.ready or task.suspected > _SUSPICIONS
        if (exposed and aboard == 1) or (begun and (larger or not task.retries)):
            kind, suspects = FailureKind.WORKER_LOST, 0 if event.reclaimed else aboard
            failure = Failure(kind, event.detail, event.out_of_memory, suspects)
            self._lose_attempt(worker, task, failure)
            return True
        if larger:
            # It had no slot ready: what the tasks need before they begin is too much.
            self._queues.grow(task, worker.size)
        elif exposed and (aboard <= max(worker.slots, PARTS) or task.suspected > 1):
            # Of thousands aboard, most were not begun: those are suspects only the second time.
            self._quarantine.suspect(task, aboard, worker.slots)
        return False

    # A launch is lost.

    def on_launch_failed(self, event: events.LaunchFailed, now: float) -> None:
        launch = self._pool.end_launch(event.launch)
        if launch is not None and not event.reclaimed:
            # Those that were asked for before another one failed may all have one cause: together,
            # they are one failure.
            again = launch.started_at < self._failed_at
            self._count_failed_launch(
                event.reason, now, killed=event.killed, fatal=event.fatal, again=again
            )

    def time_out_launches(self, now: float) -> None:
        """Give up workers that have not come in time."""
        timeout = self._config.scaling.launch_timeout
        for launch in list(self._pool.launches.values()):
            if now >= launch.started_at + timeout:
                self._pool.withdraw(launch)
                reason = f"no worker dialed back within {timeout:g} s"
                self._count_failed_launch(reason, now, killed=False)
            else:
                self._remind(launch.started_at + timeout)
        if now < self.launch_not_before:
            self._remind(self.launch_not_before)

    def note_connected(self) -> None:
        """Take in that a worker came: launches work, though workers may be killed."""
        self._failed_in_a_row = 0

    def note_results(self) -> None:
        """Take in that a worker was of use: launches work, and workers are not just killed."""
        self._failed_in_a_row = self._killed_in_a_row = 0

    def _count_failed_launch(
        self,
        reason: str,
        now: float,
        *,
        killed: bool,
        fatal: bool = False,
        again: bool = False,
    ) -> None:
        """Launch no worker for a while, or give up the tasks that nobody else can do."""
        self._counts["launch_failures"] += 1
        policy = self._config.retry
        if killed:
            self._killed_in_a_row += 1
            failures, most = self._killed_in_a_row, _KILLED_LAUNCHES
            pause = 0.0
        else:
            if not again:
                self._failed_in_a_row += 1
                self._failed_at = now
            failures, most = self._failed_in_a_row, policy.launch_failures
            pause = policy.backoff * 2 ** min(failures - 1, 6)
        if not (fatal or failures >= most):
            self.launch_not_before = now + pause
            self._remind(self.launch_not_before)
            return
        # What workers that are there, or may still come, can do is not given up.
        served = {self._pool.capacity_of(shape) for shape in self._pool.active_by_shape}
        hopeless = [
            queue
            for queue in self._queues.by_key.values()
            if not any(queue.request.fits(capacity) for capacity in served)
        ]
        tasks = [
            task for queue in hopeless for task in queue.tasks if task.state is TaskState.WAITING
        ]
        if served and not tasks:
            self.launch_not_before = now + _LATER
            self._remind(self.launch_not_before)
            return
        self._failed_in_a_row = self._killed_in_a_row = 0
        for queue in hopeless:
            queue.tasks.clear()
        for task in tasks:
            self._queues.close(task, "failed")
        if tasks:
            self._do(commands.FailTasksUnlaunched(tasks, reason))
