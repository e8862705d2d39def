"""The worker's way through the client's bucket: blobs of the client's down, its own up."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import grpc
import grpc.aio

from cloudexec._objects.store import Blob
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._transfer import SignedRequest
from cloudexec.worker import s3

__all__ = ["BucketPath"]

_PATIENCE = 20.0
"""Seconds without a byte from S3 after which the client is asked instead."""
_TIMEOUT = 15.0
_REST = 300.0
"""Seconds for which S3 is not tried again once it could not be reached."""
_UPLOADS = 2
"""Blobs on their way up at a time."""


class _GoneError(s3.S3TransferError):
    """The client does not want us to go on with the bucket."""


class BucketPath:
    """What goes between one worker and the bucket, by requests that the client signs.

    Args:
        locate: The RPC of that name.
        store: The RPC of that name.
        threshold: Bytes from which results go up; 0: none do.
        part_bytes: How the client cuts objects.
    """

    def __init__(
        self,
        locate: Callable[[pb.LocateRequest], Awaitable[pb.Location]],
        store: Callable[[pb.StoreRequest], Awaitable[pb.StoreReply]],
        threshold: int,
        part_bytes: int,
    ) -> None:
        self._locate = locate
        self._store = store
        self._threshold = threshold
        self._part_bytes = part_bytes
        self._down_until = float("-inf")
        self._gate = asyncio.Semaphore(_UPLOADS)

    def takes(self, size: int) -> bool:
        """Say whether a part of a result of this size may go through the bucket now."""
        large = 0 < self._threshold <= size
        return large and time.monotonic() >= self._down_until

    async def load(self, number: int, blob: Blob) -> bool:
        """Download a blob into its file.

        Returns:
            Whether it is there; otherwise it is to be fetched from the client.

        Raises:
            OSError: If there is no room for it.
        """
        if time.monotonic() < self._down_until:
            return False
        try:
            return await self._load(number, blob)
        except grpc.aio.AioRpcError:
            return False  # whoever fetches it finds out whether the client is gone

    async def _load(self, number: int, blob: Blob) -> bool:
        first: pb.Location | None = await self._locate(pb.LocateRequest(blob=number))
        assert first is not None
        assert blob.segment is not None
        if not first.HasField("request"):
            return False
        sha256 = first.sha256

        async def ask(refused: bool) -> SignedRequest:
            nonlocal first
            found, first = first, None
            if found is None:
                found = await self._locate(pb.LocateRequest(blob=number, refused=refused))
            if not found.HasField("request"):
                raise _GoneError("the client cannot say any more where it is in the bucket")
            return _unsigned(found.request)

        download = s3.Download(
            blob.segment.fd,
            blob.size,
            sha256,
            offset=blob.offset,
            timeout=_TIMEOUT,
            patience=_PATIENCE,
        )
        try:
            await s3.fetch(download, ask)
        except s3.S3TransferError as exc:
            self._note(exc)
            await self._locate(pb.LocateRequest(blob=number, failed=str(exc)))
            return False
        blob.sha256 = sha256
        return True

    async def store(self, number: int, fd: int, offset: int, size: int, lease: int = 0) -> bool:
        """Upload a part of a result.

        Args:
            number: Its number.
            fd: The file that it is in.
            offset: Where it begins.
            size: Bytes.
            lease: Of the task whose result it is; 0: it is kept here all the same.

        Returns:
            Whether it is in the bucket or, unless it is kept, has reached the client.

        Raises:
            OSError: If the file cannot be read.
            grpc.aio.AioRpcError: If the connection to the client fails.
        """
        if not self.takes(size):
            return False
        async with self._gate:
            kept = not lease
            question = pb.StoreRequest(blob=number, size=size, kept=kept, lease=lease)
            asked = await self._store(question)
            if not asked.accepted:
                return False
            found = await asyncio.to_thread(
                s3.digests, fd, size, offset=offset, part_bytes=self._part_bytes
            )
            request = pb.StoreRequest(
                blob=number,
                size=size,
                kept=kept,
                lease=lease,
                sha256=found.sha256,
                part_sha256=found.parts,
            )

            async def ask(missing: Sequence[int], refused: bool) -> Mapping[int, SignedRequest]:
                del request.parts[:]
                request.parts.extend(missing)
                request.refused = refused
                reply = await self._store(request)
                if not reply.accepted:
                    raise _GoneError("the client cannot begin it")
                request.upload_id = reply.upload_id
                return {each.part: _unsigned(each) for each in reply.requests}

            upload = s3.Upload(
                fd,
                size,
                offset=offset,
                part_bytes=self._part_bytes,
                timeout=_TIMEOUT,
                patience=_PATIENCE,
            )
            try:
                request.etags.extend(await s3.store(upload, ask))
            except _GoneError:
                return False  # the client knows, and has said, why
            except s3.S3TransferError as exc:
                self._note(exc)
                request.failed = str(exc)
            reply = await self._store(request)
        return reply.accepted

    def _note(self, error: s3.S3TransferError) -> None:
        if not isinstance(error, s3.S3DigestError | _GoneError):
            self._down_until = time.monotonic() + _REST


def _unsigned(request: pb.Signed) -> SignedRequest:
    headers = tuple(zip(request.header_names, request.header_values, strict=True))
    return SignedRequest(request.url, headers, request.expires_at)
