"""Remote calls over a Unix socket, between a client and the workers that it started on its machine.

Workers on other machines use gRPC. This module saves the time to import gRPC, its threads, and a
third of a round trip. Each call has its own connection, on which both sides send frames. A frame
has a kind, a length, and as many bytes as the length says. The caller's first frame has the method
and the metadata, and the other side's last frame has the status.
"""

from __future__ import annotations

import asyncio
import struct
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from cloudexec import _plain_json
from cloudexec._rpc import END, CallError
from cloudexec._wire.channel import MAX_MESSAGE_BYTES

__all__ = ["CALL", "METADATA", "STATUS", "Channel", "Frames"]

CALL, MESSAGE, DONE, METADATA, STATUS = range(5)
"""Kinds of frames: a call, a message, the end of the caller's messages, metadata of the answer, and
the status that ends the call."""
_HEADER = struct.Struct("<BI")
_MOST_UNREAD = 4 * 1024 * 1024
"""Bytes of unread messages from which on the other side has to wait."""
_LOST = "the connection was lost"

Metadata = Sequence[tuple[str, Any]]


class Frames(asyncio.Protocol):
    """One connection, which sends and receives frames.

    Args:
        on_made: Called when the connection has been made.
    """

    def __init__(self, on_made: Callable[[Frames], None] | None = None) -> None:
        self.transport: Any = None
        self.is_lost = False
        self.at_once: Callable[[bytes], bool] | None = None
        """Called with each message when it arrives. It handles the message and returns True, or
        returns False to leave it to ``receive()``. This saves a round of the event loop, as no task
        has to be woken."""
        self._failure: Exception | None = None  # what ``at_once`` raised
        self._on_made = on_made
        self._input = bytearray()
        self._frames: deque[tuple[int, bytes]] = deque()
        self._unread = 0
        self._is_paused = False
        self._reader: asyncio.Future[None] | None = None
        self._room: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        if self._on_made is not None:
            self._on_made(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_lost = True
        self._wake_reader()
        self.resume_writing()

    def pause_writing(self) -> None:
        if self._room is None:
            self._room = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        room, self._room = self._room, None
        if room is not None and not room.done():
            room.set_result(None)

    def data_received(self, data: bytes) -> None:
        buffer = self._input
        buffer += data
        at, end = 0, len(buffer)
        while end - at >= _HEADER.size:
            kind, length = _HEADER.unpack_from(buffer, at)
            if length > MAX_MESSAGE_BYTES or kind > STATUS:
                self.transport.abort()
                return
            start = at + _HEADER.size
            if end - start < length:
                break
            at = start + length
            frame = bytes(memoryview(buffer)[start:at])
            if kind != MESSAGE or self._frames or not self._is_taken(frame):
                self._frames.append((kind, frame))
                self._unread += length
        if at:
            del buffer[:at]
        if self._frames:
            self._wake_reader()
        if self._unread > _MOST_UNREAD and not self._is_paused:
            self._is_paused = True
            self.transport.pause_reading()

    def _is_taken(self, message: bytes) -> bool:
        try:
            return self.at_once is not None and self.at_once(message)
        except Exception as exc:
            # The message may be half handled, so ``receive()`` must not return it.
            self.at_once, self._failure = None, exc
            self._wake_reader()
            return True

    def _wake_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)

    async def receive(self) -> tuple[int, bytes]:
        """Return the next frame.

        Raises:
            ConnectionError: If the connection is lost and no frame is left.
            Exception: The exception that ``at_once`` has raised.
        """
        while not self._frames or self._failure is not None:
            if self._failure is not None:
                raise self._failure
            if self.is_lost:
                raise ConnectionError(_LOST)
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        kind, data = self._frames.popleft()
        self._unread -= len(data)
        if self._is_paused and self._unread <= _MOST_UNREAD // 2:
            self._is_paused = False
            if not self.is_lost:
                self.transport.resume_reading()
        return kind, data

    def send_now(self, message: bytes) -> None:
        """Send a message; allowed only if ``is_writable``."""
        self.transport.write(_HEADER.pack(MESSAGE, len(message)) + message)

    @property
    def is_writable(self) -> bool:
        """Whether the other side reads fast enough that a message can be sent now."""
        return self._room is None and not self.is_lost

    async def send(self, kind: int, data: bytes = b"") -> None:
        """Send a frame, and wait while the other side has too many unread bytes.

        Raises:
            ConnectionError: If the connection is lost.
        """
        if self.is_lost:
            raise ConnectionError(_LOST)
        self.transport.write(_HEADER.pack(kind, len(data)) + data)
        if self._room is not None:
            await asyncio.shield(self._room)

    def close(self) -> None:
        """Close the connection after all frames have been written to the socket."""
        if self.transport is not None:
            self.transport.close()

    def abort(self) -> None:
        """Close the connection at once, and drop unsent frames."""
        if self.transport is not None:
            self.transport.abort()


def pack_metadata(metadata: Metadata) -> bytes:
    """Encode metadata, whose values are strings, or bytes under names that end in ``-bin``."""
    return _plain_json.encode({k: v.hex() if isinstance(v, bytes) else v for k, v in metadata})


def unpack_metadata(data: bytes | str) -> dict[str, Any]:
    """Decode metadata.

    Raises:
        ValueError: If the data is no valid metadata.
    """
    found = _plain_json.decode(data)
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise ValueError("no metadata")
    return {k: bytes.fromhex(v) if k.endswith("-bin") else v for k, v in found.items()}


