"""Processes that stand still, and clocks that jump."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import textwrap
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import fault_tasks as tasks
import pytest
from fault_helpers import (
    PATIENCE,
    assert_gone,
    descendants,
    start,
    start_client,
    until,
    worker_processes,
)

from cloudexec import BatchExecutor
from cloudexec._record_class import replace

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.usefixtures("nothing_left"),
    pytest.mark.skipif(sys.platform == "win32", reason="signals"),
]

LEASE = 3.0
"""Seconds of silence after which a worker counts as lost here, instead of a minute."""


def hasten(executor: BatchExecutor) -> None:
    """Have silence noticed soon; before the first task."""
    submitter = executor._submitter
    submitter._config = replace(submitter._config, lease_timeout=LEASE)


CLIENT = """
import sys
from cloudexec import BatchExecutor
from test_time import hasten
import fault_tasks as tasks

directory, mode = sys.argv[1:]
options = {"listen": "127.0.0.1:0"} if mode == "wire" else {}
with BatchExecutor(2, output="off", **options) as executor:
    hasten(executor)
    futures = [
        executor.submit(tasks.mark_and_wait, directory, n, 0.15, n % 5 // 4 * 1_000_000)
        for n in range(24)
    ]
    results = [future.result() for future in futures]
    stats = executor.stats()
assert [number for number, _, _ in results] == list(range(24))
print(stats.lost_attempts, stats.duplicates, stats.workers.lost)
"""


def test_a_client_that_stands_still_loses_nothing(tmp_path: Path) -> None:
    """Stopped for longer than silence is borne, as when a laptop sleeps: it was not silence.

    What its workers said meanwhile is there to be read when it goes on.
    """
    modes = ("local", "wire")
    with contextlib.ExitStack() as stack:
        clients = []
        for mode in modes:
            (tmp_path / mode).mkdir()
            client = stack.enter_context(start_client(CLIENT, str(tmp_path / mode), mode))
            stack.callback(client.kill)
            clients.append(client)
        until(lambda: all(len(os.listdir(tmp_path / mode)) > 4 for mode in modes))
        for client in clients:
            client.send_signal(signal.SIGSTOP)
        threading.Event().wait(1.5 * LEASE)
        for client in clients:
            client.send_signal(signal.SIGCONT)
        for client in clients:
            out, err = client.communicate(timeout=PATIENCE)
            assert out == "0 0 0\n", err
    for mode in modes:
        assert {path.stat().st_size for path in (tmp_path / mode).iterdir()} == {1}


@pytest.mark.parametrize("mode", ["local", "wire"])
def test_tasks_of_a_worker_that_stands_still_run_elsewhere(mode: str, tmp_path: Path) -> None:
    """It counts as lost when it has been silent for long; each future has one outcome."""
    resolved: list[Future[Any]] = []
    traces, gate = tmp_path / "traces", tmp_path / "gate"
    traces.mkdir()
    with start(mode) as executor:
        hasten(executor)
        futures = []
        for number in range(20):
            # From the seventh on they are not done before the worker stands still.
            behind = str(gate) if number > 5 else ""
            future = executor.submit(
                tasks.mark_and_wait, str(traces), number, 0.05, 100_000, gate=behind
            )
            future.add_done_callback(resolved.append)
            futures.append(future)
        until(lambda: sum(future.done() for future in futures) > 3)
        (supervisor,) = worker_processes()["supervisor"]
        slots = worker_processes()["slot"]
        supervisor.send_signal(signal.SIGSTOP)
        gate.touch()
        until(lambda: executor.stats().workers.lost)
        results = [future.result(PATIENCE) for future in futures]
        assert [number for number, _, _ in results] == list(range(20))
        assert all((content == number).all() for number, _, content in results)
        # It is told to end, and cannot hear that.
        assert_gone([supervisor, *slots])
    assert len(resolved) == len(set(resolved)) == 20
    calls = [path.stat().st_size for path in traces.iterdir()]
    assert max(calls) == 2  # what it ran when it stopped
    assert sum(calls) <= 20 + 2 * len(slots)


@pytest.mark.parametrize("mode", ["local", "wire"])
def test_a_worker_that_stood_still_for_a_moment_goes_on(mode: str, tmp_path: Path) -> None:
    """Nothing is lost or done twice by a pause that is shorter than silence is borne."""
    with start(mode) as executor:
        futures = [
            executor.submit(tasks.mark_and_wait, str(tmp_path), number, 0.05, 100_000)
            for number in range(20)
        ]
        until(lambda: sum(future.done() for future in futures) > 3)
        found = worker_processes()
        stopped = found["supervisor"] + found["zygote"] + found["slot"]
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        threading.Event().wait(0.5)
        for process in stopped:
            process.send_signal(signal.SIGCONT)
        assert [future.result(PATIENCE)[0] for future in futures] == list(range(20))
        assert executor.stats().lost_attempts == 0
    assert {path.stat().st_size for path in tmp_path.iterdir()} == {1}


JUMPING = """
import itertools, time

_jumps = itertools.cycle((86_400, -86_400, 7e8, 0, -7e8))
_time = time.time
time.time = lambda: _time() + next(_jumps)
time.time_ns = lambda: int(time.time() * 1e9)
"""


@pytest.mark.parametrize("mode", ["local", "wire"])
@pytest.mark.alone
def test_clocks_may_jump(mode: str, tmp_path: Path) -> None:
    """Nobody decides by the time of day: neither client nor workers, which both see it jump."""
    (tmp_path / "sitecustomize.py").write_text(JUMPING)
    script = textwrap.dedent(
        """
        import sys, time
        from cloudexec import BatchExecutor, TaskTimeoutError
        from test_time import hasten
        import fault_tasks as tasks

        def moves():
            return abs(time.time() - time.time()) > 1000

        options = {"listen": "127.0.0.1:0"} if sys.argv[1] == "wire" else {}
        with BatchExecutor(2, output="off", idle_timeout=60, **options) as executor:
            hasten(executor)
            assert moves() and executor.submit(moves).result()
            assert list(executor.map(abs, range(-2000, 0))) == list(range(2000, 0, -1))
            assert len(executor.submit(tasks.large, 3_000_000).result()) == 3_000_000
            timed = executor.with_options(timeout=0.5)
            began = time.monotonic()
            assert isinstance(timed.submit(tasks.break_down, "hang").exception(), TaskTimeoutError)
            assert 0.4 < time.monotonic() - began < 5
            assert timed.submit(time.sleep, 0.2).result() is None
            time.sleep(1)
            stats = executor.stats()
            assert stats.workers.lost == stats.launch_failures == stats.lost_attempts == 0, stats
        """
    )
    with start_client(script, mode, PYTHONPATH=str(tmp_path)) as client:
        try:
            _, err = client.communicate(timeout=PATIENCE)
        finally:
            client.kill()
    assert client.returncode == 0, err


ENDLESS = """
import sys
from cloudexec import BatchExecutor
from test_time import start_session
import fault_tasks as tasks

with BatchExecutor(2, output="off") as executor:
    executor.submit(start_session).result()
    executor.submit(tasks.tell_and_wait, *sys.argv[1:]).result()
"""


def start_session() -> int:
    """Start a process that leaves its slot's group."""
    import subprocess

    return subprocess.Popen(["sleep", "1000"], start_new_session=True).pid


def test_a_killed_client_takes_along_what_left_its_group(tmp_path: Path) -> None:
    """Workers, slots, and what tasks started in sessions of their own."""
    told, gate = str(tmp_path / "told"), str(tmp_path / "gate")
    os.mkfifo(told)
    os.mkfifo(gate)
    with start_client(ENDLESS, told, gate) as client:
        try:
            with open(told) as file:
                file.readline()
            below = descendants(client.pid)
        finally:
            client.kill()
    assert len(below) >= 4
    assert_gone(below)
