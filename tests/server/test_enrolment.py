"""Enrolment against the real server: who is let in, and who is not."""

from __future__ import annotations

import importlib.metadata
import os
import pickle
import queue
import socket
import stat
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import grpc
import psutil
import pytest

from cloudexec import BatchExecutor, LaunchError, Local, _enrolment, _versions
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._wire.channel import BLOB_KEY, SIZE_KEY, TOKEN_KEY
from cloudexec.testing import ManualLauncher

pytestmark = pytest.mark.timeout(60)
PROXY_OFF = [("grpc.enable_http_proxy", 0)]


class Peer:
    """Speaks the wire by hand."""

    def __init__(
        self, target: str, channel: grpc.Channel | None = None, *, timeout: float = 20.0
    ) -> None:
        self.channel = channel or grpc.insecure_channel(target, options=PROXY_OFF)
        self._outgoing: queue.SimpleQueue[pb.WorkerMessage | bytes | None] = queue.SimpleQueue()
        call = self.channel.stream_stream(
            "/cloudexec.v1.TaskServer/Session",
            request_serializer=lambda said: (
                said if isinstance(said, bytes) else said.SerializeToString()
            ),
            response_deserializer=pb.ServerMessage.FromString,
        )
        self.answers: Any = call(iter(self._outgoing.get, None), timeout=timeout)

    def send(self, **parts: Any) -> None:
        self._outgoing.put(pb.WorkerMessage(**parts))

    def send_raw(self, data: bytes) -> None:
        self._outgoing.put(data)

    def hello(self, executor_id: str, identity: str, **changes: Any) -> tuple[bytes, bytes]:
        """Say hello; return both nonces."""
        nonce = _enrolment.make_nonce()
        facts: dict[str, Any] = {
            "wire_version": _enrolment.WIRE_VERSION,
            "executor_id": executor_id,
            "identity": identity,
            "nonce": nonce,
            "python_version": _enrolment.python_version(),
            "cloudpickle_version": cloudpickle.__version__,
            "slots": 1,
        }
        self.send(hello=pb.Hello(**{**facts, **changes}))
        return nonce, next(self.answers).challenge.nonce

    def enrol(self, executor_id: str, identity: str, key: bytes, **changes: Any) -> Any:
        """Go through the whole of it; return the server's answer."""
        nonces = self.hello(executor_id, identity, **changes)
        mac = _enrolment.proof(key, "worker", executor_id, identity, *nonces)
        self.send(proof=pb.Proof(mac=mac))
        return next(self.answers)

    def finish(self) -> None:
        """Say no more."""
        self._outgoing.put(None)

    def close(self) -> None:
        self.finish()
        self.channel.close()


@pytest.fixture
def launcher() -> ManualLauncher:
    return ManualLauncher(slots_per_worker=1)


@pytest.fixture
def executor(launcher: ManualLauncher) -> Iterator[BatchExecutor]:
    """An executor that waits for the one worker of its one task."""
    executor = BatchExecutor(1, launcher=launcher)
    yield executor
    executor.kill_workers()


def refused(peer: Peer) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        next(peer.answers)
    peer.close()
    return caught.value.code()  # type: ignore[no-any-return, attr-defined]


def packed(**versions: str) -> bytes:
    return zlib.compress("\n".join(f"{n}=={v}" for n, v in versions.items()).encode())


def test_packages_of_other_versions_are_named_once(
    executor: BatchExecutor, launcher: ManualLauncher, caplog: pytest.LogCaptureFixture
) -> None:
    """Before a pickle fails mysteriously; what only one side has is no difference."""
    executor.submit(int)
    launch = launcher.wait(1)[0]
    contact = launch.contact
    packages = packed(cloudpickle="0.1", pytest=pytest.__version__, absent="1.0")
    for _ in range(2):
        peer = Peer(contact.target)
        answer = peer.enrol(contact.executor_id, launch.launch_id, contact.key, packages=packages)
        assert answer.HasField("welcome") or answer.HasField("refusal")
        peer.close()
    (record,) = [each for each in caplog.records if "other versions" in each.getMessage()]
    text = record.getMessage()
    assert f"cloudpickle 0.1 there and {cloudpickle.__version__} here" in text
    assert "pytest" not in text
    assert "absent" not in text


