"""The base of launchers for a platform: they say what workers to run, and a fleet runs them."""

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
"""Held while a size is added to those of a launcher."""


class PlatformLauncher(Launcher):
    """A launcher for your platform: derive a frozen dataclass from it, whose fields are settings.

    ``connect`` is all that it needs. What is a plain attribute here, such as ``launch_timeout``,
    may be a field of yours. One launcher serves one executor at a time.
    """

    launch_timeout: float = 300.0
    """Seconds in which a worker must have connected, unless the executor was told."""
    linger: float = 0.25
    """Seconds to wait for more workers to be asked for, so that one job has them all."""
    last_words: float = 10.0
    """Seconds, after a worker's connection was lost, in which the platform may say why."""
    ends_are_seen: bool = False
    slots: int = 1
    """Tasks that each worker runs at once."""
    spot: bool | str = False
    """Whether workers run on spare capacity. ``"prefer"`` goes without after repeated reclaims, or
    if there is none."""
    environment: Mapping[str, str] = {}
    """Variables that every worker has; no place for secrets."""

    _fleet: Fleet | None = None
    _elsewhere: Elsewhere | None = None

    # What a platform's launcher says.

    @abstractmethod
    def connect(self, executor: ExecutorInfo) -> contextlib.AbstractAsyncContextManager[Site]:
        """Connect to the platform, for as long as the executor lives.

        Write it with ``contextlib.asynccontextmanager``. It is entered and left in different tasks
        of the event loop, so no ``asyncio.timeout`` or ``TaskGroup`` may be around its ``yield``.

        Args:
            executor: The executor that is to be served.

        Raises:
            CloudexecError: If nothing could be launched.
        """
        raise NotImplementedError

    def capacities(self) -> Sequence[WorkerCapacity]:
        """Return the sizes of worker that there are, the smallest first; none: it is not known.

        A task that runs out of memory is run again on the next one.
        """
        return ()

    def capacity_for(self, cpus: float, memory: int, gpus: int) -> WorkerCapacity:
        """Return a size made for a task that fits none of ``capacities``.

        Args:
            cpus: Processors that it needs.
            memory: Bytes that it needs.
            gpus: GPUs that it needs.

        Raises:
            ConfigError: If there is none; it should name the nearest.
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
        """The sizes that there are, and those that were made for tasks; it only grows."""
        found: list[WorkerCapacity] | None = self.__dict__.get("_sizes")
        if found is None:  # asked for in any thread: the first one decides
            found = self.__dict__.setdefault("_sizes", list(self.capacities()))
        return found

    @property
    def size_count(self) -> int:  # type: ignore[override]
        """How many sizes of its own it has."""
        return len(self.capacities()) or 1

    def capacity(self, size: int) -> WorkerCapacity | None:
        """Say what a worker of a size has."""
        known = self._catalogue
        return known[size] if size < len(known) else None

    def size_for(self, cpus: float, memory: int, gpus: int) -> int:
        """Find the smallest size for a task: one that there is, or else one made for it.

        Raises:
            ConfigError: If there is none; it names the nearest.
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
        """Say how many slots one worker has."""
        return min(self.slots, max_workers)

    # What the executor asks, answered by the fleet.

    def needs_network(self) -> bool:
        """Workers are elsewhere."""
        return True

    def give_way(self, elsewhere: Callable[[Sequence[str]], int], patience: float | None) -> None:
        """Take note that workers could be started elsewhere, until ``close``."""
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

        # Settings may be frozen: their dictionary is not. Each executor has a thread of its own.
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
        """Submit a job for all of them."""
        self._running.launch(contact, requests, on_end)

    def terminate(self, launch_ids: Sequence[str]) -> None:
        """Terminate workers."""
        self._running.terminate(launch_ids)

    def key_of(self, launch_id: str) -> bytes | None:
        """Return the key that a job was given, where workers have none already."""
        return self._running.key_of(launch_id)

    def launch_of(self, first: str, worker_id: str) -> str:
        """Return the launch of a worker that knows only what its platform calls it."""
        return self._running.ledger.launch_of(first, worker_id)

    def connected(self, launch_id: str, arrival: Arrival) -> None:
        """A worker has dialed back."""
        self._running.connected(launch_id, arrival)

    def disconnected(self, launch_id: str, *, orderly: bool, reclaimed: bool) -> None:
        """A worker's session ended."""
        self._running.disconnected(launch_id, orderly=orderly and not reclaimed)

    def bucket(self) -> tuple[str, str]:
        """Name the site's bucket, and its region."""
        site = self._running.site
        return site.bucket, site.region

    def times(self, launch_id: str) -> LaunchTimes | None:
        """Say what is known of how a launch went."""
        return None if self._fleet is None else self._fleet.ledger.times(launch_id)

    def explain(self) -> str:
        """Say why workers that were asked for are not there."""
        return "" if self._fleet is None else self._fleet.ledger.explanation

    def cost(self) -> Cost:
        """Estimate what the workers have cost, and will at least."""
        return Cost() if self._fleet is None else self._fleet.cost()

    def least_usd(self, requests: Sequence[LaunchRequest]) -> Iterable[float]:
        """Say what each of these workers would cost at least, were they launched now."""
        return self._running.least_usd(requests)

    def fingerprint(self) -> str:
        """Return what tells its workers from those of another one: its settings."""
        return repr(self)

    def hand_over(self) -> dict[str, Any]:
        """Return what a later process needs to know of the jobs."""
        return self._running.hand_over()

    async def take_over(
        self, left: dict[str, Any], on_end: Callable[[str, LaunchEnd], None]
    ) -> Mapping[str, Survivor]:
        """Take over the jobs of an earlier process."""
        return await self._running.take_over(left, on_end)

    async def close(self) -> None:
        """Terminate what still runs, and let go of the platform."""
        if self._fleet is None:
            return
        try:
            await self._fleet.close()
            await self.__dict__["_connection"].aclose()
        except Exception:  # of a launcher that others have written: the executor ends nevertheless
            _logger.exception("the connection of %r could not be closed", self)
        finally:
            self.__dict__["_elsewhere"] = None
            self.__dict__["_is_serving"] = False

    @property
    def _running(self) -> Fleet:
        assert self._fleet is not None, "start() comes first"
        return self._fleet


PlatformLauncher.__module__ = "cloudexec.launchers"
