"""Asking AWS Lambda for workers, one invocation for each, as long as there is concurrency for them.

Lambda takes every event, and delivers it when there is concurrency for it, or drops it after a
minute. It tells of neither. So what is known of the limits is kept here: workers beyond them wait,
and those whose events were dropped are asked for again.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.function_requests import EVENT_AGE
from cloudexec._aws.functions import (
    invoke,
    is_gone,
    is_not_ready,
    limits_of_account,
    reserved_concurrency,
)
from cloudexec._aws.refusals import THROTTLES
from cloudexec._errors import AwsError, CloudexecError
from cloudexec._launchers.aws.pacer import Pacer
from cloudexec._launchers.platform import JobRequest, Reason, WorkerEnd

__all__ = ["BURST", "STARTS_PER_SECOND", "UNSEEN", "Asker", "Worker"]

STARTS_PER_SECOND = 100
"""Environments by which a function may grow per second: a thousand every ten seconds. AWS Lambda
Developer Guide, "Lambda scaling behavior"."""
BURST = 500
"""Workers that are asked for at once: half of what Lambda starts, as other programs may use the
function, too."""
UNSEEN = EVENT_AGE + 20.0
"""Seconds after which an event was dropped whose worker has not been seen: it was kept for a
minute, and a worker needs some seconds to start."""
_LIMITS_HOLD = 30.0
_AGAIN = 1.0
_TROUBLE = 5.0
"""Seconds until it is tried again where AWS cannot be asked."""


@dataclass(slots=True, eq=False)
class Worker:
    """One worker, from the request on.

    Attributes:
        name: Of its job.
        request: What is to run; ``None``: an earlier process has asked for it.
        invocations: Ids of the invocations that were asked for.
        invoked_at: When the last one was asked for, on the monotonic clock; ``None``: it waits.
        has_arrived: Whether it has connected.
        is_here: Whether it is connected.
        reason: Why it waits.
        end: How it ended.
        is_taken: Whether the platform answers for it: it is asked for as long as it waits.
        is_doomed: Whether it is to end.
        is_asking: Whether a call is being made for it.
        has_room: Whether this call may be made, as there is concurrency for it.
        not_before: Until when it is not asked for again, on the monotonic clock.
    """

    name: str
    request: JobRequest | None = None
    invocations: list[str] = field(default_factory=list)
    invoked_at: float | None = None
    has_arrived: bool = False
    is_here: bool = False
    reason: str = ""
    end: WorkerEnd | None = None
    is_taken: bool = False
    is_doomed: bool = False
    is_asking: bool = False
    has_room: bool = False
    not_before: float = 0.0

    @property
    def waits(self) -> bool:
        """Whether it is to be asked for."""
        return self.invoked_at is None and not (self.end or self.is_doomed or self.request is None)

    @property
    def takes_room(self) -> bool:
        """Whether it has, or may soon have, an environment."""
        if self.has_room:
            return True
        is_asked_for = self.invoked_at is not None and self.end is None and not self.is_doomed
        return self.is_here or (is_asked_for and not self.has_arrived)


class Asker:
    """Asks for the workers of one executor.

    Args:
        clients: For the calls.
        workers: All workers by name, which the platform adds to.
        function: Returns the name of a worker's function, which it makes if there is none; told
            of one that is gone.
        event: Returns the event of a worker.
        reserved: How many invocations are reserved for the function by the settings.
    """

    def __init__(
        self,
        clients: AwsClients,
        workers: Mapping[str, Worker],
        *,
        function: Callable[[int, str], Awaitable[str]],
        event: Callable[[Worker], bytes],
        reserved: int | None,
    ) -> None:
        self.pacer = Pacer(STARTS_PER_SECOND, BURST)
        self.trouble = ""
        """Why AWS cannot be asked now; empty: it can."""
        self._clients = clients
        self._workers = workers
        self._function = function
        self._event = event
        self._reserved = reserved
        self._learning = asyncio.Lock()
        self._most: int | None = None
        self._most_is = ""
        self._known_at = float("-inf")
        self._wake = asyncio.Event()
        self._again: asyncio.Task[None] | None = None

    async def ask(self, worker: Worker) -> None:
        """Ask for a worker, unless all concurrency is used: then it waits.

        Raises:
            AwsError: If AWS refuses.
            CloudexecError: If the settings make it impossible.
        """
        if not worker.waits or worker.is_asking:
            return
        worker.is_asking = True
        try:
            async with self._learning:
                await self._learn_limits(worker)
            used = sum(each.takes_room for each in self._workers.values())
            if self._most is not None and used >= self._most:
                worker.reason = f"all {self._most_is} are in use"
                return
            worker.has_room = True
            await self._invoke(worker)
        finally:
            worker.is_asking = worker.has_room = False

    async def _invoke(self, worker: Worker) -> None:
        assert worker.request is not None
        size = worker.request.size
        event = self._event(worker)
        name = await self._function(size, "")
        try:
            request = await invoke(self._clients, name, event)
        except AwsError as exc:
            if is_gone(exc):
                # Somebody has removed the function since: it is made again.
                request = await invoke(self._clients, await self._function(size, name), event)
            elif is_not_ready(exc):
                raise AwsError(
                    exc.message, code=exc.code, operation=exc.operation, transient=True
                ) from exc
            else:
                # An event that comes twice does no harm: the second worker is refused.
                exc.uncertain = exc.transient and exc.code not in THROTTLES
                raise
        worker.invocations.append(request)
        worker.invoked_at, worker.reason = time.monotonic(), ""

    async def _learn_limits(self, worker: Worker) -> None:
        """Find out how many workers there may be; where that is not allowed, nothing is known."""
        if time.monotonic() - self._known_at < _LIMITS_HOLD:
            return
        self._known_at = time.monotonic()
        if self._reserved is not None:
            self._most = self._reserved
            self._most_is = f"{self._reserved} invocations that are reserved for the function"
            return
        assert worker.request is not None
        try:
            limits = await limits_of_account(self._clients)
            reserved = await reserved_concurrency(
                self._clients, await self._function(worker.request.size, "")
            )
        except AwsError:
            self._most = None  # an aid, not a need
            return
        self._most = limits.unreserved if reserved is None else reserved
        self._most_is = (
            f"{limits.unreserved} invocations that the account may have at once"
            if reserved is None
            else f"{reserved} invocations that are reserved for the function"
        )

    async def was_stopped(self, worker: Worker) -> bool:
        """Whether somebody has stopped the function of a worker whose event was dropped."""
        if worker.request is None:
            return False
        name = await self._function(worker.request.size, "")
        return await reserved_concurrency(self._clients, name) == 0

    def ask_again(self) -> None:
        """Ask again for the workers that wait, from now on and in the background."""
        self._wake.set()
        if self._again is None or self._again.done():
            self._again = asyncio.get_running_loop().create_task(self._keep_asking())

    async def close(self) -> None:
        """Ask no more. What was asked for already finds no client, and ends."""
        if self._again is not None:
            self._again.cancel()
            await asyncio.gather(self._again, return_exceptions=True)

    async def _keep_asking(self) -> None:
        while any(each.waits for each in self._workers.values()):
            self._wake.clear()
            for worker in list(self._workers.values()):
                is_due = worker.is_taken and worker.not_before <= time.monotonic()
                if is_due and worker.waits and not await self._ask_quietly(worker):
                    break  # the others would not fare better
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), _AGAIN)

    async def _ask_quietly(self, worker: Worker) -> bool:
        """Ask for a worker that waits; return whether it could be asked for."""
        try:
            await self.pacer.wait()
            await self.ask(worker)
        except AwsError as exc:
            if exc.transient or exc.expired:
                self.trouble = exc.message
                worker.not_before = time.monotonic() + _TROUBLE
                return False
            worker.end = WorkerEnd(reason=Reason(exc.message, fatal=True))
        except CloudexecError as exc:
            worker.end = WorkerEnd(reason=Reason(str(exc), fatal=True))
        else:
            self.trouble = ""
            return worker.invoked_at is not None
        return True
