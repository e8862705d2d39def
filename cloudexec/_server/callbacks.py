"""A thread that runs the callbacks of futures, so that a slow callback does not block the loop."""

from __future__ import annotations

import queue
import threading
from typing import Any

from cloudexec._forked import OwnThread
from cloudexec._future import BatchFuture

__all__ = ["CallbackThread"]


class CallbackThread:
    """Runs one callback at a time, in the order in which tasks finish."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[BatchFuture[Any] | None] = queue.SimpleQueue()
        # Started now, because no thread can be started while the interpreter ends.
        self._thread = OwnThread(self._run, "cloudexec-callbacks")
        self._thread.start()

    def put(self, future: BatchFuture[Any]) -> None:
        """Run the callbacks of a future that is done."""
        self._queue.put(future)

    def _run(self) -> None:
        while (future := self._queue.get()) is not None:
            future._invoke_callbacks(in_thread_of_ours=True)
            del future

    def stop(self) -> None:
        """End the thread after all callbacks that were put."""
        self._queue.put(None)

    def join(self) -> None:
        """Wait until the thread has ended, unless a callback, in this thread, calls this."""
        if self._thread is not threading.current_thread():
            self._thread.join()
