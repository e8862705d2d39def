"""Reads descriptions of jobs: times, sizes, reasons, and how long their workers ran."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import (
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from cloudexec._aws.names import ORDERED_ENDS, RUN_EXECUTOR, TAG_EXECUTOR
from cloudexec._aws.records import ACTIVE, ENDED, TOLD_TO_END, AttemptInfo, ExecutorInfo, JobInfo
from cloudexec._aws.requests import FAILED_STARTS
from cloudexec._errors import ConfigError
from cloudexec._pricing import run_seconds

__all__ = [
    "NO_CLIENT",
    "Runs",
    "arch_of",
    "attempts_of",
    "by_executor",
    "container_of",
    "executor_info",
    "executor_of",
    "exit_code_of",
    "first_worker",
    "gpus_of",
    "last_part",
    "log_group_of",
    "may_run_again",
    "own_runs",
    "reason_of",
    "required_time",
    "run_of",
    "size_of",
    "states_of",
    "streams_of",
    "time_of",
    "time_of_text",
    "utc_now",
    "was_ordered",
    "workers_of",
]

NO_CLIENT = 4
"""Exit code of a worker that could not connect to its client, or lost it for good."""
_FOUND_NO_CLIENT = "it could not reach the program (exit code 4)"
_LAUNCH = re.compile(r"-(\d+)$")
_BATCH_LOG_GROUP = "/aws/batch/job"
"""AWS Batch's default log group. AWS Batch User Guide, "Job states"."""


@dataclass(slots=True)
class Runs:
    """The runs of a job's workers, added up."""

    seconds: list[float] = field(default_factory=list)
    now: int = 0
    """Number of workers that run now."""
    is_complete: bool = True
    failures: Counter[str] = field(default_factory=Counter)
    """Reasons of failed workers."""
    without_client: int = 0
    """Number of failed workers that could not connect to the program, or lost it for good."""
    ordered: int = 0
    """Number of workers that AWS Batch calls FAILED because they were told to end."""
    waiting: str = ""
    """Why a worker waits, if AWS Batch says so."""


def utc_now() -> datetime:
    return datetime.now(UTC)


def time_of(milliseconds: int | float | None) -> datetime | None:
    return None if not milliseconds else datetime.fromtimestamp(milliseconds / 1000, UTC)


def required_time(milliseconds: int | float) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def time_of_text(text: str | None) -> datetime | None:
    try:
        time = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def last_part(arn_or_name: str) -> str:
    return arn_or_name.rpartition("/")[2]


def executor_of(detail: Mapping[str, Any]) -> str:
    return str(detail.get("tags", {}).get(TAG_EXECUTOR, ""))


def run_of(detail: Mapping[str, Any]) -> str:
    """Return the name of the run whose program this job runs; empty if the job runs workers."""
    executor = executor_of(detail)
    return executor.removeprefix(RUN_EXECUTOR) if executor.startswith(RUN_EXECUTOR) else ""


def first_worker(detail: Mapping[str, Any]) -> int | None:
    found = _LAUNCH.search(str(detail["jobName"]))
    return None if found is None else int(found[1])


def log_group_of(detail: Mapping[str, Any], otherwise: str) -> str:
    """Return the log group of a job, or else the given one."""
    options = container_of(detail).get("logConfiguration", {}).get("options", {})
    return str(options.get("awslogs-group") or otherwise or _BATCH_LOG_GROUP)


