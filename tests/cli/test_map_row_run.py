"""Rows through an executor whose tasks the test finishes by hand."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import cast

import pytest

from cloudexec import BatchExecutor
from cloudexec._future import BatchFuture
from cloudexec.cli._errors import CommandError
from cloudexec.cli._row_run import Outcome, RowRun, SignalInterrupt
from cloudexec.cli._rows import Arguments, Row


class HandExecutor:
    """Hands each submitted future to the test."""

    def __init__(self) -> None:
        self.submitted: queue.SimpleQueue[BatchFuture[object]] = queue.SimpleQueue()

    def submit(self, fn: Callable[..., object], /, *args: object) -> BatchFuture[object]:
        future: BatchFuture[object] = BatchFuture()
        self.submitted.put(future)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        while not self.submitted.empty():
            self.submitted.get().cancel()

    def next(self) -> BatchFuture[object]:
        return self.submitted.get(timeout=10)


def bind(row: Row) -> Arguments:
    return (row.passed,), {}


def rows(count: int) -> Iterator[Row]:
    return (Row(number, number, number) for number in range(1, count + 1))


def make_run(
    executor: HandExecutor, source: Iterator[Row], *, window: int = 10, is_ordered: bool = False
) -> RowRun:
    return RowRun(
        cast(BatchExecutor, executor), print, source, bind, window=window, is_ordered=is_ordered
    )


def numbers(outcomes: Iterator[Outcome]) -> list[int]:
    return [outcome.row.number for outcome in outcomes]


def finish_in_turn(executor: HandExecutor, *order: int) -> None:
    """Finish the futures, once all are submitted, in the given order of their places."""
    futures = [executor.next() for _ in order]
    for place in order:
        futures[place].set_result(None)


@pytest.mark.parametrize(("is_ordered", "expected"), [(False, [3, 1, 2]), (True, [1, 2, 3])])
def test_outcomes_come_as_they_finish_or_in_the_rows_order(
    is_ordered: bool, expected: list[int]
) -> None:
    """Order is kept on request only."""
    executor = HandExecutor()
    run = make_run(executor, rows(3), is_ordered=is_ordered)
    threading.Thread(target=finish_in_turn, args=(executor, 2, 0, 1)).start()
    assert numbers(run.outcomes()) == expected


def test_no_more_rows_are_read_than_the_window_holds() -> None:
    """The input is read as results are taken, so that memory stays bounded."""
    executor = HandExecutor()
    read: list[int] = []

    def source() -> Iterator[Row]:
        for row in rows(100):
            read.append(row.number)
            yield row

    outcomes = make_run(executor, source(), window=5).outcomes()
    for taken in range(1, 101):
        # The first next() starts the feeder, so a future must be finished from elsewhere.
        threading.Thread(target=lambda: executor.next().set_result(None)).start()
        assert next(outcomes).row.number == taken
        assert len(read) <= taken + 5 + 1  # the window, and a row that waits for its permit
    assert list(outcomes) == []


def test_malformed_row_of_a_stream_is_raised_after_the_rows_before_it() -> None:
    """What was submitted still gets its outcome."""
    executor = HandExecutor()

    def source() -> Iterator[Row]:
        yield from rows(2)
        raise CommandError("row 3 is malformed")

    outcomes = make_run(executor, source()).outcomes()
    threading.Thread(target=finish_in_turn, args=(executor, 0, 1)).start()
    assert [next(outcomes).row.number, next(outcomes).row.number] == [1, 2]
    with pytest.raises(CommandError, match="row 3 is malformed"):
        next(outcomes)


def test_signal_ends_an_ordered_run_with_what_had_finished() -> None:
    """Outcomes that waited for an earlier row are yielded rather than lost."""
    executor = HandExecutor()
    run = make_run(executor, rows(3), is_ordered=True)

    def finish_and_interrupt() -> None:
        finish = [executor.next() for _ in range(3)]
        finish[2].set_result(None)
        finish[1].set_result(None)
        run.interrupt(15)

    threading.Thread(target=finish_and_interrupt).start()
    outcomes = run.outcomes()
    assert [next(outcomes).row.number, next(outcomes).row.number] == [2, 3]
    with pytest.raises(SignalInterrupt) as caught:
        next(outcomes)
    assert caught.value.number == 15


def test_stop_yields_what_runs_and_drops_what_was_cancelled() -> None:
    """A stopped run ends although its input would go on for ever."""
    executor = HandExecutor()
    never = threading.Event()

    def source() -> Iterator[Row]:
        yield from rows(3)
        never.wait()  # a stream that stays silent

    run = make_run(executor, source())
    threading.Thread(target=lambda: executor.next().set_result(None)).start()
    outcomes = run.outcomes()
    assert next(outcomes).row.number == 1
    second = executor.next()
    second.set_running_or_notify_cancel()
    third = executor.next()
    executor.submitted.put(third)
    run.stop()
    second.set_result(None)
    assert numbers(outcomes) == [2]
    assert third.cancelled()
    never.set()
