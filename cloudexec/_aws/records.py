"""What is told of jobs, executors, logs and costs: records for people and programs."""

from __future__ import annotations

from collections.abc import (
    Mapping,
)
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

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
"""Of workers that AWS Batch calls FAILED because they were told to end: this is ours."""


def _plain(value: Any) -> Any:
    """Return what JSON can say: ISO 8601 for times, objects for records."""
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
    """What can be written as JSON."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return all fields; times as ISO 8601 in UTC, durations as seconds, money as USD."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}  # type: ignore[arg-type]  # subclasses are dataclasses


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptInfo(Record):
    """One attempt of AWS Batch to run a job. (A task's attempts are another matter.)"""

    number: int
    """From 1."""
    started_at: datetime | None = None
    stopped_at: datetime | None = None
    exit_code: int | None = None
    reason: str = ""
    log_stream: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo(Record):
    """A job: one worker, or as many as its array has."""

    id: str
    """``PARENT:INDEX`` for one worker of an array."""
    name: str
    state: str
    """As AWS Batch says. An array is ``PENDING`` while its workers run: see ``workers``."""
    executor: str
    user: str
    project: str
    queue: str
    definition: str
    """Name and revision."""
    size: int
    """Workers in it."""
    index: int | None
    """Which worker of its array it is, or ``None``."""
    first_worker: int | None
    """Number of its first worker: it is ``worker-<first_worker>``, or has that and those that
    follow; ``None`` if its name does not say."""
    workers: Mapping[str, int]
    """How many workers are in which state. AWS updates it with some delay. Those that it calls
    ``FAILED`` because the executor or a person has ended them are ``ENDED``."""
    vcpus: float
    """Of one worker."""
    memory_mib: int
    """Of one worker."""
    arch: str
    compute: str
    """``"fargate"`` or ``"ec2"``."""
    spot: bool
    created_at: datetime
    started_at: datetime | None
    stopped_at: datetime | None
    expires_at: datetime | None
    """When its time limit ends it at the latest."""
    exit_code: int | None
    """Of the last attempt's container."""
    reason: str
    """What AWS says of how it ended or why it waits; empty while there is nothing to say. For an
    array, what it says of most of its failed workers."""
    without_client: int
    """Workers of it that could not reach the program, or not any more: it may have been killed."""
    attempts: tuple[AttemptInfo, ...]
    log_group: str
    log_stream: str
    """Of the last attempt; empty until it runs."""
    run_seconds: float
    """Of all its workers and attempts together, up to now."""
    cost_usd: float
    """Up to now."""
    per_hour_usd: float
    """What those of its workers cost that run now."""
    is_estimate: bool
    """Whether the cost is less sure than a list price: Spot, EC2, or an array that could not be
    looked through."""

    @property
    def is_active(self) -> bool:
        """Whether it has not ended."""
        return self.state in ACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorInfo(Record):
    """The jobs of one executor, added up."""

    id: str
    user: str
    project: str
    is_active: bool
    """Whether a job of it has not ended."""
    created_at: datetime
    """When its first job was submitted."""
    age_seconds: float
    expires_at: datetime | None
    """When time limits have ended the last of its jobs at the latest."""
    queues: tuple[str, ...]
    jobs: int
    workers: Mapping[str, int]
    """How many workers are in which state."""
    vcpus: float
    """Of workers that are starting or running."""
    memory_mib: int
    """Of workers that are starting or running."""
    cost_usd: float
    """Up to now."""
    per_hour_usd: float
    """What it costs at present."""
    without_client: int
    """Workers that could not reach the program, or not any more: it may have been killed."""
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
    """What one executor's workers cost up to now."""

    executor: str
    user: str
    project: str
    is_active: bool
    created_at: datetime
    runs: int
    """Workers that ran, each attempt counted."""
    run_seconds: float
    vcpu_hours: float
    gib_hours: float
    cost_usd: float
    per_hour_usd: float
    is_estimate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CostReport(Record):
    """What was run and what it cost, by executor, the newest first.

    List prices of vCPUs, memory, storage and public addresses, from when a worker's container
    started. What is not in it: the download of images (seconds of each worker's time), logs, data
    transfer, NAT gateways, discounts and taxes; and jobs that AWS Batch has forgotten.
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
    """What to know of these numbers, in sentences."""


for _class in (AttemptInfo, CostReport, ExecutorCost, ExecutorInfo, JobInfo, LogLine):
    _class.__module__ = "cloudexec.aws"
