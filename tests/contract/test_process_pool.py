"""What users of a process pool take for granted about the processes that run their calls."""

from __future__ import annotations

import atexit
import gzip
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import BrokenExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest

from cloudexec import (
    BatchExecutor,
    InitializerError,
    Local,
    PayloadError,
    RefLostError,
    WorkerLostError,
)


@pytest.fixture(scope="module")
def executor() -> Iterator[BatchExecutor]:
    with BatchExecutor(2, retries=0) as executor:
        yield executor


# Lost processes.


def test_a_lost_worker_is_caught_as_a_broken_process_pool(executor: BatchExecutor) -> None:
    """And the executor goes on, which a process pool does not."""
    with pytest.raises(BrokenProcessPool) as caught:
        executor.submit(os._exit, 3).result(30)
    assert isinstance(caught.value, WorkerLostError)
    assert isinstance(pickle.loads(pickle.dumps(caught.value)), BrokenProcessPool)
    with pytest.raises(BrokenExecutor):
        list(executor.map(os._exit, [3]))
    assert executor.submit(abs, -1).result(30) == 1


def test_a_broken_executor_is_caught_as_a_broken_process_pool() -> None:
    executor = BatchExecutor(1)
    future = executor.submit(abs, -1)
    executor.kill_workers()
    assert future.exception(30) is None or isinstance(future.exception(), BrokenProcessPool)
    with BatchExecutor(1, initializer=divmod, initargs=(1, 0)) as executor:
        with pytest.raises(BrokenProcessPool) as caught:
            executor.submit(abs, -1).result(30)
    assert isinstance(caught.value, InitializerError)
    assert isinstance(RefLostError("gone"), BrokenProcessPool)


def test_an_error_is_a_broken_process_pool_for_those_who_import_that_later() -> None:
    """Importing cloudexec does not import the process pool, which takes its time."""
    program = """
import sys
from cloudexec import BatchExecutor, WorkerLostError
assert "concurrent.futures.process" not in sys.modules
try:
    raise WorkerLostError("lost", worker_id="worker-1")
except Exception as error:
    from concurrent.futures import BrokenExecutor
    from concurrent.futures.process import BrokenProcessPool
    assert isinstance(error, BrokenProcessPool) and isinstance(error, BrokenExecutor)
    assert error.worker_id == "worker-1" and str(error) == "lost"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=50)


# What is not done when the program's main thread ends.


def test_a_worker_that_is_lost_while_the_interpreter_ends_is_that_error(tmp_path: Path) -> None:
    """The module that defines BrokenProcessPool cannot be imported any more then."""
    program = """
import os, sys, time
from cloudexec import BatchExecutor

def die():
    time.sleep(0.5)
    os._exit(3)

def show(future):
    print(type(future.exception()).__name__)

if __name__ == "__main__":
    assert "concurrent.futures.process" not in sys.modules
    BatchExecutor(1, retries=0).submit(die).add_done_callback(show)
"""
    assert _output_of(program, tmp_path) == ["WorkerLostError"]


@pytest.mark.parametrize("options", ["", "listen='127.0.0.1:0'"])
def test_large_results_come_while_the_interpreter_ends(options: str, tmp_path: Path) -> None:
    """The standard library's thread pools take no more calls then."""
    program = f"""
import time
from cloudexec import BatchExecutor

def work(data):
    time.sleep(0.5)
    return data + data

def show(future):
    print(len(future.result()))

if __name__ == "__main__":
    executor = BatchExecutor(1, {options})
    for _ in range(3):
        executor.submit(work, bytes(5_000_000)).add_done_callback(show)
"""
    assert _output_of(program, tmp_path) == ["10000000"] * 3


def _output_of(program: str, directory: Path) -> list[str]:
    script = directory / "script.py"
    script.write_text(program)
    command = [sys.executable, str(script)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


# What multiprocessing says of them.


def _process() -> tuple[Any, ...]:
    process: Any = multiprocessing.current_process()
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join(0.01)
    return (
        process._identity,
        process.name,
        process.pid == os.getpid(),
        process.daemon,
        (parent.name, parent.pid, parent.is_alive()),
        isinstance(parent.sentinel, int),
    )


def test_processes_are_numbered_children_of_the_client() -> None:
    me = ("MainProcess", os.getpid(), True)
    with BatchExecutor(1, max_tasks_per_child=1) as executor:
        seen = [executor.submit(_process).result(30) for _ in range(2)]
    assert seen == [((n,), f"BatchWorker-{n}", True, False, me, True) for n in (1, 2)]


def _meet(barrier: Any) -> tuple[int, ...]:
    barrier.wait(30)
    return multiprocessing.current_process()._identity  # type: ignore[attr-defined, no-any-return]


def test_no_two_processes_of_an_executor_have_one_number() -> None:
    """Whatever worker they are on."""
    with multiprocessing.Manager() as manager:
        with BatchExecutor(3, launcher=Local(slots_per_worker=1)) as executor:
            barrier = manager.Barrier(3)
            numbers = [executor.submit(_meet, barrier) for _ in range(3)]
            assert {number.result(40) for number in numbers} == {(1,), (2,), (3,)}


def _names() -> tuple[Any, ...]:
    def target(queue: Any) -> None:
        process: Any = multiprocessing.current_process()
        queue.put((process.name, process._identity))

    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=target, args=(queue,))
    child.start()
    found = queue.get()
    child.join()
    with BatchExecutor(1) as inner:
        return found, inner.submit(_process).result(30)[:2], multiprocessing.active_children()


