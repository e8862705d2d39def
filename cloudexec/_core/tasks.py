"""Tasks, their states, and the table of transitions between states."""

from __future__ import annotations

import enum
from typing import Any, Protocol

from cloudexec._core.resources import Requirements

__all__ = ["TRANSITIONS", "UNKNOWN_SECONDS", "FunctionStats", "Input", "Task", "TaskState"]

UNKNOWN_SECONDS = 3600.0
"""Estimated seconds of a task whose function has no finished task. It is long, so that no such task
is sent ahead."""
LEAST_SECONDS = 10e-6
"""The lowest estimate, in seconds: the time that an empty task takes in a slot."""


class TaskState(enum.Enum):
    """The state of a task. Only ``queue`` changes it."""

    BLOCKED = "blocked"
    """The task waits for futures, or for a worker that may have it already. It is in no queue."""
    WAITING = "waiting"
    """The task is in a queue. New tasks begin in this state."""
    SENT = "sent"
    """The task is on a worker, and is not known to have begun."""
    RUNNING = "running"
    """The task runs in a slot of a worker."""
    BACKING_OFF = "backing off"
    """The task waits between two attempts, for a time or for its inputs. It is in no queue."""
    DONE = "done"
    """The task has a result or an exception, or is cancelled."""


TRANSITIONS: dict[TaskState, frozenset[TaskState]] = {
    TaskState.BLOCKED: frozenset({TaskState.WAITING, TaskState.RUNNING, TaskState.DONE}),
    TaskState.WAITING: frozenset(
        {TaskState.BLOCKED, TaskState.SENT, TaskState.RUNNING, TaskState.DONE}
    ),
    TaskState.SENT: frozenset(
        {TaskState.WAITING, TaskState.RUNNING, TaskState.BACKING_OFF, TaskState.DONE}
    ),
    TaskState.RUNNING: frozenset({TaskState.WAITING, TaskState.BACKING_OFF, TaskState.DONE}),
    TaskState.BACKING_OFF: frozenset({TaskState.WAITING, TaskState.DONE}),
    TaskState.DONE: frozenset(),
}
"""By state: the states that may follow. Sent tasks may come back, finished ones never do, and only
new tasks become blocked. ``queue`` refuses all other changes."""


class FunctionStats:
    """The estimated run time of a function's tasks, and the size of worker that they need.

    Attributes:
        seconds: Estimated seconds of one task: a moving average that rises fast and falls slowly.
        samples: Number of finished tasks; more tasks are sent ahead as it grows.
        size: The size of worker that new tasks are sent to.
    """

    __slots__ = ("_fitted_before", "_too_large", "samples", "seconds", "size")

    def __init__(self) -> None:
        self.seconds = UNKNOWN_SECONDS
        self.samples = 0
        self.size = 0
        self._too_large = 0
        self._fitted_before = 0

    def learn(self, seconds: float) -> None:
        """Note the run time of a finished task."""
        if seconds < LEAST_SECONDS:
            seconds = LEAST_SECONDS
        if self.samples:
            self.seconds += 0.2 * (seconds - self.seconds)
            self.samples += 1
        else:
            self.seconds = seconds
            self.samples = 1

    def outgrew(self, size: int) -> None:
        """Note that a task ran out of memory on a worker of this size.

        If more tasks ran out of memory on that size than finished, new tasks begin on the next
        size. So a single outlier does not move the others.
        """
        if size != self.size:
            return
        self._too_large += 1
        if self._too_large > self.samples - self._fitted_before:
            self.size += 1
            self._too_large = 0
            self._fitted_before = self.samples


class Input(Protocol):
    """A blob among a task's arguments, which the task's worker needs."""

    size: int
    """Bytes."""
    workers: set[str]
    """Ids of the workers that have it already."""


class Task:
    """One submitted call. An attempt is one run of it on one worker.

    Attributes:
        number: The task's number, from 1, in the order of submission.
        stats: The estimates of its function, which all its tasks share.
        retries: Number of attempts that may be lost beyond the first.
        handle: Belongs to the server, and is not used here: the future.
        state: The state; see ``TaskState``.
        lease: The number of the worker's right to run the task, which is new each time the task is
            sent; 0 if no worker has it.
        worker: The worker that holds the lease.
        cost: The estimated seconds with which it was sent.
        lost: Number of attempts lost so far.
        size: The smallest size of worker that it may be sent to. For a task with requests of its
            own, it is the index of the request that counts. It grows when the task runs out of
            memory.
        suspected: Number of lost workers that may have begun it, or would have begun it first.
        requirements: The requirements; ``None`` for a plain task.
        inputs: Blobs among its arguments. The task prefers workers that have these already.
    """

    __slots__ = (
        "cost",
        "handle",
        "inputs",
        "lease",
        "lost",
        "number",
        "requirements",
        "retries",
        "size",
        "state",
        "stats",
        "suspected",
        "worker",
    )

    def __init__(
        self,
        number: int,
        stats: FunctionStats,
        *,
        retries: int = 2,
        handle: Any = None,
        requirements: Requirements | None = None,
        inputs: tuple[Input, ...] = (),
    ) -> None:
        self.number = number
        self.stats = stats
        self.retries = retries
        self.handle = handle
        self.state = TaskState.WAITING
        self.lease = 0
        self.worker: str | None = None
        self.cost = 0.0
        self.lost = 0
        self.suspected = 0
        self.size = 0
        self.requirements = requirements
        self.inputs = inputs

    def __repr__(self) -> str:
        return f"<Task {self.number} {self.state.value}>"
