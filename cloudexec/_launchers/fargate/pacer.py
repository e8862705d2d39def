"""Keeps calls below a rate that AWS publishes, so that none is refused as too many."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

__all__ = ["Pacer"]

_ROUNDING = 1e-9
"""Seconds by which sums of intervals may be wrong."""


class Pacer:
    """Says when the next call may be made. Used on one event loop.

    Args:
        per_second: Calls per second in the long run.
        burst: Calls at once after a pause.
        clock: Tells the time in seconds.
        sleep: Waits for seconds.
    """

    def __init__(
        self,
        per_second: float,
        burst: int,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._interval = 1.0 / per_second
        self._ahead = (burst - 1) * self._interval + _ROUNDING
        self._clock = clock
        self._sleep = sleep
        self._next = float("-inf")
        """When the next call would be made if calls came evenly."""

    def is_free(self, turns: int = 1) -> bool:
        """Say whether ``wait`` would return at once.

        Args:
            turns: As for ``wait``.
        """
        now = self._clock()
        at = max(self._next, now) + (turns - 1) * self._interval
        return at - now - self._ahead <= 0

    async def wait(self, turns: int = 1) -> None:
        """Wait until a call may be made, in the order of asking, and take leave for it.

        Args:
            turns: How many calls' worth it takes.
        """
        now = self._clock()
        at = max(self._next, now) + (turns - 1) * self._interval
        self._next = at + self._interval
        if (pause := at - now - self._ahead) > 0:
            # A turn that is not used after all, since this is cancelled, is lost: that is rare, and
            # those behind it have been given theirs.
            await self._sleep(pause)
