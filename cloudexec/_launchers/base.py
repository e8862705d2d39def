"""The protocol between the executor and whatever starts its workers."""

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
        reason: For people: exit code or signal, the platform's words, the last lines it printed.
        killed: Whether it was killed from outside.
        fatal: Whether trying again cannot help.
        reclaimed: Whether its platform took it back, as with a Spot interruption.
        out_of_memory: Whether it was killed as a whole for want of memory.
        relaunched: Whether its platform starts it again, under the same launch.
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
        size: As in ``LaunchRequest.size``.
        running: Whether it is there, rather than waits for a place.
    """

    size: int
    running: bool


@record
class Contact:
    """What a worker must know to dial back.

    Attributes:
        target: ``plain:/path`` of a socket, or a gRPC target: ``unix:/path`` or ``host:port``.
        executor_id: Which executor.
        key: Shared secret of the enrolment.
        certificate_sha256: Fingerprint to pin, in hex; empty for a Unix socket.
        relay: ``host:port`` of the relay that leads to the target; empty: it is dialed itself.
        others: Where there are several ways in (``Network.others``), what workers must know to take
            each of them, in the same order; or why they cannot.
    """

    target: str
    executor_id: str
    key: bytes
    certificate_sha256: str = ""
    relay: str = ""
    others: tuple[Contact | CloudexecError, ...] = ()

    @property
    def hash_seed(self) -> str:
        """``PYTHONHASHSEED`` of all workers: sets are in the same order in each of them."""
        return str(zlib.crc32(self.executor_id.encode()))

    def __repr__(self) -> str:
        return f"Contact(target={self.target!r}, executor_id={self.executor_id!r})"


@record
class LaunchRequest:
    """One worker to start.

    Attributes:
        launch_id: Its number, as a string; those of one request count up by one.
        slots: Tasks that it is to run at once.
        size: Which of the launcher's sizes, from 0: one of its own, or one that ``size_for`` named.
    """

    launch_id: str
    slots: int
    size: int = 0


class MovingRelay(Protocol):
    """A relay whose address changes when its launcher has to start another one.

    Attributes:
        address: Its ``host:port`` now.
        url: Where workers read what the address is now.
        on_move: Is called with the new address.
        is_used: Whether the executor has started, and taken over the workers that come through it.
    """

    address: str
    url: str
    on_move: Callable[[str], None]
    is_used: bool


@record
class Network:
    """Where the executor listens for workers.

    Attributes:
        listen: ``host:port`` (port 0: any free one); empty: a private Unix socket.
        advertise: Host, or ``host:port``, that workers dial; empty: the one listened on.
        key: Secret that workers have already; empty: the executor makes one up.
        relay: ``host:port`` of a relay that both sides dial, and that knows the same secret; empty:
            workers dial this process.
        moving: That relay, if its launcher has started it and may do so again elsewhere.
        others: The ways in of several launchers, each with its own address, key and relay. Then
            nothing but ``listen`` counts here, and nothing but that does not count there.
    """

    listen: str = ""
    advertise: str = ""
    key: bytes = b""
    relay: str = ""
    moving: MovingRelay | None = None
    others: tuple[Network, ...] = ()

    @property
    def is_relayed(self) -> bool:
        """Whether all workers come through a relay, so that none of them dials this process."""
        return all(each.relay for each in self.others or (self,))

    def __repr__(self) -> str:
        return f"Network(listen={self.listen!r}, advertise={self.advertise!r})"


@record
class Arrival:
    """What a worker said of its own start when it dialed back.

    Attributes:
        job_id: Its platform's name for it.
        attempt: Which run of the launch this is, from 1.
        boot: Seconds from the start of its process to its first message.
        pull: Seconds that its image took to arrive; ``None``: unknown.
    """

    job_id: str = ""
    attempt: int = 1
    boot: float | None = None
    pull: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchTimes:
    """Where the time went between asking for a worker and its first result, in seconds.

    ``None`` where it has not happened yet or cannot be known.
    """

    launch: str
    """Number of the launch."""
    worker_id: str = ""
    job_id: str = ""
    launcher: str = ""
    """Which launcher of a ``Fallback`` it is; empty: there is only one."""
    instead_of: str = ""
    """Which launchers before that one could not start it, and why; empty: there were none."""
    api: float | None = None
    """Until the platform had accepted the request."""
    place: float | None = None
    """Until a place was found and the container was being started."""
    pull: float | None = None
    """Fetching the image."""
    boot: float | None = None
    """From the start of the process to its first message."""
    dial_in: float | None = None
    """Enrolment."""
    first_task: float | None = None
    """From then to the first result."""
    total: float | None = None
    """All of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What an executor's workers cost, estimated from list prices."""

    accrued_usd: float = 0.0
    """For the time that workers have run."""
    committed_usd: float = 0.0
    """What it takes at least to let those that run or start now come to their end."""
    per_hour_usd: float = 0.0
    """At the rate of the workers that run now."""
    note: str = ""
    """What the estimate rests on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherCounts:
    """What one launcher of a ``Fallback`` has done."""

    launcher: str
    """Its name."""
    launched: int = 0
    """Workers that were requested from it."""
    connected: int = 0
    """Those of them that have connected."""
    active: int = 0
    """Those of them that have not ended."""
    passed_on: int = 0
    """Those that it could not start, and that were requested from another launcher then."""
    cost_usd: float = 0.0
    """What its workers have cost, in USD, estimated from list prices."""
    why: str = ""
    """Why it could not start workers the last time; empty: it has not failed, or workers have
    connected after the time in which others were preferred."""
    is_passed_over: bool = False
    """Whether new workers are requested from other launchers now, for that reason."""

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

    Derive from it: what a launcher does not need has a default.
    """

    launch_timeout: float = 60.0
    """Seconds in which a worker must have dialed back, unless the executor was told."""
    reconnect_grace: float = 30.0
    """Seconds for which a worker whose connection was cut is waited for, unless the executor was
    told."""
    linger: float = 0.0
    """Seconds to wait for more workers to be asked for, so that one request serves them all."""
    last_words: float = 0.1
    """Seconds, after a worker's connection was lost, in which ``on_end`` may say why."""
    ends_are_seen: bool = True
    """Whether ``on_end`` is called for every launch, soon: the executor waits for that."""
    modules: bool | Sequence[str] = True
    """Where workers are on other machines: whether the user's own modules, those that are imported
    and not installed, are sent along; or the top-level names of those that are."""
    size_count: int = 1
    """Sizes of worker that it can start; a task lost to memory goes to the next one."""
    own_processes: bool = False
    """Whether all workers are processes of this machine that it starts itself, so that a plain
    socket will do in place of gRPC."""
    one_machine: bool = False
    """Whether all workers are on one machine, and share what ``capacity(0)`` says."""

    def slots_per_worker(self, max_workers: int) -> int:
        """Say how many slots one worker has, of ``max_workers`` in all."""
        return 1

    def capacity(self, size: int) -> WorkerCapacity | None:
        """Say what a worker of a size has: one of its own, or one that ``size_for`` named.

        ``None``: that is not known, and tasks cannot ask for processors, memory or GPUs.
        """
        return None

    def most_slots(self, size: int) -> int:
        """Say how many tasks a worker of a size may run at once, however small they are."""
        return 256

    def size_for(self, cpus: float, memory: int, gpus: int) -> int:
        """Find the size of worker for a task; called in any thread, whenever a view is made.

        Args:
            cpus: Processors that it needs.
            memory: Bytes that it needs.
            gpus: GPUs that it needs.

        Returns:
            A number for ``LaunchRequest.size``: that of the smallest size that will do.

        Raises:
            ConfigError: If there is none; it names the nearest.
        """
        raise ConfigError(
            f"tasks cannot ask for cpus, memory or gpus here: {self.describe()} has workers of one "
            f"size, and does not say what they have"
        )

    def size_name(self, size: int) -> str:
        """Say in a few words what a worker of a size has."""
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
        """Say which settings give a worker of a size more memory; empty: nobody knows."""
        return ""

    def needs_network(self) -> bool:
        """Say whether workers are elsewhere, so that a Unix socket will not do."""
        return False

    async def start(
        self, executor_id: str, listen: str, advertise: str, launch_timeout: float
    ) -> Network:
        """Prepare; called once, before anything else. If it raises, ``close`` is not called.

        Args:
            executor_id: Whose launcher this now is.
            listen: What the user wants to be listened on, or an empty string.
            advertise: What the user wants workers to dial, or an empty string.
            launch_timeout: Seconds in which a worker has to dial back.

        Raises:
            CloudexecError: If nothing could be launched.
        """
        if not listen and self.needs_network():
            listen = "127.0.0.1:0"
        return Network(listen, advertise)

    def give_way(self, elsewhere: Callable[[Sequence[str]], int], patience: float | None) -> None:
        """Take note that workers could be started elsewhere, before ``start``.

        Workers that wait in vain for a place are then to be ended by the launcher itself, which
        calls their ``on_end`` with the reason.

        Args:
            elsewhere: Says how many of these launches could be started elsewhere now.
            patience: Seconds after which a worker without a place waits in vain; ``None``: as long
                as the platform usually takes.
        """
        return

    def begin(self, slots: int, preload: Sequence[str] | Callable[[], Sequence[str]]) -> None:
        """Do what can be done for the first worker before the executor can be reached.

        Called by the thread whose task is the first, before anything else; ``stand_down`` follows
        if the executor could not start.

        Args:
            slots: That the worker will have; 0: perhaps none is needed.
            preload: The names of modules that its tasks are to find imported, or what looks up
                which they will probably import.
        """
        return

    def stand_down(self) -> None:
        """Undo what ``begin`` did, as far as no worker has come of it; any thread may ask."""
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
            CloudexecError: If none of them can be started.
        """

    def terminate(self, launch_ids: Sequence[str]) -> None:
        """Stop workers at once, those of one decision together; some may have ended."""

    def key_of(self, launch_id: str) -> bytes | None:
        """Return the key that this launch has; ``None``: the executor's."""
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
        """A worker has dialed back."""
        return

    def refused(self, launch_id: str, reason: str) -> LaunchEnd:
        """A worker has dialed back and does not fit; the end of its process follows.

        Returns:
            What the executor is to make of that.
        """
        return LaunchEnd(reason, fatal=True)

    def disconnected(self, launch_id: str, *, orderly: bool, reclaimed: bool) -> None:
        """A worker's session ended.

        Args:
            launch_id: Which.
            orderly: It was told to, and had nothing left to do: it ends by itself.
            reclaimed: It was its platform that told it to.
        """
        return

    def bucket(self) -> tuple[str, str]:
        """Say through which S3 bucket large objects may go, and its region; empty: through none.

        Asked once, after ``start``.
        """
        return "", ""

    def times(self, launch_id: str) -> LaunchTimes | None:
        """Say what is known of how a launch went."""
        return None

    def pid_of(self, executor_id: str, launch_id: str) -> int:
        """Return the process of a launch, where this process has started it; 0: it has not."""
        return 0

    def clean_up(self, launch_id: str, slot_groups: list[int]) -> None:
        """End what is left of a worker's process groups, if they are on this machine."""
        return

    def explain(self) -> str:
        """Say why workers that were asked for are not there; empty: nothing is known."""
        return ""

    def cost(self) -> Cost:
        """Say what the workers have cost, and will at least."""
        return Cost()

    def counts(self) -> Sequence[LauncherCounts]:
        """Say what each of several launchers has done; empty: there is only one."""
        return ()

    def least_usd(self, requests: Sequence[LaunchRequest]) -> Iterable[float]:
        """Say what each of these workers would cost at least, were they launched now."""
        return [0.0] * len(requests)

    def fingerprint(self) -> str:
        """Return what tells its workers from those of another one: image, place, variables..."""
        return self.describe()

    def hand_over(self) -> dict[str, Any]:
        """Return what a later process needs to know of what was launched here, as JSON has it.

        Called whenever that may have changed.
        """
        return {}

    async def take_over(
        self, left: dict[str, Any], on_end: Callable[[str, LaunchEnd], None]
    ) -> Mapping[str, Survivor]:
        """Take over what an earlier process of the same executor launched, which was killed.

        Called after ``start``, before anything is launched.

        Args:
            left: What its ``hand_over`` returned at last.
            on_end: As of ``launch``.

        Returns:
            By launch id, the workers that are there or may come.
        """
        return {}

    async def close(self) -> None:
        """End whatever still runs, and let go of everything; called once, at the end."""
        return

    def describe(self) -> str:
        """Say in a few words what this launches."""
        return type(self).__name__


for _class in (Cost, LaunchTimes, LauncherCounts, WorkerCapacity):
    _class.__module__ = "cloudexec"
