"""Passes bytes on between two connections, with few copies and without threads."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

__all__ = ["dial", "join", "prepare"]

_BUFFER = memoryview(bytearray(1024 * 1024))
"""The buffer for reading, which all connections share. Bytes that cannot be sent at once are copied
out of it."""


def prepare(connection: socket.socket) -> None:
    """Make a connection non-blocking and without delay, and let it end if its peer is gone."""
    connection.setblocking(False)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3)):
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


async def dial(host: str, port: int) -> socket.socket:
    """Open a connection that does not block.

    Raises:
        OSError: If no address of the host can be connected to.
    """
    loop = asyncio.get_running_loop()
    failed: OSError | None = None
    for family, kind, number, _, address in await loop.getaddrinfo(
        host, port, type=socket.SOCK_STREAM
    ):
        connection = socket.socket(family, kind, number)
        connection.setblocking(False)
        try:
            await loop.sock_connect(connection, address)
        except OSError as exc:
            failed = exc
            connection.close()
        except BaseException:
            connection.close()
            raise
        else:
            return connection
    raise failed or OSError(f"{host} has no address")


class _Way:
    """One direction of a joined pair: it sends the bytes of one connection to the other."""

    def __init__(
        self, source: socket.socket, target: socket.socket, ended: Callable[[bool], None]
    ) -> None:
        self._source, self._target, self._ended = source, target, ended
        self._loop = asyncio.get_running_loop()
        self._waiting = memoryview(b"")
        self._at_end = False
        self._loop.add_reader(source, self._read)

    def push(self, data: bytes) -> None:
        """Send bytes that were read before the connections were joined."""
        self._send(memoryview(data))

    def _read(self) -> None:
        try:
            count = self._source.recv_into(_BUFFER)
        except BlockingIOError:
            return
        except OSError:
            self._ended(True)
            return
        if count:
            self._send(_BUFFER[:count])
            return
        self._loop.remove_reader(self._source)
        self._at_end = True
        self._finish()

    def _send(self, data: memoryview) -> None:
        try:
            sent = self._target.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._ended(True)
            return
        if sent < len(data):
            self._waiting = memoryview(bytes(data[sent:]))
            self._loop.remove_reader(self._source)
            self._loop.add_writer(self._target, self._write)

    def _write(self) -> None:
        try:
            sent = self._target.send(self._waiting)
        except BlockingIOError:
            return
        except OSError:
            self._ended(True)
            return
        self._waiting = self._waiting[sent:]
        if not self._waiting:
            self._loop.remove_writer(self._target)
            if self._at_end:
                self._finish()
            else:
                self._loop.add_reader(self._source, self._read)

    def _finish(self) -> None:
        if self._waiting:
            return
        try:
            self._target.shutdown(socket.SHUT_WR)
        except OSError:
            self._ended(True)
        else:
            self._ended(False)


async def join(
    one: socket.socket, other: socket.socket, *, to_one: bytes = b"", to_other: bytes = b""
) -> None:
    """Pass bytes on between two connections, until both have ended or one has failed.

    Args:
        one: A connection that was given to ``prepare``; it is closed in the end.
        other: The other connection, for which the same holds.
        to_one: Bytes that were read from ``other`` already.
        to_other: Bytes that were read from ``one`` already.
    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    open_ways = 2

    def ended(failed: bool) -> None:
        nonlocal open_ways
        open_ways -= 1
        if (failed or not open_ways) and not done.done():
            done.set_result(None)

    try:
        there, back = _Way(one, other, ended), _Way(other, one, ended)
        if to_other:
            there.push(to_other)
        if to_one:
            back.push(to_one)
        await done
    finally:
        for each in (one, other):
            loop.remove_reader(each)
            loop.remove_writer(each)
            each.close()
