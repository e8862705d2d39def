"""What a slot has open for itself, and tasks that come near it."""

from __future__ import annotations

import functools
import multiprocessing
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest

from cloudexec import BatchExecutor, PayloadError

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="reads /proc")


@pytest.fixture(scope="module")
def executor() -> Iterator[BatchExecutor]:
    with BatchExecutor(1, retries=0) as executor:
        yield executor


@pytest.fixture(scope="module")
def far() -> Iterator[BatchExecutor]:
    with BatchExecutor(1, listen="127.0.0.1:0") as executor:
        yield executor


def _open_files() -> set[int]:
    numbers = set(map(int, os.listdir("/proc/self/fd")))
    return {fd for fd in numbers if os.path.exists(f"/proc/self/fd/{fd}")}


def _array(size: int) -> Any:
    return np.ones(size)


_SMALL, _LARGE = 30_000, 300_000
"""Items of an array that goes through the arena, and of one that has a file of its own."""


def test_no_file_of_a_slot_has_a_small_number(executor: BatchExecutor) -> None:
    """Not those it starts with, nor what it opens for results."""
    for size in (_SMALL, _LARGE):
        assert executor.submit(_array, size).result(30).sum() == size
    assert {fd for fd in executor.submit(_open_files).result(30) if fd < 1000} == {0, 1, 2}


@pytest.mark.parametrize("limit", [64, 256])
def test_slots_start_where_few_files_may_be_open(limit: int) -> None:
    """Their own then have the largest numbers that there are."""
    code = (
        "import os; from cloudexec import BatchExecutor\n"
        "with BatchExecutor(1) as executor:\n"
        "    print(*executor.submit(os.listdir, '/proc/self/fd').result())\n"
    )

    def lower() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))

    done = subprocess.run(
        [sys.executable, "-c", code], preexec_fn=lower, capture_output=True, text=True, timeout=50
    )
    own = set(map(int, done.stdout.split())) - {0, 1, 2, 3}  # 3 is that of listdir()
    assert own, done.stderr
    assert min(own) >= limit // 2


def _take_all_numbers(path: str, end: int) -> int:
    os.closerange(3, end)
    _kept.extend(open(path, "a") for _ in range(30))  # noqa: SIM115
    return len(_kept)


_kept: list[Any] = []


def test_a_task_that_closes_small_numbers_costs_nothing(
    executor: BatchExecutor, tmp_path: Any
) -> None:
    """As code does that turns into a daemon; results do not end in what it opens then."""
    path = tmp_path / "of the task"
    assert executor.submit(_array, _SMALL).result(30).sum() == _SMALL
    pid = executor.submit(os.getpid).result(30)
    assert executor.submit(_take_all_numbers, str(path), 1000).result(30) == 30
    for size in (_SMALL, _LARGE):
        assert executor.submit(_array, size).result(30).sum() == size
    assert executor.submit(os.getpid).result(30) == pid
    assert path.read_bytes() == b""


def test_a_task_that_closes_everything_costs_its_slot_alone(executor: BatchExecutor) -> None:
    """What comes after it runs in another one."""
    future = executor.submit(os.closerange, 3, 100_000)
    assert [executor.submit(abs, -i).result(30) for i in range(3)] == [0, 1, 2]
    assert future.result(30) is None


# Ends of pipes.


def _raise_with(make: Callable[[], Any]) -> None:
    error = ValueError("with an end of a pipe")
    error.pipe = make()  # type: ignore[attr-defined]
    raise error


def _end_of_a_pipe() -> Connection[Any, Any]:
    return multiprocessing.Pipe()[0]


@pytest.mark.parametrize("closed", [False, True])
def test_an_end_of_a_pipe_is_refused_by_workers_elsewhere_and_in_results(
    executor: BatchExecutor, far: BatchExecutor, closed: bool
) -> None:
    """Its number means another file in another process: the error names it, and a way out."""
    one, other = multiprocessing.Pipe()
    if closed:
        one.close()
    futures = [
        far.submit(len, one),  # type: ignore[arg-type]
        far.submit(len, [{"key": (one,)}]),
        far.submit(functools.partial(print, one)),
        far.submit(lambda: one),
        executor.submit(_end_of_a_pipe),
        executor.submit(_raise_with, _end_of_a_pipe),
    ]
    errors = [future.exception(30) for future in futures]
    for refused in (lambda: next(far.map(print, [one])), lambda: far.put([one])):
        with pytest.raises(PayloadError) as caught:
            refused()
        errors.append(caught.value)
    for error in errors:
        assert isinstance(error, PayloadError)
        assert "Connection" in str(error)
        assert "Manager()" in str(error)
    assert executor.submit(abs, -1).result(30) == 1
    other.close()


class Reopening(Connection):  # type: ignore[type-arg]
    """One that says how it is made elsewhere."""

    def __reduce__(self) -> Any:
        return str, ("reopened",)


def test_a_class_of_the_users_that_knows_how_is_sent(executor: BatchExecutor) -> None:
    one, _ = multiprocessing.Pipe()
    mine = Reopening(os.dup(one.fileno()))
    assert executor.submit(str, mine).result(30) == "reopened"
