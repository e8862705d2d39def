"""Records of jobs, executors, logs and costs, for people and programs."""

from __future__ import annotations

from collections.abc import (
    Mapping,
)
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

from cloudexec._aws.names import JOB_PREFIX, RELAY_NAME, RUN_EXECUTOR

__all__ = [
    "ACTIVE",
    "ENDED",
    "TOLD_TO_END",
    "AttemptInfo",
    "CostReport",
    "ExecutorCost",
    "ExecutorInfo",
    "JobInfo",
    "LogLine",
    "Record",
]

ACTIVE = ("SUBMITTED", "PENDING", "RUNNABLE", "STARTING", "RUNNING")
"""States of a job that has not ended, in their order. AWS Batch User Guide, "Job states"."""
ENDED = ("SUCCEEDED", "FAILED")
TOLD_TO_END = "ENDED"
"""Our state of workers that AWS Batch calls FAILED because they were told to end."""


def _plain(value: Any) -> Any:
    """Return a value that JSON can hold: ISO 8601 for times, objects for records."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, Record):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return value


class Record:
    """A record that can be written as JSON."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return all fields: times as ISO 8601 in UTC, durations in seconds, money in USD."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}  # type: ignore[arg-type]  # subclasses are dataclasses


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptInfo(Record):
    """One attempt of AWS Batch to run a job. (Tasks have attempts of their own.)"""

    number: int
    """Number of the attempt, from 1."""
    started_at: datetime | None = None
    stopped_at: datetime | None = None
    exit_code: int | None = None
    reason: str = ""
    log_stream: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo(Record):
    """A job: one worker, or all workers of an array."""

    id: str
    """Id of the job; ``PARENT:INDEX`` for one worker of an array."""
    name: str
    state: str
    """AWS Batch's state. An array is ``PENDING`` while its workers run: see ``workers``."""
    executor: str
    user: str
    project: str
    queue: str
    definition: str
    """Name and revision of the job definition."""
    size: int
    """Number of workers."""
    index: int | None
    """Index of the worker in its array, or ``None``."""
    first_worker: int | None
    """Number of the job's first worker, which is ``worker-<first_worker>``. The others of an array
    follow. ``None`` if the job's name does not contain it."""
    workers: Mapping[str, int]
    """Number of workers in each state, which AWS updates with some delay. Workers that AWS calls
    ``FAILED`` because the executor or a person has ended them are ``ENDED``."""
    vcpus: float
    """vCPUs of one worker."""
    memory_mib: int
    """MiB of one worker."""
    arch: str
    compute: str
    """``"fargate"``, ``"lambda"``, ``"ec2"`` for a share of an instance in AWS Batch, or
    ``"instance"`` for a whole one."""
    spot: bool
    created_at: datetime
    started_at: datetime | None
    stopped_at: datetime | None
    expires_at: datetime | None
    """The time at which the job's time limit ends it."""
    exit_code: int | None
    """Exit code of the last attempt's container."""
    reason: str
    """AWS's reason for the job's end, or for its wait; empty if there is none. For an array, the
    reason of most of its failed workers."""
    without_client: int
    """Number of workers that could not connect to the program, or lost it for good. The program may
    have been killed."""
    attempts: tuple[AttemptInfo, ...]
    log_group: str
    log_stream: str
    """Log stream of the last attempt; empty until it runs."""
    run_seconds: float
    """Run time of all workers and attempts together, up to now."""
    cost_usd: float
    """Cost up to now."""
    per_hour_usd: float
    """Cost of the workers that run now."""
    is_estimate: bool
    """Whether the cost is less certain than a list price, as for Spot, EC2, or an array with too
    many workers to look at each."""

    @property
    def is_active(self) -> bool:
        """Whether the job has not ended."""
        return self.state in ACTIVE

    @property
    def run(self) -> str:
        """Name of the run of `cloudexec run` whose machine it is; empty: it has workers."""
        is_run = self.executor.startswith(RUN_EXECUTOR)
        return self.executor.removeprefix(RUN_EXECUTOR) if is_run else ""

    @property
    def is_relay(self) -> bool:
        """Whether the job is a relay, through which workers reach the program."""
        return self.name.startswith(f"{JOB_PREFIX}{self.executor}{RELAY_NAME}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorInfo(Record):
    """The jobs of one executor, added up."""

    id: str
    user: str
    project: str
    is_active: bool
    """Whether one of the executor's jobs has not ended."""
    created_at: datetime
    """The time at which the first job was submitted."""
    age_seconds: float
    expires_at: datetime | None
    """The time at which time limits will have ended all jobs."""
    queues: tuple[str, ...]
    jobs: int
    workers: Mapping[str, int]
    """Number of workers in each state, without relays."""
    relays: int
    """Number of relays that have not ended, through which workers reach the program."""
    vcpus: float
    """vCPUs of workers that start or run."""
    memory_mib: int
    """MiB of workers that start or run."""
    cost_usd: float
    """Cost of workers and relays up to now."""
    per_hour_usd: float
    """Cost of the workers that run now."""
    without_client: int
    """Number of workers that could not connect to the program, or lost it for good. The program may
    have been killed."""
    is_estimate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine(Record):
    """A line of a worker's log."""

    time: datetime
    message: str
    job_id: str
    attempt: int
    stream: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorCost(Record):
    """The cost of one executor's workers and relays up to now."""

    executor: str
    user: str
    project: str
    is_active: bool
    created_at: datetime
    runs: int
    """Number of times that a worker ran; each attempt counts, and relays do not."""
    run_seconds: float
    """Time for which workers ran, added up."""
    vcpu_hours: float
    """vCPUs of workers, multiplied by the hours for which they ran."""
    gib_hours: float
    """Memory of workers, multiplied by the hours for which they ran."""
    relay_seconds: float
    """Time for which relays ran, added up."""
    relay_usd: float
    """Cost of relays, which is a part of ``cost_usd``."""
    cost_usd: float
    per_hour_usd: float
    is_estimate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CostReport(Record):
    """Costs by executor, the newest first.

    The costs are list prices of vCPUs, memory, storage and public addresses, from the start of a
    worker's container. They do not include the download of images (seconds of each worker's time),
    logs, data transfer, NAT gateways, discounts and taxes, nor jobs that AWS Batch has forgotten.
    """

    executors: tuple[ExecutorCost, ...]
    cost_usd: float
    per_hour_usd: float
    is_estimate: bool
    prices_dated: str
    """Day of the price table."""
    prices_source: str
    prices_region: str
    notes: tuple[str, ...] = field(default=())
    """Sentences on the accuracy of the costs."""


for _class in (AttemptInfo, CostReport, ExecutorCost, ExecutorInfo, JobInfo, LogLine):
    _class.__module__ = "cloudexec.aws"
