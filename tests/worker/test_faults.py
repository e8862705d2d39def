"""What breaks in a worker costs at most the slot it broke in, and is told on the future."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import multiprocessing
import os
import pickle
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil
import pytest
from descendants import descendants

import cloudexec
from cloudexec import (
    BatchExecutor,
    BrokenBatchExecutor,
    PayloadError,
    TaskTimeoutError,
    WorkerLostError,
)

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups"),
]

PACKAGE = str(Path(cloudexec.__file__).parents[1])


@pytest.fixture
def executor() -> Iterator[BatchExecutor]:
    """Two slots; at the end nothing of the executor is left."""
    with BatchExecutor(2, output="off") as executor:
        yield executor
    assert_no_descendants()


def assert_no_descendants() -> None:
    _, alive = psutil.wait_procs(descendants(), timeout=10)
    assert not alive


def assert_works(executor: BatchExecutor) -> None:
    """Enough tasks that every slot takes some."""
    assert list(executor.map(abs, range(-200, 0), timeout=30)) == list(range(200, 0, -1))


def fifo(path: Path) -> str:
    os.mkfifo(path)
    return str(path)


def read(path: str) -> str:
    """Wait for somebody to write to a pipe, and return what it wrote."""
    with open(path) as file:
        return file.read()


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def run_out_of_time(executor: BatchExecutor, task: Callable[[str], object], path: Path) -> str:
    """Have a task that notes something and hangs reach its timeout; return what it noted.

    On a busy machine it may not get to that in its time: then it has more.
    """
    for seconds in (1.0, 4.0, 16.0):
        error = executor.with_options(timeout=seconds).submit(task, str(path)).exception(60)
        assert isinstance(error, TaskTimeoutError)
        if path.exists() and (noted := path.read_text()):
            return noted
    raise AssertionError(f"nothing noted within {seconds:g} s")


def mark(path: Path | str) -> None:
    """Leave a trace of one call: a byte appended at once."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, b"x")
    os.close(fd)


