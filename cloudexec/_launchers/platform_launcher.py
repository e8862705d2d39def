"""The base class of launchers for a platform: they have settings, and a fleet runs the workers."""

from __future__ import annotations

import contextlib
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cloudexec._config import WorkerCapacity, format_bytes
from cloudexec._errors import ConfigError, LaunchError
from cloudexec._launchers.base import (
    Arrival,
    Contact,
    Cost,
    LaunchEnd,
    Launcher,
    LaunchRequest,
    LaunchTimes,
    Network,
    Survivor,
)
from cloudexec._launchers.platform import ExecutorInfo, Site
from cloudexec._log import Log

if TYPE_CHECKING:
    from cloudexec._launchers.fleet import Fleet
    from cloudexec._launchers.watching import Elsewhere

__all__ = ["PlatformLauncher"]

_logger = Log()
_changing = threading.Lock()
"""Held while a size is added to a launcher, or while an executor begins to use one."""


class PlatformLauncher(Launcher):
    """A launcher for your platform: derive a frozen dataclass from it, whose fields are settings.

    Only ``connect`` must be defined. Plain attributes, such as ``launch_timeout``, may be made
    fields of the dataclass. One launcher serves one executor at a time.
    """

    launch_timeout: float = 300.0
    """Seconds within which a worker must connect, unless the executor has this setting."""
    linger: float = 0.25
    """Seconds that the executor waits for more launches, so that one job has all the workers."""
    last_words: float = 10.0
    """Seconds, after a worker's connection was lost, in which the platform may say why."""
    ends_are_seen: bool = False
    slots: int = 1
    """Tasks that each worker runs at once."""
    spot: bool | str = False
    """Whether workers run on spare capacity. With ``"prefer"``, they run on demand for a while if
    there is none, or after repeated reclaims."""
    environment: Mapping[str, str] = {}
    """Environment variables of every worker, which must have no secrets."""

    _fleet: Fleet | None = None
    _elsewhere: Elsewhere | None = None

    # Methods that a platform's launcher overrides.

    @abstractmethod
    def connect(self, executor: ExecutorInfo) -> contextlib.AbstractAsyncContextManager[Site]:
        """Connect to the platform, for as long as the executor lives.

        Write it with ``contextlib.asynccontextmanager``. It is entered and left in different tasks
        of the event loop, so no ``asyncio.timeout`` or ``TaskGroup`` may be around its ``yield``.

        Args:
            executor: The executor that uses the launcher.

        Raises:
            CloudexecError: If this launcher could not launch any worker.
        """
        raise NotImplementedError

    def capacities(self) -> Sequence[WorkerCapacity]:
        """Return the resources of each worker size, smallest first; empty if they are not known.

        A task that runs out of memory is run again on a worker of the next size.
        """
        return ()

    def capacity_for(self, cpus: float, memory: int, gpus: int) -> WorkerCapacity:
        """Return a size made for a task that fits none of ``capacities``.

        Args:
            cpus: Processors that the task needs.
            memory: Bytes that the task needs.
            gpus: GPUs that the task needs.

        Raises:
            ConfigError: If no worker can be that large; the message should name the nearest size.
        """
        largest = self.size_name(self.size_count - 1)
        raise ConfigError(
            f"no worker here has room for a task with cpus={cpus:g}, "
            f"memory={format_bytes(memory)!r} and gpus={gpus}: the largest of {self.describe()} "
            f"has {largest}"
        )

    # Sizes.

    @property
    def _catalogue(self) -> list[WorkerCapacity]:
        """The launcher's own sizes, and after them those that were made for tasks."""
        found: list[WorkerCapacity] | None = self.__dict__.get("_sizes")
        if found is None:  # several threads may come here, and the first one sets the list
            found = self.__dict__.setdefault("_sizes", list(self.capacities()))
        return found

    @property
    def size_count(self) -> int:  # type: ignore[override]
        """Number of its own sizes."""
        return len(self.capacities()) or 1

    def capacity(self, size: int) -> WorkerCapacity | None:
        """Return the resources of a worker of a size; ``None`` if they are not known."""
        known = self._catalogue
        return known[size] if size < len(known) else None

    def size_for(self, cpus: float, memory: int, gpus: int) -> int:
        """Find the smallest size for a task: one of the launcher's own, or else one made for it.

        Raises:
            ConfigError: If no worker can be that large; the message names the nearest size.
        """
        known = self.capacities()
        if not known:
            return super().size_for(cpus, memory, gpus)
        for size, each in enumerate(known):
            has_memory = not each.memory or each.memory >= memory
            if each.cpus >= cpus - 1e-9 and has_memory and each.gpus >= gpus:
                return size
        made = self.capacity_for(cpus, memory, gpus)
        with _changing:
            if made not in self._catalogue:
                self._catalogue.append(made)
            return self._catalogue.index(made)

    def slots_per_worker(self, max_workers: int) -> int:
        """Return how many slots one worker has."""
        return min(self.slots, max_workers)

    # Methods that the executor calls, and that the fleet implements.

    def needs_network(self) -> bool:
        """Return ``True``, as workers are on other machines."""
        return True

    def give_way(self, elsewhere: Callable[[Sequence[str]], int], patience: float | None) -> None:
        """Record, until ``close``, that other launchers could start this launcher's workers."""
        from cloudexec._launchers.watching import Elsewhere

        self.__dict__["_elsewhere"] = Elsewhere(elsewhere, patience)

    async def start(
        self, executor_id: str, listen: str, advertise: str, launch_timeout: float
    ) -> Network:
        """Connect to the platform, and find the address that workers dial.

        Raises:
            LaunchError: If another executor uses this launcher.
            CloudexecError: If the platform cannot be used.
        """
        from cloudexec._launchers.fleet import Fleet

        # Attributes of a frozen dataclass can be set in its ``__dict__`` only. The lock is needed
        # because each executor calls this in a thread of its own.
        with _changing:
            if self.__dict__.get("_is_serving"):
                raise LaunchError(
                    f"this {type(self).__name__}(...) serves an executor already: make one for each"
                )
            self.__dict__["_is_serving"] = True
        executor = ExecutorInfo(
            id=executor_id, listen=listen, advertise=advertise, launch_timeout=launch_timeout
        )
        connection = contextlib.AsyncExitStack()
        try:
            site = await connection.enter_async_context(self.connect(executor))
            self.__dict__["_fleet"] = Fleet(self, site, executor, self._elsewhere)
        except BaseException:
            await connection.aclose()
            self.__dict__["_elsewhere"] = None
            self.__dict__["_is_serving"] = False
            raise
        self.__dict__["_connection"] = connection
        return Network(
            listen or site.listen or "127.0.0.1:0",
            advertise or site.advertise,
            site.key,
            site.relay,
            site.moving,
        )

    def launch(
        self,
        contact: Contact,
        requests: Sequence[LaunchRequest],
        on_end: Callable[[str, LaunchEnd], None],
    ) -> None:
        """Submit jobs for all of these workers."""
        self._running.launch(contact, requests, on_end)

    def terminate(self, launch_ids: Sequence[str]) -> None:
        """Terminate workers."""
        self._running.terminate(launch_ids)

    def key_of(self, launch_id: str) -> bytes | None:
        """Return the key of the worker's job; ``None`` if it has the key of the site."""
        return self._running.key_of(launch_id)

    def launch_of(self, first: str, worker_id: str) -> str:
        """Return the launch of a worker that knows only what its platform calls it."""
        return self._running.ledger.launch_of(first, worker_id)

    def connected(self, launch_id: str, arrival: Arrival) -> None:
        """Record that a worker has connected."""
        self._running.connected(launch_id, arrival)

    def disconnected(self, launch_id: str, *, orderly: bool, reclaimed: bool) -> None:
        """Record that a worker's session has ended."""
        self._running.disconnected(launch_id, orderly=orderly and not reclaimed)

    def bucket(self) -> tuple[str, str]:
        """Return the site's S3 bucket for large objects, and its region."""
        site = self._running.site
        return site.bucket, site.region

    def times(self, launch_id: str) -> LaunchTimes | None:
        """Return the known times of a launch."""
        return None if self._fleet is None else self._fleet.ledger.times(launch_id)

    def explain(self) -> str:
        """Return why launched workers have not connected; empty if no reason is known."""
        return "" if self._fleet is None else self._fleet.ledger.explanation

    def cost(self) -> Cost:
        """Return the cost of the workers so far, and the further cost that is unavoidable."""
        return Cost() if self._fleet is None else self._fleet.cost()

    def least_usd(self, requests: Sequence[LaunchRequest]) -> Iterable[float]:
        """Return the least that each of these workers would cost if it were launched now."""
        return self._running.least_usd(requests)

    def fingerprint(self) -> str:
        """Return a text that differs if workers would differ: the settings."""
        return repr(self)

    def hand_over(self) -> dict[str, Any]:
        """Return, as JSON data, what a later process needs to take over the jobs."""
        return self._running.hand_over()

    async def take_over(
        self, left: dict[str, Any], on_end: Callable[[str, LaunchEnd], None]
    ) -> Mapping[str, Survivor]:
        """Take over the jobs of an earlier process."""
        return await self._running.take_over(left, on_end)

    async def close(self) -> None:
        """Terminate the workers that still run, and close the connection to the platform."""
        if self._fleet is None:
            return
        try:
            await self._fleet.close()
            await self.__dict__["_connection"].aclose()
        except Exception:  # third-party launchers may raise any; the executor ends nevertheless
            _logger.exception("the connection of %r could not be closed", self)
        finally:
            self.__dict__["_elsewhere"] = None
            self.__dict__["_is_serving"] = False

    @property
    def _running(self) -> Fleet:
        assert self._fleet is not None, "start() comes first"
        return self._fleet


PlatformLauncher.__module__ = "cloudexec.launchers"