@pytest.mark.parametrize("packages", [b"no zlib", zlib.compress(b"x" * 10**7)])
def test_packages_that_cannot_be_read_are_no_hindrance(
    executor: BatchExecutor, launcher: ManualLauncher, packages: bytes
) -> None:
    """The worker is let in."""
    executor.submit(int)
    launch = launcher.wait(1)[0]
    contact = launch.contact
    peer = Peer(contact.target)
    answer = peer.enrol(contact.executor_id, launch.launch_id, contact.key, packages=packages)
    assert answer.HasField("welcome")
    peer.close()


def test_versions_here_are_those_of_the_metadata() -> None:
    """They are read from names of directories, and fit into a hello."""
    found = _versions.installed_versions()
    for name in ("cloudpickle", "grpcio", "typing-extensions"):
        assert found[name] == importlib.metadata.version(name)
    assert 0 < len(_versions.pack_versions()) <= 8192
    assert _versions.differences(_versions.pack_versions()) == ""


def test_a_worker_that_knows_the_key_is_let_in(
    executor: BatchExecutor, launcher: ManualLauncher
) -> None:
    """The server proves itself first, then welcomes the worker, and its task arrives."""
    future = executor.submit(pow, 2, 5)
    launch = launcher.wait(1)[0]
    peer = Peer(launch.contact.target)
    welcome = peer.enrol(launch.contact.executor_id, launch.launch_id, launch.contact.key).welcome
    assert len(welcome.session_token) == 16
    tasks = next(peer.answers).tasks
    peer.send(results=pb.Results(leases=tasks.leases, payloads=[pickle.dumps(32)], seconds=[0.001]))
    assert future.result(20) == 32
    peer.close()


@pytest.mark.parametrize("wrong", ["key", "executor", "no hello", "no proof", "reflected"])
def test_a_peer_without_the_key_is_refused(
    executor: BatchExecutor, launcher: ManualLauncher, wrong: str
) -> None:
    """Whatever is missing, the answer is UNAUTHENTICATED, and the worker's place stays free."""
    future = executor.submit(pow, 2, 5)
    launch = launcher.wait(1)[0]
    contact = launch.contact
    peer = Peer(contact.target)
    if wrong == "no hello":
        peer.send(results=pb.Results(leases=[1], payloads=[b"x"], seconds=[0.0]))
    else:
        executor_id = "another" if wrong == "executor" else contact.executor_id
        nonces = peer.hello(executor_id, launch.launch_id)
        if wrong == "no proof":
            peer.send(heartbeat=pb.Heartbeat())
        else:
            key = b"guess" * 6 if wrong == "key" else contact.key
            role = "server" if wrong == "reflected" else "worker"
            mac = _enrolment.proof(key, role, executor_id, launch.launch_id, *nonces)
            peer.send(proof=pb.Proof(mac=mac))
    assert refused(peer) is grpc.StatusCode.UNAUTHENTICATED
    assert not future.done()
    assert executor.stats().workers.slots == 0


def test_a_recorded_proof_is_worth_nothing(
    executor: BatchExecutor, launcher: ManualLauncher
) -> None:
    """The server's nonce is new each time, so that a replay does not match it."""
    executor.submit(pow, 2, 5)
    launch = launcher.wait(1)[0]
    contact = launch.contact
    first = Peer(contact.target)
    nonces = first.hello(contact.executor_id, launch.launch_id)
    mac = _enrolment.proof(contact.key, "worker", contact.executor_id, launch.launch_id, *nonces)
    first.close()
    second = Peer(contact.target)
    second.hello(contact.executor_id, launch.launch_id, nonce=nonces[0])
    second.send(proof=pb.Proof(mac=mac))
    assert refused(second) is grpc.StatusCode.UNAUTHENTICATED


def test_an_identity_is_good_for_one_live_session(
    executor: BatchExecutor, launcher: ManualLauncher
) -> None:
    """Neither a name that was never launched nor that of a live worker is let in."""
    executor.submit(pow, 2, 5)
    launch = launcher.wait(1)[0]
    contact = launch.contact
    unknown = Peer(contact.target)
    answer = unknown.enrol(contact.executor_id, "nobody", contact.key)
    assert "nobody launched" in answer.refusal.reason
    unknown.close()
    first = Peer(contact.target)
    assert first.enrol(contact.executor_id, launch.launch_id, contact.key).HasField("welcome")
    second = Peer(contact.target)
    answer = second.enrol(contact.executor_id, launch.launch_id, contact.key)
    assert "connected already" in answer.refusal.reason
    first.close()
    second.close()


