"""The future of one task: the standard library's future with a third of its memory.

``concurrent.futures.Future`` makes a Condition and three containers, about 1.4 KiB, when it is
made. This subclass makes them only when a thread waits for the future. It keeps the result as the
bytes that arrived until the program asks for it, so no user code runs on the thread that serves the
network. ``concurrent.futures.wait()``, ``as_completed()`` and asyncio use private attributes of
futures; this class has all of them under the same names.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from cloudexec._describing import type_name
from cloudexec._forked import end_if_forked

__all__ = ["BatchFuture"]

T = TypeVar("T")

PENDING = "PENDING"
RUNNING = "RUNNING"
CANCELLED_AND_NOTIFIED = "CANCELLED_AND_NOTIFIED"
FINISHED = "FINISHED"
_DONE = frozenset({CANCELLED_AND_NOTIFIED, FINISHED})


class Owner(Protocol):
    """The executor or graph that runs a future's task."""

    def withheld(self, future: BatchFuture[Any]) -> AbstractContextManager[bool]:
        """Take the task back if it was sent to a worker and has not begun; wait for the answer.

        Returns:
            A context in which the task is not sent to any worker. Its value is whether no worker
            has the task; False means that a worker may have begun to run it.
        """

    def cancelled(self, future: BatchFuture[Any], was_running: bool) -> None:
        """Take note that the user cancelled the future."""


