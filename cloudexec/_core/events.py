"""What happened: nothing else moves the machine."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

from cloudexec._config import WorkerCapacity
from cloudexec._core.record import record
from cloudexec._core.tasks import Task


class Event:
    """Something that happened; its subclasses are all there are."""

    __slots__ = ()


class FailureKind(enum.Enum):
    """Why an attempt brought no result."""

    RAISED = "raised"
    UNPICKLE_FAILED = "unpickle failed"
    PICKLE_FAILED = "pickle failed"
    SLOT_LOST = "slot lost"
    TIMED_OUT = "timed out"
    KILLED = "killed"
    WORKER_LOST = "worker lost"
    RECLAIMED = "reclaimed"
    """The platform wanted the worker back, and the task did not finish in the time it gave."""
    OUTGREW = "outgrew"
    """It took more memory than it had asked for."""
    INPUT_LOST = "input lost"
    """What it takes is not where it could be had: it waits for ``InputsRestored``."""


@record
class Failure:
    """One failed attempt, with the evidence that the server will turn into an exception.

    Attributes:
        kind: Why there is no result.
        detail: The server's evidence.
        out_of_memory: Whether memory was what it died of.
        suspects: Of a lost worker, tasks that may have been the cause, this one among them; 0: not
            known, or none of them was.
    """

    kind: FailureKind
    detail: Any = None
    out_of_memory: bool = False
    suspects: int = 0


@record
class FailureJudged(Event):
    """Somebody looked at what a task raised, and says whether it is worth another attempt."""

    worker: str
    task: Task
    failure: Failure
    again: bool


@record
class InputsRestored(Event):
    """What tasks take that had none of it is there again."""

    tasks: Sequence[Task]


@record
class TasksSubmitted(Event):
    """Somebody submitted tasks."""

    tasks: Sequence[Task]


@record
class TasksBlocked(Event):
    """Somebody submitted tasks that depend on what is not there yet."""

    tasks: Sequence[Task]


@record
class TasksReleased(Event):
    """What blocked tasks depend on is there: they wait for workers from now on."""

    tasks: Sequence[Task]


@record
class TasksDropped(Event):
    """What blocked tasks depend on will never be there: they have failed."""

    tasks: Sequence[Task]


@record
class TasksTakenOver(Event):
    """A worker that was taken over has blocked tasks already, under these leases."""

    worker: str
    tasks: Sequence[Task]
    leases: Sequence[int]


@record
class TasksCancelled(Event):
    """Somebody cancelled tasks; with ``kill``, although they run."""

    tasks: Sequence[Task]
    kill: bool = False


@record
class TasksRecalled(Event):
    """Somebody wants to cancel tasks that were sent ahead, and to know whether they had begun."""

    tasks: Sequence[Task]


@record
class WorkerConnected(Event):
    """A worker dialed back and proved who it is.

    Attributes:
        taken_over: It had another client before: it gets nothing until it has said what it holds
            (``TasksTakenOver``) and that this is all (``WorkerBack``).
    """

    worker: str
    slots: int
    launch: str = ""
    taken_over: bool = False


@record
class WorkerCut(Event):
    """A worker's connection is gone; the worker may live, work on, and come back."""

    worker: str


@record
class WorkerBack(Event):
    """A worker whose connection was cut has another, and goes on as before."""

    worker: str


@record
class WorkerHeard(Event):
    """A worker gave a sign of life."""

    worker: str


@record
class WorkerReady(Event):
    """A worker has a slot that can run tasks; before this it began none."""

    worker: str


@record
class WorkerDraining(Event):
    """A worker will take nothing new (it was told to stop by its platform)."""

    worker: str


@record
class WorkerLost(Event):
    """A worker's connection ended.

    Attributes:
        detail: The server's evidence.
        reclaimed: Its platform took it back: no fault of any task.
        out_of_memory: It was killed as a whole for want of memory.
        relaunched: Its platform starts it again, under the same launch.
    """

    worker: str
    detail: Any = None
    reclaimed: bool = False
    out_of_memory: bool = False
    relaunched: bool = False


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
    """Leases that now run in a slot."""

    worker: str
    leases: Sequence[int]


@record
class LeasesReturned(Event):
    """Leases that the worker hands back unstarted.

    Attributes:
        worker: Which.
        leases: Of tasks that it had.
        heard: Whether it said so itself: False for what was not sent to it after all.
    """

    worker: str
    leases: Sequence[int]
    heard: bool = True


@record
class LaunchFailed(Event):
    """A launch ended before its worker dialed back.

    Attributes:
        fatal: Trying again cannot help.
        killed: It was killed from outside, which says nothing about the settings.
        reclaimed: Its platform had no place for it, and it may have one elsewhere.
    """

    launch: str
    reason: str
    fatal: bool = False
    killed: bool = False
    reclaimed: bool = False


@record
class LaunchesRefused(Event):
    """Launches that were not made, and none will be from now on: the budget is used up."""

    launches: Sequence[str]


@record
class LaunchesTakenOver(Event):
    """What an earlier client launched, which was killed, is this one's now.

    Attributes:
        launches: Launch, slots, size, and what a worker of that size has, if that is known.
        last_launch: Numbers up to this one are taken.
        last_lease: The same, of leases.
    """

    launches: Sequence[tuple[str, int, int, WorkerCapacity | None]]
    last_launch: int
    last_lease: int


@record
class ShutdownRequested(Event):
    """The executor takes no more tasks.

    Attributes:
        cancel: Cancel what has not begun.
        kill: Do not wait for what runs either.
    """

    cancel: bool = False
    kill: bool = False


@record
class DeadlinePassed(Event):
    """The time that ``next_deadline()`` named has come."""
