"""The records of a fake AWS that tests read: its requests and its jobs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["AttemptRecord", "InstanceRecord", "JobRecord", "Request", "Setup"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One API call, as it arrived and as it was answered."""

    service: str
    """botocore's name of the service, such as ``"batch"``."""
    operation: str
    """The operation, such as ``"SubmitJob"``."""
    parameters: dict[str, Any]
    """The parameters as the client passed them."""
    status: int
    """The answer's HTTP status; 0 if the connection was closed without an answer."""
    error: str | None
    """AWS's error code; ``None`` if the call succeeded."""
    message: str | None = None
    """AWS's message with the error code."""
    at: float = 0.0
    """When it arrived, in seconds since the epoch."""
    problems: tuple[str, ...] = ()
    """The rules of botocore's model that the request breaks, including bounds, patterns and
    enumerations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptRecord:
    """One attempt of a job that has ended."""

    exit_code: int | None
    reason: str | None
    """The container's reason, such as an out-of-memory kill."""
    status_reason: str | None
    started_at: float | None
    """Seconds since the epoch."""
    stopped_at: float | None
    """Seconds since the epoch."""
    log_stream: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRecord:
    """The present state of one job: a plain job, an array's parent, or one of its children.

    A task that was started with ``RunTask`` is a job, too: its id is the last part of its ARN, its
    name is ``startedBy``, and its queue is the name of its cluster.
    """

    job_id: str
    name: str
    queue: str
    """Name of the job queue."""
    definition: str
    """``name:revision``."""
    status: str
    status_reason: str | None
    parent: str | None
    """Job id of the array parent."""
    index: int | None
    """Index in the array."""
    size: int | None
    """Number of children of an array parent, else ``None``."""
    attempts: tuple[AttemptRecord, ...]
    attempt: int
    """Number of the latest attempt, from 1; 0 before the first."""
    exit_code: int | None
    pid: int | None
    """Process id of the running main process, in process mode."""
    log_stream: str | None
    compute_environment: str | None
    """The name of the compute environment that the job was placed in."""
    spot: bool
    """Whether that environment is a spot one."""
    vcpus: float
    memory_mib: int
    tags: dict[str, str]
    environment: dict[str, str]
    """The variables of the definition and of the overrides, without secrets."""
    created_at: float
    started_at: float | None
    stopped_at: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The resources that :meth:`FakeAWS.set_up` made."""

    queue: str
    """ARN of the job queue."""
    compute_environments: tuple[str, ...]
    """ARNs, in the queue's order."""
    job_role: str
    execution_role: str
    subnets: tuple[str, ...]
    security_group: str
    cluster: str
    """ARN of a cluster of Amazon ECS, for tasks on Fargate and Fargate Spot."""
    function_role: str = ""
    """ARN of a role of functions of AWS Lambda."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceRecord:
    """The present state of one EC2 instance that was asked for without AWS Batch."""

    instance_id: str
    type: str
    spot: bool
    subnet: str
    state: str
    """``"pending"``, ``"running"``, ``"shutting-down"`` or ``"terminated"``."""
    state_reason: str
    """The code of its StateReason; empty while it has not ended."""
    tags: dict[str, str]
    user_data: str
    """Its script."""
    environment: dict[str, str]
    """The variables of its container, without the key."""
    exit_code: int | None
    """Of its container; ``None``: it has not ended."""
    pid: int | None
    """Process id of its container's main process, in process mode."""
    launched_at: float
    ended_at: float | None
    console: str
    """What its script has written."""
