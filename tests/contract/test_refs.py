"""Handles: what was put, and results that stay on their workers."""

from __future__ import annotations

import copy
import functools
import gc
import os
import pickle
import signal
import threading
from pathlib import Path
from typing import Any

import contract_tasks
import numpy as np
import object_tasks as tasks
import psutil
import pytest
from contract_helpers import Signals, descendants, supervisors, until
from test_objects import MIB, PATIENCE, settled, start, store_of

from cloudexec import (
    BatchExecutor,
    Local,
    ObjectOptions,
    PayloadTooLargeError,
    Ref,
    RefLostError,
    stage,
)

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("nothing_left")]
MODES = ("local", "far")  # "wire" and "several" are what these are made of


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def begin(mode: str, workers: int = 2, **options: Any) -> BatchExecutor:
    """As ``start``; "far": several workers, each elsewhere."""
    if mode == "far":
        return start("wire", workers, launcher=Local(slots_per_worker=1), **options)
    return start(mode, workers, **options)


def kill_workers() -> None:
    for worker in supervisors():
        worker.kill()


# What was put.


def test_a_handle_stands_for_its_value_wherever_it_is_among_arguments(mode: str) -> None:
    """Alone, in containers and objects, as a keyword, and more than once."""
    array = np.arange(300_000.0)
    expected = float(array.sum())
    with begin(mode) as executor:
        ref = executor.put(array)
        small = executor.put(5)
        both = executor.put([array, 5])
        submit = executor.submit
        assert submit(tasks.total, ref).result(PATIENCE) == expected
        assert submit(tasks.total, ref, ref).result(PATIENCE) == 2 * expected
        held = {"a": [tasks.Holder(ref, 1), (ref, small)], "b": {"c": both}}
        assert submit(tasks.total_of_held, held).result(PATIENCE) == 3 * expected + 11
        assert submit(tasks.total_of_held, held=both).result(PATIENCE) == expected + 5
        assert submit(pow, small, 2).result(PATIENCE) == 25
        many = executor.map(tasks.total_of_held, [ref, both, [small]])
        assert list(many) == [expected, expected + 5, 5.0]
        after = submit(tasks.add, submit(tasks.total, ref), small, small)
        assert after.result(PATIENCE) == expected + 10
        assert executor.stats().bytes_sent < 2.3 * array.nbytes


def test_in_a_closure_or_a_global_a_handle_stays_one(mode: str) -> None:
    """There get() gives its value, the same object each time."""
    array = np.arange(300_000)
    with begin(mode, initializer=tasks.set_up, initargs=(None,)) as executor:
        ref = executor.put(array)

        def task() -> tuple[str, int, bool]:
            return type(ref).__name__, int(ref.get().sum()), ref.get() is ref.get()

        assert executor.submit(task).result(PATIENCE) == ("Ref", int(array.sum()), True)
        kept = executor.with_options(keep=True).submit(tasks.filled, 300_000).result(PATIENCE)
        assert executor.submit(lambda: int(kept.get().sum())).result(PATIENCE) == 300_000
    with begin("local") as first:
        ref = first.put(array)
        with begin(mode, initializer=tasks.set_up, initargs=(ref,)) as executor:
            found = executor.submit(lambda: int(tasks.SETTING.get().sum()))
            assert found.result(PATIENCE) == int(array.sum())


def test_in_a_small_closure_a_handle_stays_one_too(mode: str) -> None:
    """However small the function is that it is in, and if that is an argument itself."""
    with begin(mode) as executor:
        ref = executor.put(5)
        submit = executor.submit
        assert submit(lambda: (type(ref), ref.get())).result(PATIENCE) == (Ref, 5)
        assert submit(lambda x: (ref.get(), x), ref).result(PATIENCE) == (5, 5)
        assert submit(tasks.called, lambda x: (ref.get(), x), 1).result(PATIENCE) == (5, 1)
        bound = functools.partial(lambda x, y: (ref.get(), x, y), executor.put(6))
        assert submit(bound, 7).result(PATIENCE) == (5, 6, 7)
        assert list(executor.map(bound, [7, 8])) == [(5, 6, 7), (5, 6, 8)]


