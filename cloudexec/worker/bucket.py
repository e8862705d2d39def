"""Exchanges blobs through the client's bucket: downloads the client's, and uploads the worker's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import grpc
import grpc.aio

from cloudexec._objects.store import Blob
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._transfer import File, SignedRequest, digests

if TYPE_CHECKING:
    from cloudexec._objects.s3_transfer import S3TransferError, Sign, UrlRefusedError

__all__ = ["BucketPath"]

_PATIENCE = 20.0
"""Seconds without a byte from S3 after which the client is asked instead."""
_TIMEOUT = 15.0
_REST = 300.0
"""Seconds for which S3 is not tried again once it could not be reached."""
_OF_ONE = frozenset({"BadDigest", "NoSuchKey", "NoSuchUpload"})
"""Error codes that say nothing of other objects, which are still exchanged through the bucket."""
_UPLOADS = 2
"""Number of blobs that are uploaded at a time."""


class _GoneError(Exception):
    """The client has ended this transfer through the bucket."""


class BucketPath:
    """One worker's transfers through the bucket, by requests that the client signs.

    Args:
        locate: Calls the client's method ``Locate``.
        store: Calls the client's method ``Store``.
        threshold: Bytes from which on parts of results are uploaded; 0 to upload none.
        part_bytes: Size of the parts into which the client divides objects.
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
            Whether the blob was downloaded. If not, it must be fetched from the client.

        Raises:
            OSError: If there is no room for it.
        """
        if time.monotonic() < self._down_until:
            return False
        try:
            return await self._load(number, blob)
        except grpc.aio.AioRpcError:
            return False  # fetching it from the client shows whether the client is gone

    async def _load(self, number: int, blob: Blob) -> bool:
        from cloudexec._objects.s3_transfer import Download, S3TransferError, Settings, carry_out

        first: pb.Location | None = await self._locate(pb.LocateRequest(blob=number))
        assert first is not None
        assert blob.segment is not None
        if not first.HasField("request"):
            return False
        sha256 = first.sha256

        async def ask(refusal: UrlRefusedError | None) -> Sign:
            nonlocal first
            found, first = first, None
            if found is None:
                refused = refusal is not None and refusal.early
                found = await self._locate(pb.LocateRequest(blob=number, refused=refused))
            if not found.HasField("request"):
                raise _GoneError("the client cannot say any more where it is in the bucket")
            request = _unsigned(found.request)
            return lambda _: request

        place = File(blob.segment.fd, blob.offset)
        settings = Settings(timeout=_TIMEOUT, patience=_PATIENCE)
        download = Download(place.write, place.read, blob.size, sha256, settings)
        try:
            await carry_out(download, ask)
        except _GoneError:
            return False
        except S3TransferError as exc:
            self._note(exc)
            await self._locate(pb.LocateRequest(blob=number, failed=str(exc)))
            return False
        blob.sha256 = sha256
        return True

    async def store(self, number: int, fd: int, offset: int, size: int, lease: int = 0) -> bool:
        """Upload a part of a result.

        Args:
            number: The blob's number.
            fd: The file that it is in.
            offset: Its offset in the file.
            size: Its size in bytes.
            lease: The lease of the task whose result it is; 0 for a part that stays here as well.

        Returns:
            Whether the part is in the bucket or, with a lease, has reached the client.

        Raises:
            OSError: If the file cannot be read.
            grpc.aio.AioRpcError: If the connection to the client fails.
        """
        from cloudexec._objects.s3_transfer import S3TransferError, Settings, Upload, carry_out

        if not self.takes(size):
            return False
        place = File(fd, offset)
        async with self._gate:
            kept = not lease
            question = pb.StoreRequest(blob=number, size=size, kept=kept, lease=lease)
            asked = await self._store(question)
            if not asked.accepted:
                return False
            found = await asyncio.to_thread(digests, place.read, size, part_bytes=self._part_bytes)
            request = pb.StoreRequest(
                blob=number,
                size=size,
                kept=kept,
                lease=lease,
                sha256=found.sha256,
                part_sha256=found.parts,
            )

            async def ask(refusal: UrlRefusedError | None) -> Sign:
                del request.parts[:]
                request.parts.extend(upload.missing)
                request.refused = refusal is not None and refusal.early
                reply = await self._store(request)
                if not reply.accepted:
                    raise _GoneError("the client cannot begin it")
                request.upload_id = reply.upload_id
                return {each.part: _unsigned(each) for each in reply.requests}.__getitem__

            settings = Settings(timeout=_TIMEOUT, patience=_PATIENCE)
            upload = Upload(place.read, size, settings, part_bytes=self._part_bytes)
            try:
                await carry_out(upload, ask)
                request.etags.extend(upload.etags)
            except _GoneError:
                return False  # the client has ended it, and has logged why
            except S3TransferError as exc:
                self._note(exc)
                request.failed = str(exc)
            reply = await self._store(request)
        return reply.accepted

    def _note(self, error: S3TransferError) -> None:
        if error.code not in _OF_ONE:
            self._down_until = time.monotonic() + _REST


def _unsigned(request: pb.Signed) -> SignedRequest:
    headers = tuple(zip(request.header_names, request.header_values, strict=True))
    return SignedRequest(request.url, headers, request.expires_at)
