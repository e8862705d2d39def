"""Collects the answers for the client, and puts them into messages of bounded size."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from cloudexec._logs import LOG_STREAM
from cloudexec._proto import tasks_pb2 as pb
from cloudexec.worker.holdings import Holdings, parked
from cloudexec.worker.reporting import ResultBlob
from cloudexec.worker.supervisor import SlotPool
from cloudexec.worker.tasks import Failure

__all__ = ["Outbox"]

_FEW = 4
"""Up to this number, results are sent at once, as waiting for the loop's next round costs time."""
_BATCH_RESULTS = 2048
_BATCH_BYTES = 512 * 1024
_OUTPUT_CREDIT = 1024 * 1024
"""Bytes of output that a worker may have sent and that the client has not shown yet."""


class _TakesComposed(Protocol):
    def __call__(
        self, lease: int, seconds: float, head: bytes, blobs: Sequence[ResultBlob], *, keep: bool
    ) -> None: ...


class Outbox:
    """The answers that have not been put into a message. It does no I/O.

    It implements ``Answers``, so the pool of slots reports to it.

    Args:
        wake: Called when there is something to send.
        composed: Takes results that are in files.

    Attributes:
        wanted: Set when there may be something to send.
        captures_output: Whether the client wants the output of tasks, and not only log records.
        is_ready: Whether the client must be told that a slot is ready.
    """

    def __init__(self, wake: Callable[[], None], composed: _TakesComposed) -> None:
        self.wake = wake
        self.composed = composed
        self.wanted = asyncio.Event()
        self.captures_output = False
        self.is_ready = False
        self._leases: list[int] = []
        self._payloads: list[bytes] = []
        self._seconds: list[float] = []
        self._direct: list[int] = []
        self._composed: dict[int, Sequence[pb.Blob]] = {}  # by index in the columns: the blobs
        self._kept: list[int] = []  # indexes in the columns of results that stay here
        self._sizes: list[int] = []  # bytes of each result, with the parts in the message
        self._bytes = 0  # the sum of these
        self._failures: deque[Failure] = deque()
        self._returned: list[int] = []
        # Leases whose results are being sent in parts. For a recall, they count as answered.
        self._promised: set[int] = set()
        self._output: list[tuple[int, int, int, bytes]] = []
        self._credit = _OUTPUT_CREDIT
        self._initializer_failed = b""
        self._groups_changed = False
        self._is_draining = False
        self._drain_said = False
        self._holding: pb.Holding | None = None

    # Outcomes of tasks.

    def result(self, lease: int, payload: bytes, seconds: float) -> None:
        """Take the result of a task."""
        self._leases.append(lease)
        self._payloads.append(payload)
        self._seconds.append(seconds)
        self._sizes.append(len(payload))
        self._bytes += len(payload)

    def delivered(self, lease: int, seconds: float) -> None:
        """Take the message that a large result has been delivered to the client already."""
        self._direct.append(len(self._leases))
        self.result(lease, b"", seconds)

    def result_in_parts(
        self,
        lease: int,
        payload: bytes,
        seconds: float,
        parts: Sequence[pb.Blob],
        *,
        size: int = 0,
        keep: bool = False,
    ) -> None:
        """Take a large result.

        Args:
            lease: The task's lease.
            payload: The head of the result, which refers to its parts.
            seconds: Seconds that the task ran.
            parts: The parts: their places for the client, or their contents.
            size: Bytes of the parts whose contents are in the message.
            keep: Whether the parts stay here.
        """
        if keep:
            self._kept.append(len(self._leases))
        self._composed[len(self._leases)] = parts
        self.result(lease, payload, seconds)
        self._sizes[-1] += size
        self._bytes += size

    def failure(self, failure: Failure) -> None:
        """Take the failure of an attempt."""
        self._failures.append(failure)

    def returned(self, lease: int) -> None:
        """Hand a task back that has not begun."""
        if lease not in self._promised:  # otherwise its result is being sent
            self._returned.append(lease)

    def promise(self, lease: int) -> None:
        """Note that a result will be reported once its parts have been sent."""
        self._promised.add(lease)

    def end_promise(self, lease: int, *, is_wanted: bool = True) -> None:
        """Note that a promised result was reported. If it is not wanted, hand the task back."""
        self._promised.discard(lease)
        if not is_wanted:
            self._returned.append(lease)

    # Events of slots.

    def output(self, lease: int, number: int, stream: int, data: bytes) -> bool:
        """Take the output of a task.

        Returns:
            Whether to go on reading from that slot. If not, wait until there is credit again.
        """
        if not self.captures_output and stream != LOG_STREAM:
            return True
        self._output.append((lease, number, stream, data))
        self._credit -= len(data)
        return self._credit > 0

    def add_credit(self, size: int) -> bool:
        """Note that the client has taken output; say whether reading from slots may go on."""
        self._credit += size
        return self._credit > 0

    def ready(self) -> None:
        """Tell the client that the first slot is ready."""
        self.is_ready = True
        self.wake()

    def groups_changed(self) -> None:
        """Tell the client the process groups of the slots, which have changed."""
        self._groups_changed = True

    def initializer_failed(self, payload: bytes) -> None:
        """Tell the client that the initializer raised, or killed its slot repeatedly."""
        self._initializer_failed = payload
        self.wake()

    def start_draining(self) -> None:
        """Tell the client to send no more tasks."""
        self._is_draining = True
        self.wake()

    # Messages.

    @property
    def is_small(self) -> bool:
        """Whether there is so little to send that it can be sent at once."""
        return not self.is_ready and len(self._leases) <= _FEW

    def leases(self) -> list[int]:
        """Return the leases of tasks whose outcome is here, or is being sent in parts."""
        return [*self._promised, *self._leases, *(each.lease for each in self._failures)]

    def begin_anew(
        self,
        sent: Sequence[pb.WorkerMessage],
        holdings: Holdings,
        running: Sequence[int],
        pool: SlotPool,
    ) -> None:
        """Prepare for a client that takes this worker over, and has only the journal.

        Args:
            sent: Messages that may not have arrived at the killed client.
            holdings: The tasks that have a key in the journal; their outcomes are sent again.
            running: Leases of tasks that go on.
            pool: As for ``compose``.
        """
        pending = [*sent]
        while (message := self.compose(pool)) is not None:
            pending.append(message)
        results, failures = parked(pending)
        ended = [*(each[0] for each in results), *(each.lease for each in failures)]
        holdings.keep([*running, *self._promised, *ended])
        for lease, payload, seconds, parts in results:
            if lease in holdings:
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
            if each.lease in holdings
        )
        self._holding = holdings.message()
        self._credit = _OUTPUT_CREDIT
        self.is_ready = pool.has_begun
        self._groups_changed = True
        self._drain_said = False

    def hold_nothing(self) -> None:
        """Tell a client that takes this worker over that the worker holds no tasks."""
        self._holding = pb.Holding()

    def compose(self, pool: SlotPool | None) -> pb.WorkerMessage | None:
        """Return the next message, of bounded size; ``None`` if there is nothing to send.

        ``wanted`` is set if more remains to be sent.

        Args:
            pool: The slots, which know which tasks have begun.
        """
        message = pb.WorkerMessage()
        some = False
        if self._holding is not None:
            message.holding.SetInParent()  # also if it is empty
            message.holding.MergeFrom(self._holding)
            self._holding = None
            some = True
        if self._output:
            for lease, number, stream, data in self._output[:_BATCH_RESULTS]:
                message.output.add(lease=lease, number=number, stream=stream, data=data)
            del self._output[:_BATCH_RESULTS]
            if self._output:
                self.wanted.set()
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
                self.wanted.set()
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
            self.wanted.set()
        if self._returned and not (self._leases or self._failures):
            # Handed back only after all answers, because a task may be among these, too, and the
            # answer must count.
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
        if self.is_ready:
            self.is_ready = False
            message.ready = True
            some = True
        if some and self._groups_changed and pool is not None:
            self._groups_changed = False
            message.slot_groups.extend(pool.groups())
        if self._is_draining and not self._drain_said:
            self._drain_said = True
            message.draining = True
            some = True
        return message if some else None
