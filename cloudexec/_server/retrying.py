"""Asks ``retry_on`` whether a task that raised an exception is tried again.

This unpickles the exception, and may call a function of the user's. So it happens in a thread of
its own, not on the loop thread.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from cloudexec import _payload
from cloudexec._core import commands, events
from cloudexec._describing import describe
from cloudexec._forked import OwnThread, end_if_forked
from cloudexec._log import Log
from cloudexec._server.engine import Engine
from cloudexec._server.outcomes import error_of

__all__ = ["RetryPredicate"]

_logger = Log()


class RetryPredicate:
    """Applies ``retry_on`` to exceptions, one after the other, in a thread of its own.

    Args:
        engine: Is told of each decision.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._queue: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def prepare(self) -> None:
        """Start the thread, if it does not run yet. Any thread may call this.

        It is started early, because no thread can be started while the interpreter ends.
        """
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    thread = OwnThread(self._run, "cloudexec-retries")
                    thread.start()
                    self._thread = thread

    def judge(self, command: commands.JudgeFailure) -> None:
        """Put a task's exception into the thread's queue."""
        worker, failure = command.worker, command.failure
        task: Any = command.task
        raised = ""

        def error() -> BaseException:
            nonlocal raised
            payload = failure.detail.payload
            exc: BaseException
            exc = _payload.loads_exception(payload) if payload else error_of(worker, task, failure)
            raised = describe(exc).partition("\n")[0]
            return exc

        def verdict(again: bool) -> None:
            self._engine.feed(events.FailureJudged(worker, task, failure, again, raised))

        assert task.requirements is not None
        self._queue.put((task.requirements.options.retry_on, error, verdict))

    def _run(self) -> None:
        while (asked := self._queue.get()) is not None:
            retry_on, error, verdict = asked
            again = _is_worth_it(retry_on, error)
            try:
                self._engine.portal.post(verdict, again)
            except RuntimeError:
                pass  # the loop has closed
            del asked, retry_on, error, verdict

    def stop(self) -> None:
        """End the thread."""
        self._queue.put(None)

    def join(self) -> None:
        """Wait for the thread, after ``stop``."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


def _is_worth_it(retry_on: Any, error: Callable[[], BaseException]) -> bool:
    try:
        exc = error()
        if isinstance(retry_on, tuple):
            return issubclass(type(exc), retry_on)
        verdict = bool(retry_on(exc))
        end_if_forked()
        return verdict
    except BaseException as why:
        end_if_forked(why)
        # No exception may end this thread, as other tasks wait for it.
        _logger.log_exception("retry_on failed: the task is not run again", exc=why)
        return False
