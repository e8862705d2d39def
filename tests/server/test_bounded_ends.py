"""Workers that were let in and do not go: the executor ends without them, in a few seconds."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hostile_peers import (
    MIB,
    Inside,
    double,
    executor_at,
    result_of,
    wait_until,
)

from cloudexec import BatchExecutor, BrokenBatchExecutor, ObjectOptions, _direct
from cloudexec._core import ends
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._server import driver
from cloudexec._wire.channel import BLOB_KEY, LEASE_KEY, SIZE_KEY
from cloudexec.testing import ManualLauncher

pytestmark = pytest.mark.timeout(60)

KILL_BOUND = 4.0
"""Seconds that ``kill_workers()`` says that it takes at most, and one for a busy machine."""


def _goes_on(worker: Inside, ended: threading.Event, say: Callable[[], Any]) -> None:
    """Have a worker say something again and again until the test is over."""

    def run() -> None:
        while not ended.wait(0.05):
            say()

    threading.Thread(target=run, daemon=True).start()


def _holds_its_task(worker: Inside, ended: threading.Event) -> None:
    worker.send(ready=True, started=[worker.take()])
    _goes_on(worker, ended, lambda: worker.send(heartbeat=pb.Heartbeat()))


def _has_nothing_to_do(worker: Inside, ended: threading.Event) -> None:
    worker.send(ready=True, results=result_of(worker.take(), value=1))
    _goes_on(worker, ended, lambda: worker.send(heartbeat=pb.Heartbeat()))


def _says_that_it_drains(worker: Inside, ended: threading.Event) -> None:
    worker.send(ready=True, results=result_of(worker.take(), value=1))
    _goes_on(worker, ended, lambda: worker.send(draining=True))


def _sends_its_result_byte_by_byte(worker: Inside, ended: threading.Event) -> None:
    lease = worker.take()
    worker.send(ready=True)
    call = worker.channel.stream_unary("/cloudexec.v1.TaskServer/Deliver")
    number = worker.welcome.first_blob + 1
    more = ((BLOB_KEY, str(number)), (SIZE_KEY, str(MIB)), (LEASE_KEY, str(lease)))

    def trickle() -> Iterator[bytes]:
        while not ended.wait(0.05):
            yield pb.Chunk(data=b"x").SerializeToString()

    call.future(trickle(), metadata=(*worker.token, *more))


def _reads_nothing_of_what_it_fetches(worker: Inside, ended: threading.Event) -> None:
    blobs = [blob.id for blob in worker.take_message().blobs]
    fetch = worker.channel.unary_stream("/cloudexec.v1.TaskServer/Fetch")
    for blob in blobs * 20:
        call = fetch(pb.FetchRequest(blob=blob).SerializeToString(), metadata=worker.token)
        threading.Thread(target=lambda call=call: ended.wait() and call.cancel()).start()


def _reads_nothing_of_its_session(worker: Inside, ended: threading.Event) -> None:
    """More is on its way to it than the windows hold."""
    worker.send(ready=True)


def _sends_a_result_and_reads_nothing(worker: Inside, ended: threading.Event) -> None:
    worker.send(ready=True, results=result_of(worker.take(), value=1))


BEHAVIOURS = (
    _reads_nothing_of_what_it_fetches,
    _holds_its_task,
    _has_nothing_to_do,
    _says_that_it_drains,
    _sends_its_result_byte_by_byte,
    _reads_nothing_of_its_session,
)


@pytest.mark.parametrize("place", ["tls", "unix"])
def test_kill_workers_waits_for_nobody(place: str) -> None:
    """Whatever workers keep open, they are cut off two seconds after they were told to end."""
    launcher = ManualLauncher(slots_per_worker=64, needs_network=place == "tls")
    workers = len(BEHAVIOURS)
    objects = ObjectOptions(bucket=False)
    executor = BatchExecutor(64 * workers, launcher=launcher, objects=objects, output="off")
    ended = threading.Event()
    inside = []
    # Each with content of its own, so that it is sent for each.
    tasks = [executor.submit(len, os.urandom(32 * MIB))]
    tasks += [executor.submit(len, os.urandom(60_000)) for _ in range(64 * workers)]
    try:
        for number, behave in enumerate(BEHAVIOURS, 1):
            inside.append(Inside(launcher, number, slots=64))
            behave(inside[-1], ended)
        wait_until(lambda: executor.stats().workers.draining == 1)
        began = time.monotonic()
        executor.kill_workers()
        assert time.monotonic() - began < KILL_BOUND
        assert any(isinstance(task.exception(0), BrokenBatchExecutor) for task in tasks)
    finally:
        ended.set()
        for worker in inside:
            worker.close()
    assert executor._driver.finished.is_set()  # type: ignore[union-attr]


@pytest.mark.parametrize("behave", [_says_that_it_drains, _sends_a_result_and_reads_nothing])
def test_shutdown_gives_up_who_has_nothing_to_do_and_does_not_end(
    behave: Callable[[Inside, threading.Event], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for tasks as long as they take; for workers without any ten seconds."""
    monkeypatch.setattr(ends, "_FAREWELL", 0.2)
    launcher = ManualLauncher()
    executor = BatchExecutor(1, launcher=launcher)
    ended = threading.Event()
    task = executor.submit(double, 1)
    worker = Inside(launcher, 1)
    try:
        behave(worker, ended)
        assert task.result(20) == 1
        began = time.monotonic()
        executor.shutdown()
        assert time.monotonic() - began < KILL_BOUND
    finally:
        ended.set()
        worker.close()


