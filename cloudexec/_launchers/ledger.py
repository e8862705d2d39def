"""The records of one executor's jobs: the jobs, their workers, and the workers' costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cloudexec._launchers.base import Arrival, Cost, LaunchEnd, LaunchTimes
from cloudexec._launchers.platform import Phase, Submitted, Target, WorkerEnd
from cloudexec._pricing import WorkerPrice, run_seconds

__all__ = ["Job", "Ledger", "Member", "dump", "ended_at", "load", "seconds_of"]


@dataclass(slots=True)
class Member:
    """One worker of a job.

    Attributes:
        index: Its index in the job.
        on_end: Called with its launch id and its end.
        connected: Whether its session is open.
        began: Time from which it costs money, on the monotonic clock; ``None`` if it does not yet.
        spent: Durations of its earlier attempts, in seconds.
        attempts: Number of attempts that have ended.
        lost_at: Time when its session ended unexpectedly; ``None`` if it did not, or if the cause
            is known.
        ended: Whether its end was reported to the executor.
        gone: Whether it has ended on the platform, too, or was terminated there.
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
    """One job that was, or will be, submitted to the platform.

    Attributes:
        first: Number of its first worker's launch.
        name: Name of the job.
        spot: Whether it runs on spare capacity.
        size: The size of its workers.
        price: The price of each worker.
        members: Its workers, by launch id.
        asked_at: Time of the executor's request, on the monotonic clock.
        api: Seconds until the platform had accepted the job.
        id: The platform's id for the job; empty until the job is accepted.
        worker_ids: The platform's ids for the workers, if they are not made from ``id``.
        counts: Number of its workers in each phase.
        reason: The platform's message about the job while it waits.
        sent: Whether a submission was ever tried.
        unanswered: Whether the platform may have the job although no submission was answered.
        trouble: Error because of which the submission is repeated; empty if there is none.
        trouble_since: Time of the first such error, on the monotonic clock.
        terminated: Whether the executor does not need the job any more.
    """

    first: int
    name: str
    spot: bool
    size: int
    price: WorkerPrice
    members: dict[str, Member]
    asked_at: float
    api: float | None = None
    id: str = ""
    worker_ids: Sequence[str] = ()
    counts: Mapping[Phase, int] = field(default_factory=dict)
    reason: str = ""
    sent: bool = False
    unanswered: bool = False
    trouble: str = ""
    trouble_since: float = 0.0
    terminated: bool = False

    @property
    def over(self) -> bool:
        return all(member.ended for member in self.members.values())

    def count(self, *phases: Phase) -> int:
        """Return how many workers are in one of these phases."""
        return sum(self.counts.get(phase, 0) for phase in phases)

    def waiting(self) -> Iterator[tuple[str, Member]]:
        """Yield the launch ids and workers that are neither connected nor ended."""
        for launch_id, member in self.members.items():
            if not member.connected and not member.ended:
                yield launch_id, member

    def worker_id(self, member: Member) -> str:
        """Return what the platform calls a worker."""
        if member.index < len(self.worker_ids) and self.worker_ids[member.index]:
            return self.worker_ids[member.index]
        return self.id if len(self.members) == 1 else f"{self.id}:{member.index}"

    def target(self, members: Sequence[Member]) -> Target:
        """Return the target for a request to end these workers."""
        whole = len(members) == len(self.members)
        return Target(
            job_id=self.id,
            workers=None if whole else [member.index for member in members],
            worker_ids=self.worker_ids,
        )

    def taken(self, submitted: Submitted) -> None:
        """Record that the platform has accepted the job, and the ids that it has given."""
        self.id = submitted.job_id
        self.worker_ids = tuple(submitted.worker_ids)

    def note_begun(self) -> None:
        """Begin to count the cost of workers that have a place, whether or not they connect."""
        members = [member for member in self.members.values() if not member.ended]
        missing = self.count(Phase.STARTING, Phase.RUNNING)
        missing -= sum(member.began is not None for member in members)
        for member in members:
            if missing <= 0:
                break
            if member.began is None:
                # The counts do not tell which workers have a place, but the sum is the same.
                member.began = time.monotonic()
                missing -= 1


