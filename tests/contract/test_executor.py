"""What users of ``concurrent.futures`` rely on, seen from outside, on local workers."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import inspect
import itertools
import logging
import multiprocessing
import operator
import os
import pickle
import random
import signal
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import (
    ALL_COMPLETED,
    FIRST_COMPLETED,
    FIRST_EXCEPTION,
    BrokenExecutor,
    CancelledError,
    Executor,
    Future,
    as_completed,
    wait,
)
from pathlib import Path
from typing import Any

import contract_tasks as tasks
import psutil
import pytest
from contract_helpers import PATIENCE, Client, Signals, assert_gone, descendants, settle, until

from cloudexec import (
    BatchExecutor,
    BrokenBatchExecutor,
    PayloadError,
    TaskTimeoutError,
    WorkerLostError,
)

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("nothing_left")]

StartClient = Callable[..., Client]


@pytest.fixture
def executor() -> Iterator[BatchExecutor]:
    with BatchExecutor(2) as made:
        yield made


@pytest.fixture
def single() -> Iterator[BatchExecutor]:
    with BatchExecutor(1) as made:
        yield made


# submit()


def test_submit_returns_the_result_of_the_call(executor: BatchExecutor) -> None:
    """``submit`` passes positional and keyword arguments, whatever their names are."""
    assert executor.submit(pow, 2, 10).result() == 1024
    assert executor.submit(tasks.echo, 1, self=2, fn=3).result() == ((1,), {"self": 2, "fn": 3})


def test_submit_runs_lambdas_and_closures(executor: BatchExecutor) -> None:
    """What is defined on the spot runs too, with the values that it has at ``submit``."""
    values = []
    for offset in range(3):
        values.append(executor.submit(lambda x: x + offset, 10))  # noqa: B023
    assert [future.result() for future in values] == [10, 11, 12]


def test_submit_has_the_signature_of_the_standard_library(executor: BatchExecutor) -> None:
    """The callable is positional only, and there must be one."""
    with pytest.raises(TypeError):
        executor.submit()  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        executor.submit(fn=tasks.double, x=1)  # type: ignore[call-arg]
    assert isinstance(executor, Executor)
    assert isinstance(executor.submit(tasks.double, 1), Future)
    for method in ("submit", "shutdown"):
        ours = inspect.signature(getattr(BatchExecutor, method)).parameters
        theirs = inspect.signature(getattr(Executor, method)).parameters
        assert [(p.name, p.kind, p.default) for p in ours.values()] == [
            (p.name, p.kind, p.default) for p in theirs.values()
        ]


def test_arguments_are_those_of_the_call(single: BatchExecutor, signals: Signals) -> None:
    """An argument that is changed after ``submit`` arrives as it was."""
    busy = single.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    values = [1, 2]
    future = single.submit(tasks.echo, values)
    values.append(3)
    signals.release()
    assert future.result() == (([1, 2],), {})
    busy.result()


def test_exception_arrives_as_itself_with_the_remote_traceback(executor: BatchExecutor) -> None:
    """What a task raises has its type, arguments and attributes, and its traceback as cause."""
    future = executor.submit(tasks.raise_needs_arguments)
    error = future.exception()
    assert isinstance(error, tasks.NeedsArguments)
    assert (error.code, error.text) == (3, "three")
    assert "raise_needs_arguments" in str(error.__cause__)
    with pytest.raises(tasks.NeedsArguments):
        future.result()


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, GeneratorExit, StopIteration])
def test_unusual_exceptions_are_results(single: BatchExecutor, kind: type[BaseException]) -> None:
    """``SystemExit`` and its like end the task, not the process that ran it."""
    pid = single.submit(os.getpid).result()
    error = single.submit(tasks.raise_it, kind, 4).exception()
    assert type(error) is kind
    assert error.args == (4,)
    assert single.submit(os.getpid).result() == pid


def test_exception_that_cannot_be_unpickled_fails_its_future_alone(
    executor: BatchExecutor,
) -> None:
    """Others are not touched, and the original traceback is told."""
    bad = executor.submit(tasks.raise_it, tasks.CannotBeRebuilt, 1, "text")
    good = executor.submit(tasks.double, 1)
    error = bad.exception()
    assert error is not None
    assert "CannotBeRebuilt" in f"{error} {error.__cause__}"
    assert good.result() == 2


def test_what_cannot_be_pickled_fails_its_future_alone(executor: BatchExecutor) -> None:
    """An argument or a result that cannot be pickled is a ``PicklingError`` of one future."""
    argument = executor.submit(tasks.echo, threading.Lock())
    result = executor.submit(threading.Lock)
    good = executor.submit(tasks.double, 1)
    assert isinstance(argument.exception(), pickle.PicklingError)
    assert isinstance(result.exception(), pickle.PicklingError)
    assert good.result() == 2


def test_large_arguments_and_results(executor: BatchExecutor) -> None:
    """Megabytes travel both ways, several at once."""
    data = [bytes([n]) * 8_000_000 for n in range(4)]
    assert list(executor.map(bytes.swapcase, data)) == [each.swapcase() for each in data]


def test_proxies_of_a_manager_are_arguments(executor: BatchExecutor) -> None:
    """A ``multiprocessing`` manager's queue can be handed to a task, as to a process pool's."""
    with multiprocessing.get_context("spawn").Manager() as manager:
        queue = manager.Queue()
        executor.submit(tasks.put, queue, "from the task").result()
        assert queue.get_nowait() == "from the task"
        with BatchExecutor(1, listen="127.0.0.1:0") as by_tls:
            by_tls.submit(tasks.put, queue, "from a local worker").result()
        assert queue.get_nowait() == "from a local worker"


def test_result_waits_as_long_as_it_is_told_to(single: BatchExecutor, signals: Signals) -> None:
    """``result`` and ``exception`` raise ``TimeoutError`` and leave the task alone."""
    future = single.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    for timeout in (0, 0.01, -1):
        with pytest.raises(TimeoutError):
            future.result(timeout)
        with pytest.raises(concurrent.futures.TimeoutError):
            future.exception(timeout)
    assert not future.done()
    signals.release()
    assert isinstance(future.result(), int)


# map()


def test_map_keeps_the_order_and_stops_with_the_shortest_input(executor: BatchExecutor) -> None:
    """Results come in the order of the inputs, as many as the shortest iterable has."""
    assert list(executor.map(tasks.add, range(100), range(0, 50, 1))) == list(range(0, 100, 2))
    assert list(executor.map(tasks.double, [])) == []


@pytest.mark.parametrize("chunksize", [1, 3, 10, 1000])
def test_map_in_chunks_has_the_same_results(executor: BatchExecutor, chunksize: int) -> None:
    """``chunksize`` changes nothing but how calls travel."""
    found = list(executor.map(tasks.add, range(50), range(50), chunksize=chunksize))
    assert found == list(range(0, 100, 2))


def test_map_refuses_sizes_out_of_range(executor: BatchExecutor) -> None:
    """Sizes below one are refused when ``map`` is called, not when it is read."""
    with pytest.raises(ValueError, match="chunksize"):
        executor.map(tasks.double, [1], chunksize=0)
    with pytest.raises(ValueError, match="buffersize"):
        executor.map(tasks.double, [1], buffersize=0)
    with pytest.raises(TypeError, match="buffersize"):
        executor.map(tasks.double, [1], buffersize=1.5)  # type: ignore[arg-type]


def test_map_begins_before_it_is_read(single: BatchExecutor, tmp_path: Path) -> None:
    """All calls are submitted by ``map`` itself."""
    paths = [str(tmp_path / str(n)) for n in range(5)]
    unread = single.map(tasks.touch, paths)
    single.shutdown()
    assert all(map(os.path.exists, paths))
    del unread


def test_map_raises_what_a_call_raised_in_its_turn(
    single: BatchExecutor, signals: Signals, tmp_path: Path
) -> None:
    """Results before the exception come first; what has not begun after it is cancelled."""
    path = str(tmp_path / "never")
    busy: Future[int]

    results = single.map(tasks.divide, [4, 1, 2], [2, 0, 1])
    assert next(results) == 2
    busy = single.submit(tasks.hold, signals.told, signals.gate)
    late = single.submit(tasks.touch, path)
    with pytest.raises(ZeroDivisionError):
        next(results)
    with pytest.raises(StopIteration):
        next(results)
    assert late.cancel()
    signals.release()
    busy.result()
    assert not os.path.exists(path)


def test_map_is_over_when_its_time_is_up(
    single: BatchExecutor, signals: Signals, tmp_path: Path
) -> None:
    """``TimeoutError`` is raised, and what has not begun never runs."""
    busy = single.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    paths = [str(tmp_path / str(n)) for n in range(5)]
    results = single.map(tasks.touch, paths, timeout=0.05)
    with pytest.raises(TimeoutError):
        next(results)
    signals.release()
    busy.result()
    single.submit(tasks.double, 1).result()
    assert not any(map(os.path.exists, paths))


@pytest.mark.parametrize("how", ["closed", "dropped"])
def test_closing_map_cancels_what_has_not_begun(
    single: BatchExecutor, signals: Signals, tmp_path: Path, how: str
) -> None:
    """Closing an iterator that has been read from, or dropping it, cancels the rest."""
    paths = [str(tmp_path / str(n)) for n in range(20)]
    results = single.map(
        tasks.touch_or_hold,
        [paths[0], "", *paths[1:]],
        ["", signals.told, *[""] * 19],
        ["", signals.gate, *[""] * 19],
    )
    assert next(results) is None
    signals.wait()
    if how == "closed":
        results.close()  # type: ignore[attr-defined]
        with pytest.raises(StopIteration):
            next(results)
    else:
        del results
        gc.collect()
    settle()
    signals.release()
    single.submit(tasks.double, 1).result()
    assert [os.path.exists(path) for path in paths] == [True] + [False] * 19


@pytest.mark.parametrize("chunksize", [1, 4])
def test_map_reads_endless_inputs_within_its_buffer(
    executor: BatchExecutor, chunksize: int
) -> None:
    """With ``buffersize`` no more is read than results were taken, and the buffer holds."""
    read = 0

    def inputs() -> Iterator[int]:
        nonlocal read
        for number in itertools.count():
            read += 1
            yield number

    results = executor.map(tasks.double, inputs(), buffersize=5, chunksize=chunksize)
    assert read <= 5 * chunksize
    for taken, expected in enumerate(itertools.islice(itertools.count(0, 2), 200), start=1):
        assert next(results) == expected
        assert read <= taken + (5 + 1) * chunksize
    results.close()  # type: ignore[attr-defined]


def test_map_with_a_buffer_holds_back_calls(
    single: BatchExecutor, signals: Signals, tmp_path: Path
) -> None:
    """Calls beyond the buffer are not submitted until a result is taken."""
    paths = (str(tmp_path / str(n)) for n in itertools.count())
    results = single.map(tasks.touch, paths, buffersize=3)
    single.submit(tasks.double, 1).result()
    single.submit(tasks.double, 1).result()
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2", "gate", "told"]
    assert next(results).endswith("/0")
    results.close()  # type: ignore[attr-defined]


def test_results_of_map_are_not_kept(executor: BatchExecutor) -> None:
    """Neither the iterator nor the executor refers to a result that was handed out."""
    for result in executor.map(_Something, range(10)):
        reference = weakref.ref(result)
        del result
        gc.collect()
        assert reference() is None


class _Something:
    def __init__(self, number: int) -> None:
        self.number = number


# shutdown()


def test_shutdown_finishes_what_was_submitted(tmp_path: Path) -> None:
    """``shutdown`` returns when all is done, and may be called again."""
    executor = BatchExecutor(2)
    futures = [executor.submit(tasks.touch, str(tmp_path / str(n))) for n in range(50)]
    executor.shutdown()
    assert all(future.done() for future in futures)
    assert len(os.listdir(tmp_path)) == 50
    executor.shutdown()
    executor.shutdown(wait=False, cancel_futures=True)


def test_shutdown_without_waiting_finishes_too(signals: Signals, tmp_path: Path) -> None:
    """``shutdown(wait=False)`` returns at once; running and queued tasks finish."""
    executor = BatchExecutor(1)
    first = executor.submit(tasks.hold, signals.told, signals.gate)
    second = executor.submit(tasks.double, 2)
    signals.wait()
    executor.shutdown(wait=False)
    assert not first.done()
    signals.release()
    assert second.result() == 4
    assert first.done()


def test_shutdown_can_cancel_what_has_not_begun(signals: Signals, tmp_path: Path) -> None:
    """``cancel_futures`` lets what runs finish and cancels all else."""
    executor = BatchExecutor(2)
    running = [executor.submit(tasks.hold, signals.told, signals.gate) for _ in range(2)]
    signals.wait(2)
    path = str(tmp_path / "never")
    queued = [executor.submit(tasks.touch, path) for _ in range(20)]
    until(lambda: all(future.running() for future in running))
    executor.shutdown(wait=False, cancel_futures=True)
    signals.release(2)
    executor.shutdown()
    assert [type(future.result()) for future in running] == [int, int]
    assert all(future.cancelled() for future in queued)
    assert not os.path.exists(path)


def test_nothing_is_accepted_after_shutdown(executor: BatchExecutor) -> None:
    """``submit`` and ``map`` raise ``RuntimeError``, used before or not."""
    executor.submit(tasks.double, 1).result()
    executor.shutdown()
    unused = BatchExecutor(1)
    unused.shutdown()
    for closed in (executor, unused):
        with pytest.raises(RuntimeError, match="after shutdown"):
            closed.submit(tasks.double, 1)
        with pytest.raises(RuntimeError, match="after shutdown"):
            closed.map(tasks.double, [1])


def test_context_manager_waits(tmp_path: Path) -> None:
    """Leaving the block shuts down, after an exception too, which goes on."""
    with BatchExecutor(1) as executor:
        assert isinstance(executor, BatchExecutor)
        future = executor.submit(tasks.touch, str(tmp_path / "1"))
    assert future.done()

    def fail() -> None:
        nonlocal future
        with BatchExecutor(1) as executor:
            future = executor.submit(tasks.touch, str(tmp_path / "2"))
            raise LookupError

    with pytest.raises(LookupError):
        fail()
    assert future.done()
    with pytest.raises(RuntimeError):
        executor.submit(tasks.double, 1)


def test_shutdown_from_a_callback_does_not_hang() -> None:
    """A callback may shut its executor down, waiting or not."""
    executor = BatchExecutor(1)
    ended = threading.Event()

    def shut_down(future: Future[int]) -> None:
        executor.shutdown(wait=True)
        ended.set()

    executor.submit(tasks.double, 1).add_done_callback(shut_down)
    assert ended.wait(PATIENCE)
    executor.shutdown()


# Workers.


def test_no_more_than_max_workers_tasks_run_at_once(tmp_path: Path) -> None:
    """Tasks overlap as many at a time as there are workers, and never more."""
    path = str(tmp_path / "spans")
    with BatchExecutor(3) as executor:
        list(executor.map(tasks.span, [path] * 60, itertools.cycle([0.0, 0.01, 0.03])))
    edges: list[tuple[float, int]] = []
    for line in Path(path).read_text().splitlines():
        began, ended = map(float, line.split())
        edges += [(began, 1), (ended, -1)]
    running = list(itertools.accumulate(change for _, change in sorted(edges)))
    assert len(edges) == 120
    assert max(running) == 3


def test_all_workers_are_used(signals: Signals, executor: BatchExecutor) -> None:
    """Two tasks that wait for each other both run, in two processes."""
    futures = [executor.submit(tasks.hold, signals.told, signals.gate) for _ in range(2)]
    signals.wait(2)
    signals.release(2)
    assert len({future.result() for future in futures}) == 2


def test_process_is_replaced_after_max_tasks_per_child() -> None:
    """Each process runs so many tasks and no more."""
    with BatchExecutor(1, max_tasks_per_child=2) as executor:
        pids = [executor.submit(os.getpid).result() for _ in range(6)]
        burst = list(executor.map(tasks.count_once, range(7)))
    assert [pids[0]] * 2 + [pids[2]] * 2 + [pids[4]] * 2 == pids
    assert len(set(pids)) == 3
    assert max(times for _, times in burst) == 2


def test_initializer_runs_in_every_process_first(signals: Signals) -> None:
    """Every process has run the initializer, once, before its first task; a replacement too."""
    with BatchExecutor(
        2, initializer=tasks.set_up, initargs=("ready",), max_tasks_per_child=1
    ) as executor:
        futures = [executor.submit(tasks.setting, signals.told, signals.gate) for _ in range(4)]
        signals.release(4)
        found = [future.result() for future in futures]
    assert {value for _, value in found} == {"ready"}
    assert len({pid for pid, _ in found}) == 4


def test_failing_initializer_breaks_the_executor(caplog: pytest.LogCaptureFixture) -> None:
    """Pending futures and later calls raise a ``BrokenExecutor`` whose cause is the exception."""
    with BatchExecutor(2, initializer=tasks.refuse, initargs=("no",)) as executor:
        futures = [executor.submit(tasks.double, 1) for _ in range(3)]
        for future in futures:
            error = future.exception()
            assert isinstance(error, BrokenExecutor)
            assert isinstance(error.__cause__, RuntimeError)
            assert error.__cause__.args == ("no",)
        with pytest.raises(BrokenExecutor):
            executor.submit(tasks.double, 1)
        with pytest.raises(BrokenExecutor):
            executor.map(tasks.double, [1])
    assert any(record.levelno == logging.CRITICAL for record in caplog.records)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_initializer_that_ends_the_process_breaks_the_executor() -> None:
    """An initializer that kills its process is not tried for ever."""
    with BatchExecutor(1, initializer=tasks.leave, initargs=(3,)) as executor:
        error = executor.submit(tasks.double, 1).exception(PATIENCE)
        assert isinstance(error, BrokenExecutor)
        assert "3" in str(error)
        with pytest.raises(BrokenExecutor):
            executor.submit(tasks.double, 1)


@pytest.mark.parametrize("method", ["terminate_workers", "kill_workers"])
def test_ending_the_workers_fails_what_is_open(
    signals: Signals, tmp_path: Path, method: str
) -> None:
    """Running and queued tasks fail with a ``BrokenExecutor``, and every process is gone."""
    executor = BatchExecutor(1)
    running = executor.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    queued = executor.submit(tasks.touch, str(tmp_path / "never"))
    processes = descendants()
    assert processes
    getattr(executor, method)()
    assert_gone(processes)
    for future in (running, queued):
        assert isinstance(future.exception(0), BrokenBatchExecutor)
    with pytest.raises(RuntimeError):
        executor.submit(tasks.double, 1)
    executor.shutdown()
    assert not (tmp_path / "never").exists()


def test_lost_process_fails_one_future(executor: BatchExecutor, tmp_path: Path) -> None:
    """A task that keeps dying fails alone after three attempts; the executor goes on."""
    path = str(tmp_path / "attempts")
    bad = executor.submit(tasks.crash, path)
    good = [executor.submit(tasks.double, n) for n in range(100)]
    assert [future.result() for future in good] == list(range(0, 200, 2))
    error = bad.exception()
    assert isinstance(error, WorkerLostError)
    assert error.signal == signal.SIGABRT
    assert error.attempts == 3
    assert Path(path).read_text().splitlines() == ["begun"] * 3


def test_lost_attempt_is_run_again(executor: BatchExecutor, tmp_path: Path) -> None:
    """A task whose process died is run again and has the result of the second attempt."""
    future = executor.submit(tasks.crash_unless_first, str(tmp_path / "mark"))
    assert future.result() == "second attempt"
    assert future.attempts == 2


def _pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def test_min_workers_are_there_before_the_first_task() -> None:
    """``min_workers`` processes start with the executor and stay although nothing is to do."""
    with BatchExecutor(3, min_workers=2, idle_timeout=0.2) as executor:
        until(lambda: executor.stats().workers.slots >= 2)
        # Two at a time, as one after the other they might all run in the same process.
        first = set(executor.map(_pid_after, [0.3, 0.3]))
        threading.Event().wait(1.0)
        assert set(executor.map(_pid_after, [0.3, 0.3])) & first


def test_idle_workers_stop_and_come_back() -> None:
    """After ``idle_timeout`` nothing is left but the executor, which still works."""
    with BatchExecutor(2, idle_timeout=0.2) as executor:
        executor.submit(tasks.double, 1).result()
        processes = descendants()
        assert processes
        assert_gone(processes)
        assert executor.submit(tasks.double, 2).result() == 4


def test_stats_count_tasks_and_workers(single: BatchExecutor, signals: Signals) -> None:
    """``stats`` says what runs, what waits and what became of the rest."""
    assert single.stats().workers.slots == 0
    running = single.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    until(running.running)
    queued = [single.submit(tasks.double, n) for n in range(3)]
    stats = single.stats()
    assert stats.tasks.running == 1
    assert stats.tasks.waiting + stats.tasks.sent == 3
    assert stats.workers.busy == 1
    assert queued[-1].cancel()
    bad = single.submit(tasks.refuse, "no")
    signals.release()
    wait([running, bad, *queued])
    stats = single.stats()
    assert (stats.tasks.running, stats.tasks.waiting, stats.tasks.sent) == (0, 0, 0)
    assert (stats.tasks.succeeded, stats.tasks.failed, stats.tasks.cancelled) == (3, 1, 1)


# Options.


def test_view_with_a_timeout_kills_what_runs_longer(
    single: BatchExecutor, signals: Signals
) -> None:
    """A task past its timeout fails with a ``TimeoutError``; its process is replaced."""
    view = single.with_options(timeout=0.3)
    future = view.submit(tasks.hold, signals.told, signals.gate)
    error = future.exception(PATIENCE)
    assert isinstance(error, TaskTimeoutError)
    assert isinstance(error, TimeoutError)
    assert single.submit(tasks.double, 1).result() == 2
    assert list(view.map(tasks.double, range(3))) == [0, 2, 4]


def test_view_without_retries_runs_once_at_most(single: BatchExecutor, tmp_path: Path) -> None:
    """With ``retries=0`` a task that kills its process has had one attempt."""
    path = str(tmp_path / "attempts")
    view = single.with_options(retries=0)
    error = view.submit(tasks.crash, path).exception()
    assert isinstance(error, WorkerLostError)
    assert error.attempts == 1
    assert Path(path).read_text() == "begun\n"


def test_view_is_an_executor_of_its_own(executor: BatchExecutor) -> None:
    """Shutting a view down leaves the executor, and the other views, alone."""
    with executor.with_options(retries=1) as view:
        assert isinstance(view, Executor)
        assert view.submit(tasks.double, 1).result() == 2
    assert executor.with_options(timeout=5.0).submit(tasks.double, 2).result() == 4
    assert executor.submit(tasks.double, 3).result() == 6


# cancel() and running()


def test_cancelled_queued_task_never_runs(
    single: BatchExecutor, signals: Signals, tmp_path: Path
) -> None:
    """``cancel`` of what waits returns True, and it leaves no trace."""
    busy = single.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    futures = [single.submit(tasks.touch, str(tmp_path / f"never{n}")) for n in range(200)]
    assert all(future.cancel() for future in futures)
    assert all(future.cancelled() and future.done() for future in futures)
    assert all(future.cancel() for future in futures)
    signals.release()
    busy.result()
    single.submit(tasks.double, 1).result()
    assert not list(tmp_path.glob("never*"))
    with pytest.raises(CancelledError):
        futures[0].result()
    with pytest.raises(CancelledError):
        futures[0].exception()


def test_cancelled_task_that_was_sent_ahead_never_runs(
    single: BatchExecutor, signals: Signals, tmp_path: Path
) -> None:
    """Tasks that wait on the worker, behind one thought to be short, can be cancelled too."""
    list(single.map(tasks.touch_or_hold, [str(tmp_path / f"quick{n}") for n in range(500)]))
    busy = single.submit(tasks.touch_or_hold, "", signals.told, signals.gate)
    futures = [single.submit(tasks.touch_or_hold, str(tmp_path / f"never{n}")) for n in range(500)]
    signals.wait()
    assert single.stats().tasks.sent > 0
    assert all(future.cancel() for future in futures)
    settle()
    signals.release()
    busy.result()
    single.submit(tasks.double, 1).result()
    assert not list(tmp_path.glob("never*"))


def test_tasks_behind_stragglers_run_once(executor: BatchExecutor, tmp_path: Path) -> None:
    """What was sent behind a task that takes its time is taken back, unless it has begun."""
    path, count = str(tmp_path / "ran"), 20_000
    chance = random.Random(5)
    pauses = [chance.uniform(0.01, 0.02) * (chance.random() < 0.02) for _ in range(count)]
    lines = [str(number) for number in range(count)]
    list(executor.map(tasks.append_and_dawdle, [path] * count, lines, pauses))
    ran = Counter(Path(path).read_text().split())
    assert {line: times for line, times in ran.items() if times != 1} == {}
    assert set(ran) == set(lines)


@pytest.mark.parametrize("turn", [0.005, 2e-6])
def test_cancel_that_returns_true_is_true(
    executor: BatchExecutor, tmp_path: Path, turn: float, restless: Callable[[float], None]
) -> None:
    """While short tasks rush by, each one either ran or was cancelled, never both."""
    list(executor.map(tasks.touch, [str(tmp_path / f"quick{n}") for n in range(300)]))
    restless(turn)  # threads take turns after so many seconds
    paths = [str(tmp_path / str(n)) for n in range(2000)]
    futures = [executor.submit(tasks.touch, path) for path in paths]
    futures[20].result()
    cancelled = [future.cancel() for future in futures]
    executor.shutdown()
    assert any(cancelled)
    assert [future.cancelled() for future in futures] == cancelled
    ran = [os.path.exists(path) for path in paths]
    both = sum(map(operator.and_, cancelled, ran))
    assert both == 0, f"{both} of {sum(cancelled)} ran although cancel() had returned True"
    assert all(map(operator.or_, cancelled, ran))


def test_running_task_is_not_cancelled(single: BatchExecutor, signals: Signals) -> None:
    """``running`` turns true when a worker has begun; then ``cancel`` returns False."""
    future = single.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    until(future.running)
    assert not future.cancel()
    assert not future.cancelled()
    assert not future.done()
    signals.release()
    assert isinstance(future.result(), int)
    assert not future.running()
    assert not future.cancel()


def test_queued_task_is_not_running(single: BatchExecutor, signals: Signals) -> None:
    """Only as many futures are running as there are workers."""
    futures = [single.submit(tasks.hold, signals.told, signals.gate) for _ in range(5)]
    signals.wait()
    until(futures[0].running)
    assert [future.running() for future in futures] == [True, False, False, False, False]
    signals.release(5)
    wait(futures)


def test_running_task_can_be_killed(
    single: BatchExecutor, signals: Signals, tmp_path: Path
) -> None:
    """``cancel(running=True)`` ends the process that runs the task; the next task gets another."""
    future = single.submit(
        tasks.hold_then_touch, signals.told, signals.gate, str(tmp_path / "never")
    )
    signals.wait()
    until(future.running)
    queued = single.submit(os.getpid)
    assert future.cancel(running=True)
    assert future.cancelled()
    with pytest.raises(CancelledError):
        future.result()
    assert queued.result() in [process.pid for process in descendants()]
    signals.release()
    assert not (tmp_path / "never").exists()


# Callbacks.


def test_callbacks_run_in_order_with_the_future(executor: BatchExecutor) -> None:
    """Callbacks run in the order of adding, each with the future; late ones at once."""
    calls: list[tuple[str, Future[int]]] = []
    future = executor.submit(tasks.double, 1)
    last = threading.Event()
    for name in "abc":
        future.add_done_callback(lambda done, name=name: calls.append((name, done)))
    future.add_done_callback(lambda done: last.set())
    assert last.wait(PATIENCE)
    assert calls == [(name, future) for name in "abc"]
    future.add_done_callback(lambda done: calls.append(("late", done)))
    assert calls[-1] == ("late", future)


def test_callback_that_raises_is_logged(
    executor: BatchExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """What a callback raises is logged; the other callbacks run."""
    future = executor.submit(tasks.double, 1)
    last = threading.Event()
    future.add_done_callback(lambda done: 1 // 0)
    future.add_done_callback(lambda done: last.set())
    assert last.wait(PATIENCE)
    until(lambda: caplog.records)
    assert caplog.records[0].name == "concurrent.futures"
    assert "ZeroDivisionError" in caplog.text


def test_callback_may_submit_and_wait(executor: BatchExecutor) -> None:
    """A callback that submits a task and blocks on it gets its result."""
    nested: Future[int] = Future()

    def submit_more(done: Future[int]) -> None:
        nested.set_result(executor.submit(tasks.double, done.result()).result(PATIENCE))

    executor.submit(tasks.double, 1).add_done_callback(submit_more)
    assert nested.result(PATIENCE) == 4


def test_blocked_callback_holds_up_no_result(executor: BatchExecutor) -> None:
    """While a callback blocks, other tasks run and their results arrive."""
    go_on = threading.Event()
    executor.submit(tasks.double, 1).add_done_callback(lambda done: go_on.wait(PATIENCE))
    try:
        assert list(executor.map(tasks.double, range(50), timeout=PATIENCE)) == [*range(0, 100, 2)]
    finally:
        go_on.set()


def test_callback_of_a_cancelled_future_runs(single: BatchExecutor, signals: Signals) -> None:
    """``cancel`` runs the callbacks, and wakes whoever waits."""
    busy = single.submit(tasks.hold, signals.told, signals.gate)
    queued = single.submit(tasks.double, 1)
    seen: list[bool] = []
    queued.add_done_callback(lambda done: seen.append(done.cancelled()))
    assert queued.cancel()
    assert seen == [True]
    assert wait([queued]).done == {queued}
    signals.release()
    busy.result()


def test_tasks_chained_by_callbacks_all_run(executor: BatchExecutor) -> None:
    """A thousand tasks, each submitted by the callback of the one before."""
    end: Future[int] = Future()

    def go_on(done: Future[int]) -> None:
        value = done.result()
        if value >= 1000:
            end.set_result(value)
        else:
            executor.submit(tasks.add, value, 1).add_done_callback(go_on)

    executor.submit(tasks.add, 0, 1).add_done_callback(go_on)
    assert end.result(PATIENCE) == 1000


# wait() and as_completed()


def test_wait_returns_when_it_is_told_to(signals: Signals, executor: BatchExecutor) -> None:
    """The first result, the first exception, the time that is up, or all."""
    held = executor.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    good = executor.submit(tasks.double, 1)
    assert wait([held, good], return_when=FIRST_COMPLETED).done == {good}
    assert wait([held, good], timeout=0.01, return_when=ALL_COMPLETED).not_done == {held}
    bad = executor.submit(tasks.refuse, "no")
    done, not_done = wait([held, bad], return_when=FIRST_EXCEPTION)
    assert (done, not_done) == ({bad}, {held})
    signals.release()
    assert wait([held, good, bad]) == ({held, good, bad}, set())


def test_as_completed_yields_in_the_order_of_completion(
    signals: Signals, executor: BatchExecutor
) -> None:
    """Futures come as they finish, those that are done first; the timeout is one for all."""
    held = executor.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    others = [executor.submit(tasks.double, n) for n in range(20)]
    iterator = as_completed([held, *others])
    found = [next(iterator) for _ in others]
    assert set(found) == set(others)
    with pytest.raises(TimeoutError, match=r"1 \(of 21\) futures unfinished"):
        list(as_completed([held, *others], timeout=0.01))
    signals.release()
    assert list(iterator) == [held]


def test_futures_of_several_executors_mix(executor: BatchExecutor) -> None:
    """``wait`` takes futures of this executor and of others together."""
    with concurrent.futures.ThreadPoolExecutor(1) as threads:
        futures = [executor.submit(tasks.double, 1), threads.submit(tasks.double, 2)]
        assert {future.result() for future in as_completed(futures)} == {2, 4}


# Threads, executors, asyncio.


def test_sixteen_threads_share_an_executor(executor: BatchExecutor) -> None:
    """Threads may submit, map and wait at the same time; each gets its own results."""

    def use(number: int) -> list[int]:
        futures = [executor.submit(tasks.add, number, n) for n in range(100)]
        mapped = list(executor.map(tasks.add, [number] * 50, range(50)))
        return [future.result(PATIENCE) for future in futures] + mapped

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        for number, found in enumerate(threads.map(use, range(16))):
            assert found == [number + n for n in [*range(100), *range(50)]]


def test_eight_executors_at_once() -> None:
    """Executors do not disturb each other, and are shut down in any order."""
    executors = [BatchExecutor(1) for _ in range(8)]
    futures = [made.submit(tasks.add, n, 1) for n, made in enumerate(executors)]
    for made in executors[::2]:
        made.shutdown()
    assert [future.result() for future in futures] == list(range(1, 9))
    assert [made.submit(tasks.double, 4).result() for made in executors[1::2]] == [8] * 4
    for made in executors[1::2]:
        made.shutdown()


def test_executors_one_after_another() -> None:
    """Twenty executors, each used once and shut down."""
    for number in range(20):
        with BatchExecutor(1) as executor:
            assert executor.submit(tasks.double, number).result() == 2 * number


def test_asyncio_awaits_tasks(executor: BatchExecutor) -> None:
    """``run_in_executor`` and ``wrap_future`` give results and exceptions."""

    async def main() -> list[Any]:
        loop = asyncio.get_running_loop()
        first = loop.run_in_executor(executor, tasks.double, 1)
        second = asyncio.wrap_future(executor.submit(tasks.refuse, "no"))
        third = [loop.run_in_executor(executor, tasks.double, n) for n in range(50)]
        return await asyncio.gather(first, second, *third, return_exceptions=True)

    one, error, *rest = asyncio.run(main())
    assert one == 2
    assert isinstance(error, RuntimeError)
    assert rest == list(range(0, 100, 2))


def test_asyncio_cancels_tasks(single: BatchExecutor, signals: Signals, tmp_path: Path) -> None:
    """Cancelling the awaiting side cancels what has not begun."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        busy = loop.run_in_executor(single, tasks.hold, signals.told, signals.gate)
        queued = loop.run_in_executor(single, tasks.touch, str(tmp_path / "never"))
        await loop.run_in_executor(None, signals.wait)
        queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await asyncio.shield(busy)
        signals.release()
        await busy

    asyncio.run(main())
    assert single.submit(tasks.double, 1).result() == 2
    assert not (tmp_path / "never").exists()


