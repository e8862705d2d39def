"""Limits the rate of calls to AWS, so that executors can make theirs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from cloudexec._aws.clients import AwsClients

__all__ = ["PacedCalls"]

_CALL_INTERVAL = 0.04
"""Seconds between calls. AWS Batch allows about 50 per second for a whole account, and executors
need some of them."""
_CALLS_AT_ONCE = 10


class PacedCalls:
    """Makes calls to AWS with pauses between them."""

    def __init__(self, clients: AwsClients) -> None:
        self.region = clients.region
        self._clients = clients
        self._gate = asyncio.Semaphore(_CALLS_AT_ONCE)
        self._next_call = 0.0

    async def call(self, service: str, operation: str, **parameters: Any) -> Any:
        async with self._gate:
            loop = asyncio.get_running_loop()
            wait = self._next_call - loop.time()
            self._next_call = max(self._next_call, loop.time()) + _CALL_INTERVAL
            if wait > 0:
                await asyncio.sleep(wait)
            return await self._clients.call(service, operation, **parameters)

    async def pages(
        self, service: str, operation: str, key: str, **parameters: Any
    ) -> AsyncIterator[Mapping[str, Any]]:
        token: dict[str, Any] = {}
        while True:
            page = await self.call(service, operation, **parameters, **token)
            for each in page.get(key, ()):
                yield each
            if not page.get("nextToken"):
                return
            token = {"nextToken": page["nextToken"]}