class Ledger:
    """The jobs of one executor.

    Args:
        stop_seconds: Seconds for which a worker may still cost money after it was terminated.

    Attributes:
        jobs: All jobs, including those whose workers have all ended.
        explanation: Why launched workers have not connected; empty if no reason is known.
        inherited_usd: Cost of the jobs that ended in earlier processes of the executor.
    """

    def __init__(self, stop_seconds: float = 30.0) -> None:
        self._stop_seconds = stop_seconds
        self.jobs: list[Job] = []
        self.explanation = ""
        self.inherited_usd = 0.0
        self._job_of: dict[str, Job] = {}

    def add(self, job: Job) -> None:
        """Add a job."""
        self.jobs.append(job)
        self._job_of.update(dict.fromkeys(job.members, job))

    def job_of(self, launch_id: str) -> Job | None:
        """Return the job of a worker; ``None`` if the launch id is not known."""
        return self._job_of.get(launch_id)

    def launch_of(self, first: str, worker_id: str) -> str:
        """Return the launch of a worker that knows only what the platform calls it.

        Args:
            first: The first launch of its job.
            worker_id: What the platform calls the worker.

        Returns:
            The launch; empty: the platform has not said yet which of the job's workers it is.
        """
        job = self._job_of.get(first)
        if job is None or job.over:
            return first
        if worker_id not in job.worker_ids:
            return ""
        index = job.worker_ids.index(worker_id)
        found = (launch for launch, member in job.members.items() if member.index == index)
        return next(found, first)

    def alive(self) -> list[Job]:
        """Return the jobs that the platform has accepted and that have workers left."""
        return [job for job in self.jobs if job.id and not job.over]

    def unsubmitted(self) -> list[Job]:
        """Return the jobs that the platform has not accepted yet and that have workers left."""
        return [job for job in self.jobs if not job.id and not job.over]

    def connected(self, launch_id: str, arrival: Arrival) -> None:
        """Record that a worker has connected, and when it began to cost money."""
        job = self._job_of[launch_id]
        member = job.members[launch_id]
        member.connected = True
        member.lost_at = None
        if arrival.attempt > member.attempts + 1:
            # The platform has started the worker again, before it reported the earlier end.
            member.attempts = arrival.attempt - 1
            if member.began is not None:
                member.spent.append(run_seconds(member.began, time.monotonic()))
                member.began = None
        earlier = (arrival.boot or 0.0) + (arrival.pull or 0.0)
        began = max(time.monotonic() - earlier, job.asked_at)
        member.began = began if member.began is None else min(began, member.began)

    def disconnected(self, launch_id: str, *, orderly: bool) -> bool:
        """Record that a worker's session has ended.

        Args:
            launch_id: The worker's launch.
            orderly: Whether the worker was told to end, and exits by itself.

        Returns:
            Whether the cause must be looked up on the platform.
        """
        job = self._job_of[launch_id]
        member = job.members[launch_id]
        member.connected = False
        if orderly:
            member.gone = True
            self.end(job, launch_id, LaunchEnd("it ended as it was told to"))
            return False
        if not member.ended:
            member.lost_at = time.monotonic()
        return not member.ended

    def end(self, job: Job, launch_id: str, end: LaunchEnd, ended_at: float | None = None) -> None:
        """Record that an attempt of a worker has ended, and call the worker's ``on_end``.

        Args:
            job: The worker's job.
            launch_id: The worker's launch.
            end: The end to report.
            ended_at: Time of the end, on the monotonic clock; ``None`` for now.
        """
        member = job.members[launch_id]
        if member.ended:
            return
        if member.began is not None:
            until = time.monotonic() if ended_at is None else ended_at
            member.spent.append(run_seconds(member.began, until))
            member.began = None
        member.lost_at = None
        member.connected = False
        member.ended = not end.relaunched
        if end.fatal:
            self.explanation = end.reason  # replaces the reason for which it was tried again
        member.on_end(launch_id, end)

    def times(self, launch_id: str) -> LaunchTimes | None:
        """Return the known times of a launch."""
        job = self._job_of.get(launch_id)
        if job is None:
            return None
        job_id = job.worker_id(job.members[launch_id]) if job.id else ""
        return LaunchTimes(launch=launch_id, job_id=job_id, api=job.api or None)

    def least_of(self, price: WorkerPrice) -> float:
        """Return the cost, in USD, of a worker that is terminated as soon as it has started."""
        return max(price.least, price.cost(self._stop_seconds))

    def cost(self, usual: WorkerPrice) -> Cost:
        """Return the cost of the workers so far, and the further cost that is unavoidable.

        Args:
            usual: The price of a worker, whose table is named even if there is no job.
        """
        now = time.monotonic()
        accrued, committed, rate = self.inherited_usd, 0.0, 0.0
        for job in self.jobs:
            price = job.price
            for member in job.members.values():
                accrued += price.cost_of(member.spent)
                if member.began is not None:
                    seconds = run_seconds(member.began, now)
                    # The shortest run must be paid as soon as the run begins.
                    accrued += price.cost(seconds)
                    rate += price.per_hour
                    beyond = seconds + self._stop_seconds - max(seconds, price.least_seconds)
                    committed += max(0.0, beyond) * price.per_second
                elif not member.ended:
                    committed += self.least_of(price)
        note = f"estimated from the {usual.table}" if usual.table else ""
        notes = dict.fromkeys([note, *(job.price.note for job in self.jobs)])
        return Cost(
            accrued_usd=accrued,
            committed_usd=committed,
            per_hour_usd=rate,
            note=", ".join(filter(None, notes)),
        )

    def over_usd(self) -> float:
        """Return the cost, in USD, of jobs without workers left, also of earlier processes."""
        over = (job for job in self.jobs if job.over)
        return self.inherited_usd + sum(
            job.price.cost_of(member.spent) for job in over for member in job.members.values()
        )


