"""Collects the parts (blobs) of a worker's large results.

Some parts arrive before the result that refers to them. Others lie in files of a worker on this
machine, which are opened here.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any

from cloudexec._descriptors import can_open
from cloudexec._errors import PayloadError
from cloudexec._memory import room_for
from cloudexec._objects.places import Place, is_path_of, open_shared
from cloudexec._objects.store import Blob
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._records import Composed
from cloudexec._server.direct import Delivered
from cloudexec._server.rpc.calls import LARGEST_BLOB
from cloudexec._server.service import Service
from cloudexec._wire.channel import CHUNK_BYTES

__all__ = ["OWN_BLOBS", "ResultParts"]

_FILES_TIMEOUT = 10.0
"""Seconds for which results wait if this process has too many files open."""
_FILES_PAUSE = 0.1
OWN_BLOBS = 1 << 40
"""Size of the range of numbers that each worker may give to its blobs."""
_MOST_STORED = 256
"""Number of kept blobs that a worker may put into the bucket before it sends their results."""


class ResultParts:
    """The parts of one worker's large results that have arrived.

    Used on the loop thread; ``spill`` also opens files in another thread.

    Args:
        service: The executor, as its workers' calls see it.
        worker: The worker's id.
        pid: The worker's process, if it is on this machine. A worker may name only files of this
            process.
        first_blob: The number before the first that the worker may give to a blob.
    """

    def __init__(
        self,
        service: Service,
        worker: str,
        pid: int,
        first_blob: int,
    ) -> None:
        self.delivered: dict[int, Delivered | Composed] = {}
        """By lease: results that came through the direct channel."""
        self.arrived: dict[int, Blob | PayloadError] = {}
        """By number: parts whose results have not arrived yet."""
        self._parts: dict[int, list[int]] = {}  # by lease: the numbers of its parts in ``arrived``
        # By number: digests of kept blobs in the bucket whose results have not arrived yet.
        self._stored_ahead: dict[int, bytes] = {}
        self._short_of_files = False  # whether the last wait for free descriptors was in vain
        self._service = service
        self._worker = worker
        self._pid = pid
        self._first = first_blob

    def owns(self, number: int) -> bool:
        """Say whether a number is in the range that the worker may give to its blobs."""
        return self._first < number < self._first + OWN_BLOBS

    def part_arrived(self, lease: int, number: int, blob: Blob) -> None:
        """Take a part that arrived before the result of its lease."""
        self.arrived[number] = blob
        self._parts.setdefault(lease, []).append(number)

    def stored_ahead(self, number: int, sha256: bytes) -> None:
        """Note that a part which stays on the worker is in the bucket before its result arrived."""
        self._stored_ahead[number] = sha256
        if len(self._stored_ahead) > _MOST_STORED:
            del self._stored_ahead[next(iter(self._stored_ahead))]

    @property
    def is_empty(self) -> bool:
        """Whether no part waits for its result."""
        return not (self.arrived or self._parts)

    def end_lease(self, lease: int) -> None:
        """Drop the parts of a task that the worker does not have any more."""
        for number in self._parts.pop(lease, ()):
            self.arrived.pop(number, None)

    def take(
        self, columns: pb.Results, results: list[Any]
    ) -> tuple[list[int], list[int], list[Blob]]:
        """Put large results together from their heads and parts.

        Args:
            columns: The worker's message about its results.
            results: The heads of the results, which are replaced by the results.

        Returns:
            The indexes of results that are gone, the numbers of parts that the worker may drop, and
            the parts that stay on the worker.
        """
        at = 0
        vanished: list[int] = []
        taken: list[int] = []
        staying: list[Blob] = []
        kept = set(columns.kept)
        for index, count in zip(columns.composed, columns.blob_counts, strict=True):
            parts = columns.blobs[at : at + count]
            at += count
            numbers = tuple([part.number for part in parts])
            if index in kept:
                blobs = tuple([self._know_kept(part) for part in parts])
                staying += blobs
                results[index] = Composed(results[index], blobs, numbers)
                results[index].shared = True
                continue
            try:
                blobs = tuple([self._take_blob(part) for part in parts])
            except PayloadError as exc:
                results[index] = Delivered(None, exc)
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                vanished.append(index)
            except OSError as exc:  # the result exists: the task must not run again for this
                why = f"a result cannot be taken from its file: {exc.strerror}"
                results[index] = Delivered(None, PayloadError(why))
            else:
                results[index] = Composed(results[index], blobs, numbers)
            taken += [part.id for part in parts if part.path]
        return vanished, taken, staying

    def _know_kept(self, described: pb.Blob) -> Blob:
        """Return the blob of a part that stays on the worker."""
        if not self.owns(described.id):
            raise ValueError(f"{described.id} is not its own to give to a blob")
        if described.size > LARGEST_BLOB:
            raise ValueError(f"{described.size} is no size of a blob")
        place = None
        if described.path and self._service.direct_path:
            place = self._place_of(described)
        blob = self._service.store.remote(described.id, described.size, self._worker, place)
        sha256 = self._stored_ahead.pop(blob.id, b"")
        if sha256:
            blob.stored, blob.sha256 = True, sha256
        return blob

    def _place_of(self, described: pb.Blob) -> Place:
        """Return the place that a worker on this machine gives for one of its blobs.

        Raises:
            ValueError: If the path is not one of the worker's own files.
        """
        path = described.path
        if not is_path_of(self._pid, path):
            raise ValueError(f"{path[:100]!r} is no file of its own")
        mappable = described.mappable and not described.offset
        return Place(described.id, described.size, path, described.offset, mappable)

    def _take_blob(self, described: pb.Blob) -> Blob:
        arrived = self.arrived.pop(described.id, None)
        if described.content and not described.path:
            if len(described.content) != described.size:
                raise ValueError(f"{len(described.content)} bytes are none of {described.size}")
            self._service.bytes_received += described.size
            content = bytearray(described.content)
            return self._service.store.take_over(described.size, content=content, spill=True)
        if arrived is None and described.path and self._service.direct_path:
            arrived = self._open_blob(self._place_of(described))
        if isinstance(arrived, PayloadError):
            raise arrived
        if arrived is None or arrived.size != described.size:
            raise PayloadError("a part of the result never arrived")
        return arrived

    def _open_blob(self, place: Place) -> Blob:
        """Take over a part of a result from a file of a worker on this machine."""
        store, size = self._service.store, place.size
        fd = open_shared(place)
        self._service.bytes_received += size
        if place.mappable:
            return store.take_over(size, fd=fd, spill=True)
        try:
            # A blob that does not fit into memory is copied to disk piece by piece.
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
        """Wait a while if this process has too many files open to open those of a message's parts.

        Further messages of the worker are read after that.
        """
        if not self._service.direct_path:
            return
        count = sum(bool(part.path) for part in message.results.blobs)
        loop = self._service.portal.loop
        until = loop.time() + _FILES_TIMEOUT
        while not can_open(count):
            if self._short_of_files or loop.time() > until:
                self._short_of_files = True  # do not wait again for each following message
                return
            await asyncio.sleep(_FILES_PAUSE)
        self._short_of_files = False

    async def spill(self, message: pb.WorkerMessage) -> None:
        """Copy results that do not fit into memory to disk, in a thread."""
        columns = message.results
        store = self._service.store
        if not self._service.direct_path or store.has_room(sum(b.size for b in columns.blobs)):
            return
        at = 0
        for index, count in zip(columns.composed, columns.blob_counts, strict=True):
            parts = columns.blobs[at : at + count]
            at += count
            if index in columns.kept:
                continue
            for part in parts:
                if not part.path:
                    continue  # this part was sent, and lies in no file
                try:
                    place = self._place_of(part)
                    self.arrived[part.id] = await asyncio.to_thread(self._open_blob, place)
                except PayloadError as exc:
                    self.arrived[part.id] = exc
                except OSError:
                    pass  # ``take`` tries once more, and reports the error


def _copy(fd: int, offset: int, blob: Blob) -> None:
    """Fill a new blob from a part of a file.

    Raises:
        PayloadError: If the file is too short.
        OSError: If the file cannot be read, or the blob cannot be written.
    """
    at = 0
    while at < blob.size:
        data = os.pread(fd, min(blob.size - at, CHUNK_BYTES), offset + at)
        if not data:
            raise PayloadError("a part of the result is shorter than announced")
        blob.write(data, at)
        at += len(data)
