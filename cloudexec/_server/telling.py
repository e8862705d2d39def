"""Logs events of kinds that are rare, but may come a thousand times at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from cloudexec._log import Log

__all__ = ["Teller", "fields"]

_logger = Log()
_WINDOW = 10.0
"""Seconds in which at most ``_MOST`` records of one kind are logged; further ones are counted."""
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
    """Return the ``extra=`` of a log record, with all fields that users may rely on."""
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
    """Logs events to the logger ``cloudexec``, and summarises kinds that come in floods.

    Args:
        executor_id: Returns the executor's id for the records.
        loop: The event loop on which this is used.
    """

    def __init__(self, executor_id: Callable[[], str], loop: asyncio.AbstractEventLoop) -> None:
        self._executor_id = executor_id
        self._loop = loop
        self._told: dict[str, int] = {}
        self._kept_back: dict[str, tuple[int, int]] = {}  # by kind: highest level, and number
        self._timer: asyncio.TimerHandle | None = None

    def tell(self, level: int, event: str, message: str, **details: Any) -> None:
        """Log an event, or only count it if many of its kind were logged in the last seconds.

        Args:
            level: The level, as in ``logging``.
            event: The kind of the event, which becomes the field ``cloudexec_event``.
            message: The message for people.
            details: The other arguments of ``fields``.
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
        """Log how many events were only counted, and stop the timer until the next event."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._told.clear()
        kept_back, self._kept_back = self._kept_back, {}
        for event, (level, count) in kept_back.items():
            words = event.replace("_", " ")
            extra = fields(event, self._executor_id(), count=count, reason="summed up")
            _logger.log(level, "and %d more: %s", count, words, extra=extra)
