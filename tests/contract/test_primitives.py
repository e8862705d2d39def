"""What multiprocessing shares between processes, as initargs, arguments and globals."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import shared_memory
from typing import Any

import pytest

from cloudexec import BatchExecutor, PayloadError

_CONTEXTS = ("fork", "spawn")


@pytest.fixture(scope="module")
def executor() -> Iterator[BatchExecutor]:
    with BatchExecutor(2, retries=0) as executor:
        yield executor


# As initargs.

_shared: tuple[Any, ...] = ()


def _initialize(*shared: Any) -> None:
    global _shared
    _shared = shared


def _count(times: int) -> None:
    lock, plain, value, array, queue = _shared
    for _ in range(times):
        with lock:
            plain.value += 1
        with value.get_lock():
            value.value += 1
    array[0] = 1.5
    queue.put(os.getpid())


@pytest.mark.parametrize("method", _CONTEXTS)
def test_primitives_are_shared_by_way_of_initargs(method: str) -> None:
    """Whatever the context, which decides whether semaphores have names."""
    context: Any = multiprocessing.get_context(method)
    queue = context.Queue()
    plain = context.Value("i", 0, lock=False)
    value, array = context.Value("q", 0), context.Array("d", 2)
    shared = (context.Lock(), plain, value, array, queue)
    with BatchExecutor(2, initializer=_initialize, initargs=shared) as executor:
        list(executor.map(_count, [500] * 4))
        assert plain.value == value.value == 2000
        assert list(array) == [1.5, 0.0]
        assert os.getpid() not in {queue.get(timeout=30) for _ in range(4)}


# As arguments.


def _hold(lock: Any, entered: Any, leave: Any) -> bool:
    with lock:
        entered.set()
        return bool(leave.wait(30))


@pytest.mark.parametrize("method", _CONTEXTS)
@pytest.mark.parametrize("kind", ["Lock", "RLock", "Semaphore", "BoundedSemaphore", "Condition"])
def test_a_lock_that_a_task_holds_is_held_here(
    executor: BatchExecutor, method: str, kind: str
) -> None:
    """The same one: what was made before the executor, and by other means than its own."""
    context: Any = multiprocessing.get_context(method)
    lock, entered, leave = getattr(context, kind)(), context.Event(), context.Event()
    future = executor.submit(_hold, lock, entered, leave)
    assert entered.wait(30), future.exception(0)
    assert not lock.acquire(False)
    leave.set()
    assert future.result(30) is True
    assert lock.acquire(True, 30)
    lock.release()


def _wait_at(barrier: Any) -> int:
    return int(barrier.wait(30))


def test_tasks_meet_at_a_barrier(executor: BatchExecutor) -> None:
    barrier = multiprocessing.Barrier(3)
    futures = [executor.submit(_wait_at, barrier) for _ in range(2)]
    assert {_wait_at(barrier), *(future.result(30) for future in futures)} == {0, 1, 2}


def _work_off(tasks: Any, results: Any) -> None:
    for task in iter(tasks.get, None):
        results.put(-task)
        tasks.task_done()
    tasks.task_done()


def test_queues_go_both_ways(executor: BatchExecutor) -> None:
    tasks: Any = multiprocessing.JoinableQueue()
    results: Any = multiprocessing.SimpleQueue()
    for task in (1, 2, 3, None):
        tasks.put(task)
    future = executor.submit(_work_off, tasks, results)
    tasks.join()
    assert [results.get() for _ in range(3)] == [-1, -2, -3]
    assert future.result(30) is None


def _answer(end: Any) -> None:
    end.send(end.recv() + 1)


def _serve(end: socket.socket) -> None:
    with end:
        end.sendall(end.recv(100)[::-1])


def test_an_end_of_a_pipe_is_the_tasks_own(executor: BatchExecutor) -> None:
    """It may be closed here at once, and ends with the task."""
    for duplex in (True, False):
        receiver, sender = multiprocessing.Pipe(duplex)
        future = executor.submit(_send_and_end, sender)
        sender.close()
        assert receiver.recv() == "from the task"
        assert future.result(30) is None
        with pytest.raises(EOFError):
            receiver.recv()
    one, other = multiprocessing.Pipe()
    future = executor.submit(_answer, other)
    one.send(1)
    assert one.recv() == 2
    mine, yours = socket.socketpair()
    with mine, yours:
        future = executor.submit(_serve, yours)
        mine.sendall(b"abc")
        assert mine.recv(100) == b"cba"
        assert future.result(30) is None


def _send_and_end(sender: Any) -> None:
    sender.send("from the task")
    sender.close()


def _add(value: Any, number: int) -> None:
    with value:
        value.value += number


def test_primitives_bear_maps_and_retries(tmp_path: Any) -> None:
    """A value that comes with each of many calls costs a slot one file, and survives crashes."""
    value = multiprocessing.Value("i", 0)
    with BatchExecutor(2, max_tasks_per_child=30) as executor:
        list(executor.map(_add, [value] * 100, [1] * 100))
        assert value.value == 100
        assert executor.submit(_crash_once, value, str(tmp_path / "crashed")).result(30) == 101


def _crash_once(value: Any, path: str) -> int:
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return int(value.value)
    value.value += 1
    os._exit(1)


def test_a_global_of_the_function_is_shared() -> None:
    """As under fork: here a function that travels by value, with its globals."""
    program = """
