"""Decides which waiting task goes to which slot, and when another slot is started."""

from __future__ import annotations

import asyncio
import struct

from cloudexec import _plain_json
from cloudexec.worker.blobs import BlobCache
from cloudexec.worker.child import Child
from cloudexec.worker.footprint import Footprint
from cloudexec.worker.frames import COMPOSED, HEADER, KEPT, Kind
from cloudexec.worker.functions import Functions
from cloudexec.worker.slot_model import SlotState
from cloudexec.worker.slots import Slots
from cloudexec.worker.tasks import WorkItem
from cloudexec.worker.waiting import WaitingTasks

__all__ = ["Dispatch"]

_BATCH_SECONDS = 0.002
"""Seconds of estimated work that a slot may hold. This is enough to hide the time of a wake-up, and
so little that no other slot waits for it."""
_BATCH_TASKS = 256
_BATCH_BYTES = 256 * 1024
_MOST_STARTING = 4
"""Number of slots that may be starting at once."""


class Dispatch:
    """Sends waiting tasks to slots.

    Args:
        most: Slots that there may be.
        functions: That tasks name.
        blobs: What tasks refer to.
        slots: Where tasks go.
        waiting: Where they come from.
        footprint: Told of tasks with requirements of their own.
    """

    def __init__(
        self,
        most: int,
        functions: Functions,
        blobs: BlobCache,
        slots: Slots,
        waiting: WaitingTasks,
        footprint: Footprint,
    ) -> None:
        self._most = most
        self._functions = functions
        self._blobs = blobs
        self._slots = slots
        self._waiting = waiting
        self._footprint = footprint
        self._loop = asyncio.get_running_loop()

    def dispatch(self) -> None:
        """Give waiting tasks to slots that have room."""
        waiting, slots = self._waiting, self._slots
        if not waiting.queue or waiting.is_draining:
            return
        idle: list[Child] = []
        busy: list[Child] = []
        alive = 0
        for slot in slots.children.values():
            if not slot.is_staying:
                continue
            alive += 1
            if slot.files.is_waiting:
                continue
            if slot.state is SlotState.READY and slot.held:
                busy.append(slot)
            elif not slot.held:
                idle.append(slot)
        # Ready slots come first. Starting ones get tasks, too, as they are ready in milliseconds.
        idle.sort(key=lambda slot: slot.state is SlotState.STARTING)
        room = self._most - len(slots.children)
        starting = sum(1 for slot in idle if slot.state is SlotState.STARTING)
        wanted = len(waiting.queue) - len(idle)
        while room > 0 and wanted > 0 and starting < _MOST_STARTING:
            forked = slots.fork()
            if forked is None:
                break
            idle.append(forked)
            room -= 1
            wanted -= 1
            starting += 1
            alive += 1
        if not slots.announced:
            return
        queue = waiting.queue
        for slot in idle:
            if not queue:
                break
            if slot.state is SlotState.READY:
                self._send_batch(slot, -(-len(queue) // max(alive, 1)))
        for slot in busy:
            if not queue:
                break
            if slot.seconds < _BATCH_SECONDS / 2:
                self._send_batch(slot, -(-len(queue) // max(alive, 1)))

    def _send_batch(self, slot: Child, share: int) -> None:
        """Send as many tasks as a ready slot should hold, at most ``share`` of them."""
        queue = self._waiting.queue
        known = self._functions.known
        most = min(share, _BATCH_TASKS - len(slot.held), slot.last - slot.sent)
        leases: list[int] = []
        functions: list[int] = []
        payloads: list[bytes] = []
        size = 0
        held = slot.held
        if not held:
            slot.progress_at = self._loop.time()
            slot.seconds = 0.0
        seconds = slot.seconds
        while queue and len(leases) < most:
            item = queue[0]
            requirements = item.requirements
            alone = item.timeout > 0 or item.seconds > _BATCH_SECONDS or requirements is not None
            if held and (alone or seconds + item.seconds > _BATCH_SECONDS):
                break
            if size and size + len(item.payload) > _BATCH_BYTES:
                break
            number = item.function
            if number and number not in slot.functions and number in known:
                if leases:
                    self._write_batch(slot, leases, functions, payloads)
                    leases, functions, payloads = [], [], []
                self._functions.send(slot, number)
            queue.popleft()
            if alone:
                self._prepare(slot, item)
            payload = item.payload
            if item.blobs is not None:
                number |= COMPOSED
                payload = self._blobs.places(item.blobs) + payload
            if item.keep:
                number |= KEPT
            slot.sent += 1
            held[slot.sent] = item
            leases.append(item.lease)
            functions.append(number)
            payloads.append(payload)
            size += len(payload)
            seconds += item.seconds
            if alone:
                slot.enter(SlotState.FULL)
                break
        slot.seconds = seconds
        if leases:
            self._write_batch(slot, leases, functions, payloads)

    def _prepare(self, slot: Child, item: WorkItem) -> None:
        """Prepare an idle slot for a task with terms of its own, such as environment variables."""
        self._footprint.begin(slot, item)
        requirements = item.requirements
        if requirements is None:
            return
        if requirements.env:
            body = _plain_json.encode(requirements.env)
            slot.write(HEADER.pack(Kind.ENVIRONMENT, len(body), slot.sent + 1) + body)
        if requirements.last:
            slot.last = slot.sent + 1

    def _write_batch(
        self, slot: Child, leases: list[int], functions: list[int], payloads: list[bytes]
    ) -> None:
        count = len(leases)
        sizes = list(map(len, payloads))
        columns = struct.pack(f"<I{count}Q{count}I{count}I", count, *leases, *functions, *sizes)
        length = len(columns) + sum(sizes)
        header = HEADER.pack(Kind.BATCH, length, slot.sent - count + 1)
        slot.write(b"".join((header, columns, *payloads)))