def marked(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def gone(pids: list[int], timeout: float = 10) -> bool:
    """Whether these processes are gone within the timeout."""
    processes = []
    for pid in pids:
        try:
            processes.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    living = [p for p in processes if p.status() != psutil.STATUS_ZOMBIE]
    _, alive = psutil.wait_procs(living, timeout=timeout)
    return all(p.status() == psutil.STATUS_ZOMBIE for p in alive if p.is_running())


def worker_processes() -> tuple[list[psutil.Process], list[psutil.Process], list[psutil.Process]]:
    """This process's supervisors, zygotes and slots."""
    supervisors = _living_children(psutil.Process())
    zygotes = [child for p in supervisors for child in _living_children(p)]
    slots = [child for p in zygotes for child in _living_children(p)]
    return supervisors, zygotes, slots


def _living_children(process: psutil.Process) -> list[psutil.Process]:
    """Return children of a process; any of these, and itself, may end while they are looked at."""
    living = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in process.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.status() != psutil.STATUS_ZOMBIE:
                    living.append(child)
    return living


# How a task's process can die.


def segfault() -> None:
    ctypes.string_at(0)


def abort() -> None:
    os.abort()


def kill_self(number: int) -> None:
    signal.signal(number, signal.SIG_DFL) if number not in (signal.SIGKILL,) else None
    os.kill(os.getpid(), number)
    signal.pause()


@pytest.mark.parametrize("code", [0, 1, 7, 255])
def test_exit_code_of_a_task_that_ends_its_process_is_on_the_future(
    executor: BatchExecutor, code: int
) -> None:
    """os._exit(n) in a task fails that future with WorkerLostError and its exit code."""
    future = executor.with_options(retries=0).submit(os._exit, code)
    error = future.exception(30)
    assert isinstance(error, WorkerLostError)
    assert (error.exit_code, error.signal, error.attempts) == (code, None, 1)
    assert error.worker_id is not None
    assert str(code) in str(error)
    assert_works(executor)


@pytest.mark.parametrize(
    ("crash", "args", "number"),
    [
        (segfault, (), signal.SIGSEGV),
        (abort, (), signal.SIGABRT),
        (kill_self, (signal.SIGKILL,), signal.SIGKILL),
        (kill_self, (signal.SIGTERM,), signal.SIGTERM),
        (kill_self, (signal.SIGABRT,), signal.SIGABRT),
        (kill_self, (signal.SIGSEGV,), signal.SIGSEGV),
    ],
)
def test_signal_that_kills_a_task_is_on_the_future(
    executor: BatchExecutor, crash: Callable[..., None], args: tuple[int, ...], number: int
) -> None:
    """A task that is killed by a signal fails with that signal and the peak memory."""
    neighbours = [executor.submit(pow, n, 2) for n in range(50)]
    error = executor.with_options(retries=0).submit(crash, *args).exception(30)
    assert isinstance(error, WorkerLostError)
    assert (error.signal, error.exit_code) == (number, None)
    assert signal.Signals(number).name in str(error)
    assert error.peak_memory_bytes is not None
    assert error.peak_memory_bytes > 2**20
    assert not error.out_of_memory
    assert [f.result(30) for f in neighbours] == [n * n for n in range(50)]
    assert_works(executor)


def test_lost_task_carries_its_last_output(executor: BatchExecutor) -> None:
    """The last lines that a lost task printed are on the exception and on the future."""

    def crash() -> None:
        print("loading the model")
        print("a warning", file=sys.stderr)
        os.write(1, b"from C\n")
        os._exit(9)

    future = executor.with_options(retries=0).submit(crash)
    error = future.exception(30)
    assert isinstance(error, WorkerLostError)
    for text in ("loading the model", "a warning", "from C"):
        assert text in error.output
        assert text in future.output
        assert text in str(error)


def test_peak_memory_of_a_lost_task_is_that_of_its_process(executor: BatchExecutor) -> None:
    """A task that used 200 MB before it died is reported with at least as much."""

    def crash() -> None:
        data = bytearray(200_000_000)
        data[::4096] = b"x" * len(data[::4096])
        os._exit(9)

    error = executor.with_options(retries=0).submit(crash).exception(30)
    assert isinstance(error, WorkerLostError)
    assert error.peak_memory_bytes is not None
    assert 200_000_000 < error.peak_memory_bytes < 600_000_000


# Attempts.


def crash_after_mark(path: str, code: int = 3) -> None:
    mark(path)
    os._exit(code)


def test_lost_task_is_tried_three_times(executor: BatchExecutor, tmp_path: Path) -> None:
    """By default a task whose process dies is begun three times, then fails."""
    future = executor.submit(crash_after_mark, str(tmp_path / "calls"))
    error = future.exception(30)
    assert isinstance(error, WorkerLostError)
    assert error.attempts == 3
    assert future.attempts == 3
    assert marked(tmp_path / "calls") == 3


@pytest.mark.parametrize("retries", [0, 1, 4])
def test_retries_bound_the_attempts(executor: BatchExecutor, tmp_path: Path, retries: int) -> None:
    """retries=n begins a task at most n + 1 times."""
    options = executor.with_options(retries=retries)
    futures = [options.submit(crash_after_mark, str(tmp_path / str(n))) for n in range(4)]
    assert not wait(futures, 30).not_done
    assert [marked(tmp_path / str(n)) for n in range(4)] == [retries + 1] * 4


def test_lost_task_that_succeeds_the_second_time_has_a_result(
    executor: BatchExecutor, tmp_path: Path
) -> None:
    """An attempt that was lost leaves nothing but a count."""

    def once(path: str) -> str:
        first = not os.path.exists(path)
        mark(path)
        if first:
            os._exit(1)
        return "done"

    future = executor.submit(once, str(tmp_path / "calls"))
    assert future.result(30) == "done"
    assert future.attempts == 2
    assert executor.stats().retries == 1


def test_exception_is_a_result_and_is_not_retried(executor: BatchExecutor, tmp_path: Path) -> None:
    """A task that raises runs once."""

    def fail(path: str) -> None:
        mark(path)
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        executor.submit(fail, str(tmp_path / "calls")).result(30)
    assert marked(tmp_path / "calls") == 1


def test_hundred_crashes_in_a_row_do_not_break_the_executor(executor: BatchExecutor) -> None:
    """However many tasks kill their slot, each fails alone, and the executor lives on."""
    options = executor.with_options(retries=0)
    crashes = [options.submit(os._exit, 1) for _ in range(100)]
    good = [executor.submit(pow, n, 2) for n in range(100)]
    assert all(isinstance(f.exception(50), WorkerLostError) for f in crashes)
    assert [f.result(30) for f in good] == [n * n for n in range(100)]
    assert_works(executor)


def test_crash_among_many_short_tasks_costs_only_its_own_attempt(tmp_path: Path) -> None:
    """Neighbours in the same batch are each run exactly once, and none is charged an attempt."""

    def task(n: int) -> int:
        mark(tmp_path / str(n))
        if n % 100 == 50:
            os._exit(1)
        return n

    with BatchExecutor(2, retries=0, output="off") as executor:
        futures = [executor.submit(task, n) for n in range(1000)]
        for n, future in enumerate(futures):
            if n % 100 == 50:
                assert isinstance(future.exception(30), WorkerLostError)
            else:
                assert future.result(30) == n
                assert future.attempts == 1
    assert [marked(tmp_path / str(n)) for n in range(1000)] == [1] * 1000


def test_max_tasks_per_child_holds_across_crashes(tmp_path: Path) -> None:
    """No process runs more tasks than it may, whichever of them crash; all are done."""

    def task(n: int) -> int:
        mark(tmp_path / str(os.getpid()))
        if n % 7 == 0:
            os._exit(1)
        return n

    with BatchExecutor(2, retries=0, max_tasks_per_child=3, output="off") as executor:
        futures = [executor.submit(task, n) for n in range(60)]
        for n, future in enumerate(futures):
            if n % 7 == 0:
                assert isinstance(future.exception(40), WorkerLostError)
            else:
                assert future.result(40) == n
    assert max(marked(path) for path in tmp_path.iterdir()) <= 3


# What breaks, and where.


class _Saboteur:
    """Breaks on unpickling."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return break_down, (self.how,)


class _SelfSaboteur:
    """Breaks on pickling."""

    def __init__(self, how: str) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        break_down(self.how)
        raise AssertionError


def break_down(how: str) -> None:
    if how == "error":
        raise ArithmeticError("broken on purpose")
    if how == "exit":
        sys.exit(3)
    if how == "os-exit":
        os._exit(3)
    segfault()


def identity(value: object = None) -> object:
    return value


def return_self_saboteur(how: str) -> object:
    return _SelfSaboteur(how)


def return_large_self_saboteur(how: str) -> object:
    return [b"x" * 1_000_000, _SelfSaboteur(how)]


class _CallableSaboteur(_Saboteur):
    """A callable that breaks when the worker loads it."""

    def __call__(self, *_: object) -> None: ...


_LARGE = b"x" * 3_000_000


@pytest.mark.parametrize("how", ["error", "exit", "os-exit", "segfault"])
@pytest.mark.parametrize(
    "phase",
    [
        "callable",
        "argument",
        "large argument",
        "running",
        "result pickling",
        "large result pickling",
    ],
)
def test_break_in_any_phase_fails_one_future(executor: BatchExecutor, how: str, phase: str) -> None:
    """Whatever breaks and wherever, one future fails and its neighbours succeed."""
    calls: dict[str, tuple[Any, ...]] = {
        "callable": (_CallableSaboteur(how),),
        "argument": (identity, _Saboteur(how)),
        "large argument": (identity, [_LARGE, _Saboteur(how)]),
        "running": (break_down, how),
        "result pickling": (return_self_saboteur, how),
        "large result pickling": (return_large_self_saboteur, how),
    }
    before = [executor.submit(pow, n, 2) for n in range(20)]
    future = executor.submit(*calls[phase])
    after = [executor.submit(pow, n, 3) for n in range(20)]
    error = future.exception(30)
    if how in ("os-exit", "segfault"):
        assert isinstance(error, WorkerLostError)
        assert error.attempts == 3
    elif phase == "running":
        assert isinstance(error, ArithmeticError if how == "error" else SystemExit)
    else:
        assert isinstance(error, (PayloadError, SystemExit))
    assert [f.result(30) for f in before] == [n**2 for n in range(20)]
    assert [f.result(30) for f in after] == [n**3 for n in range(20)]


@pytest.mark.parametrize("how", ["error", "os-exit"])
def test_mapped_callable_that_breaks_on_arrival_fails_its_own_calls(
    executor: BatchExecutor, how: str
) -> None:
    """map() sends its callable once: where that kills the slot, the calls fail, bounded."""
    results = executor.map(_CallableSaboteur(how), range(3), timeout=30)
    with pytest.raises(PayloadError if how == "error" else WorkerLostError):
        list(results)
    assert_works(executor)


def test_large_callable_that_kills_on_arrival_fails_its_own_call(executor: BatchExecutor) -> None:
    """A callable by value that is sent under a number, and kills whoever loads it, fails alone."""
    saboteur = _Saboteur("os-exit")
    filling = os.urandom(4096)

    def call() -> int:
        return len(filling) + (saboteur is None)

    error = executor.submit(call).exception(30)
    assert isinstance(error, WorkerLostError)
    assert error.attempts == 3
    assert_works(executor)


def test_crash_while_a_large_result_travels_fails_one_future(executor: BatchExecutor) -> None:
    """A slot that dies in the middle of a large result loses that attempt only."""

    def crash_late() -> bytes:
        threading.Timer(0.02, os._exit, (5,)).start()
        return b"x" * 400_000_000

    error = executor.with_options(retries=0).submit(crash_late).exception(50)
    assert error is None or isinstance(error, WorkerLostError)
    assert_works(executor)


# Exceptions that are hard to carry.


@pytest.mark.parametrize("size", [10_000, 70_000, 300_000, 3_000_000])
def test_exception_with_a_long_message_arrives(executor: BatchExecutor, size: int) -> None:
    """A long message, such as a compiler's output, neither kills the slot nor gets lost."""

    def fail() -> None:
        raise ValueError("y" * size)

    error = executor.submit(fail).exception(30)
    assert isinstance(error, ValueError)
    assert str(error) == "y" * size
    assert_works(executor)


# Memory.


def test_memory_error_arrives_as_itself(executor: BatchExecutor) -> None:
    """A task that cannot get memory fails with MemoryError."""

    def greedy() -> int:
        return len(bytearray(1 << 60))

    assert isinstance(executor.submit(greedy).exception(30), MemoryError)
    assert_works(executor)


def test_memory_limit_of_a_task_hits_only_that_task(executor: BatchExecutor) -> None:
    """A task that runs into RLIMIT_AS fails with MemoryError, in the middle of whatever it did."""

    def greedy() -> None:
        limits = resource.getrlimit(resource.RLIMIT_AS)
        now = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (now + 64 * 2**20, limits[1]))
        try:
            held = []
            while True:
                held.append(bytearray(2**20))
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)

    assert isinstance(executor.submit(greedy).exception(30), MemoryError)
    assert_works(executor)


