"""A worker that loses its client before it could take a task, and is taken over by the next."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from bare_server import serve_sessions

from cloudexec import _enrolment
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._wire.channel import pack_chunk

pytestmark = pytest.mark.timeout(60)

_KEY = bytes(range(32))


class _Clients:
    """Two clients, one after the other: the first is lost while its modules are fetched."""

    def __init__(self, path: Path) -> None:
        self.held: list[pb.Holding] = []
        self.ready = threading.Event()
        self.over = threading.Event()
        self._fetched = 0
        self.server = serve_sessions(path, self._session, self._fetch)

    def _session(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        hello = pb.WorkerMessage.FromString(next(requests)).hello
        nonce = os.urandom(32)
        mac = _enrolment.proof(_KEY, "server", "x", hello.identity, hello.nonce, nonce)
        challenge = pb.Challenge(nonce=nonce, mac=mac, takes_over=bool(hello.resume))
        yield pb.ServerMessage(challenge=challenge).SerializeToString()
        next(requests)
        welcome = pb.Welcome(
            worker_id="worker-1",
            session_token=os.urandom(16),
            heartbeat_interval=10.0,
            orphan_timeout=30.0,
            min_slots=1,
            idle_timeout=-1.0,
            resumable=True,
            modules=True,
        )
        yield pb.ServerMessage(welcome=welcome).SerializeToString()
        if not hello.resume:
            self.over.wait()
            return
        for data in requests:
            message = pb.WorkerMessage.FromString(data)
            if message.HasField("holding"):
                self.held.append(message.holding)
            if message.ready:
                self.ready.set()

    def _fetch(self, request: bytes, context: Any) -> Iterator[bytes]:
        self._fetched += 1
        if self._fetched == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the client is gone")
        data = io.BytesIO()
        with zipfile.ZipFile(data, "w") as archive:
            archive.writestr("some.py", "")
        yield pack_chunk(data.getvalue())


def test_it_says_that_it_holds_nothing(tmp_path: Path) -> None:
    """Until it has said what it holds, it is sent nothing."""
    clients = _Clients(tmp_path / "s")
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
    try:
        assert clients.ready.wait(30)
        assert [list(each.leases) for each in clients.held] == [[]]
    finally:
        worker.kill()
        worker.wait()
        clients.over.set()
        clients.server.stop(None).wait()