# What is left.


def test_executor_that_is_dropped_finishes_its_work(tmp_path: Path) -> None:
    """Without ``shutdown`` the garbage collector ends it: work done, no process, no thread."""
    executor = BatchExecutor(2)
    futures = [executor.submit(tasks.touch, str(tmp_path / str(n))) for n in range(20)]
    futures[0].result()
    processes = descendants()
    assert processes
    del executor
    gc.collect()
    assert [future.result(PATIENCE) for future in futures]
    assert_gone(processes)
    assert len(os.listdir(tmp_path)) == 20


def test_nothing_is_left_after_shutdown() -> None:
    """No thread, process, socket directory or open file stays behind."""

    def use() -> None:
        with BatchExecutor(2) as executor:
            executor.submit(bytes.swapcase, bytes(2_000_000)).result()
            ended = threading.Event()
            executor.submit(tasks.double, 1).add_done_callback(lambda done: ended.set())
            assert ended.wait(PATIENCE)

    def open_files() -> list[str]:
        found = []
        for name in os.listdir("/dev/fd"):
            try:
                found.append(os.readlink(f"/dev/fd/{name}"))
            except OSError:
                pass  # that of the listing itself
        return found

    use()  # what gRPC opens once and keeps
    before, threads = open_files(), threading.enumerate()
    for _ in range(5):
        use()
    until(lambda: len(open_files()) <= len(before))
    until(lambda: len(threading.enumerate()) <= len(threads))
    assert not descendants()


