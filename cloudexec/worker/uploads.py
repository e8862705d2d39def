"""Sends large results to the client, or keeps them here until the client wants them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from cloudexec._errors import PayloadError, PayloadTooLargeError
from cloudexec._objects.places import Place
from cloudexec._objects.transfer import code_of, failures, stream_file
from cloudexec._payload import dumps_exception
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._rpc import call_errors
from cloudexec._wire.channel import (
    BLOB_KEY,
    DELIVERY_TRIES,
    GO_ON_KEY,
    LEASE_KEY,
    PUSHED_BYTES,
    SIZE_KEY,
    TOKEN_KEY,
)
from cloudexec.worker.blobs import BlobCache
from cloudexec.worker.calls import Calls
from cloudexec.worker.outbox import Outbox
from cloudexec.worker.reporting import ResultBlob
from cloudexec.worker.supervisor import SlotPool
from cloudexec.worker.tasks import PICKLE_FAILED, Failure

__all__ = ["Uploads"]


class Uploads:
    """Sends large results, or tells the client where to find them.

    Args:
        calls: Makes calls to the client.
        outbox: Takes the reports of results.
        pool: The slots that made the results.
        blobs: Keeps the parts of results that stay here.
        say: Writes a line to the worker's log.
    """

    def __init__(
        self,
        calls: Calls,
        outbox: Outbox,
        pool: SlotPool,
        blobs: BlobCache,
        say: Callable[[str], None],
    ) -> None:
        self._calls = calls
        self._outbox = outbox
        self._pool = pool
        self._blobs = blobs
        self._say = say
        self._is_shared = False  # whether the client is on this machine and can open our files
        self._first_number = 0
        self._own_blobs = 0
        self._taken_here: dict[int, ResultBlob] = {}  # parts whose files the client will open
        self._deliveries: set[asyncio.Task[None]] = set()
        self._bucket_uploads: dict[int, asyncio.Task[None]] = {}  # by number: of kept parts
        self._may_deliver = asyncio.Event()
        self._may_deliver.set()

    def take_welcome(self, welcome: pb.Welcome) -> None:
        """Take from the client's first message how it receives large results."""
        self._is_shared = bool(welcome.direct_path)
        self._first_number = welcome.first_blob
        self._own_blobs = 0
        for uploading in self._bucket_uploads.values():
            uploading.cancel()

    def allow(self, *, yes: bool) -> None:
        """Allow deliveries, or hold them back until the client knows this worker's tasks."""
        if yes:
            self._may_deliver.set()
        else:
            self._may_deliver.clear()

    def composed(
        self, lease: int, seconds: float, head: bytes, blobs: Sequence[ResultBlob], *, keep: bool
    ) -> None:
        """Report a result that is in files, at once or after its parts have been sent.

        Args:
            lease: The task's lease.
            seconds: Seconds that the task ran.
            head: The result's head, which refers to its parts.
            blobs: The parts.
            keep: Whether the parts stay here.
        """
        if keep and self._keep_all(lease, seconds, head, blobs):
            return
        # This includes results that should stay here but do not fit: the client may have room.
        is_small = sum(blob.place.size for blob in blobs) <= PUSHED_BYTES
        if self._is_shared:
            parts = [self._offer(blob) for blob in blobs]
            self._outbox.result_in_parts(lease, head, seconds, parts)
        elif is_small and not self._calls.link.is_slow:
            self._send_along(lease, seconds, head, blobs)
        else:
            self._outbox.promise(lease)  # now, as a recall may come before the delivery begins
            self._begin(self._deliver_all(lease, seconds, head, blobs))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._deliveries.add(task)
        task.add_done_callback(self._deliveries.discard)

    def _send_along(
        self, lease: int, seconds: float, head: bytes, blobs: Sequence[ResultBlob]
    ) -> None:
        """Report a result together with all its parts, which are small."""
        parts, size = [], 0
        try:
            for blob in blobs:
                place = blob.place
                content = os.pread(blob.fd, place.size, place.offset)
                size += len(content)
                number = self._number()
                parts.append(
                    pb.Blob(id=number, number=place.number, size=place.size, content=content)
                )
        except OSError as exc:
            self._fail_result(lease, seconds, exc)
        else:
            self._outbox.result_in_parts(lease, head, seconds, parts, size=size)
        for blob in blobs:
            self._pool.let_go(blob)

    def _number(self) -> int:
        self._own_blobs += 1
        return self._first_number + self._own_blobs

    def _offer(self, blob: ResultBlob) -> pb.Blob:
        """Let the client, which is on this machine, open the file of a part of a result."""
        number = self._number()
        self._taken_here[number] = blob
        place = blob.place
        return pb.Blob(
            id=number,
            number=place.number,
            size=place.size,
            path=place.shared_path(blob.fd),
            offset=place.offset,
            mappable=place.mappable,
        )

    def _keep_all(
        self, lease: int, seconds: float, head: bytes, blobs: Sequence[ResultBlob]
    ) -> bool:
        """Keep a result and report it; return false if there is no room for it."""
        kept: list[pb.Blob] = []
        try:
            for blob in blobs:
                kept.append(self._keep(blob))
        except (PayloadError, OSError) as exc:
            if not kept:
                return False
            self._blobs.forget([each.id for each in kept])
            for blob in blobs[len(kept) :]:
                self._pool.let_go(blob)
            self._fail_result(lease, seconds, exc)
            return True
        self.mind_memory()
        self._outbox.result_in_parts(lease, head, seconds, kept, keep=True)
        for each in kept:
            self._upload_kept(each.id)
        return True

    def mind_memory(self) -> None:
        """Let slots write large results to disk while too many bytes are in memory."""
        self._pool.spill(on=self._blobs.is_full)

    def _fail_result(self, lease: int, seconds: float, error: BaseException) -> None:
        """Fail a task whose result cannot be delivered."""
        if isinstance(error, OSError):
            error = PayloadTooLargeError(f"the worker has no room for a result: {error.strerror}")
        payload = dumps_exception(error)
        self._outbox.failure(Failure(lease, PICKLE_FAILED, payload, seconds=seconds))
        self._outbox.wake()

    def _keep(self, blob: ResultBlob) -> pb.Blob:
        """Keep a part of a result until the client has taken it, or does not need it any more."""
        number = self._number()
        kept = self._blobs.keep(number, blob.fd, blob.place)
        self._pool.let_go(blob, close=not kept.mappable)
        place = self._blobs.place(number)
        return pb.Blob(
            id=number,
            number=blob.place.number,
            size=place.size,
            path=place.path if self._is_shared else "",
            offset=place.offset,
            mappable=place.mappable,
        )

    async def _deliver_all(
        self, lease: int, seconds: float, head: bytes, blobs: Sequence[ResultBlob]
    ) -> None:
        """Send the parts of a result, then report it."""
        is_wanted = True
        try:
            sent: list[pb.Blob] | None = None
            while sent is None:
                token, sent = self._calls.token, []
                for blob in blobs:
                    number = await self._deliver_one(blob.fd, blob.place, lease)
                    if token != self._calls.token:  # earlier parts went to a client that is gone
                        sent = None
                        break
                    if not number:
                        is_wanted = False  # the client does not wait for this result
                        return
                    place = blob.place
                    sent.append(pb.Blob(id=number, number=place.number, size=place.size))
            self._outbox.result_in_parts(lease, head, seconds, sent)
        except PayloadError as exc:
            self._fail_result(lease, seconds, exc)
        finally:
            self._outbox.end_promise(lease, is_wanted=is_wanted)
            for blob in blobs:
                self._pool.let_go(blob)
            self._outbox.wake()

    async def _deliver_one(self, fd: int, place: Place, lease: int = 0, number: int = 0) -> int:
        """Send a part of a result, and send it again if it arrives damaged.

        Args:
            fd: The file that it is in.
            place: The place in the file.
            lease: The task's lease; 0 for a part that is kept here.
            number: The part's number, if it has one.

        Returns:
            The part's number; 0 if the client does not want it.

        Raises:
            PayloadTooLargeError: If the client has no room for it.
            PayloadError: If it cannot be delivered.
        """
        why, token, kept = "", b"", bool(number)
        attempt = 0
        while attempt < DELIVERY_TRIES:
            await asyncio.sleep(0.1 * attempt)
            await self._calls.connected.wait()
            await self._may_deliver.wait()
            if token != self._calls.token:
                if kept and token:
                    return 0  # the client that wanted it is gone
                token = self._calls.token
                number = number if kept else self._number()
                metadata = (
                    (TOKEN_KEY, token),
                    (BLOB_KEY, str(number)),
                    (SIZE_KEY, str(place.size)),
                    (LEASE_KEY, str(lease)),
                )
            # Kept parts are uploaded to the bucket anyway. The client asks for one here only if
            # that has failed.
            bucket = None if kept else self._calls.bucket
            call = None
            try:
                at, size = place.offset, place.size
                if bucket is not None and await bucket.store(number, fd, at, size, lease):
                    return number
                call = self._calls.deliver(metadata=metadata)
                # If a call is refused while this side writes, the reason is lost. So the second try
                # waits for permission first.
                if not attempt or GO_ON_KEY in dict(await call.initial_metadata()):
                    await stream_file(fd, place.offset, place.size, call.write, self._calls.link)
                    await call.done_writing()
                return number if (await call).accepted else 0
            except OSError as exc:
                why = f"it cannot be read: {exc.strerror}"
                if call is not None:
                    call.cancel()
            except failures() as exc:
                why, code = str(exc), code_of(exc)
                if call is not None:
                    why, code = await call.details(), await call.code()
                    code = code if isinstance(code, str) else code.name
                if code == "UNAUTHENTICATED" and token == self._calls.token:
                    return 0
                if code == "RESOURCE_EXHAUSTED":
                    raise PayloadTooLargeError(why, size_bytes=place.size) from exc
                if await self._calls.is_cut(code):
                    continue
            attempt += 1
        raise PayloadError(f"a result of {place.size} bytes could not be delivered: {why}")

    def deliver_kept(self, numbers: Sequence[int]) -> None:
        """Send kept blobs that the client asks for."""

        async def send() -> None:
            for number in numbers:
                kept = self._blobs.kept(number)
                if kept is not None and kept.segment is not None:
                    try:
                        place = self._blobs.place(number)
                        await self._deliver_one(kept.segment.fd, place, number=number)
                    except PayloadError as exc:  # the client knows of it, too
                        self._say(f"a kept result was not delivered: {exc}")

        self._begin(send())

    def _upload_kept(self, number: int) -> None:
        """Upload a kept blob to the bucket, where it remains available when this worker ends."""
        bucket, kept = self._calls.bucket, self._blobs.kept(number)
        if bucket is None or kept is None or not bucket.takes(kept.size):
            return

        async def upload() -> None:
            assert kept is not None
            assert kept.segment is not None
            try:
                fd, offset = kept.segment.fd, kept.offset
                await bucket.store(number, fd, offset, kept.size)
            except call_errors(OSError, asyncio.InvalidStateError):
                pass  # the blob is still kept here

        task = asyncio.get_running_loop().create_task(upload())
        self._bucket_uploads[number] = task
        task.add_done_callback(lambda _: self._bucket_uploads.pop(number, None))

    def forget_blobs(self, numbers: Sequence[int]) -> None:
        """Drop blobs that the client does not need any more."""
        for number in numbers:
            uploading = self._bucket_uploads.get(number)
            if uploading is not None:
                uploading.cancel()
        self._blobs.forget(numbers)
        self.mind_memory()

    def taken(self, numbers: Sequence[int]) -> None:
        """Note that the client has taken parts of results, or does not need kept ones any more."""
        for number in numbers:
            blob = self._taken_here.pop(number, None)
            if blob is not None:
                self._pool.let_go(blob)
        self._blobs.claimed(numbers)

    async def wait_for_deliveries(self) -> None:
        """Wait until all results that are being sent have been sent."""
        if self._deliveries:
            await asyncio.wait(set(self._deliveries))

    async def close(self) -> None:
        """Cancel the results that are being sent."""
        background = [*self._bucket_uploads.values(), *self._deliveries]
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
