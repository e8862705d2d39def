"""Requests to S3 for objects under a prefix; a request that fails is repeated for a while."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import io
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeAlias, TypeVar

import aiohttp
import tenacity

from cloudexec._aws.clients import AwsClients, translated
from cloudexec._errors import AwsError
from cloudexec._transfer import on_thread

__all__ = ["CHUNK", "InOrder", "Requests", "Sink", "Source"]

T = TypeVar("T")

Source: TypeAlias = Callable[[int, int], "bytes | bytearray | memoryview"]
"""Returns the content at an offset, of a length. It may block, and it is called again if a request
is repeated. If an upload fails or is cancelled, a call may still run after the upload has returned,
and must do no harm then."""
Sink: TypeAlias = Callable[[int, bytes], object]
"""Takes the content at an offset. It may block. Calls come in any order and several at a time, but
never after the download has returned."""

CHUNK = 1024 * 1024
_REQUESTS = 20
"""Requests at a time, for all transfers together; the HTTP client has more connections."""
_EXPIRED_TRIES = 2


class Requests:
    """Makes requests about the objects of a bucket.

    All methods raise ``AwsError``, which names the object, the cause and a remedy. Errors that may
    pass (throttling, status 5xx, lost connections, expired credentials) are raised only after the
    request was repeated, with growing pauses.

    Args:
        clients: The AWS clients; the caller closes them.
        name: The bucket's name.
        prefix: The prefix of all keys.
        patience: Seconds for which a request that fails is repeated.
        stall: Seconds without progress after which a request counts as failed.
    """

    def __init__(
        self, clients: AwsClients, name: str, prefix: str, *, patience: float, stall: float
    ) -> None:
        self.region = ""
        self._clients = clients
        self._name = name
        self._prefix = prefix
        self._patience = patience
        self._stall = stall
        self._opening: asyncio.Lock = asyncio.Lock()
        self._requests = asyncio.Semaphore(_REQUESTS)

    async def open(self) -> None:
        """Check that the bucket exists, and find out its region; later calls do nothing.

        Raises:
            AwsError: If there is no such bucket, or these credentials have no access to it.
        """
        async with self._opening:
            if self.region:
                return
            try:
                try:
                    answer = await self.call("", "head_bucket")
                except AwsError as exc:
                    # The answer to a HEAD has a status and no reason. With 400 S3 refuses
                    # credentials that have expired.
                    if exc.code != "400":
                        raise
                    self._clients.renew()
                    answer = await self.call("", "head_bucket")
            except AwsError as exc:
                code = {"403": "AccessDenied", "404": "NoSuchBucket", "400": "ExpiredToken"}.get(
                    exc.code, exc.code
                )
                if code == exc.code:
                    raise
                error = AwsError(
                    f"{exc.operation} failed: {code}",
                    code=code,
                    operation=exc.operation,
                    expired=code == "ExpiredToken",
                )
                raise self.explained(error, "") from exc
            self.region = answer.get("BucketRegion") or self._clients.region

    async def call(self, name: str, operation: str, **parameters: Any) -> Any:
        """Make a request about an object, or about the bucket, and repeat it if it fails."""
        if name:
            parameters["Key"] = self.key(name)

        async def once() -> Any:
            async with self._requests, asyncio.timeout(2 * self._stall):
                return await self._clients.call(
                    "s3",
                    operation,
                    region=self.region,
                    once=True,
                    Bucket=self._name,
                    **parameters,
                )

        return await self._insist(name, once)

    async def send(
        self,
        name: str,
        operation: str,
        source: Source,
        offset: int,
        length: int,
        **parameters: Any,
    ) -> Any:
        """Make a request that sends content, and repeat it if it fails."""

        async def once() -> Any:
            body = _Body(source, offset, length)
            try:
                async with self._requests, _moving(body, self._stall):
                    return await self._clients.call(
                        "s3",
                        operation,
                        region=self.region,
                        once=True,
                        Bucket=self._name,
                        Key=self.key(name),
                        Body=body,
                        ContentLength=length,
                        **parameters,
                    )
            except AwsError:
                # The SDK takes what the source raises for a broken connection.
                if body.error is not None:
                    raise body.error from None
                raise

        return await self._insist(name, once)

    async def read(
        self, name: str, start: int, end: int, size: int, sink: Sink, check: InOrder
    ) -> None:
        """Read a range of an object, and repeat the rest of it if a request fails."""
        at = start

        async def rest() -> None:
            nonlocal at
            watch = _Watch()
            async with self._requests, _moving(watch, self._stall):
                answer = await self._clients.call(
                    "s3",
                    "get_object",
                    region=self.region,
                    once=True,
                    Bucket=self._name,
                    Key=self.key(name),
                    Range=f"bytes={at}-{end - 1}",
                )
                total = str(answer.get("ContentRange", "")).rpartition("/")[2]
                body = answer["Body"]
                try:
                    if total.isdigit() and int(total) != size:
                        raise AwsError(
                            f"s3:GetObject: the object has {total} bytes, not {size}",
                            code="BadDigest",
                            operation="s3:GetObject",
                        )
                    while at < end:
                        data = await _chunk(body, min(CHUNK, end - at))
                        watch.moved()
                        await on_thread(functools.partial(sink, at, data))
                        await check.add(at, data)
                        at += len(data)
                finally:
                    body.close()

        while True:

            def has_moved(before: int = at) -> bool:
                return at > before

            try:
                return await self._insist(name, rest, keep_on=has_moved)
            except _MovedError:
                continue

    async def _insist(
        self,
        name: str,
        once: Callable[[], Awaitable[T]],
        *,
        keep_on: Callable[[], bool] = lambda: False,
    ) -> T:
        """Repeat a request until it succeeds, or until it has failed for ``patience`` seconds.

        Raises:
            AwsError: If it does not succeed.
            _MovedError: Where it failed, but ``keep_on``: patience begins anew.
        """
        expired = 0

        def worth_it(exc: BaseException) -> bool:
            nonlocal expired
            if not isinstance(exc, AwsError):
                return False
            expired += exc.expired
            return exc.transient or (exc.expired and expired <= _EXPIRED_TRIES)

        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception(worth_it),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=10.0),
            stop=tenacity.stop_after_delay(self._patience),
            reraise=True,
        )
        try:
            async for attempt in retrying:
                with attempt:
                    try:
                        return await once()
                    except TimeoutError as exc:
                        raise AwsError(
                            f"s3: nothing has moved for {self._stall:g} s; check the network and "
                            "proxies",
                            code="Unreachable",
                            operation="s3",
                            transient=True,
                        ) from exc
                    except AwsError as exc:
                        if exc.transient and keep_on():
                            raise _MovedError from exc
                        raise
        except AwsError as exc:
            raise self.explained(exc, name) from exc
        raise AssertionError("tenacity returned without a result")

    def key(self, name: str) -> str:
        """Return the key of an object."""
        return self._prefix + name

    def explained(self, exc: AwsError, name: str) -> AwsError:
        """Return the error with the object's place, and a remedy that only this module knows."""
        place = f"s3://{self._name}/{self.key(name) if name else ''}"
        remedy = {
            "NoSuchBucket": "the bucket does not exist: `cloudexec up` makes one, or name another",
            "AccessDenied": (
                "these credentials need s3:GetObject, s3:PutObject, s3:DeleteObject and "
                f"s3:AbortMultipartUpload on {self._name}/{self._prefix}*, s3:ListBucket and "
                f"s3:ListBucketMultipartUploads on {self._name}"
            ),
            "NoSuchKey": "it has been deleted, or was never sent",
            "NoSuchUpload": "the upload has been ended",
            "BadDigest": "it was changed on the way, or while it was sent",
            "SlowDown": f"S3 has asked to slow down for {self._patience:g} s: it recovers by itself"
            ", and fewer transfers at once help",
        }.get(exc.code, "")
        return AwsError(
            f"{place}: {exc}" + (f"; {remedy}" if remedy else ""),
            code=exc.code,
            operation=exc.operation,
            transient=exc.transient,
            expired=exc.expired,
        )


