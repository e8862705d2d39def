"""Any bytes to any handler, before and after enrolment: nothing breaks, hangs or is unpickled."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import boto3
import grpc
import pytest
from bare_server import serve_sessions
from google.protobuf.message import DecodeError
from hostile_peers import (
    Inside,
    Trap,
    channel,
    code_of,
    double,
    end_by_hand,
    executor_at,
    start_worker,
    unharmed,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloudexec import BatchExecutor, ObjectOptions, _direct, _enrolment
from cloudexec._launchers.base import Contact
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._server.rpc.inspection import parse
from cloudexec._wire.channel import (
    BLOB_KEY,
    LEASE_KEY,
    SIZE_KEY,
    TOKEN_KEY,
    pack_chunk,
    unpack_chunk,
)
from cloudexec.testing import FakeAWS, ManualLauncher

_MANY = "CLOUDEXEC_FUZZ" in os.environ  # as ``python -m tests.soak`` asks for
pytestmark = pytest.mark.timeout(600 if _MANY else 90)
_SERVICE = "/cloudexec.v1.TaskServer/"


def _examples(count: int) -> Any:
    """The same examples in every run: what CI finds is found again.

    ``python -m tests.soak`` asks for others, and more of them.
    """
    return settings(
        max_examples=10 * count if _MANY else count,
        derandomize=not _MANY,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# Enrolled workers.

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
    path=st.sampled_from(
        ["", "/etc/passwd", "/proc/self/fd/0", f"/proc/{os.getpid()}/fd/0", "/proc/{own}/fd/0", "x"]
    ),
    mappable=st.booleans(),
)
_COUNTS = st.sampled_from([0, 0, 0, 1, 2, 10**6, 2**63, 2**64 - 1])
_PARTS = ("results", "failures", "started", "returned", "output", "draining", "ready", "groups",
          "hello", "proof", "heartbeat", "goodbye")  # fmt: skip


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
    parts = draw(st.sets(st.sampled_from(_PARTS), max_size=3))
    kind = draw(st.sampled_from([*range(9), 99]))
    number, received = draw(_COUNTS), draw(_COUNTS)
    unknown = draw(st.one_of(st.just(b""), st.binary(max_size=30)))
    flips = draw(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=2))
    mutate = draw(st.booleans())

    def make(held: int, first_blob: int) -> bytes:
        numbers = [held if lease == "held" else lease for lease in leases]
        made = pb.WorkerMessage(number=number, received=received)
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
            for lease, payload, taken in zip(numbers, payloads, seconds, strict=False):
                failure = made.failures.add(lease=lease, payload=payload, seconds=taken)
                failure.kind = kind  # type: ignore[assignment]
                failure.message = "-1"
        if "started" in parts:
            made.started.extend(numbers)
        if "returned" in parts:
            made.returned.extend(numbers)
        if "output" in parts:
            for lease in numbers:
                made.output.add(lease=lease, stream=kind, data=b"", number=lease)
        made.draining, made.ready = "draining" in parts, "ready" in parts
        made.goodbye = "goodbye" in parts
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


def _weigh(value: object) -> int:
    return len(str(value))


class _Siege:
    """An executor with one honest worker, and many that hold a task and say anything."""

    villains = 60

    def __init__(self, place: str) -> None:
        self.launcher = ManualLauncher(slots_per_worker=1, needs_network=place == "tls")
        self.executor = BatchExecutor(
            self.villains + 1, launcher=self.launcher, retries=10**6, output="logging"
        )
        self.cut_off = 0
        self._villains: list[Inside] = []
        keeping = self.executor.with_options(keep=True)
        for number in range(1, self.villains + 1):
            held = (keeping if number % 2 else self.executor).submit(bytes, 100_000)
            if number % 3 == 0:  # what it returns is another call's argument
                self.executor.submit(_weigh, held)
            self._villains.append(Inside(self.launcher, number, pid=os.getpid()))
            self._villains[-1].take()
            self._villains[-1].send(draining=True, number=1)  # it is given nothing more
        self._ready = self.executor.submit(double, 1)
        launch = self.launcher.wait(self.villains + 1, 20)[-1]
        self._honest = start_worker(launch.contact, launch.launch_id)
        self._honest_name = f"worker-{launch.launch_id}"
        assert self._ready.result(30) == 2

    def villain(self) -> Inside | None:
        """Return one that is connected; ``None``: all of them were cut off."""
        while self._villains:
            worker = self._villains[0]
            if worker.fetch(0) is grpc.StatusCode.NOT_FOUND:
                return worker
            worker.close()
            del self._villains[0]
            self.cut_off += 1
        return None

    def check(self) -> None:
        """Find the machine whole, and nobody but the villain gone."""
        driver = self.executor._driver
        assert driver is not None
        checked: futures.Future[None] = futures.Future()

        def look() -> None:
            try:
                driver.machine.validate()
                assert driver.broken is None
                here = set(driver.sessions)
                others = {each.welcome.worker_id for each in self._villains[1:]}
                assert here >= {self._honest_name, *others}
                checked.set_result(None)
            except BaseException as exc:
                checked.set_exception(exc)

        driver.portal.post(look)
        checked.result(20)

    def close(self) -> None:
        self._honest.kill()
        self._honest.communicate()
        end_by_hand(self.executor, self.launcher, *self._villains)


@pytest.mark.parametrize("place", ["tls", "unix"])
def test_any_message_of_a_worker_cuts_off_that_worker_at_most(
    place: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Made-up messages: the machine's invariants hold after each, tasks of the same executor go
    on at the worker beside, no memory stays, and no error of ours is logged."""
    cut_off = refused = 0

    @contextlib.contextmanager
    def besieged() -> Iterator[_Siege]:
        nonlocal cut_off, refused
        siege = _Siege(place)
        try:
            with unharmed(siege.executor, slowest=60 if _MANY else 10):
                yield siege
            cut_off += siege.cut_off
            refused += siege.executor.stats().refused
        finally:
            siege.close()

    with contextlib.ExitStack() as stack:
        siege = stack.enter_context(besieged())

        @_examples(300)
        @given(st.one_of(_messages(), _messages(), st.binary(max_size=200)))
        def run(made: Callable[[int, int], bytes] | bytes) -> None:
            nonlocal siege
            worker = siege.villain()
            if worker is None:
                stack.close()
                siege = stack.enter_context(besieged())
                worker = siege.villain()
                assert worker is not None, "nobody has said anything yet"
            lease, first = worker.lease, worker.welcome.first_blob
            data = made if isinstance(made, bytes) else made(lease, first)
            with contextlib.suppress(DecodeError):
                if pb.WorkerMessage.FromString(data).initializer_failed:
                    return  # which breaks the executor, as it should
            worker.send_raw(data)
            worker.fetch(0)  # there and back: most likely it has been taken
            siege.check()

        run()
    assert cut_off > 5
    assert refused > 5
    assert "internal error" not in caplog.text


