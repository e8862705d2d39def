"""What has the machines of runs: a class for each value of ``--on``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from importlib import import_module
from types import MappingProxyType
from typing import Protocol

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.limits import WorkerSize
from cloudexec._aws.profile import Profile
from cloudexec._errors import AwsError, ConfigError
from cloudexec._pricing import WorkerPrice
from cloudexec._runs.known import Known
from cloudexec._runs.plan import RunPlan

__all__ = [
    "Machine",
    "MachineRequest",
    "MachineState",
    "Place",
    "StillRunning",
    "has_place",
    "place_named",
    "place_names",
]

_NONE: Mapping[str, Known] = MappingProxyType({})
_PLACES: Mapping[str, str] = {
    "batch": "cloudexec._runs.on_batch:OnBatch",
    "ec2": "cloudexec._runs.on_ec2:OnEc2",
    "fargate": "cloudexec._runs.on_fargate:OnFargate",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineRequest:
    """What machine is wanted."""

    cpus: float = 1.0
    memory_mib: int | None = None
    """``None``: 2 GiB for each processor, or a little more."""
    gpus: int = 0
    disk_gib: int | None = None
    """``None``: what the place gives without being asked."""
    arch: str = "x86_64"
    """``"x86_64"`` or ``"arm64"``."""
    spot: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """A machine that a place has, of the least size that is enough."""

    size: WorkerSize
    compute: str
    """What kind of machine it is, in the place's words, such as ``"fargate"``."""
    price: WorkerPrice
    disk_gib: int | None = None
    """``None``: what the place gives without being asked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineState:
    """What a place says of the machine of a run."""

    job_id: str
    phase: str
    """``"waiting"``, ``"starting"``, ``"running"`` or ``"ended"``."""
    created_at: datetime
    started_at: datetime | None = None
    stopped_at: datetime | None = None
    exit_code: int | None = None
    """Of the last attempt; ``None``: it had none."""
    reason: str = ""
    """Why it waits, or how it ended; empty while there is nothing to say."""
    was_stopped: bool = False
    """Whether somebody ended it."""
    streams: Sequence[tuple[int, str]] = ()
    """Number and log stream of each attempt that has one, in order."""
    log_group: str = ""
    attempts: int = 0
    """Attempts that have ended."""
    run_seconds: float = 0.0
    """Of all attempts, up to now."""
    cost_usd: float = 0.0
    """Of the machine, up to now."""
    workers_usd: float = 0.0
    """Of workers that executors in it have started, up to now."""
    workers: int = 0
    """Jobs of such executors that have not ended."""
    is_estimate: bool = False
    was_reclaimed: bool = False
    """Whether AWS took it back, so that another attempt may follow."""
    is_remembered: bool = False
    """Whether this comes from the bucket, as the place has forgotten the machine."""
    known: Known = field(default_factory=Known)
    """What the bucket has of the jobs of the run, with what was seen now."""


class StillRunning(AwsError):
    """An interrupted start has asked for a machine, and it could not be ended."""

    @classmethod
    def of(cls, job_id: str, exc: AwsError) -> StillRunning:
        """Say which job could not be ended, and why."""
        text = f"its job {job_id} runs, and could not be ended: {exc.message}"
        return cls(text, code=exc.code, operation=exc.operation)


class Place(Protocol):
    """Has machines for runs, in one account and region.

    Each method may raise ``AwsError`` if AWS refuses, or cannot be reached.

    Attributes:
        title: What people call it.
        tries_again: Whether it starts another attempt itself if it takes a machine back. Otherwise
            the machine does so when it is told to stop, and each attempt has a job of its own.
        remembers: Seconds for which it knows a machine that has ended. After that, only the bucket
            says how it ended.
        launcher: Name of the launcher of an executor in the run that is to use the profile, and
            says no more; empty: ``Batch()``, as everywhere.
    """

    title: str
    launcher: str
    tries_again: bool
    remembers: float

    def choose(self, request: MachineRequest) -> Machine:
        """Return the least machine that is enough.

        Raises:
            ConfigError: If there is none, or the profile does not provide it.
        """

    async def start(self, plan: RunPlan, variables: Mapping[str, str], *, attempt: int = 1) -> str:
        """Start a machine that runs the image with some variables; once, whatever happens.

        It ends after ``plan.max_seconds``, by the place or by itself. If this is cancelled, a
        machine that it has asked for is ended first.

        Args:
            plan: What is to be run.
            variables: Of the machine's environment.
            attempt: Its number; only the first one where the place itself ``tries_again``.

        Returns:
            The ``job_id`` of the machine.

        Raises:
            StillRunning: If this was cancelled, and the machine could not be ended.
        """

    async def find(
        self, plans: Sequence[RunPlan], known: Mapping[str, Known] = _NONE
    ) -> dict[str, MachineState]:
        """Say how the machines of runs are, by the runs' names.

        Machines that it does not know are left out, and those of earlier starts of the same name.

        Args:
            plans: Of the runs.
            known: What the bucket has of their jobs, by the runs' names. Machines that it names
                are found also where the place does not list them yet.
        """

    async def look(self, plan: RunPlan, state: MachineState) -> MachineState:
        """Look again at a machine that was found, with one request; not at workers."""

    async def why(self, plan: RunPlan, state: MachineState) -> str:
        """Say why a machine waits, or how it ended, in words for people."""

    async def stop(
        self, name: str, reason: str, job_id: str = "", *, workers_only: bool = False
    ) -> int:
        """End the machine of a run, and the workers of executors in it, or only these.

        Args:
            name: Of the run.
            reason: What the place is to say of them.
            job_id: Its machine, if it is known: the place may not list it yet.
            workers_only: Whether the machine is left alone.

        Returns:
            How many jobs were ended.
        """

    async def end(self, job_id: str, reason: str) -> None:
        """End one machine, and nothing else."""


def place_names() -> list[str]:
    """Return the names that ``--on`` takes."""
    return sorted(_PLACES)


def has_place(name: str) -> bool:
    """Say whether this release knows a place."""
    return name in _PLACES


def place_named(name: str, clients: AwsClients, profile: Profile) -> Place:
    """Return the place that ``--on`` names.

    Raises:
        ConfigError: If there is none of that name.
    """
    if name not in _PLACES:
        *others, last = place_names()
        raise ConfigError(f"on must be {', '.join(others)} or {last}, not {name!r}")
    module, _, kind = _PLACES[name].partition(":")
    place: Place = getattr(import_module(module), kind)(clients, profile)
    return place
