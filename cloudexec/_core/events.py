"""Events, which say what happened. Only an event changes the machine's state."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

from cloudexec._config import WorkerCapacity
from cloudexec._core.tasks import Task
from cloudexec._record_class import record


class Event:
    """The base of all events."""

    __slots__ = ()


class FailureKind(enum.Enum):
    """Why an attempt had no result."""

    RAISED = "raised"
    UNPICKLE_FAILED = "unpickle failed"
    PICKLE_FAILED = "pickle failed"
    SLOT_LOST = "slot lost"
    TIMED_OUT = "timed out"
    KILLED = "killed"
    WORKER_LOST = "worker lost"
    RECLAIMED = "reclaimed"
    """The platform took the worker back before the task had finished."""
    OUTGREW = "outgrew"
    """The task took more memory than it had asked for."""
    INPUT_LOST = "input lost"
    """An input of the task cannot be read by its worker: the task waits for ``InputsRestored``."""


@record
class Failure:
    """One failed attempt, with the evidence that the server will turn into an exception.

    Attributes:
        kind: Why there is no result.
        detail: The server's evidence.
        out_of_memory: Whether the attempt ended because memory ran out.
        suspects: If a worker was lost: the number of tasks that may have been the cause, including
            this one; 0 if it is not known, or no task was.
    """

    kind: FailureKind
    detail: Any = None
    out_of_memory: bool = False
    suspects: int = 0


@record
class FailureJudged(Event):
    """It was decided whether a task that waits for this is tried again, mostly by ``retry_on``.

    Attributes:
        worker: The worker that ran the task.
        task: The task.
        failure: The failure, which the task keeps if it is not tried again.
        again: Whether it is tried again.
        raised: The exception in words, if ``retry_on`` has decided.
    """

    worker: str
    task: Task
    failure: Failure
    again: bool
    raised: str | None = None


@record
class InputsRestored(Event):
    """The lost inputs of these tasks are available again."""

    tasks: Sequence[Task]


@record
class TasksSubmitted(Event):
    """The user has submitted tasks."""

    tasks: Sequence[Task]


@record
class TasksBlocked(Event):
    """The user has submitted tasks that depend on futures which are not done."""

    tasks: Sequence[Task]


@record
class TasksReleased(Event):
    """The futures that blocked tasks depend on are done: the tasks wait for workers now."""

    tasks: Sequence[Task]


@record
class TasksDropped(Event):
    """Blocked tasks have failed, because a future that they depend on has failed."""

    tasks: Sequence[Task]


@record
class TasksTakenOver(Event):
    """A worker that was taken over has blocked or waiting tasks already, under these leases."""

    worker: str
    tasks: Sequence[Task]
    leases: Sequence[int]


@record
class TasksCancelled(Event):
    """The user has cancelled tasks; with ``kill``, even if they run."""

    tasks: Sequence[Task]
    kill: bool = False


@record
class TasksRecalled(Event):
    """The user wants to cancel tasks that were sent ahead, if they have not begun."""

    tasks: Sequence[Task]


@record
class WorkerConnected(Event):
    """A worker has connected and proved who it is.

    Attributes:
        taken_over: Whether it had another client before. It then gets no tasks until it has
            reported those that it holds (``TasksTakenOver``) and the end of these (``WorkerBack``).
    """

    worker: str
    slots: int
    launch: str = ""
    taken_over: bool = False


@record
class ConnectionEnded(Event):
    """The connection of a worker has ended.

    Attributes:
        worker: The worker.
        reason: Why, in words.
        may_return: Whether the worker may live, work on, and connect again.
        may_report: Whether the launcher may still report how the worker's process ended.
        unheard: Whether the worker's last messages may be lost. They also may if it may return.
    """

    worker: str
    reason: str
    may_return: bool = False
    may_report: bool = True
    unheard: bool = False


@record
class ProcessEnded(Event):
    """The process of a launch has ended, could not be started, or was refused.

    Attributes:
        launch: The launch.
        reason: How it ended, in words.
        fatal: Whether trying again cannot help.
        killed: Whether it was killed from outside, which does not suggest wrong settings.
        reclaimed: Whether its platform took it back, so that no task is to blame, or had no
            capacity for it.
        out_of_memory: Whether the whole worker was killed for lack of memory.
        relaunched: Whether its platform starts it again, under the same launch.
    """

    launch: str
    reason: str
    fatal: bool = False
    killed: bool = False
    reclaimed: bool = False
    out_of_memory: bool = False
    relaunched: bool = False


@record
class WorkerRestarted(Event):
    """The process of a worker was started again by its platform, and wants to connect anew."""

    worker: str


@record
class WorkerBack(Event):
    """A worker has connected again, and goes on as before.

    Attributes:
        worker: The worker.
        has_reported: Whether it has said which tasks it holds, if it was taken over.
    """

    worker: str
    has_reported: bool = True


@record
class WorkerHeard(Event):
    """A worker has sent a message."""

    worker: str


@record
class WorkerReady(Event):
    """A worker has a slot that can run tasks. It has begun none before."""

    worker: str


@record
class WorkerDraining(Event):
    """A worker accepts no more tasks, because its platform told it to stop."""

    worker: str


@record
class ResultsReceived(Event):
    """A worker returned results; entry i of each column belongs to lease i."""

    worker: str
    leases: Sequence[int]
    results: Sequence[Any]
    seconds: Sequence[float]


@record
class FailuresReceived(Event):
    """A worker reports attempts without a result."""

    worker: str
    failures: Sequence[tuple[int, Failure]]


@record
class TasksStarted(Event):
    """Tasks now run in slots of a worker."""

    worker: str
    leases: Sequence[int]


@record
class LeasesReturned(Event):
    """A worker hands tasks back that it has not begun.

    Attributes:
        worker: The worker.
        leases: The leases of the tasks.
        heard: Whether the worker itself reported it. It is false for tasks that were not sent to it
            after all.
    """

    worker: str
    leases: Sequence[int]
    heard: bool = True


@record
class LaunchesRefused(Event):
    """Launches were refused because the budget is used up; all later ones will be, too."""

    launches: Sequence[str]


@record
class LaunchesTakenOver(Event):
    """This executor takes over the launches of an earlier client, which was killed.

    Attributes:
        launches: For each launch: its id, slots, size, and the capacity of a worker of that size,
            if it is known.
        last_launch: The highest number of a launch that may be in use.
        last_lease: The highest number of a lease that may be in use.
    """

    launches: Sequence[tuple[str, int, int, WorkerCapacity | None]]
    last_launch: int
    last_lease: int


@record
class ShutdownRequested(Event):
    """The executor accepts no more tasks.

    Attributes:
        cancel: Whether tasks that have not begun are cancelled.
        kill: Whether running tasks are dropped, too.
    """

    cancel: bool = False
    kill: bool = False


@record
class DeadlinePassed(Event):
    """The time that ``next_deadline()`` returned has come."""
