"""Files, in memory or on disk, whose bytes other processes of this user can map.

On Linux a segment is an anonymous file, which other processes open through ``/proc/<pid>/fd``. The
system removes it with the last process that has it open, even if that is killed. On other systems
it is a named file.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import pickle
import sys
import tempfile
import weakref
from collections.abc import Sequence
from typing import Any

from cloudexec._memory import address_of

__all__ = [
    "copy_into",
    "large_pages",
    "BLOCK_BYTES",
    "NAMED",
    "PROC",
    "Arena",
    "Segment",
    "block_size",
    "first_difference",
    "map_file",
    "is_unwritten",
    "map_private",
    "same_bytes",
    "sample_of",
]

_SAMPLES = 16
_SAMPLE_BYTES = 256
BLOCK_BYTES = 64 * 1024
"""The size of an arena's block, in bytes, is a multiple of this."""
NAMED = "cloudexec-object-"
"""Prefix of the names of segments' files, on systems where these have names."""
PROC = sys.platform.startswith("linux") and os.path.isdir("/proc/self/fd")
_WARM_BYTES = 64 * 1024 * 1024
"""Bytes of memory that an arena keeps for free blocks."""
_libc = ctypes.CDLL(None)
_mmap, _munmap = ctypes.CDLL(None, use_errno=True).mmap, _libc.munmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_MAP_FAILED = ctypes.c_void_p(-1).value
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_fallocate = getattr(_libc, "fallocate64", None) if sys.platform.startswith("linux") else None
if _fallocate is not None:
    _fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
_memcmp = _libc.memcmp
_memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Segment:
    """One file. It is closed, which frees its memory or disk space, when no reference is left.

    Args:
        directory: Directory of a file on disk; ``None`` for a file in memory.

    Raises:
        OSError: If there is no room for it, or no file descriptor left.
    """

    __slots__ = ("__weakref__", "_mapping", "_named", "fd", "in_memory", "path")

    def __init__(self, directory: str | None = None) -> None:
        self._mapping: memoryview | None = None
        self._named = ""
        self.fd = -1
        self.in_memory = directory is None
        if directory is None and hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("cloudexec-objects", os.MFD_CLOEXEC)
        elif PROC:
            with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
                self.fd = os.dup(file.fileno())
        else:
            self.fd, self._named = tempfile.mkstemp(prefix=NAMED, dir=directory)
        self.renumber(self.fd)

    @classmethod
    def adopt(cls, fd: int) -> Segment:
        """Take over an open file."""
        segment = cls.__new__(cls)
        segment._mapping = None
        segment._named = ""
        segment.fd = fd
        segment.in_memory = not _on_disk(fd)
        segment.path = f"/proc/{os.getpid()}/fd/{fd}" if PROC else ""
        return segment

    def renumber(self, fd: int) -> None:
        """Note that the file has another descriptor now, which is part of its path for others."""
        self.fd = fd
        self.path = self._named or f"/proc/{os.getpid()}/fd/{fd}"

    def write(self, data: bytes | memoryview, offset: int = 0) -> None:
        """Write all of ``data``.

        Raises:
            OSError: If there is no room.
        """
        done = os.pwrite(self.fd, data, offset)
        if done < len(data):
            view = memoryview(data)
            while done < len(view):
                done += os.pwrite(self.fd, view[done:], offset + done)

    def write_all(self, pieces: Sequence[bytes | memoryview], offset: int = 0) -> None:
        """Write pieces one after the other; the errors are those of ``write``."""
        for piece in pieces:
            self.write(piece, offset)
            offset += len(piece)

    def copy_from(self, fd: int, start: int, size: int, offset: int = 0) -> None:
        """Copy a part of another file.

        Raises:
            OSError: If there is no room.
        """
        done = 0
        while done < size:
            data = os.pread(fd, min(size - done, 1024 * 1024), start + done)
            if not data:
                raise OSError(errno.EIO, "the file is shorter than it was")
            self.write(data, offset + done)
            done += len(data)

    def reserve(self, size: int, offset: int = 0) -> None:
        """Reserve room for ``size`` bytes, so that writing them later does not fail.

        Raises:
            OSError: If there is no room.
        """
        end = offset + size
        if self.in_memory:
            if size and os.fstat(self.fd).st_size < end:
                # Not by ftruncate(): another thread may have made the file longer meanwhile, and
                # that would cut off what it has written there.
                os.pwrite(self.fd, b"\0", end - 1)
            return
        # Checked first: a file system may fill up its last room before it reports the failure.
        room = os.fstatvfs(self.fd)
        if size > room.f_bavail * room.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(self.fd, offset, size)

    def punch(self, offset: int, size: int) -> None:
        """Free the memory, or the disk space, of a part that will not be read again."""
        if _fallocate is not None:
            # On file systems that do not support this the call fails, and the part is kept.
            _fallocate(self.fd, _PUNCH_HOLE | _KEEP_SIZE, offset, size)

    def view(self, size: int) -> memoryview:
        """Return the first ``size`` bytes, read-only. The file is mapped once."""
        mapping = self._mapping
        if mapping is None or len(mapping) < size:
            mapping = self._mapping = map_file(self.fd, size)
        return mapping[:size]

    def close(self) -> None:
        """Close the file; memory that is mapped from it stays valid."""
        fd, self.fd = self.fd, -1
        self._mapping = None
        if fd >= 0:
            os.close(fd)
            if self._named:
                try:
                    os.unlink(self._named)
                except OSError:
                    pass

    def __del__(self) -> None:
        try:
            self.close()
        except (OSError, TypeError, AttributeError):
            pass  # the interpreter is ending


