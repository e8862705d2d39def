"""Workers that take their leave of a client that does not answer any more."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from bare_server import serve_sessions

from cloudexec import BatchExecutor, TaskTimeoutError, _enrolment
from cloudexec._proto import tasks_pb2 as pb
from cloudexec.testing import ManualLaunch, ManualLauncher

pytestmark = pytest.mark.timeout(60)

_KEY = bytes(range(32))


class _Client:
    """Lets a worker in, acknowledges what it says, and stops short of closing the session."""

    def __init__(self, path: Path, *, has_modules: bool) -> None:
        self.has_modules = has_modules
        self.returned: list[int] = []
        self.fetched = threading.Event()
        self.sent = threading.Event()
        self.ready = threading.Event()
        self.goodbye = threading.Event()
        self.over = threading.Event()
        self.server = serve_sessions(path, self._session, self._fetch)

    def _session(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        hello = pb.WorkerMessage.FromString(next(requests)).hello
        nonce = os.urandom(32)
        mac = _enrolment.proof(_KEY, "server", "x", hello.identity, hello.nonce, nonce)
        yield pb.ServerMessage(challenge=pb.Challenge(nonce=nonce, mac=mac)).SerializeToString()
        next(requests)
        welcome = pb.Welcome(
            worker_id="worker-1",
            session_token=os.urandom(16),
            heartbeat_interval=10.0,
            orphan_timeout=30.0,
            min_slots=1,
            idle_timeout=-1.0,
            resumable=True,
            modules=self.has_modules,
        )
        yield pb.ServerMessage(welcome=welcome).SerializeToString()
        if self.has_modules:
            given = pb.Tasks(
                leases=[7], functions=[0], payloads=[b"not read"], numbers=[1], estimates=[0.1]
            )
            yield pb.ServerMessage(number=1, tasks=given).SerializeToString()
        for data in requests:
            message = pb.WorkerMessage.FromString(data)
            if message.number:
                yield pb.ServerMessage(received=message.number).SerializeToString()
            self.returned += message.returned
            if message.ready:
                self.ready.set()
            if message.goodbye:
                self.goodbye.set()
                self.over.wait()

    def _fetch(self, request: bytes, context: Any) -> Iterator[bytes]:
        """Send an archive with no modules, once the test lets it."""
        self.fetched.set()
        self.sent.wait(30)
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w"):
            pass
        yield pb.Chunk(data=archive.getvalue()).SerializeToString()


@pytest.fixture
def client(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[_Client]:
    client = _Client(tmp_path / "s", has_modules=getattr(request, "param", False))
    yield client
    client.over.set()
    client.server.stop(None).wait()


@pytest.fixture
def worker(client: _Client, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    worker = subprocess.Popen(
        [sys.executable, "-m", "cloudexec.worker"],
        env={
            **os.environ,
            "CLOUDEXEC_TARGET": f"unix:{tmp_path / 's'}",
            "CLOUDEXEC_EXECUTOR_ID": "x",
            "CLOUDEXEC_IDENTITY": "1",
            "CLOUDEXEC_KEY": _KEY.hex(),
            "CLOUDEXEC_SLOTS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        },
        stdin=subprocess.DEVNULL,
    )
    yield worker
    worker.kill()
    worker.wait()


def test_a_worker_that_is_wanted_back_does_not_wait_for_a_client_that_has_all(
    client: _Client, worker: subprocess.Popen[bytes]
) -> None:
    """Its platform would kill it, and take that for another end than it was."""
    assert client.ready.wait(30)
    worker.send_signal(signal.SIGTERM)
    assert client.goodbye.wait(20)
    assert worker.wait(20) == 128 + signal.SIGTERM


@pytest.mark.parametrize("client", [True], indirect=True)
def test_a_worker_that_is_wanted_back_before_it_is_ready_hands_its_tasks_back(
    client: _Client, worker: subprocess.Popen[bytes]
) -> None:
    """The client may have sent it some since it is enrolled, and they have not begun."""
    assert client.fetched.wait(30)
    worker.send_signal(signal.SIGTERM)
    client.sent.set()
    assert client.goodbye.wait(20)
    assert client.returned == [7]
    assert worker.wait(20) == 128 + signal.SIGTERM


@pytest.mark.parametrize("session", ["100", "2"])
def test_a_task_that_had_little_of_a_session_fails_only_if_that_is_all(
    session: str, tmp_path: Path
) -> None:
    """If the start of a worker has taken most of it, the task begins again on another one."""
    launcher = ManualLauncher()
    limits = {"CLOUDEXEC_DRAIN_GRACE": "1", "CLOUDEXEC_SESSION": session}
    with BatchExecutor(1, launcher=launcher, retries=1) as executor:
        future = executor.submit(_wait_for, str(tmp_path / "again"), str(tmp_path / "begun"))
        (first,) = launcher.wait(1, 30)
        with _worker(first, limits) as worker:
            while not (tmp_path / "begun").exists():
                assert worker.poll() is None
                time.sleep(0.01)
            worker.terminate()
            assert worker.wait(30) == 143
        launcher.end(first.launch_id)
        (tmp_path / "again").touch()
        if session == "2":
            with pytest.raises(TaskTimeoutError, match="all the time that worker-1 had"):
                future.result(30)
        else:
            second = launcher.wait(2, 30)[1]
            with _worker(second, {}):
                assert future.result(30) == "done"
            launcher.end(second.launch_id)


def _wait_for(path: str, begun: str) -> str:
    open(begun, "w").close()
    while not os.path.exists(path):
        time.sleep(0.01)
    return "done"


@contextmanager
def _worker(launch: ManualLaunch, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    contact = launch.contact
    worker = subprocess.Popen(
        [sys.executable, "-m", "cloudexec.worker"],
        env={
            **os.environ,
            "CLOUDEXEC_TARGET": contact.target,
            "CLOUDEXEC_EXECUTOR_ID": contact.executor_id,
            "CLOUDEXEC_IDENTITY": launch.launch_id,
            "CLOUDEXEC_KEY": contact.key.hex(),
            "CLOUDEXEC_SLOTS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            **environment,
        },
        stdin=subprocess.DEVNULL,
    )
    try:
        yield worker
    finally:
        worker.kill()
        worker.wait()
