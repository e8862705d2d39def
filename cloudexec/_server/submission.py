"""A submitted task as the client's side knows it, and the settings that every worker is told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from cloudexec._core.resources import Requirements
from cloudexec._core.tasks import FunctionStats, Task, TaskState
from cloudexec._functions import Function
from cloudexec._future import BatchFuture
from cloudexec._objects.options import ObjectOptions
from cloudexec._payload import Payload
from cloudexec._server.splicing import Spliced

__all__ = ["Needs", "Setup", "Submission"]

_WAITING = TaskState.WAITING


class Needs:
    """What a task that depends on futures waits for.

    Attributes:
        name: The function's, for messages.
        futures: Its dependencies, until it stands in their lists.
        inputs: Their pickled values, as they come.
        missing: How many have not come.
        places: Where among the arguments each of them stands.
    """

    __slots__ = ("futures", "inputs", "missing", "name", "places")

    def __init__(
        self, name: str, futures: Sequence[Future[Any] | None], places: tuple[Any, ...]
    ) -> None:
        self.name = name
        self.futures = futures
        self.inputs: list[Any] = [None] * len(futures)
        self.missing = len(futures)
        self.places = places


class Submission(Task):
    """A task with what it takes to send it; ``handle`` is its future."""

    __slots__ = ("charge", "dependents", "function", "needs", "payload")

    charge: int | None
    """Bytes that it counts in the budget of what is pending; a slot that is empty without one."""

    def __init__(
        self,
        number: int,
        stats: FunctionStats,
        future: BatchFuture[Any],
        function: Function | None,
        payload: Payload,
        retries: int,
        requirements: Requirements | None = None,
    ) -> None:
        # Written out, without super(): this runs once per task, in the caller's thread.
        self.number = number
        self.stats = stats
        self.retries = retries
        self.handle = future
        self.state = _WAITING
        self.lease = 0
        self.worker = None
        self.cost = 0.0
        self.lost = 0
        self.suspected = 0
        self.size = 0
        self.function = function
        self.payload: Payload | Spliced | None = payload
        self.requirements = requirements
        self.inputs = ()
        self.needs: Needs | None = None  # what it waits for, if it does
        self.dependents: list[Any] | None = None  # who waits for its result; see Dependencies

    @property
    def timeout(self) -> float | None:
        """Seconds that it may run; ``None``: no limit."""
        return None if self.requirements is None else self.requirements.options.timeout


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every worker is told at the start, and how the server listens."""

    max_workers: int
    min_workers: int = 0
    initializer: Payload = b""
    initializer_needs: Function | None = None
    main: Mapping[str, str] = field(default_factory=dict)
    max_tasks_per_child: int = 0
    output: str = "inherit"
    forward_logs: bool = True
    listen: str | None = None
    advertise: str = ""
    max_cost_usd: float | None = None
    orphan_timeout: float = 120.0
    idle_timeout: float | None = 60.0
    cwd: str = ""
    sys_path: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()
    settings: bytes = b""
    modules: bytes = b""
    objects: ObjectOptions = field(default_factory=ObjectOptions)
