"""Decides whether workers run on spare capacity; ``spot="prefer"`` avoids it while it is scarce."""

from __future__ import annotations

import time
from collections import deque

from cloudexec._launchers.ledger import Job, Ledger
from cloudexec._launchers.platform import Phase, Platform
from cloudexec._log import Log

__all__ = ["SpotPolicy"]

_logger = Log()

_RECLAIMS_BEFORE_ON_DEMAND = 3
_RECLAIMED_SHARE = 0.25
"""Share of the Spot workers that must have been reclaimed before workers run on demand. A single
wave of reclaims among many workers is no reason to pay more."""
_RECLAIMS_COUNT = 3600.0
"""Seconds for which a reclaim counts, as some reclaims are usual in the course of days."""
_SHARE_OF_TIMEOUT = 2 / 3
"""Largest share of ``launch_timeout`` for which ``spot="prefer"`` waits for spare capacity. Workers
that wait for all of it would count as failed to start."""
_PAUSE = 600.0
"""Seconds in which no spare capacity is requested after workers have waited for it in vain."""


class SpotPolicy:
    """Decides whether new workers run on spare capacity, and how long they wait for it.

    Args:
        ledger: The jobs of the executor.
        platform: Says how long spare capacity takes, and when there is none.
        wanted: The launcher's setting: ``True``, ``False`` or ``"prefer"``.
        launch_timeout: Seconds within which a worker must connect.
    """

    def __init__(
        self, ledger: Ledger, platform: Platform, wanted: bool | str, launch_timeout: float
    ) -> None:
        self._ledger = ledger
        self._platform = platform
        self._wanted = wanted
        self._launch_timeout = launch_timeout
        self._reclaims: deque[float] = deque()
        self._no_spot_until = float("-inf")
        self._left: set[int] = set()

    @property
    def is_on(self) -> bool:
        """Whether new workers run on spare capacity."""
        return bool(self._wanted) and not (self._wanted == "prefer" and self._is_scarce)

    @property
    def _is_scarce(self) -> bool:
        """Whether there was no spare capacity lately, or too much of it was reclaimed."""
        now = time.monotonic()
        if now < self._no_spot_until:
            return True
        while self._reclaims and now - self._reclaims[0] > _RECLAIMS_COUNT:
            self._reclaims.popleft()
        reclaims = len(self._reclaims)
        if reclaims < _RECLAIMS_BEFORE_ON_DEMAND:
            return False
        jobs = [job for job in self._ledger.alive() if job.spot]
        workers = sum(not member.ended for job in jobs for member in job.members.values())
        return reclaims >= (reclaims + workers) * _RECLAIMED_SHARE

    def note_reclaim(self, job: Job) -> None:
        """Record that the platform has reclaimed the machine of a worker."""
        if job.spot:
            self._reclaims.append(time.monotonic())

    def waits_in_vain(self, job: Job, now: float) -> bool:
        """Return whether waiting workers of a Spot job must run on demand instead.

        Args:
            job: The job.
            now: The time, on the monotonic clock.
        """
        if not job.spot or job.over or self._wanted != "prefer" or job.first in self._left:
            return False
        if not job.count(Phase.ACCEPTED, Phase.WAITING):
            return False
        lacking = self._platform.lacks_capacity(job.reason)
        return lacking or now - job.asked_at > self._patience()

    def leave(self, job: Job, now: float) -> None:
        """Request no spare capacity for a while, since a job has waited for it in vain.

        Args:
            job: The job.
            now: The time, on the monotonic clock.
        """
        why = f" ({job.reason})" if job.reason else ""
        _logger.info("no Spot capacity in %.0f s%s: launching on demand", now - job.asked_at, why)
        self._left.add(job.first)
        self._no_spot_until = now + _PAUSE

    def _patience(self) -> float:
        """Return how many seconds a job may wait, as the executor's other jobs may be first."""
        workers = sum(len(job.members) for job in self._ledger.alive() if job.spot)
        patience = self._platform.spot_patience(workers)
        return min(patience, self._launch_timeout * _SHARE_OF_TIMEOUT)
