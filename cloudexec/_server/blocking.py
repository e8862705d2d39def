"""Threads for calls that block, such as name look-ups, which work until the process ends."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any, TypeVar

__all__ = ["BlockingThreads"]

T = TypeVar("T")
_COUNT = 4
_JOIN_TIMEOUT = 1.0


class BlockingThreads(ThreadPoolExecutor):
    """The default executor of the portal's loop. asyncio requires a ThreadPoolExecutor.

    When the main thread has ended, the base class ends its threads and accepts no more calls, and
    some versions of Python start no thread any more. Tasks that were submitted before must still
    run, and that may need a new connection to AWS, or a thread that copies a large result. So these
    threads start at once, and are daemons.
    """

    def __init__(self) -> None:
        # The base class's __init__ is not called: it would register threads of its own.
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._own = [
            threading.Thread(target=self._serve, name=f"cloudexec-blocking-{number}", daemon=True)
            for number in range(_COUNT)
        ]
        for thread in self._own:
            thread.start()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Call ``fn`` in one of the threads."""
        future: Future[T] = Future()
        self._calls.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads after all queued calls."""
        own, self._own = self._own, []
        for _ in own:
            self._calls.put(None)
        if wait:
            for thread in own:
                # The time is bounded, as a thread may hang in a name look-up.
                thread.join(_JOIN_TIMEOUT)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            _carry_out(*call)
            del call  # while the thread waits for the next one, it must keep nothing alive


def _carry_out(future: Future[Any], work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as exc:
        future.set_exception(exc)
        # The exception's traceback has this frame, which must keep nothing alive either.
        del future, work
    else:
        future.set_result(result)
