"""What became of tasks and workers beyond the usual: kept for ``explain()``, and logged.

A task with which nothing unusual happens leaves no record of its own. When it was submitted and
sent is found by its numbers, which count up, among the times of the batches that it was in; the
rest its future knows. What is unusual is noted on the future, so that it lives as long as somebody
may ask. Everything here happens on the loop thread, but for ``explain()``, which reads.
"""

from __future__ import annotations

import bisect
import logging
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from cloudexec._core import commands, events
from cloudexec._core.events import Failure, FailureKind
from cloudexec._core.tasks import Task, TaskState
from cloudexec._core.workers import Worker, WorkerState
from cloudexec._describing import describe
from cloudexec._future import BatchFuture
from cloudexec._server.outcomes import decode_result, name_of
from cloudexec._server.telling import Teller
from cloudexec._story import StoryEvent, StoryStep, TaskStory, signal_name

if TYPE_CHECKING:
    from cloudexec._server.driver import Driver

__all__ = ["Chronicle", "Marks", "Moment", "explain"]

Moment: TypeAlias = tuple[float, float, str]
"""Seconds on the monotonic clock, seconds since 1970, and whose: the executor's id."""
_Then: TypeAlias = Callable[[], None]

_MOST_MARKS = 1 << 15
"""Times of batches that are kept; beyond, every other one is forgotten, and so on."""
_MOST_NOTES = 64
"""Unusual events that are kept of one task: the first ones, and the last."""
_FINAL = ("lost", "timed out", "killed", "reclaimed", "raised", "judged")
"""After these, the last attempt has been told of."""
_OUTLOOKS = {TaskState.DONE: "it has failed", TaskState.BACKING_OFF: "retry_on is asked"}
_NAMES_OF_STATES = {"PENDING": "pending", "RUNNING": "running", "FINISHED": "finished"}


class Marks:
    """When numbers that count up were given out, batch by batch, in bounded memory.

    One thread adds; others may look.
    """

    def __init__(self) -> None:
        self._columns = array("q"), array("d"), array("d")
        self._batches = 0
        self._stride = 1  # batches to a mark

    def add(self, last: int, moment: Moment) -> None:
        """Note that all numbers up to ``last`` which had no mark yet were given out now."""
        numbers, times, walls = self._columns
        if numbers and last <= numbers[-1]:
            return
        self._batches += 1
        if self._batches % self._stride:
            # The later of two neighbours stands for both: nothing is said to have been too early.
            times[-1], walls[-1], numbers[-1] = moment[0], moment[1], last
            return
        times.append(moment[0])
        walls.append(moment[1])
        numbers.append(last)  # last: whoever looks meanwhile goes by this one
        if len(numbers) >= _MOST_MARKS:
            self._columns = numbers[1::2], times[1::2], walls[1::2]
            self._stride *= 2

    def find(self, number: int) -> tuple[float, float] | None:
        """Say when a number was given out, on both clocks; ``None``: it was not yet."""
        numbers, times, walls = self._columns
        at = bisect.bisect_left(numbers, number)
        return (times[at], walls[at]) if at < len(numbers) else None