def test_what_is_bound_to_a_callable_is_an_argument(mode: str) -> None:
    """A handle or a future in a partial function, a method's object, or one that is called."""
    array = np.ones(300_000)
    with begin(mode) as executor:
        ref, two = executor.put(array), executor.submit(int, 2)
        bound = tasks.Bound([ref])
        for fn in (functools.partial(tasks.total, ref), bound.add, bound):
            assert executor.submit(fn, two).result(PATIENCE) == 300_002
            assert list(executor.map(fn, [1, two, 3])) == [300_001, 300_002, 300_003]
            assert list(executor.map(fn, [1, two], chunksize=2)) == [300_001, 300_002]
            assert stage(fn, name="total")(1).run(executor) == 300_001
        waits = functools.partial(tasks.total, executor.submit(tasks.slow_total, array))
        assert list(executor.map(waits, [1, 2])) == [300_001, 300_002]
        assert executor.stats().bytes_sent < 2.5 * array.nbytes


def test_a_handle_of_another_executor_stands_for_its_value_too(mode: str) -> None:
    """Put there, or kept by a worker there."""
    array = np.arange(300_000.0)
    with begin("local") as other, begin(mode) as executor:
        put, small = other.put(array), other.put("abc")
        kept = other.with_options(keep=True).submit(tasks.grow, put)
        assert executor.submit(tasks.total, put).result(PATIENCE) == array.sum()
        assert executor.submit(tasks.total, kept).result(PATIENCE) == array.sum() + 300_000
        assert executor.submit(tasks.total, kept.result()).result(PATIENCE) == array.sum() + 300_000
        assert executor.submit(len, small).result(PATIENCE) == 3


def test_a_handle_that_is_lost_fails_the_call_that_takes_it() -> None:
    """Not the one who submits it; and calls beside it run."""
    with begin("local") as other, begin("local") as executor:
        lost = other.with_options(keep=True).submit(tasks.filled, 3 * MIB).result(PATIENCE)
        other.shutdown()
        assert isinstance(executor.submit(tasks.total, lost).exception(PATIENCE), RefLostError)
        results = executor.map(tasks.total, [1, lost, 3])
        assert next(results) == 1
        with pytest.raises(RefLostError):
            next(results)


def test_a_handle_in_a_handle_and_as_a_result() -> None:
    """A handle that is put is one to a handle; a task may hand one back."""
    array = np.arange(300_000.0)
    with begin("local") as executor:
        ref = executor.put(array)
        nested = executor.put([ref])
        (inner,) = nested.get()
        assert isinstance(inner, Ref)
        assert inner.get().sum() == array.sum()
        assert executor.submit(lambda refs: refs[0].get().sum(), nested).result(PATIENCE) == (
            array.sum()
        )
        back = executor.submit(lambda: ref).result(PATIENCE)
        assert isinstance(back, Ref)
        assert np.array_equal(back.get(), array)
        assert executor.submit(tasks.total, back).result(PATIENCE) == array.sum()


def test_a_handle_in_the_executor_of_a_task() -> None:
    """What a task was given, it can hand on."""
    array = np.arange(300_000.0)
    with begin("local") as executor:
        ref = executor.put(array)
        assert executor.submit(tasks.nested_executor, ref).result(PATIENCE) == array.sum()

        def in_closure() -> float:
            return tasks.nested_executor(ref)

        assert executor.submit(in_closure).result(PATIENCE) == array.sum()


def test_in_a_graph_a_handle_is_its_value() -> None:
    """As an argument of stages, and as the result of those that keep theirs."""
    grow, total = stage(tasks.grow), stage(tasks.total)
    kept = stage(tasks.grow, keep=True)
    with begin("wire") as executor:
        ref = executor.put(np.ones(300_000))
        assert total(grow(ref)).run(executor) == 600_000
        assert total(kept(kept(ref))).run(executor) == 900_000
        handle = kept(ref).run(executor)
        assert isinstance(handle, Ref)
        assert executor.submit(tasks.total, handle).result(PATIENCE) == 600_000


