"""Blobs between client and worker: chunks to and from files, and a checksum of the whole."""

from __future__ import annotations

import asyncio
import os
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from cloudexec._errors import PayloadError
from cloudexec._objects.link import Link
from cloudexec._objects.store import Blob
from cloudexec._proto.tasks_pb2 import Chunk
from cloudexec._rpc import call_errors, status_of
from cloudexec._wire.channel import CHUNK_BYTES

__all__ = ["Incoming", "code_of", "failures", "fetch_into", "stream_file", "stream_view"]

_TRIES = 4
"""Times that a transfer which was cut off is gone on with, while its session lives."""
_DAMAGED_TRIES = 3
"""Times that one is begun whose content arrives damaged."""


class Incoming:
    """A blob while it arrives.

    Args:
        blob: In whose file there is room for it.
    """

    def __init__(self, blob: Blob) -> None:
        self.at = 0
        """Bytes that have come."""
        self.complete = False
        self._blob = blob
        self._crc32 = 0
        self._writing: asyncio.Future[None] | None = None

    async def take(self, chunk: memoryview | Chunk) -> None:
        """Take in one chunk.

        Raises:
            PayloadError: If more, or something else, came than was announced.
            OSError: If there is no room for it.
        """
        if isinstance(chunk, Chunk):
            if chunk.HasField("crc32"):
                await self._finish(chunk.crc32)
                return
            data: bytes | memoryview = chunk.data
            if chunk.deflated:
                data = await asyncio.to_thread(_inflate, chunk.data)
        else:
            data = chunk
        blob = self._blob
        if self.at + len(data) > blob.size:
            raise PayloadError(f"more than the announced {blob.size} bytes arrived")
        await self.settle()
        # In a thread: the next chunk arrives meanwhile, and control messages pass.
        writing = asyncio.to_thread(self._write, data, self.at)
        self._writing = asyncio.ensure_future(writing)
        self.at += len(data)

    def _write(self, data: bytes | memoryview, at: int) -> None:
        self._blob.write(data, at)
        self._crc32 = zlib.crc32(data, self._crc32)

    async def settle(self) -> None:
        """Wait until what has come is written; the errors are those of ``take``."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                await writing
            finally:
                del writing  # what it raises refers to this call

    async def _finish(self, crc32: int) -> None:
        await self.settle()
        blob = self._blob
        if self.at != blob.size or self._crc32 != crc32:
            raise PayloadError(
                f"{blob.size} bytes arrived other than they were sent (their CRC-32 differs): "
                f"is the network, or the memory of a machine, faulty?"
            )
        blob.crc32 = crc32
        self.complete = True


def _inflate(data: bytes) -> bytes:
    inflater = zlib.decompressobj()
    # A chunk is small whatever it claims to hold.
    try:
        inflated = inflater.decompress(data, CHUNK_BYTES)
    except zlib.error as exc:
        raise PayloadError(f"a compressed chunk is damaged: {exc}") from None
    if inflater.unconsumed_tail:
        raise PayloadError("a compressed chunk holds more than a chunk may")
    return inflated


def failures() -> tuple[type[BaseException], ...]:
    """Return how a call fails whose connection may be closed here, too, because of another one."""
    return call_errors(asyncio.CancelledError, asyncio.InvalidStateError)


def code_of(error: BaseException) -> str:
    """Return how a call failed, of what it raised: the name of a gRPC status code.

    Raises:
        asyncio.CancelledError: If it is not the call that was cancelled but the task that waits
            for it.
    """
    if isinstance(error, call_errors()):
        return status_of(error)
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        raise error
    return "CANCELLED"


async def fetch_into(
    blob: Blob,
    chunks: Callable[[int], AsyncIterator[Any]],
    is_cut: Callable[[str], Awaitable[bool]],
) -> None:
    """Fetch a blob, going on where it was cut off, and anew where it arrived damaged.

    Args:
        blob: In whose file there is room for it.
        chunks: From an offset to the chunks from there on; the last one is the checksum of it all.
        is_cut: Says whether it was the connection that failed, once there is another one.

    Raises:
        PayloadError: If it arrived other than it was sent, each time.
        OSError: If there is no room for it.
        CallError: If it could not be fetched.
    """
    incoming = Incoming(blob)
    attempt = damaged = 0
    while True:
        try:
            async for chunk in chunks(incoming.at):
                await incoming.take(chunk)
            if not incoming.complete:
                raise PayloadError(f"only {incoming.at} of {blob.size} bytes arrived")
        except PayloadError:
            await incoming.settle()
            damaged += 1
            if damaged == _DAMAGED_TRIES:
                raise
            incoming = Incoming(blob)  # which part of it is wrong, nobody knows
            continue
        except failures() as exc:
            code = code_of(exc)
            await incoming.settle()
            if await is_cut(code):
                continue
            attempt += 1
            if attempt == _TRIES:
                raise
            await asyncio.sleep(0.1 * 2 ** (attempt - 1))
            continue
        return


async def stream_file(
    fd: int, offset: int, size: int, write: Callable[[Any], Awaitable[Any]], link: Link
) -> None:
    """Send part of a file, and its checksum behind it.

    Args:
        fd: The file.
        offset: Where the part begins.
        size: Bytes.
        write: Sends one chunk.
        link: What it is sent over.

    Raises:
        OSError: If it cannot be read.
        CallError: If the connection fails.
    """

    def read(at: int, length: int) -> bytes:
        return os.pread(fd, length, offset + at)

    async with aclosing(_chunks(read, size, 0, link)) as chunks:
        async for _, chunk in chunks:
            link.begin()
            try:
                await write(chunk)
            finally:
                link.end(chunk)


async def stream_view(
    blob: Blob, offset: int, link: Link, sent: Callable[[int], object]
) -> AsyncGenerator[Any, None]:
    """Yield the chunks of a blob from an offset on, and the checksum of it all behind them.

    Args:
        blob: Which.
        offset: What the other side has.
        link: What it is sent over: whoever iterates sends each chunk before asking for the next.
        sent: Told of bytes of content.
    """
    view = blob.view()
    work = _chunks(lambda at, length: view[at : at + length], blob.size, offset, link, blob)
    async with aclosing(work) as chunks:
        async for size, chunk in chunks:
            sent(size)
            link.begin()
            try:
                yield chunk
            finally:
                link.end(chunk)


async def _chunks(
    read: Callable[[int, int], bytes | memoryview],
    size: int,
    offset: int,
    link: Link,
    blob: Blob | None = None,
) -> AsyncGenerator[tuple[int, Any], None]:
    """Cut into chunks, each with its bytes of content, and then the checksum of it all."""
    known = None if blob is None else blob.crc32
    crc32 = 0

    def piece(at: int) -> bytes | memoryview:
        nonlocal crc32
        data = read(at, min(CHUNK_BYTES, size - at))
        if known is None:
            crc32 = zlib.crc32(data, crc32)
        return data

    def packed(at: int) -> tuple[int, Any]:
        data = piece(at)
        return len(data), link.pack(data)

    at = 0
    while at < offset and known is None:  # what the other side has belongs to it
        at += len(await asyncio.to_thread(piece, at))
    at = offset
    following = asyncio.ensure_future(asyncio.to_thread(packed, at)) if at < size else None
    try:
        while following is not None:
            length, chunk = await following
            at += length
            following = None
            if at < size and length:
                following = asyncio.ensure_future(asyncio.to_thread(packed, at))
            yield length, chunk
    finally:
        if following is not None:  # nobody wants it, nor what may be wrong with it
            await asyncio.gather(following, return_exceptions=True)
    if known is None:
        known = crc32
        if blob is not None:
            blob.crc32 = known
    yield 0, Chunk(crc32=known)
