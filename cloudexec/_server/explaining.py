"""``explain()``: reports what happened to a task, from its notes and from its present state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cloudexec._core.tasks import TaskState
from cloudexec._describing import describe
from cloudexec._future import BatchFuture
from cloudexec._server.engine import Moment
from cloudexec._server.marks import MOST_NOTES, Notes
from cloudexec._server.outcomes import decode_result, name_of
from cloudexec._server.story import Story
from cloudexec._story import StoryEvent, TaskStory

if TYPE_CHECKING:
    from cloudexec._server.driver import Driver

__all__ = ["explain"]

_FINAL = ("lost", "timed out", "killed", "reclaimed", "raised", "judged")
"""Steps that end an attempt: after one of them, the notes say all about the last attempt."""
_NAMES_OF_STATES = {"PENDING": "pending", "RUNNING": "running", "FINISHED": "finished"}


def _story_of(story: Story, future: BatchFuture[Any]) -> TaskStory:
    """Return the story of a task, without the text of its exception, which ``explain()`` adds.

    Runs on the loop thread, or in any thread once the future is done.
    """
    task, ended = future._task, getattr(future, "_ended", None)
    number = task.number if task is not None else getattr(future, "_number", None)
    notes: Notes | None = future._notes
    state = future._state
    entries: list[tuple[float | None, float | None, StoryEvent]] = []
    begin = None if number is None else story.submitted.find(number)

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
            if notes.left_out and index == len(noted) - MOST_NOTES // 2:
                left_out = StoryEvent(what="left out", reason=f"{notes.left_out} events")
                add(None, left_out)
            if _has_begun(event):
                began: tuple[float, float] | None = None
                if event.run_time:
                    # Not earlier than the preceding event: for a process that died, the run time
                    # counts from the last sign of that process.
                    before = entries[-1][0] if entries else None
                    back = min(event.run_time, at - before if before else event.run_time)
                    began = (at - back, wall - back)
                add(began, StoryEvent(what="began", worker_id=event.worker_id))
            add((at, wall), event)
    last = entries[-1][2].what if entries else ""
    if ended is None and task is None:
        recorded = StoryEvent(what="result", reason="it was in the journal, from an earlier run")
        add(None, recorded if _has_result(future) else StoryEvent(what="exception"))
    elif ended is None:
        _add_present(story, task, last, add)
    else:
        _add_end(story, future, last, ended, add)
    start = begin[0] if begin is not None else None
    return TaskStory(
        number=number,
        name=notes.name if notes is not None else _name(future, task),
        state=_NAMES_OF_STATES.get(state, "cancelled"),  # type: ignore[arg-type]
        events=tuple([_timed(event, at, wall, start) for at, wall, event in entries]),
    )


def _name(future: BatchFuture[Any], task: Any) -> str:
    return future._label if task is None or task.handle is None else name_of(task)


def _add_present(story: Story, task: Any, last: str, add: Callable[..., None]) -> None:
    """Add the present state of a task that is not done."""
    if task.needs is not None:
        return
    moment = story.moment
    if task.state is TaskState.WAITING:
        add(moment, StoryEvent(what="waiting", reason=story.why_waiting()))
    elif task.state is TaskState.BACKING_OFF:
        resting = "until it is time for the next attempt, or what it takes is there again"
        add(moment, StoryEvent(what="waiting", reason=resting))
    elif task.worker is not None:
        if last not in ("sent", "worker cut off", "worker back"):
            event = story.event_sent(task.worker, task.lost + 1)
            add(story.sent_marks.find(task.lease), event)
        if task.state is TaskState.RUNNING:
            add(None, StoryEvent(what="began", worker_id=task.worker))


def _add_end(
    story: Story, future: BatchFuture[Any], last: str, ended: Moment, add: Callable[..., None]
) -> None:
    """Add the outcome of a task, and before it the last attempt if the notes do not have it."""
    worker, seconds = future._worker_id, future._run_time
    if worker is not None and last not in _FINAL:
        if last not in ("sent", "worker cut off", "worker back"):
            add(None, story.event_sent(worker, future._attempts or None))
        if seconds is not None:
            # If the worker was cut off, the result arrived late, and does not tell the task's
            # begin.
            late = last in ("worker cut off", "worker back")
            since = None if late else (ended[0] - seconds, ended[1] - seconds)
            add(since, StoryEvent(what="began", worker_id=worker))
    if future._state == "FINISHED":
        result = StoryEvent(what="result", worker_id=worker, run_time=seconds)
        add(ended, result if _has_result(future) else StoryEvent(what="exception"))
    else:
        add(ended, StoryEvent(what="cancelled"))


def _has_result(future: BatchFuture[Any]) -> bool:
    decode = future._decode
    return decode is decode_result if decode is not None else future._exception is None


def _has_begun(event: StoryEvent) -> bool:
    """Say whether an attempt that ended with this event is known to have begun."""
    if event.what == "lost":
        return event.exit_code is not None or event.signal is not None or event.out_of_memory
    return event.what in ("timed out", "killed")


def _timed(
    event: StoryEvent, at: float | None, wall: float | None, start: float | None
) -> StoryEvent:
    seconds = None if at is None or start is None else max(0.0, at - start)
    return replace(event, seconds=seconds, at=wall)


def explain(driver: Driver | None, future: object) -> TaskStory:
    """Return the story of a future. Any thread may call this at any time.

    Raises:
        TypeError: If ``future`` is no ``BatchFuture``.
        ValueError: If it belongs to another executor.
    """
    if not isinstance(future, BatchFuture):
        raise TypeError(f"explain() takes a future of this executor, not {future!r}")
    ended = getattr(future, "_ended", None)
    if ended is None:
        owner = future._owner
        ours = owner is driver
        if owner is None and future.done() and driver is not None:
            # It is being cancelled, or the journal had its result, so that no task was made.
            ours = future._task is not None or driver.journal is not None
    else:
        ours = driver is not None and ended[2] == driver.engine.executor_id
    if driver is None or not ours:
        raise ValueError("explain() takes a future of this executor, and this is another one's")
    notes = driver.story
    story = None
    portal = driver.portal
    # In a forked child the loop's thread does not exist, and nothing changes any more.
    moving = not driver.finished.is_set() and portal.thread.is_alive()
    if ended is None and moving and not portal.is_this_thread:

        async def look() -> TaskStory:
            return _story_of(notes, future)

        work = look()
        try:
            story = portal.run(work).result()
        except (CancelledError, RuntimeError):
            work.close()  # the loop has just ended, and nothing changes any more
    if story is None:
        story = _story_of(notes, future)
    if story.events and story.events[-1].what == "exception":
        # The exception is unpickled in this thread, because that runs code of the user's.
        reason = _exception_in_words(future)
        story = replace(
            story, events=(*story.events[:-1], replace(story.events[-1], reason=reason))
        )
    return story


def _exception_in_words(future: BatchFuture[Any]) -> str:
    error = future.exception(0)
    return "" if error is None else describe(error).partition("\n")[0]