@given(st.one_of(st.binary(max_size=60), _messages().map(lambda make: make(7, 1 << 40))))
@_examples(100)
def test_counting_fields_changes_nothing_about_a_message(data: bytes) -> None:
    """What is counted first is parsed as what is not."""
    large = pb.WorkerMessage(initializer_failed=bytes(70_000)).SerializeToString() + data
    try:
        expected = pb.WorkerMessage.FromString(large)
    except DecodeError:
        expected = None
    try:
        assert parse(large) == expected
    except DecodeError:
        assert expected is None or b"\x0b" in data or any(byte & 7 == 3 for byte in data)


# Requests, by those who have a session and those who do not.

_METHODS = ("Session", "Fetch", "Deliver", "Locate", "Store", "", "Session/x")
_REQUESTS = st.one_of(
    st.binary(max_size=100),
    st.builds(
        lambda **facts: pb.FetchRequest(**facts).SerializeToString(),
        modules=st.booleans(), blob=st.integers(0, 2**64 - 1), offset=st.integers(0, 2**64 - 1),
    ),
    st.builds(
        lambda **facts: pb.Chunk(**facts).SerializeToString(),
        data=st.binary(max_size=50), deflated=st.booleans(),
        crc32=st.one_of(st.none(), st.integers(0, 2**32 - 1)),
    ),
    st.builds(
        lambda **facts: pb.LocateRequest(**facts).SerializeToString(),
        blob=st.integers(0, 2**64 - 1), refused=st.booleans(), failed=st.text(max_size=20),
    ),
    st.builds(
        lambda **facts: pb.StoreRequest(**facts).SerializeToString(),
        blob=st.integers(0, 2**64 - 1), size=_COUNTS, kept=st.booleans(),
        sha256=st.binary(max_size=40), part_sha256=st.lists(st.binary(max_size=40), max_size=3),
        upload_id=st.text(max_size=10), parts=st.lists(st.integers(0, 2**32 - 1), max_size=3),
        etags=st.lists(st.text(max_size=10), max_size=3), failed=st.sampled_from(["", "", "x\ny"]),
        lease=_COUNTS,
    ),
    st.builds(
        lambda **facts: pb.WorkerMessage(hello=pb.Hello(**facts)).SerializeToString(),
        wire_version=st.integers(0, 2**32 - 1), executor_id=st.text(max_size=20),
        identity=st.text(max_size=20), slots=st.integers(0, 2**32 - 1),
        nonce=st.sampled_from([b"", bytes(32), bytes(31)]),
        resume=st.sampled_from([b"", bytes(32)]),
    ),
)  # fmt: skip
_NUMERALS = st.sampled_from(["0", "1", "-1", "9" * 19, "9" * 40, "x", "", "1e3", "own"])


