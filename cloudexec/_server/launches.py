"""Asks the launcher for workers, and follows them until they connect.

Here is also what is known of each launch: how long each step took, what the workers cost, and why a
worker does not connect. The limit ``max_cost_usd`` is enforced here.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from cloudexec._core import commands, events
from cloudexec._errors import BudgetExceededError, CloudexecError, LaunchError
from cloudexec._launchers.base import (
    Arrival,
    Contact,
    LaunchEnd,
    Launcher,
    LauncherCounts,
    LaunchRequest,
    LaunchTimes,
)
from cloudexec._log import Log
from cloudexec._server.engine import Engine
from cloudexec._server.futures import Futures
from cloudexec._server.outcomes import counted
from cloudexec._server.sessions import Sessions

__all__ = ["Launches"]

_logger = Log()
_BUDGET_CHECK = 1.0
"""Seconds between two checks of the cost against ``max_cost_usd``."""
_MOST_TIMES = 50_000
"""Number of launches whose times are kept; the oldest are dropped."""
_LINGER_TIMES = 8
"""How often the wait for further launches is prolonged while more of them are requested."""
_EXPLAIN_AFTER = 20.0
"""Seconds that tasks may wait for a worker before a warning says why."""


class Launches:
    """The launches of one executor. Used on the loop thread only.

    Args:
        engine: The executor's engine, which is told of launches that fail.
        sessions: The sessions of connected workers.
        futures: The futures of the tasks that fail if no worker can be started.
        launcher: Starts the workers.
        max_cost_usd: Limit of the workers' cost in US dollars; ``None`` for no limit.
        on_end: Called by the launcher with a launch and how its process ended.
    """

    def __init__(
        self,
        engine: Engine,
        sessions: Sessions,
        futures: Futures,
        launcher: Launcher,
        max_cost_usd: float | None,
        on_end: Callable[[str, LaunchEnd], None],
    ) -> None:
        self.running: set[str] = set()
        """Launches whose process is not known to have ended."""
        self.newcomers: dict[str, float] = {}
        """Workers that have returned no result yet, and the time when they connected."""
        self.contact: Contact | None = None
        """What workers must know to connect; it is set once the server listens."""
        self.on_change: Callable[[], None] = _nothing
        """Called after workers were launched."""
        self._engine = engine
        self._sessions = sessions
        self._futures = futures
        self._launcher = launcher
        self._max_cost_usd = max_cost_usd
        self._on_end = on_end
        self._wanted: list[LaunchRequest] = []
        self._unwanted: list[str] = []
        self._times: dict[str, LaunchTimes] = {}
        self._asked_at: dict[str, float] = {}
        self._given_up: dict[str, None] = {}
        self._explained = ""
        self._last_reason = ""

    def ask(self, command: commands.LaunchWorker) -> None:
        """Launch a worker after ``linger`` seconds, together with others that are asked for."""
        if not self._wanted:
            # Not at once: the core's commands are being carried out, and a launch that fails is a
            # new event for the core.
            self._engine.portal.loop.call_later(self._launcher.linger, self._launch_soon, 0, 0)
        self._wanted.append(LaunchRequest(command.launch, command.slots, command.size))
        self._asked_at[command.launch] = time.monotonic()
        _bound(self._asked_at)

    def _launch_soon(self, seen: int, times: int) -> None:
        """Launch the requested workers, or wait once more while further requests come in."""
        count, linger = len(self._wanted), self._launcher.linger
        if linger and seen < count > 1 and times < _LINGER_TIMES:
            self._engine.portal.loop.call_later(linger, self._launch_soon, count, times + 1)
        else:
            self._launch_now()

    def _launch_now(self) -> None:
        launches, contact = self._engine.machine.launches, self.contact
        wanted = [request for request in self._wanted if request.launch_id in launches]
        self._wanted.clear()
        ceiling = self._max_cost_usd
        if wanted and ceiling is not None:
            affordable = self._affordable(wanted, ceiling)
            if affordable < len(wanted):
                self._refuse_launches(wanted[affordable:], ceiling)
                wanted = wanted[:affordable]
        assert contact is not None
        while wanted:
            # Workers of one size with consecutive numbers are launched by one call.
            first = wanted[0]
            count = 1
            while count < len(wanted) and wanted[count] == LaunchRequest(
                str(int(first.launch_id) + count), first.slots, first.size
            ):
                count += 1
            together, wanted = wanted[:count], wanted[count:]
            self.running.update(request.launch_id for request in together)
            try:
                self._launcher.launch(contact, together, self._on_end)
            except CloudexecError as exc:
                for request in together:
                    self.running.discard(request.launch_id)
                    self._engine.feed(events.ProcessEnded(request.launch_id, str(exc)))
        self.on_change()

    def _affordable(self, wanted: list[LaunchRequest], ceiling: float) -> int:
        """Return how many of the wanted workers, the first ones, cost no more than the limit."""
        cost = self._launcher.cost()
        left = ceiling - cost.accrued_usd - cost.committed_usd
        count = 0
        for least in self._launcher.least_usd(wanted):
            left -= least
            if left < 0:
                break
            count += 1
        return count

    def _refuse_launches(self, refused: list[LaunchRequest], ceiling: float) -> None:
        _logger.warning(
            "max_cost_usd=%g: %s not launched, and none will be from now on; what runs goes on",
            ceiling,
            counted(len(refused), "worker"),
            extra=self._engine.fields(
                "launches_refused", reason="max_cost_usd", count=len(refused)
            ),
        )
        self._engine.feed(events.LaunchesRefused([request.launch_id for request in refused]))
        self._check_budget(ceiling)

    def _check_budget(self, ceiling: float) -> None:
        """Fail all tasks if the limit is reached, or if no worker is left and none may start."""
        engine, machine = self._engine, self._engine.machine
        if engine.broken is not None or machine.finished:
            return
        cost = self._launcher.cost()
        at_end = cost.accrued_usd + cost.committed_usd >= ceiling and bool(self.running)
        alone = machine.refusing and not machine.workers and not machine.launches
        if at_end or (alone and machine.open_tasks):
            self._futures.break_down(
                BudgetExceededError(
                    f"the workers have cost about ${cost.accrued_usd:.4f}, and going on would "
                    f"exceed max_cost_usd=${ceiling:g}; they were stopped. Raise the ceiling, or "
                    f"use fewer or smaller workers",
                    cost_usd=cost.accrued_usd,
                    max_cost_usd=ceiling,
                )
            )

    async def watch_cost(self, ceiling: float) -> None:
        """Check the cost every second until the executor closes."""
        while not self._engine.is_closing:
            await asyncio.sleep(_BUDGET_CHECK)
            self._check_budget(ceiling)

    async def watch_start(self) -> None:
        """Log why no worker connects while tasks wait, once for each reason."""
        engine, machine = self._engine, self._engine.machine
        while not engine.is_closing:
            await asyncio.sleep(1.0)
            launches = machine.launches
            # If most workers are connected, the few that are not need no warning.
            few = len(launches) * 10 < len(machine.workers)
            if not launches or not machine.waiting or few:
                continue
            oldest = min(launch.started_at for launch in launches.values())
            waited = engine.clock - oldest
            limit = machine.config.scaling.launch_timeout
            if waited < min(_EXPLAIN_AFTER, limit / 3):
                continue
            why = self._launcher.explain()
            if why and why != self._explained:
                self._explained = why
                _logger.warning(
                    "%s waiting, since %.0f s for %s: %s",
                    counted(machine.waiting, "task"),
                    waited,
                    self.in_words(),
                    why,
                    extra=engine.fields("launch_waits", reason=why, count=len(launches)),
                )

    def in_words(self) -> str:
        """Return, in words, how many launched workers have not connected, by size if needed."""
        launches = self._engine.machine.launches.values()
        by_size = Counter(launch.size for launch in launches)
        words = counted(len(launches), "worker")
        if set(by_size) <= {0}:
            return words
        name = self._launcher.size_name
        each = [f"{number} of {name(size)}" for size, number in sorted(by_size.items())]
        return f"{words} ({', '.join(each)})"

    def size_name(self, size: int) -> str:
        """Return, in words, the CPUs, memory and GPUs of a worker of a size."""
        return self._launcher.size_name(size)

    def first_result(self, worker: str) -> None:
        """Note the time of a worker's first result; further results change nothing."""
        came_at = self.newcomers.pop(worker, None)
        if came_at is None:
            return
        since = time.monotonic() - came_at
        session = self._sessions.get(worker)
        if session is not None and session.identity in self._times:
            times = self._times[session.identity]
            total = (times.total or 0.0) + since
            self._times[session.identity] = replace(times, first_task=since, total=total)

    def times(self) -> tuple[LaunchTimes, ...]:
        """Return the times of all launches, in the order in which they were asked for."""
        waiting = [
            self._launcher.times(launch) or LaunchTimes(launch=launch)
            for launch in self._engine.machine.launches
            if launch not in self._times
        ]
        return tuple(sorted((*self._times.values(), *waiting), key=lambda each: int(each.launch)))

    def counts(self) -> Sequence[LauncherCounts]:
        """Return what each launcher of a ``Fallback`` has done."""
        return self._launcher.counts()

    def why(self) -> str:
        """Return why launched workers do not connect; empty if the reason is not known.

        A launcher knows no reason for a launch that has just begun. The answer is then the reason
        of earlier launches, unless a worker has connected since.
        """
        self._last_reason = self._launcher.explain() or self._last_reason
        return self._last_reason

    def fail_tasks(self, command: commands.FailTasksUnlaunched) -> None:
        """Fail tasks with LaunchError, because no worker could be started for them."""
        request_of = self._engine.machine.request_of
        sizes = sorted({request_of(task).size for task in command.tasks})
        what = self._launcher.describe()
        if sizes != [0]:
            what += f"; wanted: {' or '.join(map(self._launcher.size_name, sizes))}"
        error_text = f"no worker could be started ({what}): {command.reason}"
        why = self.why()
        if why and why not in error_text:
            error_text += f"\n{why}"
        for task in command.tasks:
            error = LaunchError(error_text, reason=why or command.reason)
            self._futures.set_exception(task, error)

    def withdraw(self, command: commands.TerminateLaunch) -> None:
        """Terminate a launched worker that is not wanted, or that does not end by itself."""
        self.why()  # remember the reason while the launcher still knows this launch
        # Collected until the loop's next round: a launcher may end many workers by one request.
        if not self._unwanted:
            self._engine.portal.loop.call_soon(self.terminate_now)
        self._unwanted.append(command.launch)
        self._given_up[command.launch] = None
        _bound(self._given_up)

    def has_given_up(self, launch: str) -> bool:
        """Say whether a launched worker was terminated or is going to be."""
        return launch in self._given_up

    def terminate_now(self) -> None:
        """Terminate the launches that are to end."""
        unwanted, self._unwanted = self._unwanted, []
        self._launcher.terminate(unwanted)

    def arrived(self, session: Any, arrival: Arrival, dial_in: float) -> None:
        """Note that a worker has connected, and how long each step took.

        Args:
            session: The worker's session.
            arrival: What the worker says of its own start.
            dial_in: Seconds that its enrolment took.
        """
        self._last_reason = ""
        launch, now = session.identity, time.monotonic()
        total = now - self._asked_at.pop(launch, now)
        times = self._launcher.times(launch) or LaunchTimes(launch=launch)
        known = (times.api or 0.0) + (arrival.pull or 0.0) + (arrival.boot or 0.0) + dial_in
        self._times[launch] = replace(
            times,
            worker_id=session.worker_id,
            job_id=arrival.job_id,
            place=max(0.0, total - known),
            pull=arrival.pull,
            boot=arrival.boot,
            dial_in=dial_in,
            total=total,
        )
        self.newcomers[session.worker_id] = now
        _bound(self._times)

    def times_of(self, worker: str) -> LaunchTimes:
        """Return what is known of how a worker was launched, such as its job and its launcher."""
        launch = worker.removeprefix("worker-")
        return self._times.get(launch) or LaunchTimes(launch=launch)


def _nothing() -> None:
    """Do nothing."""


def _bound(launches: dict[str, Any]) -> None:
    """Drop the oldest entry if there are too many: an executor may replace workers for weeks."""
    if len(launches) > _MOST_TIMES:
        del launches[next(iter(launches))]
