"""Large results that slots have left in files: they are open here until they have been taken."""

from __future__ import annotations

import errno
import os
import struct
from collections import deque
from collections.abc import Callable, Sequence

from cloudexec._objects.places import unpack_places
from cloudexec._objects.segments import block_size
from cloudexec.worker.child import Child
from cloudexec.worker.frames import HEADER, Kind
from cloudexec.worker.reporting import Answers, ResultBlob
from cloudexec.worker.results import MOST_WAITING
from cloudexec.worker.slot_model import SlotState
from cloudexec.worker.slots import Slots
from cloudexec.worker.tasks import PICKLE_FAILED, Failure

__all__ = ["LargeResults"]

_MOST_WAITING_FILES = 256
"""Large results that may wait to be taken: each has a file that is open here."""
_COMPOSED_RESULT = struct.Struct("<f?")


class LargeResults:
    """The large results that have not been taken.

    Slots wait when there are too many: with them waits what they would go on to make.

    Args:
        slots: Whose results they are.
        answers: Where they go.
        most: Bytes of them that may wait to be taken.
        taken: Called when some have been taken, and slots may have room for tasks again.
    """

    def __init__(
        self, slots: Slots, answers: Answers, most: int, taken: Callable[[], None]
    ) -> None:
        self._slots = slots
        self._answers = answers
        self._most = most
        self._taken = taken
        self._bytes = 0
        self._files = 0
        self._waiting: deque[tuple[Child, list[int]]] = deque()  # slots, and what to release then

    def take(self, slot: Child, delivery: int, body: bytes) -> bool:
        """Take hold of the files that a result is in, and report it.

        Returns:
            Whether the delivery has been answered. Otherwise it is lost, and the slot with it.
        """
        seconds, keep = _COMPOSED_RESULT.unpack_from(body)
        places, at = unpack_places(memoryview(body)[_COMPOSED_RESULT.size :])
        head = body[_COMPOSED_RESULT.size + at :]
        blobs: list[ResultBlob] = []
        try:
            for place in places:
                if place.mappable:
                    fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
                    blobs.append(ResultBlob(fd, place))
                    continue
                files = slot.files
                if files.arena < 0:
                    files.arena = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
                    slot.write(HEADER.pack(Kind.RELEASE, 0, 0))
                files.small += 1
                files.small_bytes += block_size(place.size)
                blobs.append(ResultBlob(files.arena, place, slot))
        except OSError as exc:
            for blob in blobs:
                self._drop(blob)
            slot.unopened.add(delivery)  # it is to blame for this delivery, which it has run
            if slot.state is SlotState.EXITED:
                return False
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                self._refuse(slot, delivery, [place.number for place in places], exc)
                return True
            self._slots.kill(slot)  # it is dying, or its files are hidden from us: it waits for us
            return False
        numbers = [blob.place.number for blob in blobs if blob.owner is None]
        self._files += len(numbers)
        self._bytes += sum([blob.place.size for blob in blobs])
        if numbers and self._is_full() and not keep:
            # Its process waits, and with it what it would go on to make.
            slot.files.is_waiting = True
            self._waiting.append((slot, numbers))
        else:
            self._release(slot, numbers)
        item = slot.take_out(delivery)
        if item is None:
            for blob in blobs:
                self.let_go(blob)
        else:
            self._answers.composed(item.lease, seconds, head, blobs, keep=keep)
        return True

    def _refuse(self, slot: Child, delivery: int, numbers: list[int], error: OSError) -> None:
        """Fail a task whose result cannot be opened here; its slot goes on."""
        from cloudexec._errors import PayloadError
        from cloudexec._payload import dumps_exception

        for number in numbers:
            slot.write(HEADER.pack(Kind.RELEASE, 0, number))
        item = slot.take_out(delivery)
        if item is not None:
            why = PayloadError(
                f"the worker could not open the task's result ({error.strerror}): it needs a file "
                f"descriptor for each large result that waits to be sent; raise its limit "
                f"(ulimit -n)"
            )
            self._answers.failure(Failure(item.lease, PICKLE_FAILED, dumps_exception(why)))

    def _drop(self, blob: ResultBlob) -> None:
        """Close a part of a result that was never counted."""
        slot = blob.owner
        if slot is None:
            os.close(blob.fd)
        else:
            slot.files.small -= 1
            slot.files.small_bytes -= block_size(blob.place.size)

    def _release(self, slot: Child, numbers: Sequence[int]) -> None:
        """Tell a slot that files of its results are open here."""
        if slot.state is not SlotState.EXITED:
            for number in numbers:
                slot.write(HEADER.pack(Kind.RELEASE, 0, number))
        slot.files.is_waiting = slot.files.small_bytes > MOST_WAITING or any(
            each is slot for each, _ in self._waiting
        )

    def _is_full(self) -> bool:
        return self._bytes > self._most or self._files > _MOST_WAITING_FILES

    def let_go(self, blob: ResultBlob, *, close: bool = True) -> None:
        """A part of a result has been taken, or nobody wants it.

        Args:
            blob: Which.
            close: Whether to close its file, if it is the only one in it.
        """
        slot = blob.owner
        self._bytes -= blob.place.size
        if slot is None:
            self._files -= 1
            if close:
                os.close(blob.fd)
        else:
            slot.files.small -= 1
            slot.files.small_bytes -= block_size(blob.place.size)
            if slot.state is not SlotState.EXITED:
                self._release(slot, [blob.place.number])
            elif slot.number not in self._slots.children:
                self.close(slot)  # all that it said has been read
        while self._waiting and not self._is_full():
            self._release(*self._waiting.popleft())
        self._taken()

    def close(self, slot: Child) -> None:
        """Close the file of a slot that is gone, once nothing waits in it."""
        if not slot.files.small:
            slot.files.close()
