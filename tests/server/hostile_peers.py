"""Hostile peers of a server, which send messages, or single HTTP/2 frames, made by hand."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
from test_enrolment import PROXY_OFF, Peer

from cloudexec import BatchExecutor, Local, _enrolment
from cloudexec._launchers.base import Contact
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._wire.channel import BLOB_KEY, LEASE_KEY, SIZE_KEY, TOKEN_KEY
from cloudexec.testing import ManualLauncher

MIB = 1024 * 1024
SESSION = "/cloudexec.v1.TaskServer/Session"

DATA, HEADERS, PRIORITY, RST, SETTINGS, PING, GOAWAY, WINDOW, CONTINUATION = (
    0, 1, 2, 3, 4, 6, 7, 8, 9,
)  # fmt: skip
END_STREAM, END_HEADERS = 1, 4


class Trap:
    """Creates a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)

    def pickled(self) -> bytes:
        return pickle.dumps(self)


# Connections.


def dial(contact: Contact, *, timeout: float = 10.0) -> socket.socket:
    """Connect, and send nothing."""
    if contact.target.startswith("unix:"):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(timeout)
        connection.connect(contact.target.removeprefix("unix:"))
        return connection
    host, _, port = contact.target.rpartition(":")
    return socket.create_connection((host, int(port)), timeout)


def tls_context(version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if version is not None:
        context.minimum_version = context.maximum_version = version
    return context


def secured(contact: Contact) -> socket.socket:
    """Connect over TLS or the Unix socket, as far as is possible without a proof."""
    connection = dial(contact)
    if contact.certificate_sha256:
        return tls_context().wrap_socket(connection)
    return connection


def channel(contact: Contact) -> grpc.Channel:
    """Open a new connection; by default gRPC shares a connection among equal channels."""
    options = [*PROXY_OFF, ("grpc.use_local_subchannel_pool", 1)]
    if not contact.certificate_sha256:
        return grpc.insecure_channel(contact.target, options=options)
    host, _, port = contact.target.rpartition(":")
    pem = ssl.get_server_certificate((host, int(port)), timeout=10)
    options.append(("grpc.ssl_target_name_override", "cloudexec"))  # type: ignore[arg-type]
    credentials = grpc.ssl_channel_credentials(root_certificates=pem.encode())
    return grpc.secure_channel(contact.target, credentials, options=options)


def peer(contact: Contact) -> Peer:
    return Peer(contact.target, channel(contact))


def is_closed(connection: socket.socket, within: float) -> bool:
    """Read until the other side closes the connection; return whether it does so in time."""
    until = time.monotonic() + within
    with contextlib.suppress(OSError):
        while (left := until - time.monotonic()) > 0:
            connection.settimeout(left)
            try:
                if connection.recv(65536) == b"":
                    return True
            except TimeoutError:
                return False
        return False
    return True


class Frames:
    """An HTTP/2 connection whose frames are made by hand."""

    def __init__(self, connection: socket.socket, *, preface: bool = True) -> None:
        self.connection = connection
        if preface:
            self.raw(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS, 0, 0))

    def raw(self, data: bytes) -> None:
        self.connection.sendall(data)

    def send(self, kind: int, flags: int = 0, stream: int = 0, payload: bytes = b"") -> None:
        self.raw(frame(kind, flags, stream, payload))

    def call(self, stream: int, method: str = SESSION, data: bytes | None = None) -> None:
        """Begin a call, with a first message if ``data`` is given."""
        self.raw(frame(HEADERS, END_HEADERS, stream, headers(method)))
        if data is not None:
            for at in range(0, len(data), 16384) or (0,):
                self.raw(frame(DATA, 0, stream, data[at : at + 16384]))

    def await_answer(self, within: float) -> None:
        """Read until a call is answered or reset, or the other side closes the connection."""
        self.connection.settimeout(within)
        with contextlib.suppress(OSError), self.connection.makefile("rb") as frames:
            while len(head := frames.read(9)) == 9:
                frames.read(int.from_bytes(head[:3]))
                if head[3] in (HEADERS, RST, GOAWAY):
                    break

    def close(self) -> None:
        self.connection.close()


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def _text(text: bytes) -> bytes:
    size = len(text)
    if size < 127:
        return bytes((size,)) + text
    size -= 127
    length = bytearray((127,))
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    length.append(size)
    return bytes(length) + text


def headers(method: str = SESSION, more: Iterable[tuple[str, bytes]] = ()) -> bytes:
    """Encode the headers of a call without compression."""
    pairs = [
        (":method", b"POST"),
        (":scheme", b"https"),
        (":path", method.encode()),
        (":authority", b"cloudexec"),
        ("te", b"trailers"),
        ("content-type", b"application/grpc"),
        *more,
    ]
    return b"".join(b"\0" + _text(name.encode()) + _text(value) for name, value in pairs)


def message(content: bytes, *, claimed: int | None = None) -> bytes:
    """Frame a message as gRPC does."""
    return struct.pack(">BI", 0, len(content) if claimed is None else claimed) + content


def hello(contact: Contact, identity: str, **changes: Any) -> bytes:
    facts = {
        "executor_id": contact.executor_id,
        "identity": identity,
        "nonce": os.urandom(_enrolment.NONCE_BYTES),
        **changes,
    }
    return pb.WorkerMessage(hello=pb.Hello(**facts)).SerializeToString()


# The executor under attack.


class _OverGrpc(Local):
    """Launches workers on this machine that use gRPC, as workers on other machines do."""

    own_processes = False


def executor_at(place: str, **options: Any) -> BatchExecutor:
    """Make an executor that listens for gRPC on a TLS port, or on a Unix socket."""
    listen = {"listen": "127.0.0.1:0"} if place == "tls" else {}
    return BatchExecutor(2, launcher=_OverGrpc(slots_per_worker=1), **listen, **options)


