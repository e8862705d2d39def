"""Watching jobs: their states, their workers' ends, and why workers do not come.

The connection of a worker is the sign that it lives; the platform is asked for the rest. Where
workers could be started elsewhere, too, those that wait here in vain are ended.
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
"""Seconds between looks at the platform while the end of a lost worker is to be explained."""
_POLL_WAITING = 1.0
_POLL_WAITING_LONG = 6.0
_POLL_SLOWEST = 15.0
_POLL_GROWTH = 1.25
_DIAGNOSE_AFTER = 2.0
_DIAGNOSE_EVERY = 5.0
_MOST_ENDS = 5
_TROUBLE_PATIENCE = 3.0
"""Seconds for which a submission may fail before its workers are started elsewhere."""
_SHARE_OF_TIMEOUT = 2 / 3
"""Of ``launch_timeout``, for which a worker may wait for a place at most before it is started
elsewhere: then it would count as failed to start."""
_SAMPLE = 3
"""Workers of a job that are asked why they wait."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What is known of other launchers of the same executor; see ``Launcher.give_way``.

    Attributes:
        count: Says how many of these launches could be started elsewhere now.
        patience: Seconds after which a worker waits in vain; ``None``: as the platform says.
    """

    count: Callable[[Sequence[str]], int]
    patience: float | None


class Watcher:
    """Watches the jobs of one executor.

    Args:
        platform: What is asked.
        ledger: The jobs.
        spot: Is told of machines that were taken back, and says which jobs wait in vain.
        terminate: Ends workers: launch ids, how they are said to have ended.
        launch_timeout: Seconds in which a worker has to dial back.
        elsewhere: Where workers can be started that find no place here; ``None``: nowhere.
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
        """Have the platform asked at once."""
        self._look.set()

    async def watch(self) -> None:
        """Ask again and again, more often while something is waited for; until cancelled."""
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
                # A bug must not end the watch: nobody would learn why workers do not come.
                _logger.exception("internal error while watching jobs")
            pause = min(pause * _POLL_GROWTH, _POLL_SLOWEST)

    def _pause(self, pause: float) -> float:
        """Return how long to wait until the next look, where the last wait was that long."""
        away = [m for job in self._ledger.alive() for _, m in job.waiting()]
        if self._elsewhere is not None:
            away += [m for job in self._ledger.unsubmitted() for _, m in job.waiting()]
        if any(member.lost_at is not None for member in away):
            return _POLL_EVIDENCE
        if not away:
            return _POLL_SLOWEST
        return min(max(pause, _POLL_WAITING), _POLL_WAITING_LONG, self._launch_timeout / 6)

    async def inspect(self, jobs: Sequence[Job], *, survey: bool = False) -> dict[int, JobStatus]:
        """Ask for the states of jobs, and of those of their workers that matter.

        Args:
            jobs: Which.
            survey: Whether they are taken over: they may have ended long ago, and nobody asks why.

        Returns:
            What is said of those that the platform knows of, by the numbers of their first workers.
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
            # Any one of those that wait says why they do.
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
        """Take in what the platform says of one worker."""
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
            # Its session will end in a moment, and what it still says counts more.
            member.attempts = len(ends) - 1 if again else member.attempts
            return
        if member.began is None:
            # It came and went between two looks.
            member.spent += [seconds_of(each) for each in ends[member.attempts :]]
        member.attempts = len(ends)
        end = ends[-1] if ends else WorkerEnd()
        if not end.reclaimed and not late and member.lost_at is None:
            self._ends = [*self._ends[1 - _MOST_ENDS :], end]
            self._diagnosed_at = float("-inf")
        if end.reclaimed:
            self._spot.note_reclaim(job)
        if again and member.lost_at is None:
            return  # it never dialed back, and the platform tries it once more
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
        """Where it is only preferred, have on demand what waits for spare capacity too long."""
        full: bool | None = None
        for job in jobs:
            if not self._spot.waits_in_vain(job, time.monotonic()):
                continue
            # Their tasks can run on workers of the same size, which have the capacity.
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
        """Return the workers of a job that have no place: the others are paid for."""
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
        """Where they can be started elsewhere, end workers that the platform does not take."""
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
        """Where they can be started elsewhere, end workers that wait for a place in vain."""
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
        # Which of them have a place is asked only if some can be started elsewhere.
        if self._elsewhere is not None and self._elsewhere.count(waiting):
            self._leave(await self._without_place(job), why)

    def _leave(self, launch_ids: Sequence[str], why: str) -> None:
        """End as many of these workers as can be started elsewhere; the first ones wait on."""
        if self._elsewhere is not None and launch_ids:
            count = self._elsewhere.count(launch_ids)
            self._terminate(launch_ids[len(launch_ids) - count :], LaunchEnd(why))

    def _patience(self) -> float:
        """Return how long a worker may wait for a place; those before it have to get one, too."""
        assert self._elsewhere is not None
        patience = self._elsewhere.patience
        if patience is None:
            jobs = [*self._ledger.alive(), *self._ledger.unsubmitted()]
            patience = self._platform.spot_patience(sum(len(job.members) for job in jobs))
        return min(patience, self._launch_timeout * _SHARE_OF_TIMEOUT)

    async def _diagnose(self, jobs: Sequence[Job], now: float) -> None:
        """While workers are waited for, find out why."""
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
            return  # a worker that ended fails its own launch, and not those that may do better
        if before != explanation:
            self._diagnosed_at -= _DIAGNOSE_EVERY - 1.0  # look again soon
        else:
            # Seen twice, and waiting does not change it.
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
