"""A launcher of launchers: workers that one launcher cannot start are started by the next one.

Each worker belongs to one launcher. If this launcher cannot start it, the executor is told that the
launch has ended, in a way that does not count as a failure, and requests another worker, which the
next launcher starts. So a worker that connects after it was given up is refused, as without a
``Fallback``.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cloudexec._config import WorkerCapacity, check_count, check_positive
from cloudexec._errors import CloudexecError, ConfigError, LaunchError
from cloudexec._launchers.base import (
    Arrival,
    Contact,
    Cost,
    LaunchEnd,
    Launcher,
    LauncherCounts,
    LaunchRequest,
    LaunchTimes,
    Network,
    Survivor,
)
from cloudexec._launchers.choice import Candidate, Choice, Launched
from cloudexec._launchers.ending import may_pass
from cloudexec._launchers.together import join, leave_out, start_all
from cloudexec._log import Log
from cloudexec._record_class import replace

__all__ = ["Fallback"]

_logger = Log()
_RETURN_AFTER = 600.0
_END_PATIENCE = 5.0
"""Seconds at the close in which workers may end by themselves, and again after their end was
requested."""
_ALMOST = 0.98
"""Share of ``launch_timeout`` after which a worker is given up here. It is less than 1, as the
executor would otherwise give the worker up itself, and count that as a failure."""
_LINGERS = 10
"""Number of pauses of ``linger`` that may lie between the executor's decision and the launch."""