def dump(job: Job, capacity: Sequence[float] | None) -> dict[str, Any]:
    """Return, as JSON data, what a later process needs to take over a job.

    Args:
        job: The job.
        capacity: The resources of its workers, by which ``load`` finds the size again. A size that
            was made for a task may have another number in another process.
    """
    # Times are saved as Unix time: another machine's monotonic clock starts elsewhere.
    offset = time.time() - time.monotonic()
    return {
        "first": job.first,
        "name": job.name,
        "spot": job.spot,
        "size": job.size,
        "capacity": capacity,
        "asked_at": job.asked_at + offset,
        "id": job.id,
        "worker_ids": list(job.worker_ids),
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
    size_of: Callable[[int, Sequence[float] | None], int],
    price: Callable[[int, bool], WorkerPrice],
    on_end: Callable[[str, LaunchEnd], None],
) -> Job:
    """Return a job of an earlier process.

    Args:
        left: The data that ``dump`` returned in the earlier process.
        size_of: Takes the size's number in the earlier process and the workers' resources, and
            returns its number in this process.
        price: Takes a size, and whether it is on spare capacity; returns the price of a worker.
        on_end: Called with the launch id and end of each worker.
    """
    offset = time.time() - time.monotonic()
    size, spot = size_of(int(left["size"]), left["capacity"]), bool(left["spot"])
    job = Job(
        first=left["first"],
        name=left["name"],
        spot=spot,
        size=size,
        price=price(size, spot),
        members={},
        asked_at=left["asked_at"] - offset,
        id=left["id"],
        worker_ids=tuple(left["worker_ids"]),
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


def seconds_of(end: WorkerEnd) -> float:
    """Return the duration of a run in seconds; 0 if it never began, or if it is not known."""
    if end.began_at is None or end.ended_at is None:
        return 0.0
    return run_seconds(end.began_at, end.ended_at)


def ended_at(end: WorkerEnd) -> float | None:
    """Return the time when a run ended, on the monotonic clock; ``None`` if it is not known."""
    if end.ended_at is None:
        return None
    ago = max(0.0, time.time() - end.ended_at)  # the platform's clock may differ from ours
    return time.monotonic() - ago
