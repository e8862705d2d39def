"""Limits the calls that are submitted and not done: at the limit, ``submit()`` waits or raises."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cloudexec._config import check_count, format_bytes, parse_bytes
from cloudexec._errors import ConfigError, QueueFullError
from cloudexec._log import Log

if TYPE_CHECKING:
    from cloudexec._server.submission import Submission

__all__ = ["PendingBudget", "pending_budget"]

_logger = Log()
_LOOK = 0.5
"""Seconds after which a waiting ``submit()`` checks the executor's state again."""
_LONG = 30.0
"""Seconds of waiting after which a message is logged."""
_ROOM = 0.9
"""Share of a limit: waiting threads are woken below this, so that not each task wakes them."""


def pending_budget(
    max_bytes: int | str | None, max_tasks: int | None, when_full: str
) -> PendingBudget | None:
    """Make the budget of an executor's settings; ``None`` if these set no limit.

    Raises:
        ConfigError: If a setting is out of its range.
    """
    if when_full not in ("block", "raise"):
        raise ConfigError(f"when_full must be 'block' or 'raise', not {when_full!r}")
    if isinstance(max_bytes, str):
        try:
            max_bytes = parse_bytes(max_bytes)
        except ConfigError:
            raise ConfigError(
                f"max_pending_bytes must be like '2GiB' or '512MiB', not {max_bytes!r}"
            ) from None
    if max_bytes is not None:
        check_count("max_pending_bytes", max_bytes, least=1)
    if max_tasks is not None:
        check_count("max_pending_tasks", max_tasks, least=1)
    if max_bytes is None and max_tasks is None:
        return None
    return PendingBudget(max_bytes, max_tasks, block=when_full == "block")


class PendingBudget:
    """Counts the tasks that are submitted and not done, and their bytes. Any thread may use it.

    A task's pickled arguments count until its future is done, because until then the task may have
    to be sent again. Large pieces of arguments do not count: they are blobs, which
    ``ObjectOptions`` limits.

    Args:
        max_bytes: Limit of the bytes of pickled arguments; ``None`` for no limit.
        max_tasks: Limit of the number of tasks; ``None`` for no limit.
        block: Whether ``take`` waits at the limit. If not, it raises.
    """

    def __init__(self, max_bytes: int | None, max_tasks: int | None, *, block: bool) -> None:
        self.bytes = 0
        self.tasks = 0
        self._max_bytes = max_bytes
        self._max_tasks = max_tasks
        self._block = block
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._waiting = 0

    def try_take(self, task: Submission) -> bool:
        """Count a task if the limit allows it, and say so; a single task is always allowed."""
        size = _size_of(task.payload)
        with self._lock:
            return self._take(task, size)

    def take(
        self,
        task: Submission,
        executor_id: str,
        is_busy: Callable[[], bool],
        check_open: Callable[[], object],
    ) -> None:
        """Count a task, and wait before until the limit allows it.

        Args:
            task: The task, which has not been posted to the loop yet.
            executor_id: The executor's id, for the log.
            is_busy: Says whether the executor has tasks that it can run.
            check_open: Raises if the executor accepts no more tasks.

        Raises:
            QueueFullError: If the limit is reached, and ``block`` is false.
            RuntimeError: If the executor is shut down meanwhile.
            BrokenBatchExecutor: If the executor breaks meanwhile.
        """
        size = _size_of(task.payload)
        since, mentioned = time.monotonic(), False
        with self._lock:
            while not self._take(task, size):
                if not self._block:
                    raise self._full(size)
                # The executor's own threads must not wait here: they run callbacks and retry_on,
                # and other tasks may end only after these.
                if threading.current_thread().name.startswith("cloudexec"):
                    self._count(task, size)
                    return
                self._waiting += 1
                try:
                    woken = self._freed.wait(_LOOK)
                finally:
                    self._waiting -= 1
                check_open()
                if not (woken or is_busy()):
                    # All pending tasks wait for futures, and the caller may be the one that is
                    # going to complete these: waiting here could be a deadlock.
                    self._count(task, size)
                    return
                if not mentioned and time.monotonic() - since > _LONG:
                    mentioned = True
                    self._mention(executor_id)

    def give(self, task: Any) -> None:
        """Stop counting a task that is done, or was not posted. Repeated calls do nothing."""
        size = getattr(task, "charge", None)
        if size is None:
            return
        with self._lock:
            task.charge = None
            self.bytes -= size
            self.tasks -= 1
            if self._waiting and self._has_room():
                self._freed.notify_all()

    def wake(self) -> None:
        """Have waiting threads check whether the executor still accepts tasks."""
        with self._lock:
            self._freed.notify_all()

    def _take(self, task: Submission, size: int) -> bool:
        most_bytes, most_tasks = self._max_bytes, self._max_tasks
        if self.tasks and (
            (most_bytes is not None and self.bytes + size > most_bytes)
            or (most_tasks is not None and self.tasks >= most_tasks)
        ):
            return False
        self._count(task, size)
        return True

    def _count(self, task: Submission, size: int) -> None:
        task.charge = size
        self.bytes += size
        self.tasks += 1

    def _has_room(self) -> bool:
        most_bytes, most_tasks = self._max_bytes, self._max_tasks
        return (most_bytes is None or self.bytes <= most_bytes * _ROOM) and (
            most_tasks is None or self.tasks <= int(most_tasks * _ROOM)
        )

    def _mention(self, executor_id: str) -> None:
        from cloudexec._server.telling import fields

        _logger.info(
            "submit() has waited %.0f s for room: %s",
            _LONG,
            self._state(),
            extra=fields("submit_blocked", executor_id, reason=self._state()),
        )

    def _state(self) -> str:
        parts = []
        if self._max_tasks is not None:
            plural = "s" * (self.tasks != 1)
            parts.append(f"{self.tasks} task{plural} (max_pending_tasks={self._max_tasks})")
        if self._max_bytes is not None:
            parts.append(
                f"{format_bytes(self.bytes)} of arguments (max_pending_bytes="
                f"{format_bytes(self._max_bytes)!r})"
            )
        return f"{' and '.join(parts)} are submitted and not done"

    def _full(self, size: int) -> QueueFullError:
        return QueueFullError(
            f"no more can be submitted now: {self._state()}, and this call has "
            f"{format_bytes(size)} more. Take results before submitting more, use "
            f"map(buffersize=...), pass large arguments that many calls share as "
            f"executor.put(value), raise the limit, or wait with when_full='block'",
            pending_tasks=self.tasks,
            max_pending_tasks=self._max_tasks,
            pending_bytes=self.bytes,
            max_pending_bytes=self._max_bytes,
            size_bytes=size,
        )


def _size_of(payload: Any) -> int:
    """Return the bytes of a payload without its blobs."""
    if type(payload) is bytes:
        return len(payload)
    from cloudexec._records import Composed
    from cloudexec._server.splicing import Spliced

    if isinstance(payload, Spliced):
        return _size_of(payload.call)  # its other parts are results, which stay in memory anyway
    return len(payload.head) if isinstance(payload, Composed) else 0
