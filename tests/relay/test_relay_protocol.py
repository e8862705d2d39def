"""The relay, spoken to by peers that follow its protocol, and by some that do not."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from cloudexec._relay import handshake, server
from cloudexec._relay.handshake import ACCEPT, REGISTER, TICKET, Line, RelayRefusedError, greet
from cloudexec._relay.joining import dial, join, prepare
from cloudexec._relay.server import Relay

KEY = handshake.relay_key(b"k" * 32)
PATIENCE = 20.0

Scene = Callable[["Peers"], Awaitable[None]]


class Peers:
    """Connections to one relay, which are closed in the end."""

    def __init__(self, relay: Relay, address: tuple[str, int]) -> None:
        self.relay = relay
        self._address = address
        self._lines: list[Line] = []

    async def line(self) -> Line:
        connection = await dial(*self._address)
        prepare(connection)
        self._lines.append(Line(connection))
        return self._lines[-1]

    async def greet(self, purpose: str, executor: str, argument: str = "") -> tuple[Line, str]:
        line = await self.line()
        return line, await greet(line, KEY, purpose, executor, argument)

    async def ticket(self, executor: str) -> str:
        return (await self.greet(TICKET, executor))[1]

    async def worker(self, executor: str, ticket: str = "", target: str = "") -> Line:
        """Dial as gRPC does."""
        line = await self.line()
        login = base64.b64encode(f"worker:{ticket or await self.ticket(executor)}".encode())
        target = target or f"{executor}.cloudexec.invalid:443"
        await line.say(
            f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
            f"Proxy-Authorization: Basic {login.decode()}\r\n\r"
        )
        return line

    async def pair(self, executor: str, client: Line) -> tuple[Line, Line]:
        """Return both ends of a worker's connection."""
        worker = await self.worker(executor)
        what, token = (await heard(client)).split(" ")
        assert what == "open"
        taken, _ = await self.greet(ACCEPT, executor, token)
        assert (await worker.read(b"\r\n\r\n")).startswith("HTTP/1.1 200 ")
        return worker, taken

    def close(self) -> None:
        for line in self._lines:
            line.connection.close()


async def heard(client: Line) -> str:
    """Return what the relay says to a client, apart from its signs of life."""
    while (said := await client.read()) == "alive":
        pass
    return said


async def at_end(line: Line) -> bool:
    """Wait for the end of what is said on a connection."""
    with contextlib.suppress(ConnectionResetError):
        while await asyncio.get_running_loop().sock_recv(line.connection, 65536):
            pass
    return True


async def come_true(condition: Callable[[], Any]) -> None:
    while not condition():  # noqa: ASYNC110 - nothing tells of it
        await asyncio.sleep(0.01)


@contextlib.asynccontextmanager
async def a_relay(**options: Any) -> AsyncIterator[Peers]:
    listening = socket.create_server(("127.0.0.1", 0))
    relay = Relay(KEY, **options)
    peers = Peers(relay, listening.getsockname())
    serving = asyncio.ensure_future(relay.serve(listening))
    try:
        yield peers
    finally:
        peers.close()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


@pytest.fixture
def play() -> Callable[[Scene], None]:
    """Run a scene with a relay of its own, after which it holds nothing."""

    def run(scene: Scene) -> None:
        async def whole() -> None:
            async with asyncio.timeout(PATIENCE), a_relay() as peers:
                await scene(peers)
                peers.close()
                await come_true(lambda: not peers.relay._tasks)
                assert not peers.relay._waiting
                assert not peers.relay._clients
                assert not peers.relay.joined

        asyncio.run(whole())

    return run


def test_bytes_go_both_ways_and_each_end_is_passed_on(play: Callable[[Scene], None]) -> None:
    async def scene(peers: Peers) -> None:
        client, _ = await peers.greet(REGISTER, "e1")
        worker, taken = await peers.pair("e1", client)
        loop = asyncio.get_running_loop()
        data = bytes(range(256)) * 40_000  # more than all buffers on the way hold

        async def receive(line: Line) -> bytes:
            found = bytearray(line.rest)
            while piece := await loop.sock_recv(line.connection, 1 << 20):
                found += piece
            return bytes(found)

        async def send(line: Line) -> None:
            await loop.sock_sendall(line.connection, data)
            line.connection.shutdown(socket.SHUT_WR)

        results = await asyncio.gather(send(worker), receive(taken), send(taken), receive(worker))
        assert results[1] == data
        assert results[3] == data

    play(scene)


def test_a_worker_may_dial_before_its_client_is_there(play: Callable[[Scene], None]) -> None:
    async def scene(peers: Peers) -> None:
        worker = await peers.worker("e1")
        await come_true(lambda: peers.relay._waiting)
        client, _ = await peers.greet(REGISTER, "e1")
        token = (await heard(client)).removeprefix("open ")
        await peers.greet(ACCEPT, "e1", token)
        assert (await worker.read(b"\r\n\r\n")).startswith("HTTP/1.1 200 ")

    play(scene)


