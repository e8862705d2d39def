"""Computes the cost of a worker's runs from a price per second."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["WorkerPrice", "run_seconds"]

_HOUR = 3600.0
_SHORTEST_RUN = 0.001
_ROUNDING = 1e-6
"""Seconds by which the difference of two times may be wrong, as each is rounded."""


def run_seconds(began: float, ended: float) -> float:
    """Return how many seconds a run took, but never 0, which stands for a run that never began.

    Platforms report milliseconds, so a short run may begin and end at the same reported time.
    """
    return max(_SHORTEST_RUN, ended - began)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPrice:
    """The price of one worker while it runs."""

    per_second: float
    """USD per second."""
    least_seconds: float = 1.0
    """Seconds that are paid for each run at least."""
    step_seconds: float = 1.0
    """Seconds to a multiple of which each run is rounded up."""
    per_run: float = 0.0
    """USD for each run, however short."""
    assumed: bool = False
    """Whether the price of another region is used because that of this region is not known."""
    estimated: bool = False
    """Whether the price changes with supply (Spot), or depends on the machine that is chosen."""
    table: str = ""
    """Source and date of the price, as text."""
    note: str = ""
    """Further assumptions behind the price, as text."""

    @property
    def per_hour(self) -> float:
        """USD per hour."""
        return self.per_second * _HOUR

    @property
    def least(self) -> float:
        """Cost of the shortest run, in USD."""
        return self.cost(self.least_seconds)

    def cost(self, seconds: float) -> float:
        """Return the cost of one run, in USD.

        Seconds are rounded up to a multiple of ``step_seconds``, and at least ``least_seconds`` are
        counted.

        Args:
            seconds: Time from the start of the image's download to the end of the run; 0 for a run
                that never began, which costs nothing.
        """
        if seconds <= 0:
            return 0.0
        steps = math.ceil((seconds - _ROUNDING) / self.step_seconds)
        return max(steps * self.step_seconds, self.least_seconds) * self.per_second + self.per_run

    def cost_of(self, runs: Iterable[float]) -> float:
        """Return the total cost of several runs, in USD."""
        return math.fsum(self.cost(seconds) for seconds in runs)