def test_pending_work_is_finished_at_the_end_of_the_interpreter(
    client: StartClient, tmp_path: Path
) -> None:
    """A program that ends without ``shutdown`` finishes its tasks first, and prints nothing."""
    path = str(tmp_path / "lines")
    script = """
import sys, contract_tasks as tasks
from cloudexec import BatchExecutor
executor = BatchExecutor(2)
futures = [executor.submit(tasks.append, sys.argv[1], str(n)) for n in range(100)]
"""
    code, out, err = client(script, path).end()
    assert (code, out, err) == (0, "", "")
    assert sorted(map(int, Path(path).read_text().split())) == list(range(100))


def test_end_of_the_interpreter_keeps_what_tasks_need(client: StartClient) -> None:
    """Output, callbacks and large payloads of the last tasks still arrive at the end."""
    script = """
import sys
from cloudexec import BatchExecutor
executor = BatchExecutor(1)
def shout(data):
    print("task", flush=True)
    return data[::-1]
def done(future):
    print("callback", len(future.result()), flush=True)
executor.submit(shout, bytes(5_000_000)).add_done_callback(done)
"""
    code, out, err = client(script).end()
    assert (code, err) == (0, "")
    assert sorted(out.splitlines()) == ["callback 5000000", "task"]


@pytest.mark.parametrize(
    ("ending", "expected"), [("sys.exit(3)", 3), ("raise LookupError('mine')", 1)]
)
def test_exit_code_is_the_programs_own(
    client: StartClient, tmp_path: Path, ending: str, expected: int
) -> None:
    """``sys.exit`` and an exception end as they always do, with the work done."""
    path = str(tmp_path / "lines")
    script = f"""
import sys, contract_tasks as tasks
from cloudexec import BatchExecutor
executor = BatchExecutor(1)
future = executor.submit(tasks.append, sys.argv[1], "ran")
{ending}
"""
    code, out, err = client(script, path).end()
    assert (code, out) == (expected, "")
    assert err == "" if expected == 3 else err.endswith("LookupError: mine\n")
    assert Path(path).read_text() == "ran\n"


