"""Hostile peers at the real server: nothing crashes, stalls or grows, and honest work goes on."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import pickle
import random
import resource
import select
import signal
import socket
import ssl
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from hostile_peers import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    HEADERS,
    MIB,
    PING,
    PRIORITY,
    RST,
    SESSION,
    SETTINGS,
    WINDOW,
    Frames,
    Trap,
    Work,
    channel,
    contact_of,
    dial,
    double,
    frame,
    headers,
    hello,
    is_closed,
    message,
    peer,
    refusals,
    secured,
    start_worker,
    tls_context,
    unharmed,
    wait_until,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_enrolment import Peer

from cloudexec import BatchExecutor, InitializerError, Local, PayloadError, _enrolment
from cloudexec._launchers.base import Contact
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._server.certificate import make_certificate
from cloudexec._wire import BLOB_KEY, LEASE_KEY, SIZE_KEY, TOKEN_KEY
from cloudexec.testing import ManualLauncher

pytestmark = pytest.mark.timeout(90)


def _executor(place: str, **options: Any) -> BatchExecutor:
    listen = {"listen": "127.0.0.1:0"} if place == "tls" else {}
    return BatchExecutor(2, launcher=Local(slots_per_worker=1), **listen, **options)


@pytest.fixture(scope="module", params=["tls", "unix"])
def executor(request: pytest.FixtureRequest) -> Iterator[BatchExecutor]:
    """An executor that is at work, on a TLS port and on a Unix socket."""
    with _executor(request.param) as executor:
        assert list(executor.map(double, range(100), timeout=30)) == list(range(0, 200, 2))
        wait_until(lambda: executor.stats().workers.slots == 2)
        yield executor


@pytest.fixture(scope="module")
def tls_executor() -> Iterator[BatchExecutor]:
    with _executor("tls") as executor:
        assert list(executor.map(double, range(100), timeout=30)) == list(range(0, 200, 2))
        wait_until(lambda: executor.stats().workers.slots == 2)
        yield executor


# Strangers.


def _noise(contact: Contact, trap: bytes) -> None:
    noises = (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01\xff\xff" + os.urandom(70_000),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 5000,
        b"",
        bytes(MIB),
        os.urandom(20_000),
        trap * 50,
    )
    for connect in (dial, secured):
        for noise in noises * 3:
            with contextlib.suppress(OSError), connect(contact) as connection:
                connection.sendall(noise)
                if noise:
                    is_closed(connection, 0.02)


def _frames(contact: Contact, trap: bytes) -> None:
    """Frames that HTTP/2 forbids, each on a connection of its own."""
    many = 200_000
    for abuse in (
        lambda f: f.send(DATA, 0, 1, trap),
        lambda f: f.send(SETTINGS, 0, 3, b"\0" * 6),
        lambda f: f.send(SETTINGS, 0, 0, b"\0" * 5),
        lambda f: f.send(WINDOW, 0, 0, struct.pack(">I", 0)),
        lambda f: [f.send(WINDOW, 0, 0, struct.pack(">I", 2**31 - 1)) for _ in range(3)],
        lambda f: f.send(250, 255, 2**31 - 1, os.urandom(16_000)),
        lambda f: f.send(PRIORITY, 0, 1, b"\0"),
        lambda f: f.raw(struct.pack(">I", 2**24 - 1)[1:] + b"\0\0\0\0\0\1" + bytes(MIB)),
        lambda f: f.send(HEADERS, END_HEADERS, 1, os.urandom(500)),
        lambda f: f.send(HEADERS, END_HEADERS, 2, headers()),
        # Headers that are too many, or that never end.
        lambda f: f.send(HEADERS, END_HEADERS, 1, headers(more=[("x", bytes(15_000))])),
        lambda f: [
            f.send(HEADERS, 0, 1, headers()),
            *(f.send(CONTINUATION, 0, 1, headers(more=[("x", b"y" * 9000)])) for _ in range(2000)),
        ],
        # Floods of what is allowed.
        lambda f: f.raw(frame(PING, 0, 0, b"12345678") * (many // 20)),
        lambda f: f.raw(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65535)) * (many // 20)),
        lambda f: f.raw(frame(PRIORITY, 0, 1, struct.pack(">IB", 3, 1)) * (many // 20)),
        lambda f: f.raw(frame(WINDOW, 0, 0, struct.pack(">I", 1)) * (many // 20)),
    ):
        connection = secured(contact)
        with contextlib.suppress(OSError), connection:
            abuse(Frames(connection))
            is_closed(connection, 0.1)


def _rapid_reset(contact: Contact, _: bytes) -> None:
    """Calls that are given up as soon as they are begun.

    Few of them: gRPC itself loses some hundred bytes with each (grpc/grpc issue 43360).
    """
    with contextlib.suppress(OSError), secured(contact) as connection:
        frames = Frames(connection)
        call = headers()
        for first in range(1, 4000, 200):
            frames.raw(
                b"".join(
                    frame(HEADERS, END_HEADERS, stream, call)
                    + frame(RST, 0, stream, struct.pack(">I", 8))
                    for stream in range(first, first + 200, 2)
                )
            )
        is_closed(connection, 0.3)


def _many_streams(contact: Contact, _: bytes) -> None:
    """Thousands of sessions on one connection, and nothing said on them."""
    with contextlib.suppress(OSError), secured(contact) as connection:
        frames = Frames(connection)
        for stream in range(1, 4000, 2):
            frames.call(stream)
        is_closed(connection, 1.0)


def _large_messages(contact: Contact, trap: bytes) -> None:
    """Messages that are too large, or much larger as objects, before anything is proved."""
    fields = pb.WorkerMessage(output=[pb.Output()]).SerializeToString()
    bodies = (
        message(fields * (4 * MIB // len(fields))),
        message(bytes(7 * MIB)),
        message(b"", claimed=2**32 - 1) + bytes(MIB),
        message(trap * (20 * 1024 // len(trap))),
    )
    for body in bodies:
        for method in (SESSION, "/cloudexec.v1.TaskServer/Deliver", "/no/such"):
            with contextlib.suppress(OSError), secured(contact) as connection:
                Frames(connection).call(1, method, body)
                is_closed(connection, 0.1)


def _unknown_calls(contact: Contact, trap: bytes) -> None:
    """Methods that there are none of, and those that want a session."""
    calls = channel(contact)
    for method in ("Nothing", "Session/", "session", "../Session"):
        call = calls.unary_unary(f"/cloudexec.v1.TaskServer/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            call(trap, timeout=20)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    for method in ("Fetch", "Deliver", "Locate", "Store"):
        for token in (b"", os.urandom(16), bytes(5000)):
            metadata = ((TOKEN_KEY, token), (BLOB_KEY, "1"), (SIZE_KEY, "9"), (LEASE_KEY, "1"))
            call = calls.unary_unary(f"/cloudexec.v1.TaskServer/{method}")
            with pytest.raises(grpc.RpcError) as caught:
                call(trap, metadata=metadata, timeout=20)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    calls.close()


def _no_hello(contact: Contact, trap: bytes) -> None:
    """Sessions that begin with something else."""
    results = pb.Results(leases=[1], payloads=[trap], seconds=[0.0])
    failure = pb.Failure(lease=1, kind=pb.Failure.RAISED, payload=trap)
    for content in (
        trap,
        os.urandom(3000),
        b"",
        pb.WorkerMessage(results=results).SerializeToString(),
        pb.WorkerMessage(failures=[failure]).SerializeToString(),
        pb.WorkerMessage(initializer_failed=trap).SerializeToString(),
        pb.WorkerMessage(proof=pb.Proof(mac=trap)).SerializeToString(),
        hello(contact, "1", nonce=b"short"),
        hello(contact, "x" * 1025),
        hello(contact, "1", nonce=bytes(15_000)),
    ):
        calls = channel(contact)
        session = calls.stream_stream(SESSION)
        with pytest.raises(grpc.RpcError) as caught:
            list(session(iter([content, content]), timeout=20))
        assert caught.value.code() in (
            grpc.StatusCode.UNAUTHENTICATED,
            grpc.StatusCode.INVALID_ARGUMENT,
        )
        calls.close()


def _wrong_proofs(contact: Contact, trap: bytes) -> None:
    """A wrong key, another executor's worker, a proof sent back, replayed, cut, or absent."""
    right = (contact.key, contact.executor_id, "worker", "99")
    answers: list[tuple[Any, ...]] = [
        (bytes(32), *right[1:]),
        (trap, *right[1:]),
        (right[0], "another", *right[2:]),
        (*right[:2], "server", right[3]),
        (*right[:3], "98"),
    ]
    recorded = b""
    for key, executor_id, role, identity in answers:
        stranger = peer(contact)
        nonces = stranger.hello(contact.executor_id, "99")
        mac = _enrolment.proof(key, role, executor_id, identity, *nonces)
        recorded = recorded or _enrolment.proof(*right[:1], "worker", *right[1:2], "99", *nonces)
        _assert_refused(stranger, proof=pb.Proof(mac=mac))
    for mac in (recorded, recorded[:31], b"", trap):
        stranger = peer(contact)
        stranger.hello(contact.executor_id, "99")
        _assert_refused(stranger, proof=pb.Proof(mac=mac))
    # Who knows the key of another executor, and says that it is that one's.
    stranger = peer(contact)
    nonces = stranger.hello("another", "99")
    mac = _enrolment.proof(contact.key, "worker", "another", "99", *nonces)
    _assert_refused(stranger, proof=pb.Proof(mac=mac))