class BatchFuture(Future[T]):
    """What ``BatchExecutor.submit()`` returns: the standard library's future with some extensions.

    All methods of the standard library's class behave as documented there. In addition a task can
    be cancelled while it runs (``cancel(running=True)``), and a future that is done has attributes
    that say where and how long its task ran.
    """

    __slots__ = (
        "_attempts",
        "_condition_made",
        "_decode",
        "_done_callbacks_made",
        "_ended",
        "_exception",
        "_lock",
        "_number",
        "_output",
        "_owner",
        "_released",
        "_result",
        "_run_time",
        "_state",
        "_task",
        "_waiters_made",
        "_worker_id",
    )

    _label = ""
    """The name of its stage, if it belongs to a graph; few futures have one, so it is not among the
    ``__slots__``."""
    _journaled: Any = None
    """The journal's record of its call, if there is a journal."""
    _resumed = False
    """Whether its result came from the journal."""
    _has_result = False
    """Whether it is known to have a result, which is not unpickled for that; graphs set this."""
    if TYPE_CHECKING:
        _number: int
        _ended: tuple[float, float, str]
        _released: tuple[float, float, str]
    _notes: Any = None
    """Unusual events of its task; see ``cloudexec._server.story``. ``_number``, ``_ended`` and
    ``_released`` serve the same purpose, and are unset until such an event happens."""
    _on_end: Callable[[BatchFuture[Any], bool], None] | None = None
    """Called on the loop thread with the future and whether its task returned a result; graphs set
    this."""

    def __init__(self, owner: Owner | None = None) -> None:
        # The base class's __init__ is not called, as it makes the objects that this class avoids.
        self._lock = threading.RLock()
        self._state = PENDING
        self._result: Any = None
        self._exception: BaseException | None = None
        self._decode: Callable[[BatchFuture[Any]], None] | None = None
        self._condition_made: threading.Condition | None = None
        self._waiters_made: list[Any] | None = None
        self._done_callbacks_made: list[Callable[[Future[T]], object]] | None = None
        self._owner = owner
        self._task: Any = None
        self._worker_id: str | None = None
        self._run_time: float | None = None
        self._output = ""
        self._attempts = 0

    # Private attributes that wait(), as_completed() and asyncio use.

    if TYPE_CHECKING:
        _condition: threading.Condition
        _waiters: list[Any]
        _done_callbacks: list[Callable[[Future[T]], object]]
    else:

        @property
        def _condition(self) -> Any:
            return self._lock

        @property
        def _waiters(self) -> list[Any]:
            if self._waiters_made is None:
                self._waiters_made = []
            return self._waiters_made

        @property
        def _done_callbacks(self) -> list[Callable[[Future[T]], object]]:
            if self._done_callbacks_made is None:
                self._done_callbacks_made = []
            return self._done_callbacks_made

    def _get_snapshot(self) -> tuple[bool, bool, Any, BaseException | None]:
        """Return the whole outcome at once, for the asyncio of Python 3.14."""
        state = self._state
        if state == FINISHED:
            self._settle()
            return True, False, self._result, self._exception
        cancelled = state == CANCELLED_AND_NOTIFIED
        return cancelled, cancelled, None, None

    # Queries.

    def cancelled(self) -> bool:
        """Return True if the task was cancelled."""
        return self._state == CANCELLED_AND_NOTIFIED

    def running(self) -> bool:
        """Return True if a worker has begun to run the task and it has not finished."""
        return self._state == RUNNING

    def done(self) -> bool:
        """Return True if the task was cancelled or finished."""
        return self._state in _DONE

    @property
    def worker_id(self) -> str | None:
        """The worker that ran the last attempt, or ``None`` if no worker has run one yet."""
        return self._worker_id

    @property
    def run_time(self) -> float | None:
        """Seconds that the call ran on its worker; ``None`` until it is done."""
        return self._run_time

    @property
    def attempts(self) -> int:
        """Number of attempts that began, including lost ones; 0 until the task is done."""
        return self._attempts

    @property
    def output(self) -> str:
        """The last lines that a failed task printed; empty for one that succeeded."""
        return self._output

    # Outcomes.

    def result(self, timeout: float | None = None) -> T:
        """Return what the call returned, waiting up to ``timeout`` seconds for it.

        Args:
            timeout: Seconds; ``None`` waits without limit.

        Raises:
            concurrent.futures.CancelledError: If the task was cancelled.
            TimeoutError: If it did not finish in time.
            Exception: Whatever the call raised, or a ``CloudexecError`` if it could not be run.
        """
        if self._state not in _DONE:
            self._wait(timeout)
        if self._state == CANCELLED_AND_NOTIFIED:
            raise CancelledError()
        if self._decode is not None:
            self._settle()
        if self._exception is not None:
            try:
                raise self._exception
            finally:
                # The traceback refers to this frame; without this there would be a cycle.
                self = None  # type: ignore[assignment]
        return self._result  # type: ignore[no-any-return]

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Return what the call raised, or ``None``, waiting up to ``timeout`` seconds.

        Raises:
            concurrent.futures.CancelledError: If the task was cancelled.
            TimeoutError: If it did not finish in time.
        """
        if self._state not in _DONE:
            self._wait(timeout)
        if self._state == CANCELLED_AND_NOTIFIED:
            raise CancelledError()
        if self._decode is not None:
            self._settle()
        return self._exception

    def _wait(self, timeout: float | None) -> None:
        with self._lock:
            if self._state in _DONE:
                return
            condition = self._condition_made
            if condition is None:
                condition = self._condition_made = threading.Condition(self._lock)
            if not condition.wait_for(lambda: self._state in _DONE, timeout):
                raise FutureTimeoutError()

    def _settle(self) -> None:
        """Unpickle the result once, in the thread that first asks for it."""
        with self._lock:
            decode = self._decode
            if decode is not None:
                decode(self)
                self._decode = None

    # Transitions.

    def cancel(self, *, running: bool = False) -> bool:
        """Cancel the task unless it has begun to run.

        Args:
            running: Whether to cancel a task that runs, too: its process is killed and replaced.
                (This is an extension; the standard library cannot do it.)

        Returns:
            False if the task is running (and ``running`` is false) or has finished, otherwise True.
            Also False if the task was sent to a worker that does not answer within a second whether
            the task has begun.
        """
        owner = self._owner
        if owner is None or running or self._state != PENDING:
            return self._cancel(running)
        with owner.withheld(self) as is_ours:
            return self._cancel(running) if is_ours else self.cancelled()

    def _cancel(self, running: bool) -> bool:
        owner = self._owner
        with self._lock:
            if self._state == CANCELLED_AND_NOTIFIED:
                return True
            if self._state == FINISHED:
                return False
            was_running = self._state == RUNNING
            if was_running and not running:
                return False
            self._conclude(CANCELLED_AND_NOTIFIED, "add_cancelled")
        if owner is not None:
            owner.cancelled(self, was_running)
        self._invoke_callbacks()
        return True

    def set_running_or_notify_cancel(self) -> bool:
        """Mark the future as running, or return False if it is cancelled; for executors only."""
        with self._lock:
            if self._state == CANCELLED_AND_NOTIFIED:
                return False
            if self._state == FINISHED:
                raise InvalidStateError(f"{self._state}: {self!r}")
            self._state = RUNNING
            return True

    def set_result(self, result: T) -> None:
        """Set the result and wake all waiting threads. Only executors and tests call this."""
        self._set(result, None)

    def set_exception(self, exception: BaseException | None) -> None:
        """Set the exception and wake all waiting threads. Only executors and tests call this."""
        self._set(None, exception)

    def _set(self, result: Any, exception: BaseException | None) -> None:
        if not self._finish(result, exception, None):
            raise InvalidStateError(f"{self._state}: {self!r}")
        self._invoke_callbacks()

    def _finish(
        self,
        result: Any,
        exception: BaseException | None,
        decode: Callable[[BatchFuture[Any]], None] | None,
        *,
        failed: bool = False,
    ) -> bool:
        """Set the outcome without running callbacks; return False if the future has an outcome.

        Args:
            result: The result, or the bytes from which ``decode`` makes it.
            exception: The exception, or ``None``.
            decode: Called with this future, under its lock, when the outcome is first needed.
            failed: Whether ``decode`` will set an exception.
        """
        with self._lock:
            if self._state in _DONE:
                return False
            self._result = result
            self._exception = exception
            self._decode = decode
            failed = failed or exception is not None
            self._conclude(FINISHED, "add_exception" if failed else "add_result")
            return True

    def _conclude(self, state: str, tell_waiters: str) -> None:
        self._state = state
        if self._waiters_made:
            for waiter in self._waiters_made:
                getattr(waiter, tell_waiters)(self)
        if self._condition_made is not None:
            self._condition_made.notify_all()

    def add_done_callback(self, fn: Callable[[Future[T]], object]) -> None:
        """Call ``fn`` with this future when it is done, or at once if it is done already.

        Callbacks run in a thread of the executor, one at a time in the order in which tasks finish,
        or in the thread that cancels the future. They may submit tasks and may block; a callback
        that blocks delays other callbacks, but not the executor. An exception of a callback is
        logged. ``SystemExit`` and ``KeyboardInterrupt`` are raised again if the callback runs in a
        thread of the program, as in the standard library. If a callback forks, the child process
        ends when the callback ends, with the exit code of its ``sys.exit()``.
        """
        with self._lock:
            if self._state not in _DONE:
                self._done_callbacks.append(fn)
                return
        self._call(fn)

    def _has_callbacks(self) -> bool:
        return bool(self._done_callbacks_made)

    def _invoke_callbacks(self, *, in_thread_of_ours: bool = False) -> None:
        for fn in self._done_callbacks_made or ():
            self._call(fn, in_thread_of_ours=in_thread_of_ours)

    def _call(self, fn: Callable[[Future[T]], object], *, in_thread_of_ours: bool = False) -> None:
        try:
            fn(self)
            if in_thread_of_ours:
                end_if_forked()
        except BaseException as exc:
            if in_thread_of_ours:
                end_if_forked(exc)
            if not in_thread_of_ours and not issubclass(type(exc), Exception):
                raise
            from cloudexec._log import Log

            # The logger and the message are those of the standard library.
            Log("concurrent.futures").log_exception(
                "exception calling callback for %r", self, exc=exc
            )

    def __repr__(self) -> str:
        state = self._state.lower().replace("cancelled_and_notified", "cancelled")
        if self._state == FINISHED and type(self._result) is bytes and self._decode is not None:
            self.exception()  # unpickles a small outcome that was not asked for yet
        if self._state == FINISHED and self._decode is None:
            outcome = self._exception if self._exception is not None else self._result
            verb = "raised" if self._exception is not None else "returned"
            return f"<BatchFuture at {id(self):#x} state={state} {verb} {type_name(outcome)}>"
        return f"<BatchFuture at {id(self):#x} state={state}>"


BatchFuture.__module__ = "cloudexec"
