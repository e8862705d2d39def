"""Moves the content of objects to and from S3 by signed requests, for client and workers.

A worker needs neither the AWS SDK nor AWS permissions, because a signed URL carries the client's
permissions; the client signs its own requests in the same way. A URL expires after its own time, or
with the credentials that signed it. S3 then refuses it, which raises :class:`UrlRefusedError`. A
:class:`Download` or :class:`Upload` keeps its progress, and goes on with fresh URLs when it is run
again. :func:`carry_out` does that; it is given a function that gets URLs. ``run`` blocks, and uses
threads of its own.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import functools
import hashlib
import random
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from typing import Any, TypeAlias

import tenacity
import urllib3

from cloudexec._objects.s3_answers import (
    AgainError,
    S3DigestError,
    S3TransferError,
    UrlRefusedError,
    refusal,
)
from cloudexec._objects.s3_link import Link, Settings, total_size
from cloudexec._transfer import (
    CHUNK,
    PART_BYTES,
    Part,
    SignedRequest,
    Sink,
    Source,
    parts_of,
    piece,
)

__all__ = [
    "Download",
    "S3DigestError",
    "S3TransferError",
    "Settings",
    "Sign",
    "Upload",
    "UrlRefusedError",
    "carry_out",
]

Sign: TypeAlias = Callable[[int], SignedRequest]
"""Returns the signed request for a part of an upload, by its number, or for a download, which has
one for all ranges, with the number 0. It is called in threads of the transfer, and may block."""

_SEND = 256 * 1024
"""Bytes of one send. A slow link must manage this number within the socket's timeout."""
_RECEIVE = 512 * 1024
"""Bytes that are received at a time. The C library would return the memory of larger pieces to the
system after each of them, and getting it back would cost more than half of the time for copying."""
_RANGE = 8 * 1024 * 1024
_FEWEST_TRIES = 3
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
_REFUSALS_IN_A_ROW = 3


async def carry_out(
    transfer: Download | Upload,
    ask: Callable[[UrlRefusedError | None], Awaitable[Sign]],
    on_cancel: Callable[[], object] = lambda: None,
) -> None:
    """Run a transfer in threads, with as many URLs as it needs.

    Once it is cancelled, its source and its sink are not called any more.

    Args:
        transfer: The download or upload.
        ask: Gets fresh URLs, for an upload those of the parts that are ``missing``. Its argument is
            how S3 has refused the last one, or ``None`` if there was none.
        on_cancel: Called if this is cancelled, so that no request is still signed for it.

    Raises:
        S3TransferError: If S3 refuses the transfer, or cannot be reached.
        OSError: If the content cannot be read or written.
    """
    refused: UrlRefusedError | None = None
    failures = 0

    def cancel() -> None:
        try:
            transfer.cancel()
        finally:
            on_cancel()

    while True:
        run = functools.partial(transfer.run, await ask(refused))
        left = transfer.left
        try:
            return await _on_thread(run, cancel)
        except UrlRefusedError as exc:
            failures = failures + 1 if transfer.left == left else 1
            if failures == _REFUSALS_IN_A_ROW:
                raise
            refused = exc


async def _on_thread(run: Callable[[], None], on_cancel: Callable[[], None]) -> None:
    """Call something in a thread, and return only once that call has ended.

    A thread cannot be cancelled, and the caller may use the same file for something else when this
    has returned. The thread is a new one, as the event loop has only a few for all its users.

    Args:
        run: What is called.
        on_cancel: Called if this is cancelled meanwhile, so that ``run`` ends soon.
    """
    done: Future[None] = Future()
    done.set_running_or_notify_cancel()

    def call() -> None:
        try:
            run()
            done.set_result(None)
        except BaseException as exc:
            done.set_exception(exc)

    try:
        threading.Thread(target=call, name="cloudexec-s3", daemon=True).start()
    except RuntimeError as exc:
        raise _no_thread(exc) from exc
    ended = asyncio.wrap_future(done)
    try:
        await asyncio.shield(ended)
    except asyncio.CancelledError:
        try:
            on_cancel()
        finally:
            while not ended.done():
                try:
                    await asyncio.wait([ended])
                except asyncio.CancelledError:
                    pass  # raised below
            ended.exception()
        raise


