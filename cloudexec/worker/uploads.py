"""Large results on their way to the client, or kept here until it wants them."""

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
    """Sends large results, or says where the client finds them.

    Args:
        calls: To the client.
        outbox: Where results are reported.
        pool: Whose results they are.
        blobs: Where those are that are kept here.
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
        self._is_shared = False  # the client can open our files
        self._first_number = 0
        self._own_blobs = 0
        self._taken_here: dict[int, ResultBlob] = {}  # files that the client is to take
        self._deliveries: set[asyncio.Task[None]] = set()
        self._bucket_uploads: dict[int, asyncio.Task[None]] = {}  # of what is kept here
        self._may_deliver = asyncio.Event()
        self._may_deliver.set()

    def take_welcome(self, welcome: pb.Welcome) -> None:
        """Learn how this client takes large results."""
        self._is_shared = bool(welcome.direct_path)
        self._first_number = welcome.first_blob
        self._own_blobs = 0
        for uploading in self._bucket_uploads.values():
            uploading.cancel()

    def allow(self, *, yes: bool) -> None:
        """Say whether the client knows what is held here for it: it takes nothing before."""
        if yes:
            self._may_deliver.set()
        else:
            self._may_deliver.clear()

    def composed(
        self, lease: int, seconds: float, head: bytes, blobs: Sequence[ResultBlob], *, keep: bool
    ) -> None:
        """Report a result that is in files, at once or when it has been sent.

        Args:
            lease: Of the task.
            seconds: That it ran.
            head: Of the result, which refers to its parts.
            blobs: The parts.
            keep: Whether they are to stay here.
        """
        if keep and self._keep_all(lease, seconds, head, blobs):
            return
        # Also what was to be kept, and there is no room for: the client may have some.
        is_small = sum(blob.place.size for blob in blobs) <= PUSHED_BYTES
        if self._is_shared:
            parts = [self._offer(blob) for blob in blobs]
            self._outbox.result_in_parts(lease, head, seconds, parts)
        elif is_small and not self._calls.link.is_slow:
            self._send_along(lease, seconds, head, blobs)
        else:
            self._outbox.promise(lease)  # now: a recall may come before the task below begins
            self._begin(self._deliver_all(lease, seconds, head, blobs))

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._deliveries.add(task)
        task.add_done_callback(self._deliveries.discard)

    def _send_along(
        self, lease: int, seconds: float, head: bytes, blobs: Sequence[ResultBlob]
    ) -> None:
        """Report a result with all its parts: they are small."""
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
        """Leave a part of a result for the client to open, on the machine that we share."""
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
        """Keep a result and report it; say whether that is settled: there may be no room."""
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
        """Have large results go to disk while too much is in memory."""
        self._pool.spill(on=self._blobs.is_full)

    def _fail_result(self, lease: int, seconds: float, error: BaseException) -> None:
        """A task's result cannot be had."""
        if isinstance(error, OSError):
            error = PayloadTooLargeError(f"the worker has no room for a result: {error.strerror}")
        payload = dumps_exception(error)
        self._outbox.failure(Failure(lease, PICKLE_FAILED, payload, seconds=seconds))
        self._outbox.wake()

    def _keep(self, blob: ResultBlob) -> pb.Blob:
        """Keep a part of a result until somebody asks for it, or nobody can any more."""
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
                    if token != self._calls.token:  # those before it went to a client that is gone
                        sent = None
                        break
                    if not number:
                        is_wanted = False  # nobody waits for it
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
        """Send a blob, more than once if it is damaged on the way.

        Args:
            fd: The file that it is in.
            place: Where in it.
            lease: Of the task whose result it is a part of; 0: it is one that is kept here.
            number: Its number, if it has one.

        Returns:
            Its number; 0: it was not wanted.

        Raises:
            PayloadTooLargeError: If the client has no room for it.
            PayloadError: If it does not get there.
        """
        why, token, kept = "", b"", bool(number)
        attempt = 0
        while attempt < DELIVERY_TRIES:
            await asyncio.sleep(0.1 * attempt)
            await self._calls.connected.wait()
            await self._may_deliver.wait()
            if token != self._calls.token:
                if kept and token:
                    return 0  # it was for a client that is gone
                token = self._calls.token
                number = number if kept else self._number()
                metadata = (
                    (TOKEN_KEY, token),
                    (BLOB_KEY, str(number)),
                    (SIZE_KEY, str(place.size)),
                    (LEASE_KEY, str(lease)),
                )
            # What is kept goes to the bucket by itself: if it is wanted, that did not work out.
            bucket = None if kept else self._calls.bucket
            call = None
            try:
                at, size = place.offset, place.size
                if bucket is not None and await bucket.store(number, fd, at, size, lease):
                    return number
                call = self._calls.deliver(metadata=metadata)
                # Who writes while he is refused is not told why: the second time, ask first.
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
        """Send blobs that are kept here and that the client wants."""

        async def send() -> None:
            for number in numbers:
                kept = self._blobs.kept(number)
                if kept is not None and kept.segment is not None:
                    try:
                        place = self._blobs.place(number)
                        await self._deliver_one(kept.segment.fd, place, number=number)
                    except PayloadError as exc:  # the client knows
                        self._say(f"a kept result was not delivered: {exc}")

        self._begin(send())

    def _upload_kept(self, number: int) -> None:
        """Put into the bucket what is kept here: there it outlives this worker."""
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
                pass  # it is here as before

        task = asyncio.get_running_loop().create_task(upload())
        self._bucket_uploads[number] = task
        task.add_done_callback(lambda _: self._bucket_uploads.pop(number, None))

    def forget_blobs(self, numbers: Sequence[int]) -> None:
        """The client needs blobs no more."""
        for number in numbers:
            uploading = self._bucket_uploads.get(number)
            if uploading is not None:
                uploading.cancel()
        self._blobs.forget(numbers)
        self.mind_memory()

    def taken(self, numbers: Sequence[int]) -> None:
        """The client has taken parts of results, or needs no more of what is kept here."""
        for number in numbers:
            blob = self._taken_here.pop(number, None)
            if blob is not None:
                self._pool.let_go(blob)
        self._blobs.claimed(numbers)

    async def wait_for_deliveries(self) -> None:
        """Wait until all results that are on their way have been sent."""
        if self._deliveries:
            await asyncio.wait(set(self._deliveries))

    async def close(self) -> None:
        """Give up what is on its way."""
        background = [*self._bucket_uploads.values(), *self._deliveries]
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
