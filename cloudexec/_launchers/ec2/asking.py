"""Asking Amazon EC2 for instances, many with one request, until there is capacity for all of them.

There is no queue in AWS in which a worker could wait for capacity, so it waits here: one background
task asks again for all workers that wait. Of jobs that are alike, one finds out for the others.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.instance_diagnosis import cause_of_refused_fleet, may_pass, worst_of
from cloudexec._aws.instance_requests import Fleet
from cloudexec._aws.machines import start_instances
from cloudexec._errors import AwsError, CloudexecError
from cloudexec._launchers.ending import insist
from cloudexec._launchers.fargate.pacer import Pacer
from cloudexec._launchers.platform import JobRequest, Phase, Reason, WorkerEnd, WorkerStatus
from cloudexec._log import Log

__all__ = ["CALLS_PER_SECOND", "Asker", "Group"]

_logger = Log()

CALLS_PER_SECOND = 2
"""Calls that start instances which AWS takes per second, after the first five. Amazon EC2 Developer
Guide, "Request throttling for the Amazon EC2 API", for RunInstances, which a fleet makes."""
_BURST = 3
"""Calls that are made at once: fewer than AWS takes, as calls that are slow on their way arrive
together with later ones."""
_INSTANCES_PER_SECOND = 2
_INSTANCES_BURST = 1000
"""Instances that AWS starts per second, and at once after a pause. The same page."""
_TOO_MANY = (
    f"Amazon EC2 starts {_INSTANCES_PER_SECOND} instances a second after the first "
    f"{_INSTANCES_BURST} (RequestLimitExceeded otherwise)"
)
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 15.0
"""Seconds until Amazon EC2 is asked again where it had no capacity, at first and in the end."""
_CLOSE_PATIENCE = 20.0
"""Seconds for which calls are waited for that are being made at the end."""
_NOT_SEEN = WorkerStatus(phase=Phase.ACCEPTED)


@dataclass(slots=True)
class Worker:
    """One worker of a group.

    Attributes:
        instance: Its instance; empty: there is none yet, or none any more.
        asked_at: When its instance was asked for, on the monotonic clock.
        seen: What Amazon EC2 has told of it last.
        missing_since: Since when Amazon EC2 does not know an instance that it has told of, on the
            monotonic clock; ``None``: it knows it.
        is_known: Whether Amazon EC2 has told of its instance.
        is_doomed: Whether it is to end.
        end: How it ended without an instance that could say so.
    """

    instance: str = ""
    asked_at: float = 0.0
    seen: WorkerStatus = _NOT_SEEN
    missing_since: float | None = None
    is_known: bool = False
    is_doomed: bool = False
    end: WorkerEnd | None = None


@dataclass(slots=True, eq=False)
class Group:
    """The workers of one job, from the request on.

    Attributes:
        name: Of the job.
        spot: Whether they are to be Spot.
        request: What is to run; ``None``: an earlier process has asked for it.
        workers: By index.
        attempt: Which request it is.
        tried_at: When instances were last asked for, on the monotonic clock.
        reason: Why some have no instance, in the words of Amazon EC2.
        is_taken: Whether the platform answers for it: it is asked for again as long as it waits.
        is_unsure: Whether a call may have started instances whose answer did not come.
        asking: The call that is being made.
        machines: Of the instances that Amazon EC2 has told of: type and zone, by id.
        past: Instances that ended before they ran, so that others were asked for instead.
    """

    name: str
    spot: bool = False
    request: JobRequest | None = None
    workers: list[Worker] = field(default_factory=list)
    attempt: int = 1
    tried_at: float = 0.0
    reason: str = ""
    is_taken: bool = False
    is_unsure: bool = False
    asking: asyncio.Task[None] | None = None
    machines: dict[str, tuple[str, str]] = field(default_factory=dict)
    past: set[str] = field(default_factory=set)

    @property
    def lacking(self) -> list[Worker]:
        """Those that are to get an instance."""
        return [
            each
            for each in self.workers
            if not (each.instance or each.is_doomed or each.end) and self.request is not None
        ]

    @property
    def waits(self) -> bool:
        """Whether instances are to be asked for again."""
        return self.is_taken and bool(self.lacking)

    @property
    def ids(self) -> list[str]:
        """The instance of each worker; empty where there is none."""
        return [each.instance for each in self.workers]

    @property
    def kind(self) -> tuple[bool, int]:
        """Groups of one kind find capacity, or do not, alike."""
        return self.spot, self.request.size if self.request is not None else 0

    def take(self, instances: Iterable[str]) -> list[str]:
        """Give instances to workers that have none; return those that are too many."""
        known = {*self.ids, *self.past}
        fresh = [each for each in sorted(set(instances)) if each not in known]
        free = [each for each in self.workers if not (each.instance or each.is_doomed or each.end)]
        for worker, instance in zip(free, fresh, strict=False):
            worker.instance, worker.asked_at = instance, time.monotonic()
            worker.seen, worker.is_known, worker.missing_since = _NOT_SEEN, False, None
        return fresh[len(free) :]


@dataclass(slots=True)
class _Drought:
    """Nothing of one kind can be had.

    Attributes:
        reason: In the words of Amazon EC2; empty: it did not say.
        trouble: Why it did not: an error that may pass.
        until: When it is asked for again, on the monotonic clock.
        pause: Seconds until then.
    """

    reason: str
    until: float
    pause: float
    trouble: str = ""


class Asker:
    """Asks for the instances of one executor's workers.

    Args:
        clients: For CreateFleet.
        groups: All groups by name, which the platform adds to.
        fleet: Returns what is to be asked for, for a group.
        template: Makes the launch template again, given the one that is gone.
        started_by: Returns the instances of a group that there are, by its name.
        end: Ends instances.
        stop_hint: What a user can do to end workers; see ``Platform``.
    """

    def __init__(
        self,
        clients: AwsClients,
        groups: Mapping[str, Group],
        *,
        fleet: Callable[[Group, int], Fleet],
        template: Callable[[str], Awaitable[object]],
        started_by: Callable[[str], Awaitable[list[str]]],
        end: Callable[[Iterable[str]], Coroutine[object, object, None]],
        stop_hint: str,
    ) -> None:
        self._calls = Pacer(CALLS_PER_SECOND, _BURST)
        self._instances = Pacer(_INSTANCES_PER_SECOND, _INSTANCES_BURST)
        self._clients = clients
        self._groups = groups
        self._fleet = fleet
        self._template = template
        self._started_by = started_by
        self._end = end
        self._stop_hint = stop_hint
        self._droughts: dict[tuple[bool, int], _Drought] = {}
        self._fleets: dict[str, Fleet] = {}
        self._wake = asyncio.Event()
        self._again: asyncio.Task[None] | None = None
        self._ends: set[asyncio.Task[None]] = set()

    async def turn(self) -> None:
        """Wait until a call may be made."""
        await self._calls.wait()

    async def ask(self, group: Group) -> None:
        """Ask for the instances of a group. The answer is heard also if this is cancelled.

        If AWS would refuse so many instances at once, they wait as for capacity.

        Raises:
            AwsError: If AWS refuses.
            CloudexecError: If the settings make it impossible.
        """
        count = len(group.lacking)
        if group.asking is None and not self._instances.is_free(count):
            group.reason = _TOO_MANY
            return
        await self._instances.wait(max(1, count))
        await asyncio.shield(self._begin(group, self._ask(group)))

    def ask_again(self) -> None:
        """Ask again for the groups that wait, from now on and in the background."""
        self._wake.set()
        if self._again is None or self._again.done():
            self._again = asyncio.get_running_loop().create_task(self._keep_asking())

    def go_without(self, group: Group, worker: Worker, reason: str) -> None:
        """Let a worker wait for capacity, and with it all others of its kind."""
        group.past.add(worker.instance)
        group.machines.pop(worker.instance, None)
        worker.instance = ""
        worker.seen, worker.is_known, worker.missing_since = _NOT_SEEN, False, None
        group.reason = reason
        self._pause(group, reason)

    def trouble(self, group: Group) -> str:
        """Say why AWS cannot be asked for workers that wait; empty: it can."""
        drought = self._droughts.get(group.kind)
        return drought.trouble if drought is not None and group.waits else ""

    def end_soon(self, instances: Iterable[str]) -> None:
        """End instances in the background."""
        ids = list(instances)
        if ids:
            end = asyncio.get_running_loop().create_task(self._end_late(ids))
            self._ends.add(end)
            end.add_done_callback(self._ends.discard)

    async def close(self) -> None:
        """Ask no more, and end what calls that are being made still start.

        A call of which no answer comes in some seconds is given up. Instances that it may have
        started find no client, and end by themselves.
        """
        if self._again is not None:
            self._again.cancel()
            await asyncio.gather(self._again, return_exceptions=True)
        for group in self._groups.values():
            for worker in group.workers:
                worker.is_doomed = worker.is_doomed or group.asking is not None
        asking = [each.asking for each in self._groups.values() if each.asking is not None]
        if pending := [*asking, *self._ends]:
            _, late = await asyncio.wait(pending, timeout=_CLOSE_PATIENCE)
            if late:
                unheard = [each.name for each in self._groups.values() if each.asking in late]
                _logger.error(
                    "Amazon EC2 does not answer, and may have started instances for %s that are "
                    "not ended: they end by themselves when they find no client. %s",
                    ", ".join(unheard) or "this executor",
                    self._stop_hint,
                )
            for each in late:
                each.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    # One call.

    def _begin(self, group: Group, call: Coroutine[object, object, None]) -> asyncio.Task[None]:
        if group.asking is not None:
            call.close()
            return group.asking

        async def ask() -> None:
            try:
                await call
            finally:
                # Those who ended workers may not have waited for this answer.
                doomed = [each.instance for each in group.workers if each.is_doomed]
                self.end_soon(filter(None, doomed))

        def asked(done: asyncio.Task[None]) -> None:
            group.asking = None
            self._wake.set()
            if not done.cancelled():
                done.exception()  # it is raised where it is waited for, which is not necessary

        group.asking = asyncio.get_running_loop().create_task(ask())
        group.asking.add_done_callback(asked)
        return group.asking

    async def _ask(self, group: Group) -> None:
        lacking = group.lacking
        if not lacking:
            return
        drought = self._droughts.get(group.kind)
        if drought is not None and time.monotonic() < drought.until and not group.is_unsure:
            group.reason = drought.reason or group.reason
            return
        group.tried_at = time.monotonic()
        was_unsure = group.is_unsure
        fleet = self._fleets.get(group.name)
        if fleet is None:
            # It stays the same until it is answered.
            fleet = self._fleets[group.name] = self._fleet(group, len(lacking))
        try:
            instances, reason = await self._start(group, fleet)
        except AwsError as exc:
            if exc.code.startswith("InvalidLaunchTemplateName.NotFound"):
                # Somebody has removed it since: it is made again, and this is another request.
                self._forget(group)
                await self._template(fleet.template)
                fleet = self._fleets[group.name] = self._fleet(group, len(lacking))
                instances, reason = await self._start(group, fleet)
            elif not exc.transient and may_pass(f"{exc.code}: {exc.message}"):
                instances, reason = [], exc.message
            else:
                if not exc.transient:
                    self._forget(group)
                raise
        is_silent = not reason and len(instances) < fleet.count
        if was_unsure or is_silent:
            # Whether an answer that is given again names all of them is not documented, and the
            # next call has another token: this is the last moment to find out.
            group.is_unsure = True
            instances = [*instances, *await self._started_by(group.name)]
        if is_silent and len(instances) < fleet.count:
            # They may not be listed yet: the same request is made again.
            self.end_soon(group.take(instances))
            self._pause(group, "", "its answer names fewer instances than were asked for")
            return
        group.is_unsure = False
        self._forget(group)
        self.end_soon(group.take(instances))
        if not group.lacking:
            group.reason = ""
            self._droughts.pop(group.kind, None)
            return
        cause = cause_of_refused_fleet(reason, spot=group.spot)
        group.reason = reason
        if cause.fatal and not instances:
            raise AwsError(str(cause), code="CreateFleetError", operation="ec2:CreateFleet")
        self._pause(group, reason)

    def _forget(self, group: Group) -> None:
        """Let the next request of a group be another one."""
        self._fleets.pop(group.name, None)
        group.attempt += 1

    async def _start(self, group: Group, fleet: Fleet) -> tuple[list[str], str]:
        """Make the call; return instances, and why there are not more.

        The SDK makes it again by itself where no answer came, with the same client token.
        """
        before, group.is_unsure = group.is_unsure, True
        try:
            answer = await start_instances(self._clients, fleet)
        except AwsError as exc:
            # Also where the last try was throttled: the answer to an earlier one may be lost.
            exc.uncertain = exc.transient
            group.is_unsure = before or exc.uncertain
            raise
        except CloudexecError:
            group.is_unsure = before
            raise
        group.is_unsure = False
        return list(answer.instances), worst_of(answer.errors) if answer.errors else ""

    def _pause(self, group: Group, reason: str, trouble: str = "") -> None:
        """Ask for nothing of a group's kind for a while."""
        now = time.monotonic()
        drought = self._droughts.get(group.kind)
        if drought is None or now >= drought.until:
            pause = _FIRST_PAUSE if drought is None else min(2 * drought.pause, _LONGEST_PAUSE)
            self._droughts[group.kind] = _Drought(reason, now + pause, pause, trouble)

    async def _end_late(self, instances: list[str]) -> None:
        """End instances that nothing else ends; if that fails, say so."""
        try:
            await insist(lambda: self._end(instances))
        except CloudexecError as exc:
            names = ", ".join(instances[:20])
            _logger.error("instances could not be ended (%s): %s. %s", names, exc, self._stop_hint)

    # Again.

    async def _keep_asking(self) -> None:
        """Ask for workers that wait, as long as there are some."""
        while any(each.waits for each in self._groups.values()):
            self._wake.clear()
            pause = await self._ask_some()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)

    async def _ask_some(self) -> float:
        """Ask for those workers that may find a place now; return seconds until there may be more.

        Calls are made at the same time, since each of them may take long.
        """
        kinds: dict[tuple[bool, int], list[Group]] = {}
        for group in self._groups.values():
            if group.waits:
                kinds.setdefault(group.kind, []).append(group)
        pause = _LONGEST_PAUSE
        for kind, groups in kinds.items():
            idle = [each for each in groups if each.asking is None]
            drought = self._droughts.get(kind)
            if drought is not None:
                for each in idle:
                    each.reason = drought.reason or each.reason
                if (left := drought.until - time.monotonic()) > 0:
                    pause = min(pause, left)
                    continue
                if len(idle) < len(groups):
                    continue  # the answer for one that is asked for comes, and wakes this up
                idle = sorted(idle, key=lambda each: each.tried_at)[:1]
            for each in idle:
                await self._calls.wait()
                await self._instances.wait(max(1, len(each.lacking)))
                if each.waits:
                    self._begin(each, self._ask_quietly(each))
                if self._droughts.get(kind) is not drought:
                    break  # an answer has come meanwhile
        return pause

    async def _ask_quietly(self, group: Group) -> None:
        """Ask for workers that nobody waits for at this moment, and note what becomes of them."""
        try:
            await self._ask(group)
        except CloudexecError as exc:
            if isinstance(exc, AwsError) and exc.may_pass:
                self._pause(group, "", str(exc))
                return
            reason = Reason(str(exc), fatal=True)
        except Exception as exc:
            _logger.exception("internal error while asking for the workers of %s", group.name)
            reason = Reason(f"internal error: {exc}", fatal=True)
        else:
            return
        for worker in group.lacking:
            worker.end = WorkerEnd(reason=reason)