class Channel:
    """Begins calls; it takes the place of ``grpc.aio.Channel``.

    Args:
        path: Path of the socket.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._calls: set[_Call] = set()
        self._is_closed = False

    def stream_stream(
        self, method: str, request_serializer: Any, response_deserializer: Any
    ) -> Any:
        """Return a function that begins calls of a method with messages in both directions."""

        def call(metadata: Metadata = ()) -> _Call:
            return self._begin(method, metadata, request_serializer, response_deserializer)

        return call

    stream_unary = stream_stream

    def unary_stream(self, method: str, request_serializer: Any, response_deserializer: Any) -> Any:
        """Return a function that begins calls of a method that takes one message."""

        def call(request: Any, metadata: Metadata = ()) -> _Call:
            begun = self._begin(method, metadata, request_serializer, response_deserializer)
            begun.request = request
            return begun

        return call

    unary_unary = unary_stream

    def _begin(self, method: str, metadata: Metadata, pack: Any, unpack: Any) -> _Call:
        if self._is_closed:
            raise asyncio.InvalidStateError("the connection is closed")
        call = _Call(self._path, method, metadata, pack, unpack)
        self._calls.add(call)
        call.opening.add_done_callback(lambda _: None)
        call.on_end = self._calls.discard
        return call

    def abort(self) -> None:
        """End all calls at once, without waiting."""
        self._is_closed = True
        for call in list(self._calls):
            call.cancel()

    async def close(self) -> None:
        """End all calls."""
        self.abort()


class _Call:
    """One call, on the side that began it."""

    def __init__(self, path: str, method: str, metadata: Metadata, pack: Any, unpack: Any) -> None:
        self.request: Any = END
        self.on_end: Callable[[_Call], None] | None = None
        self._pack = pack
        self._unpack = unpack
        self._first = _plain_json.encode([method, pack_metadata(metadata).decode()])
        self._frames: Frames | None = None
        self._answered: Mapping[str, Any] = {}
        self._status: tuple[str, str] | None = None
        self._last: Any = END
        self.opening = asyncio.ensure_future(self._open(path))

    async def _open(self, path: str) -> Frames:
        loop = asyncio.get_running_loop()
        try:
            _, frames = await loop.create_unix_connection(Frames, path)
        except OSError as exc:
            self._end("UNAVAILABLE", str(exc))
            raise CallError("UNAVAILABLE", str(exc)) from exc
        self._frames = frames
        await frames.send(CALL, self._first)
        if self.request is not END:
            await frames.send(MESSAGE, self._pack(self.request))
            await frames.send(DONE)
        return frames

    async def _opened(self) -> Frames:
        frames = self._frames
        return await asyncio.shield(self.opening) if frames is None else frames

    def _end(self, status: str, why: str) -> None:
        if self._status is None:
            self._status = status, why
        if self._frames is not None:
            self._frames.close()
        if self.on_end is not None:
            self.on_end(self)

    @property
    def frames(self) -> Frames | None:
        """The connection, or ``None`` if it has not been made yet."""
        return self._frames

    async def write(self, message: Any) -> None:
        """Send a message.

        Raises:
            CallError: If the call has ended.
        """
        frames = await self._opened()
        if self._status is not None:
            raise CallError(*self._status)
        try:
            await frames.send(MESSAGE, self._pack(message))
        except ConnectionError as exc:
            raise CallError("UNAVAILABLE", str(exc)) from exc

    async def done_writing(self) -> None:
        """Tell the other side that no more messages come."""
        frames = await self._opened()
        try:
            await frames.send(DONE)
        except ConnectionError as exc:
            raise CallError("UNAVAILABLE", str(exc)) from exc

    async def read(self) -> Any:
        """Return the next message, or ``END``.

        Raises:
            CallError: If the call has failed.
        """
        frames = await self._opened()
        while self._status is None:
            try:
                kind, data = await frames.receive()
            except ConnectionError as exc:
                self._end("UNAVAILABLE", str(exc))
                break
            if kind == MESSAGE:
                return self._unpack(data)
            if kind == METADATA:
                self._answered = unpack_metadata(data)
                return None
            if kind == STATUS:
                status, _, why = data.decode("utf-8", "replace").partition(" ")
                self._end(status, why)
        assert self._status is not None
        if self._status[0] == "OK":
            return END
        raise CallError(*self._status)

    async def initial_metadata(self) -> list[tuple[str, Any]]:
        """Wait for the metadata that the other side sends first, and return it."""
        if not self._answered and self._last is END:
            self._last = await self.read()
        return list(self._answered.items())

    async def code(self) -> str:
        """Wait for the end of the call and return the name of its status."""
        await self._outcome()
        return self._status[0] if self._status is not None else "UNKNOWN"

    async def details(self) -> str:
        """Wait for the end of the call and return the reason of its failure, as text."""
        await self._outcome()
        return self._status[1] if self._status is not None else ""

    async def _outcome(self) -> None:
        try:
            while await self.read() is not END:
                pass
        except CallError:
            pass

    async def _answer(self) -> Any:
        """Return the only message of the answer."""
        answer = self._last
        while (message := await self.read()) is not END:
            answer = answer if message is None else message
        return answer

    def __await__(self) -> Generator[Any, None, Any]:
        return self._answer().__await__()

    def __aiter__(self) -> _Call:
        return self

    async def __anext__(self) -> Any:
        message = await self.read()
        if message is END:
            raise StopAsyncIteration
        return message

    def cancel(self) -> None:
        """End the call, which also closes its connection."""
        self.opening.cancel()
        self._end("CANCELLED", "cancelled here")
        if self._frames is not None:
            self._frames.abort()
            self._frames.connection_lost(None)