# Time.


@pytest.mark.alone
def test_endless_task_ends_at_its_timeout(executor: BatchExecutor) -> None:
    """A task past its timeout is killed, fails with TaskTimeoutError, and is not retried."""
    neighbours = [executor.submit(pow, n, 2) for n in range(20)]
    future = executor.with_options(timeout=0.5).submit(signal.pause)
    began = time.monotonic()
    error = future.exception(20)
    assert isinstance(error, TaskTimeoutError)
    assert time.monotonic() - began < 5
    assert error.seconds is not None
    assert 0.4 < error.seconds < 5
    assert future.attempts == 1
    assert [f.result(20) for f in neighbours] == [n * n for n in range(20)]
    assert_works(executor)


def test_endless_tasks_of_each_slot_time_out_and_what_waits_runs(executor: BatchExecutor) -> None:
    """Timeouts count from the start of each task, not from when it was submitted."""
    options = executor.with_options(timeout=0.3)
    endless = [options.submit(signal.pause) for _ in range(6)]
    quick = [options.submit(pow, n, 2) for n in range(50)]
    assert all(isinstance(f.exception(30), TaskTimeoutError) for f in endless)
    assert [f.result(30) for f in quick] == [n * n for n in range(50)]


def test_timeout_of_a_task_that_holds_the_interpreter(executor: BatchExecutor) -> None:
    """A timeout ends a task that never lets go of the GIL and ignores signals."""

    def stubborn() -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        pow(7, 10**8, 10**400 + 7**400) and 3 ** (10**9)

    error = executor.with_options(timeout=0.5).submit(stubborn).exception(20)
    assert isinstance(error, TaskTimeoutError)
    assert_works(executor)


