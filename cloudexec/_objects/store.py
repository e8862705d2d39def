"""The client's blobs: each large piece of an argument, closure or result, once.

What is handed in is looked for by size and a sample of its bytes, and compared as a whole with what
is found: a comparison runs at the speed of memory, several times that of any hash, and a snapshot
that need not be made costs no memory. A digest is taken only of what leaves the machine.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import count
from typing import Any

from cloudexec._errors import PayloadTooLargeError
from cloudexec._objects.options import Limits
from cloudexec._objects.places import Place
from cloudexec._objects.segments import Arena, Segment, map_private, same_bytes

__all__ = ["BLOB_BYTES", "MAPPED_BYTES", "Blob", "BlobStore", "Limits"]

BLOB_BYTES = 64 * 1024
"""Pieces larger than this are blobs."""
MAPPED_BYTES = 2 * 1024 * 1024
"""Blobs from this size on have a file of their own, which readers map; smaller ones are copied,
which is cheaper than new pages."""
_SAMPLES = 16
_SAMPLE_BYTES = 256
_CACHED_SMALL = 64 * 1024 * 1024
"""Bytes of small blobs that nobody uses any more and that are kept, as they may come again."""


class Blob:
    """A piece of data that never changes. Its end, when nobody refers to it, frees it everywhere.

    Attributes:
        id: Its number, the same in all processes of one executor.
        size: Bytes.
        content: The bytes themselves, where they are an object here; else ``None``.
        segment: The file they are in, if they are in one.
        offset: Where in that file.
        mappable: Whether that part of the file never changes, so that it can be mapped.
        workers: Names of the workers that hold it.
        origin: The worker that made it and alone has it; ``None``: it is here.
        place: Where it is, if it is on a worker on this machine.
        lost: Whether that worker is gone, and it with it.
        sha256: Digest, once it was needed.
    """

    __slots__ = (
        "__weakref__",
        "_store",
        "content",
        "id",
        "lost",
        "mappable",
        "offset",
        "origin",
        "place",
        "segment",
        "sha256",
        "size",
        "workers",
    )

    def __init__(self, number: int, size: int, store: BlobStore) -> None:
        self.id = number
        self.size = size
        self.content: bytes | bytearray | memoryview | None = None
        self.segment: Segment | None = None
        self.offset = 0
        self.mappable = False
        self.workers: set[str] = set()
        self.origin: str | None = None
        self.place: Place | None = None
        self.lost = False
        self.sha256 = b""
        self._store = store

    def view(self) -> memoryview:
        """Return the bytes, to read."""
        if self.content is not None:
            return memoryview(self.content)
        assert self.segment is not None
        return self.segment.view(self.offset + self.size)[self.offset :]

    def buffer(self) -> Any:
        """Return a writeable copy; where it can be mapped, only what is written to is copied."""
        if self.segment is not None and self.mappable:
            return map_private(self.segment.fd, self.size, self.offset)
        if self.segment is not None:
            data = bytearray(self.size)
            _read_into(self.segment.fd, memoryview(data), self.offset)
            return data
        assert self.content is not None
        return bytearray(self.content)

    def reader(self) -> Callable[[memoryview], None]:
        """Return what fills buffers with the bytes, one after the other."""
        view = self.view()
        at = 0

        def fill(target: memoryview) -> None:
            nonlocal at
            target[:] = view[at : at + len(target)]
            at += len(target)

        return fill

    def __del__(self) -> None:
        self._store._ended(self)

    def __repr__(self) -> str:
        return f"<Blob {self.id} of {self.size} bytes>"


def _read_into(fd: int, target: memoryview, offset: int) -> None:
    at = 0
    while at < len(target):
        n = os.preadv(fd, [target[at:]], offset + at)
        if not n:
            raise EOFError("the file is shorter than its blob")
        at += n


class BlobStore:
    """All blobs of one client. Any thread may call it.

    Args:
        limits: How much it may hold.
        shared: Whether workers on this machine open its files.
    """

    def __init__(self, limits: Limits, *, shared: bool) -> None:
        self.limits = limits
        self.on_end: Callable[[int], None] | None = None
        """Called with the number of a blob that ended, in whatever thread dropped it."""
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
        self._files = 0
        self._most_files = _most_files()
        self.memory = 0
        """Bytes of blobs in memory."""
        self.disk = 0
        """Bytes of blobs on disk."""
        self.high = 0
        """Most bytes that were in memory at once."""
        self._closed = False

    # What is handed in.

    def intern(self, data: bytes | memoryview) -> Blob:
        """Return the blob with this content, a new one if there is none.

        Args:
            data: ``bytes`` are kept by reference; of anything else a snapshot is taken.

        Raises:
            PayloadTooLargeError: If there is room for it neither in memory nor on disk.
        """
        whole = data if type(data) is bytes else None
        if type(data) is memoryview and type(data.obj) is bytes and len(data.obj) == data.nbytes:
            whole = data.obj
        with self._lock:
            self._sweep()
            if whole is not None:
                found = self._by_identity.get(id(whole))
                if found is not None and found.content is whole:
                    return self._again(found)
            view = memoryview(data).cast("B") if type(data) is memoryview else memoryview(data)
            key = (len(view), _sample(view))
            found = self._by_sample.get(key)
            if found is not None and found.origin is None and same_bytes(view, found.view()):
                return self._again(found)
            blob = Blob(next(self._numbers), len(view), self)
            if whole is not None and self.memory + len(whole) <= self.limits.memory:
                blob.content = whole
                self._by_identity[id(whole)] = blob
                self._count(len(whole), in_memory=True)
            else:
                self._place(blob, view)
            self._by_sample[key] = blob
            self._cache(blob)
            return blob

    def _again(self, blob: Blob) -> Blob:
        """A blob comes a second time: more than one reader is better served by a file."""
        if self.shared and blob.segment is None and not self._closed:
            content = blob.content
            assert content is not None
            try:
                self._count(-blob.size, in_memory=True)
                self._place(blob, memoryview(content))
            except PayloadTooLargeError:
                self._count(blob.size, in_memory=True)
                blob.content = content
        if blob.id in self._cached:
            self._cached.move_to_end(blob.id)
        else:
            self._cache(blob)
        return blob

    def new(self, size: int) -> Blob:
        """Return a blob whose content is still to be written into its segment.

        Raises:
            PayloadTooLargeError: If there is no room for it.
        """
        with self._lock:
            self._sweep()
            blob = Blob(next(self._numbers), size, self)
            self._place(blob, None)
            return blob

    def take_over(self, size: int, *, fd: int = -1, content: bytearray | None = None) -> Blob:
        """Return a blob of what came from a worker: an open file that is mapped, or an object."""
        with self._lock:
            self._sweep()
            blob = Blob(next(self._numbers), size, self)
            if content is not None:
                blob.content = content
            elif self._files < self._most_files:
                blob.segment = Segment.adopt(fd)
                blob.mappable = True
                self._files += 1
            else:
                blob.content = memoryview(map_private(fd, size))
                os.close(fd)
            self._count(size, in_memory=True)
            return blob

    def remote(self, number: int, size: int, worker: str, place: Place | None) -> Blob:
        """Return a blob that is on a worker alone."""
        blob = Blob(number, size, self)
        blob.origin, blob.place = worker, place
        blob.workers.add(worker)
        return blob

    def adopt(self, blob: Blob, other: Blob) -> None:
        """Let a blob that was on a worker have the content of another, which nobody else has."""
        with self._lock:
            blob.content, blob.segment = other.content, other.segment
            blob.offset, blob.mappable, blob.sha256 = other.offset, other.mappable, other.sha256
            other.content = other.segment = None
            blob.origin = blob.place = None

    def share(self, blob: Blob) -> None:
        """Put a blob into a file, if workers on this machine are to have it more than once.

        Raises:
            PayloadTooLargeError: If there is no room for it.
        """
        with self._lock:
            if self.shared and blob.segment is None and type(blob.content) is bytes:
                self._again(blob)

    # Room.

    def _place(self, blob: Blob, view: memoryview | None) -> None:
        size = blob.size
        limits = self.limits
        if self.memory + size > limits.memory:
            self._evict(self.memory + size - limits.memory)
        if self.memory + size <= limits.memory:
            try:
                self._write(blob, view, in_memory=True)
                return
            except OSError as exc:
                why = f"{exc.strerror} in memory"
        else:
            why = f"{_mib(self.memory)} of the {_mib(limits.memory)} of memory are taken"
        if limits.directory is None:
            raise self._too_large(size, why, "and there is no directory to spill to")
        if limits.disk is not None and self.disk + size > limits.disk:
            taken = f"{_mib(self.disk)} of {_mib(limits.disk)} on disk are taken too"
            raise self._too_large(size, why, taken)
        try:
            self._write(blob, view, in_memory=False)
        except OSError as exc:
            where = limits.directory or "the directory for temporary files"
            raise self._too_large(size, why, f"and {where} has no room: {exc.strerror}") from exc

    def _write(self, blob: Blob, view: memoryview | None, *, in_memory: bool) -> None:
        own = blob.size >= MAPPED_BYTES and self._files < self._most_files
        directory = None if in_memory else (self.limits.directory or None)
        if not in_memory and directory is None:
            import tempfile

            directory = tempfile.gettempdir()
        if own:
            segment, offset = Segment(directory), 0
        else:
            arena = self._arenas.get(in_memory)
            if arena is None:
                arena = self._arenas[in_memory] = Arena(directory)
            segment, offset = arena.segment, arena.allocate(blob.size)
        try:
            if view is not None:
                segment.write(view, offset)
            elif not in_memory:
                os.posix_fallocate(segment.fd, offset, blob.size)  # have the error now
            else:
                end = offset + blob.size
                if os.fstat(segment.fd).st_size < end:
                    os.ftruncate(segment.fd, end)
        except OSError:
            if not own:
                self._arenas[in_memory].free(offset, blob.size)
            raise
        self._files += own
        blob.segment, blob.offset, blob.mappable = segment, offset, own
        blob.content = None
        self._count(blob.size, in_memory=in_memory)

    def _count(self, size: int, *, in_memory: bool) -> None:
        if in_memory:
            self.memory += size
            self.high = max(self.high, self.memory)
        else:
            self.disk += size

    def _too_large(self, size: int, *why: str) -> PayloadTooLargeError:
        return PayloadTooLargeError(
            f"there is no room for {_mib(size)} more of arguments and results: {', '.join(why)}; "
            f"submit fewer at once (map(buffersize=...)), or raise "
            f"BatchExecutor(objects=ObjectOptions(memory=...))",
            size_bytes=size,
            limit_bytes=self.limits.memory,
        )

    # What nobody uses any more.

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
        """Give up what is only kept in case it comes again, the oldest first."""
        goal = self.memory - size
        for number in list(self._cached):
            if self.memory <= goal:
                break
            self._uncache(number)
            self._sweep()

    def forget_cached(self) -> None:
        """Give up all that is only kept in case it comes again."""
        with self._lock:
            self._cached.clear()
            self._cached_bytes = self._cached_small = 0
            self._sweep()

    def _ended(self, blob: Blob) -> None:
        # In any thread, at any moment, this store's own lock being held or not: only note it.
        segment = blob.segment
        if segment is not None or blob.content is not None:
            kind = _OBJECT if segment is None else _FILE if blob.mappable else _BLOCK
            self._freed.append((segment, blob.offset, blob.size, kind))
        on_end = self.on_end
        if self._closed:
            if segment is not None and blob.mappable:
                segment.close()
        elif on_end is not None:
            try:
                on_end(blob.id)
            except Exception:
                pass  # the interpreter is ending

    def sweep(self) -> None:
        """Take back the room of blobs that ended."""
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
        """Keep nothing in case it comes again; what is still referred to lives on."""
        self.forget_cached()
        self._closed = True


_OBJECT, _FILE, _BLOCK = range(3)


def _sample(view: memoryview) -> int:
    size = len(view)
    step = max(1, (size - _SAMPLE_BYTES) // (_SAMPLES - 1))
    return hash(b"".join([view[at : at + _SAMPLE_BYTES] for at in range(0, size, step)]))


def _mib(size: int) -> str:
    return f"{size / 2**20:.4g} MiB"


def _most_files() -> int:
    """Leave most of the file descriptors that a process may have to the user."""
    try:
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    except (ImportError, OSError):
        return 64
    return 4096 if soft < 0 else min(4096, max(16, soft // 4))
