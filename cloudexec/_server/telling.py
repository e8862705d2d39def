"""Logging of what happens seldom, and may happen a thousand times at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from cloudexec._log import Log

__all__ = ["Teller", "fields"]

_logger = Log()
_WINDOW = 10.0
"""Seconds in which no more than ``_MOST`` records of one kind are logged; the rest is counted."""
_MOST = 20


def fields(
    event: str,
    executor: str,
    *,
    task: int | None = None,
    task_name: str = "",
    worker: str = "",
    job: str = "",
    attempt: int | None = None,
    reason: str = "",
    count: int = 1,
) -> dict[str, object]:
    """Return the ``extra=`` of a log record, every field under its lasting name."""
    return {
        "cloudexec_event": event,
        "cloudexec_executor": executor,
        "cloudexec_task": task,
        "cloudexec_task_name": task_name,
        "cloudexec_worker": worker,
        "cloudexec_job": job,
        "cloudexec_attempt": attempt,
        "cloudexec_reason": reason,
        "cloudexec_count": count,
    }


class Teller:
    """Logs events to the logger ``cloudexec``; those that come in floods, in sum.

    Args:
        executor_id: Returns the id that records carry.
        loop: On which it is used.
    """

    def __init__(self, executor_id: Callable[[], str], loop: asyncio.AbstractEventLoop) -> None:
        self._executor_id = executor_id
        self._loop = loop
        self._told: dict[str, int] = {}
        self._kept_back: dict[str, tuple[int, int]] = {}  # level, how many
        self._timer: asyncio.TimerHandle | None = None

    def tell(self, level: int, event: str, message: str, **details: Any) -> None:
        """Log something, or count it if there was much of its kind in the last seconds.

        Args:
            level: Of ``logging``.
            event: Of what kind it is.
            message: For people.
            details: As of ``fields``.
        """
        if not _logger.isEnabledFor(level):
            return
        if self._timer is None:
            self._timer = self._loop.call_later(_WINDOW, self._next_window)
        told = self._told[event] = self._told.get(event, 0) + 1
        if told > _MOST:
            highest, count = self._kept_back.get(event, (level, 0))
            self._kept_back[event] = max(highest, level), count + 1
            return
        _logger.log(level, "%s", message, extra=fields(event, self._executor_id(), **details))

    def _next_window(self) -> None:
        self._timer = None
        self.sum_up()

    def sum_up(self) -> None:
        """Log how many were only counted; also the end of this, until there is more to tell."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._told.clear()
        kept_back, self._kept_back = self._kept_back, {}
        for event, (level, count) in kept_back.items():
            words = event.replace("_", " ")
            extra = fields(event, self._executor_id(), count=count, reason="summed up")
            _logger.log(level, "and %d more: %s", count, words, extra=extra)