@pytest.mark.parametrize("keep", [None, False])
def test_what_only_other_stages_need_stays_where_it_is(keep: bool | None) -> None:
    """Three arrays of 2.4 MB are made, one after the other; none of them comes to the client."""
    grow, total = stage(tasks.grow, keep=keep), stage(tasks.total)
    with begin("wire") as executor:
        ref = executor.put(np.ones(300_000))
        assert total(grow(grow(grow(ref)))).run(executor) == 1_200_000
        came = executor.stats().bytes_received
        assert came < MIB if keep is None else came > 3 * 2 * MIB


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [5, np.arange(300_000), b"x" * 3 * MIB, [np.ones(20_000)]])
def test_a_handle_can_be_pickled_by_its_user(protocol: int, value: Any) -> None:
    """With its value, as it would be in a worker; it is then good without its executor."""
    with begin("local") as executor:
        back = pickle.loads(pickle.dumps(executor.put(value), protocol))
    assert isinstance(back, Ref)
    assert np.array_equal(back.get(), value)
    assert np.array_equal(pickle.loads(pickle.dumps(back)).get(), value)


def test_copies_of_a_handle_are_handles_to_the_same() -> None:
    """Nothing is moved to copy one, deep or not."""
    with begin("wire") as executor:
        ref = executor.with_options(keep=True).submit(tasks.filled, 3 * MIB).result(PATIENCE)
        assert copy.copy(ref) is ref
        assert copy.deepcopy([ref])[0] is ref
        assert executor.stats().bytes_received < MIB


def test_a_handle_says_what_it_is(mode: str) -> None:
    """Its size, and that it is one; it is true whatever it stands for."""
    with begin(mode) as executor:
        ref = executor.put(np.ones(MIB))
        assert repr(ref).startswith("<Ref of 838")
        assert ref
        assert executor.put(0)
        assert ref.size > 8 * MIB
        kept = executor.with_options(keep=True).submit(tasks.filled, 3 * MIB).result(PATIENCE)
        assert kept.size > 3 * MIB


def test_what_was_put_outlives_the_executor() -> None:
    """What is kept on a worker does not, and says so."""
    with begin("local") as executor:
        ref = executor.put(np.arange(300_000))
        kept = executor.with_options(keep=True).submit(tasks.filled, 3 * MIB).result(PATIENCE)
        small = executor.with_options(keep=True).submit(pow, 2, 5).result(PATIENCE)
        brought = executor.with_options(keep=True).submit(tasks.filled, 3 * MIB).result(PATIENCE)
        assert brought.get().sum() == 3 * MIB
    assert ref.get().sum() == np.arange(300_000).sum()
    assert small.get() == 32
    with pytest.raises(RefLostError):
        kept.get()
    with pytest.raises(RuntimeError):
        executor.put(1)


def test_who_waits_for_a_value_when_the_executor_ends_learns_of_it(signals: Signals) -> None:
    """get() does not wait for ever."""
    executor = begin("wire", workers=1)
    ref = executor.with_options(keep=True).submit(tasks.filled, 3 * MIB).result(PATIENCE)
    (worker,) = supervisors()
    for process in (worker, *worker.children(recursive=True)):
        process.suspend()
    with pytest.raises(TimeoutError):
        ref.get(timeout=0.2)
    errors: list[BaseException] = []

    def get() -> None:
        try:
            ref.get()
        except BaseException as exc:
            errors.append(exc)

    thread = threading.Thread(target=get)
    thread.start()
    executor.kill_workers()
    thread.join(20)
    assert not thread.is_alive()
    assert isinstance(errors[0], RefLostError)


# What stays on the workers.


def test_a_chain_of_kept_results_does_not_visit_the_client(mode: str) -> None:
    """Twenty tasks, each taking the result of the one before; none of it comes here."""
    with begin(mode, workers=1) as executor:
        keep = executor.with_options(keep=True)
        result: Any = keep.submit(tasks.filled, 4 * MIB, 0)
        for _ in range(20):
            result = keep.submit(tasks.grow, result)
        ref = result.result(PATIENCE)
        assert isinstance(ref, Ref)
        assert executor.submit(tasks.total, ref).result(PATIENCE) == 20 * 4 * MIB
        assert executor.stats().bytes_received < MIB
        assert executor.stats().bytes_sent < MIB
        value = ref.get()
        assert value.sum() == 20 * 4 * MIB
        value[:] = 0
        assert ref.get().sum() == 20 * 4 * MIB
        assert executor.submit(tasks.total, ref).result(PATIENCE) == 20 * 4 * MIB


