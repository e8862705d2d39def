"""What a launcher has to know of the platform that runs its workers: five requests to it."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from cloudexec._config import WorkerCapacity
from cloudexec._launchers.base import Cost, MovingRelay
from cloudexec._pricing import WorkerPrice

__all__ = [
    "ExecutorInfo",
    "Inspection",
    "JobRequest",
    "JobStatus",
    "Phase",
    "Platform",
    "Reason",
    "Site",
    "Submitted",
    "Target",
    "WaitingJob",
    "WorkerEnd",
    "WorkerStatus",
]


class Phase(Enum):
    """How far the platform has got with a worker."""

    ACCEPTED = "accepted"
    """It knows of the worker, and does not look for a place yet."""
    WAITING = "waiting"
    """It looks for a place."""
    STARTING = "starting"
    """There is a place, and the worker costs money from now on."""
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Reason:
    """Why something is as it is, and what to do about it.

    Attributes:
        text: What happened, with the platform's own words.
        remedy: What the user can do about it.
        fatal: Whether trying again, or waiting, cannot help.
        no_room: Whether there is no room for these workers now: the platform has no capacity, or a
            limit is reached. Workers that wait are then started elsewhere, if there is a
            ``Fallback``.
    """

    text: str
    remedy: str = ""
    fatal: bool = False
    no_room: bool = False

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorInfo:
    """The executor that a launcher is to serve.

    Attributes:
        id: Its id, by which people tell its jobs from those of others.
        listen: What the user wants to be listened on, as ``host:port``; empty: nothing special.
        advertise: What the user wants workers to dial; empty: nothing special.
        launch_timeout: Seconds in which a worker has to dial back.
    """

    id: str
    listen: str = ""
    advertise: str = ""
    launch_timeout: float = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRequest:
    """A job to submit: one or more workers that are alike.

    Attributes:
        name: A name that no other job has, by which ``Platform.find`` finds it.
        workers: How many workers it has. Each of them is known by its index, from 0.
        size: Which of the launcher's sizes they have.
        capacity: What a worker of this size has; ``None``: the launcher does not say.
        spot: Whether they run on spare capacity, which the platform may take back.
        slots: How many tasks each of them runs at once.
        command: What starts a worker with this Python. An image of workers has its own command.
        environment: Variables that each worker needs, none of them secret.
        secrets: Variables that nobody else must see: no part of a command line, as other users of
            a machine can read these. Empty where ``Site.key`` says that workers have a key.
    """

    name: str
    workers: int
    size: int = 0
    capacity: WorkerCapacity | None = None
    spot: bool = False
    slots: int = 1
    command: tuple[str, ...] = (sys.executable, "-m", "cloudexec.worker")
    environment: Mapping[str, str] = field(default_factory=dict)
    secrets: Mapping[str, str] = field(default_factory=dict, repr=False)

    def environment_of(self, index: int) -> dict[str, str]:
        """Return all variables of one worker, for a platform that starts each of them by itself.

        Args:
            index: Which worker, from 0.
        """
        return {**self.environment, **self.secrets, "CLOUDEXEC_INDEX": str(index)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A job that the platform has taken.

    Attributes:
        job_id: What the platform calls it.
        worker_ids: What the platform calls each worker, by index. If this is empty, a worker is
            called after its job, with ``:index`` at the end if the job has several.
        shortfall: How many workers, those with the highest indexes, the platform did not take.
    """

    job_id: str
    worker_ids: Sequence[str] = ()
    shortfall: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEnd:
    """How one run of a worker ended.

    Attributes:
        reason: Why: the exit code or signal, the platform's words, the last lines that it printed.
        killed: Whether it was killed from outside.
        reclaimed: Whether the platform took its machine back.
        out_of_memory: Whether it was killed as a whole for want of memory.
        began_at: When it began to cost money, Unix time; ``None``: not known.
        ended_at: When it ended, Unix time; ``None``: not known.
        details: What the platform likes to find here again in ``Platform.explain``.
    """

    reason: Reason = Reason("it ended")
    killed: bool = False
    reclaimed: bool = False
    out_of_memory: bool = False
    began_at: float | None = None
    ended_at: float | None = None
    details: Any = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """What the platform says of one worker.

    Attributes:
        phase: How far it is.
        reason: What the platform says of it while it waits.
        ends: How its runs ended, the oldest first. A worker that is not ``ENDED`` and has some is
            started again by the platform.
    """

    phase: Phase
    reason: str = ""
    ends: Sequence[WorkerEnd] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """What the platform says of one job.

    Attributes:
        workers: The workers that it says something of, by index: at least those that have ended,
            but for those that ``Inspection.settled`` names.
        counts: How many workers are in which phase; by default as ``workers`` says, which then has
            to name all of them.
        reason: What the platform says of the job while it waits.
        worker_ids: What the platform calls each worker, by index, if it knows more of them than
            ``Submitted`` said; empty: nothing new. A worker without a name yet has an empty one.
        price: What each of its workers costs on average, if that depends on the machines that they
            were given; ``None``: as ``Platform.price`` says.
    """

    workers: Mapping[int, WorkerStatus] = field(default_factory=dict)
    counts: Mapping[Phase, int] = field(default_factory=dict)
    reason: str = ""
    worker_ids: Sequence[str] = ()
    price: WorkerPrice | None = None

    def __post_init__(self) -> None:
        if not self.counts:
            counts = Counter(worker.phase for worker in self.workers.values())
            object.__setattr__(self, "counts", counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A job to be looked at. All but its id only spares work to platforms with many workers.

    Attributes:
        job_id: Which job.
        workers: How many workers it has.
        settled: Workers of which nothing more is wanted: they have ended.
        connected: Workers that are connected: why one of them ends is not asked.
        known_ends: How many ends of a worker are known already, by index; 0 if it is not in here.
        wanted: Workers of which as much is wanted as there is to be had.
        survey: Whether a process takes the job over from one that was killed: the phase of every
            worker is wanted, and of none why it ended.
        worker_ids: What the platform calls each worker, by index, as ``Submitted`` or ``JobStatus``
            said last, maybe to an earlier process.
    """

    job_id: str
    workers: int = 1
    settled: Collection[int] = ()
    connected: Collection[int] = ()
    known_ends: Mapping[int, int] = field(default_factory=dict)
    wanted: Sequence[int] = ()
    survey: bool = False
    worker_ids: Sequence[str] = ()

    def asks_why(self, index: int, ends: int, *, over: bool) -> bool:
        """Say whether it is worth while to look up why the last run of a worker ended.

        Args:
            index: Which worker.
            ends: How many of its runs have ended.
            over: Whether the platform starts no other.
        """
        if self.survey or index in self.settled or index in self.connected:
            return False
        return over or ends > self.known_ends.get(index, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What is to be ended.

    Attributes:
        job_id: A job.
        workers: Some of its workers, by index; ``None``: all of it.
        worker_ids: As in ``Inspection``.
    """

    job_id: str
    workers: Sequence[int] | None = None
    worker_ids: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingJob:
    """A job with workers that have not connected yet.

    Attributes:
        job_id: What the platform calls it.
        size: Which of the launcher's sizes its workers have.
        spot: Whether they run on spare capacity.
        counts: How many workers are in which phase.
        connected: How many of those that run are connected.
        reason: What the platform has said of the job, or of a worker that waits.
    """

    job_id: str
    size: int = 0
    spot: bool = False
    counts: Mapping[Phase, int] = field(default_factory=dict)
    connected: int = 0
    reason: str = ""


class Platform(ABC):
    """What runs the workers: a cloud, a cluster's queue, machines that one can log in to.

    Its methods are called on the event loop of an executor and must not block it: what takes more
    than a moment belongs into ``asyncio.to_thread``. Each may raise a ``PlatformError``. If it is
    ``transient``, the request is made again later.
    """

    name: str = "the platform"
    """What people call it."""
    most_workers: int | None = None
    """How many workers one job may have at most; ``None``: any number."""
    stop_seconds: float = 30.0
    """Seconds for which a worker may still run, and cost, after ``terminate`` at the most."""
    stop_hint: str = ""
    """What a user can do to end workers if the platform did not do so: a whole sentence's end,
    such as "`scancel --name x` ends them"."""

    @abstractmethod
    async def submit(self, request: JobRequest) -> Submitted:
        """Submit a job, once.

        Raises:
            PlatformError: If the platform did not take it. ``transient``: it is tried again.
                ``uncertain``: the platform may have taken it; ``find`` is called before the next
                try.
            CloudexecError: If the settings of the launcher make it impossible.
        """

    @abstractmethod
    async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
        """Say how jobs are.

        Returns:
            The status of each job by its id, without those that the platform does not know. Those
            count as ended if a process takes over, and are looked at again otherwise.
        """

    @abstractmethod
    async def find(self, name: str, *, spot: bool) -> Submitted | None:
        """Find a job of whose submission no answer came; ``None``: there is none.

        Args:
            name: As in the request.
            spot: As in the request.
        """

    @abstractmethod
    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        """End workers at once, also those that still wait. Some may have ended already.

        Args:
            targets: Which.
            reason: Why, for people.

        Raises:
            PlatformError: If some could not be ended. ``transient``: all of it is tried again.
        """

    @abstractmethod
    async def explain(
        self, waiting: Sequence[WaitingJob], ends: Sequence[WorkerEnd]
    ) -> Reason | None:
        """Say why workers do not come; ``None``: nothing is known to be wrong.

        If the same reason is ``fatal`` twice in a row, and no worker has ended before it connected,
        the workers that wait are given up.

        Args:
            waiting: Jobs whose workers have not all connected, the oldest first; one at least. The
                other jobs whose workers have a place follow.
            ends: How workers ended that never connected, the newest last.
        """

    async def prepare(self) -> None:
        """Do what must be done before a job can be submitted; called before each submission.

        It is interrupted when the executor shuts down. ``submit`` has some seconds then, as what it
        has submitted is to be ended.

        Raises:
            PlatformError: As of ``submit``.
            CloudexecError: As of ``submit``.
        """
        return

    def spot_patience(self, workers: int) -> float:
        """Say in how many seconds so many workers find a place, if there is any for them.

        With ``spot="prefer"``, those that still wait for spare capacity after that are launched on
        demand. In a ``Fallback``, those that still wait are started by the next launcher.

        Args:
            workers: How many look for a place at the same time.
        """
        return 60.0

    def lacks_capacity(self, reason: str) -> bool:
        """Say whether there is no capacity where a job waits, by what the platform says of it.

        With ``spot="prefer"``, workers that wait are then launched on demand at once, and in a
        ``Fallback`` by the next launcher.

        Args:
            reason: As in ``JobStatus`` or ``WorkerStatus``.
        """
        return False

    async def is_full(self, jobs: Sequence[WaitingJob]) -> bool:
        """Say whether workers wait since those of the same executor use up what they may have.

        With ``spot="prefer"``, they then wait on: there is spare capacity.

        Args:
            jobs: All jobs of the executor on spare capacity that have not ended.
        """
        return False

    def price(self, size: int, spot: bool) -> WorkerPrice | None:
        """Say what a worker of a size costs; ``None``: nothing.

        Args:
            size: Which of the launcher's sizes.
            spot: Whether it runs on spare capacity.
        """
        return None

    def overhead(self) -> Cost:
        """Say what there is to pay besides workers."""
        return Cost()


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A platform that one is connected to, and where the executor is to be found from there.

    Attributes:
        platform: The platform.
        listen: Where the executor listens, as ``host:port``; port 0: any free one. Empty: what the
            user says, or else all addresses of this machine.
        advertise: The host, or ``host:port``, that workers dial; empty: what the user says, or else
            the address that is listened on.
        key: The key that workers have already, from a store of secrets; empty: each job is given
            one of its own.
        bucket: The S3 bucket through which large objects may go; empty: none.
        region: The bucket's region.
        relay: ``host:port`` of a relay that this process and workers dial, and that knows ``key``,
            or ``ssh://user@host``, whose OpenSSH forwards a port; empty: workers dial this process.
        moving: That relay, if it is one that the launcher starts, and starts again elsewhere.
    """

    platform: Platform
    listen: str = ""
    advertise: str = ""
    key: bytes = field(default=b"", repr=False)
    bucket: str = ""
    region: str = ""
    relay: str = ""
    moving: MovingRelay | None = None


for _name in __all__:
    globals()[_name].__module__ = "cloudexec.launchers"
WorkerPrice.__module__ = "cloudexec.launchers"
