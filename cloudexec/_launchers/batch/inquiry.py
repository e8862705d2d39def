"""Asks AWS why workers have not connected: looks up queue, environments, quotas and logs."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from cloudexec._aws.diagnosis import LOG_LINES, Cause, JobEnd, Situation
from cloudexec._aws.quotas import vcpu_quotas
from cloudexec._errors import AwsError
from cloudexec._launchers.platform import Phase, Reason, WaitingJob, WorkerEnd

__all__ = ["DEFAULT_LOG_GROUP", "Inquiry", "reason_of", "statuses_of"]

DEFAULT_LOG_GROUP = "/aws/batch/job"
"""Log group of jobs that name none. AWS Batch User Guide, "Using CloudWatch Logs"."""
_QUOTAS_HOLD = 60.0
"""Seconds after which quotas are read again, as AWS may have granted larger ones."""


_STATES = {
    Phase.ACCEPTED: "SUBMITTED",
    Phase.WAITING: "RUNNABLE",
    Phase.STARTING: "STARTING",
    Phase.RUNNING: "RUNNING",
}


def statuses_of(waiting: Sequence[WaitingJob]) -> Counter[str]:
    """Count the workers that are not connected, by AWS Batch's states."""
    statuses: Counter[str] = Counter()
    for each in waiting:
        statuses.update({_STATES[p]: n for p, n in each.counts.items() if p in _STATES})
        statuses["RUNNING"] -= each.connected
    return statuses


def reason_of(cause: Cause | None) -> Reason | None:
    """Return a cause in the form in which a platform explains it."""
    if cause is None:
        return None
    return Reason(cause.text, cause.remedy, cause.fatal, no_room=cause.no_room)


class Inquiry:
    """Looks up facts for a diagnosis. Facts for which a permission is missing are left out.

    Args:
        call: Makes a call to AWS. Takes service, operation and parameters.
        compute: ``"fargate"`` or ``"ec2"``.

    Attributes:
        log_group: Log group of the workers.
        advertised: The address that workers dial, and how it was found; empty behind a relay.
        relay: The relay's present address, or its ``ssh://`` URL; empty if workers dial this
            process.
    """

    def __init__(self, call: Callable[..., Awaitable[Any]], compute: str) -> None:
        self.log_group = DEFAULT_LOG_GROUP
        self.advertised = self.relay = ""
        self._call = call
        self._compute = compute
        self._quotas: dict[str, float] = {}
        self._quotas_read_at = float("-inf")

    async def log_tail(self, details: Mapping[str, Any]) -> str:
        """Return the last lines of a worker's log; empty if they cannot be read."""
        attempts = details.get("attempts") or [{}]
        container = attempts[-1].get("container") or details.get("container") or {}
        stream = container.get("logStreamName") or (details.get("container") or {}).get(
            "logStreamName"
        )
        return await self.tail(stream) if stream else ""

    async def tail(self, stream: str) -> str:
        """Return the last lines of a log stream; empty if they cannot be read."""
        try:
            page = await self._call(
                "logs",
                "get_log_events",
                logGroupName=self.log_group,
                logStreamName=stream,
                limit=LOG_LINES,
                startFromHead=False,
            )
        except AwsError:
            return ""  # the log only adds to a diagnosis
        return "\n".join(event["message"].rstrip() for event in page.get("events", ()))

    async def queue(self, name: str) -> tuple[Mapping[str, Any], Sequence[Mapping[str, Any]]]:
        """Look up a job queue and its compute environments.

        Args:
            name: Name or ARN of the queue.

        Raises:
            AwsError: If AWS refuses, or cannot be reached.
        """
        answer = await self._call("batch", "describe_job_queues", jobQueues=[name])
        queues = answer.get("jobQueues", ())
        found: Mapping[str, Any] = queues[0] if queues else {}
        order = [e["computeEnvironment"] for e in found.get("computeEnvironmentOrder", ())]
        if not order:
            return found, ()
        described = await self._call(
            "batch", "describe_compute_environments", computeEnvironments=order
        )
        return found, described["computeEnvironments"]

    def known(self, waiting: Sequence[WaitingJob], ends: Sequence[WorkerEnd]) -> Situation:
        """Return the facts that are known without another question to AWS.

        Args:
            waiting: The jobs that wait, the oldest first.
            ends: Ends of workers that never connected.
        """
        return Situation(
            statuses=statuses_of(waiting),
            reasons=[each.reason for each in waiting if each.reason],
            ends=[end.details for end in ends if isinstance(end.details, JobEnd)],
            spot=waiting[0].spot,
            advertised=self.advertised,
            relay=self.relay,
        )

    async def situation(
        self,
        waiting: Sequence[WaitingJob],
        ends: Sequence[JobEnd],
        *,
        queue: str,
        vcpus: float,
        used_vcpus: float,
    ) -> Situation:
        """Gather the facts from which the cause of missing workers is derived.

        Args:
            waiting: The jobs that wait, the oldest first.
            ends: Ends of attempts that never connected.
            queue: Name or ARN of the queue in which the oldest job waits.
            vcpus: vCPUs of each worker of the oldest job.
            used_vcpus: vCPUs of all workers that have a place on the same kind of capacity.

        Raises:
            AwsError: If AWS refuses, or cannot be reached.
        """
        found, environments = await self.queue(queue)
        statuses = statuses_of(waiting)
        is_stuck = bool(statuses["RUNNABLE"])
        return Situation(
            statuses=statuses,
            reasons=[each.reason for each in waiting if each.reason],
            ends=ends,
            queue=queue.rpartition("/")[2],
            queue_state=found.get("state", ""),
            queue_status=found.get("status", ""),
            queue_reason=found.get("statusReason", ""),
            environments=environments,
            ahead=await self._ahead(queue, waiting[0].job_id) if is_stuck else 0,
            vcpus=vcpus,
            used_vcpus=used_vcpus,
            spot=waiting[0].spot,
            quota_vcpus=await self._quota(spot=waiting[0].spot) if is_stuck else None,
            advertised=self.advertised,
            relay=self.relay,
        )

    async def _ahead(self, queue: str, job_id: str) -> int:
        """Return how many of the jobs that AWS shows are before this job in the queue."""
        try:
            snapshot = await self._call("batch", "get_job_queue_snapshot", jobQueue=queue)
        except (AwsError, KeyError):
            return 0  # a permission is missing, or the SDK is too old for this call
        ahead = 0
        for each in snapshot.get("frontOfQueue", {}).get("jobs", ()):
            if each["jobArn"].partition("job/")[2].partition(":")[0] == job_id:
                break
            ahead += 1
        return ahead

    async def _quota(self, *, spot: bool) -> float | None:
        now = time.monotonic()
        if now - self._quotas_read_at > _QUOTAS_HOLD:
            self._quotas_read_at = now
            try:
                self._quotas = await vcpu_quotas(self._call, (self._compute,))
            except AwsError:
                self._quotas = {}  # quotas only add to a diagnosis
        return self._quotas.get(self._compute + ("_spot" if spot else ""))