def test_submit_at_the_end_of_the_interpreter_raises(client: StartClient) -> None:
    """An ``atexit`` function can no longer submit, and is told so."""
    script = """
import atexit, contract_tasks as tasks
from cloudexec import BatchExecutor
executor = BatchExecutor(1)
@atexit.register
def last():
    for each in (executor, BatchExecutor(1)):
        try:
            each.submit(tasks.double, 1)
        except RuntimeError as error:
            print(error)
print(executor.submit(tasks.double, 1).result())
"""
    code, out, err = client(script).end()
    assert (code, err) == (0, "")
    assert (
        out.splitlines() == ["2"] + ["cannot schedule new futures after interpreter shutdown"] * 2
    )


@pytest.mark.parametrize(
    "use",
    [
        "with executor: executor.submit(pow, 2, 3).result()",
        "executor.submit(pow, 2, 3).result()",
        "executor.submit(pow, 2, 3).result(); executor.shutdown()",
        "executor.submit(pow, 2, 3).result(); executor.shutdown(wait=False)",
        "executor.submit(pow, 2, 3).result(); del executor",
        "list(executor.map(abs, range(1000))); executor.shutdown()",
        "executor.shutdown()",
        "executor.submit(pow, 2, 3); executor.kill_workers()",
    ],
)
def test_clean_exit_prints_nothing(client: StartClient, use: str) -> None:
    """However an executor was used and ended, the program ends silently."""
    script = f"""
import sys, logging, warnings
logging.basicConfig(level=logging.INFO)
warnings.simplefilter("default")
from cloudexec import BatchExecutor
executor = BatchExecutor(2)
{use}
"""
    assert client(script).end() == (0, "", "")


