"""The story of a task: the events of each of its attempts, as records and as text.

``_server.story`` records the events while the task runs. This module has the records that
``BatchExecutor.explain()`` returns, and writes their text.
"""

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
    """The kind of event:

    - ``"submitted"``: the call was submitted.
    - ``"held"``: the task waits for the results of other calls, which are among its arguments.
    - ``"released"``: these results have arrived.
    - ``"waiting"``: the task waits for a worker.
    - ``"sent"``: the task was sent to a worker.
    - ``"began"``: the worker began to run the task.
    - ``"lost"``: the process or worker that ran the task died.
    - ``"timed out"``: the task ran longer than its ``timeout``.
    - ``"killed"``: the task was cancelled while it ran.
    - ``"reclaimed"``: the platform took the worker back, which costs the task no attempt.
    - ``"returned"``: the worker handed the task back before it began.
    - ``"raised"``: the task raised an exception that ``retry_on`` has to judge.
    - ``"judged"``: ``retry_on`` has judged the exception.
    - ``"climbed"``: the task was assigned to larger workers.
    - ``"worker cut off"``: the worker that has the task lost its connection.
    - ``"worker back"``: that worker connected again.
    - ``"left out"``: events of a long story are left out here.
    - ``"result"``, ``"exception"``, ``"cancelled"``: the outcome.
    """
    seconds: float | None = None
    """Seconds since the call was submitted; ``None`` if the time was not taken."""
    at: float | None = None
    """Time of the event in seconds since 1970."""
    worker_id: str | None = None
    """The worker that the event is about."""
    job_id: str = ""
    """The platform's own identifier of that worker."""
    launcher: str = ""
    """The launcher of that worker, if it is one of a ``Fallback``."""
    attempt: int | None = None
    """The attempt that the event is about, from 1."""
    reason: str = ""
    """The reason as text, in the platform's own words if it gave any."""
    exit_code: int | None = None
    """Exit code of the process that ran the task."""
    signal: int | None = None
    """Number of the signal that killed that process."""
    peak_memory_bytes: int | None = None
    """Largest resident size of that process, in bytes."""
    out_of_memory: bool = False
    """Whether that process was killed because memory ran out."""
    run_time: float | None = None
    """Seconds that the attempt had run."""
    output: str = ""
    """The last lines that the task printed in this attempt."""

    def __str__(self) -> str:
        return _in_words(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskStory:
    """What ``BatchExecutor.explain()`` returns; its ``str()`` is a text for people."""

    number: int | None
    """The task's number in log lines. ``None`` if the call never became a task, because its
    arguments did not pickle or a journal had its result."""
    name: str = ""
    """The task's name from ``with_options(name=...)``, or the name of its stage in a graph."""
    state: Literal["pending", "running", "finished", "cancelled"]
    events: tuple[StoryEvent, ...]
    """The events in the order of time. An earlier attempt in which nothing unusual happened has few
    events, as most of them are not kept."""

    @property
    def lost(self) -> tuple[StoryEvent, ...]:
        """The events that ended an attempt before its call returned or raised."""
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
    origin = [f"job {event.job_id}"] if event.job_id else []
    origin += [f"of {event.launcher}"] if event.launcher else []
    job = f" ({' '.join(origin)})" if origin else ""
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
    """Return the name of a signal, such as ``"SIGKILL"``."""
    try:
        return signals.Signals(number).name
    except ValueError:
        return f"signal {number}"


for _class in (StoryEvent, TaskStory):
    _class.__module__ = "cloudexec"
