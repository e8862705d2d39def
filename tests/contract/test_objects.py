"""Large arguments and results: once per worker, shared, bounded, and whole whatever happens."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import object_tasks as tasks
import psutil
import pytest
from contract_helpers import Signals, descendants, supervisors, until

from cloudexec import (
    BatchExecutor,
    Local,
    ObjectOptions,
    PayloadError,
    PayloadTooLargeError,
    TaskTimeoutError,
    WorkerLostError,
)

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("nothing_left")]
MIB = 1024 * 1024
MODES = ("local", "wire", "several")
PATIENCE = 60.0
GLOBAL: Any = None


def start(mode: str, workers: int = 2, **options: Any) -> BatchExecutor:
    """Start an executor whose workers map the client's memory, are elsewhere, or are several."""
    if mode != "local":
        options.setdefault("launcher", Local(slots_per_worker=1 if mode == "several" else None))
    if mode == "wire":
        options["listen"] = "127.0.0.1:0"
    return BatchExecutor(workers, **options)


def store_of(executor: BatchExecutor) -> Any:
    assert executor._driver is not None
    return executor._driver.store


def settled(executor: BatchExecutor, most: int = 0) -> None:
    """Wait until the client holds nothing but what may come again."""
    store = store_of(executor)

    def done() -> bool:
        gc.collect()
        store.forget_cached()
        return bool(store.memory <= most and not store.disk)

    until(done)


several = pytest.mark.parametrize("mode", MODES)
"""For what may differ where each process has a worker of its own."""


@pytest.fixture(params=MODES[:2])
def mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# Once.


