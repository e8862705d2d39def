"""Notes and logs the facts that the core states about tasks and workers, for ``explain()``.

A task that runs as usual has no record of its own. The times when it was submitted and sent are
found by its number and its lease, which count up, in ``marks``; all else is known from its future.
Unusual events are noted on the future, and live as long as that. Everything here happens on the
loop thread, except that ``explain()`` may read in another thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cloudexec._core import commands, facts
from cloudexec._core.events import Failure, FailureKind
from cloudexec._core.tasks import TaskState
from cloudexec._launchers.base import Launcher
from cloudexec._server.engine import Engine, Moment
from cloudexec._server.launches import Launches
from cloudexec._server.marks import Marks, Notes
from cloudexec._server.outcomes import counted, name_of
from cloudexec._server.telling import Teller
from cloudexec._story import StoryEvent, StoryStep, signal_name

__all__ = ["Story"]

_OUTLOOKS = {TaskState.DONE: "it has failed", TaskState.BACKING_OFF: "retry_on is asked"}


class Story:
    """The notes on the tasks of one executor.

    Args:
        engine: The engine whose facts are noted.
        launches: The launches of its workers.
        launcher: Describes the sizes of workers.
    """

    def __init__(self, engine: Engine, launches: Launches, launcher: Launcher) -> None:
        self.submitted = Marks()
        self.sent_marks = Marks()
        self.launch_failure = ""
        """The reason of the last launch that failed."""
        self._engine = engine
        self._launches = launches
        self._launcher = launcher
        self._resent: set[int] = set()  # numbers of tasks with notes that will be sent again
        self.teller = Teller(lambda: engine.executor_id, engine.portal.loop)
        self.notes: dict[type, Callable[[Any], None]] = {
            facts.WorkerAdded: self._note_added,
            facts.WorkerCutOff: self._note_cut,
            facts.WorkerReconnected: self._note_back,
            facts.WorkerReclaimed: self._note_reclaimed,
            facts.WorkerLost: self._note_lost,
            facts.LaunchLost: self._note_launch_lost,
            facts.AttemptFailed: self._note_failed,
            facts.AttemptJudged: self._note_judged,
            facts.TasksHandedBack: self._note_returned,
            facts.TasksWithdrawn: self._note_withdrawn,
            facts.OutcomesDropped: self._note_dropped,
        }
        """The function that notes each kind of fact."""

    # Every batch.

    def sent(self, command: commands.SendTasks) -> None:
        """Note that tasks are being sent."""
        moment = self._engine.moment
        self.sent_marks.add(command.tasks[-1].lease, moment)
        resent = self._resent
        if not resent:
            return
        for task in command.tasks:
            if task.number in resent:
                resent.remove(task.number)
                self._note_sent(task, command.worker, task.lost + 1, moment)

    # Facts.

    def _note_lost(self, fact: facts.WorkerLost) -> None:
        """Note the loss of a worker on the tasks that it had."""
        job, count = self.job_of(fact.worker), len(fact.attempts)
        known: dict[tuple[str, int, bool], StoryEvent] = {}
        for attempt in fact.attempts:
            what: StoryStep = "lost" if attempt.has_begun or attempt.counts else "returned"
            reason = fact.reason
            if fact.reclaimed and not attempt.counts:
                what = "reclaimed"
            elif what == "returned":
                reason = f"the worker was lost before it is known to have begun: {reason}"
            if attempt.is_suspect:
                reason += f"; it is one of {count} suspects, which run apart now"
            # Thousands of tasks share one event.
            key = what, attempt.number, attempt.is_suspect
            event = known.get(key)
            if event is None:
                event = known[key] = StoryEvent(
                    what=what,
                    worker_id=fact.worker,
                    job_id=job,
                    attempt=attempt.number,
                    reason=reason,
                    out_of_memory=fact.out_of_memory,
                )
            self._note(attempt, event)
            self._note_growth(attempt)
        if fact.is_expected:
            return
        begun = sum(attempt.has_begun for attempt in fact.attempts)
        how = "was taken back by its platform" if fact.reclaimed else "was lost"
        self.teller.tell(
            logging.INFO if fact.reclaimed else logging.WARNING,
            "worker_reclaimed" if fact.reclaimed else "worker_lost",
            f"{fact.worker} {how}: {fact.reason.partition(chr(10))[0]}; it had {count} tasks, "
            f"of which {begun} had begun",
            worker=fact.worker,
            job=job,
            reason=fact.reason,
            count=count,
        )

    def _note_cut(self, fact: facts.WorkerCutOff) -> None:
        reason = "it may go on with the task and come back"
        event = StoryEvent(what="worker cut off", worker_id=fact.worker, reason=reason)
        self._note_link(fact, event, "worker_cut", "was cut off, and may dial again")

    def _note_back(self, fact: facts.WorkerReconnected) -> None:
        event = StoryEvent(what="worker back", worker_id=fact.worker)
        self._note_link(fact, event, "worker_back", "is connected again")

    def _note_link(
        self,
        fact: facts.WorkerCutOff | facts.WorkerReconnected,
        event: StoryEvent,
        name: str,
        what: str,
    ) -> None:
        for attempt in fact.attempts:
            self._note(attempt, event)
        count = len(fact.attempts)
        self.teller.tell(
            logging.INFO,
            name,
            f"{fact.worker} {what}; it has {counted(count, 'task')}",
            worker=fact.worker,
            job=self.job_of(fact.worker),
            count=count,
        )

    def _note_reclaimed(self, fact: facts.WorkerReclaimed) -> None:
        self.teller.tell(
            logging.INFO,
            "worker_draining",
            f"{fact.worker} is wanted back by its platform, and finishes what it can",
            worker=fact.worker,
            job=self.job_of(fact.worker),
            reason="its platform wants it back",
        )

    def _note_dropped(self, fact: facts.OutcomesDropped) -> None:
        self.teller.tell(
            logging.INFO,
            "duplicate_dropped",
            f"{fact.count} outcomes of attempts that others had been started for were dropped",
            reason="the attempt had been given up",
            count=fact.count,
        )

    def _note_failed(self, fact: facts.AttemptFailed) -> None:
        attempt, failure, worker = fact.attempt, fact.failure, fact.worker
        task, detail, step = attempt.task, failure.detail, _STEPS.get(failure.kind)
        if step is None:
            # ``retry_on`` is asked about the task's exception. Its decision is noted later.
            self._begin_notes(task, attempt.lease, worker, attempt.number)
            return
        code = getattr(detail, "exit_code", 0) if failure.kind is FailureKind.SLOT_LOST else None
        outgrew = failure.kind is FailureKind.OUTGREW
        event = StoryEvent(
            what=step,
            worker_id=worker,
            job_id=self.job_of(worker),
            attempt=attempt.number,
            reason=_why(failure, code),
            exit_code=code if code is not None and code >= 0 else None,
            signal=-code if code is not None and code < 0 else None,
            peak_memory_bytes=getattr(detail, "peak_memory_bytes", 0) or None,
            out_of_memory=failure.out_of_memory or outgrew,
            run_time=getattr(detail, "seconds", None),
            output=getattr(detail, "output", ""),
        )
        self._note(attempt, event)
        if step in ("lost", "timed out"):
            name = name_of(task)
            outlook = _OUTLOOKS.get(task.state, "it is run again")
            self.teller.tell(
                logging.INFO,
                "attempt_lost" if step == "lost" else "task_timed_out",
                f"task {task.number}{f' ({name})' if name else ''} {step} on {worker}, attempt "
                f"{attempt.number}: {event.reason}; {outlook}",
                worker=worker,
                job=event.job_id,
                task=task.number,
                task_name=name,
                attempt=attempt.number,
                reason=event.reason,
            )
        self._note_growth(attempt)

    def _note_judged(self, fact: facts.AttemptJudged) -> None:
        """Note what ``retry_on`` has decided about a task's exception."""
        task, what = fact.task, fact.raised
        if task.handle is None:
            return
        notes = task.handle._notes
        if notes is None or notes.entries[-1][2].what != "timed out":
            self._add(
                task,
                StoryEvent(
                    what="raised",
                    worker_id=fact.worker,
                    attempt=fact.number,
                    reason=what or "something",
                ),
            )
        if not fact.again:
            self._resent.discard(task.number)
        verdict = "worth another attempt" if fact.again else "not worth another attempt"
        self._add(task, StoryEvent(what="judged", reason=verdict))
        if fact.again:
            name = name_of(task)
            self.teller.tell(
                logging.INFO,
                "task_retried",
                f"task {task.number}{f' ({name})' if name else ''} is run again: it raised what "
                f"retry_on names: {what}",
                worker=fact.worker,
                task=task.number,
                task_name=name,
                attempt=fact.number,
                reason=what,
            )

    def _note_returned(self, fact: facts.TasksHandedBack) -> None:
        event = StoryEvent(what="returned", worker_id=fact.worker, reason=fact.reason)
        for attempt in fact.attempts:
            if attempt.task.state is not TaskState.DONE:
                self._note(attempt, event)
        count = len(fact.attempts)
        self.teller.tell(
            logging.DEBUG,
            "tasks_returned",
            f"{fact.worker} handed back {count} tasks that it had not begun: {fact.reason}",
            worker=fact.worker,
            reason=fact.reason,
            count=count,
        )

    def _note_withdrawn(self, fact: facts.TasksWithdrawn) -> None:
        moment = self._engine.moment
        for task in fact.tasks:
            self._resent.discard(task.number)
            future = task.handle
            if future is not None and getattr(future, "_ended", None) is None:
                future._number, future._ended = task.number, moment

    def _note_added(self, fact: facts.WorkerAdded) -> None:
        self.launch_failure = ""  # the next one is told in full

    def _note_launch_lost(self, fact: facts.LaunchLost) -> None:
        text = f"a worker could not be started (launch {fact.launch}): {fact.reason}"
        # Behind the first line is what the worker printed, which differs from one to the next.
        if fact.reason.partition("\n")[0] == self.launch_failure.partition("\n")[0]:
            text = f"another worker could not be started (launch {fact.launch}): as before"
        self.launch_failure = fact.reason
        self.teller.tell(
            logging.INFO if fact.from_outside else logging.WARNING,
            "launch_failed",
            text,
            worker=f"worker-{fact.launch}",
            reason=fact.reason,
        )

    # The present state.

    @property
    def moment(self) -> Moment:
        """The time of the event that is being handled."""
        return self._engine.moment

    def why_waiting(self) -> str:
        """Return, in words, what queued tasks wait for."""
        machine = self._engine.machine
        if machine.launches:
            why = self._launcher.explain() or self.launch_failure
            text = f"for {self._launches.in_words()} on the way"
            return f"{text}: {why}" if why else text
        if not machine.workers:
            return f"for a worker: {self.launch_failure}" if self.launch_failure else ""
        return "for a free slot"

    # Notes.

    def _note(self, attempt: facts.Attempt, event: StoryEvent) -> None:
        """Note an event on the future of an attempt's task."""
        task = attempt.task
        if task.handle is not None:
            self._begin_notes(task, attempt.lease, event.worker_id, event.attempt or 1)
            self._add(task, event)

    def _begin_notes(self, task: Any, lease: int, worker: str | None, attempt: int) -> None:
        """Begin the notes of a task, if it has none, with the event that it was sent."""
        future = task.handle
        if future is not None and future._notes is None:
            future._notes = Notes(name_of(task))
            if worker is not None:
                self._note_sent(task, worker, attempt, self.sent_marks.find(lease))

    def _add(self, task: Any, event: StoryEvent) -> None:
        """Add an event to the notes of a task; if it may be sent again, that is noted, too."""
        future = task.handle
        if future._notes is None:
            future._notes = Notes(name_of(task))
        future._notes.add(self._engine.moment, event)
        if task.state is not TaskState.DONE and event.what not in ("worker cut off", "worker back"):
            self._resent.add(task.number)

    def _note_sent(
        self,
        task: Any,
        worker: str,
        attempt: int,
        when: Sequence[Any] | None,
    ) -> None:
        if task.handle is None:
            return
        task.handle._notes.add(when or self._engine.moment, self.event_sent(worker, attempt))

    def taken_over(self, task: Any, worker: str) -> None:
        """Note that a worker has a task from an earlier process of this program."""
        event = replace(
            self.event_sent(worker, 1), reason="by an earlier process, which was killed"
        )
        future = task.handle
        if future._notes is None:
            future._notes = Notes(name_of(task))
        future._notes.add(self._engine.moment, event)

    def _note_growth(self, attempt: facts.Attempt) -> None:
        task = attempt.task
        if attempt.has_grown and task.handle is not None:
            size = self._engine.machine.request_of(task).size
            self._add(task, StoryEvent(what="climbed", reason=self._launcher.size_name(size)))

    def event_sent(self, worker: str, attempt: int | None) -> StoryEvent:
        """Return the event that a task was sent to a worker."""
        times = self._launches.times_of(worker)
        return StoryEvent(
            what="sent",
            worker_id=worker,
            job_id=times.job_id,
            launcher=times.launcher,
            attempt=attempt,
            reason=f"instead of {times.instead_of}" if times.instead_of else "",
        )

    def job_of(self, worker: str) -> str:
        """Return the platform's id of a worker, such as a job id, or an empty string."""
        return self._launches.times_of(worker).job_id


_STEPS: dict[FailureKind, StoryStep] = {
    FailureKind.SLOT_LOST: "lost",
    FailureKind.OUTGREW: "lost",
    FailureKind.TIMED_OUT: "timed out",
    FailureKind.KILLED: "killed",
    FailureKind.RECLAIMED: "reclaimed",
    FailureKind.INPUT_LOST: "returned",
}


def _why(failure: Failure, code: int | None) -> str:
    if code is not None:
        reason = f"its process was killed by {signal_name(-code)}"
        if code >= 0:
            reason = f"its process exited with code {code}"
        return reason + ", out of memory" if failure.detail.out_of_memory else reason
    return {
        FailureKind.OUTGREW: "it took more memory than it had asked for, and was killed",
        FailureKind.TIMED_OUT: "it ran past its timeout, and was killed",
        FailureKind.KILLED: "it was cancelled",
        FailureKind.RECLAIMED: "the time that the platform gave was over",
        FailureKind.INPUT_LOST: "what it takes could not be had there",
    }.get(failure.kind, "")
