"""The session of one enrolled worker: sends commands to it, and turns its messages into events.

A session may outlive its connection: messages are numbered and acknowledged (``_wire.stream``), and
those that may not have arrived are sent again over the next connection. The core's commands are
collected here and sent in batches, as fast as the connection takes them.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import Any

from cloudexec import _enrolment, _payload
from cloudexec._core import events
from cloudexec._core.events import FailureKind
from cloudexec._errors import PayloadError
from cloudexec._functions import Function
from cloudexec._objects.link import Link
from cloudexec._objects.store import Blob
from cloudexec._plain import Frames
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._records import Composed
from cloudexec._server.direct import Delivered
from cloudexec._server.rpc.calls import LONGEST
from cloudexec._server.rpc.inspection import parse
from cloudexec._server.rpc.introductions import MOST_PUSHED, Introductions
from cloudexec._server.rpc.results import OWN_BLOBS, ResultParts
from cloudexec._server.service import Service
from cloudexec._server.splicing import Spliced
from cloudexec._wire.stream import Stream

__all__ = ["WorkerSession"]

_MOST_OUTPUT = 64 * 1024 * 1024
"""Bytes of output that a worker may have sent and that are not shown yet. An honest worker stops
long before, as its credit is lower."""
_OUTPUT_ENTRY = 32
"""Bytes that each piece of output counts in addition to its own, as pieces may be empty."""
_BATCH_TASKS = 2048
_BATCH_BYTES = 512 * 1024
_FEW = 4
"""Up to this number, tasks are sent at once, because waiting for the loop's next round would cost
time. More tasks are sent in the next round, together with others that come in this one."""
_TRANSFERS = 16
"""Blobs that one worker may be sent at once, and that it may send: each takes a few MiB of memory
while it is under way. What is more waits."""
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


class WorkerSession:
    """The session of one enrolled worker. Used on the loop thread only.

    Args:
        service: The executor, as its workers' calls see it.
        identity: The launch of the worker.
        attempt: Which start of its launch the worker is, from 1.
        pid: The worker's process, if it is on this machine.
        resumable: Whether a cut connection may be replaced by another one.
    """

    def __init__(
        self, service: Service, identity: str, attempt: int, pid: int, *, resumable: bool
    ) -> None:
        self.identity = identity
        self.resumable = resumable
        self.is_cut = False  # whether it has no connection at present, after it had one
        # How its process has named itself, and what it was welcomed with, until it is known that
        # the welcome has arrived: if the connection is cut before, the process asks for it again.
        self.process = b""
        self.welcome: pb.Welcome | None = None
        self.taken_over = False  # whether the worker has yet to say which tasks it holds
        self.stream: Stream[pb.ServerMessage] = Stream()
        self.pid = pid
        self.attempt = attempt
        self.worker_id = f"worker-{identity}"
        self.token = secrets.token_bytes(16)
        self.name = _enrolment.session_name(self.token)  # a name that does not reveal the token
        # By lease: large payloads and functions, kept alive while the worker may read their blobs.
        self.payloads: dict[int, tuple[Composed | None, Function | None]] = {}
        self.damaged: dict[int, int] = {}  # by number: how often a kept blob arrived damaged
        self.progress_at = 0.0  # when bytes of a blob came last, by the loop's clock
        self.ending = False  # whether the worker's kept results are being brought here
        self.uploads: dict[int, str] = {}  # by number: the ids of uploads to the bucket
        self.link = Link(enabled=service.compresses)
        # Two limits, because a blob that is sent may wait for one that another worker sends.
        self.outgoing = asyncio.Semaphore(_TRANSFERS)
        self.incoming = asyncio.Semaphore(_TRANSFERS)
        self.first_blob = next(service.blob_ranges) * OWN_BLOBS
        self.results = ResultParts(service, self.worker_id, pid, self.first_blob)
        self._taken: list[int] = []
        self._want: list[int] = []
        self.slot_groups: list[int] = []
        self.printed: set[int] = set()  # leases whose task has printed something
        self._unshown = 0  # bytes of output that were received and not shown yet
        self._service = service
        self._reading: asyncio.Task[Any] | None = None  # reads the present connection
        self._acknowledge_handle: asyncio.TimerHandle | None = None
        self._wanted = asyncio.Event()
        self.told = Introductions(service, self.worker_id, self.link, self._wanted.set)
        self._straight: Frames | None = None  # a plain connection that is ready for tasks
        self._tasks: list[Any] = []
        self._recall: list[int] = []
        self._kill: list[int] = []
        self._notices = (  # what goes into the next message, by its field
            ("forget_functions", self.told.forgotten_functions),
            ("forget_blobs", self.told.forgotten_blobs),
            ("wanted", self._want),
            ("taken", self._taken),
            ("recall", self._recall),
            ("kill", self._kill),
        )
        self._drain = False
        self._drain_said = False
        self._terminate = False
        self._credit = 0
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

    def release(self, blobs: Sequence[Blob]) -> None:
        """Tell the worker that it may drop these blobs, which it keeps."""
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
        """End the session, whether the worker has hung up or not."""
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
        """Use a new connection of the worker, and end the old one.

        Args:
            reading: The task that reads the new connection.

        Returns:
            Whether the worker had a connection before, which may have ended already.
        """
        before, self._reading = self._reading, reading
        was_cut, self.is_cut = self.is_cut, False
        if before is not None:
            before.cancel()
        return before is not None or was_cut

    def is_read_by(self, task: asyncio.Task[Any]) -> bool:
        """Say whether a task reads the present connection, not an earlier one."""
        return self._reading is task

    def detach(self) -> None:
        """Note that the present connection has ended."""
        self._reading = None
        self.is_cut = True

    def output_taken(self, size: int) -> None:
        """Allow the worker to send more output, because ``size`` bytes have been shown.

        Called in the output thread.
        """

        def credit() -> None:
            self._credit += size
            self._unshown -= size + _OUTPUT_ENTRY
            if self._credit > 65536 or not self._closed:
                self._wanted.set()

        try:
            self._service.portal.post(credit)
        except RuntimeError:
            pass  # the loop has closed

    # The stream.

    def _compose(self) -> pb.ServerMessage | None:
        message = pb.ServerMessage()
        self.told.room = MOST_PUSHED
        some = False
        if self._tasks:
            self._compose_tasks(message)
            some = True
        for field, numbers in self._notices:
            if numbers:
                getattr(message, field).extend(numbers)
                numbers.clear()
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
        told = self.told
        leases: list[int] = []
        functions: list[int] = []
        payloads: list[bytes] = []
        estimates: list[float] = []
        numbers: list[int] = []
        timeouts: dict[int, float] = {}
        columns = message.tasks
        size = 0
        taken = 0
        keeper = self._service.keeper
        missing: list[Any] = []
        holds, kept = self._service.holds, []
        takeover, tags = self._service.takeover, []
        for task in tasks:
            if len(leases) >= _BATCH_TASKS or size >= _BATCH_BYTES:
                break
            taken += 1
            payload = task.payload
            future = task.handle
            if payload is None or future is None or future.done():
                # The task was cancelled meanwhile. The core recalls its lease, and the worker hands
                # it back although it never had the task.
                continue
            if holds and (hold := holds.get(future)) is not None:
                hold.was_kept = True
                kept.append(task.lease)
                continue
            if task.inputs and not keeper.is_at_hand(payload, self.worker_id):
                missing.append(task)
                continue
            if type(payload) is Spliced:
                try:
                    payload = payload.join(self._service.store)
                except PayloadError as exc:
                    self._service.portal.loop.call_soon(self._cannot_send, task.lease, exc)
                    continue
            function = task.function
            if function is None:
                functions.append(0)
            else:
                functions.append(function.number)
                if function.number not in told.functions:
                    size += told.introduce(message, function)
            if function is not None and function.composed:
                self.payloads[task.lease] = None, function
            if type(payload) is Composed:
                columns.composed.append(len(leases))
                columns.blob_counts.append(len(payload.blobs))
                columns.blobs.extend([blob.id for blob in payload.blobs])
                size += sum([told.introduce_blob(blob, message) for blob in payload.blobs])
                self.payloads[task.lease] = payload, function
                payload = payload.head
            if task.requirements is not None:
                self._state_requirements(message, len(leases), task, timeouts)
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
        loop = self._service.portal.loop
        if kept:
            returned = events.LeasesReturned(self.worker_id, kept, heard=False)
            loop.call_soon(self._service.feed, returned)
        for task in missing:
            loop.call_soon(keeper.supply, task, self.worker_id, task.lease)
        columns.leases.extend(leases)
        columns.functions.extend(functions)
        columns.payloads.extend(payloads)
        columns.estimates.extend(estimates)
        columns.numbers.extend(numbers)
        self._service.bytes_sent += size

    def _cannot_send(self, lease: int, error: PayloadError) -> None:
        """Fail a task whose arguments do not fit into the store."""
        detail = pb.Failure(lease=lease, payload=_payload.dumps_exception(error))
        failure = events.Failure(FailureKind.PICKLE_FAILED, detail)
        self._service.feed(events.FailuresReceived(self.worker_id, [(lease, failure)]))

    def _state_requirements(
        self, message: pb.ServerMessage, index: int, task: Any, timeouts: dict[int, float]
    ) -> None:
        options = task.requirements.options
        if options.keep:
            message.tasks.kept.append(index)
        if options.timeout is not None:
            timeouts[index] = options.timeout
        env, memory, last = self._service.requirements_of(self.worker_id, task)
        if env or memory or last:
            message.tasks.terms.add(index=index, env=env, memory_bytes=memory, last=last)

    def want(self, blob: Blob) -> None:
        """Ask the worker to send a blob that it keeps."""
        self._want.append(blob.id)
        self._wanted.set()

    def go_straight(self, frames: Frames) -> None:
        """Use a plain connection without detours.

        The worker's messages are handled where they arrive, and a few tasks are sent where the core
        decides about them, both without a further round of the loop.
        """
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
        """Send messages until the session ends.

        Messages that were sent over an earlier connection and may not have arrived come first.
        While the connection is busy, commands are collected for the next message.

        Raises:
            ValueError: If the worker does not acknowledge messages.
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
        """Note a message's number, and say whether the message is new and must be handled.

        Raises:
            ValueError: If its number or its acknowledgement is impossible.
        """
        stream = self.stream
        self.welcome = None
        if not self.resumable:
            return True
        is_news = stream.take(message)
        pause = stream.acknowledge_within
        if pause == 0 or message.draining or self._drain_said:
            self._wanted.set()
        elif pause is not None and self._acknowledge_handle is None:
            loop = self._service.portal.loop
            self._acknowledge_handle = loop.call_later(pause, self._acknowledge)
        return is_news

    def _acknowledge(self) -> None:
        self._acknowledge_handle = None
        if self.stream.owes:
            self._wanted.set()

    def take(self, message: pb.WorkerMessage) -> None:
        """Turn one message of the worker into events.

        Raises:
            ValueError: If the message is malformed.
        """
        service = self._service
        worker = self.worker_id
        heard = True
        if message.HasField("holding"):
            if service.takeover is None:
                raise ValueError("it holds what nobody gave it")
            service.takeover.holding(self, message.holding.leases, message.holding.tags)
        if message.output:
            for output in message.output:
                service.bytes_received += len(output.data)
                if service.output is not None:
                    if service.expects(self.token, output.lease):
                        self.printed.add(output.lease)
                    self._unshown += len(output.data) + _OUTPUT_ENTRY
                    if self._unshown > _MOST_OUTPUT:
                        raise ValueError("more output than it may send ahead")
                    service.output.put(
                        worker,
                        output.number,
                        output.stream,
                        output.data,
                        self.output_taken,
                        service.name_of(worker, output.lease),
                    )
        if message.slot_groups:
            # These process groups may be killed later. 0 and 1 are excluded, as killing them would
            # reach other processes than the worker's.
            self.slot_groups = [each for each in message.slot_groups if 1 < each < 1 << 31]
        if message.ready:
            service.feed(events.WorkerReady(worker))
            heard = False
        if message.started:
            service.feed(events.TasksStarted(worker, list(message.started)))
            heard = False
        if message.HasField("results"):
            columns = message.results
            leases = list(columns.leases)
            results: list[Any] = list(columns.payloads)
            seconds = list(columns.seconds)
            if not len(leases) == len(results) == len(seconds):
                raise ValueError("columns of different length")
            if seconds and not (min(seconds) >= 0.0 and sum(seconds) < LONGEST):
                raise ValueError("run times that are none")
            if columns.direct or columns.composed:
                large = [*columns.direct, *columns.composed]
                if len(set(large)) != len(large):
                    raise ValueError("one result in several places")
            for index in columns.direct:
                lease = leases[index]
                missing = Delivered(None, PayloadError("the result announced never arrived"))
                results[index] = self.results.delivered.pop(lease, missing)
            vanished: list[int] = []
            if columns.composed:
                vanished, taken, staying = self.results.take(columns, results)
                self._taken.extend(taken)
                for blob in staying:
                    self.told.keep(blob)
                self._wanted.set()
            if self.payloads or not self.results.is_empty:
                for lease in leases:
                    self._end_lease(lease)
            if vanished:
                self._lose_results(vanished, leases, results, seconds)
            if service.takeover is not None:
                service.takeover.park(worker, leases, results, seconds)
            service.feed(events.ResultsReceived(worker, leases, results, seconds))
            if self.ending and columns.kept:
                service.create_task(service.keeper.evacuate(self))
            heard = False
        if message.failures:
            failures = []
            for failure in message.failures:
                self._end_lease(failure.lease)
                if failure.lease in self.results.delivered:
                    # The result is here already: the slot's process died before it could report it.
                    result = self.results.delivered.pop(failure.lease)
                    leases, results, seconds = [failure.lease], [result], [failure.seconds]
                    if service.takeover is not None:
                        service.takeover.park(worker, leases, results, seconds)
                    service.feed(events.ResultsReceived(worker, leases, results, seconds))
                    continue
                self.printed.discard(failure.lease)
                kind = _KINDS.get(failure.kind, FailureKind.SLOT_LOST)
                lost = events.Failure(kind, failure, failure.out_of_memory)
                failures.append((failure.lease, lost))
            if service.takeover is not None:
                service.takeover.gone(worker, [lease for lease, _ in failures])
            service.feed(events.FailuresReceived(worker, failures))
            heard = False
        returned = list(message.returned)
        if message.goodbye and worker in service.machine.workers:
            # The worker has answered all tasks that it began. It has not begun its other leases,
            # whose tasks were still on their way.
            returned += service.machine.workers[worker].leases
        if returned:
            for lease in returned:
                self._end_lease(lease)
            if service.takeover is not None:
                service.takeover.gone(worker, returned)
            service.feed(events.LeasesReturned(worker, returned))
            heard = False
        if message.draining:
            self._drain_said = True
            service.feed(events.WorkerDraining(worker))
            heard = False
        if message.initializer_failed:
            service.initializer_failed(message.initializer_failed)
        if heard:
            service.feed(events.WorkerHeard(worker))

    def _end_lease(self, lease: int) -> None:
        """Drop what was kept for a task that the worker does not have any more."""
        self.payloads.pop(lease, None)
        self.results.end_lease(lease)

    def _lose_results(self, indexes: list[int], *columns: list[Any]) -> None:
        """Report results whose files are gone, because the slot's process is, as lost attempts.

        Args:
            indexes: The positions of these results in the columns, in order.
            columns: Leases, results and seconds, from which these entries are removed.
        """
        failures = []
        for index in reversed(indexes):
            lease, _, seconds = [column.pop(index) for column in columns]
            detail = pb.Failure(lease=lease, seconds=seconds)
            failures.append((lease, events.Failure(FailureKind.SLOT_LOST, detail)))
        self._service.feed(events.FailuresReceived(self.worker_id, failures))