_INTERRUPTED = {
    "with": "with executor:\n    submit().result()",
    "leaving with": "with executor:\n    submit()",
    "without": "submit().result()",
    "shutdown": "submit(); executor.shutdown()",
    "at exit": "submit()",
    "map": "list(executor.map(tasks.hold, [told] * 3, [gate] * 3))",
    "as_completed": "list(concurrent.futures.as_completed([submit()]))",
    "wait": "with executor:\n    concurrent.futures.wait([submit()])",
    "main thread busy": "submit()\nwhile True: pass",
    "asyncio": """
async def main():
    loop = asyncio.get_running_loop()
    await asyncio.gather(
        *(loop.run_in_executor(executor, tasks.hold, told, gate) for _ in range(3))
    )
asyncio.run(main())
""",
}


@pytest.mark.parametrize("where", list(_INTERRUPTED))
def test_interrupt_ends_the_client_and_all_it_started(
    client: StartClient, signals: Signals, where: str
) -> None:
    """Ctrl-C while a task runs: ``KeyboardInterrupt`` within seconds, and no process left."""
    script = f"""
import asyncio, concurrent.futures, sys, contract_tasks as tasks
from cloudexec import BatchExecutor
told, gate = sys.argv[1:]
executor = BatchExecutor(2)
def submit():
    for n in range(10):
        future = executor.submit(tasks.hold, told, gate)
    return future
{_INTERRUPTED[where]}
"""
    started = client(script, signals.told, signals.gate)
    signals.wait(2)
    started.look()
    assert len(started.seen) >= 3
    began = time.monotonic()
    started.signal(signal.SIGINT)
    code, out, err = started.end()
    assert time.monotonic() - began < 8
    assert out == ""
    assert "KeyboardInterrupt" in err
    assert "Exception in thread" not in err
    if where != "at exit":
        assert code == -signal.SIGINT
        assert "Exception ignored" not in err


