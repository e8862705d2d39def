"""The plain socket for workers of this machine: what it carries, and who is turned away."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest
from hostile_peers import contact_of, double, hello, refusals, wait_until

from cloudexec import BatchExecutor, ProtocolError, _enrolment
from cloudexec._errors import LaunchError
from cloudexec._plain import CALL, MESSAGE, STATUS, Channel, Frames
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._rpc import CallError
from cloudexec._wire.channel import MAX_MESSAGE_BYTES
from cloudexec.worker.dialing import shake_hands

SESSION = "/cloudexec.v1.TaskServer/Session"


@pytest.fixture(scope="module")
def executor() -> Iterator[BatchExecutor]:
    with BatchExecutor(1) as executor:
        assert executor.submit(double, 1).result(30) == 2
        yield executor


def _dial(executor: BatchExecutor) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(30)
    connection.connect(contact_of(executor).target.removeprefix("plain:"))
    return connection


def _frame(kind: int, data: bytes) -> bytes:
    return struct.pack("<BI", kind, len(data)) + data


def _call(method: str, **metadata: str) -> bytes:
    return _frame(CALL, json.dumps([method, json.dumps(metadata)]).encode())


def _answer(connection: socket.socket) -> bytes:
    """Return what comes until the other side hangs up."""
    answer = b""
    while data := connection.recv(65536):
        answer += data
    return answer


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (_frame(MESSAGE, b"x"), b"INVALID_ARGUMENT this is no call"),
        (_frame(CALL, b"\xff{"), b"INVALID_ARGUMENT this is no call"),
        (_frame(CALL, b"[1, 2]"), b"INVALID_ARGUMENT this is no call"),
        (_frame(CALL, b'["/Session", "{\\"a\\": 1}"]'), b"INVALID_ARGUMENT this is no call"),
        (_call("/cloudexec.v1.TaskServer/Fetch"), b"UNAUTHENTICATED unknown session"),
        (
            _call("/cloudexec.v1.TaskServer/Deliver", **{"cloudexec-token-bin": "00" * 16}),
            b"UNAUTHENTICATED unknown session",
        ),
        (_call(SESSION) + _frame(MESSAGE, b"no hello"), b"UNAUTHENTICATED say hello first"),
    ],
    ids=["no call", "no JSON", "no method", "no metadata", "no token", "wrong token", "no hello"],
)
def test_who_has_no_session_is_told_so(executor: BatchExecutor, sent: bytes, status: bytes) -> None:
    """And is hung up on; the executor goes on."""
    with _dial(executor) as connection:
        connection.sendall(sent)
        assert _answer(connection) == _frame(STATUS, status)
    assert executor.submit(double, 2).result(30) == 4


@pytest.mark.parametrize(
    "sent",
    [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", struct.pack("<BI", CALL, MAX_MESSAGE_BYTES + 1)],
    ids=["another protocol", "too long"],
)
def test_what_is_no_frame_is_cut_off(executor: BatchExecutor, sent: bytes) -> None:
    """Nothing that long is waited for, or held."""
    with _dial(executor) as connection:
        connection.sendall(sent)
        assert _answer(connection) == b""
    assert executor.submit(double, 2).result(30) == 4


@pytest.mark.parametrize("knows", ["nothing", "the key"])
def test_only_who_was_launched_is_let_in(executor: BatchExecutor, knows: str) -> None:
    """A process of this user that knows the key, too, if nobody waits for it."""
    contact = contact_of(executor)
    key = contact.key if knows == "the key" else b"guess" * 6

    async def enrol() -> None:
        channel = Channel(contact.target.removeprefix("plain:"))
        call = channel.stream_stream(
            SESSION,
            request_serializer=pb.WorkerMessage.SerializeToString,
            response_deserializer=pb.ServerMessage.FromString,
        )()
        mine = pb.Hello(
            executor_id=contact.executor_id,
            identity="another",
            slots=1,
            wire_version=_enrolment.WIRE_VERSION,
            python_version=_enrolment.python_version(),
        )
        try:
            await shake_hands(call, mine, key, contact.target)
        finally:
            await channel.close()

    with pytest.raises(ProtocolError, match="impostor" if knows == "nothing" else "refused"):
        asyncio.run(enrol())
    assert executor.stats().workers.slots == 1


def test_a_wrong_proof_is_counted(executor: BatchExecutor) -> None:
    """As with gRPC."""
    before = refusals(executor).get("no proof", 0)
    proof = pb.WorkerMessage(proof=pb.Proof(mac=os.urandom(32))).SerializeToString()
    with _dial(executor) as connection:
        greeting = hello(contact_of(executor), "1")
        connection.sendall(_call(SESSION) + _frame(MESSAGE, greeting) + _frame(MESSAGE, proof))
        answer = _answer(connection)
    assert answer.endswith(_frame(STATUS, b"UNAUTHENTICATED proof refused"))
    wait_until(lambda: refusals(executor)["no proof"] == before + 1)


def test_a_client_that_is_gone_cannot_be_dialed(tmp_path: Any) -> None:
    """Its socket is, too."""
    from cloudexec.worker.dialing import Address, dial

    address = Address(
        target=f"plain:{tmp_path}/s", executor_id="x", identity="1", key=b"x", slots=1
    )

    async def enrol(channel: Any) -> None:
        call = channel.stream_stream(SESSION, bytes, bytes)()
        with pytest.raises(CallError) as caught:
            await call.write(b"x")
        assert caught.value.code() == "UNAVAILABLE"
        raise caught.value

    with pytest.raises(LaunchError, match="cannot reach the client"):
        asyncio.run(dial(address, enrol))


def test_more_than_anybody_reads_waits_on_its_way(executor: BatchExecutor) -> None:
    """Outputs and results larger than both ends hold arrive whole, and in their order."""
    size, count = 60_000, 400
    results = executor.map(bytes, [size] * count)
    assert sum(map(len, results)) == size * count


def test_a_message_that_cannot_be_taken_as_it_comes_is_taken_once() -> None:
    """Half of it may have been done: whoever reads is told, and does not get it again."""
    taken: list[bytes] = []

    def take(message: bytes) -> bool:
        taken.append(message)
        raise OSError("no room")

    async def read() -> None:
        frames = Frames()
        frames.at_once = take
        header = struct.Struct("<BI").pack(1, 2)
        frames.data_received(header + b"ab" + header + b"cd")
        for _ in range(2):
            with pytest.raises(OSError, match="no room"):
                await asyncio.wait_for(frames.receive(), 5)

    asyncio.run(read())
    assert taken == [b"ab"]