class _MovedError(Exception):
    """A request failed after it had made progress."""


class _Watch:
    """The time at which bytes were last transferred."""

    def __init__(self) -> None:
        self.at = time.monotonic()

    def moved(self) -> None:
        self.at = time.monotonic()


class _Body(io.RawIOBase):
    """A range of a source, as a file that the SDK reads from in threads of the event loop."""

    def __init__(self, source: Source, offset: int, length: int) -> None:
        super().__init__()
        self._source = source
        self._offset = offset
        self._length = length
        self._position = 0
        self.at = time.monotonic()
        self.error: Exception | None = None

    def readable(self) -> bool:
        """Return ``True``."""
        return True

    def seekable(self) -> bool:
        """Return ``True``."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to a position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + offset)
        return self._position

    def read(self, size: int | None = -1) -> bytes:
        """Return as much as is wanted and there; what ``readinto`` would copy once more."""
        left = max(0, self._length - self._position)
        count = left if size is None or size < 0 else min(size, left)
        try:
            data = bytes(self._source(self._offset + self._position, count)) if count else b""
            if len(data) != count:
                raise OSError(f"{count} bytes were asked of a source, and it gave {len(data)}")
        except Exception as exc:
            self.error = exc
            raise
        self._position += count
        self.at = time.monotonic()
        return data


class InOrder:
    """A digest of content that comes out of order: what is ahead waits."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._next = 0
        self._waiting: dict[int, bytes] = {}
        self._lock = asyncio.Lock()

    async def add(self, offset: int, data: bytes) -> None:
        """Take a stretch; each comes once."""
        self._waiting[offset] = data
        async with self._lock:
            while (ready := self._waiting.pop(self._next, None)) is not None:
                await asyncio.to_thread(self._hash.update, ready)
                self._next += len(ready)

    def digest(self) -> bytes:
        """Return the digest of what has come."""
        return self._hash.digest()


@asynccontextmanager
async def _moving(watch: _Watch | _Body, stall: float) -> AsyncIterator[None]:
    """Raise TimeoutError once nothing has moved for so many seconds."""
    loop = asyncio.get_running_loop()
    watch.at = time.monotonic()
    handle: asyncio.TimerHandle | None = None
    async with asyncio.timeout(None) as scope:

        def look() -> None:
            nonlocal handle
            left = watch.at + stall - time.monotonic()
            if left <= 0:
                if not scope.expired():
                    scope.reschedule(loop.time())
            else:
                handle = loop.call_later(left, look)

        handle = loop.call_later(stall, look)
        try:
            yield
        finally:
            if handle is not None:
                handle.cancel()


async def _chunk(body: Any, length: int) -> bytes:
    """Read so many bytes of an answer."""
    pieces = []
    while length:
        try:
            with translated("s3", "GetObject"):
                data: bytes = await body.read(length)
        except aiohttp.ClientError as exc:
            # What the SDK leaves as it is.
            raise AwsError(
                f"s3:GetObject: the answer broke off: {exc}; check the network and proxies",
                code="Unreachable",
                operation="s3:GetObject",
                transient=True,
            ) from exc
        if not data:
            raise AwsError(
                f"s3:GetObject: the answer ended {length} bytes early",
                code="Short",
                operation="s3:GetObject",
                transient=True,
            )
        pieces.append(data)
        length -= len(data)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
