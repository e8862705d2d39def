"""Notes and logs what happens to tasks and workers beyond the usual, for ``explain()``.

A task that runs as usual has no record of its own. The times when it was submitted and sent are
found by its number and its lease, which count up, in ``marks``; all else is known from its future.
Unusual events are noted on the future, and live as long as that. Everything here happens on the
loop thread, except that ``explain()`` may read in another thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from cloudexec._core import commands, events
from cloudexec._core.events import Failure, FailureKind
from cloudexec._core.tasks import Task, TaskState
from cloudexec._core.workers import Worker, WorkerState
from cloudexec._launchers.base import Launcher
from cloudexec._server.engine import Engine, Moment, Then
from cloudexec._server.launches import Launches
from cloudexec._server.marks import Marks, Notes
from cloudexec._server.outcomes import counted, name_of
from cloudexec._server.sessions import Sessions
from cloudexec._server.telling import Teller
from cloudexec._story import StoryEvent, StoryStep, signal_name

__all__ = ["Story"]

_OUTLOOKS = {TaskState.DONE: "it has failed", TaskState.BACKING_OFF: "retry_on is asked"}


class Story:
    """The notes on the tasks of one executor.

    Args:
        engine: The engine whose events are watched.
        sessions: The sessions of its workers.
        launches: The launches of its workers.
        launcher: Describes the sizes of workers.
    """

    def __init__(
        self, engine: Engine, sessions: Sessions, launches: Launches, launcher: Launcher
    ) -> None:
        self.submitted = Marks()
        self.sent_marks = Marks()
        self.launch_failure = ""
        """The reason of the last launch that failed."""
        self._engine = engine
        self._sessions = sessions
        self._launches = launches
        self._launcher = launcher
        self._resent: set[int] = set()  # numbers of tasks with notes that will be sent again
        self._duplicates = 0
        self.teller = Teller(lambda: engine.executor_id, engine.portal.loop)
        self.watches: dict[type, Callable[[Any], Then | None]] = {
            events.WorkerLost: self._before_lost,
            events.WorkerCut: self._before_cut,
            events.WorkerBack: self._before_back,
            events.WorkerConnected: self._before_connected,
            events.WorkerDraining: self._before_draining,
            events.WorkerHeard: self._before_heard,
            events.DeadlinePassed: self._before_deadline,
            events.FailuresReceived: self._before_failures,
            events.LeasesReturned: self._before_returned,
            events.TasksCancelled: self._before_cancelled,
            events.LaunchFailed: self._before_launch_failed,
        }
        """Functions that are called with an event before the core handles it. A function that they
        return is called afterwards, before any future gets its outcome."""

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
                self._note_sent(task, task.handle, command.worker, task.lost + 1, moment)

    # Events.

    def _before_lost(self, event: events.WorkerLost) -> Then | None:
        worker = self._engine.machine.workers.get(event.worker)
        if worker is None:
            return None
        return self._losing(
            worker, str(event.detail), reclaimed=event.reclaimed, memory=event.out_of_memory
        )

    def _before_deadline(self, event: events.DeadlinePassed) -> Then | None:
        """Prepare the notes on workers that the core will count as lost because of the time."""
        engine = self._engine
        config, now = engine.machine.config, engine.clock
        silent_since, cut_since = now - config.lease_timeout, now - config.reconnect_grace
        doomed: list[Then] = []
        for worker in engine.machine.workers.values():
            if worker.cut_at is not None:
                if worker.cut_at <= cut_since:
                    doomed.append(self._losing(worker, self._cut_for_good()))
            elif worker.heard_at <= silent_since:
                reason = f"it was silent for {config.lease_timeout:g} s"
                doomed.append(self._losing(worker, reason))
        return _all_of(doomed) if doomed else None

    def _cut_for_good(self) -> str:
        grace = self._engine.machine.config.reconnect_grace
        return f"its connection was cut, and it did not come back within {grace:g} s"

    def _losing(
        self, worker: Worker, reason: str, *, reclaimed: bool = False, memory: bool = False
    ) -> Then:
        """Return a function that notes the loss of a worker on the tasks that it has now."""
        before = _look(worker.leases.values())
        expected = worker.state is WorkerState.DRAINING and not worker.leases
        machine, job = self._engine.machine, self.job_of(worker.id)

        def note() -> None:
            known: dict[tuple[str, int, bool], StoryEvent] = {}
            for task, future, lease, lost, size, begun in before:
                what: StoryStep = "lost" if begun or task.lost > lost else "returned"
                why = reason
                if reclaimed and task.lost == lost:
                    what = "reclaimed"
                elif what == "returned":
                    why = f"the worker was lost before it is known to have begun: {reason}"
                apart = machine.runs_apart(task)
                if apart:
                    why += f"; it is one of {len(before)} suspects, which run apart now"
                event = known.get((what, lost, apart))
                if event is None:
                    event = known[what, lost, apart] = StoryEvent(
                        what=what,
                        worker_id=worker.id,
                        job_id=job,
                        attempt=lost + 1,
                        reason=why,
                        out_of_memory=memory,
                    )
                self._note(task, future, lease, event)
                self._note_climb(task, future, size)
            if expected or machine.killing or (machine.shutting_down and not before):
                return
            begun_there = sum(each[5] for each in before)
            how = "was taken back by its platform" if reclaimed else "was lost"
            self.teller.tell(
                logging.INFO if reclaimed else logging.WARNING,
                "worker_reclaimed" if reclaimed else "worker_lost",
                f"{worker.id} {how}: {reason.partition(chr(10))[0]}; it had {len(before)} tasks, "
                f"of which {begun_there} had begun",
                worker=worker.id,
                job=job,
                reason=reason,
                count=len(before),
            )

        return note

    def _before_cut(self, event: events.WorkerCut) -> Then | None:
        worker = self._engine.machine.workers.get(event.worker)
        if worker is None:
            return None
        if not self._engine.machine.config.reconnect_grace:
            return self._losing(worker, "its connection was cut")
        note = StoryEvent(
            what="worker cut off",
            worker_id=worker.id,
            reason="it may go on with the task and come back",
        )
        self._tell_link("worker_cut", worker, "was cut off, and may dial again")
        return self._note_all(worker, note)

    def _before_back(self, event: events.WorkerBack) -> Then | None:
        worker = self._engine.machine.workers.get(event.worker)
        if worker is None or worker.cut_at is None:
            return None
        self._tell_link("worker_back", worker, "is connected again")
        return self._note_all(worker, StoryEvent(what="worker back", worker_id=worker.id))

    def _tell_link(self, event: str, worker: Worker, what: str) -> None:
        count = len(worker.leases)
        self.teller.tell(
            logging.INFO,
            event,
            f"{worker.id} {what}; it has {counted(count, 'task')}",
            worker=worker.id,
            job=self.job_of(worker.id),
            count=count,
        )

    def _note_all(self, worker: Worker, event: StoryEvent) -> Then:
        before = _look(worker.leases.values())

        def note() -> None:
            for task, future, lease, *_ in before:
                self._note(task, future, lease, event)

        return note

    def _before_draining(self, event: events.WorkerDraining) -> Then | None:
        engine = self._engine
        worker = engine.machine.workers.get(event.worker)
        session = self._sessions.get(event.worker)
        if worker is not None and worker.state is WorkerState.ACTIVE and session is not None:
            self.teller.tell(
                logging.INFO,
                "worker_draining",
                f"{worker.id} is wanted back by its platform, and finishes what it can",
                worker=worker.id,
                job=self.job_of(worker.id),
                reason="its platform wants it back",
            )
        return None

    def _before_heard(self, event: events.WorkerHeard) -> Then | None:
        self.tell_duplicates()
        return None

    def tell_duplicates(self) -> None:
        """Log how many outcomes were dropped since the last call, because they came too late."""
        found = self._engine.machine.counts["duplicates"]
        if found > self._duplicates:
            count, self._duplicates = found - self._duplicates, found
            self.teller.tell(
                logging.INFO,
                "duplicate_dropped",
                f"{count} outcomes of attempts that others had been started for were dropped",
                reason="the attempt had been given up",
                count=count,
            )

    def _before_failures(self, event: events.FailuresReceived) -> Then | None:
        worker = self._engine.machine.workers.get(event.worker)
        if worker is None:
            return None
        leases, before = worker.leases, []
        for lease, failure in event.failures:
            task = leases.get(lease)
            # An exception of the task's own is an ordinary outcome, which needs no note.
            if task is not None and (failure.kind in _STEPS or _is_judged(task)):
                before += [(each, failure) for each in _look([task])]
        if not before:
            return None
        name = worker.id

        def note() -> None:
            for (task, future, lease, lost, size, _), failure in before:
                if failure.kind not in _STEPS:
                    self._begin_notes(task, future, lease, name, lost + 1)
                    continue
                self._note_failure(name, task, future, lease, lost, failure)
                self._note_climb(task, future, size)

        return note

    def _note_failure(
        self, worker: str, task: Task, future: Any, lease: int, lost: int, failure: Failure
    ) -> None:
        detail, step = failure.detail, _STEPS[failure.kind]
        code = getattr(detail, "exit_code", 0) if failure.kind is FailureKind.SLOT_LOST else None
        outgrew = failure.kind is FailureKind.OUTGREW
        event = StoryEvent(
            what=step,
            worker_id=worker,
            job_id=self.job_of(worker),
            attempt=lost + 1,
            reason=_why(failure, code),
            exit_code=code if code is not None and code >= 0 else None,
            signal=-code if code is not None and code < 0 else None,
            peak_memory_bytes=getattr(detail, "peak_memory_bytes", 0) or None,
            out_of_memory=failure.out_of_memory or outgrew,
            run_time=getattr(detail, "seconds", None),
            output=getattr(detail, "output", ""),
        )
        self._note(task, future, lease, event)
        if step not in ("lost", "timed out"):
            return
        name = name_of(task)
        outlook = _OUTLOOKS.get(task.state, "it is run again")
        self.teller.tell(
            logging.INFO,
            "attempt_lost" if step == "lost" else "task_timed_out",
            f"task {task.number}{f' ({name})' if name else ''} {step} on {worker}, attempt "
            f"{lost + 1}: {event.reason}; {outlook}",
            worker=worker,
            job=event.job_id,
            task=task.number,
            task_name=name,
            attempt=lost + 1,
            reason=event.reason,
        )

    def raised(self, task: Any, worker: str, what: str, *, again: bool) -> None:
        """Note what ``retry_on`` has decided about a task's exception.

        Args:
            task: The task.
            worker: The worker that ran it.
            what: The exception, in words.
            again: Whether the task is tried again.
        """
        if task.handle is None or task.state is not TaskState.BACKING_OFF:
            return
        raised = StoryEvent(
            what="raised", worker_id=worker, attempt=task.lost + 1, reason=what or "something"
        )
        verdict = "worth another attempt" if again else "not worth another attempt"
        if task.handle._notes is None or task.handle._notes.entries[-1][2].what != "timed out":
            self._note(task, task.handle, 0, raised)
        self._note(task, task.handle, 0, StoryEvent(what="judged", reason=verdict))
        if not again:
            self._resent.discard(task.number)
        else:
            name = name_of(task)
            self.teller.tell(
                logging.INFO,
                "task_retried",
                f"task {task.number}{f' ({name})' if name else ''} is run again: it raised what "
                f"retry_on names: {what}",
                worker=worker,
                task=task.number,
                task_name=name,
                attempt=task.lost + 1,
                reason=what,
            )

    def _before_returned(self, event: events.LeasesReturned) -> Then | None:
        engine = self._engine
        worker = engine.machine.workers.get(event.worker)
        if worker is None:
            return None
        before = _look([worker.leases[each] for each in event.leases if each in worker.leases])
        if not before:
            return None
        session = self._sessions.get(event.worker)
        if session is not None and session.reclaimed:
            reason = "its platform wants the worker back"
        elif worker.state is WorkerState.DRAINING:
            reason = "the worker is to end"
        elif worker.paused_until > engine.clock:
            reason = "tasks that it had were being cancelled"
        else:
            reason = "another worker was free"
        note = StoryEvent(what="returned", worker_id=worker.id, reason=reason)

        def then() -> None:
            for task, future, lease, *_ in before:
                if task.state is not TaskState.DONE:
                    self._note(task, future, lease, note)
            self.teller.tell(
                logging.DEBUG,
                "tasks_returned",
                f"{event.worker} handed back {len(before)} tasks that it had not begun: {reason}",
                worker=event.worker,
                reason=reason,
                count=len(before),
            )

        return then

    def _before_cancelled(self, event: events.TasksCancelled) -> Then | None:
        moment = self._engine.moment
        for task in event.tasks:
            self._resent.discard(task.number)
            future = task.handle
            if future is not None and getattr(future, "_ended", None) is None:
                future._number, future._ended = task.number, moment
        return None

    def _before_connected(self, event: events.WorkerConnected) -> Then | None:
        self.launch_failure = ""  # the next one is told in full
        return None

    def _before_launch_failed(self, event: events.LaunchFailed) -> Then | None:
        machine = self._engine.machine
        if event.launch not in machine.launches or machine.killing:
            return None
        text = f"a worker could not be started (launch {event.launch}): {event.reason}"
        # Behind the first line is what the worker printed, which differs from one to the next.
        if event.reason.partition("\n")[0] == self.launch_failure.partition("\n")[0]:
            text = f"another worker could not be started (launch {event.launch}): as before"
        self.launch_failure = event.reason
        outside = event.killed or event.reclaimed
        self.teller.tell(
            logging.INFO if outside else logging.WARNING,
            "launch_failed",
            text,
            worker=f"worker-{event.launch}",
            reason=event.reason,
        )
        return None

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

    def _note(self, task: Any, future: Any, lease: int, event: StoryEvent) -> None:
        """Note an event on a task's future, which the task itself may not refer to any more."""
        moment = self._engine.moment
        self._begin_notes(task, future, lease, event.worker_id, event.attempt or 1)
        future._notes.add(moment, event)
        if task.state is not TaskState.DONE and event.what not in ("worker cut off", "worker back"):
            self._resent.add(task.number)

    def _begin_notes(
        self, task: Any, future: Any, lease: int, worker: str | None, attempt: int
    ) -> None:
        """Begin the notes of a task, if it has none, with the event that it was sent."""
        if future._notes is None:
            future._notes = Notes(name_of(task))
            if lease and worker is not None:
                self._note_sent(task, future, worker, attempt, self.sent_marks.find(lease))

    def _note_sent(
        self,
        task: Any,
        future: Any,
        worker: str,
        attempt: int,
        when: Sequence[Any] | None,
    ) -> None:
        if future is None:
            return
        event = StoryEvent(
            what="sent", worker_id=worker, job_id=self.job_of(worker), attempt=attempt
        )
        future._notes.add(when or self._engine.moment, event)

    def taken_over(self, task: Any, worker: str) -> None:
        """Note that a worker has a task from an earlier process of this program."""
        event = StoryEvent(
            what="sent",
            worker_id=worker,
            job_id=self.job_of(worker),
            attempt=1,
            reason="by an earlier process, which was killed",
        )
        future = task.handle
        if future._notes is None:
            future._notes = Notes(name_of(task))
        future._notes.add(self._engine.moment, event)

    def _note_climb(self, task: Any, future: Any, size: int) -> None:
        if task.size > size and task.state is not TaskState.DONE:
            machine = self._engine.machine
            name = self._launcher.size_name(machine.request_of(task).size)
            self._note(task, future, 0, StoryEvent(what="climbed", reason=name))

    def job_of(self, worker: str) -> str:
        """Return the platform's id of a worker, such as a job id, or an empty string."""
        return self._launches.job_of(worker)


def _look(tasks: Any) -> list[tuple[Any, Any, int, int, int, bool]]:
    """Return the present state of those tasks that are not done.

    Returns:
        For each task: the task, its future, its lease, its number of lost attempts, its size, and
        whether it is known to have begun.
    """
    return [
        (task, task.handle, task.lease, task.lost, task.size, task.state is TaskState.RUNNING)
        for task in tasks
        if task.state is not TaskState.DONE and task.handle is not None
    ]


def _is_judged(task: Task) -> bool:
    return task.requirements is not None and task.requirements.judged


def _all_of(notes: list[Then]) -> Then:
    def note() -> None:
        for each in notes:
            each()

    return note


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
