"""The relay: joins the connections of workers with those of their clients.

It identifies executors by their ids, and lets in peers that prove to know its key. It has no other
key, and passes bytes on without reading them.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import re
import socket
import sys
from collections.abc import AsyncIterator

from cloudexec import _enrolment
from cloudexec._relay import handshake
from cloudexec._relay.handshake import ACCEPT, REGISTER, TICKET, Line
from cloudexec._relay.joining import join, prepare

__all__ = ["Relay"]

STRANGERS = 256
"""Largest number of connections that have not proved anything yet; one more ends the oldest one."""
PROOF_TIMEOUT = 10.0
"""Seconds within which a peer must prove that it belongs to an executor."""
TICKET_LIFETIME = 60.0
"""Seconds within which a worker must use its ticket."""
TICKETS = 20_000
WAIT_FOR_CLIENT = 30.0
"""Seconds for which a worker waits for its client to register and take its connection."""
SILENCE = 30.0
"""Seconds without a message after which a client counts as gone."""
_CONNECT = re.compile(r"CONNECT ([\w-]{1,64})\.\S+ HTTP/1\.[01]")
_LOGIN = re.compile(r"\r\nproxy-authorization: *basic +([\w+/=]+)", re.IGNORECASE)


class _Refusal(Exception):
    """A peer is refused; the message is sent to it."""


class _Client:
    """A registered client.

    Attributes:
        task: The task that serves the client's connection.
        news: Lines to be sent to the client. They are queued, so that a client that does not read
            delays nobody else.
    """

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.news: asyncio.Queue[str] = asyncio.Queue()

    async def tell(self, line: Line) -> None:
        """Send the queued lines to the client."""
        with contextlib.suppress(OSError):  # the task that reads the connection fails, too
            while True:
                await line.say(await self.news.get())


class Relay:
    """Joins workers with clients.

    Args:
        key: The relay's key, which clients and workers prove to know.
        idle: Seconds without a client or worker after which the relay ends; ``None`` for no limit.
        log: Whether to log on stderr which executors register and leave.
    """

    def __init__(self, key: bytes, *, idle: float | None = None, log: bool = False) -> None:
        self._key = key
        self._idle = idle
        self._log = log
        self._clients: dict[str, _Client] = {}
        self._tickets: dict[str, tuple[str, asyncio.TimerHandle]] = {}
        self._waiting: dict[str, tuple[str, asyncio.Future[Line]]] = {}
        self._strangers: dict[asyncio.Task[None], None] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._members = 0
        self._ended = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self.joined = 0
        """Number of worker connections that are joined with their client's now."""

    async def serve(self, listening: socket.socket) -> None:
        """Accept connections until the relay has been unused for ``idle`` seconds.

        Args:
            listening: A listening socket; it is closed in the end.
        """
        loop = asyncio.get_running_loop()
        listening.setblocking(False)
        self._left()
        taking = loop.create_task(self._take(listening))
        ended = loop.create_task(self._ended.wait())
        try:
            await asyncio.wait({taking, ended}, return_when=asyncio.FIRST_COMPLETED)
            if taking.done():
                taking.result()
        finally:
            tasks = [taking, ended, *self._tasks]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            listening.close()

    async def _take(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listening)
            except ConnectionError:
                continue  # the peer has hung up already
            except OSError as exc:  # this process has too many files open
                self._say(f"cannot take a connection: {exc}")
                await asyncio.sleep(0.1)
                continue
            if len(self._strangers) >= STRANGERS:
                oldest = next(iter(self._strangers))
                del self._strangers[oldest]
                oldest.cancel()
            task = loop.create_task(self._attend(connection))
            self._tasks.add(task)
            self._strangers[task] = None
            task.add_done_callback(functools.partial(self._forget, connection))
            # sock_accept may return at once, again and again: let the other tasks run.
            await asyncio.sleep(0)

    def _forget(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        connection.close()  # also if the task was cancelled before it began
        self._tasks.discard(task)
        self._strangers.pop(task, None)
        if not task.cancelled() and (failed := task.exception()) is not None:
            self._say(f"internal error: {failed!r}")

    async def _attend(self, connection: socket.socket) -> None:
        """Read the purpose of a connection, check the peer's proof, and serve it."""
        try:
            prepare(connection)
            line = Line(connection)
            async with asyncio.timeout(PROOF_TIMEOUT):
                first = await line.read()
                if first.startswith("CONNECT "):
                    executor_id = await self._login(line, first)
                    purpose, argument = "CONNECT", ""
                else:
                    purpose, executor_id, argument = await self._proven(line, first)
            # The peer has proved that it belongs to an executor.
            me = asyncio.current_task()
            assert me is not None
            self._strangers.pop(me, None)
            async with self._member():
                if purpose == REGISTER:
                    await self._keep(line, executor_id)
                elif purpose == TICKET:
                    await line.say(f"ok {self._ticket(executor_id)}")
                elif purpose == ACCEPT:
                    await self._accept(line, executor_id, argument)
                else:
                    await self._dialed(line, executor_id)
        except _Refusal as exc:
            with contextlib.suppress(OSError):
                await Line(connection).say(f"no {exc}")
        except OSError:  # a TimeoutError is one
            pass

    async def _proven(self, line: Line, first: str) -> tuple[str, str, str]:
        found = handshake.read_opening(first)
        if found is None:
            raise _Refusal("this is a relay of cloudexec, which speaks cloudexec-relay/1")
        nonce = handshake.make_token()
        await line.say(f"nonce {nonce}")
        mac = await line.read()
        expected = handshake.proof(self._key, *found, nonce)
        if not _enrolment.proves(mac.encode(), expected.encode()):
            raise _Refusal("the proof is not that of this relay's key")
        return found

    async def _login(self, line: Line, first: str) -> str:
        """Check the ticket of a worker that sends a ``CONNECT`` request; return the executor."""
        # A request without headers ends here.
        is_bare = line.rest.startswith(b"\r\n")
        head = "" if is_bare else "\r\n" + await line.read(b"\r\n\r\n")
        target, login = _CONNECT.fullmatch(first), _LOGIN.search(head)
        ticket = ""
        if login is not None:
            with contextlib.suppress(ValueError):
                ticket = base64.b64decode(login[1]).decode("ascii").partition(":")[2]
        executor_id, timer = self._tickets.pop(ticket, ("", None))
        if timer is not None:
            timer.cancel()
        if target is None or not executor_id or target[1] != executor_id:
            await line.say("HTTP/1.1 407 No ticket of this relay\r\nContent-Length: 0\r\n\r")
            raise OSError("no ticket")
        return executor_id

    def _ticket(self, executor_id: str) -> str:
        while len(self._tickets) >= TICKETS:
            oldest = next(iter(self._tickets))
            self._tickets.pop(oldest)[1].cancel()
        ticket = handshake.make_token()
        loop = asyncio.get_running_loop()
        timer = loop.call_later(TICKET_LIFETIME, self._tickets.pop, ticket, None)
        self._tickets[ticket] = executor_id, timer
        return ticket

    async def _keep(self, line: Line, executor_id: str) -> None:
        """Keep a client registered until it hangs up or sends nothing for too long."""
        client = _Client()
        before = self._clients.get(executor_id)
        self._clients[executor_id] = client
        if before is not None:
            before.task.cancel()  # the client has registered anew, over another connection
        client.news.put_nowait("ok")
        for token, (owner, taken) in self._waiting.items():
            if owner == executor_id and not taken.done():
                client.news.put_nowait(f"open {token}")
        self._say(f"executor {executor_id} is registered")
        telling = asyncio.get_running_loop().create_task(client.tell(line))
        try:
            while True:
                async with asyncio.timeout(SILENCE):
                    await line.read()
                client.news.put_nowait("alive")
        finally:
            # Cancelled before the connection is closed, because the next connection may have the
            # same file descriptor.
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            if self._clients.get(executor_id) is client:
                del self._clients[executor_id]
                self._say(f"executor {executor_id} has left")

    async def _dialed(self, line: Line, executor_id: str) -> None:
        """Join a worker with its client, which is told of the worker now or when it registers."""
        token = handshake.make_token()
        loop = asyncio.get_running_loop()
        taken: asyncio.Future[Line] = loop.create_future()
        self._waiting[token] = executor_id, taken

        def heard() -> None:
            # A worker sends nothing before it is joined; it only may hang up.
            loop.remove_reader(line.connection)
            try:
                has_ended = not line.connection.recv(1, socket.MSG_PEEK)
            except OSError:
                has_ended = True
            if has_ended and not taken.done():
                taken.set_exception(ConnectionResetError("the worker has hung up"))

        loop.add_reader(line.connection, heard)
        try:
            async with asyncio.timeout(WAIT_FOR_CLIENT):
                if (client := self._clients.get(executor_id)) is not None:
                    client.news.put_nowait(f"open {token}")
                other = await taken
        except BaseException as exc:
            if taken.done() and not taken.cancelled() and taken.exception() is None:
                taken.result().connection.close()
            if isinstance(exc, TimeoutError):
                await line.say("HTTP/1.1 504 The client is not there\r\nContent-Length: 0\r\n\r")
            raise
        finally:
            del self._waiting[token]
            loop.remove_reader(line.connection)
        try:
            await line.say("HTTP/1.1 200 Joined\r\n\r")
        except BaseException:
            other.connection.close()
            raise
        self.joined += 1
        try:
            await join(line.connection, other.connection, to_one=other.rest, to_other=line.rest)
        finally:
            self.joined -= 1

    async def _accept(self, line: Line, executor_id: str, token: str) -> None:
        """Take the connection that a client has opened for a worker, and pass it to the worker."""
        owner, taken = self._waiting.get(token, ("", None))
        if owner == executor_id and taken is not None and not taken.done():
            await line.say("ok")
            if not taken.done():
                # ``_dialed``, which waits for the connection, closes it.
                other = Line(socket.socket(fileno=line.connection.detach()))
                other.connection.setblocking(False)
                other.rest = line.rest
                taken.set_result(other)
                return
        raise _Refusal("this worker has hung up")

    @contextlib.asynccontextmanager
    async def _member(self) -> AsyncIterator[None]:
        self._members += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        try:
            yield
        finally:
            self._members -= 1
            self._left()

    def _left(self) -> None:
        if not self._members and self._idle is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._idle, self._ended.set)

    def _say(self, text: str) -> None:
        if self._log:
            print(f"cloudexec relay: {text}", file=sys.stderr, flush=True)