import multiprocessing
from cloudexec import BatchExecutor
lock, total = multiprocessing.RLock(), multiprocessing.Value("i", 0, lock=False)
def add(n):
    with lock, lock:
        total.value += n
with BatchExecutor(2) as executor:
    list(executor.map(add, range(10)))
    for n in range(10):
        executor.submit(add, n).result()
print(total.value)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=50)
    assert done.stdout == b"90\n", done.stderr.decode()


def _nested(lock: Any, value: Any) -> None:
    with BatchExecutor(1) as inner:
        inner.submit(_add_under, lock, value).result()


def _add_under(lock: Any, value: Any) -> None:
    with lock:
        value.value += 1


def test_a_task_hands_primitives_on_to_tasks_of_its_own(executor: BatchExecutor) -> None:
    lock, value = multiprocessing.Lock(), multiprocessing.Value("i", 0)
    executor.submit(_nested, lock, value).result(50)
    _add_under(lock, value)
    assert value.value == 2


# Named shared memory.


def _fill(name: str) -> None:
    memory = shared_memory.SharedMemory(name=name)
    memory.buf[:4] = b"done"
    memory.close()


def _fill_itself(memory: shared_memory.SharedMemory) -> None:
    memory.buf[4:8] = b"more"


def test_shared_memory_outlives_the_slots_that_have_used_it(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The client's resource tracker has it, not one of the slot's that would remove it."""
    memory = shared_memory.SharedMemory(create=True, size=100)
    try:
        with BatchExecutor(1) as executor:
            executor.submit(_fill, memory.name).result(30)
            executor.submit(_fill_itself, memory).result(30)
        again = shared_memory.SharedMemory(name=memory.name)
        assert bytes(again.buf[:8]) == b"donemore"
        again.close()
    finally:
        memory.close()
        memory.unlink()
    assert "leaked" not in capfd.readouterr().err


# tqdm's lock.


def _try() -> bool:
    from tqdm import tqdm

    lock = tqdm.get_lock().mp_lock
    got = bool(lock.acquire(block=False))
    if got:
        lock.release()
    return got


def test_bars_of_all_processes_write_under_one_lock() -> None:
    from tqdm import tqdm

    lock = tqdm.get_lock()
    with BatchExecutor(1, initializer=tqdm.set_lock, initargs=(lock,)) as executor:
        assert executor.submit(_try).result(30)
        with lock:
            assert not executor.submit(_try).result(30)
        assert executor.submit(_try).result(30)


# What cannot be.


def _make_lock() -> Any:
    return multiprocessing.Lock()


def _refused(call: Callable[[], Any]) -> str:
    with pytest.raises(PayloadError) as caught:
        call()
    return str(caught.value)


def test_what_cannot_be_shared_is_named_with_a_remedy(executor: BatchExecutor) -> None:
    lock, end = multiprocessing.Lock(), multiprocessing.Pipe()[0]
    with BatchExecutor(1, listen="127.0.0.1:0") as far:  # workers that may be anywhere
        refused = {
            "argument 0 of builtins.print: a multiprocessing Lock": lambda: far.submit(print, lock),
            "argument 1, item 'a' of": lambda: far.submit(print, 1, {"a": lock}),
            "keyword 'end' of": lambda: far.submit(print, end=end),  # type: ignore[arg-type]
        }
        for text, submit in refused.items():
            message = _refused(submit().result)
            assert text in message
            assert "Manager()" in message
    with BatchExecutor(1, initializer=print, initargs=(1, lock), listen="127.0.0.1:0") as far:
        assert "initargs[1] of builtins.print" in _refused(lambda: far.submit(abs, -1))
    assert "Manager()" in _refused(executor.submit(_make_lock).result)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="semaphores have names elsewhere")
def test_a_lock_that_others_have_is_refused(executor: BatchExecutor) -> None:
    """Processes that inherited it, and threads that wait for it, would be left with another one."""
    context = multiprocessing.get_context("fork")
    lock, leave = context.Lock(), context.Event()
    child = context.Process(target=leave.wait)
    child.start()
    message = _refused(executor.submit(print, lock).result)
    assert f"process {child.pid} has it" in message
    assert "get_context('spawn')" in message
    leave.set()
    child.join()
    assert executor.submit(_add_under, lock, multiprocessing.Value("i", 0)).result(30) is None
    other = context.Lock()
    other.acquire()
    waiting = threading.Thread(target=other.acquire)
    waiting.start()
    waiters = ctypes.c_uint32.from_address(other._semlock.handle + 4)  # type: ignore[attr-defined]
    while not waiters.value:
        pass
    assert "while it is waited for" in _refused(executor.submit(print, other).result)
    other.release()
    waiting.join()
    other.release()
    assert executor.submit(_add_under, other, multiprocessing.Value("i", 0)).result(30) is None