class _Requests:
    """Makes calls, as a stranger and as a worker that was let in."""

    def __init__(self, contact: Contact, inside: Inside) -> None:
        self._strange = channel(contact)
        self._inside = inside
        self.codes: set[Any] = set()

    def call(
        self,
        method: str,
        token: bytes | str,
        requests: list[bytes],
        numerals: tuple[str, str, str],
    ) -> None:
        enrolled = token == "right"
        own = str(self._inside.welcome.first_blob + 1)
        keys = (BLOB_KEY, SIZE_KEY, LEASE_KEY)
        right = self._inside.welcome.session_token
        metadata: list[tuple[str, str | bytes]] = [
            (key, own if text == "own" else text) for key, text in zip(keys, numerals, strict=True)
        ]
        metadata.append((TOKEN_KEY, right if isinstance(token, str) else token))
        if method in ("Fetch", "Locate", "Store") and not requests:
            return  # gRPC leaves those without an answer that ask nothing
        # Over a connection of its own too: what a stranger does there is not the worker's.
        through = self._inside.channel if enrolled else self._strange
        call = through.stream_stream(_SERVICE + method)
        self.codes.add(code_of(lambda: list(call(iter(requests), metadata=metadata, timeout=20))))

    def close(self) -> None:
        self._strange.close()


@pytest.fixture
def aws() -> Iterator[FakeAWS]:
    with FakeAWS(calls_per_second=1000) as aws:
        boto3.client("s3").create_bucket(Bucket="some-bucket")
        yield aws


@pytest.mark.parametrize("place", ["tls", "unix"])
def test_any_request_is_answered(
    place: str, aws: FakeAWS, caplog: pytest.LogCaptureFixture
) -> None:
    """Each of the five methods with anything, under a session's token, under none and under a
    wrong one: an answer or a refusal, at once, while tasks of another executor go on."""
    objects = ObjectOptions(bucket="some-bucket" if place == "tls" else False)
    launcher = ManualLauncher(needs_network=place == "tls")
    executor = BatchExecutor(1, launcher=launcher, objects=objects)
    with executor_at(place) as bystander:
        assert bystander.submit(double, 1).result(30) == 2
        future = executor.submit(len, bytes(300_000))
        inside = Inside(launcher, 1)
        inside.take()
        requests = _Requests(inside.contact, inside)

        @_examples(200)
        @given(
            method=st.sampled_from(_METHODS),
            token=st.sampled_from([b"", bytes(16), b"x" * 300, "right", "right", "right"]),
            contents=st.lists(_REQUESTS, max_size=3),
            numerals=st.tuples(_NUMERALS, _NUMERALS, _NUMERALS),
        )
        def run(
            method: str,
            token: bytes | str,
            contents: list[bytes],
            numerals: tuple[str, str, str],
        ) -> None:
            requests.call(method, token, contents, numerals)

        with unharmed(bystander, slowest=10):
            run()
            requests.close()
        assert inside.fetch(0) is grpc.StatusCode.NOT_FOUND, "it was cut off"
        assert not future.done()
        assert grpc.StatusCode.UNAUTHENTICATED in requests.codes
        assert grpc.StatusCode.DEADLINE_EXCEEDED not in requests.codes
        assert grpc.StatusCode.UNKNOWN not in requests.codes, "an exception of ours"
        end_by_hand(executor, launcher, inside)
    assert "internal error" not in caplog.text
    assert "Traceback" not in caplog.text


