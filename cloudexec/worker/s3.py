"""Transfers objects between a file of this worker and S3, by requests that the client has signed.

A worker needs neither the AWS SDK nor AWS permissions, because a signed URL carries the client's
permissions. A URL expires after its own time, or with the credentials that signed it. S3 then
refuses it, which raises :class:`UrlRefusedError`. A :class:`Download` or :class:`Upload` keeps its
progress, and goes on with fresh URLs when it is run again. :func:`fetch` and :func:`store` do that;
they are given a function that asks the client for URLs. All other functions block, and use threads
of their own.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import hashlib
import http.client
import os
import random
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from typing import Any

from cloudexec._errors import CloudexecError
from cloudexec._transfer import PART_BYTES, Part, SignedRequest, on_thread, parts_of
from cloudexec.worker.s3_digests import Digests, digests, read_at
from cloudexec.worker.s3_link import Link, tag, total_size

__all__ = [
    "Digests",
    "Download",
    "S3DigestError",
    "S3TransferError",
    "Upload",
    "UrlRefusedError",
    "digests",
    "fetch",
    "store",
]

_CHUNK = 1024 * 1024
_SEND = 256 * 1024
"""Bytes of one send. A slow link must manage this number within the socket's timeout."""
_RANGE = 8 * 1024 * 1024
_PARALLEL = 4
_TIMEOUT = 30.0
_PATIENCE = 60.0
_FEWEST_TRIES = 3
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
_ERROR_BYTES = 64 * 1024
_REFUSALS_IN_A_ROW = 3
_RETRIED_STATUS = frozenset({408, 429, 500, 502, 503, 504})
_RETRIED_CODE = frozenset({"RequestTimeout", "SlowDown", "InternalError", "ServiceUnavailable"})
_REFUSING_CODE = frozenset(
    {"AccessDenied", "ExpiredToken", "InvalidToken", "RequestExpired", "TokenRefreshRequired"}
)
"""Codes of refused URLs; some of them have status 400. Amazon S3 API Reference, "Error responses".
"""


