"""The client's access to S3: uploads, downloads, and signed URLs by which workers do the same.

Each executor has a prefix of its own in the bucket. All coroutines run on the executor's event
loop; ``source`` and ``sink`` may block, and are called in threads.

1. ``Bucket(clients, name, object_prefix(executor_id))`` makes no request. ``open()`` checks once
   that the bucket exists. The other methods call it themselves; call it to learn of an error early.
2. An argument: the client calls ``upload()`` when the first worker needs it, and ``download_url()``
   for each worker that asks; signing a URL makes no request. The worker runs a
   ``s3_transfer.Download``, as the client does, and asks the client for the URL by an RPC. It asks
   again if S3 refuses the URL, and says whether it was refused early. Pass that on as ``renew``.
3. A result: the worker computes its digests, with the client's ``part_bytes``. It sends them to the
   client, and receives ``upload_urls()``. Each URL accepts only content with that digest. The
   worker runs a ``s3_transfer.Upload``, asks for further URLs by an RPC that names the upload and
   the missing parts, and sends the ETags to the client. ``complete_upload()`` then creates the
   object; if the attempt was lost, the client calls ``abort_upload()``. The client reads the object
   with ``download()``, or lets workers read it by ``download_url()``.
4. ``delete()`` is called when the last reference to an object is gone. ``close()`` empties the
   prefix at shutdown, after the workers have been told to end and before ``clients.close()``. A
   worker that still holds a URL may put an object there later; the bucket's lifecycle rule removes
   it.

A name must be unique in the executor: the client uses the numbers of blobs.
"""

from __future__ import annotations

import asyncio
import base64
import math
import time
import urllib.request
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Sequence,
)
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from cloudexec._aws.clients import AwsClients, translated
from cloudexec._aws.refusals import EXPIRED, remedy_of_refusal
from cloudexec._errors import AwsError, ConfigError
from cloudexec._objects.s3_requests import Requests, Signatures
from cloudexec._objects.s3_transfer import (
    Download,
    S3TransferError,
    Settings,
    Sign,
    Upload,
    UrlRefusedError,
    carry_out,
)
from cloudexec._transfer import (
    PART_BYTES,
    SignedRequest,
    Sink,
    Source,
    digest,
    part_length,
    parts_of,
    piece,
)

__all__ = ["Bucket", "SignedUpload"]

T = TypeVar("T")

_SMALL = 1024 * 1024
"""Objects of up to so many bytes are sent like requests without content."""
_TRANSFERS = 5
"""Transfers at a time; each has several connections, and a thread for each of them."""
_DELETE_BATCH = 1000
_PATIENCE = 60.0
_STALL = 30.0
_ABORT_TIMEOUT = 10.0
_RENEW_INTERVAL = 30.0
_URL_SECONDS = 12 * 3600.0
_LONGEST_URL = 7 * 24 * 3600.0
"""Amazon S3 User Guide, "Download and upload objects with presigned URLs"."""
_HEADERS = {
    "ChecksumSHA256": "x-amz-checksum-sha256",
    "ServerSideEncryption": "x-amz-server-side-encryption",
}


@dataclass(frozen=True, slots=True)
class SignedUpload:
    """The signed requests by which a worker uploads an object.

    Attributes:
        upload_id: For ``complete_upload`` and ``abort_upload``; empty if one PUT request suffices.
        part_bytes: Bytes of each part but the last.
        requests: The requests by part number, from 1.
    """

    upload_id: str
    part_bytes: int
    requests: dict[int, SignedRequest]