def test_interrupt_that_is_caught_and_repeated_ends_the_client(
    client: StartClient, signals: Signals
) -> None:
    """A program that catches Ctrl-C and ends waits for its tasks; a second Ctrl-C ends that."""
    script = """
import sys, contract_tasks as tasks
from cloudexec import BatchExecutor
executor = BatchExecutor(1)
future = executor.submit(tasks.hold, *sys.argv[1:])
try:
    future.result()
except KeyboardInterrupt:
    print("caught", flush=True)
    tasks.tell(sys.argv[1], "caught")
"""
    started = client(script, signals.told, signals.gate)
    signals.wait()
    started.look()
    started.signal(signal.SIGINT)
    assert signals.wait() == ["caught"]
    started.signal(signal.SIGINT)
    _, out, _ = started.end()
    assert out == "caught\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_killed_client_leaves_no_process(
    client: StartClient, signals: Signals, number: signal.Signals
) -> None:
    """Workers end when their client does, whatever ended it."""
    script = """
import sys, contract_tasks as tasks
from cloudexec import BatchExecutor
executor = BatchExecutor(2, orphan_timeout=1.0)
for _ in range(5):
    future = executor.submit(tasks.hold, *sys.argv[1:])
future.result()
"""
    started = client(script, signals.told, signals.gate)
    signals.wait(2)
    started.look()
    started.signal(number)
    code, _, _ = started.end()
    assert code == -number


