"""Reads what slots answer and print, from their pipes and shared pages, and hands it over."""

from __future__ import annotations

import asyncio
import os
import platform
import struct
import time
from collections.abc import Callable, Sequence

from cloudexec._logs import LOG_STREAM, line_of
from cloudexec.worker import frames
from cloudexec.worker.child import PIPE_BYTES, Child
from cloudexec.worker.footprint import Footprint
from cloudexec.worker.frames import CURRENT, FLUSHES, HEADER, RESULT, RESULTS_AT, USED, Kind
from cloudexec.worker.large_results import LargeResults
from cloudexec.worker.reporting import Answers
from cloudexec.worker.slot_model import SlotState
from cloudexec.worker.slots import Slots
from cloudexec.worker.tasks import Failure
from cloudexec.worker.waiting import WaitingTasks

__all__ = ["AnswerReader"]

_TAIL_BYTES = 8 * 1024
"""Bytes of a task's last output that are kept for the exception, if the task fails."""
_READ_BYTES = 64 * 1024
_REORDERS_WRITES = platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686")
_WRITES_ARRIVE = 50e-6
"""Seconds: on processors that reorder writes, such as Arm, another processor sees a write at most
this long after it sees a later one."""


class AnswerReader:
    """Reads what slots answer and print.

    Args:
        slots: The slots, whose states change with their answers.
        waiting: Takes tasks that a slot has dropped.
        large: Takes results that are in files.
        footprint: Told when a slot has answered all its tasks.
        answers: Takes answers and output.
        go_on: Called when a slot has answered.
    """

    def __init__(
        self,
        slots: Slots,
        waiting: WaitingTasks,
        large: LargeResults,
        footprint: Footprint,
        answers: Answers,
        go_on: Callable[[], None],
    ) -> None:
        self._slots = slots
        self._waiting = waiting
        self._large = large
        self._footprint = footprint
        self._answers = answers
        self._go_on = go_on
        self._loop = asyncio.get_running_loop()

    # When to read.

    def watch(self, slot: Child) -> None:
        """Read from a slot whenever it writes something."""
        self._loop.add_reader(slot.results_fd, self._on_answers, slot)
        for fd, stream in ((slot.stdout_fd, 1), (slot.stderr_fd, 2)):
            self._loop.add_reader(fd, self._on_raw_output, slot, fd, stream)

    def _pause(self, slot: Child) -> None:
        """Stop reading from a slot until the client has taken output."""
        if not slot.is_paused and slot.state is not SlotState.EXITED:
            slot.is_paused = True
            for fd in (slot.results_fd, slot.stdout_fd, slot.stderr_fd):
                self._loop.remove_reader(fd)

    def resume(self) -> None:
        """Read again from slots that were paused, because the client has taken output."""
        for slot in self._slots.children.values():
            if slot.is_paused and slot.state is not SlotState.EXITED:
                slot.is_paused = False
                self.watch(slot)
                self._loop.call_soon(self._on_answers_again, slot)

    def _on_answers_again(self, slot: Child) -> None:
        if slot.state is not SlotState.EXITED and not slot.is_paused:
            self._on_answers(slot)

    def _on_answers(self, slot: Child) -> None:
        self._read(slot)
        self._go_on()

    # Reading.

    def _read(self, slot: Child, *, last: bool = False, rest: bool = False) -> None:
        """Read from the slot's pipe.

        Args:
            slot: The slot.
            last: Whether to read to the pipe's end, because the slot is gone.
            rest: Whether to read everything that is there, even beyond the client's output credit.
        """
        # The first read is small: allocating a megabyte costs more than most answers.
        read_bytes = _READ_BYTES
        done = 0
        while True:
            try:
                data = os.read(slot.results_fd, read_bytes)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                if not last:
                    self._loop.remove_reader(slot.results_fd)
                break
            done += len(data)
            is_short = len(data) < read_bytes
            if slot.input:
                slot.input += data
                data = bytes(slot.input)
                slot.input.clear()
            used = self._parse(slot, data)
            if used < len(data):
                slot.input += data[used:]
            if not last and (is_short or (done >= PIPE_BYTES if rest else slot.is_paused)):
                break
            read_bytes = PIPE_BYTES

    def read_last(self, slot: Child) -> None:
        """Read everything that a slot which has exited left in its pipes."""
        self._read(slot, last=True)
        self._take_finished(slot, self._finished(slot))
        for fd, stream in ((slot.stdout_fd, 1), (slot.stderr_fd, 2)):
            self._on_raw_output(slot, fd, stream, last=True)

    def _finished(self, slot: Child) -> bytes:
        """Return the results that the slot has finished and not written to its pipe."""
        cells = slot.cells
        flushes, used = cells[FLUSHES], cells[USED]
        results = bytes(slot.page[RESULTS_AT : RESULTS_AT + used])
        # If the slot has flushed meanwhile, other results may be in the buffer now, and these are
        # in the pipe.
        return results if cells[FLUSHES] == flushes else b""

    def _take_finished(self, slot: Child, results: bytes) -> None:
        if results:
            progress = slot.progress_at
            self._take_results(slot, results, 0, len(results))
            slot.progress_at = progress  # unchanged, as it is not known when these were finished

    def look(self, slots: Sequence[Child]) -> list[tuple[Child, int]]:
        """Take all results that slots have finished.

        Returns:
            Each slot with the delivery that it runs, or is about to answer or to drop, if the slot
            still holds that. It has begun none of the others that it holds. It may begin them
            later, except those that its fence covers.
        """
        # Read in the order in which a task proceeds: cell, page, pipe. In the opposite order, a
        # task that proceeds meanwhile would be seen nowhere, and count as not begun.
        found = [(slot, slot.cells[CURRENT]) for slot in slots]
        if found and _REORDERS_WRITES:
            time.sleep(_WRITES_ARRIVE)
        for slot, _ in found:
            results = self._finished(slot)
            self._read(slot, rest=True)  # first, as the output of these tasks is in the pipe
            self._take_finished(slot, results)
        return found

    # Answers.

    def _parse(self, slot: Child, data: bytes) -> int:
        at = 0
        size = len(data)
        while size - at >= HEADER.size:
            kind, length, number = HEADER.unpack_from(data, at)
            if size - at - HEADER.size < length:
                break
            at += HEADER.size
            if kind == Kind.RESULTS:
                if not slot.is_paused:
                    # Raw output so far belongs to one of these tasks, and not to the next one.
                    first = RESULT.unpack_from(data, at)[0]
                    self._on_raw_output(slot, slot.stdout_fd, 1, delivery=first)
                    self._on_raw_output(slot, slot.stderr_fd, 2, delivery=first)
                self._take_results(slot, data, at, at + length)
            else:
                self._take_frame(slot, kind, number, data[at : at + length])
            at += length
        return at

    def _take_results(self, slot: Child, data: bytes, at: int, end: int) -> None:
        held = slot.held
        unpack = RESULT.unpack_from
        header = RESULT.size
        result = self._answers.result
        while at < end:
            delivery, seconds, status, size = unpack(data, at)
            at += header
            payload = data[at : at + size]
            at += size
            item = held.pop(delivery, None)
            if item is None:
                continue  # the result was read from the shared page already
            slot.seconds -= item.seconds
            if status == frames.OK:
                result(item.lease, payload, seconds)
            elif status == frames.DELIVERED:
                self._answers.delivered(item.lease, seconds)
            else:
                failure = Failure(item.lease, status, payload, seconds=seconds)
                failure.output = self.tail(slot, delivery)
                self._answers.failure(failure)
            if slot.tail:
                slot.tail.pop(delivery, None)
        self.note_answered(slot)

    def _take_frame(self, slot: Child, kind: int, number: int, body: bytes) -> None:
        if kind == Kind.OUTPUT:
            self._take_output(slot, number, body[0], body[1:])
        elif kind == Kind.RESULT_COMPOSED:
            if self._large.take(slot, number, body):
                self.note_answered(slot)
        elif kind == Kind.FAILURE:
            item = slot.take_out(number)
            if item is not None:
                seconds, status = struct.unpack_from("<fB", body)
                tail = self.tail(slot, number)
                self._answers.failure(
                    Failure(item.lease, status, body[5:], output=tail, seconds=seconds)
                )
            self.note_answered(slot)
        elif kind in (Kind.DROPPED, Kind.GONE):
            item = slot.take_out(number)
            if item is not None:  # otherwise the task was taken back already
                if kind == Kind.GONE:
                    # Hand the task back: the client can make its inputs available again.
                    self._answers.returned(item.lease)
                else:
                    self._waiting.requeue([item])
                self.note_answered(slot)
        elif kind == Kind.READY:
            self._slots.note_ready(slot)
        elif kind == Kind.INITIALIZER_FAILED:
            self._slots.note_initializer_failed(slot, body)

    def note_answered(self, slot: Child) -> None:
        """Note that a slot has answered, or that its tasks were taken back."""
        now = self._loop.time()
        if slot.answered(now):
            slot.idle_since = now
            slot.tail.clear()
            self._footprint.end(slot)
            if slot.sent >= slot.last and slot.is_staying:
                self._slots.end(slot)

    # Output.

    def tail(self, slot: Child, delivery: int) -> str:
        """Return the last part of what a task printed."""
        return bytes(slot.tail.get(delivery, b"")).decode("utf-8", "replace")

    def _take_output(self, slot: Child, delivery: int, stream: int, data: bytes) -> None:
        item = slot.held.get(delivery)
        tail = slot.tail.get(delivery)
        if tail is None:
            tail = slot.tail[delivery] = bytearray()
        tail += data if stream != LOG_STREAM else line_of(data)
        if len(tail) > 2 * _TAIL_BYTES:
            del tail[:-_TAIL_BYTES]
        lease, number = (item.lease, item.number) if item is not None else (0, 0)
        if not self._answers.output(lease, number, stream, data):
            self._pause(slot)

    def _on_raw_output(
        self, slot: Child, fd: int, stream: int, *, last: bool = False, delivery: int = 0
    ) -> None:
        """Take output that did not go through ``sys.stdout``: from C code or a task's children."""
        while True:
            try:
                data = os.read(fd, 65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                if not last:
                    self._loop.remove_reader(fd)
                return
            self._take_output(slot, delivery or slot.cells[CURRENT], stream, data)
            self._answers.wake()
            if not last:
                return