def test_a_worker_that_comes_when_it_is_not_wanted_any_more_is_no_stranger(
    launcher: ManualLauncher, caplog: pytest.LogCaptureFixture
) -> None:
    """It is sent away; its user, who did nothing wrong, is not warned of it."""
    executor = BatchExecutor(2, launcher=launcher, idle_timeout=0.05)
    futures = [executor.submit(pow, 2, exponent) for exponent in (2, 3)]
    launches = launcher.wait(2, 20)
    first = Peer(launches[0].contact.target)
    first.enrol(launches[0].contact.executor_id, "1", launches[0].contact.key)
    for number in (1, 2):
        (lease,) = next(message.tasks.leases for message in first.answers if message.tasks.leases)
        result = pb.Results(leases=[lease], payloads=[pickle.dumps(number)], seconds=[0.0])
        first.send(number=number, results=result)
    assert [future.result(20) for future in futures] == [1, 2]
    deadline = time.monotonic() + 50
    while "2" not in launcher.terminated:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    late = Peer(launches[1].contact.target)
    answer = late.enrol(launches[1].contact.executor_id, "2", launches[1].contact.key)
    assert "time to connect is over" in answer.refusal.reason
    assert not list(late.answers)  # it is over
    ended = Peer(launches[1].contact.target)
    ended.hello(launches[1].contact.executor_id, "2")
    ended.finish()
    assert refused(ended) is grpc.StatusCode.UNAUTHENTICATED
    assert executor.stats().refused == 0
    assert not caplog.messages
    stranger = Peer(launches[1].contact.target)
    stranger.enrol(launches[1].contact.executor_id, "3", launches[1].contact.key)
    assert not list(stranger.answers)
    assert executor.stats().refused == 1
    for peer in (first, late, ended, stranger):
        peer.close()
    launcher.end_all()
    executor.kill_workers()


@pytest.mark.parametrize("says_hello", [False, True])
def test_a_worker_that_is_ended_while_it_enrols_is_no_stranger(
    executor: BatchExecutor,
    launcher: ManualLauncher,
    caplog: pytest.LogCaptureFixture,
    says_hello: bool,
) -> None:
    """Its platform, or the executor itself, may end it at any moment: nobody is warned of that."""
    executor.submit(pow, 2, 5)
    contact = launcher.wait(1)[0].contact
    for _ in range(10):
        ended = Peer(contact.target)
        if says_hello:
            ended.hello(contact.executor_id, "1")
        ended.finish()
        assert refused(ended) is grpc.StatusCode.UNAUTHENTICATED
    for _ in range(50):
        ended = Peer(contact.target)
        if says_hello:
            ended.hello(contact.executor_id, "1")
        ended.close()
    worker = Peer(contact.target)
    assert worker.enrol(contact.executor_id, "1", contact.key).HasField("welcome")
    assert executor.stats().refused == 0
    assert not caplog.messages
    worker.close()


def test_another_python_fails_what_waits_with_the_remedy(
    executor: BatchExecutor, launcher: ManualLauncher
) -> None:
    """A worker of another minor version is refused, and the futures say which image to use."""
    future = executor.submit(pow, 2, 5)
    launch = launcher.wait(1)[0]
    contact = launch.contact
    peer = Peer(contact.target)
    answer = peer.enrol(contact.executor_id, launch.launch_id, contact.key, python_version="3.2")
    assert "3.2" in answer.refusal.reason
    error = future.exception(20)
    assert isinstance(error, LaunchError)
    assert f"image for Python {_enrolment.python_version()}" in str(error)
    peer.close()
    launcher.end_all()


