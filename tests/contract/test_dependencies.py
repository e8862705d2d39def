"""Futures as arguments of calls: what waits for what, and what becomes of it."""

from __future__ import annotations

import dataclasses
import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any

import contract_tasks as tasks
import pytest
from contract_helpers import PATIENCE, Client, Signals, until

from cloudexec import (
    BatchExecutor,
    BrokenBatchExecutor,
    DependencyError,
    PayloadError,
    WorkerLostError,
)

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("nothing_left")]

StartClient = Callable[..., Client]


@pytest.fixture
def executor() -> Iterator[BatchExecutor]:
    with BatchExecutor(2) as made:
        yield made


@dataclasses.dataclass
class Pair:
    left: Any
    right: Any


class Holder:
    """An object of the user's own, with whatever in it."""

    def __init__(self, content: Any) -> None:
        self.content = content

    def contained(self) -> Any:
        return self.content


# Where a future may be.


def test_a_future_as_an_argument_becomes_its_value(executor: BatchExecutor) -> None:
    first = executor.submit(tasks.double, 2)
    second = executor.submit(tasks.add, first, y=executor.submit(tasks.double, first))
    assert second.result(PATIENCE) == 12


def test_futures_are_found_wherever_they_are_nested(executor: BatchExecutor) -> None:
    """In lists, tuples, dicts, sets, dataclasses, the user's objects, and partial functions."""
    one, two = executor.submit(int, 1), executor.submit(int, 2)
    args, kwargs = executor.submit(
        tasks.echo, [one, (two, {"key": one})], {two, 7}, pair=Pair(one, [two])
    ).result(PATIENCE)
    assert args == ([1, (2, {"key": 1})], {2, 7})
    assert kwargs == {"pair": Pair(1, [2])}
    assert executor.submit(Holder.contained, Holder([two])).result(PATIENCE) == [2]
    assert executor.submit(functools.partial(tasks.add, one), two).result(PATIENCE) == 3
    assert executor.submit(Holder(one).contained).result(PATIENCE) == 1


def test_items_of_map_may_be_or_hold_futures(executor: BatchExecutor) -> None:
    items = [executor.submit(tasks.double, i) for i in range(20)]
    assert list(executor.map(tasks.double, items, timeout=PATIENCE)) == list(range(0, 80, 4))
    pairs = executor.map(tasks.add, items, [10] * 20, chunksize=7, timeout=PATIENCE)
    assert list(pairs) == list(range(10, 50, 2))


def test_the_same_future_twice_in_a_call_is_one_object_there(executor: BatchExecutor) -> None:
    future = executor.submit(list, "ab")
    assert executor.submit(_are_same, future, [future]).result(PATIENCE)


def _are_same(one: object, others: list[object]) -> bool:
    return all(other is one for other in others)


def test_futures_of_views_are_the_executors_own(executor: BatchExecutor) -> None:
    view = executor.with_options(retries=0, timeout=PATIENCE)
    assert executor.submit(tasks.double, view.submit(tasks.double, 1)).result(PATIENCE) == 4
    assert view.submit(tasks.double, executor.submit(tasks.double, 1)).result(PATIENCE) == 4


def test_any_future_of_the_standard_library_is_a_dependency(executor: BatchExecutor) -> None:
    """Whoever completes it, and whenever."""
    bare: Future[int] = Future()
    late = executor.submit(tasks.add, bare, bare)
    with ThreadPoolExecutor(1) as threads, BatchExecutor(1) as other:
        assert executor.submit(tasks.double, threads.submit(int, 3)).result(PATIENCE) == 6
        assert executor.submit(tasks.double, other.submit(int, 4)).result(PATIENCE) == 8
        there_and_back = executor.submit(tasks.double, other.submit(tasks.double, late))
        bare.set_result(5)
        assert there_and_back.result(PATIENCE) == 40


@pytest.mark.parametrize("read", [False, True])
def test_a_future_that_is_done_will_do(executor: BatchExecutor, read: bool) -> None:
    """Whether its result was looked at or not."""
    future = executor.submit(list, "abc")
    until(future.done)
    if read:
        assert future.result() == ["a", "b", "c"]
    assert executor.submit(len, future).result(PATIENCE) == 3
    assert executor.submit(tasks.echo, [future], key=future).result(PATIENCE) == (
        ([["a", "b", "c"]],),
        {"key": ["a", "b", "c"]},
    )


