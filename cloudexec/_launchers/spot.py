"""Whether workers run on spare capacity: ``spot="prefer"`` leaves it while it is not worth it."""

from __future__ import annotations

import time

from cloudexec._launchers.ledger import Job, Ledger
from cloudexec._launchers.platform import Phase
from cloudexec._log import Log

__all__ = ["SpotPolicy"]

_logger = Log()

_RECLAIMS_BEFORE_ON_DEMAND = 3
_RECLAIMED_SHARE = 0.25
"""Of all Spot workers launched so far: one wave among many is no reason to leave."""
_PATIENCE = 60.0
"""Seconds for which ``spot="prefer"`` waits for spare capacity, or a third of ``launch_timeout``"""
_PAUSE = 600.0
"""Seconds in which it is not asked for again."""


class SpotPolicy:
    """Says where workers run that are launched now.

    Args:
        ledger: The jobs.
        wanted: What the user wants: ``True``, ``False`` or ``"prefer"``.
        launch_timeout: Seconds in which a worker has to dial back.
    """

    def __init__(self, ledger: Ledger, wanted: bool | str, launch_timeout: float) -> None:
        self._ledger = ledger
        self._wanted = wanted
        self._launch_timeout = launch_timeout
        self._reclaims = 0
        self._no_spot_until = float("-inf")

    @property
    def is_on(self) -> bool:
        """Whether workers that are launched now run on spare capacity."""
        return bool(self._wanted) and not (self._wanted == "prefer" and self._is_scarce)

    @property
    def _is_scarce(self) -> bool:
        """Whether spare capacity did not come, or was taken back more often than it is worth."""
        if time.monotonic() < self._no_spot_until:
            return True
        workers = sum(len(job.members) for job in self._ledger.jobs if job.spot)
        return self._reclaims >= max(_RECLAIMS_BEFORE_ON_DEMAND, workers * _RECLAIMED_SHARE)

    def note_reclaim(self, job: Job) -> None:
        """The platform took the machine of a worker back."""
        if job.spot:
            self._reclaims += 1

    def leave(self, job: Job, now: float) -> bool:
        """Say whether a job waits for spare capacity in vain; for a while, none is asked for then.

        Args:
            job: The job.
            now: The time, on the monotonic clock.
        """
        if not job.spot or job.over or self._wanted != "prefer":
            return False
        waiting = job.count(Phase.ACCEPTED, Phase.WAITING)
        patience = min(_PATIENCE, self._launch_timeout / 3)
        if not waiting or now - job.asked_at <= patience:
            return False
        _logger.info("no Spot capacity in %.0f s: going on demand", now - job.asked_at)
        self._no_spot_until = now + _PAUSE
        return True
