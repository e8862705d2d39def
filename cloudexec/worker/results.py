"""A slot's large results, in files until they have been taken.

Large ones have a file each, which the supervisor has opened before the slot goes on, so that it may
die. Small ones lie in blocks of one file, which are used again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import Any

from cloudexec._objects.places import Place, pack_places
from cloudexec._objects.segments import Arena, Segment
from cloudexec._objects.store import MAPPED_BYTES
from cloudexec.worker.frames import SPILL, Kind
from cloudexec.worker.outlet import Outlet
from cloudexec.worker.reach import out_of_reach

__all__ = ["MOST_WAITING", "ResultFiles"]

MOST_WAITING = 32 * 1024 * 1024
"""Bytes of small results that may wait to be taken."""
_SECONDS = struct.Struct("<f?")


class ResultFiles:
    """Where one slot leaves its large results.

    Args:
        outlet: Where the supervisor is told of them.
        await_release: Returns once the supervisor has said that it has a file open, or has taken
            what was in one.
    """

    def __init__(self, outlet: Outlet, await_release: Callable[[], None]) -> None:
        self._outlet = outlet
        self._await_release = await_release
        self._numbers = 0
        self._files: dict[int, Segment] = {}
        self._blocks: dict[int, tuple[int, int]] = {}
        self._arena: Arena | None = None
        self._arena_is_shared = False  # the supervisor has it open: it outlives this process

    def put(self, pieces: Sequence[Any], size: int) -> Place:
        """Write a result's blob.

        Args:
            pieces: Its content.
            size: Bytes in all.

        Raises:
            PayloadTooLargeError: If there is no room for it.
        """
        try:
            return self._put(pieces, size)
        except OSError as exc:
            from cloudexec._errors import PayloadTooLargeError

            raise PayloadTooLargeError(
                f"the worker has no room for {size} bytes of a result ({exc.strerror}); give it "
                f"more disk or memory, or return less",
                size_bytes=size,
            ) from exc

    def _put(self, pieces: Sequence[Any], size: int) -> Place:
        self._numbers += 1
        number = self._numbers
        if size >= MAPPED_BYTES:
            segment = Segment(_spill_directory() if self._outlet.cells[SPILL] else None)
            segment.renumber(out_of_reach(segment.fd))
            try:
                segment.write_all(pieces)
            except OSError:
                segment.close()  # the exception's traceback refers to it
                raise
            self._files[number] = segment
            return Place(number, size, segment.path, 0, mappable=True)
        arena = self._arena
        if arena is None:
            arena = self._arena = Arena()
            arena.segment.renumber(out_of_reach(arena.segment.fd))
        offset = arena.allocate(size)
        arena.segment.write_all(pieces, offset)
        self._blocks[number] = (offset, size)
        return Place(number, size, arena.segment.path, offset, mappable=False)

    def send(
        self,
        delivery: int,
        seconds: float,
        places: Sequence[Place],
        head: bytes,
        keep: bool,
    ) -> None:
        """Tell the supervisor of a result.

        Returns once the supervisor has open whatever the result is in, so that it is not lost if
        this process ends, and not too much of it waits to be taken.
        """
        body = _SECONDS.pack(seconds, keep) + pack_places(places) + head
        self._outlet.send(Kind.RESULT_COMPOSED, delivery, body)
        while any(place.number in self._files for place in places) or (
            self._arena is not None
            and (
                self._arena.used > MOST_WAITING
                or (not self._arena_is_shared and any(p.number in self._blocks for p in places))
            )
        ):
            self._await_release()

    def release(self, number: int) -> None:
        """A blob has been taken; 0: the arena is open in the supervisor."""
        if not number:
            self._arena_is_shared = True
            return
        segment = self._files.pop(number, None)
        if segment is not None:
            segment.close()
        block = self._blocks.pop(number, None)
        if block is not None and self._arena is not None:
            self._arena.free(*block)

    def drop(self, places: Sequence[Place]) -> None:
        """Blobs of a result that will not be."""
        for place in places:
            self.release(place.number)


def _spill_directory() -> str:
    import tempfile

    return tempfile.gettempdir()
