"""Tasks: their states, and which state may follow which."""

from __future__ import annotations

import enum
from typing import Any, Protocol

from cloudexec._core.resources import Requirements

__all__ = ["TRANSITIONS", "UNKNOWN_SECONDS", "FunctionStats", "Input", "Task", "TaskState"]

UNKNOWN_SECONDS = 3600.0
"""Estimate for a function none of whose tasks has finished: long, so none is sent ahead."""
LEAST_SECONDS = 10e-6
"""Least estimate: what a task that does nothing costs a slot."""


class TaskState(enum.Enum):
    """Where a task is. Only ``queue`` changes it."""

    BLOCKED = "blocked"
    """Waits for what it depends on, or to be found on a worker; in no queue."""
    WAITING = "waiting"
    """In a queue. A new task is made like this."""
    SENT = "sent"
    """On a worker, not known to have begun."""
    RUNNING = "running"
    """On a worker, in a slot."""
    BACKING_OFF = "backing off"
    """Between two attempts, for a while or until what it takes is there again; in no queue."""
    DONE = "done"
    """Resolved or cancelled."""


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
"""From a state to those that may follow: sent tasks come back, finished ones never do, and only new
ones become blocked. ``queue`` refuses any other change."""


class FunctionStats:
    """Tasks of one function: how long they take, and what size of worker they need.

    Attributes:
        seconds: Estimate of one task's run time, a moving average that follows slow ones fast.
        samples: Tasks seen to finish; look-ahead grows with it.
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
        """Take in the run time of one task that finished."""
        if seconds < LEAST_SECONDS:
            seconds = LEAST_SECONDS
        if self.samples:
            self.seconds += 0.2 * (seconds - self.seconds)
            self.samples += 1
        else:
            self.seconds = seconds
            self.samples = 1

    def outgrew(self, size: int) -> None:
        """Take in that a task ran out of memory on a worker of this size.

        Once more of them did than finished on that size, the next size is where others begin: one
        outlier does not move the rest.
        """
        if size != self.size:
            return
        self._too_large += 1
        if self._too_large > self.samples - self._fitted_before:
            self.size += 1
            self._too_large = 0
            self._fitted_before = self.samples


class Input(Protocol):
    """A large thing that a task needs where it runs."""

    size: int
    """Bytes."""
    workers: set[str]
    """Ids of the workers that have it already."""


class Task:
    """One submitted call. An attempt is one run of it on one worker.

    Attributes:
        number: Counts from 1 in the order of submission.
        stats: What is known of its function; tasks of the same function share it.
        retries: Attempts that may be lost beyond the first.
        handle: The server's own, untouched here: the future, the payload.
        state: See ``TaskState``.
        lease: The right of a worker to this task; new for each time it is sent. 0: none.
        worker: The worker that holds the lease.
        cost: Estimated seconds that it was sent with.
        lost: Attempts lost so far.
        size: The smallest size of worker that it may be sent to; of a task with requests of its
            own, which of these counts. It grows when the task runs out of memory.
        suspected: Workers lost that may have begun with it, or were to begin with it.
        requirements: What was asked for it; ``None``: nothing.
        inputs: Large things that it takes: it had better run where these are already.
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
