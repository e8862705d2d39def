"""Workers that dial a client which is there, and busy."""

from __future__ import annotations

import asyncio
import hashlib
import math
import re
import socket
import ssl
import sys
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from cloudexec._errors import LaunchError
from cloudexec._record_class import replace
from cloudexec._server.certificate import make_certificate
from cloudexec.worker import dialing
from cloudexec.worker.dialing import Address, dial
from cloudexec.worker.refusals import Outcome, Refusals

pytestmark = pytest.mark.timeout(60)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
    finally:
        writer.close()


class _Client:
    """Takes calls over TLS; each of the first few is one too many for it."""

    def __init__(self, too_many: int) -> None:
        self.callers: list[str] = []
        self._too_many = too_many
        certificate = make_certificate()
        self.pem = certificate.pem.decode()
        self.sha256 = hashlib.sha256(ssl.PEM_cert_to_DER_cert(self.pem)).hexdigest()
        handler = grpc.method_handlers_generic_handler(
            "Client", {"Enrol": grpc.unary_unary_rpc_method_handler(self._enrol)}
        )
        self.server = grpc.server(futures.ThreadPoolExecutor(4))
        self.server.add_generic_rpc_handlers((handler,))
        credentials = grpc.ssl_server_credentials([(certificate.key_pem, certificate.pem)])
        self.port = self.server.add_secure_port("127.0.0.1:0", credentials)
        self.server.start()

    def _enrol(self, _: bytes, context: Any) -> bytes:
        self.callers.append(context.peer())
        if len(self.callers) <= self._too_many:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many at once")
        return b"welcome"

    async def forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Forward a connection to it until that ends."""
        theirs = await asyncio.open_connection("127.0.0.1", self.port)
        both = (_pump(reader, theirs[1]), _pump(theirs[0], writer))
        await asyncio.gather(*both, return_exceptions=True)

    def address(self, port: int | None = None) -> Address:
        target = f"127.0.0.1:{port or self.port}"
        return Address(target, "x", "1", bytes(32), 1, self.sha256)


@pytest.fixture
def client() -> Iterator[_Client]:
    client = _Client(too_many=3)
    yield client
    client.server.stop(None).wait()


class _Worker:
    """Enrols with one call, and keeps the channel over which that went well."""

    def __init__(self) -> None:
        self.channel: Any = None

    async def enrol(self, channel: Any) -> None:
        assert await channel.unary_unary("/Client/Enrol")(b"") == b"welcome"
        self.channel = channel


async def _dialed(address: Address, patience: float, refusals: float = math.inf) -> None:
    worker = _Worker()
    try:
        await dial(address, worker.enrol, patience, refusals)
    finally:
        if worker.channel is not None:
            await worker.channel.close()


def test_who_is_told_to_come_again_does_so_over_the_same_connection(client: _Client) -> None:
    """Its handshake is what costs a client most that ten thousand workers come back to."""
    asyncio.run(_dialed(client.address(), 20.0))
    assert len(client.callers) == 4
    assert len(set(client.callers)) == 1


def test_a_client_that_is_busy_is_waited_for_longer_than_one_that_is_gone(
    client: _Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To begin anew whenever it has not answered soon keeps it busy, and never comes through."""
    monkeypatch.setattr(dialing, "_TRY_TIMEOUT", 0.5)
    monkeypatch.setitem(dialing._pinned, client.sha256, client.pem)
    came: list[asyncio.Task[None]] = []

    async def serve_late(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.5)  # how busy it is
        await client.forward(reader, writer)

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.append(asyncio.ensure_future(serve_late(reader, writer)))

    asyncio.run(_dialed_through(accepted, came, client))
    assert len(client.callers) == 4
    # The first try, and two more, each after a look whether anybody is there.
    assert len(came) == 5


