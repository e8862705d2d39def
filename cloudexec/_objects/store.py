"""The client's blobs: each large piece of an argument, closure or result, stored once.

New bytes are looked up by their size and a sample of them, and then compared as a whole with the
blob that is found. A comparison runs at the speed of memory, several times as fast as a hash, and
it avoids a second copy in memory. A digest is computed only if a bucket or a journal needs it.

If blobs exceed the limit of memory, unused ones are dropped first; then new ones go to disk.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import count
from typing import Any

from cloudexec._descriptors import file_limits
from cloudexec._errors import PayloadTooLargeError
from cloudexec._memory import room_for
from cloudexec._objects.options import Limits, in_mib
from cloudexec._objects.places import Place
from cloudexec._objects.segments import (
    BLOCK_BYTES,
    Arena,
    Segment,
    copy_into,
    first_difference,
    large_pages,
    map_private,
    read_into,
    sample_of,
)

__all__ = ["BLOB_BYTES", "MAPPED_BYTES", "Blob", "BlobStore", "Limits"]

BLOB_BYTES = 64 * 1024
"""Bytes: larger pieces are blobs."""
MAPPED_BYTES = 2 * 1024 * 1024
"""Bytes: blobs of at least this size have a file of their own, which readers map. Smaller ones are
copied, because mapping new pages would cost more."""
_CACHED_SMALL = 64 * 1024 * 1024
"""Bytes of unused small blobs that are kept, because the same content may be sent again."""


class Room:
    """The memory or the file that holds a blob's bytes in this process.

    Only the blob refers to it, so it is deleted with the blob and frees the bytes then. The blob
    itself cannot do that in its own ``__del__``: while that runs, another thread can still reach
    the blob through the store's weak references, and would use bytes that are being freed.

    Attributes:
        content: The bytes as a Python object; ``None`` if they are in a file.
        segment: The file that the bytes are in; ``None`` if they are an object.
        offset: The bytes' offset in that file.
        mappable: Whether that part of the file never changes, so that it can be mapped.
        store: The store that is told when the blob is deleted.
    """

    __slots__ = ("content", "mappable", "number", "offset", "segment", "size", "store")

    def __init__(self, number: int, size: int, store: BlobStore) -> None:
        self.number = number
        self.size = size
        self.store = store
        self.content: Any = None
        self.segment: Segment | None = None
        self.offset = 0
        self.mappable = False

    def __del__(self) -> None:
        self.store._ended(self)


class Blob:
    """A piece of data that never changes.

    When the last reference is gone, the blob is freed here, on the workers and in the bucket.

    Attributes:
        id: The blob's number, which is the same in all processes of one executor.
        size: Size in bytes.
        room: Holds the bytes, if they are in this process.
        workers: Names of the workers that have a copy.
        origin: The worker that made the blob and keeps it; ``None`` if the bytes are here.
        place: The blob's place on this machine, if its worker runs on this machine.
        lost: Whether the worker that kept the blob is gone, and the bytes with it.
        stored: Whether the blob is in the bucket, in addition or only there.
        sha256: SHA-256 of the bytes; empty until it is needed.
        crc32: CRC-32 of the bytes; ``None`` until it is needed.
    """

    __slots__ = (
        "__weakref__",
        "crc32",
        "id",
        "lost",
        "origin",
        "place",
        "room",
        "sha256",
        "size",
        "stored",
        "workers",
    )

    def __init__(self, number: int, size: int, store: BlobStore) -> None:
        self.id = number
        self.size = size
        self.room = Room(number, size, store)
        self.workers: set[str] = set()
        self.origin: str | None = None
        self.place: Place | None = None
        self.lost = False
        self.stored = False
        self.sha256 = b""
        self.crc32: int | None = None

    @property
    def content(self) -> Any:
        """The bytes as a Python object; ``None`` if they are in a file, or not here."""
        return self.room.content

    @property
    def segment(self) -> Segment | None:
        """The file that the bytes are in, if they are in one."""
        return self.room.segment

    @property
    def offset(self) -> int:
        """The bytes' offset in that file."""
        return self.room.offset

    @property
    def mappable(self) -> bool:
        """Whether that part of the file never changes, so that it can be mapped."""
        return self.room.mappable

    def view(self) -> memoryview:
        """Return the bytes, to be read only."""
        content = self.content
        if content is not None:
            return memoryview(content)
        assert self.segment is not None
        return self.segment.view(self.offset + self.size)[self.offset :]

    def buffer(self) -> Any:
        """Return a writable copy. If the file can be mapped, a page is copied when written to."""
        if self.segment is not None and self.mappable:
            return map_private(self.segment.fd, self.size, self.offset)
        if self.segment is not None:
            data = room_for(self.size)
            read_into(self.segment.fd, memoryview(data), self.offset)
            return data
        return bytearray(self.view())

    def reader(self) -> Callable[[memoryview], None]:
        """Return a function that fills one buffer after the other with the bytes."""
        view = self.view()
        at = 0

        def fill(target: memoryview) -> None:
            nonlocal at
            target[:] = view[at : at + len(target)]
            at += len(target)

        return fill

    def write(self, data: bytes | memoryview, at: int) -> None:
        """Write part of the content of a blob that ``BlobStore.new`` made.

        Raises:
            OSError: If the disk has no room for it after all.
        """
        if self.segment is not None:
            self.segment.write(data, self.offset + at)
        else:
            copy_into(self.content, at, data)

    def __repr__(self) -> str:
        return f"<Blob {self.id} of {self.size} bytes>"


