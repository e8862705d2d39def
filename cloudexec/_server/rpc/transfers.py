"""The methods that carry blobs: to a worker, from it, and by way of the bucket."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.message import DecodeError

from cloudexec._errors import PayloadError, PayloadTooLargeError
from cloudexec._objects.store import Blob
from cloudexec._objects.transfer import Incoming, stream_view
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._server.rpc.calls import LARGEST_BLOB, abort, session_of
from cloudexec._server.rpc.session import WorkerSession
from cloudexec._server.service import Service
from cloudexec._wire.channel import (
    BLOB_KEY,
    CHUNK_BYTES,
    DELIVERY_TRIES,
    GO_ON_KEY,
    LEASE_KEY,
    SIZE_KEY,
)

__all__ = ["Transfers"]

_STALLED = 60.0
"""Seconds in which something worth mentioning must come of a blob that a worker sends."""
_PROGRESS = 64 * 1024
"""Bytes that are worth mentioning."""


class Transfers:
    """Transfers between one executor and its workers.

    Args:
        service: Whose.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def fetch(self, request: pb.FetchRequest | None, context: Any) -> AsyncIterator[Any]:
        """Stream a blob to a worker that was told of it, or the user's modules."""
        session = session_of(self._service, context)
        if session is None or request is None:
            await abort(context, "UNAUTHENTICATED", "unknown session")
            return
        service = self._service
        if request.modules:
            archive = memoryview(service.setup.modules)
            for at in range(0, len(archive), CHUNK_BYTES):
                yield archive[at : at + CHUNK_BYTES]
            return
        blob = session.told.blob(request.blob)
        if blob is None or request.offset > blob.size:
            await abort(context, "NOT_FOUND", "no such blob")
            return
        if blob.origin is not None:  # it is in the bucket, and the worker cannot read that
            try:
                await service.keeper.pull(blob)
            except (FileNotFoundError, PayloadError) as exc:
                await abort(context, "NOT_FOUND", f"it is lost: {exc}"[:1000])
                return
        sending = stream_view(blob, request.offset, session.link, service.count_sent)
        async with session.outgoing, contextlib.aclosing(sending) as chunks:
            async for chunk in chunks:
                yield chunk

    async def deliver(self, requests: AsyncIterator[Any], context: Any) -> pb.DeliverReply:
        """Take a part of a result."""
        session, service = session_of(self._service, context), self._service
        metadata = dict(context.invocation_metadata() or ())
        number, size, lease = (
            _natural(metadata.get(key)) for key in (BLOB_KEY, SIZE_KEY, LEASE_KEY)
        )
        if session is None or not session.results.owns(number) or not 0 <= size <= LARGEST_BLOB:
            service.refused("foreign part", f"{context.peer()} sent a part of no result of its own")
            await abort(context, "UNAUTHENTICATED", "nobody waits for this")
            return pb.DeliverReply()
        pulled = service.keeper.waits_for(number, size, session)
        if not (pulled or service.expects(session.token, lease)):
            return pb.DeliverReply(accepted=False)
        refusal, cut = "OK", False
        try:
            async with session.incoming:
                blob = await self._receive(session, requests, size, context)
        except (PayloadTooLargeError, OSError) as exc:
            refusal, why = "RESOURCE_EXHAUSTED", str(exc)
            service.keeper.failed(number, exc.with_traceback(None))
        except (PayloadError, DecodeError) as exc:
            refusal, why = "DATA_LOSS", str(exc)
            if pulled:
                session.damaged[number] = session.damaged.get(number, 0) + 1
                if session.damaged[number] >= DELIVERY_TRIES:
                    service.keeper.failed(number, exc.with_traceback(None))
        except EOFError as exc:
            refusal, why, cut = "DATA_LOSS", str(exc), True
        if refusal != "OK":
            if refusal == "DATA_LOSS" and not cut:
                service.transfer_failed(session, why)
            # Outside of the handlers above: nothing refers to what has come any more.
            await abort(context, refusal, why[:1000])
        service.bytes_received += blob.size
        if pulled:
            service.keeper.arrived(number, blob, session.told.blob(number))
        elif service.expects(session.token, lease):
            session.results.part_arrived(lease, number, blob)
        return pb.DeliverReply(accepted=True)

    async def _receive(
        self, session: WorkerSession, requests: AsyncIterator[Any], size: int, context: Any
    ) -> Blob:
        """Take in the content of a blob.

        Raises:
            PayloadTooLargeError: If there is no room for it.
            OSError: If it cannot be written.
            PayloadError: If it is not what was announced.
            DecodeError: If it is not even a message.
            EOFError: If it ended early, or does not go on.
        """
        loop, at = self._service.portal.loop, 0
        # In a thread: where it goes to disk, that may take its time.
        blob = await asyncio.to_thread(self._service.store.new, size)
        incoming = Incoming(blob)
        await context.send_initial_metadata(((GO_ON_KEY, "1"),))
        try:
            async with asyncio.timeout(_STALLED) as limit:
                async for chunk in requests:
                    await incoming.take(chunk)
                    if incoming.at - at >= _PROGRESS or incoming.complete:
                        at, session.progress_at = incoming.at, loop.time()
                        limit.reschedule(session.progress_at + _STALLED)
        except TimeoutError as exc:
            raise EOFError(f"only {incoming.at} of {size} bytes arrived, and no more come") from exc
        finally:
            await incoming.settle()
        if not incoming.complete:
            raise EOFError(f"only {incoming.at} of {size} bytes arrived, and not their digest")
        return blob

    async def locate(self, request: pb.LocateRequest | None, context: Any) -> pb.Location:
        """Say where in the bucket a blob is."""
        session, transfers = session_of(self._service, context), self._service.transfers
        if session is None or transfers is None or request is None:
            await abort(context, "UNAUTHENTICATED", "unknown session")
            return pb.Location()
        return await transfers.locate(session, request)

    async def store(self, request: pb.StoreRequest | None, context: Any) -> pb.StoreReply:
        """Let a worker put a blob into the bucket."""
        session, transfers = session_of(self._service, context), self._service.transfers
        if (
            session is None
            or transfers is None
            or request is None
            or not session.results.owns(request.blob)
        ):
            await abort(context, "UNAUTHENTICATED", "nobody waits for this")
            return pb.StoreReply()
        if request.size > LARGEST_BLOB:
            await abort(context, "INVALID_ARGUMENT", "no size of a blob")
        try:
            return await transfers.take(session, request)
        except ValueError as exc:
            await abort(context, "INVALID_ARGUMENT", str(exc)[:1000])
            return pb.StoreReply()


def _natural(text: object) -> int:
    """Read a number that a peer wrote; what is none is -1."""
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 20:
        return int(text)
    return -1