def test_timed_out_task_carries_its_output(executor: BatchExecutor) -> None:
    """What it printed last says where it hung."""

    def hang() -> None:
        print("step 3", flush=True)
        signal.pause()

    for seconds in (0.5, 4, 16):  # a busy machine may not get to the output in a short time
        future = executor.with_options(timeout=seconds).submit(hang)
        error = future.exception(60)
        assert isinstance(error, TaskTimeoutError)
        if error.output:
            break
    assert "step 3" in error.output
    assert "step 3" in future.output


def test_running_task_can_be_cancelled(executor: BatchExecutor, tmp_path: Path) -> None:
    """cancel(running=True) kills the process that runs the task; its slot is replaced."""
    began = fifo(tmp_path / "began")

    def endless(path: str) -> None:
        write(path, str(os.getpid()))
        signal.pause()

    future = executor.submit(endless, began)
    pid = int(read(began))
    wait([executor.submit(abs, 1)], 20)  # an answer later it is known to run
    assert future.cancel(running=True)
    assert future.cancelled()
    assert gone([pid])
    assert_works(executor)


def test_short_tasks_pass_a_task_that_holds_the_interpreter(tmp_path: Path) -> None:
    """What waits behind a long C call is done elsewhere while that runs."""
    gate = fifo(tmp_path / "gate")
    began = fifo(tmp_path / "began")

    def hog() -> str:
        write(began, "x")
        # open() of a pipe through ctypes' PyDLL blocks in C without letting go of the GIL.
        libc = ctypes.PyDLL(None, use_errno=True)
        libc.open(os.fsencode(gate), os.O_RDONLY)
        return "released"

    with BatchExecutor(2, output="off") as executor:
        assert_works(executor)
        hogging = executor.submit(hog)
        short = [executor.submit(pow, n, 2) for n in range(500)]
        assert read(began) == "x"
        assert [f.result(30) for f in short] == [n * n for n in range(500)]
        assert not hogging.done()
        write(gate, "")
        assert hogging.result(30) == "released"