def test_a_client_that_comes_back_is_told_of_who_waits(play: Callable[[Scene], None]) -> None:
    """From another network, while the relay takes its earlier connection for alive."""

    async def scene(peers: Peers) -> None:
        before, _ = await peers.greet(REGISTER, "e1")
        worker = await peers.worker("e1")
        told = await heard(before)
        client, _ = await peers.greet(REGISTER, "e1")
        assert await heard(client) == told
        assert await at_end(before)
        await peers.greet(ACCEPT, "e1", told.removeprefix("open "))
        assert (await worker.read(b"\r\n\r\n")).startswith("HTTP/1.1 200 ")

    play(scene)


def test_an_executor_gets_its_own_workers_only(play: Callable[[Scene], None]) -> None:
    async def scene(peers: Peers) -> None:
        one, _ = await peers.greet(REGISTER, "e1")
        other, _ = await peers.greet(REGISTER, "e2")
        token_of = {}
        workers = {name: await peers.worker(name) for name in ("e1", "e2")}
        for name, client in (("e1", one), ("e2", other)):
            token_of[name] = (await heard(client)).removeprefix("open ")
        with pytest.raises(RelayRefusedError, match="this worker has hung up"):
            await peers.greet(ACCEPT, "e2", token_of["e1"])
        for name, token in token_of.items():
            await peers.greet(ACCEPT, name, token)
            assert "200" in await workers[name].read(b"\r\n\r\n")
        with pytest.raises(RelayRefusedError, match="this worker has hung up"):
            await peers.greet(ACCEPT, "e1", token_of["e1"])  # once is enough

    play(scene)


def test_a_worker_that_hangs_up_is_forgotten(play: Callable[[Scene], None]) -> None:
    async def scene(peers: Peers) -> None:
        client, _ = await peers.greet(REGISTER, "e1")
        worker = await peers.worker("e1")
        token = (await heard(client)).removeprefix("open ")
        worker.connection.close()
        await come_true(lambda: not peers.relay._waiting)
        with pytest.raises(RelayRefusedError, match="this worker has hung up"):
            await peers.greet(ACCEPT, "e1", token)

    play(scene)


@pytest.mark.parametrize("side", [0, 1])
def test_the_end_of_one_side_is_the_end_of_the_other(
    play: Callable[[Scene], None], side: int
) -> None:
    async def scene(peers: Peers) -> None:
        client, _ = await peers.greet(REGISTER, "e1")
        pair = await peers.pair("e1", client)
        # As of a process that was killed with bytes that it had not read.
        linger = (1).to_bytes(4, "little") + bytes(4)
        pair[side].connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        pair[side].connection.close()
        assert await at_end(pair[1 - side])

    play(scene)


@pytest.mark.parametrize("bad", ["used", "another executor's", "made up", "none"])
def test_without_a_ticket_of_its_own_nothing_is_joined(
    play: Callable[[Scene], None], bad: str
) -> None:
    async def scene(peers: Peers) -> None:
        client, _ = await peers.greet(REGISTER, "e1")
        ticket = await peers.ticket("e2" if bad == "another executor's" else "e1")
        if bad == "used":
            await peers.worker("e1", ticket)
            await heard(client)
        if bad == "none":
            worker = await peers.line()
            await worker.say("CONNECT e1.cloudexec.invalid:443 HTTP/1.1\r\n\r")
        else:
            worker = await peers.worker("e1", "x" * 32 if bad == "made up" else ticket)
        assert (await worker.read(b"\r\n\r\n")).startswith("HTTP/1.1 407 ")
        assert await at_end(worker)

    play(scene)


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(300) + b"\n",
        b"cloudexec-relay/2 register e1\n",
        b"cloudexec-relay/1 register ../..\n",
        b"x" * 4096,
        b"\n",
        b"CONNECT e1.x:443 HTTP/1.1\r\n" + b"a: b\r\n" * 400,
    ],
)
def test_what_is_no_peer_of_ours_is_turned_away(play: Callable[[Scene], None], said: bytes) -> None:
    async def scene(peers: Peers) -> None:
        line = await peers.line()
        await asyncio.get_running_loop().sock_sendall(line.connection, said)
        assert await at_end(line)

    play(scene)


def test_a_proof_under_another_key_or_of_another_nonce_is_refused(
    play: Callable[[Scene], None],
) -> None:
    async def scene(peers: Peers) -> None:
        line = await peers.line()
        with pytest.raises(RelayRefusedError, match="not that of this relay's key"):
            await greet(line, b"another", REGISTER, "e1")
        proofs = []
        for _ in range(2):
            line = await peers.line()
            await line.say(handshake.opening(REGISTER, "e1"))
            nonce = (await line.read()).removeprefix("nonce ")
            proofs.append(handshake.proof(KEY, REGISTER, "e1", "", nonce))
            if len(proofs) == 2:
                await line.say(proofs[0])
                assert (await line.read()).startswith("no ")

    play(scene)


