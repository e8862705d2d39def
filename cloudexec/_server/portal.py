"""Runs the event loop of all executors of this process in a thread, and passes calls to it."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from cloudexec._forked import OwnThread
from cloudexec._log import Log
from cloudexec._server.blocking import BlockingThreads

__all__ = ["Portal"]

T = TypeVar("T")
_logger = Log()


class Portal:
    """A daemon thread that runs an event loop as long as an executor uses it."""

    _current: Portal | None = None
    _ending: OwnThread | None = None
    _lock = threading.Lock()

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._users = 0
        self._stopped = False
        self._closed = False
        self._closing = threading.Lock()
        self._blocking = BlockingThreads()
        self.loop.set_default_executor(self._blocking)
        self._tasks: set[asyncio.Task[Any]] = set()
        self.thread = OwnThread(self._run, "cloudexec")
        self.thread.start()

    @classmethod
    def acquire(cls) -> Portal:
        """Return the process's portal, and start it if needed; ``release`` must follow."""
        with cls._lock:
            portal = cls._current
            if portal is None or not portal.thread.is_alive():
                portal = cls._current = Portal()
            portal._users += 1
            return portal

    def release(self) -> None:
        """Give the portal back; the last ``release`` stops the loop."""
        with Portal._lock:
            self._users -= 1
            if self._users:
                return
            if Portal._current is self:
                Portal._current = None
                Portal._ending = self.thread
        self.loop.call_soon_threadsafe(self._stop)

    @classmethod
    def wait_for_end(cls, timeout: float) -> None:
        """Wait until the thread of a portal that is not used any more has ended."""
        thread, cls._ending = cls._ending, None
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout)

    def _stop(self) -> None:
        self._stopped = True
        self.loop.stop()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        self.loop.set_exception_handler(_handle)
        try:
            while not self._stopped:
                try:
                    self.loop.run_forever()
                except BaseException:
                    # asyncio lets SystemExit and KeyboardInterrupt through. They must not end this
                    # thread, as every executor of the process depends on it.
                    _logger.exception("internal error in the thread that serves the network")
            with self._closing:
                self._closed = True
            # gRPC may have work left on this loop, which must be done before the loop closes.
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            pending = asyncio.all_tasks(self.loop)
            for task in pending:
                task.cancel()
            if pending:
                self.loop.run_until_complete(asyncio.gather(*pending, return_exceptions=True))
            # One more round, in which waiting callers learn of tasks that have just ended.
            self.loop.run_until_complete(asyncio.sleep(0))
        finally:
            asyncio.set_event_loop(None)
            self._blocking.shutdown()
            self.loop.close()

    def post(self, fn: Callable[..., object], *args: object) -> None:
        """Have the loop thread call ``fn``; any thread may call this."""
        self.loop.call_soon_threadsafe(fn, *args)

    def run(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the loop; any thread but the loop's may wait for the future.

        Raises:
            RuntimeError: If the loop has ended.
        """
        with self._closing:
            # A coroutine that is handed in before the loop closes is run or cancelled before that.
            if not self._closed:
                return asyncio.run_coroutine_threadsafe(work, self.loop)
        work.close()
        raise RuntimeError("the loop has ended")

    @property
    def is_this_thread(self) -> bool:
        """Whether the caller is the loop thread."""
        return threading.current_thread() is self.thread

    @classmethod
    def _forget_after_fork(cls) -> None:
        # The thread exists only in the parent. The portal is kept alive in the child, because
        # gRPC's destructors would wait for threads that the child does not have.
        if cls._current is not None:
            _kept.append(cls._current)
        cls._current = cls._ending = None
        cls._lock = threading.Lock()


def _handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    # grpc.aio has one wake-up socket for all loops of a process: if the user's program runs a loop
    # with gRPC of its own, either may find it drained by the other. Harmless (grpc issue 25364).
    if not isinstance(context.get("exception"), BlockingIOError):
        loop.default_exception_handler(context)


_kept: list[object] = []

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=Portal._forget_after_fork)
