"""Reads AWS Batch's descriptions of jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cloudexec._aws.diagnosis import JobEnd, cause_of_end
from cloudexec._aws.job_details import container_of, size_of
from cloudexec._aws.limits import WorkerSize
from cloudexec._launchers.platform import Phase, Reason, WorkerEnd

__all__ = ["PHASES", "end_of", "run_of", "worker_end"]

PHASES: Mapping[str, Phase] = {
    "SUBMITTED": Phase.ACCEPTED,
    "PENDING": Phase.ACCEPTED,
    "RUNNABLE": Phase.WAITING,
    "STARTING": Phase.STARTING,
    "RUNNING": Phase.RUNNING,
    "SUCCEEDED": Phase.ENDED,
    "FAILED": Phase.ENDED,
}
"""AWS Batch User Guide, "Job states"."""
_KILLED = (137, 143)
"""Exit codes after SIGKILL and SIGTERM."""


def end_of(details: Mapping[str, Any], attempts: Sequence[Mapping[str, Any]]) -> JobEnd:
    """Return the end of a job's last attempt."""
    last: Mapping[str, Any] = attempts[-1] if attempts else {}
    container = last.get("container") or details.get("container") or {}
    asked = container_of(details)
    vcpus, memory_mib = size_of(asked)
    return JobEnd(
        status_reason=last.get("statusReason") or details.get("statusReason", ""),
        container_reason=container.get("reason", ""),
        exit_code=container.get("exitCode"),
        stop_code=details.get("stopCode", ""),  # of a task, which is told as a job
        size=WorkerSize(vcpus=vcpus, memory_mib=memory_mib) if memory_mib else None,
        compute="ec2" if "EC2" in details.get("platformCapabilities", ()) else "fargate",
        image=str(asked.get("image", "")),
    )


def run_of(attempt: Mapping[str, Any]) -> WorkerEnd:
    """Return when an attempt began and ended, which AWS Batch reports in milliseconds."""
    began, ended = attempt.get("startedAt"), attempt.get("stoppedAt")
    return WorkerEnd(
        began_at=began / 1000 if began else None, ended_at=ended / 1000 if ended else None
    )


def worker_end(end: JobEnd, run: WorkerEnd) -> WorkerEnd:
    """Return the end of an attempt, with its cause and remedy.

    Args:
        end: The end as AWS describes it.
        run: The times at which the attempt began and ended.
    """
    cause = cause_of_end(end)
    return WorkerEnd(
        reason=Reason(cause.text, cause.remedy, cause.fatal),
        killed=end.exit_code in _KILLED and not end.out_of_memory,
        reclaimed=end.reclaimed,
        out_of_memory=end.out_of_memory,
        began_at=run.began_at,
        ended_at=run.ended_at,
        details=end,
    )