def test_large_values_pass_from_call_to_call(executor: BatchExecutor) -> None:
    """As results that arrive through a channel of their own, with and without buffers."""
    numpy = pytest.importorskip("numpy")
    data = executor.submit(bytes, 3_000_000)
    array = executor.submit(numpy.arange, 500_000)
    small = executor.submit(int, 1)
    assert executor.submit(_sizes, data, array, [small], data).result(PATIENCE) == (
        [3_000_000, 500_000, 1, 3_000_000],
        True,
    )
    beside = numpy.ones(200_000)
    assert executor.submit(_sizes, small, beside, array).result(PATIENCE)[0] == [
        1,
        200_000,
        500_000,
    ]


@pytest.mark.parametrize("size", [100_000, 3_000_000], ids=["copied", "mapped"])
def test_large_values_of_another_executor_are_not_taken_for_ones_of_this(
    executor: BatchExecutor, size: int
) -> None:
    """Both number what they hold; before and after the value is there."""
    with BatchExecutor(1) as other:
        ours = [executor.submit(sum, bytes([n]) * size) for n in range(5)]
        assert [each.result(PATIENCE) for each in ours] == [n * size for n in range(5)]
        theirs = [other.submit(_repeated, n, size) for n in range(5)]
        early = [executor.submit(sum, each) for each in theirs]
        until(lambda: all(each.done() for each in theirs))
        late = [executor.submit(sum, each) for each in theirs]
        for futures in (early, late):
            assert [each.result(PATIENCE) for each in futures] == [n * size for n in range(5)]
        assert theirs[4].result() == bytearray([4]) * size


def _repeated(value: int, size: int) -> bytearray:
    return bytearray([value]) * size


def _sizes(*values: Any) -> tuple[list[int], bool]:
    writeable = all(value.flags.writeable for value in values if hasattr(value, "flags"))
    return [value if isinstance(value, int) else len(value) for value in values], writeable


def test_arguments_beside_a_future_are_pickled_at_submit(executor: BatchExecutor) -> None:
    """Changing them while the call waits changes nothing."""
    bare: Future[int] = Future()
    beside = [1]
    call = executor.submit(tasks.echo, bare, beside)
    beside.append(2)
    bare.set_result(0)
    assert call.result(PATIENCE)[0] == (0, [1])


def test_a_future_inside_a_closure_or_a_result_is_refused(executor: BatchExecutor) -> None:
    """Only arguments are looked through; the error says what to do."""
    future = executor.submit(int, 1)
    error = executor.submit(lambda: future).exception(PATIENCE)
    assert isinstance(error, PayloadError)
    assert "pass it as an argument" in str(error)
    assert isinstance(executor.submit(Future).exception(PATIENCE), PayloadError)


# What goes wrong.


def test_a_failed_dependency_fails_the_call_without_running_it(
    executor: BatchExecutor, tmp_path: Any
) -> None:
    path = str(tmp_path / "ran")
    failing = executor.submit(tasks.divide, 1, 0)
    call = executor.submit(tasks.append, path, [executor.submit(int, 1), failing])
    with pytest.raises(
        DependencyError, match=r"tasks.append.*argument 1, item 1 failed.*Zero"
    ) as e:
        call.result(PATIENCE)
    assert isinstance(e.value.__cause__, ZeroDivisionError)
    assert e.value.dependency == "argument 1, item 1"
    assert "divide" in str(e.value.__cause__.__cause__)  # the remote traceback
    assert not (tmp_path / "ran").exists()
    keyword = executor.submit(tasks.echo, key=Holder(failing)).exception(PATIENCE)
    assert isinstance(keyword, DependencyError)
    assert keyword.dependency == "dependency 1 of 1"


