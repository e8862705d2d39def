"""On the machine: what a run has cost, with workers of executors in it, against its ceiling."""

from __future__ import annotations

import asyncio
import contextlib

from cloudexec._aws.clients import AwsClients
from cloudexec._errors import AwsError
from cloudexec._runs.places import Place, has_place, place_named
from cloudexec._runs.plan import RunPlan

__all__ = ["Budget"]

_EVERY = 60.0
"""Seconds between two looks at what workers cost."""


class Budget:
    """Adds up what a run costs.

    Args:
        clients: Calls to AWS.
        plan: Of the run, with its ceiling.
    """

    def __init__(self, clients: AwsClients, plan: RunPlan, *, every: float = _EVERY) -> None:
        profile = plan.profile_inside()
        # A newer release may have started it in another place.
        if profile is not None and has_place(plan.on):
            self._place: Place | None = place_named(plan.on, clients, profile)
        else:
            self._place = None
        self._plan = plan
        self._every = every

    async def reached(self) -> str:
        """Wait until the ceiling is reached, for ever if there is none; say so."""
        while True:
            await asyncio.sleep(self._every)
            if over := await self.exceeded():
                return over

    async def exceeded(self) -> str:
        """Say that the ceiling is reached; empty: it is not, or there is none."""
        most = self._plan.max_cost_usd
        if most is None or self._place is None:
            return ""
        try:
            found = (await self._place.find([self._plan])).get(self._plan.name)
        except AwsError:
            return ""  # the machine's own time limit holds in any case
        if found is None or found.cost_usd + found.workers_usd < most:
            return ""
        return (
            f"it was ended as it has cost ${found.cost_usd:.4f}, and its workers "
            f"${found.workers_usd:.4f}: that is the ceiling of ${most:g} (--max-cost)"
        )

    async def settle(self) -> float:
        """End workers of executors that have not done so, as nobody would; say what workers cost.

        That is as much as is known, if AWS does not answer.
        """
        if self._place is None:
            return 0.0
        name = self._plan.name
        found = None
        with contextlib.suppress(AwsError):
            found = (await self._place.find([self._plan])).get(name)
            if found is not None and found.workers:
                reason = f"cloudexec: the run {name} does not need it any more"
                await self._place.stop(name, reason, workers_only=True)
        return 0.0 if found is None else found.workers_usd
