"""The engine's clock: durations of state changes, and a thread for delayed actions."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Timers", "Timing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Durations of state changes, in seconds."""

    step: float
    """Time from each state to the next, if the job need not wait for anything."""
    grace: float
    """Time from SIGTERM to SIGKILL."""
    speed: float
    """Seconds of AWS per real second, for attempt timeouts and queue time limits."""
    boot: float = 0.0
    """Time until a new EC2 instance runs jobs."""
    launch_rate: tuple[int, float] | None = None
    """Tasks that Fargate starts at once, and per second after that, for each kind of capacity."""


class Timers:
    """Calls delayed actions, under the lock, in a thread of its own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.closing = False
        self._changed = threading.Condition(self.lock)
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run, name="fake-aws-engine", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Start no more actions; :meth:`join` waits for the present one."""
        with self.lock:
            self.closing = True
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the end of the thread."""
        self._thread.join()

    def later(self, seconds: float, action: Callable[[], None]) -> None:
        """Call ``action`` after so many seconds."""
        with self.lock:
            due = time.monotonic() + seconds
            heapq.heappush(self._timers, (due, next(self._numbers), action))
            self._changed.notify_all()

    def _run(self) -> None:
        with self.lock:
            while not self.closing:
                now = time.monotonic()
                if self._timers and self._timers[0][0] <= now:
                    self._carry_out(heapq.heappop(self._timers)[2])
                    continue
                self._changed.wait(self._timers[0][0] - now if self._timers else None)

    @staticmethod
    def _carry_out(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as exc:
            # The error is shown like that of any thread, but other jobs' actions go on.
            kind, trace = type(exc), exc.__traceback__
            threading.excepthook(
                threading.ExceptHookArgs((kind, exc, trace, threading.current_thread()))
            )
