"""Whether what a task raised is worth another attempt: ``retry_on`` looks at the exception.

That unpickles it, and may call a function of the user's: not on the thread that serves the network.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from cloudexec._forked import OwnThread, end_if_forked
from cloudexec._log import Log

__all__ = ["Judge"]

_logger = Log()


class Judge:
    """A thread that looks at exceptions, one at a time; started with the first task that has need.

    Args:
        post: Calls something on the loop thread; raises RuntimeError once that is gone.
    """

    def __init__(self, post: Callable[..., object]) -> None:
        self._post = post
        self._queue: queue.SimpleQueue[tuple[Any, ...] | None] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def prepare(self) -> None:
        """Have the thread; any thread may ask. When it is needed it may be too late: at the
        interpreter's end none can be started."""
        if self._thread is None:
            with self._starting:
                if self._thread is None:
                    thread = OwnThread(self._run, "cloudexec-retries")
                    thread.start()
                    self._thread = thread

    def ask(
        self,
        retry_on: Any,
        error: Callable[[], BaseException],
        verdict: Callable[[bool], object],
    ) -> None:
        """Have an exception looked at.

        Args:
            retry_on: Types of exceptions, or a function.
            error: Makes the exception; called in the thread.
            verdict: Called on the loop thread.
        """
        self._queue.put((retry_on, error, verdict))

    def _run(self) -> None:
        while (asked := self._queue.get()) is not None:
            retry_on, error, verdict = asked
            again = _is_worth_it(retry_on, error)
            try:
                self._post(verdict, again)
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
        # Whatever it is, it must not end this thread: others wait for it.
        _logger.log_exception("retry_on failed: the task is not run again", exc=why)
        return False
