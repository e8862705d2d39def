"""Chooses the launcher for a worker: the first one that has room and has not just failed."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cloudexec._config import WorkerCapacity
from cloudexec._errors import ConfigError
from cloudexec._launchers.base import (
    Contact,
    LaunchEnd,
    Launcher,
    LauncherCounts,
    LaunchRequest,
    Network,
)

__all__ = ["Candidate", "Choice", "Launched", "causes_of"]

_STRIKES = 3
"""Workers in a row that are killed or reclaimed before they connect, after which other launchers
are preferred. Fewer are no reason, as this happens now and then on any platform."""
_ON_THEIR_WAY = 5.0
"""Seconds in which the executor replaces a worker that was passed on, if it still needs one."""


@dataclass(slots=True, eq=False)
class Launched:
    """A worker that was requested from a launcher.

    Attributes:
        candidate: The launcher.
        request: The executor's request.
        asked_at: Time of the request, on the monotonic clock.
        instead_of: Names of the launchers that were passed over for it, and the reasons.
        connected: Whether it has connected.
        late: Whether it has not connected in time.
        unwanted: Whether the executor has refused it or had it terminated.
    """

    candidate: Candidate
    request: LaunchRequest
    asked_at: float
    instead_of: str = ""
    connected: bool = False
    late: bool = False
    unwanted: bool = False


@dataclass(slots=True, eq=False)
class Candidate:
    """One launcher, with its state in this executor.

    Attributes:
        launcher: The launcher.
        name: Its display name.
        limit: Largest number of workers that it may have at a time; ``None`` for no limit.
        network: The network that its ``start`` has returned; ``None`` if it was not started.
        contact: The contact for its workers; ``None`` for the executor's usual one.
        usable: Whether workers can be requested from it at all.
        why: Why it could not start workers the last time. Empty if it has not failed, or if it has
            been tried again since and a worker has connected.
        fatal: Whether another launch would fail, too.
        barred_until: Time until which other launchers are preferred, on the monotonic clock.
        strikes: Workers in a row that were killed or reclaimed before they connected.
        struck_at: Time of the last strike, on the monotonic clock.
        active: By launch id, its workers that have not ended.
        launched: Number of workers that were requested from it.
        connected: Number of these that have connected.
        passed_on: Number of these that it could not start, so that another launcher is tried.
        sizes: Its size for each of the executor's sizes that was looked up; ``None`` for no size.
    """

    launcher: Launcher
    name: str
    limit: int | None = None
    network: Network | None = None
    contact: Contact | None = None
    usable: bool = False
    why: str = ""
    fatal: bool = False
    barred_until: float = float("-inf")
    strikes: int = 0
    struck_at: float = float("-inf")
    active: dict[str, Launched] = field(default_factory=dict)
    launched: int = 0
    connected: int = 0
    passed_on: int = 0
    sizes: dict[int, int | None] = field(default_factory=dict)

    def reset(self) -> None:
        """Forget the state, as another executor uses the launcher now."""
        self.network = self.contact = None
        self.usable = False
        self.why, self.fatal = "", False
        self.barred_until = self.struck_at = float("-inf")
        self.strikes = self.launched = self.connected = self.passed_on = 0
        self.active = {}

    def counts(self, now: float) -> LauncherCounts:
        """Return the counts of its workers, and their cost."""
        return LauncherCounts(
            launcher=self.name,
            launched=self.launched,
            connected=self.connected,
            active=len(self.active),
            passed_on=self.passed_on,
            cost_usd=0.0 if self.network is None else self.launcher.cost().accrued_usd,
            why=self.why,
            is_passed_over=not self.usable or now < self.barred_until,
        )


class Choice:
    """The launchers of one executor in the order in which they are preferred.

    The executor's worker sizes are those of the leading launcher. For each of these, another
    launcher uses its smallest size that is large enough. Any thread may ask for sizes.

    Args:
        candidates: The launchers.
        return_after: Seconds after a failure in which other launchers are preferred.
    """

    def __init__(self, candidates: Sequence[Candidate], return_after: float) -> None:
        self.candidates = candidates
        self.lead = next(
            # Launchers on this machine have no worker sizes, so another one leads if there is one.
            (each for each in candidates if not each.launcher.one_machine),
            candidates[0],
        )
        # If all workers are on this machine, the executor itself divides its resources among tasks.
        self._shares_machine = not self.lead.launcher.one_machine
        self._return_after = return_after
        self._sizing = threading.Lock()
        self._made: list[WorkerCapacity] = []
        self._passed_on: list[float] = []  # times, for workers that were not requested again yet

    # Sizes.

    def capacity(self, size: int) -> WorkerCapacity | None:
        """Return the resources of a worker of a size; ``None`` if they are not known."""
        own = self.lead.launcher.size_count
        return self.lead.launcher.capacity(size) if size < own else self._made[size - own]

    def size_of(self, capacity: WorkerCapacity) -> int:
        """Return the number of the size with these resources, which is new if there was none."""
        with self._sizing:
            own = self.lead.launcher.size_count
            for size in range(own):
                if self.lead.launcher.capacity(size) == capacity:
                    return size
            if capacity not in self._made:
                self._made.append(capacity)
            return own + self._made.index(capacity)

    def size_for(self, cpus: float, memory: int, gpus: int) -> int:
        """Find the smallest size for a task, of the leading launcher or else of another one.

        Raises:
            ConfigError: If no launcher has a size; the message has the reason of each.
        """
        others = [each for each in self.candidates if each is not self.lead]
        reasons = []
        for candidate in (self.lead, *others):
            launcher = candidate.launcher
            try:
                found = launcher.capacity(launcher.size_for(cpus, memory, gpus))
            except ConfigError as exc:
                reasons.append(f"{candidate.name}: {exc}")
                continue
            if found is None or (launcher.one_machine and self._shares_machine):
                found = WorkerCapacity(cpus=cpus, memory=memory, gpus=gpus)
            return self.size_of(found)
        raise ConfigError("no launcher has such a worker: " + "; ".join(reasons))

    def size_at(self, candidate: Candidate, size: int) -> int | None:
        """Return a launcher's size for a size of the executor; ``None`` if it has none."""
        if size not in candidate.sizes:
            candidate.sizes[size] = self._find_size(candidate, size)
        return candidate.sizes[size]

    def _find_size(self, candidate: Candidate, size: int) -> int | None:
        launcher = candidate.launcher
        if candidate is self.lead and size < launcher.size_count:
            return size
        wanted = self.capacity(size)
        if wanted is None or launcher.capacity(0) is None:
            return None if size else 0  # tasks that ask for nothing run on any worker
        if launcher.one_machine and wanted.gpus:
            return None  # it is not known which GPUs of the machine are in use
        try:
            return launcher.size_for(wanted.cpus, wanted.memory, wanted.gpus)
        except ConfigError:
            return None

    def size_from(self, candidate: Candidate, size: int) -> int:
        """Return the executor's size for a launcher's size."""
        for known in range(self.lead.launcher.size_count):
            if self.size_at(candidate, known) == size:
                return known
        capacity = candidate.launcher.capacity(size)
        return 0 if capacity is None else self.size_of(capacity)

    # The choice.

    def room(
        self, candidate: Candidate, request: LaunchRequest, planned: Sequence[LaunchRequest] = ()
    ) -> int:
        """Return how many more workers like ``request`` a launcher may start after planned ones."""
        if not candidate.usable or self.size_at(candidate, request.size) is None:
            return 0
        room = 1 << 30
        if candidate.limit is not None:
            room = candidate.limit - len(candidate.active) - len(planned)
        machine = candidate.launcher.capacity(0)
        if self._shares_machine and candidate.launcher.one_machine and machine is not None:
            one = self._needs(request)
            active = [each.request for each in candidate.active.values()]
            others = [self._needs(each) for each in (*active, *planned)]
            cpus = machine.cpus - sum(each.cpus for each in others)
            room = min(room, int(cpus / one.cpus + 1e-9))
            if machine.memory and one.memory:
                memory = machine.memory - sum(each.memory for each in others)
                room = min(room, memory // one.memory)
        return max(0, room)

    def _needs(self, request: LaunchRequest) -> WorkerCapacity:
        return self.capacity(request.size) or WorkerCapacity(cpus=request.slots)

    def plan(
        self, requests: Sequence[LaunchRequest], now: float
    ) -> list[tuple[Candidate | None, list[LaunchRequest]]]:
        """Choose a launcher for each worker, without any change of state.

        Launchers that have just failed get only workers for which the others have no room.

        Returns:
            Pairs of a launcher and its workers, which have one size and the same slots, in the
            order of ``requests``. The launcher is ``None`` if no launcher has room.
        """
        plan: list[tuple[Candidate | None, list[LaunchRequest]]] = []
        planned: dict[int, list[LaunchRequest]] = {}
        for _, alike in itertools.groupby(requests, lambda each: (each.size, each.slots)):
            rest = list(alike)
            fresh = [each for each in self.candidates if now >= each.barred_until]
            for candidate in (*fresh, *(each for each in self.candidates if each not in fresh)):
                mine = planned.setdefault(id(candidate), [])
                count = self.room(candidate, rest[0], mine) if rest else 0
                if count:
                    plan.append((candidate, rest[:count]))
                    mine += rest[:count]
                    rest = rest[count:]
            if rest:
                plan.append((None, rest))
        return plan

    def forgive(self, requests: Sequence[LaunchRequest], now: float) -> None:
        """Try all launchers again if all that have this size of worker have just failed.

        Args:
            requests: Workers of one size that are about to be launched.
            now: The time, on the monotonic clock.
        """
        able = self._able(requests)
        if all(now < each.barred_until for each in able):
            for each in able:
                # Launchers without room cannot be tried now, so they stay barred.
                if self.room(each, requests[0]):
                    each.barred_until = now

    def _able(self, requests: Sequence[LaunchRequest]) -> list[Candidate]:
        """Return the launchers that have this size of worker, even if they have no room."""
        return [
            each
            for each in self.candidates
            if each.usable and self.size_at(each, requests[0].size) is not None
        ]

    def elsewhere(self, workers: Sequence[Launched], now: float) -> int:
        """Return how many workers of one launcher the other launchers could start now."""
        if not workers:
            return 0
        request, mine = workers[0].request, workers[0].candidate
        room = sum(self.room(each, request) for each in self.others(mine, now))
        on_their_way = sum(now - at < _ON_THEIR_WAY for at in self._passed_on)
        return max(0, min(len(workers), room - on_their_way))

    def note_requests(self, count: int) -> None:
        """Record a request for workers, which may replace workers that were passed on."""
        del self._passed_on[:count]

    def others(self, candidate: Candidate, now: float) -> list[Candidate]:
        """Return the other launchers that have not just failed."""
        return [
            each for each in self.candidates if each is not candidate and now >= each.barred_until
        ]

    # Ends and connections.

    def ended(self, worker: Launched, end: LaunchEnd, now: float) -> tuple[LaunchEnd, str]:
        """Record that a worker has ended, or could not be started, before it connected.

        Args:
            worker: The worker.
            end: The end that its launcher has reported.
            now: The time, on the monotonic clock.

        Returns:
            The end to report to the executor, and a warning for the user, which is empty if it
            would repeat an earlier one.
        """
        candidate = worker.candidate
        if end.killed or end.reclaimed:
            # Workers that were requested before the last strike may have ended for its cause.
            if worker.asked_at >= candidate.struck_at:
                candidate.strikes += 1
                candidate.struck_at = now
            if candidate.strikes < _STRIKES:
                return end, ""
        said = self.bar(candidate, end.reason, now, fatal=end.fatal)
        following = next(
            (each for each in self.others(candidate, now) if self.room(each, worker.request)), None
        )
        if following is None:
            fatal = all(each.fatal for each in self._able([worker.request]))
            # A killed or reclaimed worker says little about the settings of its launcher.
            reason = self.causes() or end.reason
            return LaunchEnd(reason, killed=end.killed, reclaimed=end.reclaimed, fatal=fatal), ""
        candidate.passed_on += 1
        self._passed_on = [at for at in self._passed_on if now - at < _ON_THEIR_WAY] + [now]
        text = f"{candidate.name}: {end.reason}; {following.name} is tried instead"
        news = (
            f"{candidate.name} cannot start workers; for {self._return_after:g} s, new ones come "
            f"from {following.name}, or from others: {end.reason}"
        )
        return LaunchEnd(text, reclaimed=True), news if said else ""

    def bar(self, candidate: Candidate, why: str, now: float, *, fatal: bool = False) -> bool:
        """Prefer other launchers for a while; return whether this one was not barred before."""
        is_new = now >= candidate.barred_until
        candidate.why, candidate.fatal = why, fatal
        candidate.barred_until = now + self._return_after
        return is_new

    def note_connected(self, worker: Launched, now: float) -> None:
        """Record that a worker has connected, which ends its launcher's strikes."""
        candidate = worker.candidate
        if not worker.connected:
            worker.connected = True
            candidate.connected += 1
        candidate.strikes = 0
        if now >= candidate.barred_until:
            candidate.why, candidate.fatal = "", False

    def why_not(self, request: LaunchRequest, size_name: str) -> LaunchEnd:
        """Return why no launcher can start a worker of the size that is called ``size_name``."""
        if self._able([request]):
            return LaunchEnd("each launcher has as many workers as it may have")
        causes = self.causes()
        return LaunchEnd(
            f"no launcher that is in use has workers with {size_name}"
            + (f": {causes}" if causes else ""),
            fatal=True,
        )

    def passed_over(self, candidate: Candidate, now: float) -> str:
        """Return which launchers are preferred to this one, and why they are not used now."""
        before = self.candidates[: self.candidates.index(candidate)]
        return causes_of(c for c in before if not c.usable or now < c.barred_until)

    def causes(self) -> str:
        """Return why each launcher that has failed could not start workers the last time."""
        return causes_of(self.candidates)


def causes_of(candidates: Iterable[Candidate]) -> str:
    """Return why each of these launchers that has failed could not start workers the last time."""
    return "; ".join(f"{each.name}: {each.why}" for each in candidates if each.why)
