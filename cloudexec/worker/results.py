"""The files in which a slot's large results stay until they have been taken.

Each large part of a result has a file of its own. The slot goes on only when the supervisor has
opened it, so that the result is not lost if the slot dies. Small parts share one file, whose blocks
are used again.
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
"""Bytes of small parts of results that may wait to be taken."""
_SECONDS = struct.Struct("<f?")


class ResultFiles:
    """The files of one slot's large results.

    Args:
        outlet: Tells the supervisor of them.
        await_release: Returns once the supervisor has opened a file, or has taken a part from one.
    """

    def __init__(self, outlet: Outlet, await_release: Callable[[], None]) -> None:
        self._outlet = outlet
        self._await_release = await_release
        self._numbers = 0
        self._files: dict[int, Segment] = {}
        self._blocks: dict[int, tuple[int, int]] = {}
        self._arena: Arena | None = None
        self._arena_is_shared = False  # whether the supervisor has opened the shared file

    def put(self, pieces: Sequence[Any], size: int) -> Place:
        """Write a part of a result.

        Args:
            pieces: The part's content.
            size: Bytes of all pieces together.

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
                segment.close()  # closed here, as the exception's traceback keeps it alive
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

        This returns once the supervisor has opened the result's files, so that it is not lost if
        this process ends, and once not too many bytes wait to be taken.
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
        """Note that a part was taken; 0 means that the supervisor has opened the shared file."""
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
        """Free the parts of a result that is not reported, because pickling it failed."""
        for place in places:
            self.release(place.number)


def _spill_directory() -> str:
    import tempfile

    return tempfile.gettempdir()