def test_short_tasks_of_the_same_kind_pass_one_that_is_stuck(tmp_path: Path) -> None:
    """Tasks sent ahead because their kind is short are taken back from behind a stuck one."""
    gate = fifo(tmp_path / "gate")

    def task(n: int) -> int:
        if n == 300:
            ctypes.PyDLL(None).open(os.fsencode(gate), os.O_RDONLY)
        return n

    with BatchExecutor(2, output="off") as executor:
        futures = [executor.submit(task, n) for n in range(2000)]
        others = [f for n, f in enumerate(futures) if n != 300]
        assert not wait(others, 30).not_done
        assert not futures[300].done()
        write(gate, "")
        assert [f.result(30) for f in futures] == list(range(2000))


# What a task leaves behind.


def start_child(path: str, *, own_session: bool) -> None:
    child = subprocess.Popen(["sleep", "1000"], start_new_session=own_session)
    write(path, str(child.pid))
    signal.pause()


def test_children_of_a_killed_task_are_gone(executor: BatchExecutor, tmp_path: Path) -> None:
    """The processes that a task started go with its slot when its time is up."""
    task = functools.partial(start_child, own_session=False)
    child = int(run_out_of_time(executor, task, tmp_path / "began"))
    assert gone([child])


def test_children_of_a_crashed_task_are_gone(executor: BatchExecutor, tmp_path: Path) -> None:
    """The processes that a task started go with its slot when it crashes."""
    began = fifo(tmp_path / "began")

    def crash(path: str) -> None:
        child = subprocess.Popen(["sleep", "1000"])
        write(path, str(child.pid))
        os._exit(1)

    future = executor.with_options(retries=0).submit(crash, began)
    child = int(read(began))
    assert isinstance(future.exception(20), WorkerLostError)
    assert gone([child])


@pytest.mark.parametrize("victim", ["supervisor", "zygote", "both"])
def test_children_of_tasks_are_gone_when_the_worker_is_killed(tmp_path: Path, victim: str) -> None:
    """Killing a worker's own processes leaves no process of a task behind."""
    began = fifo(tmp_path / "began")
    with BatchExecutor(1, retries=0, output="off") as executor:
        future = executor.submit(start_child, began, own_session=False)
        child = int(read(began))
        supervisors, zygotes, _ = worker_processes()
        for process in {
            "supervisor": supervisors,
            "zygote": zygotes,
            "both": supervisors + zygotes,
        }[victim]:
            process.kill()
        assert isinstance(future.exception(20), WorkerLostError)
        found = gone([child])
    if not found:
        os.kill(child, signal.SIGKILL)
    assert found


def test_children_of_finished_tasks_go_with_their_slot(tmp_path: Path) -> None:
    """What a task leaves running ends at the latest with the executor."""

    def leave() -> int:
        return subprocess.Popen(["sleep", "1000"]).pid

    with BatchExecutor(1, output="off") as executor:
        child = executor.submit(leave).result(20)
        assert psutil.pid_exists(child)
    assert gone([child])


def test_non_daemon_threads_of_a_task_hold_nobody(tmp_path: Path) -> None:
    """A thread that never ends does not keep its slot, or the executor's end, waiting."""
    gate = fifo(tmp_path / "gate")

    def leave() -> int:
        threading.Thread(target=open, args=(gate,)).start()
        return os.getpid()

    began = time.monotonic()
    with BatchExecutor(1, output="off") as executor:
        pid = executor.submit(leave).result(20)
        assert executor.submit(os.getpid).result(20) == pid
    assert time.monotonic() - began < 15
    assert gone([pid])


def test_exception_in_a_thread_of_a_task_is_not_its_outcome(executor: BatchExecutor) -> None:
    """A thread that raises prints its traceback, and the task's own result stands."""

    def task() -> str:
        thread = threading.Thread(target=break_down, args=("error",))
        thread.start()
        thread.join()
        return "fine"

    assert executor.submit(task).result(20) == "fine"


# Processes in a task.


def test_task_may_fork(executor: BatchExecutor) -> None:
    """A forked child that leaves with os._exit disturbs nothing."""

    def task() -> tuple[int, str]:
        pid = os.fork()
        if pid == 0:
            print("from the child", flush=True)
            os._exit(5)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), "parent"

    assert executor.submit(task).result(20) == (5, "parent")
    assert_works(executor)


def test_forked_children_that_print_do_not_garble_answers(executor: BatchExecutor) -> None:
    """Children and parent print at once, in large pieces: every answer still arrives."""

    def task(n: int) -> int:
        pids = []
        for _ in range(3):
            pid = os.fork()
            if pid == 0:
                for _ in range(20):
                    sys.stdout.write("c" * 100_000 + "\n")
                os._exit(0)
            pids.append(pid)
        for _ in range(20):
            sys.stdout.write("p" * 100_000 + "\n")
        for pid in pids:
            os.waitpid(pid, 0)
        return n

    assert [f.result(40) for f in [executor.submit(task, n) for n in range(4)]] == list(range(4))
    assert_works(executor)


