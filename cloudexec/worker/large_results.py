"""Large results, which slots leave in files; the supervisor keeps these open until taken."""

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
"""Number of large parts of results that may wait to be taken, as each is an open file here."""
_COMPOSED_RESULT = struct.Struct("<f?")


class LargeResults:
    """The large results that have not been taken.

    If there are too many, slots that have made one wait, so that they do not make more.

    Args:
        slots: The slots that make the results.
        answers: Takes the results.
        most: Bytes of results that may wait to be taken.
        taken: Called when results have been taken, so that slots may take tasks again.
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
        # Slots that wait, and the numbers of the files that they are told of when they may go on.
        self._waiting: deque[tuple[Child, list[int]]] = deque()

    def take(self, slot: Child, delivery: int, body: bytes) -> bool:
        """Open the files that a result is in, and report the result.

        Returns:
            Whether the delivery has been answered. If not, it is lost together with its slot.
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
            slot.unopened.add(delivery)  # the slot has run this delivery, whose result is lost
            if slot.state is SlotState.EXITED:
                return False
            if exc.errno in (errno.EMFILE, errno.ENFILE):
                self._refuse(slot, delivery, [place.number for place in places], exc)
                return True
            # The slot is dying, or this process may not open its files. The slot waits for it.
            self._slots.kill(slot)
            return False
        numbers = [blob.place.number for blob in blobs if blob.owner is None]
        self._files += len(numbers)
        self._bytes += sum([blob.place.size for blob in blobs])
        if numbers and self._is_full() and not keep:
            # The slot's process waits, so that it does not make more results.
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
        """Fail a task whose result cannot be opened here, without ending its slot."""
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
        """Close a part of a result that was not counted."""
        slot = blob.owner
        if slot is None:
            os.close(blob.fd)
        else:
            slot.files.small -= 1
            slot.files.small_bytes -= block_size(blob.place.size)

    def _release(self, slot: Child, numbers: Sequence[int]) -> None:
        """Tell a slot that the files of its result are open here."""
        if slot.state is not SlotState.EXITED:
            for number in numbers:
                slot.write(HEADER.pack(Kind.RELEASE, 0, number))
        slot.files.is_waiting = slot.files.small_bytes > MOST_WAITING or any(
            each is slot for each, _ in self._waiting
        )

    def _is_full(self) -> bool:
        return self._bytes > self._most or self._files > _MOST_WAITING_FILES

    def let_go(self, blob: ResultBlob, *, close: bool = True) -> None:
        """Drop a part of a result, which has been taken or is not wanted.

        Args:
            blob: The part.
            close: Whether to close its file, if no other part is in it.
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
                self.close(slot)  # the slot is gone, and all its messages have been read
        while self._waiting and not self._is_full():
            self._release(*self._waiting.popleft())
        self._taken()

    def close(self, slot: Child) -> None:
        """Close the shared file of a slot that is gone, if no part in it waits."""
        if not slot.files.small:
            slot.files.close()
