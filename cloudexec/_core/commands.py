"""Commands: the machine's answers, which say what to do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cloudexec._core.events import Failure
from cloudexec._core.tasks import Task
from cloudexec._record_class import record


class Command:
    """The base of all commands."""

    __slots__ = ()


@record
class SendTasks(Command):
    """Send tasks, each under its new ``lease``, to a worker."""

    worker: str
    tasks: Sequence[Task]


@record
class MarkRunning(Command):
    """Mark the futures of tasks that run now, so that they cannot be cancelled any more."""

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
    """Ask ``retry_on`` whether a failed task runs again; ``FailureJudged`` brings the answer."""

    worker: str
    task: Task
    failure: Failure


@record
class FailTasksUnlaunched(Command):
    """Fail tasks because no worker can be started for them."""

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
    """Ask the launcher for a worker of a size; the commands of one answer form one request."""

    launch: str
    slots: int
    size: int = 0


@record
class TerminateLaunch(Command):
    """Have the launcher end the process of a launch, if it has not ended."""

    launch: str


@record
class DrainWorker(Command):
    """Have a worker finish its tasks and end."""

    worker: str


@record
class EvacuateWorker(Command):
    """Bring the kept results of a worker here, as its platform takes it back."""

    worker: str


@record
class TerminateWorker(Command):
    """Tell a worker to end at once."""

    worker: str


@record
class CloseSession(Command):
    """Close the session of a worker that is gone, and forget the session."""

    worker: str


@record
class Finish(Command):
    """Shutdown is complete: no task is open and no worker left."""