@pytest.mark.parametrize("size", [10, 70_000, 200_000, MIB, 3 * MIB])
def test_a_kept_result_of_any_size_reaches_other_workers(mode: str, size: int) -> None:
    """Each worker takes what the others have."""
    with begin(mode, workers=3) as executor:
        keep = executor.with_options(keep=True)
        refs = [keep.submit(tasks.filled, size, value).result(PATIENCE) for value in range(3)]
        futures = [executor.submit(tasks.total, *refs) for _ in range(12)]
        assert {future.result(PATIENCE) for future in futures} == {3.0 * size}
        assert [int(ref.get()[-1]) for ref in refs] == [0, 1, 2]


def test_kept_results_that_nobody_refers_to_are_freed(mode: str) -> None:
    """The memory and the files of the worker go back."""
    with begin(mode, workers=1) as executor:
        keep = executor.with_options(keep=True)
        keep.submit(tasks.filled, 3 * MIB).result(PATIENCE)
        (worker,) = supervisors()

        def files() -> int:
            return len(os.listdir(f"/proc/{worker.pid}/fd"))

        def shared() -> int:
            held = 0
            for name in os.listdir(f"/proc/{worker.pid}/fd"):
                path = f"/proc/{worker.pid}/fd/{name}"
                try:
                    if "cloudexec-objects" in os.readlink(path):
                        held += os.stat(path).st_blocks * 512
                except OSError:
                    pass
            return held

        until(lambda: shared() < MIB)
        before = files()
        refs = [keep.submit(tasks.filled, 3 * MIB, n).result(PATIENCE) for n in range(20)]
        refs += [keep.submit(tasks.filled, 200_000, n).result(PATIENCE) for n in range(20)]
        assert shared() >= 63 * MIB
        assert files() >= before + 20
        refs.clear()
        gc.collect()
        until(lambda: files() <= before + 2)
        until(lambda: shared() < 5 * MIB)
        assert executor._driver is not None
        (session,) = executor._driver.sessions.values()
        until(lambda: not session.told._known_blobs)


def test_more_kept_results_than_memory_go_to_the_disk_of_the_worker(mode: str) -> None:
    """And are as good from there."""
    options = ObjectOptions(worker_memory="16MiB")
    with begin(mode, workers=1, objects=options) as executor:
        keep = executor.with_options(keep=True)
        refs = [keep.submit(tasks.filled, 3 * MIB, value).result(PATIENCE) for value in range(20)]
        (worker,) = supervisors()
        held = 0
        for name in os.listdir(f"/proc/{worker.pid}/fd"):
            path = f"/proc/{worker.pid}/fd/{name}"
            try:
                if "memfd:cloudexec-objects" in os.readlink(path):
                    held += os.stat(path).st_blocks * 512
            except OSError:
                pass
        assert held <= 24 * MIB
        totals = [executor.submit(tasks.total, ref) for ref in refs]
        assert [each.result(PATIENCE) for each in totals] == [3.0 * MIB * n for n in range(20)]
        assert [int(ref.get()[-1]) for ref in refs] == list(range(20))


# Workers that end.


def test_what_a_killed_worker_kept_is_made_again(mode: str, tmp_path: Path) -> None:
    """And all that was lost and is needed for it; each once."""
    counted = str(tmp_path / "calls")
    with begin(mode) as executor:
        keep = executor.with_options(keep=True)
        first = keep.submit(tasks.filled_and_note, counted, 3 * MIB, 1).result(PATIENCE)
        second = keep.submit(tasks.add_and_note, counted, first, first).result(PATIENCE)
        small = keep.submit(tasks.add_and_note, counted, first, 5)
        third = keep.submit(tasks.add_and_note, counted, second, small).result(PATIENCE)
        assert os.path.getsize(counted) == 4
        kill_workers()
        futures = [executor.submit(tasks.total, third) for _ in range(6)]
        assert {future.result(PATIENCE) for future in futures} == {8.0 * 3 * MIB}
        assert third.get()[0] == 8
        assert first.get()[0] == 1
        assert os.path.getsize(counted) <= 8
        assert executor.submit(tasks.total, second, first).result(PATIENCE) == 9 * MIB


