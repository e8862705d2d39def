"""The parts of a worker's large results: some come before the result, some lie in its files."""

from __future__ import annotations

import asyncio
import os
from typing import Any

from cloudexec._descriptors import can_open
from cloudexec._errors import PayloadError
from cloudexec._memory import room_for
from cloudexec._objects.places import Place, is_path_of, open_shared
from cloudexec._objects.store import Blob
from cloudexec._payload import Composed
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._server.direct import Delivered
from cloudexec._server.rpc.calls import LARGEST_BLOB
from cloudexec._server.service import Service
from cloudexec._wire.channel import CHUNK_BYTES

__all__ = ["OWN_BLOBS", "ResultParts"]

_FILES_TIMEOUT = 10.0
"""Seconds for which results wait until this process may open their files."""
_FILES_PAUSE = 0.1
OWN_BLOBS = 1 << 40
"""Numbers that each worker may give to blobs."""
_MOST_STORED = 256
"""Kept results that a worker may have put into the bucket before it says what they belong to."""


class ResultParts:
    """What has come of one worker's large results. On the loop thread, but for ``spill``.

    Args:
        service: Whose worker it is.
        worker: Its id.
        pid: Its process, where that is on this machine: its files are those that it may name.
        first_blob: Below the first number that it may give to a blob.
    """

    def __init__(
        self,
        service: Service,
        worker: str,
        pid: int,
        first_blob: int,
    ) -> None:
        self.delivered: dict[int, Delivered | Composed] = {}
        """By lease, results that came over the worker's own socket."""
        self.arrived: dict[int, Blob | PayloadError] = {}
        """By number, parts of results that are not complete."""
        self._parts: dict[int, list[int]] = {}  # by lease, which of these were delivered for it
        self._stored_ahead: dict[int, bytes] = {}  # digests of kept ones, still to be reported
        self._short_of_files = False  # and has waited for some in vain
        self._service = service
        self._worker = worker
        self._pid = pid
        self._first = first_blob

    def owns(self, number: int) -> bool:
        """Say whether a number is one that the worker may give to a blob."""
        return self._first < number < self._first + OWN_BLOBS

    def part_arrived(self, lease: int, number: int, blob: Blob) -> None:
        """A part of the result of a lease has come on its own."""
        self.arrived[number] = blob
        self._parts.setdefault(lease, []).append(number)

    def stored_ahead(self, number: int, sha256: bytes) -> None:
        """A part that stays on the worker is in the bucket, before its result has come."""
        self._stored_ahead[number] = sha256
        if len(self._stored_ahead) > _MOST_STORED:
            del self._stored_ahead[next(iter(self._stored_ahead))]

    @property
    def is_empty(self) -> bool:
        """Whether no part waits for the rest of its result."""
        return not (self.arrived or self._parts)

    def end_lease(self, lease: int) -> None:
        """Let go of the parts that have come for a task which the worker has no more."""
        for number in self._parts.pop(lease, ()):
            self.arrived.pop(number, None)

    def take(
        self, columns: pb.Results, results: list[Any]
    ) -> tuple[list[int], list[int], list[Blob]]:
        """Take hold of the parts of large results.

        Args:
            columns: What the worker says of them.
            results: Their heads; replaced by the results.

        Returns:
            The indexes of results that are gone, the numbers of parts that the worker need not hold
            for this process any more, and the parts that stay on it.
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
            except OSError as exc:  # it is there: the task is not to run again for that
                why = f"a result cannot be taken from its file: {exc.strerror}"
                results[index] = Delivered(None, PayloadError(why))
            else:
                results[index] = Composed(results[index], blobs, numbers)
            taken += [part.id for part in parts if part.path]
        return vanished, taken, staying

    def _know_kept(self, described: pb.Blob) -> Blob:
        """Note a part of a result that stays on the worker."""
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
        """Return where a worker on this machine says that a blob of its own is."""
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
        if not self._service.direct_path:
            return
        count = sum(bool(part.path) for part in message.results.blobs)
        loop = self._service.portal.loop
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
                    continue  # it came another way
                try:
                    place = self._place_of(part)
                    self.arrived[part.id] = await asyncio.to_thread(self._open_blob, place)
                except PayloadError as exc:
                    self.arrived[part.id] = exc
                except OSError:
                    pass  # it is looked for once more


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
