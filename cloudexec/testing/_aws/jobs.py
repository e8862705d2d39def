"""The jobs of the engine: their parameters, their state and their attempts."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cloudexec.testing._aws.records import AttemptRecord, JobRecord
from cloudexec.testing._aws.runners import Running

__all__ = ["ENDED", "STATES", "Attempt", "Job", "JobSpec", "RetryRule", "matches"]

STATES = ("SUBMITTED", "PENDING", "RUNNABLE", "STARTING", "RUNNING", "SUCCEEDED", "FAILED")
ENDED = ("SUCCEEDED", "FAILED")


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryRule:
    """One rule of ``evaluateOnExit``."""

    action: str
    on_status_reason: str | None
    on_reason: str | None
    on_exit_code: str | None

    def fits(self, attempt: Attempt) -> bool:
        """Return whether all conditions of the rule hold for an attempt."""
        code = "" if attempt.exit_code is None else str(attempt.exit_code)
        return (
            matches(self.on_status_reason, attempt.status_reason or "")
            and matches(self.on_reason, attempt.reason or "")
            and matches(self.on_exit_code, code)
        )


def matches(pattern: str | None, text: str) -> bool:
    """Return whether a retry rule's pattern fits a text; a ``*`` at its end fits any ending."""
    if pattern is None:
        return True
    return text.startswith(pattern[:-1]) if pattern.endswith("*") else text == pattern


