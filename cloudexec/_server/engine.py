"""Feeds the core with events and the time, and has its commands carried out.

Every part on the loop thread that learns of an event calls ``Engine.feed``. The engine does not
know the parts that carry out commands; the driver connects them.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeAlias

from cloudexec._config import ServerConfig
from cloudexec._core.events import DeadlinePassed, Event
from cloudexec._core.machine import Machine
from cloudexec._describing import describe
from cloudexec._errors import BrokenBatchExecutor
from cloudexec._log import Log
from cloudexec._server.portal import Portal
from cloudexec._server.telling import fields

__all__ = ["Engine", "Moment"]

Moment: TypeAlias = tuple[float, float, str]
"""Seconds on the monotonic clock, seconds since 1970, and the id of the executor."""

_logger = Log()
_MOST_STALL = 2.0
"""Seconds that the core's clock advances at most between two readings. While this process was
stopped, or its main thread held the GIL, it could not hear its workers, which are not to blame."""


class Engine:
    """The core of one executor, its clock and its timer.

    Args:
        config: Settings of the core.
        portal: Runs the loop thread.
    """

    def __init__(self, config: ServerConfig, portal: Portal) -> None:
        self.machine = Machine(config)
        self.portal = portal
        self.executor_id = secrets.token_hex(8)
        self.key = secrets.token_bytes(32)
        """Secret that workers prove to know when they enrol (connect for the first time)."""
        self.clock = 0.0
        """The core's time in seconds. It stands still while this process is stopped."""
        self.moment: Moment = (time.monotonic(), time.time(), self.executor_id)
        """The time of the event that is being handled."""
        self.broken: BaseException | None = None
        """The error with which every task fails, or ``None``; ``Futures.break_down`` sets it."""
        self.is_closing = False
        """Whether the executor closes, so that no worker may connect any more."""
        self._looked_at = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._tasks: set[asyncio.Task[Any]] = set()
        self._carry_out: Mapping[type, Callable[[Any], None]] = {}
        self._notes: Mapping[type, Callable[[Any], None]] = {}
        self.settle: Callable[[], None]
        """Carries out what follows for tasks that waited for ended tasks; see ``connect``."""
        self._break_down: Callable[[BaseException], None]

    def connect(
        self,
        *,
        carry_out: Mapping[type, Callable[[Any], None]],
        notes: Mapping[type, Callable[[Any], None]],
        settle: Callable[[], None],
        break_down: Callable[[BaseException], None],
    ) -> None:
        """Set the functions that carry out commands; called once, before the first event.

        Args:
            carry_out: The function that carries out a command, by the command's type.
            notes: The function that notes a fact, by the fact's type. It is called before any
                command is carried out.
            settle: Called after each event, and whenever a task ends outside of an event. It
                releases the tasks that waited for the ended one.
            break_down: Fails all tasks, after an internal error.
        """
        self._carry_out = carry_out
        self._notes = notes
        self.settle = settle
        self._break_down = break_down

    def adopt_identity(self, executor_id: str, key: bytes) -> None:
        """Take the place of an executor whose process was killed; called before the start.

        Args:
            executor_id: That executor's id.
            key: The secret that its workers know.
        """
        self.executor_id, self.key = executor_id, key
        self.now()

    def now(self) -> Moment:
        """Read the clocks, and remember the time as ``moment``."""
        self.moment = (time.monotonic(), time.time(), self.executor_id)
        return self.moment

    def fields(self, event: str, **details: Any) -> dict[str, object]:
        """Return the ``extra=`` of a log record."""
        return fields(event, self.executor_id, **details)

    def start_clock(self) -> None:
        """Begin to count the core's time, so that the time of the start does not count."""
        self._looked_at = time.monotonic()

    def feed(self, event: Event) -> None:
        """Let the core handle an event, and carry out its commands."""
        now = self.now()[0]
        self.clock += min(now - self._looked_at, _MOST_STALL)
        self._looked_at = now
        try:
            answer = self.machine.handle(event, self.clock)
            # Facts come first, as a user who learns of an outcome may ask explain() at once.
            for fact in self.machine.take_facts():
                self._notes[type(fact)](fact)
            for command in answer:
                self._carry_out[type(command)](command)
        except BaseException as exc:
            # A bug in cloudexec. All futures fail, so that nobody waits forever.
            if self.broken is not None:
                raise
            _logger.exception("internal error while handling %s", type(event).__name__)
            error = BrokenBatchExecutor(f"internal error ({describe(exc)})")
            error.__cause__ = exc
            self._break_down(error)
        deadline = self.machine.next_deadline()
        if deadline is not None and (self._timer is None or deadline < self._timer_at):
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = deadline
            self._set_timer()
        self.settle()

    def _set_timer(self) -> None:
        # At most a second, because the core's clock may fall behind while this process stalls.
        pause = min(max(self._timer_at - self.clock, 0.001), 1.0)
        self._timer = self.portal.loop.call_later(pause, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        now = time.monotonic()
        if self.is_closing:
            return
        if self.clock + min(now - self._looked_at, _MOST_STALL) >= self._timer_at:
            self.feed(DeadlinePassed())
        else:
            self.clock += min(now - self._looked_at, _MOST_STALL)
            self._looked_at = now
            self._set_timer()

    def create_task(self, work: Coroutine[Any, Any, object]) -> None:
        """Run a coroutine in the background until the executor ends."""
        task = self.portal.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def stop(self) -> None:
        """Cancel the timer and all background tasks except the one that calls this."""
        for task in list(self._tasks - {asyncio.current_task()}):
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