def _no_thread(exc: RuntimeError) -> S3TransferError:
    return S3TransferError(
        f"no thread can be started for a transfer: {exc}",
        "this machine's memory or its limit of processes (ulimit -u) is used up",
        code="NoThread",
        transient=True,
    )


class _LocalError(Exception):
    """Wraps what the source raises, to tell it from an error of the connection."""


class _HaltError(Exception):
    """The transfer has stopped meanwhile for another reason, so this request ends."""


class _Transfer(abc.ABC):
    """The common part of downloads and uploads: threads that take pieces of work."""

    _verb = ""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._sign: Sign
        self._changed = threading.Condition()
        # The attributes below are protected by this condition's lock.
        self._todo: list[Any] = []
        self._running = 0
        self._in_content = 0
        self._halted = False
        self._cancelled = False
        self._error: BaseException | None = None
        self._links: set[Link] = set()
        self._progress_at = 0.0
        # A generator of its own, so that the program's seeded numbers do not change.
        self._random = random.Random()

    @property
    @abc.abstractmethod
    def left(self) -> int:
        """How much has not been moved yet."""

    def run(self, sign: Sign) -> None:
        """Move what is left. Two threads must not call this at the same time.

        Args:
            sign: Returns the signed requests.

        Raises:
            UrlRefusedError: If fresh URLs are needed; the next run keeps what has been moved.
            S3DigestError: If the content is not what was announced.
            S3TransferError: If it cannot be moved.
            OSError: If it cannot be read or written here.
        """
        self._sign = sign
        threads = self._start()
        try:
            self._follow()
        except BaseException as exc:
            self._stop(exc)
        with self._changed:
            # Threads that wait for a connection notice the cancellation themselves.
            self._changed.wait_for(
                lambda: not self._running or (self._cancelled and not self._in_content)
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
            self._todo = self._missing()
            self._progress_at = time.monotonic()
            self._running = 0 if self._cancelled else min(self._settings.parallel, len(self._todo))
            count = self._running
        threads: list[threading.Thread] = []
        for number in range(count):
            thread = threading.Thread(target=self._work, name=f"cloudexec-s3-{number}", daemon=True)
            try:
                thread.start()
            except RuntimeError as exc:
                with self._changed:
                    self._running -= count - number
                if not threads:
                    raise _no_thread(exc) from exc
                break  # those that were started do everything
            threads.append(thread)
        return threads

    def _work(self) -> None:
        link = Link(self._settings)
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
    def _content(self) -> Iterator[None]:
        """Guard a use of what the caller has given, which must end with the transfer."""
        with self._changed:
            if self._halted:
                raise _HaltError
            self._in_content += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_content -= 1
                if self._halted:  # then ``run`` waits for this
                    self._changed.notify_all()

    def _signed(self, number: int) -> SignedRequest:
        # What signs on an event loop must not be asked any more once the transfer has ended.
        with self._content():
            return self._sign(number)

    def _insist(self, link: Link, item: Any) -> None:
        """Repeat a request until it succeeds, or until there was no progress for too long."""
        patience = self._settings.patience

        def is_hopeless(state: tenacity.RetryCallState) -> bool:
            return state.attempt_number >= _FEWEST_TRIES and self._quiet() >= patience

        def pause(state: tenacity.RetryCallState) -> float:
            failure = state.outcome.exception() if state.outcome is not None else None
            wanted = failure.after if isinstance(failure, AgainError) else 0.0
            own = min(_FIRST_PAUSE * 2.0 ** min(state.attempt_number - 1, 10), _LONGEST_PAUSE)
            return max(own * self._random.uniform(0.5, 1.0), min(wanted, patience))

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(AgainError),
            stop=is_hopeless,
            wait=pause,
            sleep=self._wait,
            reraise=True,
        )
        try:
            retrying(self._try, link, item)
        except AgainError as exc:
            raise S3TransferError(
                f"{self._verb} of {link.place}: nothing has moved for {self._quiet():.0f} s, after "
                f"{retrying.statistics['attempt_number']} tries; the last said: {exc}",
                _remedy(exc.status),
                status=exc.status,
                code=exc.code,
                transient=True,
            ) from exc

    def _quiet(self) -> float:
        with self._changed:
            return time.monotonic() - self._progress_at

    def _wait(self, seconds: float) -> None:
        with self._changed:
            if self._changed.wait_for(lambda: self._halted, seconds):
                raise _HaltError

    def _try(self, link: Link, item: Any) -> None:
        try:
            return self._do(link, item)
        except AgainError as exc:
            failure = exc
        except (urllib3.exceptions.HTTPError, ssl.SSLCertVerificationError) as exc:
            if _is_about_trust(exc):
                raise S3TransferError(
                    f"{self._verb}: the server at {link.place} could not prove its identity: {exc}",
                    "behind a proxy that opens TLS, AWS_CA_BUNDLE or SSL_CERT_FILE must name its "
                    "certificate",
                    code="Untrusted",
                ) from exc
            cause: BaseException = exc
            while cause.__context__ is not None:  # urllib3 wraps errors several times
                cause = cause.__context__
            failure = AgainError(f"{type(exc).__name__}: {cause}", code="Unreachable")
        link.close()
        raise failure

    def _follow(self) -> None:
        """Do what is to be done while the threads work."""

    @abc.abstractmethod
    def _missing(self) -> list[Any]:
        """Return the pieces of work that are left; the caller holds the lock."""

    @abc.abstractmethod
    def _do(self, link: Link, item: Any) -> None:
        """Make the request for one piece of work, once."""


