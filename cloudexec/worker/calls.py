"""The calls that a worker makes to its client, over the present connection."""

from __future__ import annotations

import asyncio
import weakref
from typing import TYPE_CHECKING, Any

from cloudexec._objects.link import Link
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._wire.channel import TOKEN_KEY, pack_chunk, unpack_chunk

if TYPE_CHECKING:
    from cloudexec.worker.bucket import BucketPath

__all__ = ["CUT", "Calls"]

CUT = ("UNAVAILABLE", "CANCELLED")
"""Status codes of a call whose connection was cut."""
_CUT_PAUSE = 0.2
"""Seconds after such a status within which the session's own call ends, too."""


class Calls:
    """The methods of the client's server, over the present connection.

    Attributes:
        token: The session's token; it changes when another client takes the worker over.
        connected: Set while there is a connection.
        link: Measures the connection's speed.
        bucket: Carries large blobs instead of the connection; ``None`` without a bucket.
    """

    def __init__(self) -> None:
        self.token = b""
        self.connected = asyncio.Event()
        self.link = Link(enabled=False)
        self.bucket: BucketPath | None = None
        self._is_resumable = False
        self._channel: Any = None
        self._running: weakref.WeakSet[Any] = weakref.WeakSet()  # calls of transfers

    async def bind(self, channel: Any) -> None:
        """Make calls over a new channel from now on, and close the old one."""
        before, self._channel = self._channel, None
        if before is not None and before is not channel:
            await before.close()
        self._channel = channel
        self.session = channel.stream_stream(
            "/cloudexec.v1.TaskServer/Session",
            request_serializer=pb.WorkerMessage.SerializeToString,
            response_deserializer=pb.ServerMessage.FromString,
        )
        self._fetch = self._ended_with_connection(
            channel.unary_stream(
                "/cloudexec.v1.TaskServer/Fetch",
                request_serializer=pb.FetchRequest.SerializeToString,
                response_deserializer=unpack_chunk,
            )
        )
        self.deliver = self._ended_with_connection(
            channel.stream_unary(
                "/cloudexec.v1.TaskServer/Deliver",
                request_serializer=pack_chunk,
                response_deserializer=pb.DeliverReply.FromString,
            )
        )
        self._locate = self._ended_with_connection(
            channel.unary_unary(
                "/cloudexec.v1.TaskServer/Locate",
                request_serializer=pb.LocateRequest.SerializeToString,
                response_deserializer=pb.Location.FromString,
            )
        )
        self._store = self._ended_with_connection(
            channel.unary_unary(
                "/cloudexec.v1.TaskServer/Store",
                request_serializer=pb.StoreRequest.SerializeToString,
                response_deserializer=pb.StoreReply.FromString,
            )
        )

    def _ended_with_connection(self, method: Any) -> Any:
        """Return a method whose calls end as soon as the connection is lost, and not later."""

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                begun = method(*args, **kwargs)
            except Exception as exc:
                if type(exc).__name__ != "UsageError":  # gRPC raises it if the channel is closed
                    raise
                raise asyncio.InvalidStateError("the connection is closed") from exc
            self._running.add(begun)
            return begun

        return call

    def take_welcome(self, welcome: pb.Welcome) -> None:
        """Take from the client's first message what calls need: the token and the settings."""
        self.token = welcome.session_token
        self._is_resumable = welcome.resumable
        self.link = Link(enabled=welcome.compress)
        self.bucket = None
        if welcome.bucket_threshold:
            from cloudexec.worker.bucket import BucketPath

            metadata = ((TOKEN_KEY, self.token),)
            self.bucket = BucketPath(
                lambda request: self._locate(request, metadata=metadata),
                lambda request: self._store(request, metadata=metadata),
                welcome.bucket_threshold,
                welcome.bucket_part_bytes,
            )

    def fetch(self, request: pb.FetchRequest) -> Any:
        """Begin a ``Fetch`` call."""
        return self._fetch(request, metadata=((TOKEN_KEY, self.token),))

    def note_cut(self) -> None:
        """End all calls, because the connection was lost."""
        self.connected.clear()
        # Calls that wait for this channel to connect would wait forever once it is closed.
        for call in list(self._running):
            call.cancel()

    async def is_cut(self, code: str) -> bool:
        """Say whether a call failed because its connection was cut; wait for the next one then."""
        if not (self._is_resumable and code in CUT):
            return False
        await asyncio.sleep(_CUT_PAUSE)
        await self.connected.wait()
        return True

    async def close(self) -> None:
        """Close the connection."""
        if self._channel is not None:
            await self._channel.close()