@pytest.mark.parametrize("how", ["return", "raise"])
def test_forked_child_that_comes_back_does_not_run_tasks(executor: BatchExecutor, how: str) -> None:
    """A child that leaves the task as its parent does ends there: one outcome, one slot."""

    def task() -> str:
        pid = os.fork()
        if pid == 0:
            if how == "raise":
                raise ValueError("from the child")
            return "child"
        os.waitpid(pid, 0)
        return "parent"

    assert executor.with_options(timeout=10).submit(task).result(20) == "parent"
    assert_works(executor)


def square(n: int) -> int:
    return n * n


def test_task_may_use_multiprocessing(executor: BatchExecutor) -> None:
    """A process pool inside a task works."""

    def task() -> list[int]:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            return pool.map(square, range(10))

    assert executor.submit(task).result(30) == [n * n for n in range(10)]
    assert_works(executor)


def test_task_may_use_a_process_pool(executor: BatchExecutor) -> None:
    """A ProcessPoolExecutor inside a task works."""

    def task() -> list[int]:
        with ProcessPoolExecutor(2, multiprocessing.get_context("fork")) as pool:
            return list(pool.map(square, range(10)))

    assert executor.submit(task).result(30) == [n * n for n in range(10)]
    assert_works(executor)


def test_task_may_use_an_executor_of_its_own(executor: BatchExecutor) -> None:
    """A BatchExecutor inside a task works, and leaves nothing behind."""

    def task() -> list[int]:
        with BatchExecutor(1) as inner:
            return list(inner.map(square, range(10)))

    assert executor.submit(task).result(40) == [n * n for n in range(10)]
    assert_works(executor)


# What a task may do to its own process.


def close_everything() -> str:
    os.closerange(3, 256)
    return "done"


def close_everything_and_return_much() -> bytes:
    os.closerange(3, 256)
    return b"x" * 1_000_000


def close_stdout() -> str:
    sys.stdout.close()
    return "done"


def drop_stdout() -> str:
    sys.stdout = None  # type: ignore[assignment]
    sys.stderr = None  # type: ignore[assignment]
    return "done"


def close_output_files() -> str:
    for fd in (1, 2):
        try:
            os.close(fd)
        except OSError:
            pass  # closed by an earlier task in the same slot
    return "done"


class _BrokenStream:
    def write(self, text: str) -> int:
        raise OSError("no")

    def flush(self) -> None:
        raise SystemExit(4)


def break_stdout() -> str:
    sys.stdout = _BrokenStream()  # type: ignore[assignment]
    return "done"


def change_directory() -> str:
    os.chdir("/")
    return "done"


def install_handlers() -> str:
    for number in range(1, signal.NSIG):
        try:
            signal.signal(number, signal.SIG_IGN)
        except (OSError, ValueError):
            continue
    return "done"


def reap_all() -> str:
    signal.alarm(0)
    try:
        os.waitpid(-1, 0)
    except ChildProcessError:
        pass
    return "done"


def disable_gc() -> str:
    gc.disable()
    sys.setrecursionlimit(100)
    return "done"


@pytest.mark.parametrize(
    "task",
    [
        close_everything,
        close_stdout,
        drop_stdout,
        close_output_files,
        break_stdout,
        change_directory,
        install_handlers,
        reap_all,
        disable_gc,
    ],
)
def test_rude_task_has_its_result_and_its_neighbours_theirs(
    executor: BatchExecutor, task: Callable[[], str]
) -> None:
    """Whatever a task does to its process, it has its outcome, and later tasks theirs."""
    futures: list[Future[Any]] = []
    for n in range(5):
        futures.append(executor.submit(task))
        futures.extend(executor.submit(pow, k, 2) for k in range(n * 10, n * 10 + 10))
    for n in range(5):
        assert futures[n * 11].result(30) == "done"
        assert [f.result(30) for f in futures[n * 11 + 1 : n * 11 + 11]] == [
            k * k for k in range(n * 10, n * 10 + 10)
        ]
    assert_works(executor)


def test_large_result_of_a_task_that_closed_all_files_fails_alone(
    executor: BatchExecutor,
) -> None:
    """A large result whose slot may have lost its pipes arrives whole, or fails alone."""
    future = executor.submit(close_everything_and_return_much)
    error = future.exception(30)
    assert isinstance(error, WorkerLostError) or future.result() == b"x" * 1_000_000
    assert_works(executor)


