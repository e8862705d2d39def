"""Exchanges large blobs between the client and workers elsewhere through an S3 bucket.

An argument is uploaded when the first worker asks for it, and each worker then downloads it from
the bucket, so that the client's own connection carries it once. If there is only one worker,
connected or being started, the client sends it the blob directly, which is faster. The same rule
holds for results that the client needs. A worker keeps such a result until it has arrived at the
client, so a failing bucket costs time, but never a result. Results that stay on their workers
(``keep=True``) are always copied to the bucket, in the background: they remain available when their
worker ends, and other workers download them from there.

No AWS module is imported and no request is made before the first blob that is large enough.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from cloudexec._aws.names import object_prefix
from cloudexec._errors import AwsError, CloudexecError, PayloadError
from cloudexec._log import Log
from cloudexec._objects.store import Blob, BlobStore
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._server.engine import Engine
from cloudexec._server.sessions import Sessions
from cloudexec._transfer import PART_BYTES, SignedRequest, digest

if TYPE_CHECKING:
    from cloudexec._aws.clients import AwsClients
    from cloudexec._objects.s3 import Bucket

__all__ = ["BucketTransfers"]

_logger = Log()
_PATIENCE = 20.0
"""Seconds for which a failed request to S3 is repeated. It is short, as blobs can go directly."""
_REST = 300.0
"""Seconds for which the bucket is not used after it has failed."""
_DELETE_PAUSE = 2.0
"""Seconds for which objects to be deleted are collected, to delete them with one request."""
_MOST_UNWANTED = 1000
_CLOSE = 30.0
"""Seconds that the deletion of all objects may take when the executor ends."""
_CLOSE_DOWN = 5.0
"""The same, if the bucket has failed shortly before."""
_MOST_UPLOADS = 256
"""Number of uploads that one worker may have begun and not completed."""
_WHY_KEPT = 300
"""Number of characters of a worker's error message that are logged."""


