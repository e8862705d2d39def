"""Workers and launches as the core sees them."""

from __future__ import annotations

import enum

from cloudexec._core.tasks import Task

__all__ = ["Launch", "Worker", "WorkerState"]


class WorkerState(enum.Enum):
    """What a connected worker is for."""

    ACTIVE = "active"
    DRAINING = "draining"
    """Finishes what it has, gets nothing new."""


class Worker:
    """A process that dialed back.

    Attributes:
        id: Its name.
        slots: Tasks it can run at once.
        leases: Lease -> task, in the order sent; cancelled tasks stay until the worker answers.
        load: Estimated seconds of work behind those leases.
        ready: Whether it may have begun any of its tasks.
        rung: Which size it has, from 0.
        connected_at: When it dialed back.
        paused_until: Until then it gets nothing ahead of need.
        completed: Tasks it has answered for.
        idle_since: When its last lease went; ``None`` while it has one.
        heard_at: When it was last heard of.
    """

    __slots__ = (
        "completed",
        "connected_at",
        "heard_at",
        "id",
        "idle_since",
        "launch",
        "leases",
        "load",
        "paused_until",
        "ready",
        "rung",
        "slots",
        "state",
    )

    def __init__(self, worker_id: str, slots: int, launch: str, now: float, rung: int = 0) -> None:
        self.id = worker_id
        self.rung = rung
        self.connected_at = now
        self.slots = slots
        self.launch = launch
        self.state = WorkerState.ACTIVE
        self.leases: dict[int, Task] = {}
        self.load = 0.0
        self.ready = False
        self.paused_until = 0.0
        self.completed = 0
        self.idle_since: float | None = now
        self.heard_at = now


class Launch:
    """A worker that was asked for and has not dialed back."""

    __slots__ = ("id", "rung", "slots", "started_at")

    def __init__(self, launch_id: str, slots: int, now: float, rung: int = 0) -> None:
        self.id = launch_id
        self.slots = slots
        self.rung = rung
        self.started_at = now
