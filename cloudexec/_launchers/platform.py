"""The interface to a platform that runs workers: five kinds of requests, and their data."""

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
    """The steps through which a platform takes a worker."""

    ACCEPTED = "accepted"
    """The platform knows of the worker, but does not look for a place yet."""
    WAITING = "waiting"
    """The platform looks for a place, such as a machine with free resources."""
    STARTING = "starting"
    """The worker has a place, and costs money from now on."""
    RUNNING = "running"
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Reason:
    """The reason why workers wait or have ended, and what the user can do about it.

    Attributes:
        text: The cause, with the platform's message.
        remedy: What the user can do about it.
        fatal: Whether the problem stays, however long the executor waits or tries again.
        no_room: Whether there is no room for these workers now: the platform has no capacity, or a
            limit is reached. In a ``Fallback``, another launcher then starts the workers that wait.
    """

    text: str
    remedy: str = ""
    fatal: bool = False
    no_room: bool = False

    def __str__(self) -> str:
        return f"{self.text}; {self.remedy}" if self.remedy else self.text


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorInfo:
    """The executor that uses a launcher.

    Attributes:
        id: Its id, which the names or tags of its jobs contain.
        listen: The address on which the user wants the executor to listen, as ``host:port``; empty
            if not given.
        advertise: The address that the user wants workers to dial; empty if not given.
        launch_timeout: Seconds within which a worker must connect.
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
        workers: Number of its workers. Each worker has an index, from 0.
        size: The number of the workers' size, from 0.
        capacity: The resources of a worker; ``None`` if the launcher does not name them.
        spot: Whether the workers run on spare capacity, which the platform may reclaim.
        slots: Number of tasks that each worker runs at once.
        command: A command that starts a worker with this process's Python. A worker image has its
            own command.
        environment: Environment variables that each worker needs, none of them secret.
        secrets: Secret environment variables. They must not be part of a command line, which other
            users of a machine can read. Empty if workers have a key already (``Site.key``).
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
        """Return all variables of one worker, for a platform that starts each worker on its own.

        Args:
            index: The worker's index, from 0.
        """
        return {**self.environment, **self.secrets, "CLOUDEXEC_INDEX": str(index)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitted:
    """A job that the platform has accepted.

    Attributes:
        job_id: The platform's id for the job.
        worker_ids: The platform's id for each worker, by index. If this is empty, the id of a
            worker is ``job_id``, followed by ``:index`` if the job has several workers.
        shortfall: Number of workers that the platform did not accept: those with the highest
            indexes.
    """

    job_id: str
    worker_ids: Sequence[str] = ()
    shortfall: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerEnd:
    """How one run of a worker ended.

    Attributes:
        reason: The cause: the exit code or signal, the platform's message, the last lines that the
            worker printed.
        killed: Whether another process or the platform killed the worker.
        reclaimed: Whether the platform took the worker's machine back.
        out_of_memory: Whether the whole worker was killed because it ran out of memory.
        began_at: Unix time from which the run cost money; ``None`` if it is not known.
        ended_at: Unix time of the end; ``None`` if it is not known.
        details: Any object that the platform needs in its ``Platform.explain``.
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
        phase: Its phase.
        reason: The platform's message about the worker while it waits.
        ends: The ends of its runs, the oldest first. If there are some and the phase is not
            ``ENDED``, the platform has started the worker again, or will.
    """

    phase: Phase
    reason: str = ""
    ends: Sequence[WorkerEnd] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """What the platform says of one job.

    Attributes:
        workers: The status of workers, by index. It must contain all workers that have ended,
            except for those in ``Inspection.settled``.
        counts: Number of workers in each phase. By default, ``workers`` is counted, which then
            must contain all workers.
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
    """A request for the status of a job. All attributes but the id only help to save work.

    Attributes:
        job_id: The platform's id for the job.
        workers: Number of its workers.
        settled: Indexes of workers that are known to have ended; their status is not needed.
        connected: Indexes of workers that are connected; the causes of their ends are not needed.
        known_ends: By index, how many ends of a worker are known already; 0 for other workers.
        wanted: Indexes of workers whose status must be looked up.
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
        """Return whether the executor needs the cause of the end of a worker's last run.

        Args:
            index: The worker's index.
            ends: How many of its runs have ended.
            over: Whether the platform will not start it again.
        """
        if self.survey or index in self.settled or index in self.connected:
            return False
        return over or ends > self.known_ends.get(index, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Workers of one job that the platform must end.

    Attributes:
        job_id: The platform's id for the job.
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
        job_id: The platform's id for the job.
        size: The number of its workers' size.
        spot: Whether the workers run on spare capacity.
        counts: Number of workers in each phase.
        connected: Number of workers that are connected.
        reason: The platform's message about the job, or about a worker that waits.
    """

    job_id: str
    size: int = 0
    spot: bool = False
    counts: Mapping[Phase, int] = field(default_factory=dict)
    connected: int = 0
    reason: str = ""