class _Trap:
    """Leaves a file behind if anybody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_payload_calls_without_a_session_reach_no_unpickling(
    executor: BatchExecutor, launcher: ManualLauncher, tmp_path: Path
) -> None:
    """Fetch and Deliver want the token of a live session."""
    executor.submit(len, bytes(100_000))
    contact = launcher.wait(1)[0].contact
    channel = grpc.insecure_channel(contact.target, options=PROXY_OFF)
    fetch = channel.unary_stream("/cloudexec.v1.TaskServer/Fetch")
    deliver = channel.stream_unary("/cloudexec.v1.TaskServer/Deliver")
    trap = pb.Chunk(data=pickle.dumps(_Trap(tmp_path / "sprung"))).SerializeToString()
    for token in (b"", b"0" * 16):
        metadata = ((TOKEN_KEY, token), (BLOB_KEY, "1"), (SIZE_KEY, "9"))
        with pytest.raises(grpc.RpcError) as caught:
            list(fetch(pb.FetchRequest(blob=1).SerializeToString(), metadata=metadata, timeout=20))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with pytest.raises(grpc.RpcError) as caught:
            deliver(iter([trap]), metadata=metadata, timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert not (tmp_path / "sprung").exists()
    channel.close()


def test_garbage_on_the_sockets_disturbs_nobody(tmp_path: Path) -> None:
    """Bytes that are no protocol at all are dropped, and tasks go on."""
    with BatchExecutor(1) as executor:
        assert executor.submit(pow, 2, 5).result(20) == 32
        directory = Path(executor._driver.service.direct_path).parent  # type: ignore[union-attr]
        trap = pickle.dumps(_Trap(tmp_path / "sprung"))
        for name in ("s", "d"):
            for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(1000), b"", trap * 10):
                with socket.socket(socket.AF_UNIX) as peer:
                    peer.connect(str(directory / name))
                    peer.sendall(garbage)
        assert executor.submit(len, bytes(200_000)).result(20) == 200_000
    assert not (tmp_path / "sprung").exists()


def test_the_socket_lies_in_a_private_directory_that_goes() -> None:
    """Only this user can enter it, and nothing of it is left."""
    with BatchExecutor(1) as executor:
        executor.submit(pow, 2, 5).result(20)
        directory = Path(executor._driver.service.direct_path).parent  # type: ignore[union-attr]
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert directory.stat().st_uid == os.getuid()
    assert not directory.exists()


def test_the_key_is_in_no_environment_and_no_command_line() -> None:
    """Processes lists tell nothing."""
    with BatchExecutor(1) as executor:
        executor.submit(pow, 2, 5).result(20)
        key = executor._driver.engine.key.hex()  # type: ignore[union-attr]
        looked_at = 0
        for process in psutil.Process().children(recursive=True):
            try:
                shown = [*process.cmdline(), *process.environ().values()]
            except psutil.NoSuchProcess:
                continue  # it has ended, and shows nothing any more
            assert key not in " ".join(shown)
            looked_at += 1
        assert looked_at >= 3


def test_tls_over_tcp_serves_the_whole_path() -> None:
    """With ``listen`` workers come in by TLS; small and large payloads travel both ways."""
    with BatchExecutor(2, listen="127.0.0.1:0", launcher=Local(slots_per_worker=1)) as executor:
        assert list(executor.map(abs, range(-500, 0))) == list(range(500, 0, -1))
        data = os.urandom(3_000_000)
        assert executor.submit(bytes, data).result(30) == data
        target = executor._driver.launches.contact.target  # type: ignore[union-attr]
        plain = Peer(target)
        plain.send(hello=pb.Hello())
        assert refused(plain) is grpc.StatusCode.UNAVAILABLE
        assert executor.submit(pow, 2, 5).result(20) == 32


def test_a_worker_refuses_an_impostor() -> None:
    """Another certificate than the pinned one ends the worker before it says who it is."""
    with BatchExecutor(1, listen="127.0.0.1:0") as executor:
        executor.submit(pow, 2, 5).result(20)
        contact = executor._driver.launches.contact  # type: ignore[union-attr]
        assert contact is not None
        env = {
            **os.environ,
            "CLOUDEXEC_TARGET": contact.target,
            "CLOUDEXEC_EXECUTOR_ID": contact.executor_id,
            "CLOUDEXEC_IDENTITY": "1",
            "CLOUDEXEC_KEY": contact.key.hex(),
            "CLOUDEXEC_SLOTS": "1",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        }
        for changes, words in (
            ({"CLOUDEXEC_CERTIFICATE_SHA256": "0" * 64}, "another certificate"),
            (
                {
                    "CLOUDEXEC_CERTIFICATE_SHA256": contact.certificate_sha256,
                    "CLOUDEXEC_KEY": "00" * 32,
                },
                "does not know this worker's key",
            ),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "cloudexec.worker"],
                env={**env, **changes},
                capture_output=True,
                text=True,
                timeout=40,
                check=False,
            )
            assert done.returncode == 3
            assert words in done.stderr
