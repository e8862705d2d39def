"""What the runs of a worker cost, by the second."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["WorkerPrice", "run_seconds"]

_HOUR = 3600.0
_SHORTEST_RUN = 0.001


def run_seconds(began: float, ended: float) -> float:
    """Return how long a run took; never 0, as that would be one that never began and costs nothing.

    Platforms count in milliseconds, within which a run may begin and end.
    """
    return max(_SHORTEST_RUN, ended - began)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPrice:
    """What one worker costs while it runs."""

    per_second: float
    """USD."""
    least_seconds: float = 1.0
    """What is paid for at least, each time a worker starts."""
    assumed: bool = False
    """Whether it is another region's price, for want of this one's."""
    estimated: bool = False
    """Whether it moves with supply (Spot), or depends on what machine is chosen."""
    table: str = ""
    """Whose price it is and of when, for texts."""
    note: str = ""
    """What else the price rests on, for texts."""

    @property
    def per_hour(self) -> float:
        """USD."""
        return self.per_second * _HOUR

    @property
    def least(self) -> float:
        """USD of the shortest run."""
        return self.cost(self.least_seconds)

    def cost(self, seconds: float) -> float:
        """Return what one run of so long costs, in USD.

        Args:
            seconds: From the start of the image's download to the end. Nothing for a run that
                never began; otherwise begun seconds count, and ``least_seconds`` of them at least.
        """
        if seconds <= 0:
            return 0.0
        return max(math.ceil(seconds), self.least_seconds) * self.per_second

    def cost_of(self, runs: Iterable[float]) -> float:
        """Return what several runs cost together, in USD."""
        return math.fsum(self.cost(seconds) for seconds in runs)