class BucketTransfers:
    """One executor's transfers through its bucket. Used on the loop thread only.

    Args:
        engine: The executor's engine.
        sessions: The sessions of its workers.
        store: The client's blobs.
        name: The bucket's name.
        region: The AWS region; empty for the SDK's default.
        threshold: Bytes from which on blobs go through the bucket.
        expects: Says whether the worker of a session holds a lease (the right to run a task).
    """

    def __init__(
        self,
        engine: Engine,
        sessions: Sessions,
        store: BlobStore,
        name: str,
        region: str,
        threshold: int,
        expects: Callable[[Any, int], bool],
    ) -> None:
        self.name = name
        self.threshold = threshold
        self.part_bytes = PART_BYTES
        self.bytes_uploaded = 0
        self.bytes_downloaded = 0
        self.bytes_received = 0
        """Bytes of results that came through the bucket; ``bytes_downloaded`` includes them."""
        self._engine = engine
        self._sessions = sessions
        self._store = store
        self._is_expected = expects
        self._region = region
        self._clients: AwsClients | None = None
        self._bucket: Bucket | None = None
        self._opening = asyncio.Lock()
        self._closed = False
        self._down_until = float("-inf")
        self._warned_workers = False
        self._uploads: dict[int, asyncio.Task[bool]] = {}
        self._stored: set[int] = set()
        self._unwanted: list[str] = []
        self._deleting: asyncio.Task[None] | None = None

    def takes(self, size: int) -> bool:
        """Say whether a blob of this size may go through the bucket now."""
        return size >= self.threshold and not self._closed and time.monotonic() >= self._down_until

    # Requests of workers.

    async def locate(self, session: Any, request: pb.LocateRequest) -> pb.Location:
        """Return a signed URL for a blob, after it was uploaded; empty to fetch it directly."""
        if request.failed:
            self._worker_failed(session, request.failed)
            return pb.Location()
        blob: Blob | None = session.told.blob(request.blob)
        if blob is None or not (blob.stored or await self._put(blob)):
            return pb.Location()
        try:
            bucket = await self._open()
            signed = await bucket.download_url(str(blob.id), renew=request.refused)
        except CloudexecError as exc:
            self._failed(exc)
            return pb.Location()
        return pb.Location(request=_signed(signed), sha256=blob.sha256)

    async def take(self, session: Any, request: pb.StoreRequest) -> pb.StoreReply:
        """Serve one step of a worker's upload; ``StoreRequest`` in the .proto lists the steps."""
        number = request.blob
        if request.failed:
            self._worker_failed(session, request.failed)
            session.uploads.pop(number, None)
            await self._abort(number, request.upload_id)
            return pb.StoreReply()
        if not request.sha256:
            wanted = request.kept or (self._expects(session, request) and not self._is_alone())
            return pb.StoreReply(accepted=wanted and self.takes(request.size))
        if not (request.kept or self._expects(session, request)):
            await self._abort(number, session.uploads.pop(number, ""))
            return pb.StoreReply()
        if number not in session.uploads and len(session.uploads) >= _MOST_UPLOADS:
            return pb.StoreReply()
        try:
            bucket = await self._open()
            if not request.etags:
                signed = await bucket.upload_urls(
                    str(number),
                    request.size,
                    request.sha256,
                    list(request.part_sha256),
                    upload_id=request.upload_id,
                    numbers=set(request.parts),
                    renew=request.refused,
                )
                session.uploads[number] = signed.upload_id
                requests = [_signed(each, part) for part, each in signed.requests.items()]
                return pb.StoreReply(accepted=True, upload_id=signed.upload_id, requests=requests)
            await bucket.complete_upload(
                str(number),
                request.upload_id,
                list(request.etags),
                request.size,
                list(request.part_sha256),
            )
            session.uploads.pop(number, None)
            self._stored.add(number)
            if request.kept:
                self._keep(session, number, request.sha256)
                return pb.StoreReply(accepted=True)
            return pb.StoreReply(accepted=await self._receive(session, request))
        except CloudexecError as exc:
            self._failed(exc)
            return pb.StoreReply()

    def _keep(self, session: Any, number: int, sha256: bytes) -> None:
        blob: Blob | None = session.told.blob(number)
        if blob is None:
            # The result that the blob belongs to has not arrived yet, or was dropped.
            session.results.stored_ahead(number, sha256)
        else:
            blob.stored, blob.sha256 = True, sha256

    async def _receive(self, session: Any, request: pb.StoreRequest) -> bool:
        """Download a part of a result. Its worker waits for the answer, and keeps it until then."""
        if not self._expects(session, request):
            self.forget([request.blob])
            return False
        try:
            blob = await asyncio.to_thread(self._store.new, request.size)
            await self._read(str(request.blob), blob, request.sha256)
        except (PayloadError, OSError):
            return False  # the worker sends it directly, which reports the same error
        except AwsError as exc:
            if exc.code != "BadDigest":
                raise
            _logger.warning("an object is not to be had from the bucket: %s", exc)
            return False
        finally:
            self.forget([request.blob])
        self.bytes_received += blob.size
        if self._expects(session, request):
            session.results.part_arrived(request.lease, request.blob, blob)
        return True

    def _expects(self, session: Any, request: pb.StoreRequest) -> bool:
        return self._is_expected(session, request.lease)

    def session_ended(self, session: Any) -> None:
        """Abort the uploads of a worker that is gone."""
        for number, upload_id in session.uploads.items():
            if upload_id and not self._closed:
                self._engine.create_task(self._abort(number, upload_id))
        session.uploads.clear()

    # Uploads and downloads.

    async def _put(self, blob: Blob) -> bool:
        """Upload one of the client's blobs, once; say whether it is in the bucket."""
        if blob.origin is not None or not self.takes(blob.size):
            return False
        running = self._uploads.get(blob.id)
        if running is None:
            if self._is_alone():
                return False
            running = asyncio.get_running_loop().create_task(self._upload(blob))
            self._uploads[blob.id] = running
            number = blob.id
            running.add_done_callback(lambda _: self._uploads.pop(number, None))
        # Shielded: if the worker that asked disconnects, others still wait for this upload.
        return await asyncio.shield(running)

    def _is_alone(self) -> bool:
        return len(self._sessions) + len(self._engine.machine.launches) <= 1

    async def _upload(self, blob: Blob) -> bool:
        view = blob.view()

        def source(at: int, length: int) -> memoryview:
            return view[at : at + length]

        try:
            bucket = await self._open()
            if not blob.sha256:
                blob.sha256 = await asyncio.to_thread(digest, source, 0, blob.size)
            await bucket.upload(str(blob.id), source, blob.size, blob.sha256)
        except CloudexecError as exc:
            self._failed(exc)
            return False
        blob.stored = True
        self._stored.add(blob.id)
        self.bytes_uploaded += blob.size
        return True

    async def download(self, blob: Blob) -> Blob:
        """Download a blob that is in the bucket into a new blob, and return that.

        Raises:
            AwsError: If the object cannot be read.
            PayloadTooLargeError: If the store has no room for it.
            OSError: If it cannot be written.
        """
        content = await asyncio.to_thread(self._store.new, blob.size)
        await self._read(str(blob.id), content, blob.sha256)
        return content

    async def _read(self, name: str, content: Blob, sha256: bytes) -> None:
        def sink(at: int, data: bytes) -> None:
            content.write(data, at)

        bucket = await self._open()
        view = content.view()
        await bucket.download(name, sink, lambda at, n: view[at : at + n], content.size, sha256)
        content.sha256 = sha256
        self.bytes_downloaded += content.size

    async def _open(self) -> Bucket:
        async with self._opening:
            if self._bucket is None:
                # In a thread, as importing the SDK takes half a second.
                clients_of, bucket_of = await asyncio.to_thread(_import)
                self._clients = clients_of(self._region or None)
                prefix = object_prefix(self._engine.executor_id)
                self._bucket = bucket_of(self._clients, self.name, prefix, patience=_PATIENCE)
        return self._bucket

    # Errors.

    def _failed(self, error: CloudexecError) -> None:
        if self._closed or time.monotonic() < self._down_until:
            return
        self._down_until = time.monotonic() + _REST
        _logger.warning(
            "the bucket %s cannot be used: %s; for %.0f minutes large arguments and results go "
            "directly between this process and the workers, which is slower where these are many. "
            "ObjectOptions(bucket=False) does without it",
            self.name,
            error,
            _REST / 60,
        )

    def lost(self, blob: Blob, error: CloudexecError) -> None:
        """Note that a blob that was in the bucket cannot be read from there."""
        blob.stored = False
        if not self._closed:
            _logger.warning("an object is not to be had from the bucket: %s", error)

    def _worker_failed(self, session: Any, why: str) -> None:
        level = logging.DEBUG if self._warned_workers else logging.WARNING
        self._warned_workers = True
        _logger.log(
            level,
            "%s cannot use the bucket %s: %s; it exchanges large arguments and results with this "
            "process directly. Said once, whichever workers it happens to",
            session.worker_id,
            self.name,
            "".join(each if each.isprintable() else " " for each in why[:_WHY_KEPT]),
        )

    async def _abort(self, number: int, upload_id: str) -> None:
        if upload_id and self._bucket is not None:
            try:
                await self._bucket.abort_upload(str(number), upload_id)
            except CloudexecError:
                pass  # close() aborts it, or the bucket's lifecycle rule does

    # Deletions.

    def forget(self, numbers: Iterable[int]) -> None:
        """Delete the objects of blobs that are not needed any more, shortly after this call."""
        gone = self._stored.intersection(numbers)
        if not gone or self._closed:
            return
        self._stored -= gone
        self._unwanted.extend(map(str, gone))
        if self._deleting is None:
            self._deleting = asyncio.get_running_loop().create_task(self._delete())

    async def _delete(self) -> None:
        try:
            if len(self._unwanted) < _MOST_UNWANTED:
                await asyncio.sleep(_DELETE_PAUSE)
            names, self._unwanted = self._unwanted, []
            await (await self._open()).delete(names)
        except CloudexecError as exc:
            _logger.debug("objects are deleted at the end: %s", exc)
        finally:
            self._deleting = None
            if self._unwanted and not self._closed:
                self._deleting = asyncio.get_running_loop().create_task(self._delete())

    async def close(self) -> None:
        """Delete all objects of this executor; errors are logged as warnings."""
        if self._closed:
            return
        self._closed = True
        running: list[asyncio.Task[Any]] = list(self._uploads.values())
        if self._deleting is not None:
            running.append(self._deleting)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        try:
            if self._bucket is not None:
                down = time.monotonic() < self._down_until
                await self._bucket.close(_CLOSE_DOWN if down else _CLOSE)
        except CloudexecError as exc:
            _logger.warning("%s", exc)
        finally:
            if self._clients is not None:
                await self._clients.close()


def _import() -> tuple[type[AwsClients], type[Bucket]]:
    from cloudexec._aws.clients import AwsClients
    from cloudexec._objects.s3 import Bucket

    return AwsClients, Bucket


def _signed(request: SignedRequest, part: int = 0) -> pb.Signed:
    return pb.Signed(
        url=request.url,
        header_names=[name for name, _ in request.headers],
        header_values=[value for _, value in request.headers],
        expires_at=request.expires_at,
        part=part,
    )