def test_of_a_chain_of_kept_results_only_the_last_stays(mode: str) -> None:
    """What it takes to make it again is known all the same, from the first call on."""
    with begin(mode) as executor:
        keep = executor.with_options(keep=True)
        last = keep.submit(tasks.filled, 3 * MIB)
        for _ in range(20):
            last = keep.submit(tasks.grow, last)
        ref = last.result(PATIENCE)
        del last
        assert executor._driver is not None
        sessions = executor._driver.sessions
        until(lambda: sum(len(each.told.kept_blobs()) for each in sessions.values()) == 1)
        kill_workers()
        assert executor.submit(tasks.total, ref).result(PATIENCE) == 21 * 3 * MIB
        assert ref.get(PATIENCE)[0] == 21
        until(lambda: sum(len(each.told.blobs()) for each in sessions.values()) <= 1)


def test_on_loss_raise_says_so(mode: str) -> None:
    """To who asks for it, and to tasks that take it."""
    with begin(mode) as executor:
        keep = executor.with_options(keep=True, on_loss="raise")
        ref = keep.submit(tasks.filled, 3 * MIB).result(PATIENCE)
        middling = keep.submit(tasks.filled, 100_000).result(PATIENCE)
        kill_workers()
        for each in (ref, middling):
            with pytest.raises(RefLostError, match="on_loss"):
                executor.submit(tasks.total, each).result(PATIENCE)
            with pytest.raises(RefLostError, match="on_loss"):
                each.get(PATIENCE)
        assert executor.submit(pow, 2, 3).result(PATIENCE) == 8


def test_what_cannot_be_made_again_fails_with_its_reason(mode: str, tmp_path: Path) -> None:
    """The second time its task raises: who needs the result learns what."""
    marker = str(tmp_path / "marker")

    def once() -> Any:
        contract_tasks.touch(marker)
        return np.ones(400_000)

    with begin(mode) as executor:
        ref = executor.with_options(keep=True).submit(once).result(PATIENCE)
        kill_workers()
        with pytest.raises(FileExistsError):
            executor.submit(tasks.total, ref).result(PATIENCE)
        assert executor.submit(pow, 2, 3).result(PATIENCE) == 8


def test_whoever_copies_what_cannot_be_made_again_learns_its_reason(tmp_path: Path) -> None:
    """Also one that an executor that has shut down could raise as well."""
    marker = str(tmp_path / "marker")

    def once() -> Any:
        if os.path.exists(marker):
            raise RuntimeError("not twice")
        contract_tasks.touch(marker)
        return np.ones(400_000)

    with begin("wire", 1) as executor:
        ref = executor.with_options(keep=True).submit(once).result(PATIENCE)
        kill_workers()
        with pytest.raises(RuntimeError, match="not twice"):
            pickle.dumps(ref)


def test_a_worker_that_ends_in_order_hands_over_what_it_keeps(mode: str, tmp_path: Path) -> None:
    """Ended for want of work, its results are not made again."""
    counted = str(tmp_path / "calls")
    with begin(mode, idle_timeout=0.3) as executor:
        keep = executor.with_options(keep=True)
        refs = [
            keep.submit(tasks.filled_and_note, counted, size, value).result(PATIENCE)
            for value, size in enumerate((3 * MIB, 200_000, 70_000, 10))
        ]
        until(lambda: not supervisors())
        assert [int(ref.get()[-1]) for ref in refs] == [0, 1, 2, 3]
        futures = [executor.submit(tasks.total, ref) for ref in refs]
        assert [future.result(PATIENCE) for future in futures] == [0.0, 200_000, 140_000, 30]
        assert os.path.getsize(counted) == 4