class Fallback(Launcher):
    """Starts each worker with the first of several launchers that can start it.

    If a launcher has no capacity, has reached a limit, refuses or does not answer, the next
    launcher starts its workers. This takes seconds if the platform reports the problem, and
    ``patience`` if it does not. For ``return_after`` seconds, new workers come from the other
    launchers. Then the first launcher is tried again. Workers that run are not moved.

    Workers have the sizes of the first launcher. The other launchers start the smallest workers
    with the same resources or more, and are passed over if they have none. ``Local()`` starts only
    workers that fit on this machine together, and none with GPUs. A launcher is left out if its
    start fails, or takes longer than ``launch_timeout`` while another launcher is ready.

    Args:
        launchers: The launchers, in the order in which they are preferred; or a mapping from
            display names to launchers. Each serves one executor at a time.
        limits: Largest number of workers that each launcher may have at a time, in the same order;
            ``None`` for no limit. Tasks fail with ``LaunchError`` if workers of another size than
            they need use up all limits.
        patience: Seconds after which a worker without a place is started by the next launcher;
            ``None`` for the usual time on its platform, such as 60 seconds on Fargate.
        return_after: Seconds after a failure in which other launchers are preferred.

    Raises:
        ConfigError: If there is no launcher, a launcher is given twice, or a setting is out of its
            range.
        TypeError: If one of ``launchers`` is no launcher.
    """

    def __init__(
        self,
        launchers: Sequence[Launcher] | Mapping[str, Launcher],
        *,
        limits: Sequence[int | None] | None = None,
        patience: float | None = None,
        return_after: float = _RETURN_AFTER,
    ) -> None:
        names: list[str] = []
        if isinstance(launchers, Mapping):
            names, launchers = list(launchers), list(launchers.values())
        if not isinstance(launchers, Iterable):
            raise TypeError(
                f"launchers must be a list, such as [Batch(spot=True), Batch()], not {launchers!r}"
            )
        launchers = tuple(launchers)
        for each in launchers:
            if isinstance(each, type) or not hasattr(each, "slots_per_worker"):
                raise TypeError(f"launchers must be objects like Local() or Batch(), not {each!r}")
            if isinstance(each, Fallback):
                raise ConfigError("launchers must not have a Fallback: name its launchers instead")
        if len({id(each) for each in launchers}) < len(launchers):
            raise ConfigError("launchers must not name the same object twice: make a second one")
        if not launchers:
            raise ConfigError("launchers must name at least one launcher")
        limits = [None] * len(launchers) if limits is None else list(limits)
        if len(limits) != len(launchers):
            raise ConfigError(
                f"limits must have one number, or None, for each of {len(launchers)} launchers, "
                f"not {len(limits)}"
            )
        for limit in limits:
            if limit is not None:
                check_count("limits", limit, least=1)
        check_positive("patience", patience)
        check_positive("return_after", return_after)
        self.launchers = launchers
        self.limits = tuple(limits)
        self.patience = patience
        self.return_after = return_after
        # Settings that hold for all workers get the value with which every launcher can work.
        self.launch_timeout = max(each.launch_timeout for each in launchers)
        self.reconnect_grace = max(each.reconnect_grace for each in launchers)
        self.linger = max(each.linger for each in launchers)
        self.last_words = max(each.last_words for each in launchers)
        self.ends_are_seen = all(each.ends_are_seen for each in launchers)
        self.own_processes = all(each.own_processes for each in launchers)
        self.one_machine = all(each.one_machine for each in launchers)
        self.modules = _all_modules(launchers)
        names = names or _names(launchers)
        self._candidates = [
            Candidate(each, name, limit)
            for each, name, limit in zip(launchers, names, limits, strict=True)
        ]
        self._choice = Choice(self._candidates, return_after)
        self._workers: dict[str, Launched] = {}
        self._ways: list[Candidate] = []
        self._on_end: Callable[[str, LaunchEnd], None] = lambda *_: None
        self._launch_timeout = self._connect_within = self.launch_timeout
        self._alarm: asyncio.TimerHandle | None = None
        self._serving = threading.Lock()
        self._closing = False
        self._one_ended = asyncio.Event()

    # Sizes.

    @property
    def size_count(self) -> int:  # type: ignore[override]
        """Number of sizes that the leading launcher has."""
        return self._choice.lead.launcher.size_count

    def slots_per_worker(self, max_workers: int) -> int:
        """Return how many slots one worker has."""
        return self._choice.lead.launcher.slots_per_worker(max_workers)

    def capacity(self, size: int) -> WorkerCapacity | None:
        """Return the resources of a worker of a size; ``None`` if they are not known."""
        return self._choice.capacity(size)

    def most_slots(self, size: int) -> int:
        """Return how many tasks a worker of a size may run at once."""
        return min(
            each.launcher.most_slots(found)
            for each in self._candidates
            if (found := self._choice.size_at(each, size)) is not None
        )

    def size_for(self, cpus: float, memory: int, gpus: int) -> int:
        """Find the smallest size for a task, of the first launcher that has one.

        Raises:
            ConfigError: If no launcher has a size; the message has the reason of each.
        """
        return self._choice.size_for(cpus, memory, gpus)

    def more_memory(self, size: int) -> str:
        """Return the settings that give a worker of a size more memory; empty if not known."""
        lead = self._choice.lead
        found = self._choice.size_at(lead, size)
        return "" if found is None else lead.launcher.more_memory(found)

    # The start.

    def needs_network(self) -> bool:
        """Return whether the workers of any launcher are on other machines."""
        return any(each.needs_network() for each in self.launchers)

    async def start(
        self, executor_id: str, listen: str, advertise: str, launch_timeout: float
    ) -> Network:
        """Start all launchers at the same time; those whose start fails are left out.

        Raises:
            LaunchError: If none can be started, or if another executor uses this launcher.
        """
        if not self._serving.acquire(blocking=False):
            raise LaunchError("this Fallback(...) serves an executor already: make one for each")
        self._workers = {}
        self._ways = []
        self._closing = False
        self._one_ended = asyncio.Event()
        self._launch_timeout = launch_timeout
        self._connect_within = max(
            launch_timeout / 2, _ALMOST * launch_timeout - _LINGERS * self.linger
        )
        for each in self._candidates:
            each.reset()
        started = False
        try:
            if len(self._candidates) > 1:
                for launcher in self.launchers:
                    launcher.give_way(self._elsewhere, self.patience)
            await start_all(
                self._candidates,
                lambda launcher: launcher.start(executor_id, listen, advertise, launch_timeout),
                launch_timeout,
            )
            network, self._ways = join(self._candidates, listen)
            started = True
            return network
        finally:
            if not started:
                await self.close()

    def _elsewhere(self, launch_ids: Sequence[str]) -> int:
        """Return how many of these workers of one launcher another launcher could start now."""
        workers = [self._workers[each] for each in launch_ids if each in self._workers]
        return 0 if self._closing else self._choice.elsewhere(workers, time.monotonic())

    def begin(self, slots: int, preload: Sequence[str] | Callable[[], Sequence[str]]) -> None:
        """Let the launchers prepare the first worker before the executor accepts connections."""
        for index, each in enumerate(self.launchers):
            each.begin(0 if index else slots, preload)

    def stand_down(self) -> None:
        """Undo ``begin``, except for workers that were launched since."""
        for each in self.launchers:
            each.stand_down()

    # Workers come and go.

    def launch(
        self,
        contact: Contact,
        requests: Sequence[LaunchRequest],
        on_end: Callable[[str, LaunchEnd], None],
    ) -> None:
        """Start each worker with the first launcher that has room and has not just failed."""
        self._on_end = on_end
        self._take_ways(contact)
        now = time.monotonic()
        self._choice.note_requests(len(requests))
        self._choice.forgive(requests, now)
        for candidate, some in self._choice.plan(requests, now):
            if candidate is not None:
                self._launch(candidate, candidate.contact or contact, some, now)
                continue
            for each in some:
                on_end(each.launch_id, self._choice.why_not(each, self.size_name(each.size)))

    def _take_ways(self, contact: Contact) -> None:
        """Record the contacts for the launchers' workers, which are known from the first launch."""
        ways, self._ways = self._ways, []
        for each, way in zip(ways, contact.others, strict=False):
            if isinstance(way, Contact):
                each.contact = way
            elif each.usable:
                leave_out(each, str(way))

    def _launch(
        self, candidate: Candidate, contact: Contact, requests: Sequence[LaunchRequest], now: float
    ) -> None:
        instead_of = self._choice.passed_over(candidate, now)
        for each in requests:
            worker = Launched(candidate, each, now, instead_of)
            self._workers[each.launch_id] = candidate.active[each.launch_id] = worker
        candidate.launched += len(requests)
        self._watch()
        try:
            candidate.launcher.launch(contact, self._sized(candidate, requests), self._ended)
        except Exception as exc:  # third-party launchers may raise any exception
            if not isinstance(exc, CloudexecError):
                _logger.exception("internal error while %s started workers", candidate.name)
            end = LaunchEnd(str(exc) or type(exc).__name__, fatal=not may_pass(exc))
            for each in requests:
                self._ended(each.launch_id, end)

    def _sized(
        self, candidate: Candidate, requests: Sequence[LaunchRequest]
    ) -> list[LaunchRequest]:
        """Return the requests with the launcher's own number for their size."""
        size = self._choice.size_at(candidate, requests[0].size)
        assert size is not None, "the plan has only launchers with this size"
        return [replace(each, size=size) for each in requests]

    def _ended(self, launch_id: str, end: LaunchEnd) -> None:
        """Record that a worker has ended, or could not be started, and tell the executor."""
        worker = self._workers[launch_id]
        if not end.relaunched:
            worker.candidate.active.pop(launch_id, None)
            self._one_ended.set()
            end = self._judge(worker, end)
        self._on_end(launch_id, end)

    def _judge(self, worker: Launched, end: LaunchEnd) -> LaunchEnd:
        """Return the end to report to the executor, and warn the user of a new problem."""
        if worker.connected or worker.unwanted or self._closing:
            return end
        end, news = self._choice.ended(worker, end, time.monotonic())
        if news:
            _logger.warning("%s", news)
        return end

    def refused(self, launch_id: str, reason: str) -> LaunchEnd:
        """Record that the executor has refused a worker; one of the next launcher may fit."""
        worker = self._workers[launch_id]
        end = self._judge(worker, LaunchEnd(reason, fatal=True))
        worker.unwanted = True  # so that the later end of its process is not judged, too
        return end

    def _watch(self) -> None:
        """Set the timer for the time at which the first of the workers must have connected."""
        if self._alarm is not None:
            return
        awaited = [worker.asked_at for worker in self._awaited()]
        if awaited:
            left = min(awaited) + self._connect_within - time.monotonic()
            self._alarm = asyncio.get_running_loop().call_later(left, self._give_up_late)

    def _awaited(self) -> list[Launched]:
        workers = [worker for each in self._candidates for worker in each.active.values()]
        return [each for each in workers if not (each.connected or each.late or each.unwanted)]

    def _give_up_late(self) -> None:
        """Give up workers that have not connected in time, if another launcher can start some.

        If none can, the executor itself gives the workers up soon.
        """
        self._alarm = None
        since = time.monotonic() - self._connect_within
        end = LaunchEnd(f"no worker connected within {self._launch_timeout:g} s")
        given_up = []
        for worker in self._awaited():
            if worker.asked_at <= since:
                worker.late = True
                told = self._judge(worker, end)
                if told.reclaimed:
                    given_up.append(worker.request.launch_id)
                    self._on_end(worker.request.launch_id, told)
        # This comes last, as the executor would count workers as failed that end by a kill.
        self.terminate(given_up)
        self._watch()

    def terminate(self, launch_ids: Sequence[str]) -> None:
        """Terminate workers."""
        found: dict[int, tuple[Candidate, list[str]]] = {}
        for each in launch_ids:
            worker = self._workers.get(each)
            if worker is not None:
                worker.unwanted = True
                _, mine = found.setdefault(id(worker.candidate), (worker.candidate, []))
                mine.append(each)
        for candidate, some in found.values():
            candidate.launcher.terminate(some)

    def key_of(self, launch_id: str) -> bytes | None:
        """Return the key of a worker: its own, or its launcher's; ``None`` for the executor's."""
        worker = self._workers.get(launch_id)
        if worker is None:
            return None
        candidate = worker.candidate
        own = candidate.launcher.key_of(launch_id)
        return own or (candidate.network.key if candidate.network is not None else None) or None

    def launch_of(self, first: str, worker_id: str) -> str:
        """Return the launch of a worker that knows only what its platform calls it."""
        worker = self._workers.get(first)
        return first if worker is None else worker.candidate.launcher.launch_of(first, worker_id)

    def connected(self, launch_id: str, arrival: Arrival) -> None:
        """Record that a worker has connected."""
        worker = self._workers[launch_id]
        self._choice.note_connected(worker, time.monotonic())
        worker.candidate.launcher.connected(launch_id, arrival)

    def disconnected(self, launch_id: str, *, orderly: bool, reclaimed: bool) -> None:
        """Record that a worker's session has ended."""
        launcher = self._workers[launch_id].candidate.launcher
        launcher.disconnected(launch_id, orderly=orderly, reclaimed=reclaimed)

    def pid_of(self, executor_id: str, launch_id: str) -> int:
        """Return the pid of a worker that is a child of this process; 0 if it is none."""
        worker = self._workers.get(launch_id)
        return 0 if worker is None else worker.candidate.launcher.pid_of(executor_id, launch_id)

    def clean_up(self, launch_id: str, slot_groups: list[int]) -> None:
        """Kill what is left of a worker's process groups, if they are on this machine."""
        self._workers[launch_id].candidate.launcher.clean_up(launch_id, slot_groups)

    # Reports.

    def bucket(self) -> tuple[str, str]:
        """Return the first launcher's bucket, if all with workers on other machines have one."""
        found = [
            each.launcher.bucket()
            for each in self._candidates
            if each.usable and each.launcher.needs_network()
        ]
        return found[0] if found and all(name for name, _ in found) else ("", "")

    def times(self, launch_id: str) -> LaunchTimes | None:
        """Return the known times of a launch, and the name of its launcher."""
        worker = self._workers.get(launch_id)
        if worker is None:
            return None
        found = worker.candidate.launcher.times(launch_id) or LaunchTimes(launch=launch_id)
        return replace(found, launcher=worker.candidate.name, instead_of=worker.instead_of)

    def explain(self) -> str:
        """Return for each launcher why its workers have not connected."""
        now, parts = time.monotonic(), []
        for each in self._candidates:
            is_out = not each.usable or now < each.barred_until
            why = each.why if is_out else each.launcher.explain()
            if why:
                parts.append(f"{each.name}: {why}")
        return "; ".join(parts)

    def counts(self) -> Sequence[LauncherCounts]:
        """Return the counts of each launcher."""
        now = time.monotonic()
        return [each.counts(now) for each in self._candidates]

    def cost(self) -> Cost:
        """Return the sums of the costs of all launchers."""
        costs = [each.launcher.cost() for each in self._candidates if each.network is not None]
        return Cost(
            accrued_usd=sum(each.accrued_usd for each in costs),
            committed_usd=sum(each.committed_usd for each in costs),
            per_hour_usd=sum(each.per_hour_usd for each in costs),
            note=", ".join(dict.fromkeys(each.note for each in costs if each.note)),
        )

    def least_usd(self, requests: Sequence[LaunchRequest]) -> Iterable[float]:
        """Return the least that each of these workers would cost with the launcher it would have.

        A worker for which there is no launcher costs nothing.
        """
        for candidate, some in self._choice.plan(requests, time.monotonic()):
            if candidate is None:
                yield from [0.0] * len(some)
            else:
                yield from candidate.launcher.least_usd(self._sized(candidate, some))

    def fingerprint(self) -> str:
        """Return a text that differs if the workers of any launcher would differ."""
        return repr([each.fingerprint() for each in self.launchers])

    # From one process to the next, and the end.

    def hand_over(self) -> dict[str, Any]:
        """Return, as JSON data, what a later process needs to take over the workers."""
        return {
            "launchers": [
                {} if each.network is None else each.launcher.hand_over()
                for each in self._candidates
            ]
        }

    async def take_over(
        self, left: dict[str, Any], on_end: Callable[[str, LaunchEnd], None]
    ) -> Mapping[str, Survivor]:
        """Take over the workers of each launcher; a launcher for which this fails is left out."""
        self._on_end = on_end
        survivors: dict[str, Survivor] = {}
        for candidate, mine in zip(self._candidates, left.get("launchers", ()), strict=False):
            if not mine:
                continue
            if not candidate.usable:
                _logger.warning(
                    "workers that an earlier process has started with %s cannot be taken over; "
                    "they end by themselves when they find no client",
                    candidate.name,
                )
                continue
            try:
                found = await candidate.launcher.take_over(mine, self._ended)
            except Exception as exc:  # third-party launchers may raise any exception
                if not isinstance(exc, CloudexecError):
                    _logger.exception("internal error while %s took over workers", candidate.name)
                why = str(exc) or type(exc).__name__
                leave_out(candidate, f"its workers cannot be taken over: {why}")
                continue
            for launch_id, survivor in found.items():
                size = self._choice.size_from(candidate, survivor.size)
                worker = Launched(
                    candidate,
                    LaunchRequest(launch_id, 1, size),
                    time.monotonic(),
                    connected=survivor.running,
                )
                self._workers[launch_id] = candidate.active[launch_id] = worker
                survivors[launch_id] = replace(survivor, size=size)
        self._watch()
        return survivors

    async def close(self) -> None:
        """End all workers of all launchers that still run."""
        self._closing = True
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        started = [each for each in self._candidates if each.network is not None]
        try:
            for outcome in await asyncio.gather(*map(self._close, started), return_exceptions=True):
                if isinstance(outcome, Exception):
                    _logger.error("a launcher could not be closed", exc_info=outcome)
        finally:
            self._serving.release()

    async def _close(self, candidate: Candidate) -> None:
        if candidate.launcher.ends_are_seen:
            # The executor does not wait for workers that were given up. If one launcher does not
            # see the ends of its workers, the executor waits for none.
            await self._see_end(candidate)
            candidate.launcher.terminate(list(candidate.active))
            await self._see_end(candidate)
        await candidate.launcher.close()

    async def _see_end(self, candidate: Candidate) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_PATIENCE):
                while candidate.active:
                    self._one_ended.clear()
                    await self._one_ended.wait()

    def describe(self) -> str:
        """Describe in a few words the workers that this launcher starts."""
        return ", or else ".join(each.name for each in self._candidates)

    def __repr__(self) -> str:
        return f"Fallback([{', '.join(map(repr, self.launchers))}])"


def _names(launchers: Sequence[Launcher]) -> list[str]:
    """Return a name for each launcher, with a number if several have the same description."""
    described = [each.describe() for each in launchers]
    counts, seen = Counter(described), Counter[str]()
    names = []
    for name in described:
        seen[name] += 1
        names.append(f"{name} #{seen[name]}" if counts[name] > 1 else name)
    return names


def _all_modules(launchers: Sequence[Launcher]) -> bool | Sequence[str]:
    """Return the modules that are sent to workers: all that any of the launchers sends."""
    wanted = [each.modules for each in launchers if each.needs_network()]
    names: dict[str, None] = {}
    for each in wanted:
        if each is True:
            return True
        names.update(dict.fromkeys(each or ()))
    return tuple(names) or not wanted


Fallback.__module__ = "cloudexec"
