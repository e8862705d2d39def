"""Requests to S3 about objects under a prefix, without the content of large ones.

A request that fails is repeated for a while.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import tenacity

from cloudexec._aws.clients import AwsClients
from cloudexec._errors import AwsError
from cloudexec._transfer import SignedRequest

__all__ = ["Requests", "Signatures"]

_REQUESTS = 20
"""Requests at a time; the HTTP client has more connections."""
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
            return await retrying(self._once, operation, parameters)
        except AwsError as exc:
            raise self.explained(exc, name) from exc

    async def _once(self, operation: str, parameters: dict[str, Any]) -> Any:
        try:
            async with self._requests, asyncio.timeout(2 * self._stall):
                return await self._clients.call(
                    "s3",
                    operation,
                    region=self.region,
                    once=True,
                    Bucket=self._name,
                    **parameters,
                )
        except TimeoutError as exc:
            raise AwsError(
                f"s3: nothing has moved for {2 * self._stall:g} s; check the network and proxies",
                code="Unreachable",
                operation="s3",
                transient=True,
            ) from exc

    def key(self, name: str) -> str:
        """Return the key of an object."""
        return self._prefix + name

    def explained(self, exc: AwsError, name: str, otherwise: str = "") -> AwsError:
        """Return the error with the object's place, and a remedy.

        Args:
            exc: The error.
            name: The object's name; empty if it is about the bucket.
            otherwise: The remedy if this module knows none.
        """
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
        }.get(exc.code, otherwise)
        return AwsError(
            f"{place}: {exc}" + (f"; {remedy}" if remedy else ""),
            code=exc.code,
            operation=exc.operation,
            transient=exc.transient,
            expired=exc.expired,
        )


class Signatures:
    """Signs the requests of one transfer on the event loop, for the transfer's threads.

    Args:
        sign: Returns what signs the request for a part, by its number. It is called in threads of
            the transfer, and may block.
    """

    def __init__(self, sign: Callable[[int], Coroutine[Any, Any, SignedRequest]]) -> None:
        self._sign = sign
        self._loop = asyncio.get_running_loop()
        self._known: dict[int, SignedRequest] = {}
        self._running: set[asyncio.Task[Any] | None] = set()
        self._is_cancelled = False

    def get(self, number: int) -> SignedRequest:
        """Return a signed request: a range of a download, or a repeated request, gets the same.

        Raises:
            concurrent.futures.CancelledError: If the transfer is cancelled meanwhile.
        """
        found = self._known.get(number)
        if found is None:
            signature = self._unless_cancelled(self._sign(number))
            found = asyncio.run_coroutine_threadsafe(signature, self._loop).result()
            self._known[number] = found
        return found

    async def _unless_cancelled(
        self, signature: Coroutine[Any, Any, SignedRequest]
    ) -> SignedRequest:
        task = asyncio.current_task()
        self._running.add(task)
        try:
            if self._is_cancelled:
                signature.close()
                raise asyncio.CancelledError
            return await signature
        finally:
            self._running.discard(task)

    def forget(self) -> None:
        """Sign anew from now on."""
        self._known.clear()

    def cancel(self) -> None:
        """End what signs, on the event loop: credentials may take long to come."""
        self._is_cancelled = True
        for task in self._running:
            if task is not None:
                task.cancel()