@pytest.mark.parametrize(
    "options", [{"max_tasks_per_worker": 6}, {"max_worker_lifetime": 0.7}], ids=["tasks", "time"]
)
def test_a_worker_that_is_replaced_hands_over_what_it_keeps(
    mode: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """Also what tasks return while it is ending; nothing is run twice."""
    counted = str(tmp_path / "calls")
    with begin(mode, **options) as executor:
        keep = executor.with_options(keep=True)
        futures = [
            keep.submit(tasks.filled_and_note, counted, 2 * MIB + 100_000 * (n % 2), n)
            for n in range(12)
        ]
        chain = [keep.submit(tasks.grow, future) for future in futures]
        totals = [executor.submit(tasks.total, each) for each in chain]
        for n, total in enumerate(totals):
            size = 2 * MIB + 100_000 * (n % 2)
            assert total.result(PATIENCE) == (n + 1) * size
        for n, future in enumerate(futures):
            assert future.result(PATIENCE).get()[-1] == n
        assert os.path.getsize(counted) == 12
        assert executor.stats().lost_attempts == 0


def test_a_worker_that_its_platform_ends_hands_over_what_it_keeps(
    mode: str, tmp_path: Path
) -> None:
    """SIGTERM, as on a spot notice: results move here before it goes."""
    counted = str(tmp_path / "calls")
    with begin(mode) as executor:
        keep = executor.with_options(keep=True)
        refs = [
            keep.submit(tasks.filled_and_note, counted, 3 * MIB, n).result(PATIENCE)
            for n in range(6)
        ]
        old = supervisors()
        for worker in old:
            worker.send_signal(signal.SIGTERM)
        psutil.wait_procs(old, timeout=PATIENCE)
        assert [int(ref.get()[-1]) for ref in refs] == list(range(6))
        futures = [executor.submit(tasks.total, ref) for ref in refs]
        assert [future.result(PATIENCE) for future in futures] == [3.0 * MIB * n for n in range(6)]
        assert os.path.getsize(counted) == 6


def test_shutdown_does_not_wait_for_what_is_kept(mode: str) -> None:
    """Nobody can ask for it any more."""
    with begin(mode) as executor:
        keep = executor.with_options(keep=True)
        refs = [keep.submit(tasks.filled, 3 * MIB) for _ in range(4)]
        until(lambda: all(each.done() for each in refs))
        processes = descendants()
        executor.shutdown(wait=False)
        _, alive = psutil.wait_procs(processes, timeout=10)
        assert not alive
    assert isinstance(refs[0].result(), Ref)


def test_a_pool_that_shrinks_while_others_need_its_results(tmp_path: Path) -> None:
    """Shutting down, idle workers end while tasks still take what these kept."""
    counted = str(tmp_path / "calls")
    with begin("far", workers=3, idle_timeout=0.2) as executor:
        keep = executor.with_options(keep=True)
        made = [keep.submit(tasks.filled_and_note, counted, 3 * MIB, n) for n in range(6)]
        slow = keep.submit(_later, made[0])
        last = executor.submit(tasks.total, slow, *made)
        executor.shutdown(wait=False)
        assert last.result(PATIENCE) == 3.0 * MIB * 15
        assert os.path.getsize(counted) == 6


def _later(value: Any) -> Any:
    import time

    time.sleep(1.5)
    return value


# Limits.


def test_a_kept_result_that_does_not_fit_here_is_an_error_here_alone() -> None:
    """It stays where it is, and tasks there take it."""
    options = ObjectOptions(memory="8MiB", spill_directory=False, cache=0)
    with begin("wire", workers=1, objects=options) as executor:
        ref = executor.with_options(keep=True).submit(tasks.filled, 20 * MIB).result(PATIENCE)
        for _ in range(3):
            with pytest.raises(PayloadTooLargeError):
                ref.get(PATIENCE)
        assert executor.submit(tasks.total, ref).result(PATIENCE) == 20 * MIB
        settled(executor)


def test_many_kept_results_and_their_ends_leave_nothing(mode: str) -> None:
    """Nothing adds up on either side."""
    with begin(mode) as executor:
        keep = executor.with_options(keep=True)
        for _ in range(3):
            refs = list(keep.map(tasks.filled, [100_000, 2 * MIB] * 30, [1] * 60))
            totals = executor.map(tasks.total, refs)
            assert sum(totals) == 30 * (100_000 + 2 * MIB)
            values = [ref.get() for ref in refs[:10]]
            assert sum(map(np.sum, values)) == 5 * (100_000 + 2 * MIB)
            refs.clear()
            values.clear()
        settled(executor)
        assert executor._driver is not None
        for session in executor._driver.sessions.values():
            until(lambda session=session: not (session.told._known_blobs or session.payloads))
        assert not executor._driver.keeper._pulls
        assert not executor._driver.keeper._remaking
        assert store_of(executor).memory == 0