class Arena:
    """Blocks in one segment, for blobs that are too small, or too many, to have a file each.

    Freed blocks are used again. Writing into a block that still has its memory is several times
    faster than writing into fresh pages, so some free blocks keep their memory, up to a limit. The
    content of a block is copied to be read, and never mapped. Not thread-safe.

    Args:
        directory: Directory of a file on disk; ``None`` for a file in memory.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.segment = Segment(directory)
        self.used = 0
        """Bytes in blocks that are taken."""
        self._end = 0
        self._warm: dict[int, list[int]] = {}  # by size: free blocks that still have their memory
        self._warm_bytes = 0
        self._cold: dict[int, list[int]] = {}  # by size: free blocks whose memory was freed
        self._most_warm = _WARM_BYTES if self.segment.in_memory else 0

    def allocate(self, size: int) -> int:
        """Return the offset of a block of at least ``size`` bytes."""
        rounded = block_size(size)
        self.used += rounded
        free = self._warm.get(rounded)
        if free:
            self._warm_bytes -= rounded
            return free.pop()
        free = self._cold.get(rounded)
        if free:
            return free.pop()
        offset = self._end
        self._end += rounded
        return offset

    def free(self, offset: int, size: int) -> None:
        """Free a block."""
        rounded = block_size(size)
        self.used -= rounded
        if not self.used:
            # All blocks are free: begin again at the front of the file, which keeps its memory.
            self._warm.clear()
            self._cold.clear()
            self._warm_bytes = 0
            if self._end > self._most_warm:
                os.ftruncate(self.segment.fd, self._most_warm)
            self._end = 0
        elif self._warm_bytes + rounded <= self._most_warm:
            self._warm_bytes += rounded
            self._warm.setdefault(rounded, []).append(offset)
        else:
            self.segment.punch(offset, rounded)
            self._cold.setdefault(rounded, []).append(offset)

    @property
    def size(self) -> int:
        """Bytes of the file, holes included."""
        return self._end


def block_size(size: int) -> int:
    """Return the bytes of a block that holds ``size`` bytes."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def map_file(
    fd: int, size: int, offset: int = 0, *, private: bool = False, writable: bool = False
) -> memoryview:
    """Map part of a file.

    The file may be closed while it is mapped. (Before Python 3.13, ``mmap.mmap`` keeps a duplicate
    of the descriptor: a program that holds a thousand arrays would run out of descriptors.)

    Args:
        fd: The file.
        size: Bytes to map.
        offset: Offset of the part in the file.
        private: Whether writes change only this mapping, and not the file.
        writable: Whether the mapping can be written to; a private one always can.

    Raises:
        OSError: If there is no room in the address space.
    """
    flags = mmap.MAP_PRIVATE if private else mmap.MAP_SHARED
    writable = writable or private
    prot = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
    if sys.version_info >= (3, 13):
        mapped = mmap.mmap(fd, size, flags=flags, prot=prot, offset=offset, trackfd=False)
        return memoryview(mapped)
    if os.fstat(fd).st_size < offset + size:
        raise ValueError("the file is shorter than what is to be mapped")  # as mmap.mmap says
    address = _mmap(None, size, prot, flags, fd, offset)
    if address == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    memory = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(memory, _munmap, address, size).atexit = False
    view = pickle.PickleBuffer(memory).raw()  # as plain bytes
    return view if writable else view.toreadonly()


