"""The worker's session with the client: dial, enrol, then tasks in and answers out."""

from __future__ import annotations

import asyncio
import os
import resource
import tempfile
import weakref
import zipfile
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import cloudpickle

from cloudexec import _enrolment
from cloudexec._errors import LaunchError, PayloadError, PayloadTooLargeError, ProtocolError
from cloudexec._logs import LOG_STREAM
from cloudexec._objects.link import Link
from cloudexec._objects.places import Place
from cloudexec._objects.store import Blob
from cloudexec._objects.transfer import code_of, failures, fetch_into, stream_file
from cloudexec._payload import dumps_exception
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._rpc import call_errors, is_end
from cloudexec._wire.channel import (
    BLOB_KEY,
    DELIVERY_TRIES,
    GO_ON_KEY,
    LEASE_KEY,
    PUSHED_BYTES,
    SIZE_KEY,
    TOKEN_KEY,
    pack_chunk,
    unpack_chunk,
)
from cloudexec._wire.stream import Stream
from cloudexec.worker.birth import pull_seconds, seconds_since_start
from cloudexec.worker.blobs import BlobCache, Known
from cloudexec.worker.dialing import Address, dial, shake_hands
from cloudexec.worker.holdings import Holdings, parked
from cloudexec.worker.reporting import ResultBlob
from cloudexec.worker.supervisor import SlotPool
from cloudexec.worker.tasks import KILLED, PICKLE_FAILED, Failure, Terms, WorkItem

if TYPE_CHECKING:
    from cloudexec.worker.bucket import BucketPath

__all__ = ["Session", "introduce"]

_FEW = 4
"""Results that are sent on the spot: a round of the loop would make one wait."""
_BATCH_RESULTS = 2048
_BATCH_BYTES = 512 * 1024
_FAREWELL = 5.0
"""Seconds for which a client that has all is waited for: a platform gives a worker no more time."""
_CUT = ("UNAVAILABLE", "CANCELLED")
"""How a call ends whose connection does."""
_OUTPUT_CREDIT = 1024 * 1024
"""Bytes of output that may be on their way to the client, per worker."""


