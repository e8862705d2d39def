"""What is known of the AWS Batch jobs of one executor: each job, each of its workers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cloudexec._aws.diagnosis import JobEnd
from cloudexec._aws.limits import WorkerSize
from cloudexec._aws.prices import WorkerPrice, run_seconds
from cloudexec._launchers.base import LaunchEnd

__all__ = ["Job", "Member", "dump", "end_of", "ended_at", "load", "seconds_of"]


@dataclass(slots=True)
class Member:
    """One worker of a job.

    Attributes:
        index: In the array.
        on_end: Whom to tell of its end.
        connected: Whether its session is open.
        began: When it began to cost, on the monotonic clock; ``None``: not yet.
        spent: Seconds that earlier attempts cost.
        attempts: Attempts that have ended.
        lost_at: When its session ended unexpectedly, and nobody knows why yet.
        ended: Whether it is over for the executor.
        gone: Whether it is over for AWS too, as far as that can be known.
    """

    index: int
    on_end: Callable[[str, LaunchEnd], None]
    connected: bool = False
    began: float | None = None
    spent: list[float] = field(default_factory=list)
    attempts: int = 0
    lost_at: float | None = None
    ended: bool = False
    gone: bool = False


@dataclass(slots=True)
class Job:
    """One submission.

    Attributes:
        first: Number of its first worker.
        name: Of the job.
        queue: Name or ARN.
        spot: Whether it runs on spare capacity.
        size: Of each worker.
        price: Of each worker.
        asked_at: When it was asked for.
        api: Seconds until AWS had accepted it.
        id: AWS's; empty until then.
        statuses: How many of its workers are in which state.
        reason: What it says of itself while it waits.
        sent: Whether a submission was ever tried.
        unanswered: Whether a submission may have reached AWS whose answer never came.
        terminated: Whether it is not needed any more.
    """

    first: int
    name: str
    queue: str
    spot: bool
    size: WorkerSize
    price: WorkerPrice
    members: dict[str, Member]
    asked_at: float
    api: float | None = None
    id: str = ""
    statuses: Counter[str] = field(default_factory=Counter)
    reason: str = ""
    sent: bool = False
    unanswered: bool = False
    terminated: bool = False

    @property
    def over(self) -> bool:
        return all(member.ended for member in self.members.values())

    def aws_id(self, member: Member) -> str:
        return self.id if len(self.members) == 1 else f"{self.id}:{member.index}"


def dump(job: Job) -> dict[str, Any]:
    """Return what a later process needs to know of a job, as JSON has it."""
    # Clocks that count from the start of a machine mean nothing to one on another.
    offset = time.time() - time.monotonic()
    return {
        "first": job.first,
        "name": job.name,
        "queue": job.queue,
        "spot": job.spot,
        "size": [job.size.memory_mib, job.size.vcpus, job.size.gpus],
        "asked_at": job.asked_at + offset,
        "id": job.id,
        "members": [
            [
                launch_id,
                member.index,
                None if member.began is None else member.began + offset,
                member.spent,
                member.attempts,
                member.ended,
            ]
            for launch_id, member in job.members.items()
        ],
    }


def load(
    left: Mapping[str, Any],
    price: Callable[[WorkerSize, bool], WorkerPrice],
    on_end: Callable[[str, LaunchEnd], None],
) -> Job:
    """Return a job of an earlier process.

    Args:
        left: What ``dump`` returned there.
        price: Says what a worker of a size costs, on spare capacity or not.
        on_end: Whom to tell of the ends of its workers.
    """
    offset = time.time() - time.monotonic()
    memory_mib, vcpus, gpus = left["size"]
    size, spot = WorkerSize(memory_mib=memory_mib, vcpus=vcpus, gpus=gpus), bool(left["spot"])
    job = Job(
        first=left["first"],
        name=left["name"],
        queue=left["queue"],
        spot=spot,
        size=size,
        price=price(size, spot),
        members={},
        asked_at=left["asked_at"] - offset,
        id=left["id"],
        sent=True,
        unanswered=not left["id"],
    )
    for launch_id, index, began, spent, attempts, ended in left["members"]:
        job.members[launch_id] = Member(
            index,
            on_end,
            began=None if began is None else began - offset,
            spent=list(spent),
            attempts=attempts,
            ended=ended,
            gone=ended,
        )
    return job


def end_of(details: Mapping[str, Any], attempts: Sequence[Mapping[str, Any]]) -> JobEnd:
    """Read how the last attempt ended."""
    last: Mapping[str, Any] = attempts[-1] if attempts else {}
    container = last.get("container") or details.get("container") or {}
    return JobEnd(
        status_reason=last.get("statusReason") or details.get("statusReason", ""),
        container_reason=container.get("reason", ""),
        exit_code=container.get("exitCode"),
    )


def ended_at(details: Mapping[str, Any], attempts: Sequence[Mapping[str, Any]]) -> float | None:
    """Read when the last attempt ended, on the monotonic clock; it may be told of much later."""
    stopped = (attempts[-1] if attempts else details).get("stoppedAt")
    if not stopped:
        return None
    ago = max(0.0, time.time() - float(stopped) / 1000)
    return time.monotonic() - ago


def seconds_of(attempt: Mapping[str, Any]) -> float:
    """Read how long an attempt ran; AWS counts in milliseconds."""
    began, ended = attempt.get("startedAt"), attempt.get("stoppedAt")
    return run_seconds(began / 1000, ended / 1000) if began and ended else 0.0