def test_a_connection_that_is_accepted_and_forgotten_does_not_use_up_the_grace(
    client: _Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tries in a row may hang, and a third one begins while the client still waits for it."""
    monkeypatch.setattr(dialing, "_TRY_TIMEOUT", 0.5)
    monkeypatch.setitem(dialing._pinned, client.sha256, client.pem)
    client.callers += ["somebody"] * 3  # so that it is not busy any more
    came: list[asyncio.Task[None]] = []

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            pass
        writer.close()

    def accepted(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # Two tries, and a look between them, meet the wrong one.
        answer = say_nothing if len(came) < 3 else client.forward
        came.append(asyncio.ensure_future(answer(reader, writer)))

    began = time.monotonic()
    asyncio.run(_dialed_through(accepted, came, client))
    assert time.monotonic() - began < 10.0  # one long try would take all of the twenty
    assert len(client.callers) == 4


async def _dialed_through(
    accepted: Callable[[asyncio.StreamReader, asyncio.StreamWriter], None],
    came: list[asyncio.Task[None]],
    client: _Client,
) -> None:
    """Dial a client through what takes connections in its place."""
    server = await asyncio.start_server(accepted, "127.0.0.1", 0)
    async with server:
        try:
            await _dialed(client.address(server.sockets[0].getsockname()[1]), 20.0)
        finally:
            await asyncio.gather(*came, return_exceptions=True)


def test_a_client_that_is_gone_is_not_waited_for(client: _Client) -> None:
    """Nobody listens: that is known at once, and said once patience is over."""
    client.server.stop(None).wait()
    with pytest.raises(LaunchError, match="cannot reach the client"):
        asyncio.run(_dialed(client.address(), 1.0))
    assert not client.callers


def test_a_host_that_refuses_for_a_while_has_no_client_any_more(client: _Client) -> None:
    """Where its own host answers, patience is for networks that are silent."""
    client.server.stop(None).wait()
    began = time.monotonic()
    with pytest.raises(LaunchError, match="it was refused, as the host is there"):
        asyncio.run(_dialed(client.address(), 60.0, refusals=1.0))
    assert 1.0 <= time.monotonic() - began < 20.0


class _Port:
    """A port that refuses connections; for a while after each refusal it leaves them unanswered.

    It takes the place of stderr, so that what a worker says of its tries moves it on.
    """

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.number = taken.getsockname()[1]
        self.silences = 0
        self._open: list[socket.socket] = []
        self._later: asyncio.TimerHandle | None = None

    def write(self, text: str) -> None:
        if "it was refused" in text and "yet" in text:
            self.close()
            self._later = asyncio.get_running_loop().call_later(0.3, self._be_silent)
        elif "nobody answers" in text:
            self.silences += 1
            self.close()

    def flush(self) -> None:
        pass

    def _be_silent(self) -> None:
        # Once one connection waits to be accepted, the kernel drops further ones.
        server = socket.create_server(("127.0.0.1", self.number), backlog=0)
        self._open = [server, socket.create_connection(server.getsockname())]

    def close(self) -> None:
        if self._later is not None:
            self._later.cancel()
        while self._open:
            self._open.pop().close()


@pytest.mark.skipif(sys.platform != "linux", reason="other kernels refuse where the queue is full")
def test_a_try_that_nobody_answers_does_not_begin_the_refusals_anew(
    client: _Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client stays gone, even if the network loses a packet every now and then."""
    client.server.stop(None).wait()
    monkeypatch.setattr(dialing, "_PROBE_TIMEOUT", 0.2)
    monkeypatch.setitem(dialing._pinned, client.sha256, client.pem)
    port = _Port()
    monkeypatch.setattr(sys, "stderr", port)
    address = replace(client.address(port.number), log=True)

    async def run() -> None:
        try:
            await _dialed(address, 20.0, refusals=0.5)
        finally:
            port.close()

    began = time.monotonic()
    with pytest.raises(LaunchError, match="it was refused, as the host is there"):
        asyncio.run(run())
    assert time.monotonic() - began < 10.0
    assert port.silences


_R, _S, _A = Outcome.REFUSED, Outcome.SILENT, Outcome.ANSWERED


@pytest.mark.parametrize(
    ("tries", "gone_at"),
    [
        ([(_R, 0), (_R, 4), (_R, 9.9), (_R, 10)], 10),
        # Silence is not counted, and takes back nothing.
        ([(_R, 0), (_R, 6), (_S, 9), (_R, 11), (_R, 14.5), (_R, 15)], 15),
        ([(_R, 0), (_R, 9), (_S, 12), (_S, 15), (_S, 60), (_R, 61), (_R, 62)], 62),
        # A firewall that refuses for a moment, twice, in a network that fails in between.
        ([(_R, 0), (_S, 3), (_S, 30), (_R, 31), (_S, 34), (_S, 60), (_R, 61)], None),
        # Somebody who listens may be the client.
        ([(_R, 0), (_R, 9), (_A, 10), (_R, 11), (_R, 20), (_R, 21)], 21),
        ([(_R, 0), (_R, 9), (_S, 10), (_A, 11), (_R, 12), (_R, 21)], None),
    ],
)
def test_only_time_between_refusals_counts(
    tries: list[tuple[Outcome, float]], gone_at: float | None
) -> None:
    refusals = Refusals(10.0)
    gone = []
    for outcome, now in tries:
        refusals.note(outcome, now)
        gone += [now] if refusals.is_gone else []
    assert gone == ([] if gone_at is None else [gone_at])


def test_pauses_are_short_where_a_client_seems_to_be_gone() -> None:
    """Pauses of up to nine seconds would let a worker live on for longer than is documented."""
    refusals = Refusals(10.0)
    assert refusals.pause(9.0) == 9.0
    refusals.note(Outcome.REFUSED, 0.0)
    assert refusals.pause(9.0) == 2.0
    assert refusals.pause(0.1) == 0.1
    refusals.note(Outcome.REFUSED, 9.5)
    assert refusals.pause(9.0) == 0.5  # at its end the ten seconds are over
    refusals.note(Outcome.SILENT, 12.0)
    assert refusals.pause(9.0) == 2.0
    refusals.note(Outcome.ANSWERED, 13.0)
    assert refusals.pause(9.0) == 9.0
    assert Refusals().pause(15.0) == 15.0


async def _hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("refused", "it was refused, as the host is there and nobody listens"),
        ("closed", "it was accepted and closed again, as by a forwarded port"),
        ("silent", "nobody answers, as if a security group, a firewall or a missing route"),
        ("closed relay", "it was accepted and closed again, as by a relay that ends"),
        ("silent relay", "the relay does not answer, as if it had ended or a firewall"),
    ],
)
def test_the_first_failure_is_logged_at_once_with_its_kind(
    client: _Client,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    words: str,
) -> None:
    """Whoever reads the log of a worker that does not come need not wait until it gives up."""
    monkeypatch.setattr(dialing, "_TRY_TIMEOUT", 0.5)

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=0) as taken:
            port = taken.getsockname()[1]
            address = replace(client.address(port), log=True)
            if "relay" in kind:
                address = replace(address, relay=address.target)
            if "silent" in kind:
                if "relay" in kind:
                    taken.listen(1)
                with pytest.raises(LaunchError, match=words):
                    await _dialed(address, 2.0)
                return
        if kind == "refused":
            with pytest.raises(LaunchError, match=words):
                await _dialed(address, 1.0)
            return
        server = await asyncio.start_server(_hang_up, "127.0.0.1", port)
        async with server:
            with pytest.raises(LaunchError, match=words):
                await _dialed(address, 1.0)

    asyncio.run(run())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1  # once, however often it is tried
    assert re.search(
        f"no connection to .* yet: {words}.*; dialing again, for [12] s at most$", lines[0]
    )


