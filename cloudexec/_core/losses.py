"""Decides what happens when an attempt, a worker or a launch is lost; it reads from top to bottom.

An attempt is lost with its slot, or with its worker. It counts against the task, which runs again
until its retries are used up. Three kinds of loss do not count. First, the platform took the worker
back. Second, the task ran out of memory, and there is a larger size of worker for it. Third, a
worker died with several tasks, and it is not known which of them was the cause. These tasks run
apart from others from then on; see ``quarantine``.

When a worker is lost is decided by ``ends``.

A launch is lost when its worker does not connect. After a few lost launches in a row, tasks that no
other worker can run fail with the reason, so that they do not wait forever.
"""

from __future__ import annotations

from cloudexec._config import ServerConfig
from cloudexec._core import commands, events, facts
from cloudexec._core.decisions import Decisions
from cloudexec._core.events import Failure, FailureKind
from cloudexec._core.facts import Attempt
from cloudexec._core.pool import Pool
from cloudexec._core.quarantine import PARTS, Quarantine
from cloudexec._core.queue import Queues
from cloudexec._core.tasks import Task, TaskState
from cloudexec._core.workers import Launch, Worker

__all__ = ["Losses"]

_RUNNING, _DONE = TaskState.RUNNING, TaskState.DONE

_SUSPICIONS = 10
"""Number of workers that may be lost before they were ready, while a task was among their first.
Each further one costs the task an attempt. So a task that kills workers before it begins fails,
too.
"""
_LATER = 60.0
"""Seconds until workers are launched again, if launches have failed while other workers work."""
_KILLED_LAUNCHES = 20
"""Number of workers that may be killed from outside in a row, without a finished task, before the
waiting tasks fail."""
_JUDGED = (FailureKind.RAISED, FailureKind.TIMED_OUT)
_ORDINARY = (FailureKind.RAISED, FailureKind.UNPICKLE_FAILED, FailureKind.PICKLE_FAILED)
"""Outcomes of the task's own, which the story does not tell unless ``retry_on`` is asked."""


