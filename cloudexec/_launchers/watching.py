"""Watches jobs: asks the platform how workers ended, and why workers have not connected.

A worker with a connection is known to be alive, so the platform is asked about the others only. If
other launchers could start workers, those that wait too long for a place here are ended.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from cloudexec._errors import PlatformError
from cloudexec._launchers.base import LaunchEnd
from cloudexec._launchers.ledger import Job, Ledger, ended_at, seconds_of
from cloudexec._launchers.platform import (
    Inspection,
    JobStatus,
    Phase,
    Platform,
    WaitingJob,
    WorkerEnd,
    WorkerStatus,
)
from cloudexec._launchers.spot import SpotPolicy
from cloudexec._log import Log

__all__ = ["Elsewhere", "Watcher"]

_logger = Log()

_POLL_EVIDENCE = 0.5
"""Seconds between two requests while the cause of a lost worker's end is looked for."""
_POLL_WAITING = 1.0
_POLL_WAITING_LONG = 6.0
_POLL_SLOWEST = 15.0
_POLL_GROWTH = 1.25
_DIAGNOSE_AFTER = 2.0
_DIAGNOSE_EVERY = 5.0
_MOST_ENDS = 5
_TROUBLE_PATIENCE = 3.0
"""Seconds for which a submission may fail before another launcher starts its workers."""
_SHARE_OF_TIMEOUT = 2 / 3
"""Largest share of ``launch_timeout`` for which a worker may wait for a place before another
launcher starts it. A worker that waits for all of it would count as failed to start."""
_SAMPLE = 3
"""Largest number of workers of a job that are looked up to learn why workers wait."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """The other launchers of the same executor; see ``Launcher.give_way``.

    Attributes:
        count: Takes launch ids, and returns how many of these workers others could start now.
        patience: Seconds that a worker may wait for a place; ``None`` for the platform's default.
    """

    count: Callable[[Sequence[str]], int]
    patience: float | None


class Watcher:
    """Watches the jobs of one executor.

    Args:
        platform: The platform that runs the jobs.
        ledger: The records of the jobs.
        spot: Counts reclaimed machines, and decides which jobs have waited in vain.
        terminate: Ends workers. Takes their launch ids and the end to report.
        launch_timeout: Seconds within which a worker must connect.
        elsewhere: Other launchers for workers that find no place here; ``None`` if there are none.
    """

    def __init__(
        self,
        platform: Platform,
        ledger: Ledger,
        spot: SpotPolicy,
        terminate: Callable[[Sequence[str], LaunchEnd], None],
        launch_timeout: float,
        elsewhere: Elsewhere | None,
    ) -> None:
        self._platform = platform
        self._ledger = ledger
        self._spot = spot
        self._terminate = terminate
        self._launch_timeout = launch_timeout
        self._elsewhere = elsewhere
        self._look = asyncio.Event()
        self._ends: list[WorkerEnd] = []
        self._diagnosed_at = float("-inf")
        self._unreachable = False

    def look_soon(self) -> None:
        """Let the next request to the platform be made at once."""
        self._look.set()

    async def watch(self) -> None:
        """Ask the platform periodically, more often while workers are missing, until cancelled."""
        pause = _POLL_WAITING
        while True:
            pause = self._pause(pause)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._look.wait(), pause)
                pause = _POLL_WAITING
            self._look.clear()
            alive = self._ledger.alive()
            try:
                self._leave_unsubmitted(time.monotonic())
                if alive:
                    await self.inspect(alive)
                await self._leave_spot(alive)
                await self._leave_full(alive, time.monotonic())
                await self._diagnose(alive, time.monotonic())
                self._unreachable = False
            except PlatformError as exc:
                if not self._unreachable:
                    self._unreachable = True
                    _logger.warning(
                        "%s cannot be asked for the state of jobs now: %s", self._platform.name, exc
                    )
            except Exception:
                # A bug must not end the watch, as then no problem would be reported any more.
                _logger.exception("internal error while watching jobs")
            pause = min(pause * _POLL_GROWTH, _POLL_SLOWEST)

    def _pause(self, pause: float) -> float:
        """Return the seconds until the next request.

        Args:
            pause: The present pause while workers are missing; it grows with each request.
        """
        away = [m for job in self._ledger.alive() for _, m in job.waiting()]
        if self._elsewhere is not None:
            away += [m for job in self._ledger.unsubmitted() for _, m in job.waiting()]
        if any(member.lost_at is not None for member in away):
            return _POLL_EVIDENCE
        if not away:
            return _POLL_SLOWEST
        return min(max(pause, _POLL_WAITING), _POLL_WAITING_LONG, self._launch_timeout / 6)

    async def inspect(self, jobs: Sequence[Job], *, survey: bool = False) -> dict[int, JobStatus]:
        """Ask the platform for the status of jobs, and record it.

        Args:
            jobs: The jobs.
            survey: Whether the jobs are being taken over. Workers may then have ended long ago, and
                the causes do not matter.

        Returns:
            The status of each job that the platform knows, by ``Job.first``.
        """
        statuses = await self._platform.describe([self._inspection(job, survey) for job in jobs])
        known: dict[int, JobStatus] = {}
        for job in jobs:
            status = statuses.get(job.id)
            if status is None:
                continue
            known[job.first] = status
            job.counts, job.reason = status.counts, status.reason
            job.worker_ids = tuple(status.worker_ids) or job.worker_ids
            job.price = status.price or job.price
            job.note_begun()
            by_index = {member.index: launch_id for launch_id, member in job.members.items()}
            for index, worker in status.workers.items():
                if index in by_index:
                    self._take(job, by_index[index], worker, late=survey)
        return known

    def _inspection(self, job: Job, survey: bool) -> Inspection:
        members = job.members.values()
        wanted = [m.index for m in members if m.lost_at is not None and not m.ended]
        if not wanted and time.monotonic() - job.asked_at > _DIAGNOSE_AFTER:
            # A few of the waiting workers are enough, as all wait for the same reason.
            wanted = [m.index for _, m in job.waiting()][:_SAMPLE]
        return Inspection(
            job_id=job.id,
            workers=len(job.members),
            settled={m.index for m in members if m.ended},
            connected={m.index for m in members if m.connected},
            known_ends={m.index: m.attempts for m in members if m.attempts},
            wanted=wanted,
            survey=survey,
            worker_ids=job.worker_ids,
        )

    def _take(self, job: Job, launch_id: str, status: WorkerStatus, *, late: bool) -> None:
        """Record the status of one worker, and report an end of it that is new."""
        member = job.members[launch_id]
        if member.ended:
            return
        ends = status.ends
        over = status.phase is Phase.ENDED
        again = len(ends) > member.attempts and not over
        if not over and not again:
            if not job.reason and status.phase is Phase.WAITING:
                job.reason = status.reason
            return
        if member.connected:
            # Its session will end in a moment, and the worker itself may still say why.
            member.attempts = len(ends) - 1 if again else member.attempts
            return
        if member.began is None:
            # The run has begun and ended between two requests.
            member.spent += [seconds_of(each) for each in ends[member.attempts :]]
        member.attempts = len(ends)
        end = ends[-1] if ends else WorkerEnd()
        if not end.reclaimed and not late and member.lost_at is None:
            self._ends = [*self._ends[1 - _MOST_ENDS :], end]
            self._diagnosed_at = float("-inf")
        if end.reclaimed:
            self._spot.note_reclaim(job)
        if again and member.lost_at is None:
            return  # it never connected, and the platform starts it once more
        member.gone = over
        told = LaunchEnd(
            str(end.reason),
            killed=end.killed,
            fatal=end.reason.fatal and over,
            reclaimed=end.reclaimed,
            out_of_memory=end.out_of_memory,
            relaunched=again,
        )
        self._ledger.end(job, launch_id, told, ended_at=ended_at(end) if late else None)

    async def _leave_spot(self, jobs: Sequence[Job]) -> None:
        """With ``spot="prefer"``, end workers that wait too long for spare capacity.

        The executor then requests them again, and they run on demand.
        """
        full: bool | None = None
        for job in jobs:
            if not self._spot.waits_in_vain(job, time.monotonic()):
                continue
            # If workers of the same size have a place, the tasks can run there.
            served = any(
                each.spot and each.size == job.size and each.count(Phase.STARTING, Phase.RUNNING)
                for each in jobs
            )
            if served and not self._platform.lacks_capacity(job.reason):
                if full is None:
                    full = await self._platform.is_full(
                        [_waiting_job(each) for each in jobs if each.spot]
                    )
                if full:
                    continue
            waiting = await self._without_place(job)
            self._spot.leave(job, time.monotonic())
            self._terminate(waiting, LaunchEnd("there was no Spot capacity", reclaimed=True))

    async def _without_place(self, job: Job) -> list[str]:
        """Return the launch ids of workers without a place, which cost nothing yet."""
        members = {m.index: launch_id for launch_id, m in job.waiting()}
        known: Mapping[int, WorkerStatus] = {}
        if job.count(Phase.STARTING, Phase.RUNNING):
            inspection = replace(self._inspection(job, survey=False), wanted=list(members))
            statuses = await self._platform.describe([inspection])
            known = statuses[job.id].workers if job.id in statuses else {}
        return [
            launch_id
            for index, launch_id in members.items()
            if index not in known or known[index].phase in (Phase.ACCEPTED, Phase.WAITING)
        ]

    def _leave_unsubmitted(self, now: float) -> None:
        """End workers whose jobs the platform does not accept, if others can start them."""
        if self._elsewhere is None:
            return
        for job in self._ledger.unsubmitted():
            waited = now - job.asked_at
            if job.trouble and now - job.trouble_since > _TROUBLE_PATIENCE:
                self._leave([launch_id for launch_id, _ in job.waiting()], job.trouble)
            elif waited > self._patience():
                why = f"{self._platform.name} has not taken the job within {waited:.0f} s"
                self._leave([launch_id for launch_id, _ in job.waiting()], why)

    async def _leave_full(self, jobs: Sequence[Job], now: float) -> None:
        """End workers that wait too long for a place, if other launchers can start them."""
        for job in jobs:
            if self._elsewhere is None or not job.count(Phase.ACCEPTED, Phase.WAITING):
                continue
            waited = now - job.asked_at
            if self._platform.lacks_capacity(job.reason):
                await self._leave_job(job, f"there is no capacity: {job.reason}")
            elif waited > self._patience():
                said = f": {job.reason}" if job.reason else ""
                await self._leave_job(job, f"no place was found within {waited:.0f} s{said}")

    async def _leave_job(self, job: Job, why: str) -> None:
        waiting = [launch_id for launch_id, _ in job.waiting()]
        # The platform is asked which of them have a place only if others can start some.
        if self._elsewhere is not None and self._elsewhere.count(waiting):
            self._leave(await self._without_place(job), why)

    def _leave(self, launch_ids: Sequence[str], why: str) -> None:
        """End as many of these workers as other launchers can start; the first ones wait on."""
        if self._elsewhere is not None and launch_ids:
            count = self._elsewhere.count(launch_ids)
            self._terminate(launch_ids[len(launch_ids) - count :], LaunchEnd(why))

    def _patience(self) -> float:
        """Return how many seconds a worker may wait for a place; many workers take longer."""
        assert self._elsewhere is not None
        patience = self._elsewhere.patience
        if patience is None:
            jobs = [*self._ledger.alive(), *self._ledger.unsubmitted()]
            patience = self._platform.spot_patience(sum(len(job.members) for job in jobs))
        return min(patience, self._launch_timeout * _SHARE_OF_TIMEOUT)

    async def _diagnose(self, jobs: Sequence[Job], now: float) -> None:
        """Find out why workers have not connected, and give them up if that cannot change."""
        missing = sorted((job for job in jobs if any(job.waiting())), key=lambda job: job.asked_at)
        if not missing:
            if any(member.connected for job in jobs for member in job.members.values()):
                self._ledger.explanation = ""
                self._ends.clear()
            return
        news = bool(self._ends) and self._diagnosed_at == float("-inf")
        early = now - missing[0].asked_at < _DIAGNOSE_AFTER
        if (early or now - self._diagnosed_at < _DIAGNOSE_EVERY) and not news:
            return
        self._diagnosed_at = now
        ends = tuple(self._ends)
        placed = [
            job for job in jobs if job not in missing and job.count(Phase.STARTING, Phase.RUNNING)
        ]
        reason = await self._platform.explain(
            [_waiting_job(job) for job in (*missing, *placed)], ends
        )
        before, explanation = self._ledger.explanation, "" if reason is None else str(reason)
        self._ledger.explanation = explanation
        if reason is not None and reason.no_room:
            oldest = missing[0]
            for job in missing:
                if (job.spot, job.size) == (oldest.spot, oldest.size):
                    await self._leave_job(job, reason.text)
        if reason is None or not reason.fatal or ends:
            return  # an ended worker fails only its own launch, as other workers may succeed
        if before != explanation:
            self._diagnosed_at -= _DIAGNOSE_EVERY - 1.0  # look again soon
        else:
            # The reason was the same twice, and waiting does not change it.
            waiting = [launch_id for each in missing for launch_id, _ in each.waiting()]
            self._terminate(waiting, LaunchEnd(explanation, fatal=True))


def _waiting_job(job: Job) -> WaitingJob:
    return WaitingJob(
        job_id=job.id,
        size=job.size,
        spot=job.spot,
        counts=job.counts,
        connected=sum(member.connected for member in job.members.values()),
        reason=job.reason,
    )