class Download(_Transfer):
    """Downloads one object, by ranges in parallel, and checks its digest.

    Args:
        sink: Takes the content, before the digest is verified.
        source: Returns content that the sink has taken: it is hashed in order, and so no part of it
            has to wait in memory for the part before it.
        size: The object's size in bytes.
        sha256: The object's SHA-256.
        settings: How it is moved.
        range_bytes: Bytes of one request.
    """

    _verb = "download"

    def __init__(
        self,
        sink: Sink,
        source: Source,
        size: int,
        sha256: bytes,
        settings: Settings,
        *,
        range_bytes: int = _RANGE,
    ) -> None:
        super().__init__(settings)
        self._sink = sink
        self._source = source
        self._size = size
        self._sha256 = sha256
        self._ranges = [
            [start, min(start + range_bytes, size)] for start in range(0, size, range_bytes)
        ]
        """For each range: the first byte that is missing, and the range's end."""
        self._front = 0
        """The index of the first range with missing bytes."""
        self._hash = hashlib.sha256()
        self._hashed = 0

    @property
    def left(self) -> int:
        """Number of bytes that have not come yet."""
        with self._changed:
            return sum(end - start for start, end in self._ranges)

    def run(self, sign: Sign) -> None:
        """Download the missing bytes, and check the digest of the whole."""
        super().run(sign)
        found = self._hash.digest()
        if found != self._sha256:
            raise S3DigestError(
                f"download: {self._size} bytes came, and they are not what was sent: "
                f"SHA-256 {found.hex()} instead of {self._sha256.hex()}",
                code="BadDigest",
            )

    def _missing(self) -> list[Any]:
        return [each for each in self._ranges if each[0] < each[1]]

    def _follow(self) -> None:
        """Hash the content in order while the rest is still received."""
        while self._hashed < self._size:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._halted or self._ready() > self._hashed or not self._running
                )
                ready = self._ready()
                if self._halted or ready == self._hashed:
                    return
            while self._hashed < ready:
                data = piece(self._source, self._hashed, min(CHUNK, ready - self._hashed))
                self._hash.update(data)
                self._hashed += len(data)

    def _ready(self) -> int:
        """Return the number of bytes up to the first missing one; the caller holds the lock."""
        ranges = self._ranges
        while self._front < len(ranges) and ranges[self._front][0] == ranges[self._front][1]:
            self._front += 1
        return ranges[self._front][0] if self._front < len(ranges) else self._size

    def _do(self, link: Link, item: Any) -> None:
        stretch: list[int] = item
        first, end = stretch
        request = self._signed(0)
        headers = [*request.headers, ("Range", f"bytes={first}-{end - 1}")]
        response = link.request("GET", request.url, headers)
        if response.status not in (200, 206):
            raise refusal(f"{self._verb} of {link.place}", response, request)
        total = total_size(response)
        if total is not None and total != self._size:
            raise S3DigestError(
                f"download of {link.place}: the object has {total} bytes, not {self._size}",
                status=response.status,
                code="BadDigest",
            )
        if response.status == 200 and (first > 0 or response.length_remaining != end):
            raise S3TransferError(
                f"download of {link.place}: what answers does not know ranges",
                "a proxy on the way may be the cause",
                status=200,
                code="NoRanges",
            )
        while stretch[0] < end:
            data = response.read(min(_RECEIVE, end - stretch[0]), decode_content=False)
            if not data:
                raise AgainError(f"the answer ended {end - stretch[0]} bytes early", code="Short")
            with self._content():
                self._sink(stretch[0], data)
            with self._changed:
                stretch[0] += len(data)
                self._progress_at = time.monotonic()
                self._changed.notify_all()