class Session:
    """What a worker and its client say to each other, over one connection after the other.

    Args:
        address: Of the client.
    """

    def __init__(self, address: Address) -> None:
        self._address = address
        self._channel: Any = None
        self._bucket: BucketPath | None = None
        self._link = Link(enabled=False)
        self._uploads: dict[int, asyncio.Task[None]] = {}  # of what is kept here
        self._call: Any = None
        self._token = b""
        self._stream: Stream[pb.WorkerMessage] = Stream()
        self._connected = asyncio.Event()
        self._calls: weakref.WeakSet[Any] = weakref.WeakSet()  # of transfers, over what there is
        self._started = False
        self._flushing = False
        self._said_goodbye = False
        self.flushed = asyncio.Event()
        """Set when, after ``flush``, the client has all that was to be said."""
        self._acknowledge_handle: asyncio.TimerHandle | None = None
        self._wanted = asyncio.Event()
        self._straight: Any = None  # a plain connection that is ready for answers
        self._leases: list[int] = []
        self._payloads: list[bytes] = []
        self._seconds: list[float] = []
        self._direct: list[int] = []
        self._composed: dict[int, Sequence[pb.Blob]] = {}  # index in the columns -> blobs
        self._taken_here: dict[int, ResultBlob] = {}  # files that the client is to take
        self._own_blobs = 0
        self._kept: list[int] = []  # indexes, as above
        self._sizes: list[int] = []  # of each result, with the parts that go along
        self._bytes = 0  # of all of them
        self._failures: deque[Failure] = deque()
        self._returned: list[int] = []
        self._output: list[tuple[int, int, int, bytes]] = []
        self._credit = _OUTPUT_CREDIT
        self._initializer_failed = b""
        self._heartbeat_due = False
        self._ready = False
        self._groups_changed = False
        self._draining = False
        self._drain_said = False
        self._deliveries: set[asyncio.Task[None]] = set()
        # Leases whose results are on their way in parts: answered, as far as a recall goes.
        self._delivering: set[int] = set()
        self._holdings = Holdings()
        self._says_holdings = False
        self._is_known = asyncio.Event()  # the client knows what is held here for it
        self._is_known.set()
        self.pool: SlotPool | None = None
        self.blobs: BlobCache | None = None
        self.welcome = pb.Welcome()

    def _bind(self, channel: Any) -> None:
        """Make calls over a channel from now on."""
        self._channel = channel
        self._session = channel.stream_stream(
            "/cloudexec.v1.TaskServer/Session",
            request_serializer=pb.WorkerMessage.SerializeToString,
            response_deserializer=pb.ServerMessage.FromString,
        )
        self._fetch = self._ended_with_connection(
            channel.unary_stream(
                "/cloudexec.v1.TaskServer/Fetch",
                request_serializer=pb.FetchRequest.SerializeToString,
                response_deserializer=unpack_chunk,
            )
        )
        self._deliver = self._ended_with_connection(
            channel.stream_unary(
                "/cloudexec.v1.TaskServer/Deliver",
                request_serializer=pack_chunk,
                response_deserializer=pb.DeliverReply.FromString,
            )
        )
        self._locate = self._ended_with_connection(
            channel.unary_unary(
                "/cloudexec.v1.TaskServer/Locate",
                request_serializer=pb.LocateRequest.SerializeToString,
                response_deserializer=pb.Location.FromString,
            )
        )
        self._store = self._ended_with_connection(
            channel.unary_unary(
                "/cloudexec.v1.TaskServer/Store",
                request_serializer=pb.StoreRequest.SerializeToString,
                response_deserializer=pb.StoreReply.FromString,
            )
        )

    def _ended_with_connection(self, method: Any) -> Any:
        """Return a method whose calls end when the connection is lost, and not some time after."""

        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                begun = method(*args, **kwargs)
            except Exception as exc:
                if type(exc).__name__ != "UsageError":  # gRPC's, of a channel that is closed
                    raise
                raise asyncio.InvalidStateError("the connection is closed") from exc
            self._calls.add(begun)
            return begun

        return call

    async def enrol(self, channel: Any) -> None:
        """Prove who we are and check that the server is the right one.

        Args:
            channel: The connection that is to be used from now on.

        Raises:
            ProtocolError: The server is an impostor, or refuses us; the message says why.
            CallError: If the connection fails.
        """
        address = self._address
        is_new = not self._token
        pull = await asyncio.to_thread(pull_seconds) if is_new and address.job_id else 0.0
        hello = pb.Hello(
            wire_version=_enrolment.WIRE_VERSION,
            executor_id=address.executor_id,
            identity=address.identity,
            python_version=_enrolment.python_version(),
            cloudpickle_version=cloudpickle.__version__,
            slots=address.slots,
            pid=os.getpid(),
            job_id=address.job_id,
            attempt=address.attempt,
            boot_seconds=seconds_since_start() if is_new else 0.0,
            pull_seconds=pull,
        )
        before, self._channel = self._channel, None
        if before is not None and before is not channel:
            await before.close()
        self._bind(channel)
        self._call = self._session()
        answer = await shake_hands(
            self._call,
            hello,
            address.key,
            address.shown,
            token=self._token,
            received=self._stream.received,
        )
        if answer.resumed:
            self._stream.arrived(answer.received)
            return
        self._take_welcome(answer.welcome)
        if not is_new:
            self._address.say("another client takes this worker over")
            self._begin_anew()

    def _take_welcome(self, welcome: pb.Welcome) -> None:
        self.welcome = welcome
        self._token = welcome.session_token
        self._link = Link(enabled=welcome.compress)
        self._bucket = None
        if welcome.bucket_threshold:
            from cloudexec.worker.bucket import BucketPath

            metadata = ((TOKEN_KEY, self._token),)
            self._bucket = BucketPath(
                lambda request: self._locate(request, metadata=metadata),
                lambda request: self._store(request, metadata=metadata),
                welcome.bucket_threshold,
                welcome.bucket_part_bytes,
            )

    def _begin_anew(self) -> None:
        """Prepare for a client that has the journal of the one before, and nothing else.

        What runs goes on, if it has a name in the journal; what came of it is said again. All else
        that is here was for a client that is gone.
        """
        pool, blobs = self.pool, self.blobs
        assert pool is not None
        assert blobs is not None
        pending = [*self._stream.missing()]
        while (message := self._compose()) is not None:
            pending.append(message)
        results, failures = parked(pending)
        self._stream = Stream()
        for uploading in self._uploads.values():
            uploading.cancel()
        running = pool.hand_back()
        ended = [*(each[0] for each in results), *(each.lease for each in failures)]
        self._holdings.keep([*running, *self._delivering, *ended])
        for lease, payload, seconds, parts in results:
            if lease in self._holdings:
                if parts:
                    self._composed[len(self._leases)] = parts
                self.result(lease, payload, seconds)
        self._failures.extend(
            Failure(
                each.lease,
                each.kind,
                each.payload,
                message=each.message,
                output=each.output,
                exit_code=each.exit_code,
                peak_memory_bytes=each.peak_memory_bytes,
                seconds=each.seconds,
                out_of_memory=each.out_of_memory,
            )
            for each in failures
            if each.lease in self._holdings
        )
        # What nobody knows any more does not stand in the way of what comes.
        pool.kill([lease for lease in running if lease not in self._holdings], KILLED)
        pool.forget_functions(pool.functions())
        blobs.forget(blobs.all_but(pool.blobs_in_use()))
        self._mind_memory()
        self._own_blobs = 0
        self._credit = _OUTPUT_CREDIT
        pool.resume_output()
        self._ready = pool.has_begun
        self._groups_changed = True
        self._drain_said = False
        self._says_holdings = True
        self._is_known.clear()

    # What the pool answers.

    def result(self, lease: int, payload: bytes, seconds: float) -> None:
        self._leases.append(lease)
        self._payloads.append(payload)
        self._seconds.append(seconds)
        self._sizes.append(len(payload))
        self._bytes += len(payload)

    def delivered(self, lease: int, seconds: float) -> None:
        self._direct.append(len(self._leases))
        self.result(lease, b"", seconds)

    def composed(
        self, lease: int, seconds: float, head: bytes, blobs: Sequence[ResultBlob], *, keep: bool
    ) -> None:
        if keep and self._keep_all(lease, seconds, head, blobs):
            return
        # Also what was to be kept, and there is no room for: the client may have some.
        if self.welcome.direct_path:
            self._report(lease, seconds, head, [self._offer(blob) for blob in blobs])
        elif sum(blob.place.size for blob in blobs) <= PUSHED_BYTES and not self._link.is_slow:
            self._send_along(lease, seconds, head, blobs)
        else:
            self._delivering.add(lease)  # now: a recall may come before the task below begins
            work = self._deliver_all(lease, seconds, head, blobs)
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
            self._report(lease, seconds, head, parts)
            self._sizes[-1] += size
            self._bytes += size
        for blob in blobs:
            self._let_go(blob)

    def _report(self, lease: int, seconds: float, head: bytes, blobs: Sequence[pb.Blob]) -> None:
        self._composed[len(self._leases)] = blobs
        self.result(lease, head, seconds)

    def _number(self) -> int:
        self._own_blobs += 1
        return self.welcome.first_blob + self._own_blobs

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
        assert self.blobs is not None
        kept: list[pb.Blob] = []
        try:
            for blob in blobs:
                kept.append(self._keep(blob))
        except (PayloadError, OSError) as exc:
            if not kept:
                return False
            self.blobs.forget([each.id for each in kept])
            for blob in blobs[len(kept) :]:
                self._let_go(blob)
            self._fail_result(lease, seconds, exc)
            return True
        self._mind_memory()
        self._kept.append(len(self._leases))
        self._report(lease, seconds, head, kept)
        for each in kept:
            self._upload_kept(each.id)
        return True

    def _mind_memory(self) -> None:
        """Have large results go to disk while too much is in memory."""
        assert self.blobs is not None
        assert self.pool is not None
        self.pool.spill(on=self.blobs.is_full)

    def _fail_result(self, lease: int, seconds: float, error: BaseException) -> None:
        """A task's result cannot be had."""
        if isinstance(error, OSError):
            error = PayloadTooLargeError(f"the worker has no room for a result: {error.strerror}")
        payload = dumps_exception(error)
        self.failure(Failure(lease, PICKLE_FAILED, payload, seconds=seconds))
        self.wake()

    def _keep(self, blob: ResultBlob) -> pb.Blob:
        """Keep a part of a result until somebody asks for it, or nobody can any more."""
        assert self.blobs is not None
        number = self._number()
        kept = self.blobs.keep(number, blob.fd, blob.place)
        self._let_go(blob, close=not kept.mappable)
        place = self.blobs.place(number)
        shared = bool(self.welcome.direct_path)
        return pb.Blob(
            id=number,
            number=blob.place.number,
            size=place.size,
            path=place.path if shared else "",
            offset=place.offset,
            mappable=place.mappable,
        )

    def _let_go(self, blob: ResultBlob, *, close: bool = True) -> None:
        assert self.pool is not None
        self.pool.let_go(blob, close=close)

    def failure(self, failure: Failure) -> None:
        self._failures.append(failure)

    def returned(self, lease: int) -> None:
        if lease not in self._delivering:  # else it is answered, though that is still on its way
            self._returned.append(lease)

    def output(self, lease: int, number: int, stream: int, data: bytes) -> bool:
        if not self.welcome.capture_output and stream != LOG_STREAM:
            return True
        self._output.append((lease, number, stream, data))
        self._credit -= len(data)
        return self._credit > 0

    def ready(self) -> None:
        self._ready = True
        self.wake()

    def groups_changed(self) -> None:
        self._groups_changed = True

    def initializer_failed(self, payload: bytes) -> None:
        self._initializer_failed = payload
        self.wake()

    async def load_blob(self, number: int, known: Known, blob: Blob) -> None:
        """Fetch a blob of the client's into a file, from the bucket if it is there.

        Raises:
            PayloadError: If it arrived other than it was sent.
            OSError: If there is no room for it.
            CallError: If the connection fails.
        """
        if known.bucket and self._bucket is not None and await self._bucket.load(number, blob):
            return

        def chunks(offset: int) -> Any:
            request = pb.FetchRequest(blob=number, offset=offset)
            return self._fetch(request, metadata=((TOKEN_KEY, self._token),))

        await fetch_into(blob, chunks, self._is_cut)

    async def fetch_modules(self) -> str:
        """Fetch the user's own modules; return the directory they are in now."""
        request = pb.FetchRequest(modules=True)
        with tempfile.TemporaryFile() as file:
            async for chunk in self._fetch(request, metadata=((TOKEN_KEY, self._token),)):
                file.write(cast("memoryview", chunk))
            directory = tempfile.mkdtemp(prefix="cloudexec-modules-")
            with zipfile.ZipFile(file) as archive:
                archive.extractall(directory)
        return directory

    async def _deliver_all(
        self, lease: int, seconds: float, head: bytes, blobs: Sequence[ResultBlob]
    ) -> None:
        """Send the parts of a result, then report it."""
        try:
            sent: list[pb.Blob] | None = None
            while sent is None:
                token, sent = self._token, []
                for blob in blobs:
                    number = await self._deliver_one(blob.fd, blob.place, lease)
                    if token != self._token:  # those before it went to a client that is gone
                        sent = None
                        break
                    if not number:
                        self._returned.append(lease)  # nobody waits for it
                        return
                    place = blob.place
                    sent.append(pb.Blob(id=number, number=place.number, size=place.size))
            self._report(lease, seconds, head, sent)
        except PayloadError as exc:
            self._fail_result(lease, seconds, exc)
        finally:
            self._delivering.discard(lease)
            for blob in blobs:
                self._let_go(blob)
            self.wake()

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
            await self._connected.wait()
            await self._is_known.wait()
            if token != self._token:
                if kept and token:
                    return 0  # it was for a client that is gone
                token = self._token
                number = number if kept else self._number()
                metadata = (
                    (TOKEN_KEY, token),
                    (BLOB_KEY, str(number)),
                    (SIZE_KEY, str(place.size)),
                    (LEASE_KEY, str(lease)),
                )
            # What is kept goes to the bucket by itself: if it is wanted, that did not work out.
            bucket = None if kept else self._bucket
            call = None
            try:
                at, size = place.offset, place.size
                if bucket is not None and await bucket.store(number, fd, at, size, lease):
                    return number
                call = self._deliver(metadata=metadata)
                # Who writes while he is refused is not told why: the second time, ask first.
                if not attempt or GO_ON_KEY in dict(await call.initial_metadata()):
                    await stream_file(fd, place.offset, place.size, call.write, self._link)
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
                if code == "UNAUTHENTICATED" and token == self._token:
                    return 0
                if code == "RESOURCE_EXHAUSTED":
                    raise PayloadTooLargeError(why, size_bytes=place.size) from exc
                if await self._is_cut(code):
                    continue
            attempt += 1
        raise PayloadError(f"a result of {place.size} bytes could not be delivered: {why}")

    def deliver_kept(self, numbers: Sequence[int]) -> None:
        """Send blobs that are kept here and that the client wants."""

        async def send() -> None:
            assert self.blobs is not None
            for number in numbers:
                kept = self.blobs.kept(number)
                if kept is not None and kept.segment is not None:
                    try:
                        place = self.blobs.place(number)
                        await self._deliver_one(kept.segment.fd, place, number=number)
                    except PayloadError as exc:  # the client knows
                        self._address.say(f"a kept result was not delivered: {exc}")

        task = asyncio.get_running_loop().create_task(send())
        self._deliveries.add(task)
        task.add_done_callback(self._deliveries.discard)

    def _upload_kept(self, number: int) -> None:
        """Put into the bucket what is kept here: there it outlives this worker."""
        assert self.blobs is not None
        bucket, kept = self._bucket, self.blobs.kept(number)
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
        self._uploads[number] = task
        task.add_done_callback(lambda _: self._uploads.pop(number, None))

    def forget_blobs(self, numbers: Sequence[int]) -> None:
        """The client needs blobs no more."""
        assert self.blobs is not None
        for number in numbers:
            uploading = self._uploads.get(number)
            if uploading is not None:
                uploading.cancel()
        self.blobs.forget(numbers)
        self._mind_memory()

    def taken(self, numbers: Sequence[int]) -> None:
        """The client has taken parts of results, or needs no more of what is kept here."""
        assert self.blobs is not None
        for number in numbers:
            blob = self._taken_here.pop(number, None)
            if blob is not None:
                self._let_go(blob)
        self.blobs.claimed(numbers)

    def wake(self) -> None:
        frames = self._straight
        # The client is told that a slot is ready by the one who then lets it begin.
        many = self._flushing or self._ready or len(self._leases) > _FEW
        if frames is None or many or not frames.is_writable:
            self._wanted.set()
        elif (message := self._compose()) is not None:
            frames.send_now(message.SerializeToString())
        else:
            self._wanted.set()

    # The stream.

    def _compose(self) -> pb.WorkerMessage | None:
        pool = self.pool
        message = pb.WorkerMessage()
        some = False
        if self._says_holdings:
            self._says_holdings = False
            message.holding.CopyFrom(self._holdings.message())
            some = True
        if self._output:
            for lease, number, stream, data in self._output[:_BATCH_RESULTS]:
                message.output.add(lease=lease, number=number, stream=stream, data=data)
            del self._output[:_BATCH_RESULTS]
            if self._output:
                self._wanted.set()
            some = True
        if self._leases:
            results = message.results
            if len(self._leases) <= _BATCH_RESULTS and self._bytes <= _BATCH_BYTES:
                count = len(self._leases)
                self._bytes = 0
            else:
                count = size = 0
                for each in self._sizes:
                    count += 1
                    size += each
                    if count >= _BATCH_RESULTS or size >= _BATCH_BYTES:
                        break
                self._bytes -= size
                self._wanted.set()
            results.leases.extend(self._leases[:count])
            results.payloads.extend(self._payloads[:count])
            results.seconds.extend(self._seconds[:count])
            if self._direct:
                results.direct.extend(i for i in self._direct if i < count)
                self._direct = [i - count for i in self._direct if i >= count]
            if self._composed:
                later = {}
                for index, blobs in self._composed.items():
                    if index < count:
                        results.composed.append(index)
                        results.blob_counts.append(len(blobs))
                        results.blobs.extend(blobs)
                    else:
                        later[index - count] = blobs
                self._composed = later
                results.kept.extend(i for i in self._kept if i < count)
                self._kept = [i - count for i in self._kept if i >= count]
            del self._leases[:count], self._payloads[:count], self._seconds[:count]
            del self._sizes[:count]
            some = True
        size = 0
        while self._failures and size < _BATCH_BYTES and len(message.failures) < _BATCH_RESULTS:
            failure = self._failures.popleft()
            size += len(failure.payload)
            message.failures.add(
                lease=failure.lease,
                kind=cast("pb.Failure.Kind.ValueType", failure.kind),
                payload=failure.payload,
                message=failure.message,
                output=failure.output,
                exit_code=failure.exit_code,
                peak_memory_bytes=failure.peak_memory_bytes,
                seconds=failure.seconds,
                out_of_memory=failure.out_of_memory,
            )
            some = True
        if self._failures:
            self._wanted.set()
        if self._returned and not (self._leases or self._failures):
            # Behind all answers: some of these may be among them, and then were not returned.
            message.returned.extend(self._returned)
            self._returned.clear()
            some = True
        if pool is not None:
            started = pool.started()
            if started:
                message.started.extend(started)
                some = True
        if self._initializer_failed:
            message.initializer_failed = self._initializer_failed
            self._initializer_failed = b""
            some = True
        if self._ready:
            self._ready = False
            message.ready = True
            some = True
        if some and self._groups_changed and pool is not None:
            self._groups_changed = False
            message.slot_groups.extend(pool.groups())
        if self._draining and not self._drain_said:
            self._drain_said = True
            message.draining = True
            some = True
        return message if some else None

    async def converse(self, ends: asyncio.Queue[str]) -> str:
        """Exchange messages until the session ends; say how it ended.

        A connection that is cut is replaced, for as long as the client may stay away: what runs
        here goes on meanwhile.

        Args:
            ends: Where a request to drain goes: the session goes on until that is done.

        Raises:
            Exception: A bug of ours.
        """
        loop = asyncio.get_running_loop()
        while True:
            self._connected.set()
            receiving = loop.create_task(self._receive(ends))
            sending = loop.create_task(self._send())
            both = (receiving, sending)
            try:
                done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if done == {sending} and self._said_goodbye:
                    # The client closes its half once it has read all: to hang up before may
                    # overtake what is on its way. Nothing is, if all was acknowledged.
                    # Otherwise it may be stopped for a while, as a program may be.
                    most = _FAREWELL if self.welcome.resumable else self.welcome.orphan_timeout
                    await asyncio.wait({receiving}, timeout=most)
            finally:
                for task in both:
                    task.cancel()
                outcomes = await asyncio.gather(*both, return_exceptions=True)
            errors = [each for each in outcomes if isinstance(each, Exception)]
            for error in errors:
                if not isinstance(error, call_errors(asyncio.InvalidStateError)):
                    raise error
            if isinstance(outcomes[0], str):
                if self._said_goodbye:
                    self.flushed.set()
                return outcomes[0]
            if not self.welcome.resumable:
                return "disconnected"
            if self._said_goodbye:
                self.flushed.set()  # it was acknowledged before
                return "closed"
            self._connected.clear()
            # Those that wait until this channel connects would wait for ever once it is closed.
            for call in list(self._calls):
                call.cancel()
            patience = self.welcome.orphan_timeout
            self._address.say(f"the connection was lost; dialing again, for {patience:g} s")
            try:
                await dial(self._address, self.enrol, patience)
            except LaunchError as exc:
                self._address.say(str(exc))
                return "orphaned"
            except ProtocolError as exc:
                self._address.say(str(exc))
                return "gone"
            self._address.say("connected again")

    async def _send(self) -> None:
        """Send answers as they come, in batches as large as the stream makes them.

        What was sent over an earlier connection, and may not have arrived, comes first.
        """
        stream, resumable = self._stream, self.welcome.resumable
        for sent in stream.missing():
            await self._call.write(sent)
        self._wanted.set()
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            message = self._compose()
            if message is not None:
                if resumable:
                    stream.stamp(message)
                await self._call.write(message)
                if message.ready and self.pool is not None:
                    self.pool.announced()
            elif self._heartbeat_due or stream.owes:
                await self._call.write(self._sign_of_life())
            elif self._flushing and stream.is_clear:
                await self._call.write(pb.WorkerMessage(goodbye=True))
                await self._call.done_writing()
                self._said_goodbye = True
                return
            else:
                continue
            if self._flushing:
                self._wanted.set()  # until there is nothing more to write

    def _sign_of_life(self) -> pb.WorkerMessage:
        """Return what need not arrive."""
        message = pb.WorkerMessage()
        self._stream.acknowledge(message)
        if self._heartbeat_due and self.pool is not None:
            self._heartbeat_due = False
            message.heartbeat.resident_bytes = (
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            )
            message.heartbeat.running = self.pool.running
            message.heartbeat.queued = self.pool.queued
        return message

    async def flush(self) -> None:
        """Send what is left, large results included, and close our half of the stream.

        ``flushed`` is set when all of it has arrived.
        """
        if self._deliveries:
            await asyncio.wait(set(self._deliveries))
        self._flushing = True
        self._wanted.set()

    async def beat(self) -> None:
        """Send a heartbeat now and then: the supervisor lives, whatever its tasks do."""
        interval = self.welcome.heartbeat_interval or 10.0
        while True:
            await asyncio.sleep(interval)
            if self.pool is not None:
                self.pool.audit()
            self._heartbeat_due = True
            self.wake()

    async def _receive(self, ends: asyncio.Queue[str]) -> str:
        """Take messages until the client ends the session; say how it ended."""
        pool, blobs = self.pool, self.blobs
        assert pool is not None
        assert blobs is not None
        if not self._started:
            first = (*self.welcome.initializer_blobs, *self.welcome.function_blobs)
            await blobs.ready([blob.id for blob in first])
            self._started = True
            pool.start()
        call = self._call
        if (frames := getattr(call, "frames", None)) is not None:
            frames.at_once = self._take_at_once
            self._straight = frames
        while True:
            message = await call.read()
            if is_end(message):
                return "closed"
            if not self._is_news(message):
                continue
            self._take(message)
            if message.terminate:
                return "terminate"
            if message.drain:
                ends.put_nowait("drain")

    def _take_at_once(self, data: bytes) -> bool:
        """Take a message as it comes over a plain connection; False: it is to be read."""
        message = pb.ServerMessage.FromString(data)
        if message.terminate or message.drain:
            return False
        self._take(message)
        return True

    def _take(self, message: pb.ServerMessage) -> None:
        """Take a message, but for what ends the session."""
        pool, blobs = self.pool, self.blobs
        assert pool is not None
        assert blobs is not None
        if message.blobs:
            introduce(blobs, message.blobs)
        if message.functions:
            pool.add_functions(message.functions)
        if message.HasField("tasks"):
            if message.tasks.tags:
                self._note_tags(message.tasks)
            pool.add(_items(message.tasks))
        if message.recall:
            pool.recall(list(message.recall))
        if message.kill:
            pool.kill(list(message.kill), KILLED)
        if message.forget_functions:
            pool.forget_functions(list(message.forget_functions))
        if message.forget_blobs:
            self.forget_blobs(message.forget_blobs)
        if message.taken:
            self.taken(message.taken)
        if message.wanted:
            self.deliver_kept(list(message.wanted))
        if message.output_credit:
            self._credit += message.output_credit
            if self._credit > 0:
                pool.resume_output()

    def _note_tags(self, tasks: pb.Tasks) -> None:
        assert self.pool is not None
        self._holdings.take(tasks)
        if self._holdings.is_full:
            results, failures = parked(self._stream.missing())
            said = [*(each[0] for each in results), *(each.lease for each in failures)]
            here = [*self.pool.leases(), *self._delivering, *self._leases, *tasks.leases]
            here.extend(failure.lease for failure in self._failures)
            self._holdings.keep([*said, *here])

    def _is_news(self, message: pb.ServerMessage) -> bool:
        """Take note of a message's number; say whether it is to be read."""
        stream = self._stream
        try:
            is_news = stream.take(message)
        except ValueError as exc:
            raise ProtocolError(f"the client's messages are out of order: {exc}") from exc
        if stream.has_begun:
            self._is_known.set()
        if self._flushing and stream.is_clear:
            self._wanted.set()
        pause = stream.acknowledge_within
        if pause == 0:
            self._wanted.set()
        elif pause is not None and self._acknowledge_handle is None:
            loop = asyncio.get_running_loop()
            self._acknowledge_handle = loop.call_later(pause, self._acknowledge)
        return is_news

    def _acknowledge(self) -> None:
        self._acknowledge_handle = None
        if self._stream.owes:
            self._wanted.set()

    async def _is_cut(self, code: str) -> bool:
        """Say whether a call failed because of its connection, once there is another one."""
        if not (self.welcome.resumable and code in _CUT):
            return False
        await asyncio.sleep(0.2)  # the session's own stream may not have noticed yet
        await self._connected.wait()
        return True

    async def close(self) -> None:
        """Close the connection."""
        if self._acknowledge_handle is not None:
            self._acknowledge_handle.cancel()
        background = [*self._uploads.values(), *self._deliveries]
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        if self._channel is not None:
            await self._channel.close()

    def start_draining(self) -> None:
        """Tell the client to send nothing more."""
        self._draining = True
        self.wake()


def _items(tasks: pb.Tasks) -> list[WorkItem]:
    leases = list(tasks.leases)
    items = list(
        map(
            WorkItem,
            leases,
            tasks.functions,
            tasks.payloads,
            tasks.numbers,
            tasks.estimates,
        )
    )
    if tasks.timeouts:
        for item, timeout in zip(items, tasks.timeouts, strict=True):
            item.timeout = timeout
    at = 0
    for index, count in zip(tasks.composed, tasks.blob_counts, strict=True):
        items[index].blobs = tuple(tasks.blobs[at : at + count])
        at += count
    for index in tasks.kept:
        items[index].keep = True
    for terms in tasks.terms:
        items[terms.index].terms = Terms(dict(terms.env), terms.memory_bytes, terms.last)
    return items


def introduce(cache: BlobCache, blobs: Sequence[pb.Blob]) -> None:
    """Tell the cache of blobs that the client announced."""
    for blob in blobs:
        place = None
        if blob.path:
            place = Place(blob.id, blob.size, blob.path, blob.offset, mappable=blob.mappable)
        cache.introduce(
            blob.id,
            blob.size,
            place,
            bucket=blob.bucket,
        )
        if blob.content:
            cache.take(blob.id, blob.content)
