"""Workers that are asked for: how long each step took, what they cost, why they do not come."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from cloudexec._core import commands, events
from cloudexec._errors import BudgetExceededError, CloudexecError, LaunchError
from cloudexec._launchers.base import (
    Arrival,
    Contact,
    LaunchEnd,
    Launcher,
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
"""Seconds between looks at what the workers have cost, where that is limited."""
_MOST_TIMES = 50_000
"""Launches of which something is kept; the oldest are forgotten."""
_LINGER_TIMES = 8
"""How often a launcher's wait for more launches is prolonged while they still come in."""
_EXPLAIN_AFTER = 20.0
"""Seconds that work may wait for its first worker before we say why."""


class Launches:
    """The launches of one executor. On the loop thread.

    Args:
        engine: Is told what becomes of them.
        sessions: Of the workers that have come.
        futures: Of the tasks that fail for want of workers.
        launcher: Starts the workers.
        max_cost_usd: What they may cost; ``None``: there is no limit.
        on_end: What the launcher is to tell of their ends.
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
        """Those whose process has not ended."""
        self.newcomers: dict[str, float] = {}
        """Workers that have returned no result yet, and when they came."""
        self.contact: Contact | None = None
        """What workers must know to dial back, once the server listens."""
        self.on_change: Callable[[], None] = _nothing
        """Called when something was launched."""
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
        """Have a worker launched, soon."""
        if not self._wanted:
            # Not from within the machine's answer: a failure is an event of its own.
            self._engine.portal.loop.call_later(self._launcher.linger, self._launch_soon, 0, 0)
        self._wanted.append(LaunchRequest(command.launch, command.slots, command.size))
        self._asked_at[command.launch] = time.monotonic()
        _bound(self._asked_at)

    def _launch_soon(self, seen: int, times: int) -> None:
        """Launch what is wanted; where one request serves many, wait while more of it comes in."""
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
            affordable = self._launcher.affordable(wanted, ceiling)
            if affordable < len(wanted):
                self._refuse_launches(wanted[affordable:], ceiling)
                wanted = wanted[:affordable]
        assert contact is not None
        while wanted:
            # Requests of one size whose numbers follow one another go together.
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
                    self._engine.feed(events.LaunchFailed(request.launch_id, str(exc)))
        self.on_change()

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
        """Stop everything once the ceiling is reached, or nobody is left to do the work."""
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
        """Look now and then at what the workers have cost."""
        while not self._engine.is_closing:
            await asyncio.sleep(_BUDGET_CHECK)
            self._check_budget(ceiling)

    async def watch_start(self) -> None:
        """While work waits and no worker comes, say why: once for each reason."""
        engine, machine = self._engine, self._engine.machine
        while not engine.is_closing:
            await asyncio.sleep(1.0)
            launches = machine.launches
            # A few stragglers among many are no reason to worry anybody.
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
        """Say how many workers were asked for and have not come: by size, if there are several."""
        launches = self._engine.machine.launches.values()
        by_size = Counter(launch.size for launch in launches)
        words = counted(len(launches), "worker")
        if set(by_size) <= {0}:
            return words
        name = self._launcher.size_name
        each = [f"{number} of {name(size)}" for size, number in sorted(by_size.items())]
        return f"{words} ({', '.join(each)})"

    def size_name(self, size: int) -> str:
        """Say what a worker of a size has."""
        return self._launcher.size_name(size)

    def first_result(self, worker: str) -> None:
        """A worker has brought results: note it, if they are its first."""
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
        """Say of each launch where its time went, in the order they were asked for."""
        waiting = [
            self._launcher.times(launch) or LaunchTimes(launch=launch)
            for launch in self._engine.machine.launches
            if launch not in self._times
        ]
        return tuple(sorted((*self._times.values(), *waiting), key=lambda each: int(each.launch)))

    def why(self) -> str:
        """Say why workers that were asked for do not come; empty: nothing is known.

        A launcher knows nothing yet of those that it was asked for just now: then it is what it
        knew of those before, as long as none has come.
        """
        self._last_reason = self._launcher.explain() or self._last_reason
        return self._last_reason

    def fail_tasks(self, command: commands.FailTasksUnlaunched) -> None:
        """Fail tasks, as no worker could be started for them."""
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
        """Have a worker that has not come ended."""
        self.why()  # as long as the launcher knows of it
        # Those of one answer together: a launcher may end them all with one request.
        if not self._unwanted:
            self._engine.portal.loop.call_soon(self.terminate_now)
        self._unwanted.append(command.launch)
        self._given_up[command.launch] = None
        _bound(self._given_up)

    def has_given_up(self, launch: str) -> bool:
        """Whether a worker was launched and, before it came, not wanted any more."""
        return launch in self._given_up

    def terminate_now(self) -> None:
        """End those that are not wanted any more."""
        unwanted, self._unwanted = self._unwanted, []
        self._launcher.terminate(unwanted)

    def arrived(self, session: Any, arrival: Arrival, dial_in: float) -> None:
        """A worker has dialed back, and was let in after that many seconds."""
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

    def job_of(self, worker: str) -> str:
        """Return what the platform of a worker calls it, or an empty string."""
        times = self._times.get(worker.removeprefix("worker-"))
        return "" if times is None else times.job_id


def _nothing() -> None:
    """Do nothing."""


def _bound(launches: dict[str, Any]) -> None:
    """Forget the oldest, if there are too many: workers that are replaced add up."""
    if len(launches) > _MOST_TIMES:
        del launches[next(iter(launches))]