def contact_of(executor: BatchExecutor) -> Contact:
    contact = executor._driver.launches.contact  # type: ignore[union-attr]
    assert contact is not None
    return contact


def refusals(executor: BatchExecutor) -> dict[str, int]:
    return dict(executor._driver.refusals.counts)  # type: ignore[union-attr]


def wait_until(
    true: Callable[[], object], seconds: float = 15.0, *, what: str = "it happened"
) -> None:
    """Wait until a condition holds."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"not in time: {what}"
        time.sleep(0.02)


def double(x: int) -> int:
    return 2 * x


def memory_in_use() -> int:
    """Return the memory of this process in bytes, without the reserve of its allocator."""
    with contextlib.suppress(AttributeError):  # only the GNU C library has malloc_trim()
        ctypes.CDLL(None).malloc_trim(0)
    return int(psutil.Process().memory_info().rss)


class Work:
    """Runs tasks of an honest user, batch after batch, during an attack."""

    def __init__(self, executor: BatchExecutor) -> None:
        self._executor = executor
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)
        self.batches = 0
        self.slowest = 0.0

    def _run(self) -> None:
        try:
            while not self._stop.is_set() or not self.batches:
                began = time.monotonic()
                values = list(self._executor.map(double, range(100), timeout=40))
                assert values == list(range(0, 200, 2))
                self.slowest = max(self.slowest, time.monotonic() - began)
                self.batches += 1
                self._stop.wait(0.02)
        except BaseException as exc:
            self._error = exc

    def __enter__(self) -> Work:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(60)
        assert not self._thread.is_alive(), "tasks do not get to their end"
        if self._error is not None:
            raise self._error


@contextlib.contextmanager
def unharmed(executor: BatchExecutor, *, mib: float = 64, slowest: float = 8.0) -> Iterator[Work]:
    """Check that tasks go on during an attack, and that no memory or files are lost by it."""
    me = psutil.Process()
    before, files = memory_in_use(), me.num_fds()
    with Work(executor) as work:
        yield work
    assert work.slowest < slowest
    # The peers belong to this process, too, and are closed by now.
    wait_until(lambda: me.num_fds() <= files + 8)
    # gRPC frees some memory a moment later.
    wait_until(lambda: memory_in_use() - before < mib * MIB, what="memory was given back")
    assert executor._driver.broken is None  # type: ignore[union-attr]


def start_worker(contact: Contact, identity: str, **changes: str) -> subprocess.Popen[str]:
    """Start a real worker, as in a container."""
    env = {
        **os.environ,
        "CLOUDEXEC_TARGET": contact.target,
        "CLOUDEXEC_EXECUTOR_ID": contact.executor_id,
        "CLOUDEXEC_IDENTITY": identity,
        "CLOUDEXEC_KEY": contact.key.hex(),
        "CLOUDEXEC_SLOTS": "1",
        "CLOUDEXEC_CERTIFICATE_SHA256": contact.certificate_sha256,
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        **changes,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "cloudexec.worker"],
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


# A hostile worker that has been enrolled.


class Inside(Peer):
    """An enrolled worker that has one lease, and sends what a test wants."""

    def __init__(self, launcher: ManualLauncher, number: int, **changes: Any) -> None:
        launch = launcher.wait(number, 20)[-1]
        self.launch_id = launch.launch_id
        contact = self.contact = launch.contact
        super().__init__(contact.target, channel(contact), timeout=80.0)
        answer = self.enrol(contact.executor_id, launch.launch_id, contact.key, **changes)
        self.welcome = answer.welcome
        self.token = ((TOKEN_KEY, self.welcome.session_token),)
        self.lease = 0
        self._leases: list[int] = []

    def take_message(self) -> pb.ServerMessage:
        """Wait for the server's next message."""
        said: pb.ServerMessage = next(self.answers)
        self._leases += said.tasks.leases
        return said

    def take(self) -> int:
        """Wait for a task."""
        while not self._leases:
            self.take_message()
        self.lease = self._leases.pop(0)
        return self.lease

    def fetch(self, blob: int, offset: int = 0) -> grpc.StatusCode:
        call = self.channel.unary_stream("/cloudexec.v1.TaskServer/Fetch")
        request = pb.FetchRequest(blob=blob, offset=offset).SerializeToString()
        return code_of(lambda: list(call(request, metadata=self.token, timeout=20)))

    def deliver(self, *chunks: bytes, blob: object, size: object, lease: int) -> Any:
        call = self.channel.stream_unary("/cloudexec.v1.TaskServer/Deliver")
        more = ((BLOB_KEY, str(blob)), (SIZE_KEY, str(size)), (LEASE_KEY, str(lease)))
        return code_of(lambda: call(iter(chunks), metadata=(*self.token, *more), timeout=20))


def end_by_hand(executor: BatchExecutor, launcher: ManualLauncher, *workers: Peer) -> None:
    """Close the peers' connections, and report the end of their processes, which never existed."""
    for worker in workers:
        worker.close()
    launcher.end_all()
    executor.kill_workers()


def code_of(call: Callable[[], Any]) -> Any:
    try:
        answer = call()
    except grpc.RpcError as exc:
        return exc.code()  # type: ignore[attr-defined]
    if isinstance(answer, bytes):
        return pb.DeliverReply.FromString(answer).accepted
    return grpc.StatusCode.OK


def result_of(*leases: int, value: object = "false") -> pb.Results:
    count = len(leases)
    return pb.Results(leases=leases, payloads=[pickle.dumps(value)] * count, seconds=[0.0] * count)
