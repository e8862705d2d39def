"""Hostile peers at the real server: nothing crashes, stalls or grows, and honest work goes on."""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
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
    executor_at,
    frame,
    headers,
    hello,
    is_closed,
    memory_in_use,
    message,
    peer,
    refusals,
    secured,
    start_worker,
    tls_context,
    unharmed,
    wait_until,
)
from test_enrolment import Peer

from cloudexec import BatchExecutor, _enrolment
from cloudexec._launchers.base import Contact
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._server.certificate import make_certificate
from cloudexec._server.rpc import enrolment
from cloudexec._wire.channel import BLOB_KEY, LEASE_KEY, SIZE_KEY, TOKEN_KEY

pytestmark = pytest.mark.timeout(90)


@pytest.fixture(scope="module", params=["tls", "unix"])
def executor(request: pytest.FixtureRequest) -> Iterator[BatchExecutor]:
    """An executor that is at work, on a TLS port and on a Unix socket."""
    with executor_at(request.param) as executor:
        assert list(executor.map(double, range(100), timeout=30)) == list(range(0, 200, 2))
        wait_until(lambda: executor.stats().workers.slots == 2)
        yield executor


@pytest.fixture(scope="module")
def tls_executor() -> Iterator[BatchExecutor]:
    with executor_at("tls") as executor:
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
    abuses: tuple[Callable[[Frames], Any], ...] = (
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
    )

    def commit(abuse: Callable[[Frames], Any]) -> None:
        connection = secured(contact)
        with contextlib.suppress(OSError), connection:
            abuse(Frames(connection))
            is_closed(connection, 0.3)

    with futures.ThreadPoolExecutor(8) as side_by_side:
        list(side_by_side.map(commit, abuses))


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
        is_closed(connection, 0.3)


def _large_messages(contact: Contact, trap: bytes) -> None:
    """Messages that are too large, or much larger as objects, before anything is proved."""
    fields = pb.WorkerMessage(output=[pb.Output()]).SerializeToString()
    bodies = (
        message(fields * (4 * MIB // len(fields))),
        message(bytes(7 * MIB)),
        message(b"", claimed=2**32 - 1) + bytes(MIB),
        message(trap * (20 * 1024 // len(trap))),
    )

    def say(body: bytes, method: str) -> None:
        with contextlib.suppress(OSError), secured(contact) as connection:
            frames = Frames(connection)
            frames.call(1, method, body)
            frames.await_answer(3.0)

    methods = (SESSION, "/cloudexec.v1.TaskServer/Deliver", "/no/such")
    with futures.ThreadPoolExecutor(12) as side_by_side:
        list(side_by_side.map(say, bodies * 3, sorted(methods * 4)))


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
        (_frames, ()),
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
        wait_until(lambda kind=kind: refusals(executor).get(kind, 0) > before.get(kind, 0))
    # Their last attempts may be on their way out yet.
    wait_until(lambda: executor.stats().refused == sum(refusals(executor).values()))
    assert not trap.path.exists()
    assert executor.stats().workers.slots == 2
    assert executor.stats().workers.lost == 0
    lines = [record.getMessage().partition(",")[0] for record in caplog.records]
    assert len(lines) == len(set(lines)), lines


def test_each_kind_of_refusal_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """A hundred strangers make one line, and are all counted."""
    with executor_at("unix") as executor:
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


_SILENT = """
import resource, select, socket, sys, time
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
poll, left, connections = select.poll(), set(), []
for number in range(count):
    connection = socket.socket()
    connection.setblocking(False)
    connection.connect_ex((host, port))
    poll.register(connection, select.POLLIN)
    connections.append(connection)
    left.add(connection.fileno())
    if number % 250 == 0:
        time.sleep(0.01)
print("there", flush=True)
deadline = time.monotonic() + 30
while left and time.monotonic() < deadline:
    for number, _ in poll.poll(500):
        poll.unregister(number)
        left.discard(number)
print(len(left), flush=True)
"""
"""Connections of another process that say nothing; how many are still there after 30 seconds."""


@pytest.mark.alone
def test_thousands_who_say_nothing_keep_nobody_out() -> None:
    """10,000 silent connections, and others that trickle, more than enrol at once: a worker that
    is started meanwhile comes in, after a few seconds they are gone, and nothing of them stays.
    Who knows the key and takes his time with the proof goes with them."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # As many as the server takes, and another process of this machine may have.
    crowd = min(10_000, limits[0] - max(256, limits[0] // 8) - 1200, limits[1] - 100)
    share = max(20, min(600, limits[0] // 10))
    with executor_at("tls") as executor, contextlib.ExitStack() as stack:
        executor.submit(double, 1).result(30)
        contact = contact_of(executor)
        me = psutil.Process()
        memory, files = memory_in_use(), me.num_fds()
        host, _, port = contact.target.rpartition(":")
        began = time.monotonic()
        outside = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", _SILENT, host, port, str(crowd)],
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        assert outside.stdout is not None
        late = peer(contact)
        nonces = late.hello(contact.executor_id, "9")
        proof = _enrolment.proof(contact.key, "worker", contact.executor_id, "9", *nonces)
        # Those that stop within TLS, behind it, and within HTTP/2.
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
        assert outside.stdout.readline() == "there\n"
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
            late.send(proof=pb.Proof(mac=proof))
            with pytest.raises(grpc.RpcError) as caught:
                next(late.answers)
            # It may have had to give way to others before its time was up.
            assert caught.value.code() in (
                grpc.StatusCode.DEADLINE_EXCEEDED,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            )
            late.close()
            ended = [*half, *behind]
            wait_until(lambda: all(is_closed(each, 0.001) for each in _readable(ended)), 10)
            wait_until(lambda: len(_readable(ended)) == len(ended), 15)
            assert outside.stdout.readline() == "0\n", "some of them are still connected"
            assert time.monotonic() - began < 30
        assert work.slowest < 15
        for frames in sessions:
            frames.close()
        wait_until(lambda: me.num_fds() < files + 100 + len(ended))
        allowed = (64 + 0.15 * (len(ended) + len(sessions))) * MIB
        wait_until(lambda: memory_in_use() - memory < allowed, what="memory was given back")
        seen = refusals(executor)
        assert seen["too many at once"] > 0


def _readable(connections: list[socket.socket]) -> list[socket.socket]:
    poll = select.poll()
    by_number = {each.fileno(): each for each in connections}
    for number in by_number:
        poll.register(number, select.POLLIN)
    return [by_number[number] for number, _ in poll.poll(0)]


def test_a_proof_that_comes_too_late_is_refused(
    tls_executor: BatchExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A nonce is good for a few seconds; here, for less than one."""
    monkeypatch.setattr(enrolment, "_ENROLMENT_TIMEOUT", 0.5)
    contact = contact_of(tls_executor)
    stranger = peer(contact)
    nonces = stranger.hello(contact.executor_id, "9")
    mac = _enrolment.proof(contact.key, "worker", contact.executor_id, "9", *nonces)
    wait_until(lambda: refusals(tls_executor).get("too slow"))
    stranger.send(proof=pb.Proof(mac=mac))
    with pytest.raises(grpc.RpcError) as caught:
        next(stranger.answers)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    stranger.close()


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