# os.fork()


_FORK = """
import os, sys, contract_tasks as tasks
from cloudexec import BatchExecutor
executor = BatchExecutor(2)
print(executor.submit(tasks.double, 1).result(), flush=True)
busy = executor.submit(tasks.hold, *sys.argv[1:])
pid = os.fork()
if pid == 0:
{child}
print("child", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
tasks.append(sys.argv[2], ".")
print(type(busy.result()).__name__, executor.submit(tasks.double, 2).result(), flush=True)
executor.shutdown()
"""
_CHILDREN = {
    "sys.exit": ("    sys.exit(5)", "", 5),
    "end": ("    print('end', flush=True)\n    raise SystemExit", "end\n", 0),
    "exception": ("    raise LookupError", "", 1),
    "os._exit": ("    os._exit(6)", "", 6),
    "exec": ("    os.execl('/bin/sh', 'sh', '-c', 'exit 4')", "", 4),
    "use": (
        """
    for use in (executor.submit, executor.map):
        try:
            use(tasks.double, [1])
        except RuntimeError as error:
            print("refused", "fork" in str(error), flush=True)
    executor.shutdown()
    sys.exit(0)
""",
        "refused True\nrefused True\n",
        0,
    ),
    "new executor": (
        """
    with BatchExecutor(1) as mine:
        print("new", mine.submit(tasks.double, 5).result(), flush=True)
    sys.exit(0)
""",
        "new 10\n",
        0,
    ),
    "collect": (
        """
    import gc
    del executor, busy
    gc.collect()
    sys.exit(0)
""",
        "",
        0,
    ),
}


@pytest.mark.parametrize("kind", list(_CHILDREN))
def test_forked_child_ends_and_the_parent_goes_on(
    client: StartClient, signals: Signals, kind: str
) -> None:
    """A child that was forked in mid-use can end; using an executor in it is refused clearly."""
    child, prints, code = _CHILDREN[kind]
    script = _FORK.format(child=child)
    found = client(script, signals.told, signals.gate).end()
    assert found[1] == f"2\n{prints}child {code}\nint 4\n"
    assert found[0] == 0
    if kind == "exception":
        assert "\nLookupError\n" in found[2]
    else:
        ours = [line for line in found[2].splitlines() if "DeprecationWarning" not in line]
        assert [line for line in ours if "os.fork()" not in line] == []


def test_no_executor_starts_in_a_process_forked_from_one_with_grpc(client: StartClient) -> None:
    """That cannot start anew there: the child is told what to do instead."""
    script = """
import os, contract_tasks as tasks
from cloudexec import BatchExecutor
if __name__ == "__main__":
    with BatchExecutor(1, listen="127.0.0.1:0") as executor:
        executor.submit(tasks.double, 1).result()
        pid = os.fork()
        if not pid:
            try:
                BatchExecutor(1).submit(tasks.double, 5)
            except RuntimeError as error:
                print("forked" in str(error), "spawn" in str(error), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)
"""
    code, out, _ = client(script).end()
    assert (code, out) == (0, "True True\n")


def test_forking_pool_works_beside_an_executor(client: StartClient) -> None:
    """``multiprocessing`` with the fork method works in a client in mid-use."""
    script = """
import multiprocessing, contract_tasks as tasks
from cloudexec import BatchExecutor
if __name__ == "__main__":
    with BatchExecutor(1) as executor:
        executor.submit(tasks.double, 1).result()
        with multiprocessing.get_context("fork").Pool(2) as pool:
            print(pool.map(tasks.double, range(3)))
        process = multiprocessing.get_context("fork").Process(target=tasks.double, args=(1,))
        process.start()
        process.join()
        print(process.exitcode, executor.submit(tasks.double, 2).result())
"""
    code, out, _ = client(script).end()
    assert (code, out) == (0, "[0, 2, 4]\n0 4\n")


