"""A submitted task with all that is needed to send it, and the settings of workers and server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from types import MappingProxyType
from typing import Any

from cloudexec._core.resources import Requirements
from cloudexec._core.tasks import FunctionStats, Task, TaskState
from cloudexec._functions import Function
from cloudexec._future import BatchFuture
from cloudexec._objects.options import ObjectOptions
from cloudexec._record_class import record
from cloudexec._records import Payload
from cloudexec._server.splicing import Spliced

__all__ = ["Needs", "Setup", "Submission"]

_WAITING = TaskState.WAITING


class Needs:
    """The futures that a task waits for.

    Attributes:
        name: The function's name, for messages.
        futures: The futures; empty once the task is listed with each of them.
        inputs: The futures' pickled values, as far as they are done.
        missing: Number of futures that are not done.
        places: The place of each future among the arguments, for messages.
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
    """A task with its function and payload; ``handle`` is its future."""

    __slots__ = ("charge", "dependents", "function", "needs", "payload")

    charge: int | None
    """Bytes that the task counts in ``PendingBudget``; not set if there is no budget."""

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
        # The base class's __init__ is repeated here and not called, to save time: this runs once
        # for each task, in the caller's thread.
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
        self.needs: Needs | None = None  # the futures that it waits for, if there are any
        self.dependents: list[Any] | None = None  # tasks that wait for its result

    @property
    def timeout(self) -> float | None:
        """Seconds that the task may run; ``None`` for no limit."""
        return None if self.requirements is None else self.requirements.options.timeout


@record(kw_only=True)
class Setup:
    """The settings that every worker receives when it connects, and those of the server."""

    max_workers: int
    min_workers: int = 0
    initializer: Payload = b""
    initializer_needs: Function | None = None
    main: Mapping[str, str] = MappingProxyType({})
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
    module_state: bytes = b""
    modules: bytes = b""
    objects: ObjectOptions = ObjectOptions()