def test_what_failed_first_is_the_cause_however_far_away(executor: BatchExecutor) -> None:
    bare: Future[int] = Future()
    first = executor.submit(tasks.double, bare)
    last = functools.reduce(lambda f, _: executor.submit(tasks.double, f), range(10), first)
    bare.set_exception(error := OSError("gone"))
    for call in (first, last):
        assert isinstance(call.exception(PATIENCE), DependencyError)
        assert getattr(call.exception(), "__cause__", None) is error
    assert "argument 0 failed" in str(first.exception())
    assert "was not run either" in str(last.exception())
    # Submitted after the fact, on a failure that was read.
    assert isinstance(executor.submit(tasks.double, last).exception(PATIENCE), DependencyError)


def test_a_call_whose_process_died_fails_what_depends_on_it(executor: BatchExecutor) -> None:
    view = executor.with_options(retries=0)
    call = executor.submit(tasks.double, view.submit(tasks.leave, 3))
    error = call.exception(PATIENCE)
    assert isinstance(error, DependencyError)
    assert isinstance(error.__cause__, WorkerLostError)
    assert executor.submit(int, 1).result(PATIENCE) == 1


def test_a_call_that_cannot_be_pickled_fails_what_depends_on_it(executor: BatchExecutor) -> None:
    call = executor.submit(tasks.double, executor.submit(tasks.echo, threading.Lock()))
    assert isinstance(call.exception(PATIENCE), DependencyError)
    bare: Future[Any] = Future()
    call = executor.submit(tasks.echo, bare)
    bare.set_result(threading.Lock())
    error = call.exception(PATIENCE)
    assert isinstance(error, DependencyError)
    assert isinstance(error.__cause__, PayloadError)


def test_a_lost_attempt_of_a_dependent_gets_its_inputs_again(
    executor: BatchExecutor, tmp_path: Any
) -> None:
    path = executor.submit(str, tmp_path / "first")
    assert executor.submit(tasks.crash_unless_first, path).result(PATIENCE) == "second attempt"


# Cancelling.


def test_cancelling_a_call_cancels_what_depends_on_it(executor: BatchExecutor) -> None:
    bare: Future[int] = Future()
    first = executor.submit(tasks.double, bare)
    second = executor.submit(tasks.double, [first])
    third = executor.submit(tasks.double, second)
    assert first.cancel()
    for call in (second, third):
        with pytest.raises(CancelledError):
            call.result(PATIENCE)
    assert not bare.cancelled()
    late = executor.submit(tasks.double, third)
    until(late.cancelled)
    until(lambda: executor.stats().tasks.cancelled == 4)
    assert executor.stats().tasks.held == 0


def test_cancelling_a_waiting_call_leaves_its_dependencies_alone(
    signals: Signals, executor: BatchExecutor
) -> None:
    running = executor.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    call = executor.submit(tasks.double, running)
    until(lambda: executor.stats().tasks.held == 1)
    assert call.cancel()
    assert call.cancelled()
    assert executor.stats().tasks.held == 0
    signals.release()
    assert running.result(PATIENCE) > 0


def test_killing_a_running_call_cancels_what_depends_on_it(
    signals: Signals, executor: BatchExecutor
) -> None:
    running = executor.submit(tasks.hold, signals.told, signals.gate)
    call = executor.submit(tasks.double, running)
    signals.wait()
    assert running.cancel(running=True)
    until(call.cancelled)


def test_a_cancelled_foreign_future_cancels(executor: BatchExecutor) -> None:
    bare: Future[int] = Future()
    call = executor.submit(tasks.double, bare)
    bare.cancel()
    until(call.cancelled)


# The end of the executor.


def test_shutdown_finishes_what_waits_for_others(signals: Signals) -> None:
    executor = BatchExecutor(1)
    running = executor.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    last = executor.submit(tasks.double, executor.submit(tasks.double, executor.submit(int, 3)))
    bare: Future[int] = Future()
    foreign = executor.submit(tasks.double, executor.submit(tasks.double, bare))
    executor.shutdown(wait=False)
    signals.release()
    assert running.result(PATIENCE)
    bare.set_result(1)
    executor.shutdown()
    assert (last.result(0), foreign.result(0)) == (12, 4)


def test_shutdown_with_cancel_futures_cancels_what_waits_for_others(signals: Signals) -> None:
    """What runs is finished, and brings nothing else to run."""
    executor = BatchExecutor(1)
    running = executor.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    waiting = [executor.submit(tasks.double, running)]
    waiting += [executor.submit(tasks.double, waiting[0]), executor.submit(tasks.double, Future())]
    executor.shutdown(wait=False, cancel_futures=True)
    for call in waiting:
        with pytest.raises(CancelledError):
            call.result(PATIENCE)
    signals.release()
    executor.shutdown()
    assert running.result(0)