def map_private(fd: int, size: int, offset: int = 0) -> memoryview:
    """Map part of a file so that it can be written to, and nobody else sees what was written."""
    return map_file(fd, size, offset, private=True)


def is_unwritten(memory: Any) -> bool:
    """Return whether no page of a private mapping has been written to, as far as the system tells.

    Args:
        memory: The object of the view that ``map_private()`` has returned.

    References:
        Linux kernel documentation, "pagemap": bit 63, the page is in memory; bit 62, it is swapped
        out; bit 61, it is a page of the file. A page that has been written to is none of the file.
    """
    if not isinstance(memory, ctypes.Array):
        memory = (ctypes.c_ubyte * len(memory)).from_buffer(memory)
    first = ctypes.addressof(memory) // mmap.PAGESIZE
    last = (ctypes.addressof(memory) + len(memory) - 1) // mmap.PAGESIZE
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(8 * first)
            entries = file.read(8 * (last - first + 1))
    except (OSError, ValueError):
        return False
    return len(entries) == 8 * (last - first + 1) and all(
        bits >> 5 in (0b000, 0b101) for bits in set(entries[7::8])
    )


def read_into(fd: int, target: memoryview, offset: int) -> None:
    """Fill memory from a place in a file."""
    at = 0
    while at < len(target):
        n = os.preadv(fd, [target[at:]], offset + at)
        if not n:
            raise EOFError("the file is shorter than its blob")
        at += n


def _on_disk(fd: int) -> bool:
    """Say whether a file takes disk space rather than memory."""
    global _memory_device
    if not hasattr(os, "memfd_create"):
        return True
    if _memory_device < 0:
        probe = os.memfd_create("cloudexec-objects", os.MFD_CLOEXEC)
        _memory_device = os.fstat(probe).st_dev
        os.close(probe)
    return os.fstat(fd).st_dev != _memory_device


_memory_device = -1  # the device of all anonymous files in memory, once it is known


def large_pages(size: int) -> mmap.mmap:
    """Return memory that is private to this process, in huge pages if the system supports them."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # the system has none
    return memory


def copy_into(target: mmap.mmap, at: int, data: bytes | memoryview) -> None:
    """Copy bytes into memory; the GIL is released meanwhile."""
    if at + len(data) > len(target):
        raise ValueError("more bytes than there is room for")
    _libc.memcpy(
        ctypes.c_void_p(address_of(memoryview(target)) + at),
        ctypes.c_void_p(address_of(data)),
        ctypes.c_size_t(len(data)),
    )


def sample_of(view: memoryview) -> int:
    """Return a hash of sixteen short pieces of some bytes: those of equal bytes are equal."""
    step = max(1, (len(view) - _SAMPLE_BYTES) // (_SAMPLES - 1))
    return hash(b"".join([view[at : at + _SAMPLE_BYTES] for at in range(0, len(view), step)]))


def same_bytes(one: bytes | memoryview, other: bytes | memoryview) -> bool:
    """Compare bytes at the speed of memory; the GIL is released meanwhile."""
    size = len(one)
    if size != len(other):
        return False
    return bool(_memcmp(address_of(one), address_of(other), size) == 0)


def first_difference(one: bytes | memoryview, other: bytes | memoryview, start: int = 0) -> int:
    """Find the first block in which two runs of bytes differ; the GIL is released meanwhile.

    Args:
        one: Bytes.
        other: The same number of bytes.
        start: Offset up to which they are known to be equal.

    Returns:
        The offset of the first block (``BLOCK_BYTES``) that differs; -1 if there is none.
    """
    size = len(one)
    first, second = address_of(one), address_of(other)
    if _memcmp(first + start, second + start, size - start) == 0:
        return -1
    for at in range(start, size, BLOCK_BYTES):
        if _memcmp(first + at, second + at, min(BLOCK_BYTES, size - at)) != 0:
            return at
    return -1  # another thread has changed one of them meanwhile