def _assert_refused(stranger: Peer, **said: Any) -> None:
    stranger.send(**said)
    with pytest.raises(grpc.RpcError) as caught:
        next(stranger.answers)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    stranger.close()


def _stolen_identities(contact: Contact, _: bytes) -> None:
    """The right key, under the name of a live worker, and under names that nobody has."""
    for identity in ("1", "77", "", "1\n", "../1", "1" * 1000):
        thief = peer(contact)
        answer = thief.enrol(contact.executor_id, identity, contact.key)
        assert answer.HasField("refusal")
        thief.close()


@pytest.mark.parametrize(
    ("attack", "kinds"),
    [
        (_noise, ()),
        (_frames, ("no hello",)),
        (_rapid_reset, ()),
        (_many_streams, ()),
        (_large_messages, ("no hello", "no session", "unknown method")),
        (_unknown_calls, ("no session", "unknown method")),
        (_no_hello, ("no hello", "malformed hello")),
        (_wrong_proofs, ("no proof",)),
        (_stolen_identities, ("not expected",)),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else "",
)
def test_strangers_change_nothing(
    executor: BatchExecutor,
    attack: Callable[[Contact, bytes], None],
    kinds: tuple[str, ...],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whatever they try, tasks go on, no memory and no file stays, and nothing is unpickled."""
    trap = Trap(tmp_path / "sprung")
    before = refusals(executor)
    attack(contact_of(executor), trap.pickled())  # what gRPC allocates once is not growth
    with unharmed(executor):
        attack(contact_of(executor), trap.pickled())
    for kind in kinds:
        assert refusals(executor)[kind] > before.get(kind, 0)
    # Their last attempts may be on their way out yet.
    wait_until(lambda: executor.stats().refused == sum(refusals(executor).values()))
    assert not trap.path.exists()
    assert executor.stats().workers.slots == 2
    assert executor.stats().workers.lost == 0
    lines = [record.getMessage().partition(",")[0] for record in caplog.records]
    assert len(lines) == len(set(lines)), lines


def test_each_kind_of_refusal_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A hundred strangers make one line, and are all counted."""
    with _executor("unix") as executor:
        executor.submit(double, 1).result(30)
        contact = contact_of(executor)
        caplog.clear()
        for _ in range(50):
            for content in (b"", hello(contact, "x" * 2000)):
                with contextlib.suppress(grpc.RpcError):
                    calls = channel(contact)
                    list(calls.stream_stream(SESSION)(iter([content]), timeout=20))
                calls.close()
        assert refusals(executor) == {"no hello": 50, "malformed hello": 50}
        assert executor.stats().refused == 100
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 2, lines
        assert all(line.startswith("connection refused (") for line in lines)


# Those who say nothing, or little.


def test_thousands_who_say_nothing_keep_nobody_out() -> None:
    """Silent and trickling connections, more than enrol at once: a worker that is started
    meanwhile comes in, and after a few seconds they are gone."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    share = max(20, min(600, limit // 10))
    with _executor("tls") as executor, contextlib.ExitStack() as stack:
        executor.submit(double, 1).result(30)
        contact = contact_of(executor)
        me = psutil.Process()
        memory = me.memory_info().rss
        # Those that stop before TLS, within it, behind it, and within HTTP/2.
        silent = [stack.enter_context(dial(contact)) for _ in range(2 * share)]
        bio = ssl.MemoryBIO()
        greeting = tls_context().wrap_bio(ssl.MemoryBIO(), bio)
        with contextlib.suppress(ssl.SSLWantReadError):
            greeting.do_handshake()
        first = bio.read()
        half = [stack.enter_context(dial(contact)) for _ in range(share // 2)]
        for connection in half:
            connection.sendall(first[:100])
        behind = [stack.enter_context(secured(contact)) for _ in range(share // 3)]
        sessions = [Frames(stack.enter_context(secured(contact))) for _ in range(share // 3)]
        for frames in sessions:
            for stream in range(1, 11, 2):
                frames.call(stream, SESSION, b"\0\0\0\1\0" if stream % 4 == 1 else None)
        began = time.monotonic()
        with Work(executor) as work:
            # A worker dies, and another one has to enrol in its place.
            sessions_there: Any = executor._driver.sessions  # type: ignore[union-attr]
            os.kill(next(iter(sessions_there.values())).pid, signal.SIGKILL)
            wait_until(lambda: executor.stats().workers.lost == 1)
            wait_until(lambda: executor.stats().workers.slots == 2, 30)
            # Trickling: a byte now and then is no progress.
            at = 100
            while time.monotonic() < began + 10.5:
                for connection in half:
                    with contextlib.suppress(OSError):
                        connection.send(first[at : at + 1])
                for frames in sessions[:50]:
                    with contextlib.suppress(OSError):
                        frames.send(DATA, 0, 1, b"x")
                at += 1
                time.sleep(0.5)
            ended = [*silent, *half, *behind]
            wait_until(lambda: all(is_closed(each, 0.001) for each in _readable(ended)), 10)
            wait_until(lambda: len(_readable(ended)) == len(ended), 15)
            assert time.monotonic() - began < 25
        assert work.slowest < 15
        grown = (me.memory_info().rss - memory) / MIB
        assert grown < 64 + 0.15 * (len(ended) + len(sessions)), f"{grown:.0f} MiB more"
        seen = refusals(executor)
        assert seen["too many at once"] > 0


def _readable(connections: list[socket.socket]) -> list[socket.socket]:
    poll = select.poll()
    by_number = {each.fileno(): each for each in connections}
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(0)]


def test_a_proof_that_comes_too_late_is_refused(tls_executor: BatchExecutor) -> None:
    """A nonce is good for a few seconds."""
    contact = contact_of(tls_executor)
    stranger = peer(contact)
    nonces = stranger.hello(contact.executor_id, "9")
    mac = _enrolment.proof(contact.key, "worker", contact.executor_id, "9", *nonces)
    time.sleep(10.2)
    stranger.send(proof=pb.Proof(mac=mac))
    with pytest.raises(grpc.RpcError) as caught:
        next(stranger.answers)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    stranger.close()
    assert refusals(tls_executor)["too slow"] >= 1


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_tls_is_refused(tls_executor: BatchExecutor, version: ssl.TLSVersion) -> None:
    """By the server; that a worker speaks TLS 1.3 alone is tested below."""
    context = tls_context(version)
    context.set_ciphers("ALL:@SECLEVEL=0")
    with dial(contact_of(tls_executor)) as connection:
        with pytest.raises(ssl.SSLError):
            context.wrap_socket(connection)


# Impostors, at whom a worker dials.


class _Impostor:
    """Listens where a worker dials: passes the first connections on, then answers itself."""

    def __init__(self, real: Contact, context: ssl.SSLContext, *, passed_on: int) -> None:
        self._real = real
        self._context = context
        self._left = passed_on
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.answered = threading.Event()
        self.said = b""
        """What the worker said inside of TLS."""
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.listener.getsockname()[1]}"

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.listener.accept()
                self._left -= 1
                serve = self._pass_on if self._left >= 0 else self._answer
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    def _pass_on(self, connection: socket.socket) -> None:
        with dial(self._real) as other, connection, contextlib.suppress(OSError):
            ends = {connection: other, other: connection}
            while True:
                for end in select.select(list(ends), [], [])[0]:
                    data = end.recv(65536)
                    if not data:
                        return
                    ends[end].sendall(data)

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(5)
        try:
            with self._context.wrap_socket(connection, server_side=True) as inside:
                inside.sendall(frame(SETTINGS, 0, 0))
                while data := inside.recv(65536):
                    self.said += data
        except OSError:
            pass
        finally:
            self.answered.set()

    def close(self) -> None:
        self.listener.close()


def _server_context(tmp_path: Path, *, old: bool = False) -> tuple[ssl.SSLContext, str]:
    certificate = make_certificate()
    pem = tmp_path / f"{certificate.sha256}.pem"
    pem.write_bytes(certificate.pem + certificate.key_pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pem)
    context.set_alpn_protocols(["h2"])
    if old:
        context.maximum_version = ssl.TLSVersion.TLSv1_2
    return context, certificate.sha256


@pytest.mark.parametrize("way", ["lookalike", "TLS 1.2 at once", "TLS 1.2 later"])
def test_a_worker_says_nothing_to_an_impostor(
    tls_executor: BatchExecutor, tmp_path: Path, way: str
) -> None:
    """One that shows the right certificate and goes on with another of the same name, without the
    key of the first; and one that has the key, but an older TLS."""
    real = contact_of(tls_executor)
    sha256 = real.certificate_sha256
    if way == "lookalike":
        context, _ = _server_context(tmp_path)
        impostor = _Impostor(real, context, passed_on=1)
    elif way == "TLS 1.2 at once":
        context, sha256 = _server_context(tmp_path, old=True)
        impostor = _Impostor(real, context, passed_on=0)
    else:
        old, sha256 = _server_context(tmp_path, old=True)
        modern = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        modern.load_cert_chain(tmp_path / f"{sha256}.pem")
        front = _Impostor(real, modern, passed_on=0)
        host, _, port = front.target.rpartition(":")
        relayed = Contact(f"{host}:{port}", real.executor_id, real.key, sha256)
        impostor = _Impostor(relayed, old, passed_on=1)
    worker = start_worker(Contact(impostor.target, real.executor_id, real.key, sha256), "1")
    assert impostor.answered.wait(20)
    worker.kill()
    worker.communicate()
    assert impostor.said == b""
    impostor.close()


@pytest.mark.parametrize("way", ["wrong proof", "no challenge", "proof sent back", "another"])
def test_a_worker_unpickles_nothing_of_an_impostor(tmp_path: Path, way: str) -> None:
    """One that has the certificate's key, but not the worker's."""
    trap = Trap(tmp_path / "sprung")
    certificate = make_certificate()
    welcome = pb.ServerMessage(
        welcome=pb.Welcome(initializer=trap.pickled(), session_token=bytes(16)),
        functions=[pb.Function(number=1, pickle=trap.pickled())],
        tasks=pb.Tasks(leases=[1], functions=[0], payloads=[trap.pickled()], estimates=[0.0]),
    )

    def session(requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        said = pb.WorkerMessage.FromString(next(requests)).hello
        if way != "no challenge":
            nonce = said.nonce if way == "proof sent back" else bytes(32)
            key = bytes(32)
            parts = (said.executor_id, said.identity, said.nonce, nonce)
            mac = _enrolment.proof(key, "server", *parts)
            challenge = pb.Challenge(nonce=nonce, mac=b"" if way == "wrong proof" else mac)
            yield pb.ServerMessage(challenge=challenge).SerializeToString()
        yield welcome.SerializeToString()
        yield welcome.SerializeToString()
        list(requests)

    handler = grpc.method_handlers_generic_handler(
        "cloudexec.v1.TaskServer", {"Session": grpc.stream_stream_rpc_method_handler(session)}
    )
    server = grpc.server(futures.ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers((handler,))
    pair = [(certificate.key_pem, certificate.pem)]
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(pair))
    server.start()
    contact = Contact(f"127.0.0.1:{port}", "x", os.urandom(32), certificate.sha256)
    worker = start_worker(contact, "1")
    _, said = worker.communicate(timeout=30)
    assert worker.returncode == 3
    assert ("something else" if way == "no challenge" else "know this worker's key") in said
    assert contact.key.hex() not in said
    assert not trap.path.exists()
    server.stop(None)


# Workers that were let in.


class _Inside(Peer):
    """An enrolled worker that holds one lease, and does what it likes."""

    def __init__(self, launcher: ManualLauncher, number: int, **changes: Any) -> None:
        launch = launcher.wait(number, 20)[-1]
        self.launch_id = launch.launch_id
        contact = launch.contact
        super().__init__(contact.target, channel(contact))
        answer = self.enrol(contact.executor_id, launch.launch_id, contact.key, **changes)
        self.welcome = answer.welcome
        self.token = ((TOKEN_KEY, self.welcome.session_token),)
        self.lease = 0
        self._leases: list[int] = []

    def take(self) -> int:
        """Wait for a task."""
        while not self._leases:
            self._leases += next(self.answers).tasks.leases
        self.lease = self._leases.pop(0)
        return self.lease

    def fetch(self, blob: int, offset: int = 0) -> grpc.StatusCode:
        call = self.channel.unary_stream("/cloudexec.v1.TaskServer/Fetch")
        request = pb.FetchRequest(blob=blob, offset=offset).SerializeToString()
        return _code_of(lambda: list(call(request, metadata=self.token, timeout=20)))

    def deliver(self, *chunks: bytes, blob: object, size: object, lease: int) -> Any:
        call = self.channel.stream_unary("/cloudexec.v1.TaskServer/Deliver")
        more = ((BLOB_KEY, str(blob)), (SIZE_KEY, str(size)), (LEASE_KEY, str(lease)))
        return _code_of(lambda: call(iter(chunks), metadata=(*self.token, *more), timeout=20))


def _end(executor: BatchExecutor, launcher: ManualLauncher, *workers: Peer) -> None:
    """Hang up, and have the processes that there never were end."""
    for worker in workers:
        worker.close()
    launcher.end_all()
    executor.kill_workers()


def _code_of(call: Callable[[], Any]) -> Any:
    try:
        answer = call()
    except grpc.RpcError as exc:
        return exc.code()  # type: ignore[attr-defined]
    if isinstance(answer, bytes):
        return pb.DeliverReply.FromString(answer).accepted
    return grpc.StatusCode.OK


def _result(*leases: int, value: object = "false") -> pb.Results:
    count = len(leases)
    return pb.Results(leases=leases, payloads=[pickle.dumps(value)] * count, seconds=[0.0] * count)


@pytest.mark.parametrize("place", ["tls", "unix"])
def test_a_worker_answers_for_its_own_tasks_alone(place: str) -> None:
    """Results for leases that it never had, for those of others, or twice, are dropped; parts of
    results and blobs that are not its own are not to be had; and others work on."""
    launcher = ManualLauncher(slots_per_worker=1, needs_network=place == "tls")
    executor = BatchExecutor(2, launcher=launcher)
    held = executor.submit(double, 4)
    liar = _Inside(launcher, 1)
    lease = liar.take()
    liar.send(draining=True)  # it is given nothing more
    secret = executor.submit(len, bytes(300_000))
    honest = start_worker(launcher.wait(2, 20)[-1].contact, launcher.launches[-1].launch_id)
    try:
        assert secret.result(30) == 300_000
        before = executor.stats().duplicates
        wrong = [n for n in (*range(200), 2**63, 2**64 - 1) if n != lease]
        own = liar.welcome.first_blob + 1
        with unharmed(executor):
            for _ in range(20):
                liar.send(
                    results=_result(*wrong),
                    failures=[
                        pb.Failure(lease=n, kind=pb.Failure.RAISED, payload=b"x") for n in wrong
                    ],
                    started=wrong,
                    returned=wrong,
                    output=[pb.Output(lease=n, number=n, data=b"") for n in wrong],
                )
            for blob in (*range(8), own, 2**64 - 1):
                assert liar.fetch(blob) is grpc.StatusCode.NOT_FOUND
            chunk = pb.Chunk(data=b"abc").SerializeToString()
            wrong_end = pb.Chunk(crc32=1).SerializeToString()
            garbage = b"\xff\xff\xff"
            deflated = pb.Chunk(data=b"not zlib", deflated=True).SerializeToString()
            unauthenticated = grpc.StatusCode.UNAUTHENTICATED
            for blob, size, of, chunks, code in (
                (own, 3, lease, (chunk, wrong_end), grpc.StatusCode.DATA_LOSS),
                (own, 3, lease, (chunk,), grpc.StatusCode.DATA_LOSS),
                (own, 3, lease, (chunk, chunk), grpc.StatusCode.DATA_LOSS),
                (own, 3, lease, (garbage,), grpc.StatusCode.DATA_LOSS),
                (own, 3, lease, (deflated,), grpc.StatusCode.DATA_LOSS),
                (own, 2**62, lease, (chunk,), unauthenticated),
                (own, -3, lease, (chunk,), unauthenticated),
                (own, "9" * 19, lease, (chunk,), unauthenticated),
                (own, "three", lease, (chunk,), unauthenticated),
                (1, 3, lease, (chunk,), unauthenticated),
                (own + 2**40, 3, lease, (chunk,), unauthenticated),
                (own, 3, lease + 10**6, (chunk,), False),
                (own, 3, 0, (chunk,), False),
            ):
                assert liar.deliver(*chunks, blob=blob, size=size, lease=of) == code
            assert not held.done()
            for value in ("mine", "again", "once more"):
                liar.send(results=_result(lease, value=value))
            assert held.result(20) == "mine"
        assert executor.stats().duplicates - before >= 20 * len(wrong)
        assert refusals(executor)["foreign part"] >= 6
        assert not executor._driver.sessions[liar.welcome.worker_id].printed  # type: ignore[union-attr]
        liar.close()
        assert executor.submit(double, 8).result(30) == 16
    finally:
        executor.kill_workers()
        honest.kill()
        honest.communicate()


def test_a_thief_does_not_take_the_place_of_a_live_worker() -> None:
    """The right key and the right name, while the worker that has it lives."""
    launcher = ManualLauncher(slots_per_worker=1)
    executor = BatchExecutor(1, launcher=launcher)
    held = executor.submit(double, 4)
    owner = _Inside(launcher, 1)
    lease = owner.take()
    contact = launcher.launches[0].contact
    for _ in range(5):
        thief = peer(contact)
        answer = thief.enrol(contact.executor_id, owner.launch_id, contact.key)
        assert "connected already" in answer.refusal.reason
        thief.close()
    owner.send(results=_result(lease, value=8))
    assert held.result(20) == 8
    assert refusals(executor) == {"not expected": 5}
    _end(executor, launcher, owner)


@pytest.mark.parametrize("slots", [0, 2**32 - 1])
def test_a_worker_without_a_sensible_number_of_slots_is_refused(slots: int) -> None:
    """Tasks are not sent where there is no room, nor without bounds."""
    launcher = ManualLauncher()
    executor = BatchExecutor(1, launcher=launcher)
    future = executor.submit(double, 1)
    launch = launcher.wait(1, 20)[0]
    worker = peer(launch.contact)
    answer = worker.enrol(launch.contact.executor_id, "1", launch.contact.key, slots=slots)
    assert "slots" in answer.refusal.reason
    assert "slots" in str(future.exception(20))
    _end(executor, launcher, worker)


_NAN, _INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "said",
    [
        {"results": pb.Results(leases=[1, 2], payloads=[b""], seconds=[0.0])},
        {"results": pb.Results(leases=[1], payloads=[b"N."], seconds=[_NAN])},
        {"results": pb.Results(leases=[1], payloads=[b"N."], seconds=[_INF])},
        {"results": pb.Results(leases=[1], payloads=[b"N."], seconds=[-1.0])},
        {"results": pb.Results(leases=[1], payloads=[b"N."], seconds=[0.0], direct=[7])},
        {"results": pb.Results(leases=[1], payloads=[b"N."], seconds=[0.0], composed=[0])},
        {
            "results": pb.Results(
                leases=[1],
                payloads=[b"N."],
                seconds=[0.0],
                composed=[0],
                blob_counts=[1],
                kept=[0],
                blobs=[pb.Blob(id=1, size=3)],
            )
        },
        {"output": [pb.Output(data=b"\n" + bytes(4 * MIB), stream=2)], "times": 20},
    ],
    ids=["columns", "nan", "inf", "negative", "index", "counts", "foreign blob", "output"],
)
def test_a_malformed_message_ends_its_session(
    said: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """And nothing else: its task runs elsewhere, as if the worker had died."""
    times = said.pop("times", 1)
    launcher = ManualLauncher()
    executor = BatchExecutor(1, launcher=launcher, output="logging", retries=3)
    # What is printed is not shown until the end.
    shown, logger = threading.Event(), logging.getLogger("cloudexec.output")
    logger.addFilter(stopped := lambda record: shown.wait() and False)
    future = executor.submit(double, 1)
    vandal = _Inside(launcher, 1)
    vandal.take()
    vandal.send(ready=True)
    for _ in range(times):
        vandal.send(**said)
    with contextlib.suppress(grpc.RpcError):
        list(vandal.answers)  # until it ends
    vandal.close()
    shown.set()
    logger.removeFilter(stopped)
    launcher.end(vandal.launch_id)
    assert refusals(executor) == {"malformed message": 1}
    other = _Inside(launcher, 2)
    other.send(results=_result(other.take(), value=2))
    assert future.result(20) == 2
    _end(executor, launcher, other)
    assert "internal error" not in caplog.text


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        (b"", "the process that ran"),
        (b"garbage", "cannot be unpickled"),
        (pickle.dumps(5), "cannot be unpickled"),
        (pickle.dumps((pickle.dumps(5), "text")), "int is no exception"),
        (pickle.dumps((b"garbage", 7)), "cannot be unpickled"),
        (b"\x80\x05" + b"(" * 100_000 + b".", "cannot be unpickled"),
        # A string of 2**62 bytes, it says.
        (b"\x80\x05\x8e" + struct.pack("<Q", 2**62) + b"x.", "cannot be unpickled"),
    ],
    ids=["nothing", "garbage", "number", "no exception", "text", "marks", "huge"],
)
@pytest.mark.parametrize("kind", [pb.Failure.RAISED, pb.Failure.OUTGREW, 99])
def test_a_failure_that_is_none_fails_one_task(payload: bytes, words: str, kind: int) -> None:
    """An exception that cannot be unpickled, or says nothing, is that task's alone."""
    launcher = ManualLauncher()
    executor = BatchExecutor(1, launcher=launcher, retries=0)
    future = executor.submit(double, 1)
    worker = _Inside(launcher, 1)
    failure = pb.Failure(
        lease=worker.take(), payload=payload, message="much", seconds=_NAN, exit_code=-77
    )
    failure.kind = kind  # type: ignore[assignment]
    worker.send(failures=[failure])
    error = str(future.exception(20))
    if payload or kind != pb.Failure.OUTGREW:
        assert words in error
    executor._driver.machine.validate()  # type: ignore[union-attr]
    following = executor.submit(double, 2)
    worker.send(results=_result(worker.take(), value=4))
    assert following.result(20) == 4
    _end(executor, launcher, worker)


def test_a_result_that_is_a_bomb_fails_in_the_thread_that_asks() -> None:
    """What does not unpickle is that future's error, and the loop goes on meanwhile."""
    launcher = ManualLauncher()
    executor = BatchExecutor(1, launcher=launcher)
    # Pickles that are none, that nest, and that raise.
    raising = pickle.dumps(Trap(Path("/")))
    bombs = (b"", b"garbage", b"\x80\x05" + b"]" * 10 + b"(" * 10**6, raising)
    tasks = [executor.submit(double, 1) for _ in bombs]
    worker = _Inside(launcher, 1)
    for bomb in bombs:
        lease = worker.take()
        worker.send(results=pb.Results(leases=[lease], payloads=[bomb], seconds=[0.0]))
    errors = [task.exception(20) for task in tasks]
    assert all(isinstance(error, PayloadError) for error in errors)
    assert executor._driver.broken is None  # type: ignore[union-attr]
    _end(executor, launcher, worker)


def test_an_initializer_that_failed_with_garbage_breaks_the_executor_with_a_message() -> None:
    """As any failed initializer does: the worker may say so, whatever it was."""
    launcher = ManualLauncher()
    executor = BatchExecutor(1, launcher=launcher)
    future = executor.submit(double, 1)
    worker = _Inside(launcher, 1)
    worker.take()
    worker.send(initializer_failed=b"garbage")
    assert isinstance(future.exception(20), InitializerError)
    _end(executor, launcher, worker)


def test_no_group_but_its_own_is_killed_for_a_worker() -> None:
    """0 would be the client's own group, and 1 everything that it may kill."""
    launcher = ManualLauncher()
    executor = BatchExecutor(1, launcher=launcher)
    executor.submit(double, 1)
    worker = _Inside(launcher, 1)
    worker.take()
    worker.send(slot_groups=[0, 1, 12345, 2**31, 2**32 - 1])
    session = executor._driver.sessions[worker.welcome.worker_id]  # type: ignore[union-attr]
    wait_until(lambda: session.slot_groups)
    assert session.slot_groups == [12345]
    _end(executor, launcher, worker)


# Fuzz.

_LEASES = st.sampled_from(["held", 0, 1, 2, 3, 10**6, 2**63, 2**64 - 1])
_FLOATS = st.floats(width=32)
_BYTES = st.one_of(
    st.just(pickle.dumps(None)), st.binary(max_size=40), st.just(pickle.dumps((b"x", "y")))
)
_INDEXES = st.lists(st.sampled_from([0, 1, 2, 5, 2**32 - 1]), max_size=3)
_BLOBS = st.builds(
    lambda own, **parts: (own, pb.Blob(**parts)),
    st.one_of(st.none(), st.integers(0, 5)),
    id=st.integers(0, 2**64 - 1),
    number=st.integers(0, 2**64 - 1),
    size=st.sampled_from([0, 1, 100, 2**31, 2**48, 2**63, 2**64 - 1]),
    offset=st.sampled_from([0, 1, 2**63, 2**64 - 1]),
    path=st.sampled_from(["", "/etc/passwd", "/proc/self/fd/0", f"/proc/{os.getpid()}/fd/0", "x"]),
    mappable=st.booleans(),
)


@st.composite
def _messages(draw: st.DrawFn) -> Callable[[int, int], bytes]:
    """What makes the bytes of one message, given a lease and the first number of own blobs."""
    leases = draw(st.lists(_LEASES, max_size=4))
    count = len(leases) + draw(st.sampled_from([0, 0, 0, 1]))
    payloads = draw(st.lists(_BYTES, min_size=count, max_size=count))
    seconds = draw(st.lists(st.one_of(st.just(0.5), _FLOATS), min_size=count, max_size=count))
    direct, composed, kept = draw(_INDEXES), draw(_INDEXES), draw(_INDEXES)
    counts = draw(st.lists(st.integers(0, 3), min_size=len(composed), max_size=len(composed)))
    blobs = draw(st.lists(_BLOBS, max_size=4))
    parts = draw(st.sets(st.sampled_from(["results", "failures", "started", "returned", "output",
                                          "draining", "ready", "groups", "hello", "proof",
                                          "heartbeat"]), max_size=3))  # fmt: skip
    kind = draw(st.sampled_from([*range(9), 99]))
    unknown = draw(st.one_of(st.just(b""), st.binary(max_size=30)))
    flips = draw(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=2))
    mutate = draw(st.booleans())

    def make(held: int, first_blob: int) -> bytes:
        numbers = [held if lease == "held" else lease for lease in leases]
        made = pb.WorkerMessage()
        if "results" in parts:
            made.results.CopyFrom(
                pb.Results(
                    leases=numbers, payloads=payloads, seconds=seconds, direct=direct,
                    composed=composed, blob_counts=counts, kept=kept,
                )
            )  # fmt: skip
            for own, blob in blobs:
                made.results.blobs.add().CopyFrom(blob)
                if own is not None:
                    made.results.blobs[-1].id = first_blob + own
        if "failures" in parts:
            for number, payload, taken in zip(numbers, payloads, seconds, strict=False):
                failure = made.failures.add(lease=number, payload=payload, seconds=taken)
                failure.kind = kind  # type: ignore[assignment]
                failure.message = "-1"
        if "started" in parts:
            made.started.extend(numbers)
        if "returned" in parts:
            made.returned.extend(numbers)
        if "output" in parts:
            for number in numbers:
                made.output.add(lease=number, stream=kind, data=b"", number=number)
        made.draining, made.ready = "draining" in parts, "ready" in parts
        if "groups" in parts:
            made.slot_groups.extend([0, 1, 2**32 - 1])
        if "hello" in parts:
            made.hello.identity = "1"
        if "proof" in parts:
            made.proof.mac = b"x"
        if "heartbeat" in parts:
            made.heartbeat.resident_bytes = 2**64 - 1
        data = bytearray(made.SerializeToString() + unknown)
        if mutate and data:
            for at, byte in flips:
                data[at % len(data)] = byte
        return bytes(data)

    return make


class _Fuzzed:
    """An executor whose one worker says anything, and is replaced when it is cut off."""

    def __init__(self) -> None:
        self.launcher = ManualLauncher(slots_per_worker=1)
        self.executor = BatchExecutor(1, launcher=self.launcher, retries=10**6)
        self._worker: _Inside | None = None
        self._requests: Any = None
        self._future: Any = None
        self.cut_off = 0

    def worker(self) -> _Inside:
        """Return one that is enrolled and holds a task."""
        if self._worker is not None and (self._future.done() or not self._lives()):
            self._worker.close()
            self.launcher.end(self._worker.launch_id)
            self._worker = None
            self.cut_off += 1
        if self._worker is None:
            count = len(self.launcher.running) + 1 if not self.launcher.launches else 0
            self._future = self.executor.submit(double, 1)
            wait_until(lambda: self.launcher.running)
            known = [each.launch_id for each in self.launcher.launches]
            number = known.index(self.launcher.running[-1]) + 1
            self._worker = _Inside(self.launcher, max(number, count))
            self._worker.take()
        return self._worker

    def _lives(self) -> bool:
        assert self._worker is not None
        return self._worker.fetch(0) is grpc.StatusCode.NOT_FOUND

    def close(self) -> None:
        self.executor.kill_workers()
        if self._worker is not None:
            self._worker.close()


def test_any_message_of_a_worker_leaves_the_executor_whole(
    tls_executor: BatchExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    """Two hundred made-up messages: the machine's invariants hold after each, and no error of ours
    is logged; another executor, on the same loop, works on."""
    fuzzed = _Fuzzed()

    @settings(
        max_examples=200,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(_messages())
    def run(make: Callable[[int, int], bytes]) -> None:
        worker = fuzzed.worker()
        data = make(worker.lease, worker.welcome.first_blob)
        with contextlib.suppress(Exception):
            if pb.WorkerMessage.FromString(data).initializer_failed:
                return  # which breaks the executor, as it should
        worker.send_raw(data)
        driver = fuzzed.executor._driver
        assert driver is not None
        checked: futures.Future[None] = futures.Future()

        def check() -> None:
            try:
                driver.machine.validate()
                checked.set_result(None)
            except BaseException as exc:
                checked.set_exception(exc)

        worker.fetch(0)  # there and back: most likely it has been taken
        driver.portal.post(check)
        checked.result(20)
        assert driver.broken is None

    with unharmed(tls_executor, slowest=10):
        run()
        fuzzed.close()
    assert "internal error" not in caplog.text
    assert fuzzed.cut_off > 5
    assert fuzzed.executor.stats().refused > 5


# Secrets.


def test_the_key_is_shown_nowhere(caplog: pytest.LogCaptureFixture) -> None:
    """Not in logs, representations, errors, command lines or environments: of workers that the
    executor starts, and of one that has the key in its environment, as a container may."""
    caplog.set_level(logging.DEBUG)
    launcher = ManualLauncher(needs_network=True)
    shown: list[str] = []
    with _executor("tls") as local, _executor("unix") as near:
        by_hand = BatchExecutor(1, launcher=launcher)
        future = by_hand.submit(double, 4)
        launch = launcher.wait(1, 20)[0]
        worker = start_worker(launch.contact, launch.launch_id)
        assert future.result(30) == 8
        for executor in (local, near, by_hand):
            executor.submit(double, 1).result(30)
        secrets = [contact_of(each).key for each in (local, near, by_hand)]
        for executor in (local, near, by_hand):
            failing = executor.submit(divmod, 1, 0)
            shown.append(repr(failing.exception(30)))
            driver: Any = executor._driver
            sessions = list(driver.sessions.values())
            secrets += [session.token for session in sessions]
            for each in (executor, driver, driver.contact, driver.setup, driver.machine, failing,
                         driver._launcher, executor.stats(), *sessions, driver.portal):  # fmt: skip
                shown += [repr(each), str(each)]
            stranger = peer(contact_of(executor))
            answer = stranger.enrol(
                driver.executor_id, sessions[0].identity, driver.key, python_version="3.2"
            )
            shown.append(str(answer))
            stranger.close()
        shown += [repr(launch), repr(launcher), repr(make_certificate())]
        looked_at = 0
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
            directory = Path(f"/proc/{process.pid}")
            for name in ("cmdline", "environ"):
                with contextlib.suppress(OSError):
                    shown.append((directory / name).read_bytes().decode("latin-1"))
                    looked_at += 1
        assert looked_at >= 14
        by_hand.kill_workers()
        _, said = worker.communicate(timeout=30)
        shown.append(said)
    shown += [record.getMessage() + str(record.exc_text) for record in caplog.records]
    everything = "\n".join(shown)
    for secret in secrets:
        for form in (
            secret.hex(),
            secret.hex().upper(),
            repr(secret)[2:-1],
            secret.decode("latin-1"),
            base64.b64encode(secret).decode(),
        ):
            assert form not in everything
    assert "PRIVATE KEY" not in everything


def test_sockets_and_their_directory_are_private() -> None:
    """Others on the machine cannot even look."""
    with _executor("unix") as executor:
        executor.submit(double, 1).result(30)
        socket_path = Path(contact_of(executor).target.removeprefix("unix:"))
        assert stat.S_IMODE(socket_path.parent.stat().st_mode) == 0o700
        names = {each.name for each in socket_path.parent.iterdir()}
        assert names == {"s", "d"}
        for each in socket_path.parent.iterdir():
            assert stat.S_IMODE(each.stat().st_mode) == 0o600
            assert each.stat().st_uid == os.getuid()


def test_the_direct_socket_is_not_held_up_by_those_who_say_nothing() -> None:
    """A few hundred silent, trickling and lying connections beside a large payload."""
    with _executor("unix") as executor:
        executor.submit(double, 1).result(30)
        driver: Any = executor._driver
        connections = []
        for number in range(200):
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(driver.direct_path)
            with contextlib.suppress(OSError):
                connection.sendall(random.Random(number).randbytes(number % 30))
            connections.append(connection)
        data = os.urandom(3_000_000)
        assert executor.submit(bytes, data).result(30) == data
        for connection in connections:
            connection.close()
        assert executor.submit(bytes, data).result(30) == data