def test_a_launch_that_never_ends_is_left_alone_in_the_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A launcher that cannot end a process, and cannot say that it ended, is told several times."""
    monkeypatch.setattr(driver, "_END_GRACE", 0.1)
    launcher = ManualLauncher(ends_when_terminated=False)
    executor = BatchExecutor(1, launcher=launcher)
    executor.submit(double, 1)
    launch = launcher.wait(1, 20)[0]
    executor.kill_workers()
    assert launcher.terminated.count(launch.launch_id) > 3
    assert "1 worker not known to have ended" in caplog.text
    launcher.end_all()  # and nothing comes of it


def _sleep(pid_file: str) -> None:
    with open(pid_file, "w") as file:
        file.write(str(os.getpid()))
    time.sleep(1000)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no /proc here")
@pytest.mark.parametrize("stopped", ["zygote", "all"])
def test_kill_workers_ends_processes_that_are_stopped(stopped: str, tmp_path: Path) -> None:
    """Who is stopped reads nothing, answers nothing, and is killed all the same."""
    executor = BatchExecutor(1)
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    future = executor.submit(_sleep, str(tmp_path / "pid"))
    wait_until(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    slot = psutil.Process(int((tmp_path / "pid").read_text()))
    zygote = slot.parent()
    assert zygote is not None
    supervisor = zygote.parent()
    assert supervisor is not None
    assert supervisor.ppid() == os.getpid()
    processes = {"supervisor": supervisor, "zygote": zygote, "slot": slot}
    for name, process in processes.items():
        if stopped in (name, "all"):
            process.suspend()
    began = time.monotonic()
    executor.kill_workers()
    assert time.monotonic() - began < KILL_BOUND
    assert isinstance(future.exception(0), BrokenBatchExecutor)
    assert before.isdisjoint(each.pid for each in processes.values())
    _, alive = psutil.wait_procs(processes.values(), timeout=5)
    assert not alive


def test_a_transfer_that_stands_still_does_not_hold_up_the_end() -> None:
    """Half-open direct sockets, at each step of what is said over them."""
    with executor_at("unix") as executor:
        executor.submit(double, 1).result(30)
        driver: Any = executor._driver
        session = next(iter(driver.sessions.values()))
        blob = driver.store.intern(memoryview(os.urandom(16 * MIB)))
        session.told.describe(blob)
        silent = socket.socket(socket.AF_UNIX)
        silent.connect(driver.service.direct_path)
        unread = _direct.connect(driver.service.direct_path, session.token, _direct.FETCH, blob.id)
        assert unread.recv(1) == _direct.ACCEPTED
        future = executor.submit(time.sleep, 1000)
        wait_until(lambda: session.worker_id in driver.machine.workers)
        wait_until(future.running)
        lease = next(iter(driver.machine.workers[session.worker_id].leases))
        unsent = _direct.connect(driver.service.direct_path, session.token, _direct.DELIVER, lease)
        assert unsent.recv(1) == _direct.ACCEPTED
        began = time.monotonic()
        executor.kill_workers()
        assert time.monotonic() - began < KILL_BOUND
        for connection in (silent, unread, unsent):
            connection.close()
