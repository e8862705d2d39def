"""On the machine: what a run has cost, with workers of executors in it, against its ceiling."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

from cloudexec._aws.clients import AwsClients
from cloudexec._errors import AwsError, CloudexecError
from cloudexec._runs.bucket import RunBucket
from cloudexec._runs.known import Known
from cloudexec._runs.places import MachineState, Place, has_place, place_named
from cloudexec._runs.plan import RunPlan

__all__ = ["Budget"]

_EVERY = 60.0
"""Seconds between two looks at what workers cost."""


class Budget:
    """Adds up what a run costs.

    Args:
        clients: Calls to AWS.
        plan: Of the run, with its ceiling.
        bucket: Is told of jobs that AWS forgets soon; ``None``: nobody is.
        every: Seconds between two looks.
    """

    def __init__(
        self,
        clients: AwsClients,
        plan: RunPlan,
        bucket: RunBucket | None = None,
        *,
        every: float = _EVERY,
    ) -> None:
        profile = plan.profile_inside()
        # A newer release may have started it in another place.
        if profile is not None and has_place(plan.on):
            self.place: Place | None = place_named(plan.on, clients, profile)
        else:
            self.place = None
        self._known: Known | None = None
        """What the bucket has of the run's jobs; ``None``: it has not been read."""
        self._bucket = bucket
        self._plan = plan
        self._every = every

    async def known(self) -> Known:
        """Return what the bucket has of the run's jobs; of those that AWS forgets soon, the cost.

        Raises:
            CloudexecError: If it cannot be read.
        """
        if self._known is None:
            read = self._bucket
            self._known = Known() if read is None else await read.known(self._plan.start_id)
        return self._known

    async def begun_by(self, job_id: str) -> None:
        """Write that another job runs the program.

        Raises:
            CloudexecError: If the bucket cannot be reached.
        """
        await self._put((await self.known()).begun_by(job_id))

    async def _put(self, known: Known) -> None:
        self._known = known
        if self._bucket is not None:
            await self._bucket.put_known(self._plan.start_id, known)

    async def reached(self) -> str:
        """Wait until the ceiling is reached, for ever if there is none; say so."""
        while True:
            await asyncio.sleep(self._every)
            if over := await self.exceeded():
                return over

    async def exceeded(self) -> str:
        """Say that the ceiling is reached; empty: it is not, or there is none."""
        most = self._plan.max_cost_usd
        # Without a ceiling, only what AWS would forget is looked at.
        if most is None and (self.place is None or self.place.tries_again):
            return ""
        found = await self._look()
        if most is None or found is None or found.cost_usd + found.workers_usd < most:
            return ""
        return (
            f"it was ended as it has cost ${found.cost_usd:.4f}, and its workers "
            f"${found.workers_usd:.4f}: that is the ceiling of ${most:g} (--max-cost)"
        )

    async def _look(self, *, is_last: bool = False) -> MachineState | None:
        """Look at the run's jobs; ``None``: AWS does not answer, or does not know them.

        The machine's own time limit holds in any case.

        Args:
            is_last: Whether the program has ended.
        """
        if self.place is None:
            return None
        try:
            known = await self.known()
            found = (await self.place.find([self._plan], {self._plan.name: known})).get(
                self._plan.name
            )
        except CloudexecError:
            return None
        if found is not None:
            await self._write_down(known, found.known, is_last=is_last)
        return found

    async def _write_down(self, before: Known, now: Known, *, is_last: bool) -> None:
        """Write what jobs have cost that AWS forgets soon, when one more of them has ended."""
        had_ended, has_ended = (
            {key for key, each in known.costs.items() if each.has_ended} for known in (before, now)
        )
        self._known = replace(before, costs=now.costs)
        if not has_ended <= had_ended or (is_last and now.costs):
            with contextlib.suppress(CloudexecError):  # the next one that ends is another occasion
                await self._put(self._known)

    async def settle(self) -> float:
        """End workers of executors that have not done so, as nobody would; say what workers cost.

        That is as much as is known, if AWS does not answer.
        """
        found = await self._look(is_last=True)
        if found is None or self.place is None:
            return 0.0
        if found.workers:
            name = self._plan.name
            reason = f"cloudexec: the run {name} does not need it any more"
            with contextlib.suppress(AwsError):
                await self.place.stop(name, reason, workers_only=True)
        return found.workers_usd