class Upload(_Transfer):
    """Uploads an object, divided into parts that are sent in parallel.

    Args:
        source: Returns the content.
        size: Bytes to upload.
        settings: How it is moved.
        part_bytes: Size of the parts, as the client has set it.
    """

    _verb = "upload"

    def __init__(
        self,
        source: Source,
        size: int,
        settings: Settings,
        *,
        part_bytes: int = PART_BYTES,
    ) -> None:
        super().__init__(settings)
        self._source = source
        self._parts = parts_of(size, part_bytes)
        self._etags: dict[int, str] = {}
        self._sent: dict[int, int] = {}
        """By part: the most bytes that one request has sent. Sending fewer is no progress."""

    @property
    def missing(self) -> list[int]:
        """Numbers of the parts that have not been uploaded yet."""
        with self._changed:
            return [part.number for part in self._missing()]

    @property
    def left(self) -> int:
        """Number of parts that have not been uploaded yet."""
        return len(self.missing)

    @property
    def etags(self) -> list[str]:
        """The ETags of the parts, in order; complete when no part is missing."""
        with self._changed:
            return [self._etags[number] for number in sorted(self._etags)]

    def _missing(self) -> list[Any]:
        return [part for part in self._parts if part.number not in self._etags]

    def _do(self, link: Link, item: Any) -> None:
        part: Part = item
        request = self._signed(part.number)
        headers = [*request.headers, ("Content-Length", str(part.length))]
        response = link.request("PUT", request.url, headers, self._pieces(part))
        if response.status != 200:
            raise refusal(f"{self._verb} of {link.place}", response, request)
        response.read()
        etag = response.headers.get("ETag", "")
        if not etag:
            raise AgainError("the answer has no ETag: it may not be S3's", status=200)
        with self._changed:
            self._etags[part.number] = etag
            self._progress_at = time.monotonic()

    def _pieces(self, part: Part) -> Iterator[bytes | bytearray | memoryview]:
        for at in range(0, part.length, _SEND):
            with self._content():
                try:
                    data = piece(self._source, part.offset + at, min(_SEND, part.length - at))
                except Exception as exc:
                    raise _LocalError from exc
            yield data
            with self._changed:
                if at + len(data) > self._sent.get(part.number, 0):
                    self._sent[part.number] = at + len(data)
                    self._progress_at = time.monotonic()


def _remedy(status: int) -> str:
    """Say what helps where requests fail again and again, with this status; 0: no answer comes."""
    if status in (429, 503):
        return "S3 asks to slow down: move fewer objects at once, with fewer workers"
    if status >= 500:
        return "S3, or a proxy on the way, has an error of its own: try again later"
    return (
        "check the way to S3: the network, proxies and, for a worker, the NAT gateway or the S3 "
        "endpoint of its subnet"
    )


def _is_about_trust(error: BaseException | None) -> bool:
    """Say whether a connection failed because of the server's certificate."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__context__
    return error is not None