# The client's own state.


def test_client_stays_as_it_is(client: StartClient) -> None:
    """Signal handlers, random numbers, hooks, logging and environment are the user's."""
    script = """
import gc, logging, os, random, signal, sys, tempfile, threading, warnings
import contract_tasks as tasks
def look():
    return {
        "signals": {n: signal.getsignal(n) for n in signal.valid_signals()},
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "wakeup": signal.set_wakeup_fd(-1),
        "random": random.getstate(),
        "hooks": (sys.excepthook, threading.excepthook, sys.unraisablehook, sys.displayhook),
        "trace": (sys.gettrace(), sys.getprofile()),
        "logging": (list(logging.root.handlers), logging.root.level, logging.root.disabled),
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "path": list(sys.path),
        "arguments": list(sys.argv),
        "umask": (os.umask(0o22), os.umask(0o22)),
        "streams": (sys.stdin, sys.stdout, sys.stderr),
        "filters": list(warnings.filters),
        "switch": sys.getswitchinterval(),
        "recursion": sys.getrecursionlimit(),
        "gc": (gc.isenabled(), gc.get_threshold(), list(gc.callbacks)),
        "group": (os.getpgid(0), os.getsid(0)),
        "temporary": tempfile.gettempdir(),
    }
random.seed(1)
before = look()
from cloudexec import BatchExecutor
def use():
    with BatchExecutor(2, initializer=tasks.set_up, initargs=("x",)) as executor:
        list(executor.map(tasks.double, range(100)))
        executor.submit(len, bytes(1_000_000)).result()
        during = look()
        executor.submit(tasks.leave, 3).exception()
    return during
during = use()
after = look()
for name in before:
    for when, state in (("during", during), ("after", after)):
        if state[name] != before[name]:
            print(name, when, before[name], state[name])
for name in ("cloudexec", "grpc", "asyncio", "concurrent.futures"):
    logger = logging.getLogger(name)
    handlers = [h for h in logger.handlers if not isinstance(h, logging.NullHandler)]
    if handlers or logger.level or not logger.propagate:
        print(name, handlers, logger.level, logger.propagate)
"""
    code, out, err = client(script).end()
    assert (code, out, err) == (0, "", "")


def test_seeded_program_draws_the_same_numbers(executor: BatchExecutor) -> None:
    """Using the executor draws nothing from the client's random numbers."""
    random.seed(7)
    expected = [random.random() for _ in range(3)]
    random.seed(7)
    found = []
    for _ in range(3):
        executor.submit(tasks.double, 1).result()
        found.append(random.random())
    assert found == expected


def test_workers_do_not_share_random_numbers() -> None:
    """Two processes draw different numbers, although both come from one template."""
    with BatchExecutor(2, max_tasks_per_child=1) as executor:
        futures = [executor.submit(tasks.draw) for _ in range(6)]
        assert len({future.result() for future in futures}) == 6


def test_output_of_tasks_appears_in_the_client(client: StartClient) -> None:
    """What tasks print comes out of the client, whole, on the same stream."""
    script = """
import os, sys
from cloudexec import BatchExecutor
def speak():
    print("\\u00e9" * 50_000)
    print("to stderr", file=sys.stderr)
    os.write(1, b"raw\\n")
    os.system("echo from a child")
if __name__ == "__main__":
    with BatchExecutor(1) as executor:
        executor.submit(speak).result()
"""
    code, out, err = client(script).end()
    assert code == 0
    assert sorted(out.splitlines()) == ["from a child", "raw", "\u00e9" * 50_000]
    assert err == "to stderr\n"


def test_main_module_is_not_run_again(client: StartClient, tmp_path: Path) -> None:
    """Functions of the main script travel by value: no ``if __name__`` guard is needed."""
    script = """
import sys, contract_tasks as tasks
from cloudexec import BatchExecutor
tasks.append(sys.argv[1], "main")
class Point:
    def __init__(self, x):
        self.x = x
def move(point):
    return Point(point.x + 1)
with BatchExecutor(1) as executor:
    moved = executor.submit(move, Point(1)).result()
    print(isinstance(moved, Point), moved.x)
"""
    path = str(tmp_path / "lines")
    assert client(script, path).end() == (0, "True 2\n", "")
    assert Path(path).read_text() == "main\n"


def test_constructor_refuses_what_makes_no_sense() -> None:
    """Arguments out of range are a ``ValueError``, of the wrong type a ``TypeError``."""
    for wrong in ({"max_workers": 0}, {"max_workers": -1}, {"max_tasks_per_child": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            BatchExecutor(**wrong)
    with pytest.raises(TypeError):
        BatchExecutor(initializer=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        BatchExecutor(max_tasks_per_child=1.5)  # type: ignore[arg-type]
    assert BatchExecutor()._max_workers >= 1


def test_stale_results_do_not_pile_up(executor: BatchExecutor) -> None:
    """A future's result is freed with the future; the executor keeps none."""
    future = executor.submit(_Something, 1)
    reference = weakref.ref(future.result())
    del future
    until(lambda: (gc.collect(), reference() is None)[1])


def test_arguments_are_freed_in_the_worker(single: BatchExecutor) -> None:
    """A worker does not keep the arguments or the result of a task that is done."""
    single.submit(_remember, _Something(1)).result()
    assert single.submit(_is_forgotten).result()


_remembered: list[weakref.ref[Any]] = []


def _remember(thing: _Something) -> _Something:
    import contract_tasks

    contract_tasks.REMEMBERED = weakref.ref(thing)  # type: ignore[attr-defined]
    return thing


def _is_forgotten() -> bool:
    import contract_tasks

    gc.collect()
    return contract_tasks.REMEMBERED() is None  # type: ignore[attr-defined]


def test_payload_error_is_a_pickling_error() -> None:
    """Code that catches ``PicklingError`` around a process pool goes on to work."""
    assert issubclass(PayloadError, pickle.PicklingError)


def test_python_is_new_enough() -> None:
    """These tests use what Python 3.11 has."""
    assert sys.version_info >= (3, 11)
    assert psutil.Process().is_running()


def test_arguments_may_stand_where_a_process_pool_has_them() -> None:
    """``ProcessPoolExecutor(2, context, initializer, initargs)`` works with the other name."""
    context = multiprocessing.get_context("spawn")

    def greet(greeting: str) -> None:
        os.environ["GREETING"] = greeting

    with BatchExecutor(1, context, greet, ("hello",)) as executor:
        assert executor.submit(lambda: os.environ["GREETING"]).result(PATIENCE) == "hello"
