"""Each process of a worker is killed in each phase of its life: every task has its result."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fault_tasks as tasks
import numpy as np
import psutil
import pytest
from fault_helpers import (
    PATIENCE,
    assert_gone,
    is_alive,
    start,
    until,
    worker_processes,
)

from cloudexec import BatchExecutor, WorkerLostError

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes in /proc"),
]

VICTIMS = ("slot", "zygote", "supervisor")


class Run:
    """Tasks in flight on workers over TLS.

    Attributes:
        executor: With two slots.
        calls: How often each task was begun, as marks in files.
    """

    def __init__(self, executor: BatchExecutor, directory: Path) -> None:
        self.executor = executor
        self._directory = directory
        self._size = 0
        self._futures: list[Any] = []
        self._expected: list[Any] = []

    def submit(self, count: int, seconds: float, size: int = 0, argument: Any = b"") -> None:
        for _ in range(count):
            number = len(self._futures)
            self._futures.append(
                self.executor.submit(
                    tasks.mark_and_wait, str(self._directory), number, seconds, size, argument
                )
            )
            self._expected.append((number, len(argument), size))

    def begun(self) -> int:
        return len(os.listdir(self._directory))

    def done(self) -> int:
        return sum(future.done() for future in self._futures)

    def check(self) -> None:
        """Every result is there, and right."""
        for future, (number, length, size) in zip(self._futures, self._expected, strict=True):
            whose, given, content = future.result(PATIENCE)
            assert (whose, given) == (number, length)
            assert len(content) == size
            assert not size or (content == number % 251).all()
        stats = self.executor.stats()
        assert (stats.tasks.succeeded, stats.tasks.failed) == (len(self._futures), 0)
        assert (stats.tasks.waiting, stats.tasks.sent, stats.tasks.running) == (0, 0, 0)


def oldest(victim: str) -> psutil.Process | None:
    found = worker_processes()[victim]
    return found[0] if found else None


def starting(run: Run, victim: str) -> None:
    """As soon as it can be seen."""
    run.submit(20, 0.01)
    until(lambda: oldest(victim)).kill()


def enrolling(run: Run, victim: str) -> None:
    """The client has heard of the worker, and not yet that a slot is ready."""
    run.submit(20, 0.01)
    until(lambda: run.executor.stats().workers.slots)
    until(lambda: oldest(victim)).kill()


def receiving(run: Run, victim: str) -> None:
    """Large arguments are on their way."""
    run.submit(4, 0.0)
    run.check()
    sent = run.executor.stats().bytes_sent
    for value in range(3):
        run.submit(2, 0.0, argument=np.full(40_000_000, value, np.uint8))
    until(lambda: run.executor.stats().bytes_sent > sent + 10_000_000)
    until(lambda: oldest(victim)).kill()


def running(run: Run, victim: str) -> None:
    """Two tasks run, and others wait behind them."""
    run.submit(12, 0.05)
    until(lambda: run.begun() > 3)
    until(lambda: oldest(victim)).kill()


def uploading(run: Run, victim: str) -> None:
    """Large results are on their way."""
    run.submit(4, 0.0)
    run.check()
    received = run.executor.stats().bytes_received
    run.submit(6, 0.0, size=40_000_000)
    until(lambda: run.executor.stats().bytes_received > received + 10_000_000)
    until(lambda: oldest(victim)).kill()


def draining(run: Run, victim: str) -> None:
    """The platform ends the worker while its tasks run."""
    run.submit(8, 0.25)
    until(lambda: run.begun() >= 2)
    ending = worker_processes()
    ending["supervisor"][0].terminate()
    until(lambda: run.executor.stats().workers.draining)
    ending[victim][0].kill()


PHASES = (starting, enrolling, receiving, running, uploading, draining)


@pytest.mark.parametrize("victim", VICTIMS)
@pytest.mark.parametrize("phase", PHASES, ids=[phase.__name__ for phase in PHASES])
def test_a_process_killed_in_a_phase_loses_nothing(
    phase: Callable[[Run, str], None], victim: str, tmp_path: Path
) -> None:
    """All results are right in the end, and new tasks find workers."""
    with start("wire") as executor:
        run = Run(executor, tmp_path)
        phase(run, victim)
        run.check()
        run.submit(10, 0.0)
        run.check()


# What leaves its process group.


def leave(how: str) -> list[int]:
    """Start processes that want to outlive the task, in a session of their own; return who.

    Args:
        how: ``"session"``: a child; ``"daemon"``: an orphan, which has a child.
    """
    if how == "session":
        return [subprocess.Popen(["sleep", "1000"], start_new_session=True).pid]
    read, write = os.pipe()
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            child = os.fork()
            if child:
                os.write(write, f"{os.getpid()} {child}".encode())
                os.close(write)
            while True:
                signal.pause()
        os._exit(0)
    os.wait()
    os.close(write)
    pids = list(map(int, os.read(read, 100).split()))
    os.close(read)
    return pids


def alive(pids: list[int]) -> list[psutil.Process]:
    processes = [psutil.Process(pid) for pid in pids]
    assert all(map(is_alive, processes))
    return processes


@pytest.mark.parametrize("end", ["crash", "shutdown", *VICTIMS[1:]])
def test_what_leaves_its_group_ends_with_its_slot(end: str) -> None:
    """Daemons too, whichever process dies: they become our children, and these are killed."""
    with BatchExecutor(1, retries=0, output="off") as executor:
        left = alive(executor.submit(leave, "session").result(PATIENCE))
        left += alive(executor.submit(leave, "daemon").result(PATIENCE))
        if end == "crash":
            error = executor.submit(os._exit, 1).exception(PATIENCE)
            assert isinstance(error, WorkerLostError)
        elif end != "shutdown":
            until(lambda: oldest(end)).kill()
        if end != "shutdown":
            assert_gone(left)
    assert_gone(left)


def test_processes_that_are_stopped_end_with_their_supervisor() -> None:
    """A zygote that somebody stopped clears up all the same when its supervisor dies."""
    with BatchExecutor(1, output="off") as executor:
        left = alive(executor.submit(leave, "daemon").result(PATIENCE))
        found = worker_processes()
        left += found["zygote"] + found["slot"]
        for process in found["zygote"] + found["slot"]:
            process.suspend()
        found["supervisor"][0].kill()
        assert_gone(left)
        assert executor.submit(abs, -1).result(PATIENCE) == 1


def leave_and_wait(told: str, gate: str) -> None:
    left = leave("daemon")
    with open(told, "w") as file:
        file.write(" ".join(map(str, left)))
    with open(gate) as file:
        file.read()


def test_what_another_slot_left_is_not_touched(tmp_path: Path) -> None:
    """A slot's end is that of its own daemons, not of those that its neighbour has."""
    told, gate = str(tmp_path / "told"), str(tmp_path / "gate")
    os.mkfifo(told)
    os.mkfifo(gate)
    with BatchExecutor(2, retries=0, output="off") as executor:
        waits = executor.submit(leave_and_wait, told, gate)
        with open(told) as file:
            kept = alive(list(map(int, file.read().split())))
        other = alive(executor.submit(leave, "daemon").result(PATIENCE))
        error = executor.submit(os._exit, 1).exception(PATIENCE)
        assert isinstance(error, WorkerLostError)
        assert_gone(other)
        assert all(map(is_alive, kept))
        with open(gate, "w") as file:
            file.write("x")
        waits.result(PATIENCE)
    assert_gone(kept)


def test_ended_daemons_are_reaped() -> None:
    """A slot whose tasks start daemons time and again gathers no zombies."""
    with BatchExecutor(1, output="off") as executor:
        for _ in range(5):
            for process in alive(executor.submit(leave, "daemon").result(PATIENCE)):
                process.kill()
        (zygote,) = worker_processes()["zygote"]
        until(lambda: len(zygote.children()) == 1)
