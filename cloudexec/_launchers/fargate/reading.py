"""Reads Amazon ECS's descriptions of tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloudexec._aws.diagnosis import JobEnd, is_out_of_capacity
from cloudexec._aws.limits import ECS_MOST_VCPUS, WorkerSize
from cloudexec._aws.task_requests import CONTAINER, LOG_PREFIX
from cloudexec._launchers.platform import Phase, WorkerEnd

__all__ = [
    "end_of_task",
    "found_no_capacity",
    "log_stream",
    "phase_of_task",
    "run_of_task",
]

_PHASES: Mapping[str, Phase] = {
    # A task costs money from the start of its image's download, and may have no place before.
    "PROVISIONING": Phase.WAITING,
    "PENDING": Phase.STARTING,
    "ACTIVATING": Phase.STARTING,
    "RUNNING": Phase.RUNNING,
    "DEACTIVATING": Phase.RUNNING,
    "STOPPING": Phase.RUNNING,
    "DEPROVISIONING": Phase.RUNNING,
    "STOPPED": Phase.ENDED,
    "DELETED": Phase.ENDED,
}
"""Amazon ECS Developer Guide, "Amazon ECS task lifecycle"."""
_TIME_IS_UP = (142, 143)
"""Exit codes after SIGALRM and SIGTERM, with which a worker ends itself at its time limit."""


def phase_of_task(task: Mapping[str, Any]) -> Phase:
    """Return the phase of a task.

    A task that is being stopped counts as ended as soon as its container has ended. The rest, such
    as the removal of its network interface, takes a while and does not concern the worker.
    """
    containers = task.get("containers", ())
    if task.get("desiredStatus") == "STOPPED" and (
        task.get("executionStoppedAt") or any("exitCode" in each for each in containers)
    ):
        return Phase.ENDED
    return _PHASES.get(task["lastStatus"], Phase.RUNNING)


def log_stream(arn: str) -> str:
    """Return the log stream of a task. Amazon ECS Developer Guide, "Using the awslogs driver"."""
    return f"{LOG_PREFIX}/{CONTAINER}/{arn.rpartition('/')[2]}"


def found_no_capacity(task: Mapping[str, Any]) -> bool:
    """Return whether a task has stopped before it ran because there was no capacity."""
    never_ran = not task.get("startedAt") and not task.get("pullStartedAt")
    return (
        _PHASES.get(task["lastStatus"]) is Phase.ENDED
        and never_ran
        and is_out_of_capacity(task.get("stoppedReason", ""))
    )


def run_of_task(task: Mapping[str, Any]) -> WorkerEnd:
    """Return when a task began to cost money, and when it ended."""
    began = task.get("pullStartedAt") or task.get("startedAt")
    ended = task.get("stoppedAt") or task.get("executionStoppedAt")
    return WorkerEnd(
        began_at=began.timestamp() if began else None, ended_at=ended.timestamp() if ended else None
    )


def end_of_task(task: Mapping[str, Any], *, lifetime: float) -> JobEnd:
    """Return the end of a task.

    Args:
        task: The task, as in the answer of DescribeTasks.
        lifetime: Seconds after which workers end themselves.
    """
    container: Mapping[str, Any] = next(iter(task.get("containers", ())), {})
    code = container.get("exitCode")
    run = run_of_task(task)
    lasted = (run.ended_at or 0.0) - (run.began_at or 0.0)
    stop_code = task.get("stopCode", "")
    return JobEnd(
        status_reason=task.get("stoppedReason", ""),
        container_reason=container.get("reason", ""),
        exit_code=code,
        stop_code=stop_code,
        timed_out=(
            code in _TIME_IS_UP and stop_code == "EssentialContainerExited" and lasted >= lifetime
        ),
        size=WorkerSize(vcpus=int(task["cpu"]) / 1024, memory_mib=int(task["memory"])),
        most_vcpus=ECS_MOST_VCPUS,
        image=container.get("image", ""),
    )