class Platform(ABC):
    """A system that runs workers: a cloud, a cluster's queue, or machines with a login.

    Its methods are called on the executor's event loop, which they must not block: slow calls that
    block belong into ``asyncio.to_thread``. Each method may raise a ``PlatformError``. If the error
    is ``transient``, the request is made again later.
    """

    name: str = "the platform"
    """Its name in messages."""
    most_workers: int | None = None
    """Largest number of workers in one job; ``None`` for no limit."""
    stop_seconds: float = 30.0
    """Seconds for which a worker may still run, and cost money, after ``terminate`` at the most."""
    stop_hint: str = ""
    """What a user can do to end workers if ``terminate`` fails, as a sentence without a full stop,
    such as "`scancel --name x` ends them"."""

    @abstractmethod
    async def submit(self, request: JobRequest) -> Submitted:
        """Submit a job, without any repetition.

        Raises:
            PlatformError: If the platform did not accept the job. If the error is ``transient``,
                the submission is repeated. If it is ``uncertain``, as the platform may have
                accepted the job, ``find`` is called first.
            CloudexecError: If the settings of the launcher make it impossible.
        """

    @abstractmethod
    async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
        """Return the status of jobs.

        Returns:
            The status of each job by its id. A job that the platform does not know is left out: it
            counts as ended if the inspection is a ``survey``, and is inspected again otherwise.
        """

    @abstractmethod
    async def find(self, name: str, *, spot: bool) -> Submitted | None:
        """Return a job whose submission was not answered; ``None`` if the platform has no such job.

        Args:
            name: The name, as in the request.
            spot: Whether it runs on spare capacity, as in the request.
        """

    @abstractmethod
    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        """End workers at once, even if they still wait. Some may have ended already.

        Args:
            targets: The workers.
            reason: The reason, for people.

        Raises:
            PlatformError: If some workers could not be ended. If the error is ``transient``, the
                request is repeated for all targets.
        """

    @abstractmethod
    async def explain(
        self, waiting: Sequence[WaitingJob], ends: Sequence[WorkerEnd]
    ) -> Reason | None:
        """Return why workers have not connected; ``None`` if no problem is known.

        If the same reason is ``fatal`` twice in a row, and no worker has ended before it connected,
        the workers that wait are given up.

        Args:
            waiting: Jobs whose workers have not all connected, the oldest first; at least one. The
                other jobs whose workers have a place follow.
            ends: The ends of workers that never connected, the newest last.
        """

    async def prepare(self) -> None:
        """Prepare the platform for jobs; called before each submission.

        It is cancelled when the executor shuts down. ``submit`` is not cancelled but given some
        seconds, so that the job that it submits is known and can be ended.

        Raises:
            PlatformError: As in ``submit``.
            CloudexecError: As in ``submit``.
        """
        return

    def spot_patience(self, workers: int) -> float:
        """Return the seconds in which workers find a place if the platform has capacity.

        With ``spot="prefer"``, workers that wait longer for spare capacity are launched on demand.
        In a ``Fallback``, workers that wait longer are started by the next launcher.

        Args:
            workers: Number of workers that wait for a place at the same time.
        """
        return 60.0

    def lacks_capacity(self, reason: str) -> bool:
        """Return whether the platform's message about a job says that there is no capacity.

        With ``spot="prefer"``, workers that wait are then launched on demand at once, and in a
        ``Fallback`` by the next launcher.

        Args:
            reason: The message, as in ``JobStatus`` or ``WorkerStatus``.
        """
        return False

    async def is_full(self, jobs: Sequence[WaitingJob]) -> bool:
        """Return whether workers wait because the executor's other workers use up a limit.

        With ``spot="prefer"``, the workers then go on to wait, as there is spare capacity.

        Args:
            jobs: All jobs of the executor on spare capacity that have not ended.
        """
        return False

    def price(self, size: int, spot: bool) -> WorkerPrice | None:
        """Return the price of a worker; ``None`` if it costs nothing.

        Args:
            size: The number of the worker's size.
            spot: Whether it runs on spare capacity.
        """
        return None

    def overhead(self) -> Cost:
        """Return the cost of everything except workers, such as a relay."""
        return Cost()


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """A platform to which a launcher is connected, and how its workers reach the executor.

    Attributes:
        platform: The platform.
        listen: Address on which the executor listens, as ``host:port``, where port 0 means any free
            port. Empty for the address that the user gives, or else ``127.0.0.1:0``.
        advertise: The host, or ``host:port``, that workers dial. Empty for the address that the
            user gives, or else the address on which the executor listens.
        key: The key that workers have already, from a store of secrets; empty if each job is to
            get its own key.
        bucket: The S3 bucket for large objects; empty if there is none.
        region: The bucket's region.
        relay: ``host:port`` of a relay that this process and workers dial, and that knows ``key``,
            or ``ssh://user@host`` of a host whose OpenSSH forwards a port; empty if workers dial
            this process.
        moving: The same relay, if the launcher starts it, and may start another one elsewhere.
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