def test_a_name_that_nobody_knows_is_logged_at_once(
    client: _Client, capsys: pytest.CaptureFixture[str]
) -> None:
    address = replace(client.address(), target="nobody.invalid:5000", log=True)
    with pytest.raises(LaunchError, match="cannot reach the client"):
        asyncio.run(_dialed(address, 1.0))
    (line,) = capsys.readouterr().err.splitlines()
    assert "no connection to nobody.invalid:5000 yet" in line


def test_a_client_on_this_machine_that_is_gone_is_not_looked_for_in_the_network(
    tmp_path: Path,
) -> None:
    """No port or network lies between a worker and the socket of its client."""
    path = tmp_path / "socket"
    address = Address(f"unix:{path}", "x", "1", bytes(32), 1)
    with pytest.raises(LaunchError) as caught:
        asyncio.run(_dialed(address, 1.0))
    said = str(caught.value)
    assert said.startswith(f"cannot reach the client at {path}, a socket on this machine (")
    assert said.endswith("ended, or was its temporary directory deleted?")
    assert "network" not in said


def test_a_call_that_was_cancelled_is_no_reason_to_stop_dialing(client: _Client) -> None:
    """gRPC tells of it as if the task were cancelled; a task that is cancelled does end."""
    worker = _Worker()
    cancelled = iter([True, True])
    going_on = client.address()

    async def enrol(channel: Any) -> None:
        if next(cancelled, False):
            raise asyncio.CancelledError
        await worker.enrol(channel)

    async def hang(channel: Any) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def run() -> None:
        await dial(going_on, enrol, 20.0)
        await worker.channel.close()
        task = asyncio.ensure_future(dial(going_on, hang, 20.0))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    begun = asyncio.Event()
    asyncio.run(run())
    assert len(client.callers) == 4
