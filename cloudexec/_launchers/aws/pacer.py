"""Keeps the rate of calls below the limit that AWS publishes, so that AWS throttles none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

__all__ = ["Pacer"]

_ROUNDING = 1e-9
"""Seconds by which sums of intervals may be wrong."""


class Pacer:
    """Delays calls to keep their rate. It may be used on one event loop only.

    Args:
        per_second: Largest number of calls per second in the long run.
        burst: Number of calls that may be made at once after a pause.
        clock: Returns the time in seconds.
        sleep: Waits for a number of seconds.
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
        """Time of the next call if calls were made at even intervals."""

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
            # If this is cancelled, its turn is lost: that is rare, and later callers already know
            # the times of their turns.
            await self._sleep(pause)
