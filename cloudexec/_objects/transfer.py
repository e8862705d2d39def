"""Sends blobs between client and worker in chunks, and verifies them by a checksum (CRC-32).

A transfer that is cut off goes on at the byte where it ended, and one whose content arrived damaged
begins anew.
"""

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
"""Attempts at a transfer that fails while its session lives. Cut connections do not count."""
_DAMAGED_TRIES = 3
"""Attempts at a transfer whose content arrives damaged."""


class Incoming:
    """A blob that is being received.

    Args:
        blob: A new blob with room for the content.
    """

    def __init__(self, blob: Blob) -> None:
        self.at = 0
        """Bytes that have been received."""
        self.complete = False
        self._blob = blob
        self._crc32 = 0
        self._writing: asyncio.Future[None] | None = None

    async def take(self, chunk: memoryview | Chunk) -> None:
        """Take one chunk; the last one holds the checksum.

        Raises:
            PayloadError: If more bytes arrive than were announced, or other bytes than were sent.
            OSError: If they cannot be written.
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
        # In a thread, so that the loop meanwhile receives the next chunk and control messages.
        writing = asyncio.to_thread(self._write, data, self.at)
        self._writing = asyncio.ensure_future(writing)
        self.at += len(data)

    def _write(self, data: bytes | memoryview, at: int) -> None:
        self._blob.write(data, at)
        self._crc32 = zlib.crc32(data, self._crc32)

    async def settle(self) -> None:
        """Wait until all received bytes are written; the errors are those of ``take``."""
        writing, self._writing = self._writing, None
        if writing is not None:
            try:
                await writing
            finally:
                del writing  # breaks a circle: the exception's traceback refers to this frame

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
    # A damaged or hostile chunk could inflate to any size: take no more than a chunk may hold.
    try:
        inflated = inflater.decompress(data, CHUNK_BYTES)
    except zlib.error as exc:
        raise PayloadError(f"a compressed chunk is damaged: {exc}") from None
    if inflater.unconsumed_tail:
        raise PayloadError("a compressed chunk holds more than a chunk may")
    return inflated


def failures() -> tuple[type[BaseException], ...]:
    """Return the exceptions of a call that fails, also because this process closes its channel.

    A channel that is closed because another call on it failed cancels its calls.
    """
    return call_errors(asyncio.CancelledError, asyncio.InvalidStateError)


def code_of(error: BaseException) -> str:
    """Return the name of the gRPC status code of a call that raised ``error``.

    Raises:
        asyncio.CancelledError: If the task that waits for the call was cancelled, not the call.
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
    """Fetch a blob; go on if the transfer was cut off, and begin anew if it arrived damaged.

    Args:
        blob: A new blob with room for the content.
        chunks: Returns the chunks from an offset on; the last one holds the checksum of the whole.
        is_cut: Says, given a status code, whether the connection was cut; waits for the next one.

    Raises:
        PayloadError: If it arrived damaged each time.
        OSError: If it cannot be written.
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
            incoming = Incoming(blob)  # begin anew, as the checksum does not say which part differs
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
    """Send part of a file in chunks, followed by its checksum.

    Args:
        fd: The file.
        offset: The offset of the part.
        size: Bytes of the part.
        write: Sends one chunk.
        link: The link that the chunks are sent over.

    Raises:
        OSError: If the file cannot be read.
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
    """Yield the chunks of a blob from an offset on, and then the checksum of the whole blob.

    The caller must send each chunk before it asks for the next one, because the link's speed is
    measured in between.

    Args:
        blob: The blob.
        offset: Bytes that the other side has already.
        link: The link that the chunks are sent over.
        sent: Called with the bytes of content of each chunk.
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
    """Yield chunks, each after its number of bytes of content, and then the checksum.

    The next chunk is read and compressed in a thread while the caller sends one.
    """
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
    while at < offset and known is None:  # the checksum covers what the other side has already
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
        if following is not None:  # the caller stopped early; drop the chunk and any error
            await asyncio.gather(following, return_exceptions=True)
    if known is None:
        known = crc32
        if blob is not None:
            blob.crc32 = known
    yield 0, Chunk(crc32=known)
