"""What is known of the jobs of one executor: each job, each of its workers, and what they cost."""

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
        index: In the job.
        on_end: Whom to tell of its end.
        connected: Whether its session is open.
        began: When it began to cost, on the monotonic clock; ``None``: not yet.
        spent: Seconds that earlier attempts cost.
        attempts: Attempts that have ended.
        lost_at: When its session ended unexpectedly, and nobody knows why yet.
        ended: Whether it is over for the executor.
        gone: Whether it is over for the platform too, as far as that can be known.
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
        spot: Whether it runs on spare capacity.
        size: Which size its workers have.
        price: Of each worker.
        asked_at: When it was asked for.
        api: Seconds until the platform had accepted it.
        id: The platform's; empty until then.
        worker_ids: The platform's names for the workers, if they are not made from ``id``.
        counts: How many of its workers are in which phase.
        reason: What the platform says of it while it waits.
        sent: Whether a submission was ever tried.
        unanswered: Whether a submission may have got there whose answer never came.
        trouble: Why its submission is tried again; empty: it is not.
        trouble_since: Since when, on the monotonic clock.
        terminated: Whether it is not needed any more.
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
        """Yield those workers that are neither connected nor ended, with their launch ids."""
        for launch_id, member in self.members.items():
            if not member.connected and not member.ended:
                yield launch_id, member

    def worker_id(self, member: Member) -> str:
        """Return what the platform calls a worker."""
        if member.index < len(self.worker_ids) and self.worker_ids[member.index]:
            return self.worker_ids[member.index]
        return self.id if len(self.members) == 1 else f"{self.id}:{member.index}"

    def target(self, members: Sequence[Member]) -> Target:
        """Return these workers as something to be ended."""
        whole = len(members) == len(self.members)
        return Target(
            job_id=self.id,
            workers=None if whole else [member.index for member in members],
            worker_ids=self.worker_ids,
        )

    def taken(self, submitted: Submitted) -> None:
        """Note what the platform calls the job."""
        self.id = submitted.job_id
        self.worker_ids = tuple(submitted.worker_ids)

    def note_begun(self) -> None:
        """Count as paid for what has a place, also before it dials back, or if it never does."""
        members = [member for member in self.members.values() if not member.ended]
        missing = self.count(Phase.STARTING, Phase.RUNNING)
        missing -= sum(member.began is not None for member in members)
        for member in members:
            if missing <= 0:
                break
            if member.began is None:
                # Which of them it is, the counts do not say, and it does not matter.
                member.began = time.monotonic()
                missing -= 1


class Ledger:
    """The jobs of one executor.

    Args:
        stop_seconds: For how long a worker that is ended may still cost.

    Attributes:
        jobs: All of them, also those that are over.
        explanation: Why workers that were asked for are not there; empty: nothing is known.
        inherited_usd: What jobs cost that were over before this process began.
    """

    def __init__(self, stop_seconds: float = 30.0) -> None:
        self._stop_seconds = stop_seconds
        self.jobs: list[Job] = []
        self.explanation = ""
        self.inherited_usd = 0.0
        self._job_of: dict[str, Job] = {}

    def add(self, job: Job) -> None:
        """Enter a job."""
        self.jobs.append(job)
        self._job_of.update(dict.fromkeys(job.members, job))

    def job_of(self, launch_id: str) -> Job | None:
        """Return the job that a worker belongs to; ``None``: it is not known."""
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
        """Return the jobs that the platform has, and of which some worker has not ended."""
        return [job for job in self.jobs if job.id and not job.over]

    def unsubmitted(self) -> list[Job]:
        """Return the jobs that the platform has not taken yet, and that are still wanted."""
        return [job for job in self.jobs if not job.id and not job.over]

    def connected(self, launch_id: str, arrival: Arrival) -> None:
        """A worker has dialed back."""
        job = self._job_of[launch_id]
        member = job.members[launch_id]
        member.connected = True
        member.lost_at = None
        if arrival.attempt > member.attempts + 1:
            # The platform started it again before we had heard of the end.
            member.attempts = arrival.attempt - 1
            if member.began is not None:
                member.spent.append(run_seconds(member.began, time.monotonic()))
                member.began = None
        earlier = (arrival.boot or 0.0) + (arrival.pull or 0.0)
        began = max(time.monotonic() - earlier, job.asked_at)
        member.began = began if member.began is None else min(began, member.began)

    def disconnected(self, launch_id: str, *, orderly: bool) -> bool:
        """A worker's session ended.

        Args:
            launch_id: Which.
            orderly: Whether it ends by itself, as it was told to.

        Returns:
            Whether it is to be found out why.
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
        """Take in that an attempt of a worker ended, and tell.

        Args:
            job: Its job.
            launch_id: The worker.
            end: How.
            ended_at: When, on the monotonic clock; ``None``: now.
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
            self.explanation = end.reason  # what was known while it was tried again is outdated
        member.on_end(launch_id, end)

    def times(self, launch_id: str) -> LaunchTimes | None:
        """Say what is known of how a launch went."""
        job = self._job_of.get(launch_id)
        if job is None:
            return None
        job_id = job.worker_id(job.members[launch_id]) if job.id else ""
        return LaunchTimes(launch=launch_id, job_id=job_id, api=job.api or None)

    def least_of(self, price: WorkerPrice) -> float:
        """Return what a worker costs that is ended as soon as it runs, in USD, at the most."""
        return max(price.least, price.cost(self._stop_seconds))

    def cost(self, usual: WorkerPrice) -> Cost:
        """Say what the workers have cost, and will at least.

        Args:
            usual: The price of a worker, for the note if there is no job.
        """
        now = time.monotonic()
        accrued, committed, rate = self.inherited_usd, 0.0, 0.0
        for job in self.jobs:
            price = job.price
            for member in job.members.values():
                accrued += price.cost_of(member.spent)
                if member.began is not None:
                    seconds = run_seconds(member.began, now)
                    # The shortest run is owed as soon as it begins.
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
        """Return what jobs cost that are over, those of earlier processes too."""
        over = (job for job in self.jobs if job.over)
        return self.inherited_usd + sum(
            job.price.cost_of(member.spent) for job in over for member in job.members.values()
        )


def dump(job: Job, capacity: Sequence[float] | None) -> dict[str, Any]:
    """Return what a later process needs to know of a job, as JSON has it.

    Args:
        job: The job.
        capacity: What a worker of its size has, as ``load`` is to say it again: sizes that tasks
            have asked for have other numbers in another process.
    """
    # Clocks that count from the start of a machine mean nothing to one on another.
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
        left: What ``dump`` returned there.
        size_of: Says which size that is here, by its number there and what its workers have.
        price: Says what a worker of a size costs, on spare capacity or not.
        on_end: Whom to tell of the ends of its workers.
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
    """Return how long a run took; 0: it never began."""
    if end.began_at is None or end.ended_at is None:
        return 0.0
    return run_seconds(end.began_at, end.ended_at)


def ended_at(end: WorkerEnd) -> float | None:
    """Return when a run ended, on the monotonic clock; it may be told of much later."""
    if end.ended_at is None:
        return None
    ago = max(0.0, time.time() - end.ended_at)  # the platform's clock may differ from ours
    return time.monotonic() - ago
