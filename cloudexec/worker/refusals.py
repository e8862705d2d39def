"""Counts for how long the host of a client has refused connections."""

from __future__ import annotations

import enum
import math

__all__ = ["Outcome", "Refusals"]


class Outcome(enum.Enum):
    """What a try to connect has shown about the client."""

    REFUSED = "its host is there, and nobody listens at the port"
    SILENT = "nothing: no packet came back"
    ANSWERED = "somebody listens at the port"


class Refusals:
    """The time in which a client's host has refused connections, and nobody has listened there.

    Only time between two refusals in a row counts. A try without any answer does not count, and
    takes back nothing: a packet was lost, or the network fails for a moment, and that does not show
    that the client lives. If somebody listens at the port again, the count begins anew.

    Args:
        most: Number of seconds after which the client is known to be gone; infinity: never.
    """

    def __init__(self, most: float = math.inf) -> None:
        self._most = most
        self._seconds = 0.0
        self._last: float | None = None

    @property
    def is_gone(self) -> bool:
        """Whether the client is known to be gone."""
        return self._last is not None and self._seconds >= self._most

    def note(self, outcome: Outcome, now: float) -> None:
        """Take note of one try.

        Args:
            outcome: How it ended.
            now: When, in seconds of a monotonic clock.
        """
        if outcome is Outcome.REFUSED:
            if self._last is not None:
                self._seconds += now - self._last
            self._last = now
            return
        self._last = None
        if outcome is Outcome.ANSWERED:
            self._seconds = 0.0

    def pause(self, seconds: float) -> float:
        """Shorten a pause before the next try, so that the end is not noticed late.

        Args:
            seconds: How long it would be.

        Returns:
            Seconds, at most a fifth of the whole time, and no more than is left of it.
        """
        if self._last is None and not self._seconds:
            return seconds
        left = self._most - self._seconds if self._last is not None else math.inf
        return min(seconds, self._most / 5, left)
