"""The story of a task: what became of each of its attempts, for people and for programs."""

from __future__ import annotations

import signal as signals
import time
from dataclasses import dataclass
from typing import Literal

from cloudexec._config import format_bytes

__all__ = ["StoryEvent", "StoryStep", "TaskStory", "signal_name"]

StoryStep = Literal[
    "submitted",
    "held",
    "released",
    "waiting",
    "sent",
    "began",
    "lost",
    "timed out",
    "killed",
    "reclaimed",
    "returned",
    "raised",
    "judged",
    "climbed",
    "worker cut off",
    "worker back",
    "left out",
    "result",
    "exception",
    "cancelled",
]
"""What can happen to a task; see ``StoryEvent.what``."""

_CLOCK_WIDTH = len("12:00:01.204  +1234.567 s  ")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoryEvent:
    """One thing that happened to a task."""

    what: StoryStep
    """``"submitted"``; ``"held"``, for the results that are among its arguments; ``"released"``,
    they are there; ``"waiting"``, for a worker; ``"sent"`` to one; ``"began"``; ``"lost"``, with
    the process or worker that ran it; ``"timed out"``; ``"killed"``, as it was cancelled;
    ``"reclaimed"`` with its worker, which costs no attempt; ``"returned"`` by its worker unbegun;
    ``"raised"`` what ``retry_on`` is to look at; ``"judged"`` by it; ``"climbed"`` to larger
    workers; ``"worker cut off"`` and ``"worker back"``, of the one that has it; ``"left out"``,
    events of a long story; and one of ``"result"``, ``"exception"``, ``"cancelled"``."""
    seconds: float | None = None
    """Since it was submitted; ``None``: nobody took the time."""
    at: float | None = None
    """The same on the wall clock, in seconds since 1970."""
    worker_id: str | None = None
    """Which worker it was about."""
    job_id: str = ""
    """What the worker's platform calls that."""
    attempt: int | None = None
    """Which attempt it was about, from 1."""
    reason: str = ""
    """Why, in words: the platform's own, where it said."""
    exit_code: int | None = None
    """Of the process that ran the task."""
    signal: int | None = None
    """What killed that process."""
    peak_memory_bytes: int | None = None
    """The most that it had in memory."""
    out_of_memory: bool = False
    """Whether that was more than there was."""
    run_time: float | None = None
    """Seconds that the attempt had run."""
    output: str = ""
    """The last lines that the task printed in this attempt."""

    def __str__(self) -> str:
        return _in_words(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStory:
    """What ``BatchExecutor.explain()`` returns; its ``str()`` is for people."""

    number: int | None
    """Of the task, as in log lines; ``None`` if it was never one: its arguments did not pickle, or
    a journal had the result."""
    name: str = ""
    """What people call it: ``with_options(name=...)``, or its stage in a graph."""
    state: Literal["pending", "running", "finished", "cancelled"]
    events: tuple[StoryEvent, ...]
    """In order. Attempts in which nothing unusual happened and that have been followed by others
    leave only what is known of them afterwards."""

    @property
    def lost(self) -> tuple[StoryEvent, ...]:
        """The events that cost an attempt, or an unfinished run of one."""
        return tuple(e for e in self.events if e.what in ("lost", "timed out", "reclaimed"))

    def __str__(self) -> str:
        head = "a call that was not sent" if self.number is None else f"task {self.number}"
        if self.name:
            head += f" ({self.name})"
        first = next((event.at for event in self.events if event.at is not None), None)
        if first is not None:
            head += time.strftime(", %Y-%m-%d", time.localtime(first))
        lines = [f"{head}: {self.state}"]
        for event in self.events:
            lines.append(f"  {_clock(event)}{_in_words(event)}")
            if event.output:
                indent = " " * (_CLOCK_WIDTH + 2)
                lines.append(f"{indent}its last output:")
                lines += [f"{indent}| {line}" for line in event.output.rstrip().split("\n")]
        return "\n".join(lines)


def _clock(event: StoryEvent) -> str:
    text = ""
    if event.at is not None:
        text = (
            time.strftime("%H:%M:%S", time.localtime(event.at)) + f".{int(event.at % 1 * 1e3):03}"
        )
        if event.seconds:
            text += f"  {f'+{event.seconds:.3f} s':>11}"
    return text.ljust(_CLOCK_WIDTH)


def _in_words(event: StoryEvent) -> str:
    worker = event.worker_id or "a worker"
    job = f" (job {event.job_id})" if event.job_id else ""
    which = f", attempt {event.attempt}" if event.attempt and event.attempt > 1 else ""
    texts: dict[str, str] = {
        "sent": f"sent to {worker}{job}{which}",
        "began": f"began on {worker}",
        "lost": f"lost on {worker}{job}",
        "timed out": f"timed out on {worker}",
        "killed": f"killed on {worker}",
        "reclaimed": f"given up with {worker}{job}, which its platform took back",
        "returned": f"handed back by {worker}",
        "raised": f"raised on {worker}",
        "climbed": "goes to larger workers",
        "worker cut off": f"{worker} was cut off",
        "worker back": f"{worker} is back",
        "left out": "...",
    }
    text = texts.get(event.what, event.what)
    if event.run_time is not None:
        text += f", after {_span(event.run_time)}" if event.what == "result" else ""
        text += f" after {_span(event.run_time)}" if event.what in _ATTEMPT_ENDS else ""
    if event.reason:
        text += f": {event.reason}"
    if event.peak_memory_bytes:
        text += f" (peak memory {format_bytes(event.peak_memory_bytes)})"
    return text


_ATTEMPT_ENDS = ("lost", "timed out", "killed", "raised")


def _span(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def signal_name(number: int) -> str:
    """Return what people call a signal."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


for _class in (StoryEvent, TaskStory):
    _class.__module__ = "cloudexec"