def test_ctrl_c_cancels_what_waits_for_others() -> None:
    executor = BatchExecutor(1)
    call = executor.submit(tasks.double, executor.submit(tasks.double, Future()))
    executor.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert call.cancelled()


def test_a_broken_executor_breaks_what_waits_for_others(signals: Signals) -> None:
    executor = BatchExecutor(1)
    running = executor.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    calls = [executor.submit(tasks.double, running), executor.submit(tasks.double, Future())]
    calls.append(executor.submit(tasks.double, calls[0]))
    with BatchExecutor(1) as other:
        elsewhere = other.submit(tasks.double, calls[2])
        executor.kill_workers()
        for call in (running, *calls):
            assert isinstance(call.exception(PATIENCE), BrokenBatchExecutor)
        error = elsewhere.exception(PATIENCE)
        assert isinstance(error, DependencyError)
        assert isinstance(error.__cause__, BrokenBatchExecutor)


def test_an_executor_that_nobody_holds_finishes_what_waits() -> None:
    bare: Future[int] = Future()
    executor = BatchExecutor(1)
    call = executor.submit(tasks.double, executor.submit(tasks.double, bare))
    del executor
    gc.collect()
    bare.set_result(2)
    assert call.result(PATIENCE) == 8


@pytest.mark.parametrize("completed", [True, False])
def test_the_end_of_the_interpreter_does_not_hang(client: StartClient, completed: bool) -> None:
    """What can be finished is; what waits for a future that nobody is left to complete is not."""
    script = f"""if True:
        import threading, time
        from concurrent.futures import Future
        from cloudexec import BatchExecutor

        executor = BatchExecutor(1)
        bare = Future()
        call = executor.submit(abs, executor.submit(abs, bare))
        call.add_done_callback(lambda call: print(call.cancelled() or call.result()))
        if {completed}:
            threading.Thread(target=lambda: (time.sleep(1.5), bare.set_result(-4))).start()
    """
    code, out, err = client(script).end()
    assert (code, out.strip(), err) == (0, "4" if completed else "True", "")


# Size.


def test_a_chain_of_many_thousand_calls_neither_recurses_nor_lingers(
    executor: BatchExecutor,
) -> None:
    """Succeeding, failing, and cancelled."""
    bare: Future[int] = Future()
    for outcome in ("failed", "cancelled"):
        first = call = executor.submit(tasks.double, bare)
        for _ in range(100_000):
            call = executor.submit(tasks.double, call)
        if outcome == "failed":
            bare.set_exception(OSError("gone"))
            assert isinstance(call.exception(PATIENCE), DependencyError)
            bare = Future()
        else:
            first.cancel()
            with pytest.raises(CancelledError):
                call.result(PATIENCE)
        del first, call
    call = executor.submit(int, 0)
    for _ in range(2_000):
        call = executor.submit(tasks.add, call, 1)
    assert call.result(PATIENCE) == 2_000


def test_ten_thousand_futures_may_go_into_one_call(executor: BatchExecutor) -> None:
    futures = [executor.submit(tasks.double, i) for i in range(10_000)]
    assert executor.submit(sum, futures).result(PATIENCE) == 99_990_000
    wide = [executor.submit(tasks.add, futures[0], i) for i in range(10_000)]
    assert executor.submit(sum, wide).result(PATIENCE) == 49_995_000


def test_a_result_that_nobody_needs_any_more_is_freed(
    signals: Signals, executor: BatchExecutor
) -> None:
    """A future that waits for nothing is held by nobody but its user."""
    first = executor.submit(bytes, 1000)
    gate = executor.submit(tasks.hold, signals.told, signals.gate)
    second = executor.submit(len, first)
    third = executor.submit(tasks.add, second, gate)
    gone = [weakref.ref(first), weakref.ref(second)]
    del first, second
    signals.wait()
    until(lambda: [reference() for reference in gone] == [None, None])
    signals.release()
    assert third.result(PATIENCE) == 1000 + gate.result(PATIENCE)
