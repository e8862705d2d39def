"""Submitting jobs: tried again while the platform cannot take them, and never twice."""

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
"""Seconds for which a submission that the platform cannot take now is tried again."""
_LOOK_UP_PAUSES = (1.0, 2.0, 4.0)
"""Seconds before a job whose submission went unanswered is looked up, and up again: lists lag, and
to submit it once more would start all of its workers twice."""


class _NotNeededError(LaunchError):
    """Nobody waits for the job any more."""


class Submitter:
    """Submits the jobs of one executor.

    Args:
        platform: What takes them.
        ledger: Is told of refusals.
        terminator: Ends jobs that are not needed any more by the time they are accepted.

    Attributes:
        closing: Set when the executor has shut down: nothing is submitted any more.
    """

    def __init__(self, platform: Platform, ledger: Ledger, terminator: Terminator) -> None:
        self.closing = asyncio.Event()
        self._platform = platform
        self._ledger = ledger
        self._terminator = terminator
        self._said = ""

    async def submit(self, job: Job, request: JobRequest) -> None:
        """Submit a job. If the platform refuses, that is the end of its workers."""
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
        """Say of workers that the platform did not take that they have ended."""
        if shortfall <= 0:
            return
        taken = len(job.members) - shortfall
        end = LaunchEnd(f"{self._platform.name} took {taken} of {len(job.members)} workers")
        for launch_id, member in list(job.members.items())[taken:]:
            member.gone = True
            self._ledger.end(job, launch_id, end)

    async def _persist(self, job: Job, request: JobRequest) -> Submitted:
        """Try again what the platform cannot answer now: throttled, unreachable, locked out."""

        def worth_it(exc: BaseException) -> bool:
            if not may_pass(exc) or self.closing.is_set():
                return False
            if not job.trouble:
                job.trouble_since = time.monotonic()
            job.trouble = str(exc) or type(exc).__name__
            if str(exc) != self._ledger.explanation:
                self._ledger.explanation = self._said = str(exc)
                _logger.warning("trying again: %s", exc)
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
        """Sleep, but not past the end."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.closing.wait(), seconds)

    async def _submit_once(self, job: Job, request: JobRequest) -> Submitted:
        """Submit a job, or find out that it was, where an earlier answer got lost."""
        self._check_need(job)
        if job.unanswered:
            found = await self._look_up(job)
            if found is not None:
                return found
        await self._platform.prepare()
        self._check_need(job)
        job.sent = True
        before, job.unanswered = job.unanswered, True  # whatever ends this, also an end of patience
        try:
            submitted = await self._platform.submit(request)
        except CloudexecError as exc:
            job.unanswered = before or (isinstance(exc, PlatformError) and exc.uncertain)
            raise
        job.unanswered = False
        return submitted

    async def _look_up(self, job: Job) -> Submitted | None:
        """Find a job that may have been submitted."""
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
            raise _NotNeededError("it was not needed any more before it was submitted")

    async def end_unanswered(self, job: Job) -> None:
        """Find a job of whose submission no answer came, if the platform has it, and end it."""
        if not job.unanswered or job.id:
            return
        try:
            async with asyncio.timeout(sum(_LOOK_UP_PAUSES) + PATIENCE):
                found = await insist(lambda: self._look_up(job))
            job.unanswered = False
        except Exception as exc:  # of a launcher that others have written, too
            hint = self._platform.stop_hint
            _logger.error(
                "the job %s may have been submitted, and cannot be looked for: %s%s",
                job.name,
                str(exc) or f"{self._platform.name} does not answer",
                f". {hint}" if hint else "",
                exc_info=not isinstance(exc, CloudexecError | TimeoutError),
            )
            return
        if found is not None:
            job.taken(found)
            await self._terminator.end_jobs([job], "it is not needed any more")
