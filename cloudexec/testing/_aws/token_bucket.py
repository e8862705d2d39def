"""A token bucket, by which AWS limits the rate of requests."""

from __future__ import annotations

import threading
import time

__all__ = ["TokenBucket"]


class TokenBucket:
    """Hands out tokens at a rate, and after a pause several at once.

    Args:
        per_second: Tokens that are added in a second.
        burst: The largest number of tokens that it holds; ``None`` for those of one second.
    """

    def __init__(self, per_second: float, burst: float | None = None) -> None:
        self._rate = per_second
        self._burst = per_second if burst is None else burst
        self._tokens = self._burst
        self._at = time.monotonic()
        self._lock = threading.Lock()

    @property
    def interval(self) -> float:
        """Seconds from one token to the next."""
        return 1 / self._rate

    def take(self) -> bool:
        """Take a token, if there is one."""
        with self._lock:
            now = time.monotonic()
            self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
            self._at = now
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True
