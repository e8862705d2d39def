"""Asks AWS again for jobs that wait for capacity, until there is capacity for them.

Without AWS Batch, AWS has no queue in which a job could wait, so it waits here: one asyncio task
asks again for all jobs that wait. Of jobs of the same kind, only one is asked for until there is
capacity, as it finds out for the others, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from cloudexec._errors import AwsError, CloudexecError
from cloudexec._launchers.ending import insist
from cloudexec._launchers.platform import Reason
from cloudexec._log import Log

__all__ = ["LONGEST_PAUSE", "CapacityAsker", "Waiting", "is_forgotten"]

_logger = Log()

_FIRST_PAUSE = 1.0
LONGEST_PAUSE = 15.0
"""Seconds until AWS is asked again after it had no capacity; doubled up to the longest."""
_CLOSE_PATIENCE = 20.0
"""Seconds that ``close`` waits for the answers of calls."""


UNSEEN = 300.0
"""Seconds for which AWS may not list a machine that it has started: its lists are consistent in the
end only. Amazon EC2 Developer Guide, "Eventual consistency", which names no number."""
MISSING = 120.0
"""Seconds for which AWS may not list a machine that it has listed before."""


class Machine(Protocol):
    """What is known of a machine that AWS has started for a worker.

    Attributes:
        asked_at: Time when it was started, on the monotonic clock.
        missing_since: Time since which AWS does not list it, on the monotonic clock; ``None`` if it
            does.
        is_known: Whether AWS has ever listed it.
    """

    asked_at: float
    missing_since: float | None
    is_known: bool


def is_forgotten(machine: Machine) -> bool:
    """Return whether AWS has not listed a machine for so long that it has ended, and note it."""
    now = time.monotonic()
    if machine.missing_since is None:
        machine.missing_since = now if machine.is_known else machine.asked_at
    return now - machine.missing_since >= (MISSING if machine.is_known else UNSEEN)


class Waiting(Protocol):
    """What a job has that waits for capacity.

    Attributes:
        name: Name of the job.
        reason: Why it waits, in the words of AWS.
        tried_at: Time of the last call for it, on the monotonic clock.
        asking: The asyncio task that makes a call; ``None`` if there is none.
    """

    name: str
    reason: str
    tried_at: float
    asking: asyncio.Task[None] | None

    @property
    def waits(self) -> bool:
        """Whether it must be asked for again."""

    @property
    def kind(self) -> tuple[bool, int]:
        """The kind of capacity that it needs. Jobs of the same kind find capacity or do not."""


T = TypeVar("T", bound=Waiting)


@dataclass(slots=True)
class Drought:
    """A time in which there is no capacity of one kind.

    Attributes:
        reason: The message of AWS; empty if the call failed.
        until: Time of the next call, on the monotonic clock.
        pause: Seconds between the last call and the next one.
        trouble: The error with which the call failed, if it may pass; empty if there was none.
    """

    reason: str
    until: float
    pause: float
    trouble: str = ""


class CapacityAsker(ABC, Generic[T]):
    """Asks for the jobs of one executor that wait for capacity.

    Args:
        jobs: All jobs by name. The platform adds jobs to it.
        stop_hint: What a user can do to end workers; see ``Platform``.
    """

    service: str
    """The service that is asked, as messages name it."""
    machines: str
    """What the service starts, as messages name it, in the plural."""

    def __init__(self, jobs: Mapping[str, T], stop_hint: str) -> None:
        self._jobs = jobs
        self._stop_hint = stop_hint
        self._droughts: dict[tuple[bool, int], Drought] = {}
        self._wake = asyncio.Event()
        self._again: asyncio.Task[None] | None = None
        self._ends: set[asyncio.Task[None]] = set()

    # What differs between services.

    @abstractmethod
    async def _call_for(self, job: T) -> None:
        """Make the call for a job, and record what comes of it.

        Raises:
            AwsError: If AWS refuses.
            CloudexecError: If the settings make it impossible.
        """

    @abstractmethod
    async def _turn(self, job: T) -> None:
        """Wait until AWS accepts another call for this job."""

    @abstractmethod
    def _fail(self, job: T, reason: Reason) -> None:
        """End the workers of a job that have no machine, as it is not asked for again."""

    @abstractmethod
    def _doom(self, job: T) -> None:
        """Record that workers for which a call is being made must end."""

    @abstractmethod
    async def _end_doomed(self, job: T) -> None:
        """End what a call has started for workers that must end."""

    # Asking.

    async def ask_now(self, job: T) -> None:
        """Ask for a job. If this is cancelled, the answer is still recorded.

        Raises:
            AwsError: If AWS refuses.
            CloudexecError: If the settings make it impossible.
        """
        await asyncio.shield(self._begin(job, self._call_for(job)))

    def ask_again(self) -> None:
        """Start to ask again for the jobs that wait, in the background."""
        self._wake.set()
        if self._again is None or self._again.done():
            self._again = asyncio.get_running_loop().create_task(self._keep_asking())

    def trouble(self, job: T) -> str:
        """Return why AWS cannot be asked for a job that waits; empty if it can."""
        drought = self._droughts.get(job.kind)
        return drought.trouble if drought is not None and job.waits else ""

    def _is_dry(self, job: T) -> bool:
        """Return whether a job must wait since there was no capacity; record the reason in it."""
        drought = self._droughts.get(job.kind)
        if drought is None or time.monotonic() >= drought.until:
            return False
        job.reason = drought.reason or job.reason
        return True

    def _pause(self, job: T, reason: str, trouble: str = "") -> None:
        """Ask for no jobs of this job's kind for a while."""
        now = time.monotonic()
        drought = self._droughts.get(job.kind)
        if drought is None or now >= drought.until:
            pause = _FIRST_PAUSE if drought is None else min(2 * drought.pause, LONGEST_PAUSE)
            self._droughts[job.kind] = Drought(reason, now + pause, pause, trouble)

    def _begin(self, job: T, call: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        if job.asking is not None:
            call.close()
            return job.asking

        async def ask() -> None:
            try:
                await call
            finally:
                # ``Platform.terminate`` may have given up waiting for this answer.
                await self._end_doomed(job)

        def asked(done: asyncio.Task[None]) -> None:
            job.asking = None
            self._wake.set()
            if not done.cancelled():
                done.exception()  # so that asyncio does not warn if no caller awaits the task

        job.asking = asyncio.get_running_loop().create_task(ask())
        job.asking.add_done_callback(asked)
        return job.asking

    async def _keep_asking(self) -> None:
        """Ask for jobs that wait, until there are none."""
        while any(each.waits for each in self._jobs.values()):
            self._wake.clear()
            pause = await self._ask_some()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)

    async def _ask_some(self) -> float:
        """Ask for jobs that may find a place now, and return the seconds until the next round.

        Calls are made at the same time, since each of them may take long.
        """
        kinds: dict[tuple[bool, int], list[T]] = {}
        for job in self._jobs.values():
            if job.waits:
                kinds.setdefault(job.kind, []).append(job)
        pause = LONGEST_PAUSE
        for kind, jobs in kinds.items():
            idle = [each for each in jobs if each.asking is None]
            drought = self._droughts.get(kind)
            if drought is not None:
                for each in idle:
                    each.reason = drought.reason or each.reason
                if (left := drought.until - time.monotonic()) > 0:
                    pause = min(pause, left)
                    continue
                if len(idle) < len(jobs):
                    continue  # one job is being asked for, and its answer wakes this up
                idle = sorted(idle, key=lambda each: each.tried_at)[:1]
            for each in idle:
                await self._turn(each)
                if each.waits:
                    self._begin(each, self._ask_quietly(each))
                if self._droughts.get(kind) is not drought:
                    break  # an answer has come meanwhile, so the next round decides
        return pause

    async def _ask_quietly(self, job: T) -> None:
        """Ask for a job in the background, and record an error in the job."""
        try:
            await self._call_for(job)
        except CloudexecError as exc:
            if isinstance(exc, AwsError) and exc.may_pass:
                self._pause(job, "", str(exc))
            else:
                self._fail(job, Reason(str(exc), fatal=True))
        except Exception as exc:
            _logger.exception("internal error while asking for %s", job.name)
            self._fail(job, Reason(f"internal error: {exc}", fatal=True))

    # The end.

    def _end_in_background(self, end: Callable[[], Coroutine[Any, Any, None]], what: str) -> None:
        """End machines in the background.

        Args:
            end: Ends them; called again if it fails.
            what: Names them, for the error.
        """
        task = asyncio.get_running_loop().create_task(self._end_late(end, what))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def _end_late(self, end: Callable[[], Coroutine[Any, Any, None]], what: str) -> None:
        """End machines, and log an error if that fails."""
        try:
            await insist(end)
        except CloudexecError as exc:
            _logger.error("%s could not be ended: %s. %s", what, exc, self._stop_hint)

    async def close(self) -> None:
        """Make no more calls, and end the machines that calls still start.

        A call that is not answered within some seconds is given up. If it has started machines,
        their workers find no client, and end by themselves.
        """
        if self._again is not None:
            self._again.cancel()
            await asyncio.gather(self._again, return_exceptions=True)
        asked_for = [each for each in self._jobs.values() if each.asking is not None]
        for job in asked_for:
            self._doom(job)
        if pending := [*(each.asking for each in asked_for if each.asking), *self._ends]:
            _, late = await asyncio.wait(pending, timeout=_CLOSE_PATIENCE)
            if late:
                unheard = [each.name for each in asked_for if each.asking in late]
                _logger.error(
                    "%s does not answer, and may have started %s for %s that are not ended: they "
                    "end by themselves when they find no client. %s",
                    self.service,
                    self.machines,
                    ", ".join(unheard) or "this executor",
                    self._stop_hint,
                )
            for each in late:
                each.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