class _Notes:
    """The unusual events of one task, in order.

    Attributes:
        name: What people call the task.
        entries: When, and what; events that many tasks share are one object.
        left_out: Events in the middle that were forgotten.
    """

    __slots__ = ("entries", "left_out", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: list[tuple[float, float, StoryEvent]] = []
        self.left_out = 0

    def add(self, when: Sequence[Any], event: StoryEvent) -> None:
        self.entries.append((when[0], when[1], event))
        if len(self.entries) > _MOST_NOTES:
            del self.entries[_MOST_NOTES // 2]
            self.left_out += 1


class Chronicle:
    """What is noted for one driver.

    Args:
        driver: Whose.
    """

    def __init__(self, driver: Driver) -> None:
        self.submitted = Marks()
        self._sent = Marks()
        self._driver = driver
        self._resent: set[int] = set()  # numbers of tasks with notes that are to be sent again
        self._launch_failure = ""
        self._duplicates = 0
        self.teller = Teller(driver.executor_id, driver.portal.loop)
        self.watches: dict[type, Callable[[Any], _Then | None]] = {
            events.WorkerLost: self._before_lost,
            events.WorkerCut: self._before_cut,
            events.WorkerBack: self._before_back,
            events.WorkerDraining: self._before_draining,
            events.WorkerHeard: self._before_heard,
            events.DeadlinePassed: self._before_deadline,
            events.FailuresReceived: self._before_failures,
            events.LeasesReturned: self._before_returned,
            events.TasksCancelled: self._before_cancelled,
            events.LaunchFailed: self._before_launch_failed,
        }
        """Called with an event before the machine handles it; what they return, after that, and
        before anybody learns of the outcome."""

    # Every batch.

    def sent(self, command: commands.SendTasks) -> None:
        """Tasks are being sent."""
        moment = self._driver.moment
        self._sent.add(command.tasks[-1].lease, moment)
        resent = self._resent
        if not resent:
            return
        for task in command.tasks:
            if task.number in resent:
                resent.remove(task.number)
                self._note_sent(task, task.handle, command.worker, task.lost + 1, moment)

    # Events.

    def _before_lost(self, event: events.WorkerLost) -> _Then | None:
        worker = self._driver.machine.workers.get(event.worker)
        if worker is None:
            return None
        return self._losing(
            worker, str(event.detail), reclaimed=event.reclaimed, memory=event.out_of_memory
        )

    def _before_deadline(self, event: events.DeadlinePassed) -> _Then | None:
        """Workers of which nothing was heard are lost by the clock."""
        driver = self._driver
        config, now = driver.machine.config, driver.clock
        silent_since, cut_since = now - config.lease_timeout, now - config.reconnect_grace
        doomed: list[_Then] = []
        for worker in driver.machine.workers.values():
            if worker.cut_at is not None:
                if worker.cut_at <= cut_since:
                    doomed.append(self._losing(worker, self._cut_for_good()))
            elif worker.heard_at <= silent_since:
                reason = f"it was silent for {config.lease_timeout:g} s"
                doomed.append(self._losing(worker, reason))
        return _all_of(doomed) if doomed else None

    def _cut_for_good(self) -> str:
        grace = self._driver.machine.config.reconnect_grace
        return f"its connection was cut, and it did not come back within {grace:g} s"

    def _losing(
        self, worker: Worker, reason: str, *, reclaimed: bool = False, memory: bool = False
    ) -> _Then:
        """Look at what a worker has that is about to be lost; return what notes its loss."""
        before = _look(worker.leases.values())
        expected = worker.state is WorkerState.DRAINING and not worker.leases
        machine, job = self._driver.machine, self._job_of(worker.id)

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

    def _before_cut(self, event: events.WorkerCut) -> _Then | None:
        worker = self._driver.machine.workers.get(event.worker)
        if worker is None:
            return None
        if not self._driver.machine.config.reconnect_grace:
            return self._losing(worker, "its connection was cut")
        note = StoryEvent(
            what="worker cut off",
            worker_id=worker.id,
            reason="it may go on with the task and come back",
        )
        self._tell_link("worker_cut", worker, "was cut off, and may dial again")
        return self._note_all(worker, note)

    def _before_back(self, event: events.WorkerBack) -> _Then | None:
        worker = self._driver.machine.workers.get(event.worker)
        if worker is None or worker.cut_at is None:
            return None
        self._tell_link("worker_back", worker, "is connected again")
        return self._note_all(worker, StoryEvent(what="worker back", worker_id=worker.id))

    def _tell_link(self, event: str, worker: Worker, what: str) -> None:
        count = len(worker.leases)
        self.teller.tell(
            logging.INFO,
            event,
            f"{worker.id} {what}; it has {count} tasks",
            worker=worker.id,
            job=self._job_of(worker.id),
            count=count,
        )

    def _note_all(self, worker: Worker, event: StoryEvent) -> _Then:
        before = _look(worker.leases.values())

        def note() -> None:
            for task, future, lease, *_ in before:
                self._note(task, future, lease, event)

        return note

    def _before_draining(self, event: events.WorkerDraining) -> _Then | None:
        driver = self._driver
        worker = driver.machine.workers.get(event.worker)
        session = driver.sessions.get(event.worker)
        if worker is not None and worker.state is WorkerState.ACTIVE and session is not None:
            self.teller.tell(
                logging.INFO,
                "worker_draining",
                f"{worker.id} is wanted back by its platform, and finishes what it can",
                worker=worker.id,
                job=self._job_of(worker.id),
                reason="its platform wants it back",
            )
        return None

    def _before_heard(self, event: events.WorkerHeard) -> _Then | None:
        self.tell_duplicates()
        return None

    def tell_duplicates(self) -> None:
        """Log how many results came too late since the last look."""
        found = self._driver.machine.counts["duplicates"]
        if found > self._duplicates:
            count, self._duplicates = found - self._duplicates, found
            self.teller.tell(
                logging.INFO,
                "duplicate_dropped",
                f"{count} outcomes of attempts that others had been started for were dropped",
                reason="the attempt had been given up",
                count=count,
            )

    def _before_failures(self, event: events.FailuresReceived) -> _Then | None:
        worker = self._driver.machine.workers.get(event.worker)
        if worker is None:
            return None
        leases, before = worker.leases, []
        for lease, failure in event.failures:
            task = leases.get(lease)
            # What a task raises is its outcome, and nothing unusual.
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
            job_id=self._job_of(worker),
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
        """``retry_on`` has looked at what a task raised.

        Args:
            task: Which.
            worker: Who ran it.
            what: It raised, in words.
            again: What it said.
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

    def _before_returned(self, event: events.LeasesReturned) -> _Then | None:
        driver = self._driver
        worker = driver.machine.workers.get(event.worker)
        if worker is None:
            return None
        before = _look([worker.leases[each] for each in event.leases if each in worker.leases])
        if not before:
            return None
        session = driver.sessions.get(event.worker)
        if session is not None and session.reclaimed:
            reason = "its platform wants the worker back"
        elif worker.state is WorkerState.DRAINING:
            reason = "the worker is to end"
        elif worker.paused_until > driver.clock:
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

    def _before_cancelled(self, event: events.TasksCancelled) -> _Then | None:
        moment = self._driver.moment
        for task in event.tasks:
            self._resent.discard(task.number)
            future = task.handle
            if future is not None and getattr(future, "_ended", None) is None:
                future._number, future._ended = task.number, moment
        return None

    def _before_launch_failed(self, event: events.LaunchFailed) -> _Then | None:
        machine = self._driver.machine
        if event.launch not in machine.launches or machine.killing:
            return None
        self._launch_failure = event.reason
        outside = event.killed or event.reclaimed
        self.teller.tell(
            logging.INFO if outside else logging.WARNING,
            "launch_failed",
            f"a worker could not be started (launch {event.launch}): {event.reason}",
            worker=f"worker-{event.launch}",
            reason=event.reason,
        )
        return None

    # Notes.

    def _note(self, task: Any, future: Any, lease: int, event: StoryEvent) -> None:
        """Note what happened to a task; ``future``: its, which it may have let go of by now."""
        moment = self._driver.moment
        self._begin_notes(task, future, lease, event.worker_id, event.attempt or 1)
        future._notes.add(moment, event)
        if task.state is not TaskState.DONE and event.what not in ("worker cut off", "worker back"):
            self._resent.add(task.number)

    def _begin_notes(
        self, task: Any, future: Any, lease: int, worker: str | None, attempt: int
    ) -> None:
        """Have notes of a task; the first of them, that it was sent under this lease."""
        if future._notes is None:
            future._notes = _Notes(name_of(task))
            if lease and worker is not None:
                self._note_sent(task, future, worker, attempt, self._sent.find(lease))

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
            what="sent", worker_id=worker, job_id=self._job_of(worker), attempt=attempt
        )
        future._notes.add(when or self._driver.moment, event)

    def taken_over(self, task: Any, worker: str) -> None:
        """A task is with a worker that has had it from an earlier process."""
        event = StoryEvent(
            what="sent",
            worker_id=worker,
            job_id=self._job_of(worker),
            attempt=1,
            reason="by an earlier process, which was killed",
        )
        future = task.handle
        if future._notes is None:
            future._notes = _Notes(name_of(task))
        future._notes.add(self._driver.moment, event)

    def _note_climb(self, task: Any, future: Any, size: int) -> None:
        if task.size > size and task.state is not TaskState.DONE:
            machine, driver = self._driver.machine, self._driver
            name = driver.size_name(machine.request_of(task).size)
            self._note(task, future, 0, StoryEvent(what="climbed", reason=name))

    def _job_of(self, worker: str) -> str:
        return self._driver.launches.job_of(worker)

    # Stories.

    def story_of(self, future: BatchFuture[Any]) -> TaskStory:
        """Tell what became of a task; an exception is told of only later, by ``explain()``.

        On the loop thread, or once the future has ended.
        """
        task, ended = future._task, getattr(future, "_ended", None)
        number = task.number if task is not None else getattr(future, "_number", None)
        notes: _Notes | None = future._notes
        state = future._state
        entries: list[tuple[float | None, float | None, StoryEvent]] = []
        begin = None if number is None else self.submitted.find(number)

        def add(when: Sequence[Any] | None, event: StoryEvent) -> None:
            entries.append((None, None, event) if when is None else (when[0], when[1], event))

        if number is not None:
            add(begin, StoryEvent(what="submitted"))
        needs = None if task is None else task.needs
        released = getattr(future, "_released", None)
        if needs is not None and ended is None:
            missing, known = needs.missing, len(needs.inputs)
            add(begin, StoryEvent(what="held", reason=f"{missing} of {known} results are missing"))
        elif released is not None:
            add(begin, StoryEvent(what="held", reason="for results that are among its arguments"))
            add(released, StoryEvent(what="released", reason="they are there"))
        if notes is not None:
            noted = list(notes.entries)
            for index, (at, wall, event) in enumerate(noted):
                if notes.left_out and index == len(noted) - _MOST_NOTES // 2:
                    left_out = StoryEvent(what="left out", reason=f"{notes.left_out} events")
                    add(None, left_out)
                if _has_begun(event):
                    began: tuple[float, float] | None = None
                    if event.run_time:
                        # Not before what was last told: a process is timed from its last sign.
                        before = entries[-1][0] if entries else None
                        back = min(event.run_time, at - before if before else event.run_time)
                        began = (at - back, wall - back)
                    add(began, StoryEvent(what="began", worker_id=event.worker_id))
                add((at, wall), event)
        last = entries[-1][2].what if entries else ""
        if ended is None and task is None:
            recorded = StoryEvent(
                what="result", reason="it was in the journal, from an earlier run"
            )
            add(None, recorded if _has_result(future) else StoryEvent(what="exception"))
        elif ended is None:
            self._add_present(task, last, add)
        else:
            self._add_end(future, last, ended, add)
        start = begin[0] if begin is not None else None
        return TaskStory(
            number=number,
            name=notes.name if notes is not None else self._name(future, task),
            state=_NAMES_OF_STATES.get(state, "cancelled"),  # type: ignore[arg-type]
            events=tuple([_timed(event, at, wall, start) for at, wall, event in entries]),
        )

    def _name(self, future: BatchFuture[Any], task: Any) -> str:
        return future._label if task is None or task.handle is None else name_of(task)

    def _add_present(self, task: Any, last: str, add: Callable[..., None]) -> None:
        """Add where a task that has no outcome is now."""
        if task.needs is not None:
            return
        driver = self._driver
        if task.state is TaskState.WAITING:
            add(driver.moment, StoryEvent(what="waiting", reason=self._why_waiting()))
        elif task.state is TaskState.BACKING_OFF:
            resting = "until it is time for the next attempt, or what it takes is there again"
            add(driver.moment, StoryEvent(what="waiting", reason=resting))
        elif task.worker is not None:
            if last not in ("sent", "worker cut off", "worker back"):
                job, attempt = self._job_of(task.worker), task.lost + 1
                event = StoryEvent(what="sent", worker_id=task.worker, job_id=job, attempt=attempt)
                add(self._sent.find(task.lease), event)
            if task.state is TaskState.RUNNING:
                add(None, StoryEvent(what="began", worker_id=task.worker))

    def _add_end(
        self, future: BatchFuture[Any], last: str, ended: Moment, add: Callable[..., None]
    ) -> None:
        """Add the last attempt, as far as it has not been told of, and the outcome."""
        worker, seconds = future._worker_id, future._run_time
        if worker is not None and last not in _FINAL:
            if last not in ("sent", "worker cut off", "worker back"):
                add(
                    None,
                    StoryEvent(
                        what="sent",
                        worker_id=worker,
                        job_id=self._job_of(worker),
                        attempt=future._attempts or None,
                    ),
                )
            if seconds is not None:
                # A result that waited for its worker to come back tells nothing of when it began.
                late = last in ("worker cut off", "worker back")
                since = None if late else (ended[0] - seconds, ended[1] - seconds)
                add(since, StoryEvent(what="began", worker_id=worker))
        if future._state == "FINISHED":
            result = StoryEvent(what="result", worker_id=worker, run_time=seconds)
            add(ended, result if _has_result(future) else StoryEvent(what="exception"))
        else:
            add(ended, StoryEvent(what="cancelled"))

    def _why_waiting(self) -> str:
        driver = self._driver
        machine = driver.machine
        if machine.launches:
            why = driver._launcher.explain() or self._launch_failure
            text = f"for {driver.launches.in_words()} on the way"
            return f"{text}: {why}" if why else text
        if not machine.workers:
            return f"for a worker: {self._launch_failure}" if self._launch_failure else ""
        return "for a free slot"


def _look(tasks: Any) -> list[tuple[Any, Any, int, int, int, bool]]:
    """Return what is known of tasks that have no outcome.

    Task, future, lease, attempts lost, size, and whether it is known to have begun.
    """
    return [
        (task, task.handle, task.lease, task.lost, task.size, task.state is TaskState.RUNNING)
        for task in tasks
        if task.state is not TaskState.DONE and task.handle is not None
    ]


def _is_judged(task: Task) -> bool:
    return task.requirements is not None and task.requirements.judged


def _all_of(notes: list[_Then]) -> _Then:
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


def _has_result(future: BatchFuture[Any]) -> bool:
    decode = future._decode
    return decode is decode_result if decode is not None else future._exception is None


def _has_begun(event: StoryEvent) -> bool:
    """Whether an attempt that ended so is known to have begun: its process died, for instance."""
    if event.what == "lost":
        return event.exit_code is not None or event.signal is not None or event.out_of_memory
    return event.what in ("timed out", "killed")


def _timed(
    event: StoryEvent, at: float | None, wall: float | None, start: float | None
) -> StoryEvent:
    seconds = None if at is None or start is None else max(0.0, at - start)
    return replace(event, seconds=seconds, at=wall)


def explain(driver: Driver | None, future: object) -> TaskStory:
    """Tell the story of a future; in any thread, at any time.

    Raises:
        TypeError: If it is not a ``BatchFuture``.
        ValueError: If it belongs to another executor.
    """
    if not isinstance(future, BatchFuture):
        raise TypeError(f"explain() takes a future of this executor, not {future!r}")
    ended = getattr(future, "_ended", None)
    if ended is None:
        owner = future._owner
        ours = owner is driver
        if owner is None and future.done() and driver is not None:
            # It is being cancelled; or no task was made of it, and its journal had the result.
            ours = future._task is not None or driver.journal is not None
    else:
        ours = driver is not None and ended[2] == driver.executor_id
    if driver is None or not ours:
        raise ValueError("explain() takes a future of this executor, and this is another one's")
    chronicle = driver.chronicle
    story = None
    portal = driver.portal
    # Its thread is not there in a forked child, where nothing goes on anyway.
    moving = not driver.finished.is_set() and portal.thread.is_alive()
    if ended is None and moving and not portal.is_this_thread:

        async def look() -> TaskStory:
            return chronicle.story_of(future)

        work = look()
        try:
            story = portal.run(work).result()
        except (CancelledError, RuntimeError):
            work.close()  # the loop has just ended, and nothing changes any more
    if story is None:
        story = chronicle.story_of(future)
    if story.events and story.events[-1].what == "exception":
        # Unpickled here, not on the loop thread: that runs code of the user's.
        reason = _exception_in_words(future)
        story = replace(
            story, events=(*story.events[:-1], replace(story.events[-1], reason=reason))
        )
    return story


def _exception_in_words(future: BatchFuture[Any]) -> str:
    error = future.exception(0)
    return "" if error is None else describe(error).partition("\n")[0]