def test_strangers_make_room_for_those_who_belong(
    play: Callable[[Scene], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They wait without a word; who proves to belong is served although there are too many."""
    monkeypatch.setattr(server, "STRANGERS", 8)

    async def scene(peers: Peers) -> None:
        client, _ = await peers.greet(REGISTER, "e1")
        strangers = [await peers.line() for _ in range(30)]
        worker, taken = await peers.pair("e1", client)
        strangers += [await peers.line() for _ in range(30)]
        await worker.say("still here")
        assert await taken.read() == "still here"
        await come_true(lambda: len(peers.relay._strangers) <= 8)
        assert await at_end(strangers[0])

    play(scene)


def test_a_burst_of_strangers_is_bounded_too(
    play: Callable[[Scene], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have dialed before the relay takes the first of them, and leave no socket behind."""
    monkeypatch.setattr(server, "STRANGERS", 8)

    async def scene(peers: Peers) -> None:
        await peers.greet(REGISTER, "e1")
        burst = [socket.create_connection(peers._address) for _ in range(100)]
        async with asyncio.timeout(server.PROOF_TIMEOUT / 2):  # not because they are too slow
            await come_true(lambda: len(peers.relay._tasks) <= 1 + 8)
        assert len(peers.relay._strangers) <= 8
        for each in burst:
            each.close()

    play(scene)


def test_a_client_that_does_not_read_holds_up_no_worker_of_another(
    play: Callable[[Scene], None],
) -> None:
    async def scene(peers: Peers) -> None:
        deaf, _ = await peers.greet(REGISTER, "e1")
        relay_end = peers.relay._clients["e1"]
        for _ in range(200_000):
            relay_end.news.put_nowait("open " + "x" * 32)  # as if so many workers had dialed
        workers = [await peers.worker("e1") for _ in range(3)]
        client, _ = await peers.greet(REGISTER, "e2")
        await peers.pair("e2", client)
        again, _ = await peers.greet(REGISTER, "e1")  # from another network
        told = {await heard(again) for _ in workers}
        assert len(told) == len(workers)
        assert await at_end(deaf)

    play(scene)


def test_who_says_nothing_is_let_go(
    play: Callable[[Scene], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger, a client without signs of life, and a worker whose client does not come."""
    monkeypatch.setattr(server, "PROOF_TIMEOUT", 0.2)
    monkeypatch.setattr(server, "SILENCE", 0.2)
    monkeypatch.setattr(server, "WAIT_FOR_CLIENT", 0.2)

    async def scene(peers: Peers) -> None:
        stranger = await peers.line()
        assert await at_end(stranger)
        client, _ = await peers.greet(REGISTER, "e1")
        assert await at_end(client)
        worker = await peers.worker("e1")
        assert (await worker.read(b"\r\n\r\n")).startswith("HTTP/1.1 504 ")

    play(scene)


def test_a_ticket_is_good_for_a_while(
    play: Callable[[Scene], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "TICKET_LIFETIME", 0.05)

    async def scene(peers: Peers) -> None:
        ticket = await peers.ticket("e1")
        await come_true(lambda: not peers.relay._tickets)
        worker = await peers.worker("e1", ticket)
        assert (await worker.read(b"\r\n\r\n")).startswith("HTTP/1.1 407 ")

    play(scene)


def test_the_relay_ends_when_the_last_peer_has_left_for_long_enough() -> None:
    async def scene() -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        relay = Relay(KEY, idle=0.3)
        serving = asyncio.ensure_future(relay.serve(listening))
        peers = Peers(relay, listening.getsockname())
        stranger = await peers.line()
        client, _ = await peers.greet(REGISTER, "e1")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.8):
                await asyncio.shield(serving)
        client.connection.close()
        async with asyncio.timeout(PATIENCE):
            await serving  # a stranger does not keep it
        stranger.connection.close()

    asyncio.run(scene())


def test_what_one_side_does_not_read_is_not_taken_from_the_other() -> None:
    """Neither connection is read ahead of the other by more than the buffers hold."""

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        near, one = socket.socketpair()
        other, far = socket.socketpair()
        for each in (near, one, other, far):
            each.setblocking(False)
        joining = asyncio.ensure_future(join(one, other))
        sent = 0
        with contextlib.suppress(TimeoutError):
            while True:  # until all buffers on the way are full
                async with asyncio.timeout(0.5):
                    await loop.sock_sendall(near, bytes(1024))
                sent += 1024
        assert sent < 8 * 2**20
        received = 0
        near.shutdown(socket.SHUT_WR)
        while data := await loop.sock_recv(far, 1 << 20):
            received += len(data)
        assert sent <= received < sent + 1024
        far.close()
        await joining
        near.close()

    asyncio.run(scene())
