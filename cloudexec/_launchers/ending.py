"""Ends jobs: requests are repeated for some seconds, and an error is logged if they fail."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import TypeVar

import tenacity

from cloudexec._errors import CloudexecError, PlatformError
from cloudexec._launchers.ledger import Job, Member
from cloudexec._launchers.platform import Platform
from cloudexec._log import Log

__all__ = ["Terminator", "insist", "may_pass"]

_logger = Log()
T = TypeVar("T")

PATIENCE = 20.0
"""Seconds for which a request to end jobs is repeated."""


def may_pass(exc: BaseException) -> bool:
    """Return whether a failed request may succeed if it is made again."""
    return isinstance(exc, PlatformError) and exc.may_pass


async def insist(
    request: Callable[[], Coroutine[object, object, T]], patience: float | None = None
) -> T:
    """Make a request, and repeat it for a while if the platform cannot answer now.

    Args:
        request: Makes the request.
        patience: Seconds after which no further try begins; ``None`` means ``PATIENCE``.

    Raises:
        PlatformError: If the platform refuses, or does not answer in time.
    """
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=tenacity.wait_random_exponential(multiplier=0.3, max=5.0),
        stop=tenacity.stop_after_delay(PATIENCE if patience is None else patience),
        reraise=True,
    )
    async for attempt in retrying:
        with attempt:
            return await request()
    raise AssertionError("tenacity returned without a result")


class Terminator:
    """Ends workers.

    Args:
        platform: The platform that runs the workers.
    """

    def __init__(self, platform: Platform) -> None:
        self._platform = platform

    async def end_jobs(self, jobs: Sequence[Job], why: str) -> None:
        """End jobs with all their workers; log an error for jobs that cannot be ended."""
        await self._end([(job, list(job.members.values())) for job in jobs], why)

    async def end_members(self, job: Job, members: Sequence[Member], why: str) -> None:
        """End some workers of a job whose other workers go on."""
        await self._end([(job, members)], why)

    async def _end(self, doomed: Sequence[tuple[Job, Sequence[Member]]], why: str) -> None:
        targets = [job.target(members) for job, members in doomed]
        try:
            async with asyncio.timeout(PATIENCE):
                await insist(
                    lambda: self._platform.terminate(targets, f"cloudexec: {why}"), PATIENCE
                )
        except Exception as exc:  # third-party launchers may raise any exception
            ids = [
                job.id if target.workers is None else job.worker_id(member)
                for (job, members), target in zip(doomed, targets, strict=True)
                for member in (members[:1] if target.workers is None else members)
            ]
            hint = self._platform.stop_hint
            _logger.error(
                "jobs could not be terminated (%s): %s. %sworkers that cannot reach this program "
                "end by themselves",
                ", ".join(ids[:20]) + (", ..." if len(ids) > 20 else ""),
                str(exc) or f"{self._platform.name} does not answer",
                f"{hint}; " if hint else "",
                exc_info=not isinstance(exc, CloudexecError | TimeoutError),
            )
            return
        for _, members in doomed:
            for member in members:
                member.gone = True
