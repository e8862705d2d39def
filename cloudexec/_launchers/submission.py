"""Submits jobs: repeats failed submissions, but never starts the workers of a job twice."""

from __future__ import annotations

import asyncio
import contextlib
import time

import tenacity

from cloudexec._errors import CloudexecError, LaunchError, PlatformError
from cloudexec._launchers.base import LaunchEnd
from cloudexec._launchers.ending import PATIENCE, Terminator, insist, may_pass
from cloudexec._launchers.ledger import Job, Ledger
from cloudexec._launchers.platform import JobRequest, Platform, Submitted
from cloudexec._log import Log

__all__ = ["Submitter"]

_logger = Log()

_PATIENCE = 300.0
"""Seconds for which a submission is repeated while the platform cannot take it."""
_LOOK_UP_PAUSES = (1.0, 2.0, 4.0)
"""Seconds before each look for a job whose submission was not answered. There are several looks,
as a platform's list may lag, and a second submission would start all of the workers twice."""


class _NotNeededError(LaunchError):
    """The executor does not need the job any more."""


class Submitter:
    """Submits the jobs of one executor.

    Args:
        platform: The platform to which jobs are submitted.
        ledger: Records which workers the platform has refused.
        terminator: Ends jobs that the executor does not need any more when they are accepted.

    Attributes:
        closing: Set when the executor has shut down; no job is submitted any more.
    """

    def __init__(self, platform: Platform, ledger: Ledger, terminator: Terminator) -> None:
        self.closing = asyncio.Event()
        self._platform = platform
        self._ledger = ledger
        self._terminator = terminator
        self._said = ""

    async def submit(self, job: Job, request: JobRequest) -> None:
        """Submit a job, or record that its workers have ended if the platform refuses it."""
        try:
            submitted = await self._persist(job, request)
            job.taken(submitted)
        except Exception as exc:
            if not isinstance(exc, CloudexecError):
                _logger.exception("internal error while submitting jobs")
            await self.end_unanswered(job)
            if not isinstance(exc, _NotNeededError):
                self._ledger.explanation = str(exc)
            end = LaunchEnd(str(exc), fatal=not may_pass(exc))
            for launch_id in list(job.members):
                self._ledger.end(job, launch_id, end)
            return
        job.api = time.monotonic() - job.asked_at
        self._end_shortfall(job, submitted.shortfall)
        if job.terminated or self.closing.is_set():
            await self._terminator.end_jobs([job], "it is not needed any more")

    def _end_shortfall(self, job: Job, shortfall: int) -> None:
        """Record that workers have ended which the platform did not take."""
        if shortfall <= 0:
            return
        taken = len(job.members) - shortfall
        end = LaunchEnd(f"{self._platform.name} took {taken} of {len(job.members)} workers")
        for launch_id, member in list(job.members.items())[taken:]:
            member.gone = True
            self._ledger.end(job, launch_id, end)

    async def _persist(self, job: Job, request: JobRequest) -> Submitted:
        """Submit a job, and repeat that while the platform throttles or cannot be reached."""

        def worth_it(exc: BaseException) -> bool:
            if not may_pass(exc) or self.closing.is_set():
                return False
            if not job.trouble:
                job.trouble_since = time.monotonic()
            job.trouble = str(exc) or type(exc).__name__
            if str(exc) != self._ledger.explanation:
                self._ledger.explanation = self._said = str(exc)
                _logger.warning("a job cannot be submitted now; trying again: %s", exc)
            return True

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(worth_it),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=15.0),
            stop=tenacity.stop_after_delay(_PATIENCE),
            sleep=self._nap,
            reraise=True,
        )
        async for one in retrying:
            with one:
                submitted = await self._submit_once(job, request)
                if self._ledger.explanation == self._said:
                    self._ledger.explanation = ""
                return submitted
        raise AssertionError("tenacity returned without a result")

    async def _nap(self, seconds: float) -> None:
        """Sleep for a time, or until the executor shuts down."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.closing.wait(), seconds)

    async def _submit_once(self, job: Job, request: JobRequest) -> Submitted:
        """Submit a job, unless an earlier submission, whose answer was lost, has succeeded."""
        self._check_need(job)
        if job.unanswered:
            found = await self._look_up(job)
            if found is not None:
                return found
        await self._platform.prepare()
        self._check_need(job)
        job.sent = True
        before, job.unanswered = job.unanswered, True  # stays so if this is cancelled
        try:
            submitted = await self._platform.submit(request)
        except CloudexecError as exc:
            job.unanswered = before or (isinstance(exc, PlatformError) and exc.uncertain)
            raise
        job.unanswered = False
        return submitted

    async def _look_up(self, job: Job) -> Submitted | None:
        """Return a job that may have been submitted, if the platform has it."""
        for pause in _LOOK_UP_PAUSES:
            await asyncio.sleep(pause)
            found = await self._platform.find(job.name, spot=job.spot)
            if found is not None:
                return found
        return None

    def _check_need(self, job: Job) -> None:
        if self.closing.is_set():
            raise _NotNeededError("the executor has shut down")
        if job.terminated:
            raise _NotNeededError("the executor did not need it any more before it was submitted")

    async def end_unanswered(self, job: Job) -> None:
        """End a job whose submission was not answered, if the platform has it."""
        if not job.unanswered or job.id:
            return
        try:
            async with asyncio.timeout(sum(_LOOK_UP_PAUSES) + PATIENCE):
                found = await insist(lambda: self._look_up(job))
            job.unanswered = False
        except Exception as exc:  # third-party launchers may raise any exception
            hint = self._platform.stop_hint
            _logger.error(
                "the job %s may have been submitted, and the platform cannot be asked about it: "
                "%s%s",
                job.name,
                str(exc) or f"{self._platform.name} does not answer",
                f". {hint}" if hint else "",
                exc_info=not isinstance(exc, CloudexecError | TimeoutError),
            )
            return
        if found is not None:
            job.taken(found)
            await self._terminator.end_jobs([job], "it is not needed any more")