class Losses:
    """Decides what happens to tasks when attempts, workers or launches are lost.

    Attributes:
        launch_not_before: The time before which no worker is launched, because launches failed.
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
        self._state = decisions.facts.append
        self._counts = decisions.counts
        self._remind = decisions.remind

    # An attempt had no result.

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
                size = task.size
                attempt = Attempt(task, lease, task.lost + 1, task.state is _RUNNING)
                self._attempt_failed(worker, task, failure)
                if failure.kind not in _ORDINARY or _may_be_judged(task):
                    self._conclude(attempt, size)
                    self._state(facts.AttemptFailed(worker.id, attempt, failure))
        worker.completed += len(event.failures)
        self._pool.settle(worker, now)

    def _conclude(self, attempt: Attempt, size: int) -> None:
        """Set what became of an attempt of a task, whose size was ``size`` before."""
        task = attempt.task
        attempt.counts = task.lost >= attempt.number
        attempt.is_suspect = task in self._queues.suspects
        attempt.has_grown = task.size > size and task.state is not _DONE

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
            queues.back_off(task)  # until its inputs are restored
        elif self._is_judged(task, failure):
            queues.back_off(task)  # until retry_on has decided
            self._do(commands.JudgeFailure(worker.id, task, failure))
        else:
            self._fail(worker.id, task, failure)

    def _lose_attempt(self, worker: Worker, task: Task, failure: Failure) -> None:
        """Count a lost attempt of a task, which runs again, or fails if that was the last one."""
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
        """Let a task try a larger size of worker, which does not count as a lost attempt."""
        task.retries += 1
        self._counts["out_of_memory"] += 1
        self._queues.grow(task, worker.size)

    def _fail(self, worker: str, task: Task, failure: Failure) -> None:
        self._queues.close(task, "failed")
        self._do(commands.FailTask(worker, task, failure))

    # A task raised an exception that retry_on is asked about.

    def _is_judged(self, task: Task, failure: Failure) -> bool:
        return (
            _may_be_judged(task)
            and failure.kind in _JUDGED
            and task.lost < task.retries
            and not self._queues.killing
        )

    def on_judged(self, event: events.FailureJudged, now: float) -> None:
        task = event.task
        if task.state is not TaskState.BACKING_OFF:
            return
        if event.raised is not None:
            self._state(
                facts.AttemptJudged(event.worker, task, task.lost + 1, event.raised, event.again)
            )
        if not event.again or self._queues.killing:
            self._fail(event.worker, task, event.failure)
            return
        policy = self._config.retry
        # Spread by the task's number, so that tasks that failed together do not all return at once.
        spread = 1.0 + task.number * 7 % 16 / 32
        pause = min(policy.task_backoff * 2.0 ** min(task.lost, 30), policy.longest_backoff)
        task.lost += 1
        self._counts["retried_errors"] += 1
        self._queues.back_off_until(task, now + pause * spread)

    # A worker is lost; ``ends`` decides when.

    def lose_worker(
        self, worker: Worker, end: events.ProcessEnded, now: float, *, unheard: bool = False
    ) -> None:
        """Remove a lost worker, and decide for each of its tasks whether it runs again.

        Args:
            worker: The worker.
            end: How it was lost, be it reported or not.
            now: The time.
            unheard: Whether its last messages may be lost. They may also be because of the way in
                which its connection has ended.
        """
        unheard = unheard or worker.unheard or worker.cut_at is not None
        expected = worker.has_drained
        attempts = worker.attempts()
        sizes = [attempt.task.size for attempt in attempts]
        self._pool.remove(worker)
        if not expected:
            self._counts["workers_lost"] += 1
        if end.reclaimed:
            self._counts["workers_reclaimed"] += 1
        tasks = list(worker.leases.values())
        worker.leases.clear()
        again: list[Task] = []
        for position, task in enumerate(tasks):
            # Slots take tasks in the order in which they were sent. So of the tasks that were sent
            # ahead, the first ones may have begun without a report.
            first = task.state is _RUNNING or position < worker.slots
            if task.state is not _DONE and not self._costs_attempt(
                worker, end, task, aboard=len(tasks), first=first, unheard=unheard
            ):
                again.append(task)
        self._queues.requeue(again)
        for attempt, size in zip(attempts, sizes, strict=True):
            self._conclude(attempt, size)
        is_over = self._queues.killing or (self._queues.shutting_down and not attempts)
        self._state(
            facts.WorkerLost(
                worker.id,
                end.reason,
                attempts,
                end.reclaimed,
                end.out_of_memory,
                expected or is_over,
            )
        )
        if end.relaunched and not self._queues.shutting_down:
            capacity = worker.allocation.capacity
            self._pool.expect(Launch(worker.launch, worker.slots, now, worker.shape, capacity))
        if not expected and not worker.completed and not end.reclaimed:
            # The worker died before it finished any task, which counts like a failed launch.
            self._count_failed_launch(end.reason, now, killed=True)

    def _costs_attempt(
        self,
        worker: Worker,
        end: events.ProcessEnded,
        task: Task,
        *,
        aboard: int,
        first: bool,
        unheard: bool,
    ) -> bool:
        """Decide what the loss of a worker means for one of its tasks.

        The task loses an attempt if it was the only one, so that no other task can be the cause; if
        it may have begun, and must not run twice; and if it may have begun, memory ran out, and
        there is a larger size of worker. In all other cases the task just runs again: apart from
        others if it may have been the cause, and on a larger size if that may help.

        Args:
            worker: The lost worker.
            end: How it was lost.
            task: One of its tasks.
            aboard: Number of its tasks.
            first: Whether the task may have begun, or would have been among the first to begin.
            unheard: Whether the worker's last messages may be lost, too.

        Returns:
            Whether the task has lost an attempt, and was handled. If not, it must run again.
        """
        # A worker that was not ready has begun no task. But it may have died while it loaded what
        # its first tasks need.
        task.suspected += worker.ready or first
        task.worker = None
        task.lease = 0
        # Without retries, a task that may have begun counts as begun. If the connection failed, the
        # message that the worker was ready may be lost.
        begun = (worker.ready and first) or (not task.retries and (worker.ready or unheard))
        if end.reclaimed and task.retries:
            self._counts["reclaimed"] += begun
            return False
        larger = end.out_of_memory and first and self._queues.can_grow(task, worker.size)
        exposed = worker.ready or task.suspected > _SUSPICIONS
        if (exposed and aboard == 1) or (begun and (larger or not task.retries)):
            kind, suspects = FailureKind.WORKER_LOST, 0 if end.reclaimed else aboard
            failure = Failure(kind, end.reason, end.out_of_memory, suspects)
            self._lose_attempt(worker, task, failure)
            return True
        if larger:
            # The worker had no slot ready: loading what its tasks need took too much memory.
            self._queues.grow(task, worker.size)
        elif exposed and (aboard <= max(worker.slots, PARTS) or task.suspected > 1):
            # Most of thousands of tasks had not begun. They become suspects only the second time.
            self._quarantine.suspect(task, aboard, worker.slots)
        return False

    # A launch is lost.

    def on_launch_failed(self, event: events.ProcessEnded, now: float) -> None:
        launch = self._pool.end_launch(event.launch)
        if launch is None:
            return
        if not self._queues.killing:
            outside = event.killed or event.reclaimed
            self._state(facts.LaunchLost(launch.id, event.reason, outside))
        if not event.reclaimed:
            # Those that were asked for before another one failed may all have one cause: together,
            # they are one failure.
            again = launch.started_at < self._failed_at
            self._count_failed_launch(
                event.reason, now, killed=event.killed, fatal=event.fatal, again=again
            )

    def time_out_launches(self, now: float) -> None:
        """Give up launches whose workers have not connected in time."""
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
        """Note that a worker has connected, so that launches work."""
        self._failed_in_a_row = 0

    def note_results(self) -> None:
        """Note that a worker has returned results, so that workers are not just killed."""
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
        """Launch no worker for a while, or fail the tasks that no other worker can run."""
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
        # Tasks that connected workers, or remaining launches, can run are not failed.
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


def _may_be_judged(task: Task) -> bool:
    return task.requirements is not None and task.requirements.judged