class S3TransferError(CloudexecError):
    """An object could not be moved to or from S3.

    Attributes:
        status: The HTTP status of S3's answer; 0 without an answer.
        code: S3's error code, such as ``"NoSuchKey"``; ``"Unreachable"`` without an answer.
        transient: Whether the transfer may succeed later.
    """

    def __init__(
        self, message: str = "", *, status: int = 0, code: str = "", transient: bool = False
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.transient = transient


class UrlRefusedError(S3TransferError):
    """S3 refuses this URL, perhaps because it has expired: a fresh one may work."""


class S3DigestError(S3TransferError):
    """The received or sent content does not have the announced digest."""


async def fetch(download: Download, ask: Callable[[bool], Awaitable[SignedRequest]]) -> None:
    """Run a download in threads, with as many URLs as it needs.

    Once it is cancelled, nothing more is written into the file.

    Args:
        download: The download.
        ask: Returns a URL. Its argument says whether the last URL was refused before it had
            expired, in which case the client reads its credentials again.

    Raises:
        S3TransferError: If the object cannot be downloaded.
        OSError: If the file cannot be written.
    """
    refused = False
    failures = 0
    while True:
        request = await ask(refused)
        done = download.done_bytes
        try:
            await on_thread(functools.partial(download.run, request), download.cancel)
            return
        except UrlRefusedError:
            failures = failures + 1 if download.done_bytes == done else 1
            if failures == _REFUSALS_IN_A_ROW:
                raise
            refused = time.time() < request.expires_at


async def store(
    upload: Upload, ask: Callable[[Sequence[int], bool], Awaitable[Mapping[int, SignedRequest]]]
) -> list[str]:
    """Run an upload in threads, with as many URLs as it needs.

    Args:
        upload: The upload.
        ask: Returns URLs for the parts with these numbers. Its second argument says whether the
            last URLs were refused before they had expired, in which case the client reads its
            credentials again.

    Returns:
        The ETags of the parts, in order, with which the client completes the upload.

    Raises:
        S3TransferError: If S3 refuses the content.
        OSError: If the file cannot be read.
    """
    refused = False
    failures = 0
    while missing := upload.missing:
        requests = await ask(missing, refused)
        try:
            await on_thread(functools.partial(upload.run, requests), upload.cancel)
        except UrlRefusedError:
            failures = failures + 1 if upload.missing == missing else 1
            if failures == _REFUSALS_IN_A_ROW:
                raise
            refused = all(time.time() < each.expires_at for each in requests.values())
    return upload.etags


class _LocalError(Exception):
    """Wraps an OSError of the local file, to tell it from an OSError of a socket."""


class _AgainError(Exception):
    """A request failed, and may succeed if it is made again."""

    def __init__(self, why: str, *, status: int = 0, code: str = "") -> None:
        super().__init__(why)
        self.status = status
        self.code = code


class _HaltError(Exception):
    """The transfer has stopped meanwhile for another reason, so this request ends."""


class _Transfer(abc.ABC):
    """The common part of downloads and uploads: threads that take pieces of work."""

    _verb = ""

    def __init__(self, *, parallel: int, timeout: float, patience: float) -> None:
        self._parallel = parallel
        self._timeout = timeout
        self._patience = patience
        self._changed = threading.Condition()
        # The attributes below are protected by this condition's lock.
        self._todo: list[Any] = []
        self._running = 0
        self._in_file = 0
        self._halted = False
        self._cancelled = False
        self._error: BaseException | None = None
        self._links: set[Link] = set()
        self._progress_at = 0.0
        # A generator of its own, so that the program's seeded numbers do not change.
        self._random = random.Random()

    def cancel(self) -> None:
        """Stop the transfer for good. Any thread may call this; ``run`` raises S3TransferError."""
        with self._changed:
            self._cancelled = True
        self._stop(S3TransferError(f"the {self._verb} was cancelled", code="Cancelled"))

    def _stop(self, error: BaseException) -> None:
        with self._changed:
            if self._error is None:
                self._error = error
            self._halted = True
            links = list(self._links)
            self._changed.notify_all()
        for link in links:
            link.interrupt()

    def _start(self) -> list[threading.Thread]:
        with self._changed:
            if not self._cancelled:
                self._error = None
                self._halted = False
            self._progress_at = time.monotonic()
            self._running = 0 if self._cancelled else min(self._parallel, len(self._todo))
            count = self._running
        threads = [
            threading.Thread(target=self._work, name=f"cloudexec-s3-{number}", daemon=True)
            for number in range(count)
        ]
        for thread in threads:
            thread.start()
        return threads

    def _finish(self, threads: Sequence[threading.Thread]) -> None:
        with self._changed:
            # Threads that wait for a connection notice the cancellation themselves.
            self._changed.wait_for(
                lambda: not self._running or (self._cancelled and not self._in_file)
            )
            cancelled = self._cancelled
        if not cancelled:
            for thread in threads:
                thread.join()
        with self._changed:
            error = self._error
        if error is not None:
            try:
                raise error
            finally:
                del error

    def _work(self) -> None:
        link = Link(self._timeout)
        with self._changed:
            self._links.add(link)
        try:
            while True:
                with self._changed:
                    if self._halted or not self._todo:
                        return
                    item = self._todo.pop(0)
                self._insist(link, item)
        except _HaltError:
            pass
        except _LocalError as exc:
            self._stop(exc.__cause__ or exc)
        except BaseException as exc:
            self._stop(exc)
        finally:
            link.close()
            with self._changed:
                self._links.discard(link)
                self._running -= 1
                self._changed.notify_all()

    @contextlib.contextmanager
    def _file(self) -> Iterator[None]:
        """Guard a use of the file, which must not be used once the transfer has stopped."""
        with self._changed:
            if self._halted:
                raise _HaltError
            self._in_file += 1
        try:
            yield
        except OSError as exc:
            raise _LocalError from exc
        finally:
            with self._changed:
                self._in_file -= 1
                self._changed.notify_all()

    def _insist(self, link: Link, item: Any) -> None:
        """Repeat a request until it succeeds, or until there was no progress for too long."""
        pause = _FIRST_PAUSE
        tries = 0
        while True:
            tries += 1
            try:
                return self._do(link, item)
            except _AgainError as exc:
                failure = exc
            except ssl.SSLCertVerificationError as exc:
                raise S3TransferError(
                    f"{self._verb}: the server at {link.place} could not prove its identity: "
                    f"{exc}; behind a proxy that opens TLS, AWS_CA_BUNDLE or SSL_CERT_FILE must "
                    "name its certificate",
                    code="Untrusted",
                ) from exc
            except (OSError, http.client.HTTPException) as exc:
                failure = _AgainError(f"{type(exc).__name__}: {exc}", code="Unreachable")
            link.close()
            with self._changed:
                quiet = time.monotonic() - self._progress_at
            if quiet >= self._patience and tries >= _FEWEST_TRIES:
                raise S3TransferError(
                    f"{self._verb} of {link.place}: nothing has moved for {quiet:.0f} s, after "
                    f"{tries} tries; the last said: {failure}; check the way from the worker to S3 "
                    "(NAT gateway or S3 endpoint of its subnet, proxies), or, where S3 asks to "
                    "slow down, use fewer workers at once",
                    status=failure.status,
                    code=failure.code,
                    transient=True,
                ) from failure
            with self._changed:
                wait = pause * self._random.uniform(0.5, 1.0)
                if self._changed.wait_for(lambda: self._halted, wait):
                    raise _HaltError
            pause = min(pause * 2, _LONGEST_PAUSE)

    @abc.abstractmethod
    def _do(self, link: Link, item: Any) -> None:
        """Make the request for one piece of work, once."""

    def _refusal(self, link: Link, response: http.client.HTTPResponse) -> Exception:
        """Return the exception for an unexpected answer."""
        body = response.read(_ERROR_BYTES).decode("utf-8", "replace")
        code = tag(body, "Code")
        said = f"{response.status} {code}: {tag(body, 'Message') or response.reason}"
        what = f"{self._verb} of {link.place}"
        if response.status in _RETRIED_STATUS or code in _RETRIED_CODE:
            return _AgainError(said, status=response.status, code=code)
        if response.status == 403 or code in _REFUSING_CODE:
            return UrlRefusedError(
                f"{what}: S3 refuses the URL: {said}; it has expired, or the credentials that "
                "signed it have, or they may not do this (`cloudexec policy`), or this machine's "
                "clock is wrong",
                status=response.status,
                code=code,
            )
        if code in ("BadDigest", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"):
            return S3DigestError(
                f"{what}: what arrived is not what was announced: {said}",
                status=response.status,
                code=code,
            )
        remedy = {
            "NoSuchKey": "; it has been deleted, or was never sent",
            "NoSuchBucket": "; the bucket does not exist (any more)",
            "NoSuchUpload": "; the upload was ended, or its executor has shut down",
        }.get(code, "")
        if 300 <= response.status < 400:
            remedy = "; the bucket is in another region than the URL says"
        if response.status == 407:
            remedy = "; the proxy wants a password: https_proxy=http://user:password@host:port"
        return S3TransferError(
            f"{what} failed: {said}{remedy}", status=response.status, code=code or "?"
        )


class Download(_Transfer):
    """Downloads one object into a file, by ranges in parallel, and checks its digest.

    Args:
        fd: The file, open for reading and writing.
        size: The object's size in bytes.
        sha256: The object's SHA-256.
        offset: The offset in the file at which the object is written.
        parallel: Number of requests at a time.
        range_bytes: Bytes of one request.
        timeout: Seconds that one send or receive may take.
        patience: Seconds without a byte from any request after which the download fails.
    """

    _verb = "download"

    def __init__(
        self,
        fd: int,
        size: int,
        sha256: bytes,
        *,
        offset: int = 0,
        parallel: int = _PARALLEL,
        range_bytes: int = _RANGE,
        timeout: float = _TIMEOUT,
        patience: float = _PATIENCE,
    ) -> None:
        super().__init__(parallel=parallel, timeout=timeout, patience=patience)
        self._fd = fd
        self._size = size
        self._sha256 = sha256
        self._base = offset
        self._request: SignedRequest | None = None
        self._ranges = [
            [start, min(start + range_bytes, size)] for start in range(0, size, range_bytes)
        ]
        """For each range: the first byte that is missing, and the range's end."""
        self._front = 0
        """The index of the first range with missing bytes."""
        self._hash = hashlib.sha256()
        self._hashed = 0

    @property
    def done_bytes(self) -> int:
        """Number of bytes that are in the file already."""
        with self._changed:
            return self._size - sum(end - start for start, end in self._ranges)

    def run(self, request: SignedRequest) -> None:
        """Download the missing bytes, and check the digest of the whole.

        Two threads must not call this at the same time.

        Args:
            request: The signed request.

        Raises:
            UrlRefusedError: If a fresh URL is needed; the next run keeps the received bytes.
            S3DigestError: If the object has another size or digest.
            S3TransferError: If it cannot be downloaded.
            OSError: If the file cannot be written.
        """
        self._request = request
        self._todo = [each for each in self._ranges if each[0] < each[1]]
        threads = self._start()
        # The file is hashed in order, from the page cache, while the rest is still received.
        try:
            while self._hashed < self._size:
                with self._changed:
                    self._changed.wait_for(
                        lambda: (
                            self._error is not None
                            or self._ready() > self._hashed
                            or not self._running
                        )
                    )
                    ready = self._ready()
                    if self._error is not None or ready == self._hashed:
                        break
                self._hash_to(ready)
        except BaseException as exc:
            self._stop(exc)
        self._finish(threads)
        found = self._hash.digest()
        if found != self._sha256:
            raise S3DigestError(
                f"download: {self._size} bytes came, and they are not those that were sent: "
                f"SHA-256 {found.hex()} instead of {self._sha256.hex()}",
                code="BadDigest",
            )

    def _ready(self) -> int:
        """Return the number of bytes up to the first missing one; the caller holds the lock."""
        ranges = self._ranges
        while self._front < len(ranges) and ranges[self._front][0] == ranges[self._front][1]:
            self._front += 1
        return ranges[self._front][0] if self._front < len(ranges) else self._size

    def _hash_to(self, end: int) -> None:
        while self._hashed < end:
            data = read_at(self._fd, min(_CHUNK, end - self._hashed), self._base + self._hashed)
            self._hash.update(data)
            self._hashed += len(data)

    def _do(self, link: Link, item: Any) -> None:
        assert self._request is not None
        piece: list[int] = item
        first, end = piece
        headers = [*self._request.headers, ("Range", f"bytes={first}-{end - 1}")]
        response = link.request("GET", self._request.url, headers)
        if response.status not in (200, 206):
            raise self._refusal(link, response)
        total = total_size(response)
        if total is not None and total != self._size:
            raise S3DigestError(
                f"download of {link.place}: the object has {total} bytes, not {self._size}",
                status=response.status,
                code="BadDigest",
            )
        if response.status == 200 and (first > 0 or response.length != end):
            raise S3TransferError(
                f"download of {link.place}: what answers does not know ranges; a proxy on the way "
                "may be the cause",
                status=200,
                code="NoRanges",
            )
        buffer = memoryview(bytearray(min(_CHUNK, end - first)))
        while piece[0] < end:
            count = response.readinto(buffer[: end - piece[0]])
            if not count:
                raise _AgainError(f"the answer ended {end - piece[0]} bytes early", code="Short")
            with self._file():
                _write(self._fd, buffer[:count], self._base + piece[0])
            with self._changed:
                piece[0] += count
                self._progress_at = time.monotonic()
                self._changed.notify_all()


class Upload(_Transfer):
    """Uploads a part of a file to S3, divided into parts that are sent in parallel.

    Args:
        fd: The file, open for reading.
        size: Bytes to upload.
        offset: Their offset in the file.
        part_bytes: Size of the parts, as the client has set it.
        parallel: Number of requests at a time.
        timeout: Seconds that one send or receive may take.
        patience: Seconds without a byte from any request after which the upload fails.
    """

    _verb = "upload"

    def __init__(
        self,
        fd: int,
        size: int,
        *,
        offset: int = 0,
        part_bytes: int = PART_BYTES,
        parallel: int = _PARALLEL,
        timeout: float = _TIMEOUT,
        patience: float = _PATIENCE,
    ) -> None:
        super().__init__(parallel=parallel, timeout=timeout, patience=patience)
        self._fd = fd
        self._base = offset
        self._parts = parts_of(size, part_bytes)
        self._etags: dict[int, str] = {}
        self._sent: dict[int, int] = {}
        """By part: the most bytes that one request has sent. Sending fewer is no progress."""
        self._requests: Mapping[int, SignedRequest] = {}

    @property
    def missing(self) -> list[int]:
        """Numbers of the parts that have not been uploaded yet."""
        with self._changed:
            return [part.number for part in self._parts if part.number not in self._etags]

    @property
    def etags(self) -> list[str]:
        """The ETags of the parts, in order; complete when no part is missing."""
        with self._changed:
            return [self._etags[number] for number in sorted(self._etags)]

    def run(self, requests: Mapping[int, SignedRequest]) -> None:
        """Upload the missing parts for which there is a URL.

        Args:
            requests: The signed requests by part number. An object of one part has one PUT request.

        Raises:
            UrlRefusedError: If fresh URLs are needed for the parts that are ``missing``.
            S3TransferError: If S3 refuses the content.
            OSError: If the file cannot be read.
        """
        missing = set(self.missing)
        self._requests = requests
        self._todo = [
            part for part in self._parts if part.number in missing and part.number in requests
        ]
        self._finish(self._start())

    def _do(self, link: Link, item: Any) -> None:
        part: Part = item
        request = self._requests[part.number]
        headers = [*request.headers, ("Content-Length", str(part.length))]
        response = link.request("PUT", request.url, headers, self._pieces(part))
        if response.status != 200:
            raise self._refusal(link, response)
        response.read()
        etag = response.headers.get("ETag", "")
        if not etag:
            raise _AgainError("the answer has no ETag: it may not be S3's", status=200)
        with self._changed:
            self._etags[part.number] = etag
            self._progress_at = time.monotonic()

    def _pieces(self, part: Part) -> Callable[[], bytes]:
        at, end = self._base + part.offset, self._base + part.offset + part.length

        def piece() -> bytes:
            nonlocal at
            if at == end:
                return b""
            with self._file():
                data = read_at(self._fd, min(_SEND, end - at), at)
            at += len(data)
            with self._changed:
                if at > self._sent.get(part.number, 0):
                    self._sent[part.number] = at
                    self._progress_at = time.monotonic()
            return data

        return piece


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(fd, data, offset)
        data = data[done:]
        offset += done