def test_sys_exit_in_a_task_is_its_outcome(executor: BatchExecutor) -> None:
    """sys.exit() raises SystemExit; the process lives on."""

    def task() -> None:
        sys.exit(3)

    error = executor.submit(task).exception(20)
    assert isinstance(error, SystemExit)
    assert error.code == 3


def test_setsid_in_a_task_fails_or_works_but_harms_nobody(
    executor: BatchExecutor, tmp_path: Path
) -> None:
    """A task cannot slip away from its executor by changing its process group."""

    def task(path: str) -> None:
        try:
            os.setsid()
        except PermissionError:
            pass
        try:
            os.setpgid(0, os.getppid())
        except OSError:
            pass
        write(path, str(os.getpid()))
        signal.pause()

    pid = int(run_out_of_time(executor, task, tmp_path / "began"))
    assert gone([pid])
    assert_works(executor)


# Output without end.


def test_flood_of_output_holds_up_nobody(tmp_path: Path) -> None:
    """100 MB of output reach a slow client in bounded memory; other tasks' results do not wait."""
    script = tmp_path / "client.py"
    script.write_text(
        "import os, resource, sys\n"
        "from cloudexec import BatchExecutor\n"
        "def flood(raw):\n"
        "    line = b'x' * 99_999 + b'\\n'\n"
        "    for _ in range(1000):\n"
        "        if raw:\n"
        "            os.write(1, line)\n"
        "        else:\n"
        "            sys.stdout.buffer.write(line)\n"
        "    return 'flooded'\n"
        "if __name__ == '__main__':\n"
        "    raw = sys.argv[1] == 'raw'\n"
        "    with BatchExecutor(2) as executor:\n"
        "        executor.submit(abs, 1).result()\n"
        "        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "        future = executor.submit(flood, raw)\n"
        "        done = sum(f.result() for f in [executor.submit(abs, -1) for _ in range(500)])\n"
        "        print('others', done, future.done(), file=sys.stderr, flush=True)\n"
        "        result = future.result()\n"
        "    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before\n"
        "    print(result, used, file=sys.stderr, flush=True)\n"
    )
    for mode in ("raw", "buffered"):
        client = subprocess.Popen(
            [sys.executable, str(script), mode],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": PACKAGE},
        )
        assert client.stdout is not None
        assert client.stderr is not None
        # Nobody reads the client's output so far: results of the others come nevertheless.
        assert client.stderr.readline().split() == ["others", "500", "False"], mode
        out, err = client.communicate(timeout=50)
        assert client.returncode == 0, err
        result, used = err.split()
        assert result == "flooded"
        assert out.count("\n") == 1000
        assert len(out) == 100_000_000
        assert int(used) < 40_000, f"{mode}: {used} KiB more in the client"


def test_printing_thread_and_large_result_share_the_pipe() -> None:
    """A task's thread prints without end while its large result travels: both arrive."""

    def task() -> bytes:
        def chatter() -> None:
            while True:
                sys.stdout.write("x" * 50_000 + "\n")

        threading.Thread(target=chatter, daemon=True).start()
        return bytes(100_000_000)

    with open(os.devnull, "w") as null:
        shown, sys.stdout = sys.stdout, null
        try:
            with BatchExecutor(1, max_tasks_per_child=1) as executor:
                for _ in range(3):
                    assert len(executor.submit(task).result(40)) == 100_000_000
        finally:
            sys.stdout = shown


# Workers die.


def slow_square(n: int) -> int:
    time.sleep(0.02)
    return n * n


@pytest.mark.parametrize("victim", ["supervisor", "zygote", "slots", "group", "everything"])
def test_killed_worker_loses_no_future(victim: str) -> None:
    """Whichever processes of a worker are killed in mid-run, every future has its result."""
    with BatchExecutor(2, output="off", retries=5) as executor:
        futures = [executor.submit(slow_square, n) for n in range(100)]
        for _ in range(2):
            wait(futures[:20], 30)
            supervisors, zygotes, slots = worker_processes()
            if victim == "group":
                for process in supervisors:
                    with contextlib.suppress(ProcessLookupError):  # it was killed before
                        os.killpg(process.pid, signal.SIGKILL)
            else:
                for process in {
                    "supervisor": supervisors,
                    "zygote": zygotes,
                    "slots": slots,
                    "everything": supervisors + zygotes + slots,
                }[victim]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()  # some end with others that were killed before
            wait([f for f in futures if not f.done()], 30, FIRST_COMPLETED)
        assert [f.result(40) for f in futures] == [n * n for n in range(100)]
    assert_no_descendants()