@dataclass(frozen=True, slots=True, kw_only=True)
class JobSpec:
    """The parameters of SubmitJob and of its job definition; an array's children share them."""

    name: str
    region: str
    queue_arn: str
    queue_name: str
    definition_arn: str
    definition_name: str
    revision: int
    image: str
    command: tuple[str, ...]
    """The command, with parameters substituted; empty to run the image's entry point alone."""
    parameters: Mapping[str, str]
    environment: Mapping[str, str]
    secrets: Mapping[str, str]
    """By variable: the ``valueFrom`` of its secret."""
    vcpus: float
    memory_mib: int
    attempts: int
    rules: tuple[RetryRule, ...]
    timeout: float | None
    """Seconds per attempt."""
    execution_role: str | None
    log_group: str
    log_prefix: str
    log_create: bool
    overrides_length: int
    """Number of characters of the container overrides that Batch passes to ECS."""
    tags_of_task: int
    """Number of tags that are propagated to the task."""
    container: Mapping[str, Any]
    """The container's description in DescribeJobs before it runs."""
    tags: Mapping[str, str]
    extra: Mapping[str, Any]
    """Members of the job detail that are shown as they were given."""
    fargate: bool
    cluster: str = ""
    """Name of the cluster, for a task of Amazon ECS; empty for jobs of AWS Batch."""
    provider: str = ""
    """Capacity provider of such a task."""
    container_name: str = "default"
    stop_timeout: float = 30.0
    """Seconds of AWS from SIGTERM to SIGKILL."""


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One attempt that has ended."""

    exit_code: int | None
    reason: str | None
    status_reason: str | None
    task_arn: str | None
    log_stream: str | None
    instance_arn: str | None
    started_at: float | None
    stopped_at: float | None


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One job: plain, array parent or child. The engine's lock protects all fields."""

    spec: JobSpec
    job_id: str
    created_at: float
    parent: Job | None = None
    index: int | None = None
    children: list[Job] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    status: str = "SUBMITTED"
    status_reason: str | None = None
    waits: set[str] = field(default_factory=set)
    depends_on: list[dict[str, str]] = field(default_factory=list)
    runnable_at: float | None = None
    head_since: float | None = None
    pull: tuple[float, float] | None = None
    """The times at which the pull of the present attempt's image began and ended."""
    started_at: float | None = None
    stopped_at: float | None = None
    attempts: list[Attempt] = field(default_factory=list)
    environment_arn: str | None = None
    """The compute environment whose capacity the present attempt uses."""
    environment_name: str | None = None
    environment_type: str | None = None
    task_id: str | None = None
    instance_id: str | None = None
    log_stream: str | None = None
    exit_code: int | None = None
    reason: str | None = None
    running: Running | None = None
    launching: bool = False
    stop_reason: str | None = None
    """Why the attempt is being stopped; ``None`` if it is not."""
    stop_kind: str | None = None
    """Cause of the stop: ``terminate``, ``timeout``, ``reclaim`` or ``instance``."""
    stop_grace: float | None = None
    cancelled: bool = False
    terminated: bool = False

    @property
    def arn(self) -> str:
        """The job's ARN."""
        head = self.spec.queue_arn.split(":job-queue/")[0]
        return f"{head}:job/{self.job_id}"

    @property
    def is_parent(self) -> bool:
        """Whether this is the parent of an array."""
        return bool(self.children)

    @property
    def ended(self) -> bool:
        """Whether the job is SUCCEEDED or FAILED."""
        return self.status in ENDED

    @property
    def task_arn(self) -> str | None:
        """ARN of the ECS task of the present attempt."""
        if self.task_id is None:
            return None
        account = self.spec.queue_arn.split(":")[4]
        cluster = self.spec.cluster or f"AWSBatch-{self.environment_name}"
        return f"arn:aws:ecs:{self.spec.region}:{account}:task/{cluster}/{self.task_id}"

    @property
    def instance_arn(self) -> str | None:
        """ARN of the container instance, if the attempt runs on EC2."""
        if self.instance_id is None:
            return None
        account = self.spec.queue_arn.split(":")[4]
        return f"arn:aws:ecs:{self.spec.region}:{account}:container-instance/{self.instance_id}"

    @property
    def spot(self) -> bool:
        """Whether the attempt runs in a spot environment."""
        return self.environment_type in ("SPOT", "FARGATE_SPOT")

    def enter(self, status: str) -> None:
        """Change the job's state, and the parent's count of children in each state."""
        if self.parent is not None:
            self.parent.counts[self.status] -= 1
            self.parent.counts[status] += 1
        self.status = status

    def record(self) -> JobRecord:
        """Return the job's state as tests see it."""
        spec = self.spec
        return JobRecord(
            job_id=self.job_id,
            name=spec.name,
            queue=spec.queue_name,
            definition=f"{spec.definition_name}:{spec.revision}",
            status=self.status,
            status_reason=self.status_reason,
            parent=self.parent.job_id if self.parent else None,
            index=self.index,
            size=len(self.children) or None,
            attempts=tuple(
                AttemptRecord(
                    exit_code=attempt.exit_code,
                    reason=attempt.reason,
                    status_reason=attempt.status_reason,
                    started_at=attempt.started_at,
                    stopped_at=attempt.stopped_at,
                    log_stream=attempt.log_stream,
                )
                for attempt in self.attempts
            ),
            attempt=len(self.attempts) + (self.status in ("STARTING", "RUNNING")),
            exit_code=self.exit_code,
            pid=self.running.pid if self.running else None,
            log_stream=self.log_stream,
            compute_environment=self.environment_name,
            spot=self.spot,
            vcpus=spec.vcpus,
            memory_mib=spec.memory_mib,
            tags=dict(spec.tags),
            environment=dict(spec.environment),
            created_at=self.created_at,
            started_at=self.started_at,
            stopped_at=self.stopped_at,
        )

    def detail(self) -> dict[str, Any]:
        """Describe the job as DescribeJobs does."""
        spec = self.spec
        container = dict(spec.container)
        shown = {
            "exitCode": self.exit_code,
            "reason": self.reason,
            "taskArn": self.task_arn,
            "logStreamName": self.log_stream,
            "containerInstanceArn": self.instance_arn,
        }
        container.update({key: value for key, value in shown.items() if value is not None})
        found: dict[str, Any] = {
            **self.summary(),
            "jobQueue": spec.queue_arn,
            "attempts": [_attempt_detail(attempt) for attempt in self.attempts],
            "dependsOn": self.depends_on,
            "jobDefinition": spec.definition_arn,
            "parameters": dict(spec.parameters),
            "container": container,
            "tags": dict(spec.tags),
            "retryStrategy": spec.extra["retryStrategy"],
            "platformCapabilities": ["FARGATE" if spec.fargate else "EC2"],
            "startedAt": _ms(self.started_at) or 0,
            "isCancelled": self.cancelled,
            "isTerminated": self.terminated,
            "propagateTags": bool(spec.extra.get("propagateTags")),
        }
        if self.status in ("SUBMITTED", "PENDING", "RUNNABLE", "STARTING"):
            del found["startedAt"]
        for name in ("timeout", "shareIdentifier", "schedulingPriority"):
            if spec.extra.get(name) is not None:
                found[name] = spec.extra[name]
        return found

    def summary(self) -> dict[str, Any]:
        """Describe the job as ListJobs does."""
        found: dict[str, Any] = {
            "jobArn": self.arn,
            "jobId": self.job_id,
            "jobName": self.spec.name,
            "jobDefinition": self.spec.definition_arn,
            "createdAt": _ms(self.created_at),
            "status": self.status,
        }
        if self.status_reason is not None:
            found["statusReason"] = self.status_reason
        if self.started_at is not None:
            found["startedAt"] = _ms(self.started_at)
        if self.stopped_at is not None:
            found["stoppedAt"] = _ms(self.stopped_at)
        if self.exit_code is not None or self.reason is not None:
            found["container"] = {
                key: value
                for key, value in (("exitCode", self.exit_code), ("reason", self.reason))
                if value is not None
            }
        if self.children:
            found["arrayProperties"] = {
                "size": len(self.children),
                "statusSummary": {state: self.counts[state] for state in STATES},
                "statusSummaryLastUpdatedAt": _ms(time.time()),
            }
        elif self.index is not None:
            found["arrayProperties"] = {"index": self.index}
        return found


def substituted(command: list[str], parameters: Mapping[str, str]) -> tuple[str, ...]:
    """Return a command with ``Ref::name`` replaced, if the parameter has a value."""
    return tuple(
        re.sub(
            r"Ref::([A-Za-z0-9_.-]+)",
            lambda found: parameters.get(found.group(1), found.group(0)),
            word,
        )
        for word in command
    )


def _ms(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)


def _attempt_detail(attempt: Attempt) -> dict[str, Any]:
    container = {
        "exitCode": attempt.exit_code,
        "reason": attempt.reason,
        "taskArn": attempt.task_arn,
        "logStreamName": attempt.log_stream,
        "containerInstanceArn": attempt.instance_arn,
    }
    found: dict[str, Any] = {
        "container": {key: value for key, value in container.items() if value is not None}
    }
    for name, value in (
        ("startedAt", _ms(attempt.started_at)),
        ("stoppedAt", _ms(attempt.stopped_at)),
        ("statusReason", attempt.status_reason),
    ):
        if value is not None:
            found[name] = value
    return found