class BlobStore:
    """All blobs of one client. Any thread may call it.

    Args:
        limits: The number of bytes that it may hold.
        shared: Whether workers on this machine open its files.
        option: The name of the setting that raises the limit of memory, for messages.
    """

    def __init__(self, limits: Limits, *, shared: bool, option: str = "memory") -> None:
        self.limits = limits
        self.option = option
        self.on_end: Callable[[int], None] | None = None
        """Called with the number of a blob that was deleted, in the thread that deleted it."""
        self.shared = shared
        self._numbers = count(1)
        self._lock = threading.RLock()
        self._by_sample: weakref.WeakValueDictionary[Any, Blob] = weakref.WeakValueDictionary()
        self._by_identity: weakref.WeakValueDictionary[int, Blob] = weakref.WeakValueDictionary()
        self._cached: OrderedDict[int, Blob] = OrderedDict()
        self._cached_bytes = 0
        self._cached_small = 0
        self._arenas: dict[bool, Arena] = {}
        self._freed: deque[tuple[Segment | None, int, int, int]] = deque()
        self._moving: set[int] = set()  # blobs that are being put into a file
        self._files = 0
        # A quarter of what this process may open: the rest is left to the user's program.
        limits_of_files = file_limits()
        self._most_files = min(4096, max(16, limits_of_files[0] // 4)) if limits_of_files else 4096
        self.memory = 0
        """Bytes of blobs in memory."""
        self.disk = 0
        """Bytes of blobs on disk."""
        self.high = 0
        """Most bytes that were in memory at once."""
        self._closed = False

    # New blobs.

    def number_from(self, first: int) -> None:
        """Number blobs from ``first`` on, because an earlier client may have used lower numbers.

        Args:
            first: The next blob's number; the store must still be empty.
        """
        self._numbers = count(first)

    def intern(self, data: bytes | memoryview) -> Blob:
        """Return the blob with this content, and make one if there is none.

        Bytes are compared and copied outside the lock, so that other threads need not wait.

        Args:
            data: The content. ``bytes`` are kept by reference; anything else is copied.

        Raises:
            PayloadTooLargeError: If neither the memory nor the disk has room for the content.
        """
        whole = data if type(data) is bytes else None
        if type(data) is memoryview and type(data.obj) is bytes and len(data.obj) == data.nbytes:
            whole = data.obj
        if whole is not None:
            with self._lock:
                found = self._by_identity.get(id(whole))
            if found is not None and found.content is whole:
                return self._again(found)
        view = memoryview(data).cast("B") if type(data) is memoryview else memoryview(data)
        key: tuple[int, ...] = (len(view), sample_of(view))
        blob = None
        at = 0  # up to here the content equals that of the blob that was found
        while True:
            with self._lock:
                self._sweep()
                found = self._by_sample.get(key)
                if found is None:
                    if blob is None and whole is not None and not self._reserve(len(view)):
                        blob = Blob(next(self._numbers), len(view), self)
                        blob.room.content = whole
                        self._by_identity[id(whole)] = blob
                    if blob is not None:
                        self._by_sample[key] = blob
                        self._cache(blob)
                        return blob
            if found is None:
                blob = self._snapshot(view)
                continue
            at = first_difference(view, found.view(), at)
            if at < 0:
                return self._again(found)
            # The samples are equal, and the contents differ at ``at``. Blobs with equal samples are
            # told apart by the first block that differs.
            key = (found.id, at, hash(bytes(view[at : at + BLOCK_BYTES])))

    def _snapshot(self, view: memoryview) -> Blob:
        blob = Blob(next(self._numbers), len(view), self)
        self._place(blob, view)
        return blob

    def _again(self, blob: Blob) -> Blob:
        """Note that a content was handed in again: several workers will read it from a file."""
        self.share(blob)
        with self._lock:
            if blob.id in self._cached:
                self._cached.move_to_end(blob.id)
            else:
                self._cache(blob)
        return blob

    def share(self, blob: Blob) -> None:
        """Move a blob's bytes into a file, so that workers on this machine can map them."""
        with self._lock:
            content = blob.content
            if (
                not self.shared
                or self._closed
                or blob.segment is not None
                or type(content) is not bytes
                or blob.id in self._moving
            ):
                return
            self._moving.add(blob.id)
        try:
            # The bytes in memory are not counted again: the object belongs to the user now.
            self._settle(blob, *self._write(blob.size, memoryview(content), in_memory=True))
        except OSError:
            pass  # the blob remains an object
        finally:
            self._moving.discard(blob.id)

    def new(self, size: int) -> Blob:
        """Return a blob with room for ``size`` bytes, which the caller then writes.

        Raises:
            PayloadTooLargeError: If neither the memory nor the disk has room for it.
        """
        self.sweep()
        blob = Blob(next(self._numbers), size, self)
        self._place(blob, None)
        return blob

    def take_over(
        self,
        size: int,
        *,
        fd: int = -1,
        content: bytearray | None = None,
        spill: bool = False,
    ) -> Blob:
        """Return a blob of bytes that came from a worker, as an open file or as an object.

        Args:
            size: Bytes.
            fd: The file. The store closes it, also if this fails.
            content: The object.
            spill: Whether the bytes are moved to disk if the memory has no room for them.

        Raises:
            PayloadTooLargeError: If neither the memory nor the disk has room for them.
        """
        blob = Blob(next(self._numbers), size, self)
        segment = None if content is not None else Segment.adopt(fd)
        in_memory = segment is None or segment.in_memory
        with self._lock:
            self._sweep()
            why = ""
            if spill:
                why = self._reserve(size) if in_memory else self._why_not_on_disk(size)
            if not why:
                if not (spill and in_memory):
                    self._count(size, in_memory=in_memory)
                if segment is None:
                    blob.room.content = content
                elif self._files < self._most_files:
                    self._files += 1
                    blob.room.mappable = True
                    blob.room.segment = segment
                else:
                    blob.room.content = map_private(segment.fd, size)
                return blob
        if segment is not None:
            self._place(blob, segment.view(size))
        elif content is not None:
            self._place(blob, memoryview(content))
        return blob

    def has_files(self) -> bool:
        """Say whether the limit of open files allows another blob to have a file of its own."""
        return self._files < self._most_files

    def has_room(self, size: int) -> bool:
        """Say whether ``size`` more bytes fit into memory, without dropping unused blobs."""
        return self.memory + size <= self.limits.memory

    def remote(self, number: int, size: int, worker: str, place: Place | None) -> Blob:
        """Return a blob whose bytes are on a worker only."""
        blob = Blob(number, size, self)
        blob.origin, blob.place = worker, place
        blob.workers.add(worker)
        return blob

    def nothing(self) -> Blob:
        """Return a blob whose bytes are lost: the task that made it must run again."""
        blob = Blob(next(self._numbers), 0, self)
        blob.lost = True
        return blob

    def has(self, blob: Blob) -> bool:
        """Say whether a blob belongs to this store, and not to another one."""
        return blob.room.store is self

    def adopt(self, blob: Blob, other: Blob) -> None:
        """Move the bytes of ``other`` into a blob that was on a worker; nobody else uses ``other``.

        Args:
            blob: The blob, whose bytes have now been brought here.
            other: Holds these bytes, and is not used afterwards.
        """
        with self._lock:
            room, others = blob.room, other.room
            blob.sha256 = other.sha256
            room.offset, room.mappable = others.offset, others.mappable
            # The content and the segment are set last, because other threads read them first.
            room.content, room.segment = others.content, others.segment
            others.content = others.segment = None
            blob.origin = blob.place = None

    # Room.

    def _reserve(self, size: int) -> str:
        """Count bytes in memory if there is room; return the reason if there is none.

        The caller holds the lock.
        """
        if self.memory + size > self.limits.memory:
            if size > self.limits.memory:
                return f"it is more than the {in_mib(self.limits.memory)} that may be in memory"
            self._evict(self.memory + size - self.limits.memory)
            if self.memory + size > self.limits.memory:
                return (
                    f"{in_mib(self.memory)} of the {in_mib(self.limits.memory)} of memory are taken"
                )
        self._count(size, in_memory=True)
        return ""

    def _reserve_on_disk(self, size: int, why: str) -> None:
        """Count bytes on disk. The caller holds the lock.

        Raises:
            PayloadTooLargeError: If that exceeds the limit, with both reasons.
        """
        why_not = self._why_not_on_disk(size)
        if why_not:
            raise self._too_large(size, why, why_not)
        self._count(size, in_memory=False)

    def _why_not_on_disk(self, size: int) -> str:
        """Return why ``size`` more bytes may not go to disk; empty if they may."""
        limits = self.limits
        if limits.directory is None:
            return "and there is no directory to spill to"
        if limits.disk is not None and self.disk + size > limits.disk:
            return f"{in_mib(self.disk)} of {in_mib(limits.disk)} on disk are taken too"
        return ""

    def _place(self, blob: Blob, view: memoryview | None) -> None:
        """Put a new blob into memory, or onto disk if the memory has no room.

        Args:
            blob: The blob.
            view: Its content; ``None`` only reserves room for it.

        Raises:
            PayloadTooLargeError: If neither has room for it.
        """
        size = blob.size
        with self._lock:
            why = self._reserve(size)
        if not why and not self.shared and size >= MAPPED_BYTES:
            # No other process opens it: huge pages are written several times faster than a file.
            blob.room.content = large_pages(size)
            if view is not None:
                copy_into(blob.content, 0, view)
            return
        if not why:
            try:
                self._settle(blob, *self._write(size, view, in_memory=True))
                return
            except OSError as exc:
                why = f"{exc.strerror} in memory"
                with self._lock:
                    self._count(-size, in_memory=True)
        with self._lock:
            self._reserve_on_disk(size, why)
        try:
            self._settle(blob, *self._write(size, view, in_memory=False))
        except OSError as exc:
            with self._lock:
                self._count(-size, in_memory=False)
            where = self.limits.directory or "the directory for temporary files"
            raise self._too_large(size, why, f"and {where} has no room: {exc.strerror}") from exc

    def _settle(self, blob: Blob, segment: Segment, offset: int, own: bool) -> None:
        # Other threads look at the content first and then at the segment. So the segment must be
        # there, with its offset, before the content is removed.
        room = blob.room
        room.offset, room.mappable = offset, own
        room.segment = segment
        room.content = None

    def _write(
        self, size: int, view: memoryview | None, *, in_memory: bool
    ) -> tuple[Segment, int, bool]:
        """Write bytes into a file of their own, or into a block of an arena.

        Args:
            size: Bytes.
            view: The bytes; ``None`` only reserves room for them.
            in_memory: Whether the file is in memory, not on disk.

        Returns:
            The file, the offset in it, and whether the file holds these bytes alone.

        Raises:
            OSError: If there is no room.
        """
        directory = None
        if not in_memory:
            import tempfile

            directory = self.limits.directory or tempfile.gettempdir()
        arena: Arena | None = None
        offset = 0
        with self._lock:
            own = size >= MAPPED_BYTES and self._files < self._most_files
            if own:
                self._files += 1
            else:
                arena = self._arenas.get(in_memory)
                if arena is None:
                    arena = self._arenas[in_memory] = Arena(directory)
                offset = arena.allocate(size)
        segment: Segment | None = None if arena is None else arena.segment
        try:
            if segment is None:
                segment = Segment(directory)
            if view is not None:
                segment.write(view, offset)
            else:
                segment.reserve(size, offset)
        except BaseException:
            if arena is None and segment is not None:
                # Closed here, because the exception's traceback keeps a reference to it.
                segment.close()
            with self._lock:
                if arena is None:
                    self._files -= 1
                else:
                    arena.free(offset, size)
            raise
        return segment, offset, own

    def _count(self, size: int, *, in_memory: bool) -> None:
        if in_memory:
            self.memory += size
            self.high = max(self.high, self.memory)
        else:
            self.disk += size

    def _too_large(self, size: int, *why: str) -> PayloadTooLargeError:
        return PayloadTooLargeError(
            f"there is no room for {in_mib(size)} more of arguments and results: {', '.join(why)}; "
            f"submit fewer at once (map(buffersize=...)), or raise "
            f"BatchExecutor(objects=ObjectOptions({self.option}=...))",
            size_bytes=size,
            limit_bytes=self.limits.memory,
        )

    # Unused blobs.

    def _cache(self, blob: Blob) -> None:
        small = blob.size < MAPPED_BYTES
        if blob.size > self.limits.cache or self._closed:
            return
        self._cached[blob.id] = blob
        if small:
            self._cached_small += blob.size
        else:
            self._cached_bytes += blob.size
        if self._cached_bytes > self.limits.cache or self._cached_small > _CACHED_SMALL:
            self._trim(self.limits.cache, min(_CACHED_SMALL, self.limits.cache))

    def _trim(self, most: int, most_small: int) -> None:
        for number in list(self._cached):
            over, over_small = self._cached_bytes > most, self._cached_small > most_small
            if not (over or over_small):
                break
            small = self._cached[number].size < MAPPED_BYTES
            if over_small if small else over:
                self._uncache(number)

    def _uncache(self, number: int) -> None:
        blob = self._cached.pop(number)
        if blob.size < MAPPED_BYTES:
            self._cached_small -= blob.size
        else:
            self._cached_bytes -= blob.size

    def _evict(self, size: int) -> None:
        """Drop unused blobs, the oldest first, until ``size`` bytes of memory have been freed."""
        goal = self.memory - size
        for number in list(self._cached):
            if self.memory <= goal:
                break
            self._uncache(number)
            self._sweep()

    def forget_cached(self) -> None:
        """Drop all unused blobs."""
        with self._lock:
            self._cached.clear()
            self._cached_bytes = self._cached_small = 0
            self._sweep()

    def _ended(self, room: Room) -> None:
        # The garbage collector may call this in any thread, even in one that holds this store's
        # lock. So this only notes what can be freed; ``_sweep`` frees it.
        segment = room.segment
        if segment is not None or room.content is not None:
            kind = _OBJECT if segment is None else _FILE if room.mappable else _BLOCK
            self._freed.append((segment, room.offset, room.size, kind))
        on_end = self.on_end
        if self._closed:
            if segment is not None and room.mappable:
                segment.close()
        elif on_end is not None:
            try:
                on_end(room.number)
            except Exception:
                pass  # the interpreter is ending

    def sweep(self) -> None:
        """Free the bytes of blobs that were deleted."""
        with self._lock:
            self._sweep()

    def _sweep(self) -> None:
        while self._freed:
            segment, offset, size, kind = self._freed.popleft()
            in_memory = segment is None or segment.in_memory
            self._count(-size, in_memory=in_memory)
            if kind == _FILE:
                assert segment is not None
                self._files -= 1
                segment.close()
            elif kind == _BLOCK:
                self._arenas[in_memory].free(offset, size)

    def close(self) -> None:
        """Drop all unused blobs; blobs that are still referred to stay valid."""
        self.forget_cached()
        self._closed = True


_OBJECT, _FILE, _BLOCK = range(3)