@pytest.mark.parametrize("turn", range(6))  # each may find other tasks on their way to it
def test_terminated_supervisor_loses_no_future(tmp_path: Path, turn: int) -> None:
    """SIGTERM drains a worker: what runs is finished there, once; the rest runs elsewhere."""

    began, gate = fifo(tmp_path / "began"), fifo(tmp_path / "gate")

    def task(n: int) -> int:
        mark(tmp_path / str(n))
        if n == 1:
            write(began, "x")
            read(gate)
        return n

    with BatchExecutor(2, output="off", retries=0) as executor:
        futures = [executor.submit(task, n) for n in range(60)]
        read(began)
        (supervisor,) = worker_processes()[0]
        supervisor.terminate()
        while not executor.stats().workers.draining:
            assert supervisor.is_running()
        write(gate, "")
        assert [f.result(30) for f in futures] == list(range(60))
    assert [marked(tmp_path / str(n)) for n in range(60)] == [1] * 60


def test_task_without_retries_is_lost_with_its_worker(tmp_path: Path) -> None:
    """retries=0 and a killed supervisor: what had begun fails, begun once; the error says why."""
    began = fifo(tmp_path / "began")

    def task(path: str) -> None:
        mark(tmp_path / "calls")
        write(path, "x")
        signal.pause()

    with BatchExecutor(1, retries=0, output="off") as executor:
        future = executor.submit(task, began)
        read(began)
        worker_processes()[0][0].kill()
        error = future.exception(30)
        assert isinstance(error, WorkerLostError)
        assert "SIGKILL" in str(error)
        assert error.attempts == 1
        assert executor.submit(pow, 2, 5).result(30) == 32
    assert marked(tmp_path / "calls") == 1


def test_slot_killed_while_idle_is_replaced(executor: BatchExecutor) -> None:
    """A slot that dies with nothing to do costs nobody anything."""
    for _ in range(3):
        assert_works(executor)
        _, _, slots = worker_processes()
        assert slots
        for slot in slots:
            slot.kill()
        # The zygote has not told the supervisor yet when the next tasks come.
    futures = [executor.with_options(retries=0).submit(pow, n, 2) for n in range(50)]
    assert [f.result(30) for f in futures] == [n * n for n in range(50)]
    assert executor.stats().workers.lost == 0


def test_idle_slot_interrupted_or_terminated_is_replaced(executor: BatchExecutor) -> None:
    """SIGINT and SIGTERM to an idle slot do not disturb later tasks."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        assert_works(executor)
        for slot in worker_processes()[2]:
            slot.send_signal(number)
    assert_works(executor)


def test_initializer_that_ends_its_process_breaks_the_executor() -> None:
    """An initializer that crashes is tried a few times, then breaks the executor."""
    with BatchExecutor(2, initializer=os._exit, initargs=(4,), output="off") as executor:
        futures = [executor.submit(abs, n) for n in range(5)]
        for future in futures:
            error = future.exception(30)
            assert isinstance(error, BrokenBatchExecutor)
            assert "4" in str(error)
        with pytest.raises(BrokenBatchExecutor):
            executor.submit(abs, 1)


CLIENT = """
import os, signal, subprocess, sys
from cloudexec import BatchExecutor

def hang(path):
    child = subprocess.Popen(["sleep", "1000"])
    with open(path, "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    signal.pause()

if __name__ == "__main__":
    with BatchExecutor(2) as executor:
        futures = [executor.submit(hang, path) for path in sys.argv[1:]]
        futures[0].result()
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_killed_client_leaves_nothing_behind(tmp_path: Path, number: int) -> None:
    """A client that is killed leaves no process, no socket and no directory."""
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    pipes = [fifo(tmp_path / "a"), fifo(tmp_path / "b")]
    # Short: a socket's path has at most about a hundred characters.
    with tempfile.TemporaryDirectory() as temporary:
        client = subprocess.Popen(
            [sys.executable, str(script), *pipes],
            env={**os.environ, "PYTHONPATH": PACKAGE, "TMPDIR": temporary},
            stderr=subprocess.DEVNULL,
        )
        try:
            pids = [int(pid) for path in pipes for pid in read(path).split()]
            below = psutil.Process(client.pid).children(recursive=True)
            sockets = os.listdir(temporary)
            client.send_signal(number)
            client.wait(20)
        finally:
            client.kill()
            client.wait()
        _, alive = psutil.wait_procs(below, timeout=15)
        for process in alive:
            process.kill()
        assert {p.pid for p in below} >= set(pids)
        assert not alive
        assert sockets
        assert not os.listdir(temporary)


def test_errors_of_lost_tasks_pickle(executor: BatchExecutor) -> None:
    """WorkerLostError keeps its evidence through pickle: it may be a task's result itself."""
    error = executor.with_options(retries=0).submit(os._exit, 6).exception(20)
    copy = pickle.loads(pickle.dumps(error))
    assert isinstance(copy, WorkerLostError)
    assert isinstance(error, WorkerLostError)
    assert (copy.exit_code, copy.worker_id, str(copy)) == (6, error.worker_id, str(error))
