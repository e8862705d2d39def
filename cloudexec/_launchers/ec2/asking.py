"""Asks Amazon EC2 for instances, many with one request, until there is capacity for all of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass, field

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.instance_diagnosis import cause_of_refused_fleet, may_pass, worst_of
from cloudexec._aws.instance_requests import Fleet
from cloudexec._aws.machines import start_instances
from cloudexec._errors import AwsError, CloudexecError
from cloudexec._launchers.aws.asking import CapacityAsker
from cloudexec._launchers.aws.pacer import Pacer
from cloudexec._launchers.platform import JobRequest, Phase, Reason, WorkerEnd, WorkerStatus

__all__ = ["CALLS_PER_SECOND", "Asker", "Group"]

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


class Asker(CapacityAsker[Group]):
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

    service, machines = "Amazon EC2", "instances"

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
        super().__init__(groups, stop_hint)
        self._calls = Pacer(CALLS_PER_SECOND, _BURST)
        self._instances = Pacer(_INSTANCES_PER_SECOND, _INSTANCES_BURST)
        self._clients = clients
        self._fleet = fleet
        self._template = template
        self._started_by = started_by
        self._end = end
        self._fleets: dict[str, Fleet] = {}

    async def turn(self) -> None:
        """Wait until a call may be made."""
        await self._calls.wait()

    async def ask(self, group: Group) -> None:
        """Ask for the instances of a group, as ``ask_now`` does.

        If AWS would refuse so many instances at once, they wait as for capacity.
        """
        count = len(group.lacking)
        if group.asking is None and not self._instances.is_free(count):
            group.reason = _TOO_MANY
            return
        await self._instances.wait(max(1, count))
        await self.ask_now(group)

    def go_without(self, group: Group, worker: Worker, reason: str) -> None:
        """Let a worker wait for capacity, and with it all others of its kind."""
        group.past.add(worker.instance)
        group.machines.pop(worker.instance, None)
        worker.instance = ""
        worker.seen, worker.is_known, worker.missing_since = _NOT_SEEN, False, None
        group.reason = reason
        self._pause(group, reason)

    def end_soon(self, instances: Iterable[str]) -> None:
        """End instances in the background."""
        ids = list(instances)
        if ids:
            self._end_in_background(lambda: self._end(ids), f"instances ({', '.join(ids[:20])})")

    async def _turn(self, group: Group) -> None:
        await self._calls.wait()
        await self._instances.wait(max(1, len(group.lacking)))

    def _fail(self, group: Group, reason: Reason) -> None:
        for worker in group.lacking:
            worker.end = WorkerEnd(reason=reason)

    def _doom(self, group: Group) -> None:
        for worker in group.workers:
            worker.is_doomed = True

    async def _end_doomed(self, group: Group) -> None:
        self.end_soon(each.instance for each in group.workers if each.is_doomed and each.instance)

    # One call.

    async def _call_for(self, group: Group) -> None:
        lacking = group.lacking
        if not lacking:
            return
        if not group.is_unsure and self._is_dry(group):
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
