"""Runs an event loop in a thread of its own, for programs that block."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import CancelledError, Future, wait
from typing import Any, TypeVar

__all__ = ["LoopThread"]

_T = TypeVar("_T")


class LoopThread:
    """An event loop in a thread.

    Args:
        name: Name of the thread.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop = asyncio.new_event_loop()
        self._closers: list[Any] = []
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def on_close(self, closer: Any) -> None:
        """Register an asynchronous function to call before the loop ends."""
        self._closers.append(closer)

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine to its end, from any thread, and return its result.

        Ctrl-C cancels the coroutine and waits until it has cleaned up. A second Ctrl-C ends the
        wait.
        """
        if self._loop.is_closed():
            work.close()
            raise RuntimeError(f"{self._name} was closed")
        answer: Future[_T] = Future()
        tasks: list[asyncio.Task[_T]] = []

        def finish(task: asyncio.Task[_T]) -> None:
            if task.cancelled():
                answer.set_exception(CancelledError())
            elif (exc := task.exception()) is not None:
                answer.set_exception(exc)
            else:
                answer.set_result(task.result())

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(finish)

        def cancel() -> None:
            for task in tasks:
                task.cancel()

        self._loop.call_soon_threadsafe(begin)
        try:
            return answer.result()
        except BaseException:
            if not answer.done():
                self._loop.call_soon_threadsafe(cancel)
                wait((answer,))
            raise

    def close(self) -> None:
        """End the loop and its thread."""
        if self._loop.is_closed():
            return
        if threading.current_thread() is self._thread:
            # The garbage collector called this in the loop's thread, which cannot join itself.
            threading.Thread(target=self.close, name=f"{self._name}-close").start()
            return
        with contextlib.suppress(Exception):
            self.run(self._wind_up())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _wind_up(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for closer in reversed(self._closers):
            await closer()
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()
