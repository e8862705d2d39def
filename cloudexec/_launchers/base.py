"""The protocol between the executor and the launcher that starts its workers."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from cloudexec._config import WorkerCapacity, format_bytes
from cloudexec._errors import CloudexecError, ConfigError
from cloudexec._record_class import record

__all__ = [
    "Arrival",
    "Contact",
    "Cost",
    "LaunchEnd",
    "LaunchRequest",
    "LaunchTimes",
    "Launcher",
    "LauncherCounts",
    "MovingRelay",
    "Network",
    "Survivor",
    "WorkerCapacity",
]


@record
class LaunchEnd:
    """How a launched worker ended.

    Attributes:
        reason: The cause, for people: the exit code or signal, the platform's message, the last
            lines that the worker printed.
        killed: Whether another process or the platform killed the worker.
        fatal: Whether another launch would fail, too.
        reclaimed: Whether the platform took the worker's machine back, as on a Spot interruption.
        out_of_memory: Whether the whole worker was killed because it ran out of memory.
        relaunched: Whether the platform starts the worker again, under the same launch id.
    """

    reason: str
    killed: bool = False
    fatal: bool = False
    reclaimed: bool = False
    out_of_memory: bool = False
    relaunched: bool = False


@record
class Survivor:
    """A worker that outlived the process which launched it.

    Attributes:
        size: Its size, as in ``LaunchRequest.size``.
        running: Whether it runs; otherwise it still waits for a place.
    """

    size: int
    running: bool


@record
class Contact:
    """The data with which a worker connects to the client.

    Attributes:
        target: ``plain:/path`` of a socket, or a gRPC target: ``unix:/path`` or ``host:port``.
        executor_id: The executor's id.
        key: The secret that the client and the worker share for the enrolment.
        certificate_sha256: Fingerprint to pin, in hex; empty for a Unix socket.
        relay: ``host:port`` of the relay that leads to the target; empty if workers dial the target
            directly.
        others: If launchers have networks of their own (``Network.others``), the contact for each
            of these, in the same order, or the error because of which there is none.
    """

    target: str
    executor_id: str
    key: bytes
    certificate_sha256: str = ""
    relay: str = ""
    others: tuple[Contact | CloudexecError, ...] = ()

    @property
    def hash_seed(self) -> str:
        """``PYTHONHASHSEED`` of all workers, so that sets have the same order in each of them."""
        return str(zlib.crc32(self.executor_id.encode()))

    def __repr__(self) -> str:
        return f"Contact(target={self.target!r}, executor_id={self.executor_id!r})"


@record
class LaunchRequest:
    """One worker to start.

    Attributes:
        launch_id: The launch's number, as a string. Workers that are requested together have
            consecutive numbers.
        slots: Tasks that the worker runs at once.
        size: The number of the worker's size, from 0: one of the launcher's own sizes, or one that
            ``size_for`` has returned.
    """

    launch_id: str
    slots: int
    size: int = 0


class MovingRelay(Protocol):
    """A relay whose address changes when its launcher has to start another one.

    Attributes:
        address: Its present ``host:port``.
        url: URL from which workers read the present address.
        on_move: Called with the new address.
        is_used: Whether the executor has started, and has taken over the workers that connect
            through the relay.
    """

    address: str
    url: str
    on_move: Callable[[str], None]
    is_used: bool


@record
class Network:
    """The address on which the executor listens for workers, and how workers reach it.

    Attributes:
        listen: ``host:port``, where port 0 means any free port; empty for a private Unix socket.
        advertise: Host, or ``host:port``, that workers dial; empty for the address of ``listen``.
        key: The secret that workers have already; empty if the executor is to make one.
        relay: ``host:port`` of a relay that client and workers dial, and that knows the same
            secret; empty if workers dial this process.
        moving: The same relay, if the launcher has started it and may start another one elsewhere.
        others: One network for each of several launchers, with its own address, key and relay.
            ``listen`` is then taken from this network alone, and all else from the others alone.
    """

    listen: str = ""
    advertise: str = ""
    key: bytes = b""
    relay: str = ""
    moving: MovingRelay | None = None
    others: tuple[Network, ...] = ()

    @property
    def is_relayed(self) -> bool:
        """Whether all workers connect through a relay, so that none of them dials this process."""
        return all(each.relay for each in self.others or (self,))

    def __repr__(self) -> str:
        return f"Network(listen={self.listen!r}, advertise={self.advertise!r})"


@record
class Arrival:
    """What a worker reported of its own start when it connected.

    Attributes:
        job_id: The platform's id for the worker.
        attempt: Number of this run of the worker, from 1.
        boot: Seconds from the start of the worker's process to its first message.
        pull: Seconds that the download of the image took; ``None`` if that is unknown.
    """

    job_id: str = ""
    attempt: int = 1
    boot: float | None = None
    pull: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchTimes:
    """How long each step took from the request for a worker to its first result, in seconds.

    ``None`` means that the step is not over yet, or that its time cannot be known.
    """

    launch: str
    """Number of the launch."""
    worker_id: str = ""
    job_id: str = ""
    launcher: str = ""
    """Name of the worker's launcher in a ``Fallback``; empty without one."""
    instead_of: str = ""
    """Launchers that are preferred to this one and could not start the worker, with the reasons;
    empty if there are none."""
    api: float | None = None
    """Until the platform had accepted the request."""
    place: float | None = None
    """From then until a place was found and the container was being started."""
    pull: float | None = None
    """Download of the image."""
    boot: float | None = None
    """From the start of the process to its first message."""
    dial_in: float | None = None
    """Enrolment."""
    first_task: float | None = None
    """From the end of the enrolment to the first result."""
    total: float | None = None
    """All steps that are over, together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """The cost of an executor's workers, estimated from list prices."""

    accrued_usd: float = 0.0
    """Cost of the time that workers have run."""
    committed_usd: float = 0.0
    """Further cost that cannot be avoided, even if all workers were terminated now."""
    per_hour_usd: float = 0.0
    """Cost per hour of the workers that run now."""
    note: str = ""
    """Source and assumptions of the estimate, as text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherCounts:
    """The number of workers that one launcher of a ``Fallback`` has started, and their cost."""

    launcher: str
    """Name of the launcher."""
    launched: int = 0
    """Workers that were requested from it."""
    connected: int = 0
    """Workers of these that have connected."""
    active: int = 0
    """Workers of these that have not ended."""
    passed_on: int = 0
    """Workers that it could not start, and that were then requested from another launcher."""
    cost_usd: float = 0.0
    """Cost of its workers so far, in USD, estimated from list prices."""
    why: str = ""
    """Why it could not start workers the last time. Empty if it has not failed, or if it has been
    tried again since and its workers have connected."""
    is_passed_over: bool = False
    """Whether new workers are now requested from other launchers, for the reason in ``why``."""

    def in_words(self) -> str:
        """Return the numbers that are not zero, and the first line of the reason."""
        numbers = {
            "launched": self.launched,
            "connected": self.connected,
            "active": self.active,
            "passed on": self.passed_on,
        }
        words = [f"{number:,} {what}" for what, number in numbers.items() if number]
        if self.cost_usd:
            words.append(f"${self.cost_usd:.4f}")
        text = ", ".join(words) or "no workers"
        return f"{text} ({self.why.partition(chr(10))[0]})" if self.why else text

    def __str__(self) -> str:
        return f"{self.launcher}: {self.in_words()}"


class Launcher(Protocol):
    """Starts and stops workers. All methods are called on the executor's loop thread.

    A launcher derives from this class, and overrides the methods whose defaults do not fit.
    """

    launch_timeout: float = 60.0
    """Seconds within which a worker must connect, unless the executor has this setting."""
    reconnect_grace: float = 30.0
    """Seconds in which a worker whose connection was cut may reconnect, unless the executor has
    this setting."""
    linger: float = 0.0
    """Seconds that the executor waits for more launches, so that one request serves them all."""
    last_words: float = 0.1
    """Seconds, after a worker's connection was lost, in which ``on_end`` may say why."""
    ends_are_seen: bool = True
    """Whether ``on_end`` is called soon after the end of every worker. The executor waits for these
    calls when it closes."""
    modules: bool | Sequence[str] = True
    """Whether the user's own modules, which are imported but not installed, are sent to workers on
    other machines; or the top-level names of the modules that are sent."""
    size_count: int = 1
    """Number of worker sizes that it has. A task that ran out of memory goes to the next size."""
    own_processes: bool = False
    """Whether all workers are processes of this machine that it starts itself, so that they can use
    a plain socket in place of gRPC."""
    one_machine: bool = False
    """Whether all workers are on one machine, and share the resources of ``capacity(0)``."""

    def slots_per_worker(self, max_workers: int) -> int:
        """Return how many of the ``max_workers`` slots one worker has."""
        return 1

    def capacity(self, size: int) -> WorkerCapacity | None:
        """Return the resources of a worker.

        Args:
            size: One of the launcher's own sizes, or one that ``size_for`` has returned.

        Returns:
            The resources. ``None`` means that they are not known, so that tasks cannot ask for
            processors, memory or GPUs.
        """
        return None

    def most_slots(self, size: int) -> int:
        """Return how many tasks a worker of a size may run at once, however small they are."""
        return 256

    def size_for(self, cpus: float, memory: int, gpus: int) -> int:
        """Find the worker size for a task. ``with_options`` calls this, in any thread.

        Args:
            cpus: Processors that the task needs.
            memory: Bytes that the task needs.
            gpus: GPUs that the task needs.

        Returns:
            The number of the smallest size that is large enough, for ``LaunchRequest.size``.

        Raises:
            ConfigError: If no size is large enough; the message names the nearest one.
        """
        raise ConfigError(
            f"tasks cannot ask for cpus, memory or gpus here: {self.describe()} has workers of one "
            f"size, and does not say what they have"
        )

    def size_name(self, size: int) -> str:
        """Describe the resources of a worker of a size in a few words."""
        capacity = self.capacity(size)
        if capacity is None:
            return "the usual size" if not size else f"size {size}"
        name = f"{capacity.cpus:g} CPU{'s' * (capacity.cpus != 1)}"
        if capacity.memory:
            name += f" with {format_bytes(capacity.memory)}"
        if capacity.gpus:
            name += f" and {capacity.gpus} GPU{'s' * (capacity.gpus != 1)}"
        return name

    def more_memory(self, size: int) -> str:
        """Return the settings that give a worker of a size more memory; empty if not known."""
        return ""

    def needs_network(self) -> bool:
        """Return whether workers are on other machines, which cannot use a Unix socket."""
        return False

    async def start(
        self, executor_id: str, listen: str, advertise: str, launch_timeout: float
    ) -> Network:
        """Prepare to launch workers. Called once; if it raises, ``close`` is not called.

        Args:
            executor_id: Id of the executor that uses this launcher from now on.
            listen: The address on which the user wants the executor to listen; empty if not given.
            advertise: The address that the user wants workers to dial; empty if not given.
            launch_timeout: Seconds within which a worker must connect.

        Returns:
            The address on which the executor must listen.

        Raises:
            CloudexecError: If this launcher could not launch any worker.
        """
        if not listen and self.needs_network():
            listen = "127.0.0.1:0"
        return Network(listen, advertise)

    def give_way(self, elsewhere: Callable[[Sequence[str]], int], patience: float | None) -> None:
        """Record, before ``start``, that other launchers could start this launcher's workers.

        The launcher must then end workers that have waited too long for a place, and call their
        ``on_end`` with the reason.

        Args:
            elsewhere: Takes launch ids, and returns how many of these workers other launchers
                could start now.
            patience: Seconds that a worker may wait for a place; ``None`` for as long as a place
                usually takes on the platform.
        """
        return

    def begin(self, slots: int, preload: Sequence[str] | Callable[[], Sequence[str]]) -> None:
        """Prepare the first worker before the executor accepts connections.

        The thread that submits the first task calls this before all other methods. If the executor
        cannot start, it calls ``stand_down``.

        Args:
            slots: Slots that the worker will have; 0 if perhaps no worker is needed.
            preload: Names of modules that the worker is to import before its first task, or a
                function that looks up which modules the tasks will probably import.
        """
        return

    def stand_down(self) -> None:
        """Undo ``begin``, except for workers that were launched since. Any thread may call this."""
        return

    def launch(
        self,
        contact: Contact,
        requests: Sequence[LaunchRequest],
        on_end: Callable[[str, LaunchEnd], None],
    ) -> None:
        """Start workers, all with the same slots and size.

        ``on_end`` is called with the launch id when a worker has ended, or could not be started.

        Raises:
            CloudexecError: If none of the workers can be started.
        """

    def terminate(self, launch_ids: Sequence[str]) -> None:
        """Stop workers at once. Some of them may have ended already."""

    def key_of(self, launch_id: str) -> bytes | None:
        """Return the key of a launch; ``None`` if it has the executor's key."""
        return None

    def launch_of(self, first: str, worker_id: str) -> str:
        """Return the launch of a worker that knows only what its platform calls it.

        Args:
            first: The first launch of its job.
            worker_id: What the platform calls the worker.

        Returns:
            The launch; empty: it is not known yet, and the worker is to come again.
        """
        return first

    def connected(self, launch_id: str, arrival: Arrival) -> None:
        """Record that a worker has connected."""
        return

    def refused(self, launch_id: str, reason: str) -> LaunchEnd:
        """Record that the executor has refused a worker, whose process will now end.

        Returns:
            The end of the launch, as the executor must treat it.
        """
        return LaunchEnd(reason, fatal=True)

    def disconnected(self, launch_id: str, *, orderly: bool, reclaimed: bool) -> None:
        """Record that a worker's session has ended.

        Args:
            launch_id: The worker's launch.
            orderly: Whether the worker was told to end, and has no task left; it exits by itself.
            reclaimed: Whether the platform told it to end.
        """
        return

    def bucket(self) -> tuple[str, str]:
        """Return the S3 bucket for large objects, and its region; empty strings if there is none.

        Called once, after ``start``.
        """
        return "", ""

    def times(self, launch_id: str) -> LaunchTimes | None:
        """Return the known times of a launch."""
        return None

    def pid_of(self, executor_id: str, launch_id: str) -> int:
        """Return the pid of a worker that is a child of this process; 0 if it is none."""
        return 0

    def clean_up(self, launch_id: str, slot_groups: list[int]) -> None:
        """Kill what is left of a worker's process groups, if they are on this machine."""
        return

    def explain(self) -> str:
        """Return why launched workers have not connected; empty if no reason is known."""
        return ""

    def cost(self) -> Cost:
        """Return the cost of the workers so far, and the further cost that is unavoidable."""
        return Cost()

    def counts(self) -> Sequence[LauncherCounts]:
        """Return the counts of each launcher of a ``Fallback``; empty for any other launcher."""
        return ()

    def least_usd(self, requests: Sequence[LaunchRequest]) -> Iterable[float]:
        """Return the least that each of these workers would cost if it were launched now."""
        return [0.0] * len(requests)

    def fingerprint(self) -> str:
        """Return a text that differs if workers would differ: by image, place, variables."""
        return self.describe()

    def hand_over(self) -> dict[str, Any]:
        """Return, as JSON data, what a later process needs to take over the workers.

        Called whenever the data may have changed.
        """
        return {}

    async def take_over(
        self, left: dict[str, Any], on_end: Callable[[str, LaunchEnd], None]
    ) -> Mapping[str, Survivor]:
        """Take over the workers of an earlier process of the same executor, which was killed.

        Called after ``start``, before the first ``launch``.

        Args:
            left: The data that ``hand_over`` returned last in the earlier process.
            on_end: Called when one of these workers has ended, as in ``launch``.

        Returns:
            By launch id, the workers that run or may still start.
        """
        return {}

    async def close(self) -> None:
        """End all workers that still run, and release all resources. Called once, at the end."""
        return

    def describe(self) -> str:
        """Describe in a few words the workers that this launcher starts."""
        return type(self).__name__


for _class in (Cost, LaunchTimes, LauncherCounts, WorkerCapacity):
    _class.__module__ = "cloudexec"