def test_children_of_a_task_are_numbered_below_it(executor: BatchExecutor) -> None:
    (name, identity), (inner, inner_name), children = executor.submit(_names).result(50)
    assert inner == identity == (identity[0], 1)
    assert name == f"ForkProcess-{identity[0]}:1"
    assert inner_name == f"BatchWorker-{inner[0]}:1"
    assert children == []


# Hash seeds.


def _order() -> tuple[int, str | None, str]:
    program = "import os; print(hash('text'), os.environ.get('PYTHONHASHSEED'))"
    fresh = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    return hash("text"), os.environ.get("PYTHONHASHSEED"), fresh.stdout


def test_all_workers_hash_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what tasks start is seeded as if they ran anywhere else."""
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with BatchExecutor(1, max_tasks_per_worker=1) as executor:
        one, other = (executor.submit(_order).result(40) for _ in range(2))
        workers = executor.stats().launches
    assert len(workers) > 1
    assert one[:2] == other[:2] == (one[0], None)
    assert one[2] != other[2]
    with BatchExecutor(1) as executor:
        assert executor.submit(hash, "text").result(30) != one[0]


def test_a_seed_of_the_users_own_holds_in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHASHSEED", "7")
    program = [sys.executable, "-c", "print(hash('text'))"]
    expected = int(subprocess.run(program, capture_output=True, check=True).stdout)
    with BatchExecutor(1) as executor:
        found, seed, fresh = executor.submit(_order).result(30)
    assert (found, seed, fresh) == (expected, "7", f"{expected} 7\n")


# What is submitted by mistake.


async def _coroutine(n: int = 0) -> int:
    return n


def _generator(n: int = 0) -> Iterator[int]:
    yield n


async def _both(n: int = 0) -> AsyncIterator[int]:
    yield n


class _Callable:
    async def __call__(self) -> None:
        pass


def test_coroutines_and_generators_are_refused_by_name(
    executor: BatchExecutor, capfd: pytest.CaptureFixture[str]
) -> None:
    """As functions, as results of others, in place of a function, and as arguments."""
    coroutine, generator = _coroutine(), _generator()
    refused: dict[Any, tuple[str, str]] = {
        executor.submit(_coroutine): ("the coroutine _coroutine()", "asyncio.run()"),
        executor.submit(_generator): ("the generator _generator()", "a list"),
        executor.submit(_both): ("the asynchronous generator _both()", "asyncio.run()"),
        executor.submit(_Callable()): ("the coroutine _Callable.__call__()", "asyncio.run()"),
        executor.submit(lambda: _generator(1)): ("the generator _generator()", "a list"),
        executor.submit(coroutine): ("callable is the coroutine _coroutine()", "function"),  # type: ignore[arg-type]
        executor.submit(print, generator): ("argument 0 of builtins.print is the gen", "a list"),
        executor.submit(print, end=coroutine): ("keyword 'end' of builtins.print", "asyncio.run()"),  # type: ignore[arg-type]
    }
    for future, texts in refused.items():
        error = future.exception(30)
        assert isinstance(error, PayloadError)
        assert [text for text in texts if text not in str(error)] == [], str(error)
    with pytest.raises(PayloadError, match="coroutine _coroutine"):
        list(executor.map(_coroutine, [1]))
    with pytest.raises(PayloadError, match=r"argument 0 of .*_coroutine is the generator"):
        list(executor.map(_coroutine, [generator]))
    coroutine.close()
    assert "never awaited" not in capfd.readouterr().err


# Ends in order.


def _leave_things(directory: Path) -> None:
    def note(text: str) -> None:
        with open(directory / "order", "a") as file:
            file.write(f"{text} ")

    global _left
    plain = open(directory / "plain", "w")  # noqa: SIM115
    plain.write("unflushed")
    packed = gzip.open(directory / "packed.gz", "wt")  # noqa: SIM115
    packed.write("unflushed")
    _left = [plain, packed]
    ready = threading.Event()
    threading.Thread(target=lambda: (ready.wait(30), note("thread"))).start()
    threading._register_atexit(ready.set)  # type: ignore[attr-defined]
    threading._register_atexit(note, "first")  # type: ignore[attr-defined]
    atexit.register(note, "last")
    atexit.register(print, "printed at the end")


_left: list[Any] = []


@pytest.mark.parametrize("child", [None, 1])
def test_what_a_task_leaves_for_the_end_is_done(
    tmp_path: Path, child: int | None, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a slot that ends with the executor, or gives its place to another one."""
    with BatchExecutor(1, max_tasks_per_child=child) as executor:
        executor.submit(_leave_things, tmp_path).result(30)
    assert (tmp_path / "plain").read_text() == "unflushed"
    with gzip.open(tmp_path / "packed.gz", "rt") as file:
        assert file.read() == "unflushed"
    assert (tmp_path / "order").read_text() == "first thread last "
    assert "printed at the end" in capfd.readouterr().out