def _by_argument(array: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return tasks.total, (array,)


def _in_containers(array: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return tasks.total_of_held, ({"a": [tasks.Holder(array)], "b": ()},)


def _by_closure(array: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return lambda: float(array.sum()), ()


def _by_default(array: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    def total(value: Any = array) -> float:
        return float(value.sum())

    return total, ()


def _by_global(array: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    scope: dict[str, Any] = {"GLOBAL": array, "__name__": "__main__"}
    exec("def total(): return float(GLOBAL.sum())", scope)
    return scope["total"], ()


def _by_method(array: Any) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    return tasks.Holder(array).array.sum, ()


_ROUTES = (_by_argument, _in_containers, _by_closure, _by_default, _by_global, _by_method)


@several
def test_the_same_content_reaches_each_worker_once(mode: str) -> None:
    """Whatever way it comes, and however many tasks take it."""
    # Kept until the next one comes: on a busy machine all tasks may be done before the next call.
    with start(mode, objects=ObjectOptions(cache="10MiB")) as executor:
        for number, route in enumerate(_ROUTES):
            array = np.arange(MIB, dtype=np.float64) + number
            before = executor.stats().bytes_sent
            fn, args = route(array)
            futures = [executor.submit(fn, *args) for _ in range(50)]
            fn, args = route(array.copy())
            futures += [executor.submit(fn, *args) for _ in range(50)]
            assert {float(future.result(PATIENCE)) for future in futures} == {float(array.sum())}
            sent = executor.stats().bytes_sent - before
            assert sent < (1.1 if mode == "wire" else 0.2) * array.nbytes, route
            del futures, fn, args
        assert store_of(executor).high < 2.2 * array.nbytes


@several
def test_the_same_content_by_all_routes_is_sent_once(mode: str) -> None:
    """Initializer's arguments, closures, arguments: one blob."""
    array = np.arange(MIB, dtype=np.float64)
    with start(mode, initializer=tasks.set_up, initargs=(array,)) as executor:
        expected = float(array.sum())
        assert set(executor.map(tasks.total_of_setting, range(20))) == {expected}
        assert executor.submit(lambda: float(array.sum())).result(PATIENCE) == expected
        assert executor.submit(tasks.total, array.copy()).result(PATIENCE) == expected
        ref = executor.put({"deep": [array]})
        assert executor.submit(tasks.total_of_held, ref).result(PATIENCE) == expected
        assert store_of(executor).high < 1.1 * array.nbytes
        assert executor.stats().bytes_sent < (1.1 if mode == "wire" else 0.2) * array.nbytes


def test_each_worker_fetches_its_own_copy_over_the_wire() -> None:
    """Two workers elsewhere: twice, not two hundred times."""
    array = np.arange(MIB, dtype=np.float64)
    launcher = Local(slots_per_worker=1)
    with start("wire", launcher=launcher) as executor:
        futures = [executor.submit(tasks.total, array) for _ in range(200)]
        assert {future.result(PATIENCE) for future in futures} == {float(array.sum())}
        assert executor.stats().bytes_sent < 2.2 * array.nbytes


@pytest.mark.parametrize("size", [20_000, 400_000], ids=["copied", "mapped"])
def test_who_writes_into_an_argument_harms_nobody(mode: str, size: int) -> None:
    """Neither the tasks beside it and behind it, nor the client's own."""
    array = np.ones(size)
    with start(mode) as executor:
        for _ in range(3):
            futures = [executor.submit(tasks.overwrite, array, value) for value in range(20)]
            assert {future.result(PATIENCE) for future in futures} == {float(size)}
        ref = executor.put(array)
        futures = [executor.submit(tasks.overwrite, ref, value) for value in range(20)]
        assert {future.result(PATIENCE) for future in futures} == {float(size)}
        mine = ref.get()
        mine[:] = 7
        assert ref.get().sum() == size
    assert array.sum() == size


@pytest.mark.parametrize("size", [100_000, 2 * MIB], ids=["copied", "mapped"])
def test_what_a_task_keeps_stays_as_it_was(mode: str, size: int) -> None:
    """An array that a task put into a global is its own, whatever comes and goes after it."""
    options = ObjectOptions(memory="64MiB", cache=0, worker_memory="16MiB")
    random = np.random.default_rng(1)
    with start(mode, objects=options) as executor:
        expected = {}
        for step in range(10):
            array = random.integers(0, 255, size, np.uint8)
            expected[f"kept-{step}"] = tasks.digest(array)
            executor.submit(tasks.keep_for_later, f"kept-{step}", array).result(PATIENCE)
            del array
            others = [random.integers(0, 255, size, np.uint8) for _ in range(8)]
            digests = list(executor.map(tasks.digest, others))
            assert digests == list(map(tasks.digest, others))
        found: dict[str, set[str]] = {}
        for name in list(expected) * 4:
            _, digest = executor.submit(tasks.digest_of_kept, name).result(PATIENCE)
            found.setdefault(name, set()).add(digest)
        for name, digests_found in found.items():
            assert digests_found <= {"", expected[name]}


def test_what_is_changed_in_place_between_submissions_arrives_as_it_was(mode: str) -> None:
    """No cache serves what is stale."""
    array = np.zeros(300_000)
    futures = []
    with start(mode) as executor:
        for step in range(20):
            array[step * 1000] = 1
            futures.append(executor.submit(tasks.total, array))
        assert [future.result(PATIENCE) for future in futures] == [
            float(step) for step in range(1, 21)
        ]


# Results.


@pytest.mark.parametrize(
    ("fn", "args"),
    [
        (tasks.filled, (10 * MIB, 3)),
        (tasks.arrays, (100, 100_000)),
        (tasks.arrays, (20, 2 * MIB)),
        (tasks.arrays, (400, 66_000)),
        (tasks.mixed, (200_000,)),
        (bytes, (20 * MIB,)),
        (tasks.large_parts, (2, 4 * MIB)),
        (tasks.large_parts, (20, 4 * MIB + 7)),
        (list, (range(200_000),)),
        (dict, (zip(range(50_000), map(str, range(50_000)), strict=True),)),
    ],
    ids=[
        "array",
        "arrays",
        "large arrays",
        "many arrays",
        "mixed",
        "bytes",
        "large parts",
        "many large parts",
        "list",
        "dict",
    ],
)
def test_results_of_all_kinds_come_back(
    mode: str, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    """As they were made, and writeable; and nothing is left of them."""
    args = tuple(dict(arg) if isinstance(arg, zip) else arg for arg in args)
    with start(mode) as executor:
        value = executor.submit(fn, *args).result(PATIENCE)
        expected = fn(*args)
        assert type(value) is type(expected)
        _compare(value, expected)
        del value
        settled(executor)


def _compare(value: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        for key in expected:
            _compare(value[key], expected[key])
    elif isinstance(expected, np.ndarray):
        assert np.array_equal(value, expected)
        value[:1] = 1
    elif isinstance(expected, list) and isinstance(expected[0], np.ndarray):
        for one, other in zip(value, expected, strict=True):
            _compare(one, other)
    else:
        assert value == expected


def test_many_large_results_of_a_map_take_bounded_memory(mode: str) -> None:
    """With buffersize, what the client holds is that many results, not all of them."""
    resident = psutil.Process().memory_info().rss
    most = 0
    with start(mode) as executor:
        results = executor.map(
            tasks.filled, (MIB,) * 300, [n % 256 for n in range(300)], buffersize=32
        )
        for index, result in enumerate(results):
            assert result[-1] == index % 256
            most = max(most, psutil.Process().memory_info().rss)
        assert index == 299
        assert store_of(executor).high < 64 * MIB
        settled(executor)
    assert most - resident < 200 * MIB


def test_results_that_nobody_has_taken_yet_go_to_disk(mode: str) -> None:
    """The client's memory stays within its limit, and every result is right."""
    options = ObjectOptions(memory="16MiB", worker_memory="16MiB")
    with start(mode, objects=options) as executor:
        futures = [executor.submit(tasks.filled, 3 * MIB, value) for value in range(30)]
        until(lambda: all(each.done() for each in futures))
        store = store_of(executor)
        assert store.high <= 17 * MIB
        assert store.disk >= 60 * MIB
        for value, future in enumerate(futures):
            result = future.result()
            assert result[0] == result[-1] == value
        del future, result
        futures.clear()
        settled(executor)


def test_loaded_results_take_no_file_descriptors() -> None:
    """A list of thousands of arrays is memory, nothing else."""
    with start("local") as executor:
        executor.submit(tasks.filled, 10).result(PATIENCE)
        before = len(os.listdir("/proc/self/fd"))
        values = list(executor.map(tasks.filled, (2 * MIB,) * 100, range(100)))
        until(lambda: len(os.listdir("/proc/self/fd")) <= before + 3)
        assert [int(value[-1]) for value in values] == list(range(100))


def test_a_result_that_fits_nowhere_fails_its_future(mode: str) -> None:
    """At once and alone, with words about what to do; it is not tried again and again."""
    options = ObjectOptions(memory="8MiB", spill_directory=False, cache=0)
    with start(mode, objects=options) as executor:
        for _ in range(3):
            future = executor.submit(tasks.filled, 20 * MIB)
            error = future.exception(PATIENCE)
            assert isinstance(error, PayloadTooLargeError), error
            assert "20 MiB" in str(error)
            assert "ObjectOptions(memory=" in str(error)
            # What arrived of it before is not left behind.
            error = executor.submit(tasks.arrays, 10, 2 * MIB).exception(PATIENCE)
            assert isinstance(error, PayloadTooLargeError), error
            del error
        assert executor.submit(tasks.filled, 4 * MIB).result(PATIENCE).sum() == 4 * MIB
        assert executor.stats().retries == 0
        settled(executor)


def test_an_argument_that_fits_nowhere_fails_its_future(mode: str) -> None:
    """Of the client; the next one that fits is taken."""
    options = ObjectOptions(memory="8MiB", spill_directory=False, cache=0)
    with start(mode, objects=options) as executor:
        error = executor.submit(tasks.total, np.zeros(2 * MIB)).exception(PATIENCE)
        assert isinstance(error, PayloadTooLargeError)
        with pytest.raises(PayloadTooLargeError):
            executor.put(np.zeros(2 * MIB))
        with pytest.raises(PayloadTooLargeError):
            list(executor.map(tasks.total, [np.zeros(2 * MIB)]))
        assert executor.submit(tasks.total, np.ones(MIB // 2)).result(PATIENCE) == MIB // 2


def test_a_worker_with_little_memory_holds_what_it_needs(mode: str) -> None:
    """It gives up what no task needs, and spills what does not fit."""
    options = ObjectOptions(worker_memory="8MiB")
    arrays = [np.full(3 * MIB, value, np.uint8) for value in range(12)]
    with start(mode, objects=options) as executor:
        for _ in range(2):
            found = list(executor.map(tasks.total, arrays))
            assert found == [float(3 * MIB * value) for value in range(12)]
        assert executor.submit(tasks.total, *arrays).result(PATIENCE) == sum(found)


# What breaks.


@several
def test_results_survive_the_loss_of_their_workers(mode: str) -> None:
    """Each future gets its result, whole, while workers are killed one after the other."""
    with start(mode, retries=50) as executor:
        futures = [executor.submit(tasks.filled, 4 * MIB, value % 251) for value in range(30)]
        done = threading.Event()

        def kill_now_and_then(futures: list[Future[Any]]) -> None:
            arrived = 0
            while not done.wait(0.4):
                before, arrived = arrived, sum(future.done() for future in futures)
                # Of workers that are killed before one has done anything there may be only so many.
                for worker in supervisors()[: arrived > before]:
                    worker.kill()

        killer = threading.Thread(target=kill_now_and_then, args=(futures,))
        killer.start()
        try:
            for value, future in enumerate(futures):
                result = future.result(PATIENCE)
                assert result.sum() == 4 * MIB * (value % 251)
        finally:
            done.set()
            killer.join()
        del futures, future, result
        settled(executor)


def test_a_worker_that_is_killed_in_the_middle_of_a_transfer_loses_nothing() -> None:
    """Neither an argument on its way there, nor a result on its way here."""
    array = np.arange(24 * MIB, dtype=np.float64)  # 192 MiB
    with start("wire", workers=1, retries=5) as executor:
        executor.submit(tasks.nothing).result(PATIENCE)
        future = executor.submit(tasks.add, array)
        until(lambda: executor.stats().bytes_sent > 20 * MIB)
        (worker,) = supervisors()
        worker.kill()
        until(lambda: store_of(executor).memory > 1.5 * array.nbytes)  # the result arrives
        (worker,) = supervisors()
        worker.kill()
        result = future.result(PATIENCE)
        assert np.array_equal(result, array)
        del result, future
        settled(executor)


def test_what_is_cancelled_on_its_way_leaves_nothing_behind(mode: str) -> None:
    """The executor goes on, and has room again."""
    with start(mode) as executor:
        for _ in range(3):
            futures = [
                executor.submit(tasks.overwrite, np.full(4 * MIB, value, np.uint8), value)
                for value in range(30)
            ]
            for future in reversed(futures):
                future.cancel()
            for future in futures:
                assert future.cancelled() or future.result(PATIENCE) is not None
        del futures, future
        settled(executor)
        assert executor.submit(tasks.total, np.ones(300_000)).result(PATIENCE) == 300_000


def test_what_is_not_worth_another_attempt_leaves_nothing_behind(mode: str) -> None:
    """``retry_on`` was asked, and said no."""
    with start(mode) as executor:
        view = executor.with_options(retry_on=KeyError, retries=5)
        future = view.submit(tasks.called, int, np.ones(MIB).tobytes())
        assert isinstance(future.exception(PATIENCE), ValueError)  # int(b"...")
        del future
        settled(executor)


def test_a_killed_task_lets_go_of_what_it_took(mode: str, signals: Signals) -> None:
    """A task past its time, and its arguments: of the next one nothing is different."""
    array = np.ones(400_000)
    with start(mode) as executor:
        hurried = executor.with_options(timeout=1.0, retries=0)
        futures = [
            hurried.submit(lambda value: (value.sum(), time.sleep(60)), array + n) for n in range(3)
        ]
        for future in futures:
            assert isinstance(future.exception(PATIENCE), TaskTimeoutError)
        del futures, future
        assert executor.submit(tasks.total, array).result(PATIENCE) == 400_000
        settled(executor)


def test_a_process_for_each_task_gets_the_same_arguments() -> None:
    """max_tasks_per_child: the worker has them, each of its processes maps them."""
    array = np.arange(400_000)
    with start("wire", max_tasks_per_child=1) as executor:
        futures = [executor.submit(tasks.total, array) for _ in range(12)]
        assert {future.result(PATIENCE) for future in futures} == {float(array.sum())}
        assert executor.stats().bytes_sent < 1.2 * array.nbytes


@pytest.mark.parametrize("error", ["ValueError", "ConnectionAbortedError", "KeyboardInterrupt"])
def test_an_argument_that_cannot_be_unpickled_fails_alone(mode: str, error: str) -> None:
    """Whatever it raises, even what looks like a fault of ours."""
    with start(mode) as executor:
        future = executor.submit(tasks.total, tasks.Explodes(error))
        good = executor.submit(tasks.total, np.ones(200_000))
        failure = future.exception(PATIENCE)
        assert isinstance(failure, PayloadError)
        assert "on purpose" in str(failure)
        assert good.result(PATIENCE) == 200_000


def test_an_argument_that_kills_who_unpickles_it_fails_alone(mode: str) -> None:
    """With the evidence, after the attempts it may have."""
    with start(mode, retries=1) as executor:
        future = executor.submit(tasks.total, tasks.Kills())
        good = [executor.submit(tasks.total, np.full(200_000, n)) for n in range(5)]
        failure = future.exception(PATIENCE)
        assert isinstance(failure, WorkerLostError)
        assert "SIGKILL" in str(failure)
        assert [each.result(PATIENCE) for each in good] == [200_000.0 * n for n in range(5)]


def test_an_argument_that_takes_too_much_memory_when_unpickled_fails_alone(mode: str) -> None:
    """The limit holds for unpickling too."""
    with start(mode) as executor:
        bounded = executor.with_options(memory="200MiB", retries=0)
        future = bounded.submit(tasks.total, tasks.Bloats(400))
        failure = future.exception(PATIENCE)
        assert isinstance(failure, WorkerLostError)
        assert failure.out_of_memory
        assert executor.submit(tasks.total, np.ones(200_000)).result(PATIENCE) == 200_000


def test_a_result_that_cannot_be_pickled_to_its_end_leaves_nothing(mode: str) -> None:
    """Whatever of it was in files already is gone with it."""

    def half() -> Any:
        return [np.ones(3 * MIB), np.ones(20_000), lambda: (_ for _ in ()), threading.Lock()]

    with start(mode) as executor:
        for _ in range(5):
            with pytest.raises(PayloadError, match="the result cannot be sent"):
                executor.submit(half).result(PATIENCE)
        assert executor.submit(tasks.filled, 3 * MIB).result(PATIENCE).sum() == 3 * MIB


# Nothing adds up.


@several
def test_nothing_is_left_after_many_tasks(mode: str) -> None:
    """Memory, files and tables of client and workers are as they were."""
    random = np.random.default_rng(2)
    with start(mode, min_workers=2) as executor:
        driver = executor._driver or executor._submitter.start()
        # For each worker its own process, the one that forks, and those that run tasks.
        until(lambda: len(descendants()) == (6 if mode == "several" else 4))
        # Who connects after the first tasks is not asked to do any of them, and opens files later.
        until(lambda: executor.stats().workers.slots == 2)

        def work(small: int, large: int) -> None:
            for _ in executor.map(tasks.nothing, range(small)):
                pass
            noise = random.integers(0, 255, 3 * MIB, np.uint8)
            sizes = [70_000 + 997 * n % 200_000 if n % 10 else 2 * MIB + n for n in range(large)]
            views = (noise[n % 97 : n % 97 + size] for n, size in enumerate(sizes))
            found = executor.map(tasks.add, views, buffersize=50)
            for n, result in enumerate(found):
                assert result[0] == noise[n % 97]
            for _ in range(20):
                array = random.integers(0, 255, 100_000, np.uint8)
                assert executor.submit(lambda data=array: data[5]).result(PATIENCE) == array[5]

        def state() -> tuple[Any, ...]:
            client = len(os.listdir("/proc/self/fd"))
            remote = [
                len(os.listdir(f"/proc/{process.pid}/fd"))
                for process in sorted(descendants(), key=lambda each: each.pid)
            ]
            tables = [
                (
                    len(s.told._known_blobs),
                    len(s.payloads),
                    len(s.results.arrived),
                    len(s.results._parts),
                    len(s.told._moved),
                )
                for s in driver.sessions.values()
            ]
            return client, tuple(remote), tables, len(driver.inbox)

        work(500, 60)
        settled(executor)
        before = state()
        work(20_000, 300)
        settled(executor)

        def same() -> bool:
            now = state()
            return (
                now[0] <= before[0] + 2
                and len(now[1]) == len(before[1])
                and all(a <= b + 3 for a, b in zip(now[1], before[1], strict=True))
                and now[2] == [(0, 0, 0, 0, 0)] * len(now[2])
                and now[3] == 0
            )

        try:
            until(same)
        except AssertionError:
            pytest.fail(f"before {before}, now {state()}")


def test_functions_with_large_closures_are_forgotten(mode: str) -> None:
    """Each with another array: what they took is free when nobody calls them any more."""
    with start(mode, objects=ObjectOptions(cache=0)) as executor:

        def call(n: int) -> float:
            array = np.full(MIB, n, np.uint8)
            return executor.submit(lambda: float(array[5])).result(PATIENCE)

        for n in range(100):
            assert call(n) == n
        settled(executor)
        assert executor._driver is not None
        sessions = executor._driver.sessions.values()
        until(lambda: not any(session.told._known_blobs for session in sessions))


def test_after_shutdown_nothing_is_held() -> None:
    """Not even what might have come again; what was put can still be read."""
    executor = start("local")
    with executor:
        ref = executor.put(np.arange(400_000))
        executor.submit(tasks.total, np.ones(400_000)).result(PATIENCE)
    assert executor._driver is not None
    gc.collect()
    assert not executor._driver.store._cached
    assert ref.get().sum() == np.arange(400_000).sum()