def container_of(detail: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the container's description, also of a job with ``ecsProperties``."""
    container: Mapping[str, Any] = detail.get("container", {})
    if container:
        return container
    tasks = detail.get("ecsProperties", {}).get("taskProperties", ())
    containers = tasks[0].get("containers", ()) if tasks else ()
    return containers[0] if containers else {}


def size_of(container: Mapping[str, Any]) -> tuple[float, int]:
    """Return the vCPUs and the MiB that a job's container requests."""
    asked = {each["type"]: each["value"] for each in container.get("resourceRequirements", ())}
    return (
        float(asked.get("VCPU") or container.get("vcpus") or 0),
        int(asked.get("MEMORY") or container.get("memory") or 0),
    )


def gpus_of(container: Mapping[str, Any]) -> int:
    """Return how many GPUs a job's container was requested with."""
    asked = {each["type"]: each["value"] for each in container.get("resourceRequirements", ())}
    return int(asked.get("GPU") or 0)


def arch_of(container: Mapping[str, Any]) -> str:
    is_arm = container.get("runtimePlatform", {}).get("cpuArchitecture") == "ARM64"
    return "arm64" if is_arm else "x86_64"


def was_ordered(detail: Mapping[str, Any]) -> bool:
    """Return whether AWS Batch calls a worker FAILED because it was told to end."""
    reason = str(detail.get("statusReason", ""))
    return detail["status"] == "FAILED" and reason.startswith(ORDERED_ENDS)


def workers_of(detail: Mapping[str, Any], ordered: int = 0) -> Mapping[str, int]:
    """Return the number of workers in each state.

    Args:
        detail: Description of the job.
        ordered: Number of an array's workers that have failed because they were told to end. They
            count as ``TOLD_TO_END`` instead.
    """
    counts = _counts_of(detail)
    if not detail.get("arrayProperties", {}).get("size"):
        ordered = int(was_ordered(detail))
    told = min(ordered, counts.get("FAILED", 0))
    if told:
        counts[TOLD_TO_END] = told
        counts["FAILED"] -= told
    return {state: count for state, count in counts.items() if count}


def _counts_of(detail: Mapping[str, Any]) -> dict[str, int]:
    array = detail.get("arrayProperties", {})
    if not array.get("size"):
        return {str(detail["status"]): 1}
    counts = {
        state: int(count)
        for state in (*ACTIVE, *ENDED)
        if (count := array.get("statusSummary", {}).get(state))
    }
    return counts or {str(detail["status"]): int(array["size"])}


def reason_of(detail: Mapping[str, Any]) -> str:
    """Return the container's reason, which is more precise, and then the job's."""
    if exit_code_of(detail) == NO_CLIENT and not run_of(detail):
        return _FOUND_NO_CLIENT
    container = detail.get("container", {}).get("reason")
    if not container and detail.get("attempts"):
        container = detail["attempts"][-1].get("container", {}).get("reason")
    said = dict.fromkeys(str(each) for each in (container, detail.get("statusReason")) if each)
    return "; ".join(said)


def exit_code_of(detail: Mapping[str, Any]) -> int | None:
    code = detail.get("container", {}).get("exitCode")
    if code is None and detail.get("attempts"):
        code = detail["attempts"][-1].get("container", {}).get("exitCode")
    return None if code is None else int(code)


def attempts_of(detail: Mapping[str, Any]) -> Iterator[AttemptInfo]:
    for number, attempt in enumerate(detail.get("attempts", ()), 1):
        container = attempt.get("container", {})
        said = (container.get("reason"), attempt.get("statusReason"))
        yield AttemptInfo(
            number=number,
            started_at=time_of(attempt.get("startedAt")),
            stopped_at=time_of(attempt.get("stoppedAt")),
            exit_code=container.get("exitCode"),
            reason="; ".join(dict.fromkeys(str(each) for each in said if each)),
            log_stream=container.get("logStreamName") or "",
        )


def streams_of(detail: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Return the number and log stream of each attempt that has one, in order."""
    streams = {
        stream: number
        for number, attempt in enumerate(detail.get("attempts", ()), 1)
        if (stream := attempt.get("container", {}).get("logStreamName"))
    }
    current = detail.get("container", {}).get("logStreamName")
    if current and current not in streams:
        streams[current] = len(detail.get("attempts", ())) + 1
    return [(number, stream) for stream, number in streams.items()]


def own_runs(detail: Mapping[str, Any], now: float) -> Runs:
    """Return the runs of one worker, from its description or its summary in a list."""
    attempts = [each for each in detail.get("attempts", ()) if each.get("startedAt")]
    spans = {int(each["startedAt"]): each.get("stoppedAt") for each in attempts}
    started = detail.get("startedAt")
    has_ended = detail["status"] in ENDED
    # A running attempt is added to the attempts only when it ends.
    if started and int(started) not in spans and (not has_ended or not spans):
        spans[int(started)] = detail.get("stoppedAt")
    found_none = has_ended and exit_code_of(detail) == NO_CLIENT and not run_of(detail)
    runs = Runs(without_client=int(found_none))
    for begin, end in spans.items():
        if end:
            runs.seconds.append(run_seconds(begin / 1000, end / 1000))
        elif detail["status"] == "RUNNING":
            runs.seconds.append(run_seconds(begin / 1000, now))
            runs.now += 1
    return runs


def may_run_again(detail: Mapping[str, Any]) -> bool:
    """Return whether AWS Batch may start a worker again that has run before.

    Retries after a failed start, which cloudexec's own jobs have, do not count: a failed start
    never ran and cost nothing.
    """
    strategy = detail.get("retryStrategy", {})
    if strategy.get("attempts", 1) <= 1:
        return False
    rules = strategy.get("evaluateOnExit", ())
    if not rules or (rules[-1].get("onReason"), rules[-1]["action"].upper()) != ("*", "EXIT"):
        return True  # AWS Batch retries what fits no rule
    return any(
        each["action"].upper() == "RETRY"
        and not (each.get("onStatusReason") or each.get("onReason", "")).startswith(FAILED_STARTS)
        for each in rules
    )


def states_of(state: str | Iterable[str] | None) -> set[str] | None:
    if state is None:
        return None
    states = {each.upper() for each in ([state] if isinstance(state, str) else state)}
    if unknown := states - {*ACTIVE, *ENDED}:
        raise ConfigError(
            f"a job's state is one of {', '.join((*ACTIVE, *ENDED))}, "
            f"not {', '.join(sorted(unknown))}"
        )
    return states


def by_executor(jobs: Iterable[JobInfo]) -> list[list[JobInfo]]:
    """Group jobs by executor. The newest job of each comes first, and so does the newest group."""
    groups: dict[str, list[JobInfo]] = {}
    for job in sorted(jobs, key=lambda each: each.created_at, reverse=True):
        groups.setdefault(job.executor, []).append(job)
    return list(groups.values())


def executor_info(jobs: Sequence[JobInfo], now: datetime) -> ExecutorInfo:
    last = jobs[0]
    workers: Counter[str] = Counter()
    vcpus, memory_mib = 0.0, 0
    of_workers = [job for job in jobs if not job.is_relay]
    for job in of_workers:
        workers.update(job.workers)
        placed = job.workers.get("STARTING", 0) + job.workers.get("RUNNING", 0)
        vcpus += placed * job.vcpus
        memory_mib += placed * job.memory_mib
    created_at = min(job.created_at for job in jobs)
    expiries = [job.expires_at for job in jobs if job.expires_at is not None]
    return ExecutorInfo(
        id=last.executor,
        user=last.user,
        project=last.project,
        is_active=any(job.is_active for job in jobs),
        created_at=created_at,
        age_seconds=max(0.0, (now - created_at).total_seconds()),
        expires_at=max(expiries, default=None),
        queues=tuple(sorted({job.queue for job in jobs})),
        jobs=len(jobs),
        workers={
            state: workers[state] for state in (*ACTIVE, *ENDED, TOLD_TO_END) if workers[state]
        },
        relays=sum(job.is_relay and job.is_active for job in jobs),
        vcpus=vcpus,
        memory_mib=memory_mib,
        cost_usd=math.fsum(job.cost_usd for job in jobs),
        per_hour_usd=math.fsum(job.per_hour_usd for job in jobs),
        without_client=sum(job.without_client for job in of_workers),
        is_estimate=any(job.is_estimate for job in jobs),
    )
