"""The start of a run by a client, which may be interrupted at any moment."""

from __future__ import annotations

import asyncio
import contextlib

from cloudexec._errors import AwsError, CloudexecError, ConfigError
from cloudexec._runs.bucket import RunBucket
from cloudexec._runs.places import Place, StillRunning
from cloudexec._runs.plan import RunPlan, RunResult
from cloudexec._runs.protocol import EXIT_NOT_RUN, REGION_VARIABLE, RUN_VARIABLE, START_VARIABLE

__all__ = ["Start"]


class _Stopped(ConfigError):
    """Somebody has stopped the run while it was prepared."""


class Start:
    """One start of a run, which leaves nothing if it fails or is interrupted.

    Args:
        bucket: What the bucket has of the run.
        place: Has its machine.
        plan: What is to be run.
    """

    def __init__(self, bucket: RunBucket, place: Place, plan: RunPlan) -> None:
        self._bucket = bucket
        self._place = place
        self._plan = plan
        self._creating: asyncio.Future[bool] | None = None
        self._claiming: asyncio.Future[str] | None = None
        self._job_id = ""

    async def create(self, *, resumes: bool) -> bool:
        """Write what is to be run; say whether the name was free."""
        # Interrupted in the middle of it, it has to be known whether something was written.
        self._creating = asyncio.ensure_future(self._bucket.create(self._plan, resumes=resumes))
        return await asyncio.shield(self._creating)

    async def machine(self) -> None:
        """Start the machine.

        Raises:
            _Stopped: If somebody has stopped the run meanwhile.
        """
        plan, bucket = self._plan, self._bucket
        await self._check_wanted()
        variables = {
            RUN_VARIABLE: bucket.where,
            REGION_VARIABLE: plan.region,
            START_VARIABLE: plan.start_id,
        }
        self._job_id = await self._place.start(plan, variables)
        # Without what follows, the run is found in the list of AWS Batch, and by its machine.
        with contextlib.suppress(AwsError):
            # Interrupted in the middle of it, what is written must not come after all is deleted.
            claim = bucket.claim(plan.start_id, self._job_id)
            self._claiming = asyncio.ensure_future(claim)
            if await asyncio.shield(self._claiming) != self._job_id:
                # The answer to an earlier request was lost, and its job has begun.
                extra, self._job_id = self._job_id, ""
                reason = f"cloudexec: the run {plan.name} has another job already"
                await self._place.end(extra, reason)
            await self._check_wanted()

    async def _check_wanted(self) -> None:
        result = await self._bucket.result(self._plan.start_id)
        if result is not None and result.was_stopped:
            raise _Stopped(f"the run {self._plan.name} was {result.reason} while it was prepared")

    async def undo(self, exc: BaseException) -> None:
        """Leave nothing of it, or of an earlier start's files what there was.

        Args:
            exc: Why.

        Raises:
            AwsError: If AWS refuses, or cannot be reached.
            StillRunning: If its machine could not be ended.
        """
        if isinstance(exc, StillRunning):
            return  # it is to be found
        plan, bucket = self._plan, self._bucket
        if self._claiming is not None:
            await asyncio.gather(self._claiming, return_exceptions=True)
        is_new = False
        if self._creating is not None:
            (created,) = await asyncio.gather(self._creating, return_exceptions=True)
            is_new = created is not False
        try:
            if (await bucket.plan()).start_id != plan.start_id:
                return  # nothing was written, and what is there is another start's
        except ConfigError:
            return
        if self._job_id:
            try:
                await self._place.end(self._job_id, "stopped by its user before it began")
            except AwsError as refusal:
                raise StillRunning.of(self._job_id, refusal) from refusal
        if isinstance(exc, _Stopped):
            await bucket.forget_variables(plan.start_id)
            return  # whoever has stopped it has said so in the bucket
        if is_new:
            await bucket.delete()
            return
        await bucket.forget_variables(plan.start_id)
        has_failed = isinstance(exc, CloudexecError)
        reason = f"it could not be started: {exc}" if has_failed else "its start was interrupted"
        result = RunResult(
            exit_code=EXIT_NOT_RUN,
            reason=reason,
            start_id=plan.start_id,
            was_stopped=not has_failed,
        )
        if not self._place.tries_again:
            # A machine whose request had no answer may begin later, and looks for this.
            await bucket.put_stop(plan.start_id, reason)
        await bucket.put_result(result)
