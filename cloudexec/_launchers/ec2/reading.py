"""What Amazon EC2 says of instances, read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from cloudexec._aws.diagnosis import JobEnd
from cloudexec._aws.instance_diagnosis import lacks_capacity
from cloudexec._aws.instance_script import LastWords
from cloudexec._aws.limits import WorkerSize
from cloudexec._launchers.platform import Phase, WorkerEnd

__all__ = ["end_of_instance", "found_no_capacity", "phase_of_instance", "run_of_instance"]

_PHASES: Mapping[str, Phase] = {
    "pending": Phase.STARTING,
    "running": Phase.RUNNING,
    "shutting-down": Phase.ENDED,
    "terminated": Phase.ENDED,
    "stopping": Phase.ENDED,
    "stopped": Phase.ENDED,
}
"""Amazon EC2 User Guide, "Amazon EC2 instance state changes"."""
_RECLAIMED = ("Server.SpotInstanceTermination", "Server.SpotInstanceShutdown")
"""Codes of StateReason. Amazon EC2 API Reference, "StateReason"."""
_BY_ITSELF = "Client.InstanceInitiatedShutdown"
_TIME_IS_UP = (142, 143)
"""Exit codes after SIGALRM and SIGTERM, by which a worker ends itself."""
_AT = re.compile(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)")


def phase_of_instance(instance: Mapping[str, Any]) -> Phase:
    """Say how far an instance is."""
    return _PHASES.get(instance["State"]["Name"], Phase.RUNNING)


def found_no_capacity(instance: Mapping[str, Any]) -> bool:
    """Whether an instance has ended before it ran, for want of capacity."""
    code = str((instance.get("StateReason") or {}).get("Code", ""))
    return phase_of_instance(instance) is Phase.ENDED and lacks_capacity(code)


def run_of_instance(instance: Mapping[str, Any]) -> WorkerEnd:
    """Read when an instance began to cost, and when it ended, as far as Amazon EC2 tells."""
    began = instance.get("LaunchTime")
    ended = _AT.search(str(instance.get("StateTransitionReason", "")))
    at = None
    if ended is not None:
        at = datetime.strptime(ended[1], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC).timestamp()
    return WorkerEnd(began_at=began.timestamp() if began is not None else None, ended_at=at)


def end_of_instance(
    instance: Mapping[str, Any],
    words: LastWords | None,
    *,
    size: WorkerSize,
    image: str,
    lifetime: float,
) -> JobEnd:
    """Read how an instance ended.

    Args:
        instance: As DescribeInstances has it.
        words: The last words of its script; ``None``: there are none.
        size: What the worker asked for.
        image: Of the worker.
        lifetime: Seconds after which workers end themselves.
    """
    reason = instance.get("StateReason") or {}
    code, message = str(reason.get("Code", "")), str(reason.get("Message", ""))
    exit_code = words.exit_code if words is not None else None
    reclaimed = code in _RECLAIMED or (words is not None and words.reclaimed)
    run = run_of_instance(instance)
    lasted = (run.ended_at or 0.0) - (run.began_at or 0.0)
    said = words.said if words is not None else ""
    container = said
    if words is not None and words.out_of_memory:
        container = "OutOfMemoryError: container killed due to memory usage"
    if code == _BY_ITSELF and words is not None:
        message = said or "its container ended"
    return JobEnd(
        status_reason=message or str(instance.get("StateTransitionReason", "")),
        container_reason=container,
        exit_code=exit_code,
        stop_code="SpotInterruption" if reclaimed else code,
        timed_out=exit_code in _TIME_IS_UP and not reclaimed and lasted >= lifetime,
        size=size,
        compute="ec2",
        image=image,
    )