class Bucket:
    """One executor's objects in a bucket.

    Methods that make requests raise ``AwsError``, which names the object, the cause and a remedy.
    Errors that may pass (throttling, status 5xx, lost connections, expired credentials) are raised
    only after the request was repeated, with growing pauses.

    Args:
        clients: The AWS clients; the caller closes them.
        name: The bucket's name.
        prefix: The prefix of all keys.
        part_bytes: Larger objects are sent in parts of this size, in parallel.
        parallel: Requests at a time of one transfer.
        encryption: ``"AES256"``, ``"aws:kms"`` (with the account's key for S3), or an empty string
            for the bucket's default.
        patience: Seconds for which a request that fails is repeated.
        stall: Seconds without progress after which a request counts as failed.

    Raises:
        ConfigError: If a value is out of its range.
    """

    def __init__(
        self,
        clients: AwsClients,
        name: str,
        prefix: str,
        *,
        part_bytes: int = PART_BYTES,
        parallel: int = 4,
        encryption: Literal["AES256", "aws:kms", ""] = "AES256",
        patience: float = _PATIENCE,
        stall: float = _STALL,
    ) -> None:
        if not prefix.endswith("/") or prefix.startswith("/"):
            # Without the slash, close() would empty the prefixes of others too.
            raise ConfigError(f"a prefix of keys is like 'cloudexec/<id>/', not {prefix!r}")
        if parallel < 1:
            raise ConfigError(f"parallel must be at least 1, not {parallel}")
        try:
            part_length(0, part_bytes)
        except ValueError as exc:
            raise ConfigError(f"part_bytes: {exc}") from exc
        self.name = name
        self.prefix = prefix
        self.part_bytes = part_bytes
        self._clients = clients
        self._parallel = parallel
        self._encryption = encryption
        self._requests = Requests(clients, name, prefix, patience=patience, stall=stall)
        self._transfers = asyncio.Semaphore(_TRANSFERS)
        self._settings = Settings(
            parallel, stall, patience, urllib.request.getproxies(), clients.authorities()
        )
        self._renewed_at = float("-inf")
        self._used = False
        self._closed = False

    async def open(self) -> None:
        """Check that the bucket exists, and find out its region; later calls do nothing.

        Raises:
            AwsError: If there is no such bucket, or these credentials have no access to it.
        """
        await self._requests.open()

    async def upload(self, name: str, source: Source, size: int, sha256: bytes) -> None:
        """Create an object.

        Args:
            name: The object's name, without the prefix.
            source: Returns the content.
            size: Bytes of the content.
            sha256: SHA-256 of the content; S3 refuses other content.

        Raises:
            AwsError: If S3 refuses the object. No part of it stays in the bucket then.
        """
        await self._ready()
        self._used = True
        if size <= _SMALL:
            # By the SDK, whose connections are open already.
            data = bytes(await asyncio.to_thread(piece, source, 0, size))
            await self._requests.call(name, "put_object", Body=data, **self._put_parameters(sha256))
            return
        upload = Upload(source, size, self._settings, part_bytes=self.part_bytes)
        parts = parts_of(size, self.part_bytes)
        digests = {1: sha256} if len(parts) == 1 else {}
        upload_id = await self._create_upload(name) if len(parts) > 1 else ""

        def sign(number: int) -> Coroutine[Any, Any, SignedRequest]:
            # Each part is hashed just before it is sent, while others are sent.
            if number not in digests:
                part = parts[number - 1]
                digests[number] = digest(source, part.offset, part.length)
            return self._sign_part(name, upload_id, number, digests[number])

        try:
            await self._carry_out("s3:PutObject", name, upload, sign)
            in_order = [digests[part.number] for part in parts]
            await self.complete_upload(name, upload_id, upload.etags, size, in_order)
        except BaseException:
            await self._abort_quietly(name, upload_id)
            raise

    async def _carry_out(
        self,
        operation: str,
        name: str,
        transfer: Upload | Download,
        sign: Callable[[int], Coroutine[Any, Any, SignedRequest]],
    ) -> None:
        signatures = Signatures(sign)

        async def ask(refusal: UrlRefusedError | None) -> Sign:
            if refusal is not None:
                if refusal.early and refusal.code not in EXPIRED:
                    raise refusal
                self._renew(refusal.early)
            signatures.forget()
            return signatures.get

        try:
            async with self._transfers:
                await carry_out(transfer, ask, signatures.cancel)
        except S3TransferError as exc:
            error = AwsError(
                f"{operation} failed: {exc.reason}",
                code=exc.code,
                operation=operation,
                transient=exc.transient,
                expired=exc.code in EXPIRED,
            )
            remedy = remedy_of_refusal(exc.code, exc.reason, operation) or exc.remedy
            raise self._requests.explained(error, name, remedy) from exc

    async def download_url(
        self, name: str, expires: float = _URL_SECONDS, *, renew: bool = False
    ) -> SignedRequest:
        """Sign a request that reads an object or ranges of it. This sends nothing to S3.

        Args:
            name: The object's name, without the prefix.
            expires: Seconds for which the URL should be valid; the credentials may expire before.
            renew: Whether S3 refused an earlier URL that had not expired. The credentials are then
                read again.

        Raises:
            AwsError: If there are no credentials.
        """
        await self._ready()
        self._renew(renew)
        return await self._sign("get_object", name, expires)

    async def upload_urls(
        self,
        name: str,
        size: int,
        sha256: bytes,
        part_sha256: Sequence[bytes] = (),
        *,
        upload_id: str = "",
        numbers: Collection[int] | None = None,
        expires: float = _URL_SECONDS,
        renew: bool = False,
    ) -> SignedUpload:
        """Sign the requests by which a worker creates an object.

        This sends one request to S3 if it begins an upload in parts, and none otherwise.

        Args:
            name: The object's name, without the prefix.
            size: Bytes of the object.
            sha256: SHA-256 of the whole object.
            part_sha256: SHA-256 of each part, as ``digests`` returns them. An object of
                one part needs none.
            upload_id: The upload in parts that goes on; empty to begin a new one.
            numbers: Sign requests for these parts only; ``None`` for all parts.
            expires: As for ``download_url``.
            renew: As for ``download_url``.

        Raises:
            AwsError: If S3 does not begin an upload, or there are no credentials.
            ValueError: If there is not one digest for each part.
        """
        await self._ready()
        self._renew(renew)
        self._used = True
        length = part_length(size, self.part_bytes)
        parts = parts_of(size, self.part_bytes)
        if len(parts) == 1:
            part_sha256 = (sha256,)
        if len(part_sha256) != len(parts):
            raise ValueError(f"{len(parts)} parts of {name}, and {len(part_sha256)} digests")
        begun = len(parts) > 1 and not upload_id
        if begun:
            upload_id = await self._create_upload(name)
        try:
            requests = {
                part.number: await self._sign_part(name, upload_id, part.number, found, expires)
                for part, found in zip(parts, part_sha256, strict=True)
                if numbers is None or part.number in numbers
            }
        except BaseException:
            if begun:
                await self._abort_quietly(name, upload_id)
            raise
        return SignedUpload(upload_id, length, requests)

    async def _sign_part(
        self,
        name: str,
        upload_id: str,
        number: int,
        sha256: bytes,
        expires: float = _URL_SECONDS,
    ) -> SignedRequest:
        if not upload_id:
            return await self._sign("put_object", name, expires, **self._put_parameters(sha256))
        return await self._sign(
            "upload_part",
            name,
            expires,
            UploadId=upload_id,
            PartNumber=number,
            ChecksumSHA256=_base64(sha256),
        )

    async def complete_upload(
        self,
        name: str,
        upload_id: str,
        etags: Sequence[str],
        size: int,
        part_sha256: Sequence[bytes] = (),
    ) -> None:
        """Create the object from the parts that a worker has uploaded.

        Args:
            name: As given to ``upload_urls``.
            upload_id: As ``upload_urls`` returned it. If it is empty, this does nothing.
            etags: The ETags of the parts, in order.
            size: As given to ``upload_urls``.
            part_sha256: As given to ``upload_urls``.

        Raises:
            AwsError: If a part is missing, or the upload has been aborted.
        """
        if upload_id:
            await self._complete(name, upload_id, list(zip(etags, part_sha256, strict=True)), size)

    async def abort_upload(self, name: str, upload_id: str) -> None:
        """Abort an upload in parts; it is no error if there is no such upload any more.

        Raises:
            AwsError: If the request fails.
        """
        if not upload_id:
            return
        try:
            await self._requests.call(name, "abort_multipart_upload", UploadId=upload_id)
        except AwsError as exc:
            if exc.code != "NoSuchUpload":
                raise

    async def download(
        self, name: str, sink: Sink, source: Source, size: int, sha256: bytes
    ) -> None:
        """Read an object.

        Args:
            name: The object's name, without the prefix.
            sink: Takes the content, before the digest is verified.
            source: Returns content that the sink has taken, to verify the digest.
            size: Bytes of the object.
            sha256: SHA-256 that the content must have.

        Raises:
            AwsError: If the object cannot be read. The code is ``"BadDigest"`` if its size or
                content is wrong.
        """
        await self._ready()

        def sign(_: int) -> Coroutine[Any, Any, SignedRequest]:
            return self._sign("get_object", name, _URL_SECONDS)

        download = Download(sink, source, size, sha256, self._settings)
        await self._carry_out("s3:GetObject", name, download, sign)

    async def delete(self, names: Iterable[str]) -> None:
        """Delete objects; it is no error if some do not exist.

        Raises:
            AwsError: If S3 refuses some of them, with the first one's reason.
        """
        keys = [self._requests.key(name) for name in names]
        await self._delete_keys(keys)

    async def close(self, seconds: float = 30.0) -> None:
        """Delete all objects under the prefix, and abort all uploads, if there were any.

        Args:
            seconds: Seconds that this may take.

        Raises:
            AwsError: If objects may be left. The caller warns of it; the bucket's lifecycle rule
                removes them. A bucket that ``cloudexec up`` made has such a rule.
        """
        if self._closed:
            return
        self._closed = True
        if not self._used:
            return
        try:
            async with asyncio.timeout(seconds):
                try:
                    await self._empty()
                except AwsError as exc:
                    if not exc.expired:
                        raise
                    await self._empty()  # once more, with credentials that were read again
        except TimeoutError:
            error = AwsError(
                f"not everything could be deleted in {seconds:g} s", code="Timeout", transient=True
            )
            raise self._left(error) from None
        except AwsError as exc:
            raise self._left(exc) from exc

    async def _empty(self) -> None:
        # Uploads first: an upload that is completed after the objects were listed would stay.
        await self._end_uploads()
        await self._delete_keys([key async for key in self._keys()])

    def _left(self, exc: AwsError) -> AwsError:
        return AwsError(
            f"objects are left at s3://{self.name}/{self.prefix}: {exc}; the bucket's lifecycle "
            "rule deletes them, if it has one, as buckets of `cloudexec up` do",
            code=exc.code,
            operation=exc.operation,
            transient=exc.transient,
            expired=exc.expired,
        )

    def _put_parameters(self, sha256: bytes) -> dict[str, str]:
        return {"ChecksumSHA256": _base64(sha256), **self._encrypted()}

    def _encrypted(self) -> dict[str, str]:
        return {"ServerSideEncryption": self._encryption} if self._encryption else {}

    async def _ready(self) -> None:
        if self._closed:
            raise AwsError(
                f"the executor's part of the bucket, s3://{self.name}/{self.prefix}, is closed",
                code="Closed",
            )
        if not self._requests.region:
            await self.open()

    def _renew(self, wanted: bool) -> None:
        # When credentials expire, S3 refuses all workers at once; read the credentials only once.
        if wanted and time.monotonic() - self._renewed_at > _RENEW_INTERVAL:
            self._renewed_at = time.monotonic()
            self._clients.renew()

    async def _sign(
        self, operation: str, name: str, expires: float, **parameters: Any
    ) -> SignedRequest:
        seconds = max(1, round(min(expires, _LONGEST_URL)))
        client = await self._clients.client("s3", region=self._requests.region, once=True)
        began = time.time()
        with translated("s3", client.meta.method_to_api_mapping[operation]):
            url = await client.generate_presigned_url(
                operation,
                Params={"Bucket": self.name, "Key": self._requests.key(name), **parameters},
                ExpiresIn=seconds,
            )
        # Read after signing, because signing renews credentials that are about to expire.
        credentials_end = await self._clients.credentials_expire_at()
        # The time in a signature has whole seconds.
        expires_at = float(math.floor(began) + seconds)
        if credentials_end is not None:
            expires_at = min(expires_at, credentials_end)
        return SignedRequest(url, _headers_of(parameters), expires_at)

    async def _create_upload(self, name: str) -> str:
        answer = await self._requests.call(
            name, "create_multipart_upload", ChecksumAlgorithm="SHA256", **self._encrypted()
        )
        return str(answer["UploadId"])

    async def _complete(
        self, name: str, upload_id: str, parts: Sequence[tuple[str, bytes]], size: int
    ) -> None:
        described = [
            {"PartNumber": number, "ETag": etag, "ChecksumSHA256": _base64(digest)}
            for number, (etag, digest) in enumerate(parts, 1)
        ]
        try:
            await self._requests.call(
                name,
                "complete_multipart_upload",
                UploadId=upload_id,
                MultipartUpload={"Parts": described},
            )
        except AwsError as exc:
            if exc.code != "NoSuchUpload":
                raise
            # The answer to an earlier request may have been lost. The object exists in that case.
            try:
                found = await self._requests.call(name, "head_object")
            except AwsError:
                raise exc from None
            if found.get("ContentLength") != size:
                raise

    async def _abort_quietly(self, name: str, upload_id: str) -> None:
        """Abort an upload while another error, or a cancellation, is being handled."""
        try:
            async with asyncio.timeout(_ABORT_TIMEOUT):
                await self.abort_upload(name, upload_id)
        except (AwsError, TimeoutError):
            pass  # close() aborts it, or the bucket's lifecycle rule does

    async def _end_uploads(self) -> None:
        found = [
            (each["Key"], each["UploadId"])
            async for each in self._clients.pages(
                "s3", "list_multipart_uploads", "Uploads", Bucket=self.name, Prefix=self.prefix
            )
        ]

        async def end(upload: tuple[str, str]) -> None:
            await self.abort_upload(upload[0].removeprefix(self.prefix), upload[1])

        await _each(self._parallel, found, end)

    async def _keys(self) -> AsyncIterator[str]:
        async for each in self._clients.pages(
            "s3", "list_objects_v2", "Contents", Bucket=self.name, Prefix=self.prefix
        ):
            yield each["Key"]

    async def _delete_keys(self, keys: Sequence[str]) -> None:
        refused: list[dict[str, str]] = []

        async def delete(start: int) -> None:
            batch = [{"Key": key} for key in keys[start : start + _DELETE_BATCH]]
            answer = await self._requests.call(
                "", "delete_objects", Delete={"Objects": batch, "Quiet": True}
            )
            refused.extend(answer.get("Errors", ()))

        await _each(self._parallel, range(0, len(keys), _DELETE_BATCH), delete)
        if refused:
            first = refused[0]
            error = AwsError(
                f"s3:DeleteObjects failed for {len(refused)} objects: {first.get('Code')}: "
                f"{first.get('Message')}",
                code=str(first.get("Code")),
                operation="s3:DeleteObjects",
            )
            raise self._requests.explained(
                error, str(first.get("Key", "")).removeprefix(self.prefix)
            )


async def _each(
    parallel: int, items: Iterable[T], work: Callable[[T], Coroutine[Any, Any, None]]
) -> None:
    """Run ``work`` for each item, ``parallel`` at a time; the first error is raised, ungrouped."""
    todo = iter(items)

    async def take() -> None:
        for item in todo:
            await work(item)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(parallel):
                group.create_task(take())
    except BaseExceptionGroup as exc:
        raise exc.exceptions[0] from exc.exceptions[0].__cause__


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def _headers_of(parameters: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return the headers that a worker must send for these parameters of a signed request."""
    return tuple(
        (_HEADERS[key], str(value)) for key, value in parameters.items() if key in _HEADERS
    )
