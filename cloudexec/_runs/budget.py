"""On the machine: what a run has cost, with workers of executors in it, against its ceiling."""

from __future__ import annotations

import time

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.profile import Profile
from cloudexec._errors import AwsError
from cloudexec._runs.places import place_named
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
        values = {**plan.profile, "subnets": tuple(plan.profile.get("subnets", ()))}
        self._place = place_named(plan.on, clients, Profile(**values)) if plan.profile else None
        self._plan = plan
        self._every = every
        self._looked_at = time.monotonic()

    async def exceeded(self) -> str:
        """Say that the ceiling is reached, now and then; empty: it is not, or there is none.

        The workers of executors in the run are ended then.
        """
        most = self._plan.max_cost_usd
        if most is None or self._place is None:
            return ""
        if time.monotonic() - self._looked_at < self._every:
            return ""
        self._looked_at = time.monotonic()
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
        try:
            found = (await self._place.find([self._plan])).get(name)
            if found is not None and found.workers:
                reason = f"cloudexec: the run {name} has ended, and it is not needed any more"
                await self._place.stop(name, reason, workers_only=True)
        except AwsError:
            return 0.0
        return 0.0 if found is None else found.workers_usd
