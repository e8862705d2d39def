"""Runs rows through an executor: a bounded number at a time, and yields outcomes as they finish.

    feeder thread                     main thread
    rows -> permit -> submit          events -> outcome -> permit back
                        |               ^
                        +-> future -----+   (its done callback puts it into the queue)

The feeder thread reads the input, so a slow stream does not delay results. The end of the input and
signals come through the same queue as outcomes, so the main thread is never interrupted while it
writes a row.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue
from typing import TYPE_CHECKING

from cloudexec.cli._map_journal import key_of
from cloudexec.cli._rows import Arguments, Row

if TYPE_CHECKING:
    from concurrent.futures import Future

    from cloudexec import BatchExecutor
    from cloudexec._future import BatchFuture


@dataclass(frozen=True, slots=True)
class Outcome:
    """A row whose call is done."""

    row: Row
    """The row."""
    future: BatchFuture[object]
    """The call, done and not cancelled."""


@dataclass(frozen=True, slots=True)
class _RowDone:
    place: int
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class _FeedEnded:
    error: BaseException | None


@dataclass(frozen=True, slots=True)
class _SignalCame:
    number: int


class SignalInterrupt(KeyboardInterrupt):
    """A signal asked for the end of the run."""

    def __init__(self, number: int = 2) -> None:
        """Create the exception for a signal's number."""
        super().__init__(number)
        self.number = number


class RowRun:
    """One pass of rows through an executor."""

    def __init__(
        self,
        executor: BatchExecutor,
        function: Callable[..., object],
        rows: Iterator[Row],
        bind: Callable[[Row], Arguments],
        *,
        window: int,
        is_ordered: bool,
        is_journaled: bool = False,
    ) -> None:
        """Prepare the run; ``outcomes()`` starts it.

        Args:
            executor: Runs the calls.
            function: Called once per row.
            rows: The rows, which the feeder thread reads.
            bind: Turns a row into arguments.
            window: Number of rows that may be submitted and not yet yielded.
            is_ordered: Whether to yield outcomes in the rows' order.
            is_journaled: Whether the executor has a journal, whose keys contain the rows' numbers.
        """
        self._executor = executor
        self._function = function
        self._rows = rows
        self._bind = bind
        self._permits = threading.Semaphore(window)
        self._is_ordered = is_ordered
        self._is_journaled = is_journaled
        self._events: SimpleQueue[_RowDone | _FeedEnded | _SignalCame] = SimpleQueue()
        self._lock = threading.Lock()
        self._submitted = 0  # by the feeder, under the lock
        self._is_stopping = False  # by the main thread, under the lock

    def outcomes(self) -> Iterator[Outcome]:
        """Run the rows and yield their outcomes, each once.

        Raises:
            SignalInterrupt: After ``interrupt()``, and after all finished outcomes.
            Exception: If reading or submitting a row raised, after the outcomes of earlier rows.
        """
        threading.Thread(target=self._feed, name="cloudexec-map-feeder", daemon=True).start()
        held: dict[int, Outcome] = {}
        following = 0
        received = 0
        feed: _FeedEnded | None = None
        while not (received == self._submitted and (feed or self._is_stopping)):
            event = self._events.get()
            match event:
                case _FeedEnded():
                    feed = event
                case _SignalCame():
                    self._halt()
                    for place in sorted(held):  # finished rows need not run again
                        yield held[place]
                    raise SignalInterrupt(event.number)
                case _RowDone() if event.outcome.future.cancelled():
                    received += 1
                case _RowDone() if self._is_ordered:
                    received += 1
                    held[event.place] = event.outcome
                    while following in held:
                        yield held.pop(following)
                        self._permits.release()
                        following += 1
                case _RowDone():
                    received += 1
                    yield event.outcome
                    self._permits.release()
        for place in sorted(held):  # these waited for an earlier row, which was cancelled
            yield held[place]
        if feed is not None and feed.error is not None and not self._is_stopping:
            raise feed.error

    def stop(self) -> None:
        """Submit no more rows, and cancel those that no worker has started."""
        self._halt()
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _halt(self) -> None:
        with self._lock:
            self._is_stopping = True
        self._permits.release()  # the feeder may be waiting for one

    def interrupt(self, number: int) -> None:
        """Make ``outcomes()`` raise; safe to call from a signal handler.

        Args:
            number: The signal's number.
        """
        self._events.put(_SignalCame(number))

    def _feed(self) -> None:
        error: BaseException | None = None
        try:
            for place, row in enumerate(self._rows):
                args, kwargs = self._bind(row)
                submit = self._executor.submit
                if self._is_journaled:
                    key = key_of(row.number, args, kwargs)
                    submit = self._executor.with_options(key=key).submit
                self._permits.acquire()
                with self._lock:
                    if self._is_stopping:
                        break
                    future = submit(self._function, *args, **kwargs)
                    self._submitted += 1
                future.add_done_callback(partial(self._put, place, Outcome(row, future)))
        except BaseException as exc:  # the main thread raises it
            error = exc
        self._events.put(_FeedEnded(error))

    def _put(self, place: int, outcome: Outcome, _: Future[object]) -> None:
        self._events.put(_RowDone(place, outcome))
