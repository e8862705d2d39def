"""What to do: the machine's answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cloudexec._core.events import Failure
from cloudexec._core.record import record
from cloudexec._core.tasks import Task


class Command:
    """Something to do; its subclasses are all there are."""

    __slots__ = ()


@record
class SendTasks(Command):
    """Send tasks, each under its new ``lease``, to a worker."""

    worker: str
    tasks: Sequence[Task]


@record
class MarkRunning(Command):
    """These tasks run now: their futures can no longer be cancelled."""

    tasks: Sequence[Task]


@record
class ResolveTasks(Command):
    """Give futures their results; entry i of each column belongs to task i."""

    worker: str
    tasks: Sequence[Task]
    results: Sequence[Any]
    seconds: Sequence[float]


@record
class FailTask(Command):
    """Give a future its exception."""

    worker: str
    task: Task
    failure: Failure


@record
class JudgeFailure(Command):
    """Find out whether a task that failed like this is to be run again; ``FailureJudged`` says."""

    worker: str
    task: Task
    failure: Failure


@record
class FailTasksUnlaunched(Command):
    """Fail tasks because no worker can be had."""

    tasks: Sequence[Task]
    reason: str


@record
class CancelTasks(Command):
    """Cancel the futures of tasks that were dropped."""

    tasks: Sequence[Task]


@record
class RecallTasks(Command):
    """Ask a worker to hand leases back unless they have begun."""

    worker: str
    leases: Sequence[int]


@record
class KillTasks(Command):
    """Have a worker kill the slots that run these leases."""

    worker: str
    leases: Sequence[int]


@record
class LaunchWorker(Command):
    """Ask the launcher for a worker of a size; those of one answer go in one request."""

    launch: str
    slots: int
    size: int = 0


@record
class TerminateLaunch(Command):
    """Stop a launch that has not dialed back."""

    launch: str


@record
class DrainWorker(Command):
    """Have a worker finish what it has and end."""

    worker: str


@record
class TerminateWorker(Command):
    """Have a worker end at once."""

    worker: str


@record
class Finish(Command):
    """Shutdown is complete: no task is open and no worker left."""
