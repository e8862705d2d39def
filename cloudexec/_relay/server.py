"""The relay: joins the connections of workers with those of their clients.

It knows executors by their ids, and who has proved to belong to one. It holds no task and no key
but its own, and reads nothing of what it passes on.
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
"""Connections that have not proved anything yet, at most: one more ends the oldest of them."""
PROOF_TIMEOUT = 10.0
"""Seconds in which a connection must have proved that it belongs to an executor."""
TICKET_LIFETIME = 60.0
"""Seconds in which a worker must use its ticket."""
TICKETS = 20_000
WAIT_FOR_CLIENT = 30.0
"""Seconds for which a worker waits for its client to register and take its connection."""
SILENCE = 30.0
"""Seconds without one after which a client counts as gone."""
_CONNECT = re.compile(r"CONNECT ([\w-]{1,64})\.\S+ HTTP/1\.[01]")
_LOGIN = re.compile(r"\r\nproxy-authorization: *basic +([\w+/=]+)", re.IGNORECASE)


class _Refusal(Exception):
    """A peer is not let in; the message is for it."""


class _Client:
    """A client that is registered.

    Attributes:
        task: Serves its connection, for as long as it is registered.
        news: What it is told next: nobody waits for a client that does not read.
    """

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self.task = task
        self.news: asyncio.Queue[str] = asyncio.Queue()

    async def tell(self, line: Line) -> None:
        """Tell it the news, over its connection."""
        with contextlib.suppress(OSError):  # who reads notices it, too
            while True:
                await line.say(await self.news.get())


class Relay:
    """Joins workers with clients.

    Args:
        key: What clients and workers prove to know.
        idle: Seconds without any of them after which the relay ends; ``None``: it goes on.
        log: Whether to say on stderr who comes and goes.
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
        """Connections of workers that are joined with their client's now."""

    async def serve(self, listening: socket.socket) -> None:
        """Take connections until all have left for long enough.

        Args:
            listening: A socket that listens; it is closed in the end.
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
                continue  # who dialed has hung up already
            except OSError as exc:  # no descriptors are left
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
            await asyncio.sleep(0)  # taking does not wait while others dial: let them be heard

    def _forget(self, connection: socket.socket, task: asyncio.Task[None]) -> None:
        connection.close()  # of one that was sent away before it was attended to
        self._tasks.discard(task)
        self._strangers.pop(task, None)
        if not task.cancelled() and (failed := task.exception()) is not None:
            self._say(f"internal error: {failed!r}")

    async def _attend(self, connection: socket.socket) -> None:
        """Find out what a connection is for, and serve it."""
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
            # From here on it is one of ours.
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
        """Check the ticket of a worker that dials as through an HTTP proxy."""
        # Without any header it ends here.
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
        """Keep a client registered for as long as it shows signs of life."""
        client = _Client()
        before = self._clients.get(executor_id)
        self._clients[executor_id] = client
        if before is not None:
            before.task.cancel()  # it has left the network from which it came
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
            # Before its connection is closed: the next one may have the same number.
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            if self._clients.get(executor_id) is client:
                del self._clients[executor_id]
                self._say(f"executor {executor_id} has left")

    async def _dialed(self, line: Line, executor_id: str) -> None:
        """Join a worker with its client, which is told of it, now or when it registers."""
        token = handshake.make_token()
        loop = asyncio.get_running_loop()
        taken: asyncio.Future[Line] = loop.create_future()
        self._waiting[token] = executor_id, taken

        def heard() -> None:
            # It says nothing before it is joined, unless it hangs up.
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
        """Take the connection that a client has opened for a worker."""
        owner, taken = self._waiting.get(token, ("", None))
        if owner == executor_id and taken is not None and not taken.done():
            await line.say("ok")
            if not taken.done():
                # The task that waits for it closes it.
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
