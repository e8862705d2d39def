"""The methods that carry blobs: ``Fetch`` to a worker, ``Deliver`` from it.

``Locate`` and ``Store`` let a worker exchange blobs through the bucket.
"""

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
"""Seconds within which ``_PROGRESS`` bytes of a blob that a worker sends must arrive."""
_PROGRESS = 64 * 1024
"""Bytes that count as progress."""


class Transfers:
    """Transfers between one executor and its workers.

    Args:
        service: The executor, as its workers' calls see it.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    async def fetch(self, request: pb.FetchRequest | None, context: Any) -> AsyncIterator[Any]:
        """Send a worker a blob that it knows, or the archive of the user's modules."""
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
        if blob.origin is not None:  # the blob is in the bucket, which the worker cannot read
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
        """Receive a blob: a part of a result, or a kept blob that was asked for."""
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
            # Outside of the handlers above, so that no exception keeps the received bytes alive.
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
        """Receive the content of a blob.

        Raises:
            PayloadTooLargeError: If the store has no room for it.
            OSError: If it cannot be written.
            PayloadError: If it arrives damaged, or with another size than announced.
            DecodeError: If bytes arrive that are no message.
            EOFError: If it ends early, or makes no progress.
        """
        loop, at = self._service.portal.loop, 0
        # In a thread, because reserving room on disk may take time.
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
        """Return the signed URL of a blob in the bucket."""
        session, transfers = session_of(self._service, context), self._service.transfers
        if session is None or transfers is None or request is None:
            await abort(context, "UNAUTHENTICATED", "unknown session")
            return pb.Location()
        return await transfers.locate(session, request)

    async def store(self, request: pb.StoreRequest | None, context: Any) -> pb.StoreReply:
        """Serve one step of a worker's upload to the bucket."""
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
    """Read a number that a peer sent; -1 if it is none."""
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 20:
        return int(text)
    return -1
