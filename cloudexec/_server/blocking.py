"""Threads for what blocks (looking up names, reading files), that serve until the very end."""

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
    """The default executor of the portal's loop; asyncio insists on this base class.

    The base's own threads end, and it takes nothing more, once the main thread has ended; and from
    Python 3.12 on none can be started then. But what was submitted by then is still to be run, and
    that may take a new connection to AWS. So these start at once, and are daemons.
    """

    def __init__(self) -> None:
        # Not the base's: it would register threads of its own.
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._own = [
            threading.Thread(target=self._serve, name=f"cloudexec-blocking-{number}", daemon=True)
            for number in range(_COUNT)
        ]
        for thread in self._own:
            thread.start()

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> Future[T]:
        """Have one of the threads make a call."""
        future: Future[T] = Future()
        self._calls.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the threads once they have made the calls that are queued."""
        own, self._own = self._own, []
        for _ in own:
            self._calls.put(None)
        if wait:
            for thread in own:
                # One that the system keeps waiting for a name does not keep us.
                thread.join(_JOIN_TIMEOUT)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            future, work = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except BaseException as exc:
                future.set_exception(exc)
            else:
                future.set_result(result)
            del call, future, work
