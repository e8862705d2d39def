"""Facts, which say what became of tasks and workers, for the story that ``explain()`` tells.

Nothing has to be done about a fact. ``Machine.take_facts`` returns those since its last call. They
are stated for what is unusual only, as most tasks are sent once and have a result.
"""

from __future__ import annotations

from collections.abc import Sequence

from cloudexec._core.events import Failure
from cloudexec._core.tasks import Task
from cloudexec._record_class import record

__all__ = [
    "Attempt",
    "AttemptFailed",
    "AttemptJudged",
    "Fact",
    "LaunchLost",
    "OutcomesDropped",
    "TasksHandedBack",
    "TasksWithdrawn",
    "WorkerAdded",
    "WorkerCutOff",
    "WorkerLost",
    "WorkerReclaimed",
    "WorkerReconnected",
]


class Fact:
    """The base of all facts."""

    __slots__ = ()


@record(frozen=False)
class Attempt:
    """One attempt of a task on a worker; the last four attributes say what became of it.

    Attributes:
        task: The task.
        lease: The lease under which the worker had the task.
        number: The number of the attempt, from 1.
        has_begun: Whether it is known to have begun.
        counts: Whether it counts as a lost attempt of the task.
        is_suspect: Whether the task runs apart from others now, as it may have killed a worker.
        has_grown: Whether the task runs on a larger size of worker now.
    """

    task: Task
    lease: int
    number: int
    has_begun: bool
    counts: bool = False
    is_suspect: bool = False
    has_grown: bool = False


@record
class WorkerAdded(Fact):
    """A launched worker has connected."""

    worker: str


@record
class WorkerCutOff(Fact):
    """A worker's connection was cut; it may work on and connect again."""

    worker: str
    attempts: Sequence[Attempt]


@record
class WorkerReconnected(Fact):
    """A worker that was cut off is connected again."""

    worker: str
    attempts: Sequence[Attempt]


@record
class WorkerReclaimed(Fact):
    """A worker's platform wants the worker back, so that it gets no more tasks."""

    worker: str


@record
class WorkerLost(Fact):
    """A worker is gone or was given up.

    Attributes:
        worker: The worker.
        reason: Why, in words.
        attempts: What became of those of its tasks that were not done.
        reclaimed: Whether its platform took it back.
        out_of_memory: Whether the whole worker was killed for lack of memory.
        is_expected: Whether it was told to end and had no task left, or its tasks do not matter any
            more.
    """

    worker: str
    reason: str
    attempts: Sequence[Attempt]
    reclaimed: bool
    out_of_memory: bool
    is_expected: bool


@record
class AttemptFailed(Fact):
    """A worker reported an attempt without a result."""

    worker: str
    attempt: Attempt
    failure: Failure


@record
class AttemptJudged(Fact):
    """``retry_on`` has decided about an attempt that raised an exception.

    Attributes:
        worker: The worker that ran the attempt.
        task: The task.
        number: The number of the attempt, from 1.
        raised: The exception, in words.
        again: Whether the task is tried again.
    """

    worker: str
    task: Task
    number: int
    raised: str
    again: bool


@record
class TasksHandedBack(Fact):
    """A worker has handed back tasks that it had not begun; ``reason`` says why it was to."""

    worker: str
    attempts: Sequence[Attempt]
    reason: str


@record
class TasksWithdrawn(Fact):
    """The user has cancelled these tasks."""

    tasks: Sequence[Task]


@record
class LaunchLost(Fact):
    """A launch has ended before its worker connected.

    Attributes:
        launch: The launch.
        reason: Why, in words.
        from_outside: Whether it was killed from outside, or its platform had no capacity for it.
    """

    launch: str
    reason: str
    from_outside: bool


@record
class OutcomesDropped(Fact):
    """This many outcomes came too late, as the attempts had been given up. They are summed up."""

    count: int
