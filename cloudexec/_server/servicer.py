"""Messages of workers <-> events and commands. Decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from google.protobuf.message import DecodeError, Message

from cloudexec import _enrolment, _nesting, _payload
from cloudexec._core import events
from cloudexec._core.events import FailureKind
from cloudexec._descriptors import can_open
from cloudexec._errors import PayloadError, PayloadTooLargeError
from cloudexec._functions import Function
from cloudexec._launchers.base import Arrival
from cloudexec._log import Log
from cloudexec._logs import state_of_logging
from cloudexec._memory import room_for
from cloudexec._objects.link import Link
from cloudexec._objects.places import Place, is_descendant, is_path_of, open_shared
from cloudexec._objects.store import Blob
from cloudexec._objects.transfer import Incoming, stream_view
from cloudexec._payload import Composed
from cloudexec._plain import Frames
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._rpc import is_end
from cloudexec._server.direct import Delivered
from cloudexec._server.gate import Gate, Guest
from cloudexec._server.inspection import parse
from cloudexec._server.service import Service
from cloudexec._server.splicing import Spliced
from cloudexec._wire.channel import (
    BLOB_KEY,
    CHUNK_BYTES,
    DELIVERY_TRIES,
    GO_ON_KEY,
    LEASE_KEY,
    PUSHED_BYTES,
    SIZE_KEY,
    TOKEN_KEY,
)
from cloudexec._wire.stream import Stream

__all__ = ["Servicer", "lenient"]

_logger = Log()
_ENROLMENT_TIMEOUT = 10.0
"""Seconds in which a peer must have proved who it is."""
_UNPROVEN_PEERS = 256
"""Peers that may be in the middle of enrolment at once; see ``Gate`` for who has to go then."""
_HELLO_BYTES = 16 * 1024
"""Largest message of a peer that has not proved yet who it is. Nothing larger is parsed: a few
megabytes of empty fields would take up hundreds of megabytes as objects."""
_MOST_SLOTS = 65_536
_MOST_OUTPUT = 64 * 1024 * 1024
"""Bytes of output that a worker may have sent and we not shown; it is to stop long before."""
_OUTPUT_ENTRY = 32
"""Bytes that a piece of output counts beside its own: there may be many empty ones."""
_LARGEST_BLOB = 1 << 48
_LONGEST = 1e9
"""Seconds that the tasks of one message may be said to have run."""
_BATCH_TASKS = 2048
_BATCH_BYTES = 512 * 1024
_FEW = 4
"""Tasks that are sent on the spot: a round of the loop would make one wait. More go in the next
round, with whatever else comes in this one."""
_TRANSFERS = 16
"""Blobs that one worker may be sent at once, and that it may send: each takes a few MiB of memory
while it is under way. What is more waits."""
_FILES_TIMEOUT = 10.0
"""Seconds for which results wait until this process may open their files."""
_FILES_PAUSE = 0.1
_STALLED = 60.0
"""Seconds in which something worth mentioning must come of a blob that a worker sends."""
_PROGRESS = 64 * 1024
"""Bytes that are worth mentioning."""
_MOST_PUSHED = 2 * 1024 * 1024
_OWN_BLOBS = 1 << 40
"""Numbers that each worker may give to blobs."""

_KINDS = {
    pb.Failure.RAISED: FailureKind.RAISED,
    pb.Failure.UNPICKLE_FAILED: FailureKind.UNPICKLE_FAILED,
    pb.Failure.PICKLE_FAILED: FailureKind.PICKLE_FAILED,
    pb.Failure.SLOT_LOST: FailureKind.SLOT_LOST,
    pb.Failure.TIMED_OUT: FailureKind.TIMED_OUT,
    pb.Failure.KILLED: FailureKind.KILLED,
    pb.Failure.RECLAIMED: FailureKind.RECLAIMED,
    pb.Failure.OUTGREW: FailureKind.OUTGREW,
}


class _Session:
    """One enrolled worker: what is on its way to it, and what it may fetch."""

    def __init__(
        self, driver: Service, identity: str, attempt: int, pid: int, *, resumable: bool
    ) -> None:
        self.identity = identity
        self.resumable = resumable  # whether a cut connection may be replaced by another one
        self.is_cut = False
        self.taken_over = False  # it is about to say what it holds of an earlier client's
        self.stream: Stream[pb.ServerMessage] = Stream()
        self.pid = pid  # of its process, where that is on this machine
        self.attempt = attempt  # which run of its launch this is, from 1
        self.worker_id = f"worker-{identity}"
        self.token = secrets.token_bytes(16)
        self.name = _enrolment.session_name(self.token)  # what it may be called before a proof
        # By lease: what a worker may still read.
        self.payloads: dict[int, tuple[Composed | None, Function | None]] = {}
        self.delivered: dict[int, Delivered | Composed] = {}
        self.arrived: dict[int, Blob | PayloadError] = {}  # parts of results that are not complete
        self.parts: dict[int, list[int]] = {}  # by lease, which of these were delivered for it
        self.damaged: dict[int, int] = {}  # how often a kept blob has arrived other than it was
        self._short_of_files = False  # and has waited for some in vain
        self.progress_at = 0.0  # when something of a blob came last, by the loop's clock
        self.ending = False  # what it keeps is to be brought here
        self.uploads: dict[int, str] = {}  # ids of those that are on their way into the bucket
        self.stored_ahead: dict[int, bytes] = {}  # digests of kept ones there, still to be reported
        self.link = Link(enabled=driver.compresses)
        # Apart from each other: what it is sent may wait for what others send.
        self.outgoing = asyncio.Semaphore(_TRANSFERS)
        self.incoming = asyncio.Semaphore(_TRANSFERS)
        self.first_blob = next(driver.blob_ranges) * _OWN_BLOBS
        self._known_blobs: set[int] = set()
        self._blobs: weakref.WeakValueDictionary[int, Blob] = weakref.WeakValueDictionary()
        self._moved: set[int] = set()  # known blobs that are somewhere else now
        self._forget_blobs: list[int] = []
        self._taken: list[int] = []
        self._want: list[int] = []
        self.slot_groups: list[int] = []
        self.printed: set[int] = set()  # leases whose task has printed
        self._unshown = 0  # bytes of output that came and were not shown yet
        self.reclaimed = False  # its platform told it to end
        self._driver = driver
        self._reading: asyncio.Task[Any] | None = None  # of the connection that there is
        self._acknowledge_handle: asyncio.TimerHandle | None = None
        self._wanted = asyncio.Event()
        self._straight: Frames | None = None  # a plain connection that is ready for tasks
        self._tasks: list[Any] = []
        self._known: set[int] = set()
        self._forget: list[int] = []
        self._recall: list[int] = []
        self._kill: list[int] = []
        self._drain = False
        self._drain_said = False
        self._terminate = False
        self._credit = 0
        self._room = _MOST_PUSHED  # for blobs that go along, in the message that is composed
        self._closed = False

    # Commands.

    def send_tasks(self, tasks: Sequence[Any]) -> None:
        self._tasks.extend(tasks)
        frames = self._straight
        if frames is None or self._closed or len(self._tasks) > _FEW or not frames.is_writable:
            self._wanted.set()
        elif (message := self._compose()) is not None:
            frames.send_now(message.SerializeToString())

    def recall(self, leases: Sequence[int]) -> None:
        self._recall.extend(leases)
        self._wanted.set()

    def kill(self, leases: Sequence[int]) -> None:
        self._kill.extend(leases)
        self._wanted.set()

    def forget_functions(self, numbers: Sequence[int]) -> None:
        known = [number for number in numbers if number in self._known]
        if known:
            self._known.difference_update(known)
            self._forget.extend(known)
            self._wanted.set()

    def forget_blobs(self, numbers: Sequence[int]) -> None:
        known = self._known_blobs.intersection(numbers)
        if known:
            self._known_blobs -= known
            self._moved -= known
            self._forget_blobs.extend(known)
            self._wanted.set()

    def moved(self, number: int) -> None:
        """A blob is not where its worker was told that it is."""
        if number in self._known_blobs:
            self._moved.add(number)

    def release(self, blobs: Sequence[Blob]) -> None:
        """Tell the worker that nobody needs any more that it keeps these."""
        if blobs:
            self._taken.extend([blob.id for blob in blobs])
            self._wanted.set()

    def drain(self) -> None:
        self._drain = True
        self._wanted.set()

    def terminate(self) -> None:
        self._terminate = True
        self._wanted.set()

    def close(self) -> None:
        """Exchange nothing more with the worker, whether it has hung up or not."""
        self._closed = True
        self._wanted.set()
        if self._reading is not None:
            self._reading.cancel()
        if self._acknowledge_handle is not None:
            self._acknowledge_handle.cancel()
            self._acknowledge_handle = None

    @property
    def is_closed(self) -> bool:
        """Whether the worker was given up, or has ended."""
        return self._closed

    def attach(self, reading: asyncio.Task[Any]) -> bool:
        """Have another connection of the worker be the one: the one before it ends.

        Returns:
            Whether there was one before, though it may have ended already.
        """
        before, self._reading = self._reading, reading
        if before is not None:
            before.cancel()
        return before is not None or self.is_cut

    def is_read_by(self, task: asyncio.Task[Any]) -> bool:
        """Say whether a task reads the connection that there is, not an earlier one."""
        return self._reading is task

    def detach(self) -> None:
        """The connection that there was has ended."""
        self._reading = None

    def output_taken(self, size: int) -> None:
        """The output thread has shown this much: the worker may send as much again."""

        def credit() -> None:
            self._credit += size
            self._unshown -= size + _OUTPUT_ENTRY
            if self._credit > 65536 or not self._closed:
                self._wanted.set()

        try:
            self._driver.portal.post(credit)
        except RuntimeError:
            pass  # the loop has closed

    # The stream.

    def _compose(self) -> pb.ServerMessage | None:
        message = pb.ServerMessage()
        self._room = _MOST_PUSHED
        some = False
        if self._tasks:
            self._compose_tasks(message)
            some = True
        if self._forget:
            message.forget_functions.extend(self._forget)
            self._forget.clear()
            some = True
        if self._forget_blobs:
            message.forget_blobs.extend(self._forget_blobs)
            self._forget_blobs.clear()
            some = True
        if self._want:
            message.wanted.extend(self._want)
            self._want.clear()
            some = True
        if self._taken:
            message.taken.extend(self._taken)
            self._taken.clear()
            some = True
        if self._recall:
            message.recall.extend(self._recall)
            self._recall.clear()
            some = True
        if self._kill:
            message.kill.extend(self._kill)
            self._kill.clear()
            some = True
        if self._credit:
            message.output_credit = self._credit
            self._credit = 0
            some = True
        if self._drain and not self._tasks:
            message.drain = True
            self._drain = False
            some = True
        if self._terminate:
            message.terminate = True
            self._terminate = False
            some = True
        return message if some else None

    def _compose_tasks(self, message: pb.ServerMessage) -> None:
        tasks = self._tasks
        leases: list[int] = []
        functions: list[int] = []
        payloads: list[bytes] = []
        estimates: list[float] = []
        numbers: list[int] = []
        timeouts: dict[int, float] = {}
        columns = message.tasks
        size = 0
        taken = 0
        keeper = self._driver.keeper
        missing: list[Any] = []
        holds, kept = self._driver.holds, []
        takeover, tags = self._driver.takeover, []
        for task in tasks:
            if len(leases) >= _BATCH_TASKS or size >= _BATCH_BYTES:
                break
            taken += 1
            payload = task.payload
            future = task.handle
            if payload is None or future is None or future.done():
                continue  # cancelled meanwhile; the worker will hand back what it never had
            if holds and (hold := holds.get(future)) is not None:
                hold.was_kept = True
                kept.append(task.lease)
                continue
            if task.inputs and not keeper.is_at_hand(payload, self.worker_id):
                missing.append(task)
                continue
            if type(payload) is Spliced:
                try:
                    payload = payload.join(self._driver.store)
                except PayloadError as exc:
                    self._driver.portal.loop.call_soon(self._cannot_send, task.lease, exc)
                    continue
            function = task.function
            if function is None:
                functions.append(0)
            else:
                functions.append(function.number)
                if function.number not in self._known:
                    size += self._introduce(message, function)
            if function is not None and function.composed:
                self.payloads[task.lease] = None, function
            if type(payload) is Composed:
                columns.composed.append(len(leases))
                columns.blob_counts.append(len(payload.blobs))
                columns.blobs.extend([blob.id for blob in payload.blobs])
                size += sum([self._introduce_blob(blob, message) for blob in payload.blobs])
                self.payloads[task.lease] = payload, function
                payload = payload.head
            if task.requirements is not None:
                self._state_terms(message, len(leases), task, timeouts)
            if takeover is not None:
                tags.append(takeover.tag(self.identity, task))
            leases.append(task.lease)
            payloads.append(payload)
            estimates.append(task.stats.seconds)
            numbers.append(task.number)
            size += len(payload)
        if tags:
            columns.tags.extend(tags)
        if timeouts:
            message.tasks.timeouts.extend(timeouts.get(i, 0.0) for i in range(len(leases)))
        del tasks[:taken]
        if tasks:
            self._wanted.set()
        loop = self._driver.portal.loop
        if kept:
            returned = events.LeasesReturned(self.worker_id, kept, heard=False)
            loop.call_soon(self._driver.feed, returned)
        for task in missing:
            loop.call_soon(keeper.supply, task, self.worker_id, task.lease)
        columns.leases.extend(leases)
        columns.functions.extend(functions)
        columns.payloads.extend(payloads)
        columns.estimates.extend(estimates)
        columns.numbers.extend(numbers)
        self._driver.bytes_sent += size

    def _cannot_send(self, lease: int, error: PayloadError) -> None:
        """There is no room for what a task takes: it fails."""
        detail = pb.Failure(lease=lease, payload=_payload.dumps_exception(error))
        failure = events.Failure(FailureKind.PICKLE_FAILED, detail)
        self._driver.feed(events.FailuresReceived(self.worker_id, [(lease, failure)]))

    def _state_terms(
        self, message: pb.ServerMessage, index: int, task: Any, timeouts: dict[int, float]
    ) -> None:
        options = task.requirements.options
        if options.keep:
            message.tasks.kept.append(index)
        if options.timeout is not None:
            timeouts[index] = options.timeout
        env, memory, last = self._driver.terms_of(self.worker_id, task)
        if env or memory or last:
            message.tasks.terms.add(index=index, env=env, memory_bytes=memory, last=last)

    def _introduce(self, message: pb.ServerMessage, function: Function) -> int:
        """Tell the worker of a function, and before it of what it needs; return the bytes."""
        self._known.add(function.number)
        self._driver.sessions.note_told(self.worker_id, function.number)
        size = sum(
            [
                self._introduce(message, need)
                for need in function.needs
                if need.number not in self._known
            ]
        )
        pickled = function.pickle
        if type(pickled) is Composed:
            size += sum([self._introduce_blob(blob, message) for blob in pickled.blobs])
        _describe_function(message.functions.add(), function)
        return size + len(message.functions[-1].pickle)

    def introduce_first(self, welcome: pb.Welcome, function: Function) -> None:
        """Tell the worker of what its initializer needs."""
        self._known.add(function.number)
        self._driver.sessions.note_told(self.worker_id, function.number)
        for need in function.needs:
            if need.number not in self._known:
                self.introduce_first(welcome, need)
        pickled = function.pickle
        if type(pickled) is Composed:
            welcome.function_blobs.extend(map(self.describe, pickled.blobs))
        _describe_function(welcome.functions.add(), function)

    def _know_blob(self, number: int) -> None:
        if number not in self._known_blobs:
            self._known_blobs.add(number)
            self._driver.sessions.note_told(self.worker_id, -number)

    def _introduce_blob(self, blob: Blob, message: pb.ServerMessage) -> int:
        """Tell the worker of a blob, if it does not know it; return the bytes that this takes."""
        if blob.id in self._known_blobs and blob.id not in self._moved:
            return 8
        described = self.describe(blob)
        message.blobs.append(described)
        return 64 + len(described.content)

    def describe(self, blob: Blob) -> pb.Blob:
        """Say of a blob what its worker must know, who now may ask for it."""
        self._know_blob(blob.id)
        self._moved.discard(blob.id)
        self._blobs[blob.id] = blob
        blob.workers.add(self.worker_id)
        described = pb.Blob(id=blob.id, size=blob.size)
        place = blob.place
        if place is not None and blob.origin != self.worker_id:
            described.path, described.offset = place.path, place.offset
            described.mappable = place.mappable
        elif self._driver.direct_path and blob.segment is not None:
            described.path = blob.segment.path
            described.offset = blob.offset
            described.mappable = blob.mappable
        else:
            depot = self._driver.transfers
            described.bucket = depot is not None and (blob.stored or depot.takes(blob.size))
            goes_along = blob.size <= min(PUSHED_BYTES, self._room) and not self.link.is_slow
            if goes_along and blob.origin is None and not described.bucket:
                described.content = bytes(blob.view())
                self._room -= blob.size
                self._driver.bytes_sent += blob.size
        return described

    def owns(self, number: int) -> bool:
        """Say whether a number is one that the worker may give to a blob."""
        return self.first_blob < number < self.first_blob + _OWN_BLOBS

    def blob(self, number: int) -> Blob | None:
        """Return a blob that the worker may ask for."""
        return self._blobs.get(number)

    def blobs(self) -> list[Blob]:
        """Return the blobs that the worker was told of, or told of itself."""
        return list(self._blobs.values())

    def kept_blobs(self) -> list[Blob]:
        """Return the blobs that this worker alone has."""
        return [blob for blob in self._blobs.values() if blob.origin == self.worker_id]

    def want(self, blob: Blob) -> None:
        """Have the worker send a blob that it keeps."""
        self._want.append(blob.id)
        self._wanted.set()

    def go_straight(self, frames: Frames) -> None:
        """Take messages as they come, and send few tasks at once, over a plain connection."""
        self._straight = frames

        def take(data: bytes) -> bool:
            message = parse(data)
            waits = message.HasField("results") and message.results.blobs
            if waits or message.goodbye or self._closed:
                return False
            self.take(message)
            return True

        frames.at_once = take

    async def send(self, context: Any) -> None:
        """Send what is wanted, in batches as large as the stream makes them.

        What was sent over an earlier connection, and may not have arrived, comes first.

        Raises:
            ValueError: If the worker acknowledges nothing.
        """
        stream = self.stream
        for sent in stream.missing():
            await context.write(sent)
        self._wanted.set()
        while not self._closed:
            await self._wanted.wait()
            self._wanted.clear()
            message = self._compose()
            if message is not None:
                if self.resumable:
                    stream.stamp(message)
                await context.write(message)
            elif stream.owes:
                message = pb.ServerMessage()
                stream.acknowledge(message)
                await context.write(message)

    def is_news(self, message: pb.WorkerMessage) -> bool:
        """Take note of a message's number; say whether it is to be read.

        Raises:
            ValueError: If it says what cannot be.
        """
        stream = self.stream
        if not self.resumable:
            return True
        is_news = stream.take(message)
        pause = stream.acknowledge_within
        if pause == 0 or message.draining or self._drain_said:
            self._wanted.set()
        elif pause is not None and self._acknowledge_handle is None:
            loop = self._driver.portal.loop
            self._acknowledge_handle = loop.call_later(pause, self._acknowledge)
        return is_news

    def _acknowledge(self) -> None:
        self._acknowledge_handle = None
        if self.stream.owes:
            self._wanted.set()

    def take(self, message: pb.WorkerMessage) -> None:
        """Turn one message into events."""
        driver = self._driver
        worker = self.worker_id
        heard = True
        if message.HasField("holding"):
            if driver.takeover is None:
                raise ValueError("it holds what nobody gave it")
            driver.takeover.holding(self, message.holding.leases, message.holding.tags)
        if message.output:
            for output in message.output:
                driver.bytes_received += len(output.data)
                if driver.output is not None:
                    if driver.expects(self.token, output.lease):
                        self.printed.add(output.lease)
                    self._unshown += len(output.data) + _OUTPUT_ENTRY
                    if self._unshown > _MOST_OUTPUT:
                        raise ValueError("more output than it may send ahead")
                    driver.output.put(
                        worker,
                        output.number,
                        output.stream,
                        output.data,
                        self.output_taken,
                        driver.name_of(worker, output.lease),
                    )
        if message.slot_groups:
            # They are to be killed one day: 0 and 1 mean others than a group of theirs.
            self.slot_groups = [each for each in message.slot_groups if 1 < each < 1 << 31]
        if message.ready:
            driver.feed(events.WorkerReady(worker))
            heard = False
        if message.started:
            driver.feed(events.TasksStarted(worker, list(message.started)))
            heard = False
        if message.HasField("results"):
            columns = message.results
            leases = list(columns.leases)
            results: list[Any] = list(columns.payloads)
            seconds = list(columns.seconds)
            if not len(leases) == len(results) == len(seconds):
                raise ValueError("columns of different length")
            if seconds and not (min(seconds) >= 0.0 and sum(seconds) < _LONGEST):
                raise ValueError("run times that are none")
            if columns.direct or columns.composed:
                large = [*columns.direct, *columns.composed]
                if len(set(large)) != len(large):
                    raise ValueError("one result in several places")
            for index in columns.direct:
                lease = leases[index]
                missing = Delivered(None, PayloadError("the result announced never arrived"))
                results[index] = self.delivered.pop(lease, missing)
            vanished: list[int] = []
            if columns.composed:
                vanished = self._take_composed(columns, results)
            if self.payloads or self.parts:
                for lease in leases:
                    self._end_lease(lease)
            if vanished:
                self._lose_results(vanished, leases, results, seconds)
            if driver.takeover is not None:
                driver.takeover.park(worker, leases, results, seconds)
            driver.feed(events.ResultsReceived(worker, leases, results, seconds))
            if self.ending and columns.kept:
                driver.create_task(driver.keeper.evacuate(self))
            heard = False
        if message.failures:
            failures = []
            for failure in message.failures:
                self._end_lease(failure.lease)
                if failure.lease in self.delivered:
                    # All of its result is here: the slot ended before it could say so.
                    result = self.delivered.pop(failure.lease)
                    leases, results, seconds = [failure.lease], [result], [failure.seconds]
                    if driver.takeover is not None:
                        driver.takeover.park(worker, leases, results, seconds)
                    driver.feed(events.ResultsReceived(worker, leases, results, seconds))
                    continue
                self.printed.discard(failure.lease)
                kind = _KINDS.get(failure.kind, FailureKind.SLOT_LOST)
                lost = events.Failure(kind, failure, failure.out_of_memory)
                failures.append((failure.lease, lost))
            if driver.takeover is not None:
                driver.takeover.gone(worker, [lease for lease, _ in failures])
            driver.feed(events.FailuresReceived(worker, failures))
            heard = False
        returned = list(message.returned)
        if message.goodbye and worker in driver.machine.workers:
            # It has answered all that it began: it has not begun with what was on its way to it.
            returned += driver.machine.workers[worker].leases
        if returned:
            for lease in returned:
                self._end_lease(lease)
            if driver.takeover is not None:
                driver.takeover.gone(worker, returned)
            driver.feed(events.LeasesReturned(worker, returned))
            heard = False
        if message.draining:
            self._drain_said = True
            driver.workers.draining(self)
            heard = False
        if message.initializer_failed:
            driver.initializer_failed(message.initializer_failed)
        if heard:
            driver.feed(events.WorkerHeard(worker))

    def _end_lease(self, lease: int) -> None:
        """Let go of what was for a task that the worker has no more."""
        self.payloads.pop(lease, None)
        for number in self.parts.pop(lease, ()):
            self.arrived.pop(number, None)

    def _take_composed(self, columns: pb.Results, results: list[Any]) -> list[int]:
        """Take hold of the parts of large results; return the indexes of those that are gone."""
        at = 0
        vanished: list[int] = []
        kept = set(columns.kept)
        for index, count in zip(columns.composed, columns.blob_counts, strict=True):
            parts = columns.blobs[at : at + count]
            at += count
            numbers = tuple([part.number for part in parts])
            if index in kept:
                blobs = tuple([self._know_kept(part) for part in parts])
                results[index] = Composed(results[index], blobs, numbers)
                results[index].shared = True
                continue
            try:
                blobs = tuple([self._take_blob(part) for part in parts])
            except PayloadError as exc:
                results[index] = Delivered(None, exc)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                vanished.append(index)
            except OSError as exc:  # it is there: the task is not to run again for that
                why = f"a result cannot be taken from its file: {exc.strerror}"
                results[index] = Delivered(None, PayloadError(why))
            else:
                results[index] = Composed(results[index], blobs, numbers)
            self._taken.extend([part.id for part in parts if part.path])
        self._wanted.set()
        return vanished

    def _lose_results(self, indexes: list[int], *columns: list[Any]) -> None:
        """Count results whose files are gone, as their worker is, as attempts that were lost."""
        failures = []
        for index in reversed(indexes):
            lease, _, seconds = [column.pop(index) for column in columns]
            detail = pb.Failure(lease=lease, seconds=seconds)
            failures.append((lease, events.Failure(FailureKind.SLOT_LOST, detail)))
        self._driver.feed(events.FailuresReceived(self.worker_id, failures))

    def _know_kept(self, described: pb.Blob) -> Blob:
        """Note a part of a result that stays on the worker."""
        if not self.owns(described.id):
            raise ValueError(f"{described.id} is not its own to give to a blob")
        if described.size > _LARGEST_BLOB:
            raise ValueError(f"{described.size} is no size of a blob")
        place = None
        if described.path and self._driver.direct_path:
            place = self._place_of(described)
        blob = self._driver.store.remote(described.id, described.size, self.worker_id, place)
        sha256 = self.stored_ahead.pop(blob.id, b"")
        if sha256:
            blob.stored, blob.sha256 = True, sha256
        self._know_blob(blob.id)
        self._blobs[blob.id] = blob
        return blob

    def _place_of(self, described: pb.Blob) -> Place:
        """Return where a worker on this machine says that a blob of its own is."""
        path = described.path
        if not is_path_of(self.pid, path):
            raise ValueError(f"{path[:100]!r} is no file of its own")
        mappable = described.mappable and not described.offset
        return Place(described.id, described.size, path, described.offset, mappable)

    def _take_blob(self, described: pb.Blob) -> Blob:
        arrived = self.arrived.pop(described.id, None)
        if described.content and not described.path:
            if len(described.content) != described.size:
                raise ValueError(f"{len(described.content)} bytes are none of {described.size}")
            self._driver.bytes_received += described.size
            content = bytearray(described.content)
            return self._driver.store.take_over(described.size, content=content, spill=True)
        if arrived is None and described.path and self._driver.direct_path:
            arrived = self._open_blob(self._place_of(described))
        if isinstance(arrived, PayloadError):
            raise arrived
        if arrived is None or arrived.size != described.size:
            raise PayloadError("a part of the result never arrived")
        return arrived

    def _open_blob(self, place: Place) -> Blob:
        """Take over a part of a result from a file of a worker on this machine."""
        store, size = self._driver.store, place.size
        fd = open_shared(place)
        self._driver.bytes_received += size
        if place.mappable:
            return store.take_over(size, fd=fd, spill=True)
        try:
            # What there is no room for in memory is not to be in memory on its way to the disk.
            if not store.has_room(size):
                blob = store.new(size)
                _copy(fd, place.offset, blob)
                return blob
            data = room_for(size)
            if os.preadv(fd, [data], place.offset) != size:
                raise PayloadError("a part of the result is shorter than announced")
        finally:
            os.close(fd)
        return store.take_over(size, content=data, spill=True)

    async def await_files(self, message: pb.WorkerMessage) -> None:
        """Wait a while until the parts of results can be opened: the program may have many files.

        What the worker says meanwhile is read later.
        """
        if not self._driver.direct_path:
            return
        count = sum(bool(part.path) for part in message.results.blobs)
        loop = self._driver.portal.loop
        until = loop.time() + _FILES_TIMEOUT
        while not can_open(count):
            if self._short_of_files or loop.time() > until:
                self._short_of_files = True  # not again for each of those that follow
                return
            await asyncio.sleep(_FILES_PAUSE)
        self._short_of_files = False

    async def spill(self, message: pb.WorkerMessage) -> None:
        """Move to disk the results that there is no room for in memory; in a thread."""
        columns = message.results
        store = self._driver.store
        if not self._driver.direct_path or store.has_room(sum(b.size for b in columns.blobs)):
            return
        at = 0
        for index, count in zip(columns.composed, columns.blob_counts, strict=True):
            parts = columns.blobs[at : at + count]
            at += count
            if index in columns.kept:
                continue
            for part in parts:
                if not part.path:
                    continue  # it came another way
                try:
                    place = self._place_of(part)
                    self.arrived[part.id] = await asyncio.to_thread(self._open_blob, place)
                except PayloadError as exc:
                    self.arrived[part.id] = exc
                except OSError:
                    pass  # it is looked for once more


async def _read(context: Any) -> Any:
    """Read a message, or the end of them.

    Raises:
        ConnectionError: If the connection failed.
    """
    try:
        return await context.read()
    except Exception as exc:
        raise ConnectionError(str(exc)) from exc


async def _abort(context: Any, status: str, why: str) -> None:
    """End a call that failed, with the name of a gRPC status code."""
    if not getattr(context, "is_plain", False):
        import grpc

        await context.abort(grpc.StatusCode[status], why)
    await context.abort(status, why)


def _copy(fd: int, offset: int, blob: Blob) -> None:
    """Fill a new blob from a part of a file.

    Raises:
        PayloadError: If the file is shorter than that.
        OSError: If it cannot be read, or the blob not be written.
    """
    at = 0
    while at < blob.size:
        data = os.pread(fd, min(blob.size - at, CHUNK_BYTES), offset + at)
        if not data:
            raise PayloadError("a part of the result is shorter than announced")
        blob.write(data, at)
        at += len(data)


def lenient(kind: type[Message]) -> Callable[[bytes], Message | None]:
    """Return what parses a request; what is none becomes ``None``."""

    def parse(data: bytes) -> Message | None:
        try:
            return kind.FromString(data)
        except DecodeError:
            return None

    return parse


class _HungUpError(Exception):
    """A peer ended its call before it had proved who it is."""


class Servicer:
    """The methods of the service."""

    def __init__(self, driver: Service) -> None:
        self._driver = driver
        self._gate = Gate(_UNPROVEN_PEERS)

    async def Session(self, _: Any, context: Any) -> None:
        """Enrol a worker, then exchange messages with it until either side ends."""
        driver, peer = self._driver, context.peer()
        guest = self._gate.enter(peer)
        if guest is None:
            driver.refused("too many at once", f"{peer} is one of too many that come at once")
            await _abort(context, "RESOURCE_EXHAUSTED", "too many peers at once")
            return
        try:
            async with asyncio.timeout(_ENROLMENT_TIMEOUT) as guest.timeout:
                session = await self._enrol(context, guest)
        except TimeoutError:
            if guest.evicted:
                driver.refused("too many at once", f"{peer} took its time, and others wait")
                await _abort(context, "RESOURCE_EXHAUSTED", "too many peers at once")
            driver.refused("too slow", f"{peer} did not say in time who it is")
            await _abort(context, "DEADLINE_EXCEEDED", "enrolment took too long")
        except _HungUpError:
            # Nobody to warn of: a worker that was ended, or found its session gone, or a network
            # that failed once more.
            _logger.debug("%s hung up before it had proved who it is", peer)
            await _abort(context, "UNAUTHENTICATED", "say who you are")
        finally:
            self._gate.leave(guest)
        if session is not None:
            await self._converse(session, context)

    async def _converse(self, session: _Session, context: Any) -> None:
        """Exchange messages with a worker over one connection, until either side ends that."""
        driver = self._driver
        reading = asyncio.current_task()
        assert reading is not None
        if session.is_closed:
            return
        if session.attach(reading):
            driver.workers.reconnected(session)
        if getattr(context, "is_plain", False):
            session.go_straight(context.frames)
        sending = driver.portal.loop.create_task(session.send(context))
        deaf: list[ValueError] = []

        def sent(done: asyncio.Task[None]) -> None:
            # Who is not sent anything any more is not to be waited for.
            if not done.cancelled():
                error = done.exception()
                if isinstance(error, ValueError):
                    deaf.append(error)
                reading.cancel()

        sending.add_done_callback(sent)
        reason, cut = "its connection was cut", True
        try:
            while not is_end(data := await _read(context)):
                message = parse(data)
                if not session.is_news(message):
                    continue
                if message.goodbye:
                    reason, cut = "it has ended", False
                if message.HasField("results") and message.results.blobs:
                    await session.await_files(message)
                    await session.spill(message)
                session.take(message)
        except (asyncio.CancelledError, ConnectionError):
            if deaf:
                reason, cut = f"it did not take what was sent: {deaf[0]}", False
                driver.refused("malformed message", f"{session.worker_id} is cut off: {reason}")
        except (ValueError, IndexError, DecodeError) as exc:
            reason, cut = f"it sent a malformed message: {exc}", False
            driver.refused("malformed message", f"{session.worker_id} is cut off: {reason}")
        except Exception as exc:
            reason, cut = f"what it sent could not be taken ({type(exc).__name__}: {exc})", False
            _logger.exception("internal error with a message from %s", session.worker_id)
        finally:
            sending.cancel()
            if session.is_read_by(reading):  # else another connection has taken over
                session.detach()
                driver.workers.disconnected(session, reason, cut=cut)

    async def _enrol(self, context: Any, guest: Guest) -> _Session | None:
        driver = self._driver
        heard_at = time.monotonic()
        message = await self._hear(context, guest)
        if not message.HasField("hello"):
            driver.refused("no hello", f"{context.peer()} said something else than who it is")
            await _abort(context, "UNAUTHENTICATED", "say hello first")
            return None
        hello = message.hello
        if len(hello.identity) > 1024 or len(hello.nonce) != _enrolment.NONCE_BYTES:
            driver.refused("malformed hello", f"{context.peer()} sent a malformed hello")
            await _abort(context, "INVALID_ARGUMENT", "malformed hello")
        nonce = _enrolment.make_nonce()
        key = driver.workers.key_of(hello.identity)
        resumed: _Session | None = None
        if hello.resume:
            # The one that has given this session up says so by proving to know the key alone.
            resumed = driver.workers.session_to_resume(hello.identity, hello.resume)
            if resumed is not None:
                key = _enrolment.session_key(key, resumed.token)
        parts = (driver.engine.executor_id, hello.identity, hello.nonce, nonce)
        mac = _enrolment.proof(key, "server", *parts)
        # Whoever stands in the place of one that was killed has none of its sessions.
        takeover = driver.takeover if hello.resume and resumed is None else None
        takes_over = takeover is not None and takeover.takes(hello.identity)
        challenge = pb.Challenge(nonce=nonce, mac=mac, takes_over=takes_over)
        await context.write(pb.ServerMessage(challenge=challenge))
        message = await self._hear(context, guest)
        expected = _enrolment.proof(key, "worker", *parts)
        proved = _enrolment.proves(message.proof.mac, expected)
        if hello.executor_id != driver.engine.executor_id or not proved:
            driver.refused("no proof", f"{context.peer()} could not prove that it knows the key")
            await _abort(context, "UNAUTHENTICATED", "proof refused")
        if hello.resume and not takes_over:
            return await self._resume(resumed, message.proof.received, context)
        mismatch = _enrolment.versions_mismatch(
            wire=hello.wire_version, python=hello.python_version, pickle=hello.cloudpickle_version
        )
        if not 0 < hello.slots <= _MOST_SLOTS:
            mismatch = f"a worker cannot have {hello.slots} slots"
        driver.workers.returning(hello.identity, hello.attempt)
        unwanted = driver.workers.admit(hello.identity)
        refusal = unwanted or mismatch
        if refusal is not None:
            await context.write(pb.ServerMessage(refusal=pb.Refusal(reason=refusal)))
            if unwanted is None:
                driver.feed(events.LaunchFailed(hello.identity, refusal, fatal=True))
            elif not driver.launches.has_given_up(hello.identity):  # that one just comes too late
                driver.refused("not expected", f"{context.peer()} knows the key, but {unwanted}")
            return None
        resumable = not driver.direct_path and driver.machine.config.reconnect_grace > 0
        pid = _pid_of(driver.workers.pid_of(hello.identity), hello.pid)
        session = _Session(driver, hello.identity, hello.attempt, pid, resumable=resumable)
        session.taken_over = takes_over
        setup = driver.setup
        welcome = pb.Welcome(
            worker_id=session.worker_id,
            session_token=session.token,
            cwd=setup.cwd,
            sys_path=setup.sys_path,
            argv=setup.argv,
            settings=setup.settings,
            max_tasks_per_child=setup.max_tasks_per_child,
            orphan_timeout=setup.orphan_timeout,
            heartbeat_interval=driver.machine.config.lease_timeout / 6,
            capture_output=driver.setup.output != "off",
            min_slots=setup.min_workers,
            idle_timeout=-1.0 if setup.idle_timeout is None else setup.idle_timeout,
            direct_path=driver.direct_path,
            authkey=_authkey() if driver.machine.config.scaling.one_machine else b"",
            modules=bool(setup.modules),
            first_blob=session.first_blob,
            blob_memory=setup.objects.worker_memory or 0,  # type: ignore[arg-type]
            compress=driver.compresses,
            resumable=resumable,
            depth=_nesting.depth() + 1,
            inheritance=_inheritance(driver),
            main=setup.main,
        )
        if driver.transfers is not None:
            welcome.bucket_threshold = driver.transfers.threshold
            welcome.bucket_part_bytes = driver.transfers.part_bytes
        initializer = setup.initializer
        if type(initializer) is Composed:
            welcome.initializer_blobs.extend(map(session.describe, initializer.blobs))
            initializer = initializer.head
        assert type(initializer) is bytes
        welcome.initializer = initializer
        if setup.initializer_needs is not None:
            session.introduce_first(welcome, setup.initializer_needs)
            welcome.initializer_needs = setup.initializer_needs.number
        await context.write(pb.ServerMessage(welcome=welcome))
        # Nothing is awaited between the check above and here but that write: check once more.
        if driver.workers.admit(hello.identity) is not None:
            return None
        pull, boot = _seconds(hello.pull_seconds) or None, _seconds(hello.boot_seconds)
        arrival = Arrival(hello.job_id[:256], hello.attempt, boot, pull)
        driver.workers.connected(session, hello.slots, arrival, time.monotonic() - heard_at)
        return session

    async def _resume(
        self, session: _Session | None, received: int, context: Any
    ) -> _Session | None:
        """Have a worker that has proved who it is go on with its session over this connection."""
        if session is None or session.is_closed:
            await context.write(pb.ServerMessage(refusal=pb.Refusal(reason="it was given up")))
            return None
        stream = session.stream
        try:
            stream.arrived(received)
        except ValueError as exc:
            self._driver.refused("malformed hello", f"{session.worker_id} cannot go on: {exc}")
            await _abort(context, "INVALID_ARGUMENT", str(exc))
        # What still comes over the connection before this one comes twice, and is read once.
        answer = pb.ServerMessage(resumed=True)
        stream.acknowledge(answer)
        await context.write(answer)
        return session

    async def _hear(self, context: Any, guest: Guest) -> pb.WorkerMessage:
        """Read a message of a peer that has not proved who it is; an empty one for what is none.

        Raises:
            _HungUpError: It sent nothing more.
        """
        async with self._gate.turn(guest):
            data = await context.read()
        if is_end(data):
            raise _HungUpError
        if len(data) > _HELLO_BYTES:
            return pb.WorkerMessage()
        try:
            return pb.WorkerMessage.FromString(data)
        except DecodeError:
            return pb.WorkerMessage()

    def _session_of(self, context: Any) -> _Session | None:
        metadata = dict(context.invocation_metadata() or ())
        token = metadata.get(TOKEN_KEY, b"")
        return self._driver.session_of(token) if isinstance(token, bytes) else None

    async def Fetch(self, request: pb.FetchRequest | None, context: Any) -> AsyncIterator[Any]:
        """Stream a blob to a worker that was told of it, or the user's modules."""
        session = self._session_of(context)
        if session is None or request is None:
            await _abort(context, "UNAUTHENTICATED", "unknown session")
            return
        driver = self._driver
        if request.modules:
            archive = memoryview(driver.setup.modules)
            for at in range(0, len(archive), CHUNK_BYTES):
                yield archive[at : at + CHUNK_BYTES]
            return
        blob = session.blob(request.blob)
        if blob is None or request.offset > blob.size:
            await _abort(context, "NOT_FOUND", "no such blob")
            return
        if blob.origin is not None:  # it is in the bucket, and the worker cannot read that
            try:
                await driver.keeper.pull(blob)
            except (FileNotFoundError, PayloadError) as exc:
                await _abort(context, "NOT_FOUND", f"it is lost: {exc}"[:1000])
                return
        sending = stream_view(blob, request.offset, session.link, driver.count_sent)
        async with session.outgoing, contextlib.aclosing(sending) as chunks:
            async for chunk in chunks:
                yield chunk

    async def Deliver(self, requests: AsyncIterator[Any], context: Any) -> pb.DeliverReply:
        """Take a part of a result."""
        session, driver = self._session_of(context), self._driver
        metadata = dict(context.invocation_metadata() or ())
        number, size, lease = (
            _natural(metadata.get(key)) for key in (BLOB_KEY, SIZE_KEY, LEASE_KEY)
        )
        if session is None or not session.owns(number) or not 0 <= size <= _LARGEST_BLOB:
            driver.refused("foreign part", f"{context.peer()} sent a part of no result of its own")
            await _abort(context, "UNAUTHENTICATED", "nobody waits for this")
            return pb.DeliverReply()
        pulled = driver.keeper.waits_for(number, size, session)
        if not (pulled or driver.expects(session.token, lease)):
            return pb.DeliverReply(accepted=False)
        refusal, cut = "OK", False
        try:
            async with session.incoming:
                blob = await self._receive(session, requests, size, context)
        except (PayloadTooLargeError, OSError) as exc:
            refusal, why = "RESOURCE_EXHAUSTED", str(exc)
            driver.keeper.failed(number, exc.with_traceback(None))
        except (PayloadError, DecodeError) as exc:
            refusal, why = "DATA_LOSS", str(exc)
            if pulled:
                session.damaged[number] = session.damaged.get(number, 0) + 1
                if session.damaged[number] >= DELIVERY_TRIES:
                    driver.keeper.failed(number, exc.with_traceback(None))
        except EOFError as exc:
            refusal, why, cut = "DATA_LOSS", str(exc), True
        if refusal != "OK":
            if refusal == "DATA_LOSS" and not cut:
                driver.transfer_failed(session, why)
            # Outside of the handlers above: nothing refers to what has come any more.
            await _abort(context, refusal, why[:1000])
        driver.bytes_received += blob.size
        if pulled:
            driver.keeper.arrived(number, blob, session.blob(number))
        elif driver.expects(session.token, lease):
            session.arrived[number] = blob
            session.parts.setdefault(lease, []).append(number)
        return pb.DeliverReply(accepted=True)

    async def _receive(
        self, session: _Session, requests: AsyncIterator[Any], size: int, context: Any
    ) -> Blob:
        """Take in the content of a blob.

        Raises:
            PayloadTooLargeError: If there is no room for it.
            OSError: If it cannot be written.
            PayloadError: If it is not what was announced.
            DecodeError: If it is not even a message.
            EOFError: If it ended early, or does not go on.
        """
        loop, at = self._driver.portal.loop, 0
        # In a thread: where it goes to disk, that may take its time.
        blob = await asyncio.to_thread(self._driver.store.new, size)
        incoming = Incoming(blob)
        await context.send_initial_metadata(((GO_ON_KEY, "1"),))
        try:
            async with asyncio.timeout(_STALLED) as limit:
                async for chunk in requests:
                    await incoming.take(chunk)
                    if incoming.at - at >= _PROGRESS or incoming.complete:
                        at, session.progress_at = incoming.at, loop.time()
                        limit.reschedule(session.progress_at + _STALLED)
        except TimeoutError as exc:
            raise EOFError(f"only {incoming.at} of {size} bytes arrived, and no more come") from exc
        finally:
            await incoming.settle()
        if not incoming.complete:
            raise EOFError(f"only {incoming.at} of {size} bytes arrived, and not their digest")
        return blob

    async def Locate(self, request: pb.LocateRequest | None, context: Any) -> pb.Location:
        """Say where in the bucket a blob is."""
        session, depot = self._session_of(context), self._driver.transfers
        if session is None or depot is None or request is None:
            await _abort(context, "UNAUTHENTICATED", "unknown session")
            return pb.Location()
        return await depot.locate(session, request)

    async def Store(self, request: pb.StoreRequest | None, context: Any) -> pb.StoreReply:
        """Let a worker put a blob into the bucket."""
        session, depot = self._session_of(context), self._driver.transfers
        if session is None or depot is None or request is None or not session.owns(request.blob):
            await _abort(context, "UNAUTHENTICATED", "nobody waits for this")
            return pb.StoreReply()
        if request.size > _LARGEST_BLOB:
            await _abort(context, "INVALID_ARGUMENT", "no size of a blob")
        try:
            return await depot.take(session, request)
        except ValueError as exc:
            await _abort(context, "INVALID_ARGUMENT", str(exc)[:1000])
            return pb.StoreReply()