@given(st.one_of(st.binary(max_size=200), st.binary(max_size=300).map(pack_chunk)))
@_examples(500)
def test_chunks_are_what_protobuf_says_they_are(message: bytes) -> None:
    """The short cut past the parser takes nothing for a chunk that is none, nor another one."""
    try:
        expected: pb.Chunk | None = pb.Chunk.FromString(message)
    except DecodeError:
        expected = None
    try:
        found = unpack_chunk(message)
    except DecodeError:
        assert expected is None
        return
    if isinstance(found, memoryview):
        assert expected == pb.Chunk(data=bytes(found))
    else:
        assert found == expected


@pytest.mark.parametrize("size", [0, 1, 127, 128, 129, 16_383, 16_384, 2**21 - 1, 2**21])
def test_chunks_come_out_as_they_went_in(size: int) -> None:
    """Also where the number that says their length gets longer by a byte."""
    data = os.urandom(size)
    found = unpack_chunk(pack_chunk(data))
    assert isinstance(found, memoryview)
    assert found == data


# The socket for large payloads.


def test_any_bytes_on_the_direct_socket(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Requests that are none, for blobs and leases of others, and results that nobody waits for:
    nothing is sent, nothing is unpickled, no thread is left waiting."""
    trap = Trap(tmp_path / "sprung")
    records = struct.pack("<BQ", 0, len(trap.pickled())) + trap.pickled() + struct.pack("<BQ", 3, 0)
    launcher = ManualLauncher()
    executor = BatchExecutor(1, launcher=launcher)
    secret = os.urandom(200_000)
    future = executor.submit(len, secret)
    inside = Inside(launcher, 1)
    inside.take()
    driver: Any = executor._driver
    tokens = st.sampled_from([bytes(16), inside.welcome.session_token])

    def requests(token: bytes, wanted: int, number: int, rest: bytes) -> bytes:
        # Its own task's result may be anything, and is unpickled: it is not sent here.
        mine = token == inside.welcome.session_token
        if mine and wanted == _direct.DELIVER and number == inside.lease:
            number += 1
        if mine and wanted == _direct.FETCH:
            number += 2**32  # what it was told of, it may have
        return _direct.REQUEST.pack(token, wanted, number % 2**64) + rest

    @_examples(200)
    @given(
        st.one_of(
            st.binary(max_size=60),
            st.builds(
                requests,
                tokens,
                st.sampled_from([0, _direct.FETCH, _direct.DELIVER, _direct.DELIVER, 255]),
                st.integers(0, 2**64 - 1) | st.integers(0, 5),
                st.sampled_from([b"", records, records[:9], bytes(50_000)]),
            ),
        )
    )
    def run(said: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(5)
            connection.connect(driver.service.direct_path)
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                connection.sendall(said)
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(1) == b""

    with executor_at("unix") as bystander:
        bystander.submit(double, 1).result(30)
        with unharmed(bystander):
            run()
    assert not trap.path.exists()
    assert not future.done()
    # And an honest one is served, after all of them.
    connection = _direct.connect(
        driver.service.direct_path, inside.welcome.session_token, _direct.DELIVER, inside.lease
    )
    with connection:
        assert connection.recv(1) == _direct.ACCEPTED
        # A piece as large as a number can say: there is to be no room made for it.
        connection.sendall(struct.pack("<BQ", 1, 2**63) + b"x")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == _direct.ACCEPTED
    inside.send(
        results=pb.Results(leases=[inside.lease], payloads=[b""], seconds=[0.0], direct=[0])
    )
    assert "more than a payload may have" in str(future.exception(20))
    end_by_hand(executor, launcher, inside)
    assert "internal error" not in caplog.text


# Impostors.

_KEY = bytes(range(32))
_TOKEN = bytes(16)
_MACS = st.sampled_from(["none", "random", "wrong key", "worker's", "other identity", "other nonce",
                         "other executor", "session alone"])  # fmt: skip


_DIALER = """
import asyncio, sys
from cloudexec._proto import tasks_pb2 as pb
from cloudexec.worker.dialing import Address, dial, shake_hands
from cloudexec.worker.session import Session

target, key, token = sys.argv[1], bytes.fromhex(sys.argv[2]), bytes.fromhex(sys.argv[3])
address = Address(target, "x", "1", key, 1)

async def enrol_anew():
    session = Session(address)
    try:
        await dial(address, session.enrol, 5.0)
    finally:
        assert session.welcome == pb.Welcome()
        assert session.pool is None
        await session.close()

async def come_back(channel):
    call = channel.stream_stream(
        "/cloudexec.v1.TaskServer/Session",
        request_serializer=pb.WorkerMessage.SerializeToString,
        response_deserializer=pb.ServerMessage.FromString,
    )()
    hello = pb.Hello(executor_id="x", identity="1")
    await shake_hands(call, hello, key, "there", token=token, received=3)

async def main():
    for line in sys.stdin:
        try:
            await (enrol_anew() if line == "anew\\n" else dial(address, come_back, 5.0))
            said = "believed it"
        except BaseException as exc:
            said = type(exc).__name__
        print(said, flush=True)

asyncio.run(main())
"""
"""Workers that enrol, one after the other, in a process of their own."""


class _Impostor:
    """A server that answers enrolments with what it is told to, but does not know the key."""

    def __init__(self, path: str, welcome: bytes) -> None:
        self._welcome = welcome
        self.answers: list[tuple[str, bytes]] = []
        self.heard = 0
        self.server = serve_sessions(path, self._session)

    def _session(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        hello = pb.WorkerMessage.FromString(next(requests)).hello
        self.heard += 1
        for kind, said in self.answers:
            yield self._challenge(hello, kind) if kind else said
        yield self._welcome
        with contextlib.suppress(grpc.RpcError):
            for _ in requests:
                yield self._welcome

    def _challenge(self, hello: pb.Hello, kind: str) -> bytes:
        nonce = os.urandom(32)
        key, role, identity, executor_id, proven = _KEY, "server", hello.identity, "x", nonce
        if kind == "wrong key":
            key = bytes(32)
        elif kind == "worker's":
            role = "worker"
        elif kind == "other identity":
            identity = "2"
        elif kind == "other nonce":
            proven = bytes(32)
        elif kind == "other executor":
            executor_id = "y"
        elif kind == "session alone":  # somebody who has stolen the token
            key = _enrolment.session_key(bytes(32), _TOKEN)
        mac = _enrolment.proof(key, role, executor_id, identity, hello.nonce, proven)
        mac = {"none": b"", "random": os.urandom(32)}.get(kind, mac)
        challenge = pb.Challenge(nonce=nonce, mac=mac)
        return pb.ServerMessage(challenge=challenge).SerializeToString()


def test_a_worker_believes_nobody_without_a_proof(tmp_path: Path) -> None:
    """Whatever a server says that does not know the key, to a new worker and to one that comes
    back: it is refused, nothing of it is unpickled, and nothing of it stays."""
    trap = Trap(tmp_path / "sprung")
    welcome = pb.ServerMessage(
        resumed=True,
        welcome=pb.Welcome(initializer=trap.pickled(), session_token=bytes(16), worker_id="w"),
        functions=[pb.Function(number=1, pickle=trap.pickled())],
        tasks=pb.Tasks(leases=[1], functions=[0], payloads=[trap.pickled()], estimates=[0.0]),
    ).SerializeToString()
    path = str(tmp_path / "s")
    impostor = _Impostor(path, welcome)
    dialer = subprocess.Popen(
        [sys.executable, "-c", _DIALER, f"unix:{path}", _KEY.hex(), _TOKEN.hex()],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GRPC_VERBOSITY": "NONE"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # gRPC's log of what cannot be parsed
        text=True,
    )
    assert dialer.stdin is not None
    assert dialer.stdout is not None
    stdin, stdout = dialer.stdin, dialer.stdout

    @_examples(200)
    @given(
        st.lists(
            st.one_of(
                st.tuples(_MACS, st.just(b"")),
                st.tuples(st.just(""), st.one_of(st.binary(max_size=100), st.just(welcome))),
            ),
            max_size=3,
        ),
        st.sampled_from(["anew", "back"]),
    )
    def run(answers: list[tuple[str, bytes]], how: str) -> None:
        impostor.answers = answers
        stdin.write(how + "\n")
        stdin.flush()
        assert stdout.readline().strip() in ("ProtocolError", "LaunchError")
        assert not trap.path.exists()

    with dialer:
        run()
        stdin.close()
    assert impostor.heard >= 200
    impostor.server.stop(None)
