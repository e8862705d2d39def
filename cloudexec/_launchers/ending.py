"""Ending jobs: tried for a while, many at once, and said loudly where it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import tenacity

from cloudexec._errors import AwsError
from cloudexec._log import Log

__all__ = ["Terminator"]

_logger = Log()

PATIENCE = 20.0
"""Seconds for which AWS is asked to end something."""
_BULK = 50
"""Jobs in one TerminateJobs call. AWS Batch API Reference."""


class Terminator:
    """Ends jobs of one executor.

    Args:
        call: Makes a call to AWS: service, operation, parameters.
        client: Returns the SDK's client for AWS Batch.
        executor_id: Whose jobs they are.
    """

    def __init__(
        self,
        call: Callable[..., Coroutine[Any, Any, Any]],
        client: Callable[[], Coroutine[Any, Any, Any]],
        executor_id: str,
    ) -> None:
        self._call = call
        self._client = client
        self._executor_id = executor_id

    async def insist(
        self,
        call: Callable[..., Coroutine[Any, Any, Any]],
        *args: Any,
        patience: float = PATIENCE,
    ) -> Any:
        """Make a call, and try again for a while what AWS cannot answer now.

        Args:
            call: What makes it.
            args: Of that.
            patience: Seconds after which no further try begins.

        Raises:
            AwsError: If it will not, or not in time.
        """
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(
                lambda exc: isinstance(exc, AwsError) and (exc.transient or exc.expired)
            ),
            wait=tenacity.wait_random_exponential(multiplier=0.3, max=5.0),
            stop=tenacity.stop_after_delay(patience),
            reraise=True,
        )
        async for attempt in retrying:
            with attempt:
                return await call(*args)
        raise AssertionError("tenacity returned without a result")

    async def terminate(self, ids: Sequence[str], why: str) -> bool:
        """Terminate jobs; what cannot be terminated is said loudly.

        Returns:
            Whether AWS took it all.
        """
        reason = f"cloudexec: {why}"

        async def one(job_id: str) -> None:
            await self.insist(
                lambda: self._call("batch", "terminate_job", jobId=job_id, reason=reason)
            )

        async def many(some: Sequence[str]) -> None:
            try:
                answer = await self.insist(
                    lambda: self._call("batch", "terminate_jobs", jobs=list(some), reason=reason)
                )
            except AwsError as exc:
                if exc.transient or exc.expired:
                    raise
                # An endpoint that does not know the newer call.
                await asyncio.gather(*(one(job_id) for job_id in some))
                return
            for failed in answer.get("errors", ()):
                await one(str(failed.get("jobId") or failed.get("job")))

        try:
            async with asyncio.timeout(PATIENCE):
                # Older SDKs do not know of it.
                if len(ids) > 1 and hasattr(await self._client(), "terminate_jobs"):
                    pages = [ids[at : at + _BULK] for at in range(0, len(ids), _BULK)]
                    await asyncio.gather(*(many(page) for page in pages))
                else:
                    await asyncio.gather(*(one(job_id) for job_id in ids))
        except (AwsError, TimeoutError) as exc:
            _logger.error(
                "jobs could not be terminated (%s): %s. `cloudexec stop --executor %s` tries "
                "again; workers that find nobody end by themselves",
                ", ".join(ids[:20]) + (", ..." if len(ids) > 20 else ""),
                str(exc) or "AWS does not answer",
                self._executor_id,
            )
            return False
        return True