def _pid_of(launched: int, claimed: int) -> int:
    """Return the process that a worker on this machine is: of which files are its own.

    Args:
        launched: What was started for it; 0: we do not know.
        claimed: What it says: the same, or what that one has started.
    """
    return claimed if not launched or is_descendant(claimed, launched) else launched


def _seconds(value: float) -> float:
    """Return how long something took, as a peer says; what is no such time is 0."""
    return value if 0.0 <= value < _LONGEST else 0.0


def _natural(text: object) -> int:
    """Read a number that a peer wrote; what is none is -1."""
    if isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < 20:
        return int(text)
    return -1


def _inheritance(driver: Service) -> bytes:
    """Say what the processes that run tasks have from this one, as if it had forked them."""
    import multiprocessing

    process: Any = multiprocessing.current_process()
    inheritance = {
        "max_workers": driver.setup.max_workers,
        "identity": process._identity,
        "name": process.name,
    }
    if driver.setup.forward_logs:
        inheritance["logging"] = state_of_logging()
    return json.dumps(inheritance).encode()


def _authkey() -> bytes:
    import multiprocessing

    return bytes(multiprocessing.current_process().authkey)


def _describe_function(described: pb.Function, function: Function) -> None:
    pickled = function.pickle
    if isinstance(pickled, Composed):
        described.blobs.extend([blob.id for blob in pickled.blobs])
        pickled = pickled.head
    described.number = function.number
    described.pickle = pickled
    described.sha256 = function.sha256
    described.fresh = function.fresh
    described.needs.extend([need.number for need in function.needs])
    described.globals.extend(function.globals)
    described.module = function.module
