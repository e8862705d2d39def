"""Bytes in files that other processes of this user can map: in memory, or on disk.

On Linux a segment is an anonymous file that others open through ``/proc/<pid>/fd``: it is gone with
the last process that has it open, whatever becomes of them. Elsewhere it is a file in a private
directory.
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
    "map_private",
    "same_bytes",
]

BLOCK_BYTES = 64 * 1024
"""Blocks of an arena are multiples of this."""
NAMED = "cloudexec-object-"
"""What the names of files begin with, where they have any."""
PROC = sys.platform.startswith("linux") and os.path.isdir("/proc/self/fd")
_WARM_BYTES = 64 * 1024 * 1024
"""What an arena keeps of its memory when nothing is in it."""
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
    """One file; closed, and its memory or disk space given back, when nobody refers to it.

    Args:
        directory: Where on disk; ``None``: in memory.

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
        """Its file has another number now, under which others find it too."""
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
        """Write pieces one behind the other; the errors are those of ``write``."""
        for piece in pieces:
            self.write(piece, offset)
            offset += len(piece)

    def copy_from(self, fd: int, start: int, size: int, offset: int = 0) -> None:
        """Write what is in a part of another file.

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
        """Have room for ``size`` bytes, so that to write them later does not fail.

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
        # Asked first: a file system may fill itself up before it finds that it is too small.
        room = os.fstatvfs(self.fd)
        if size > room.f_bavail * room.f_frsize:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.posix_fallocate(self.fd, offset, size)

    def punch(self, offset: int, size: int) -> None:
        """Give back the memory, or the disk space, of a part that nobody will read again."""
        if _fallocate is not None:
            # Where it is not supported it fails, and the part is kept.
            _fallocate(self.fd, _PUNCH_HOLE | _KEEP_SIZE, offset, size)

    def view(self, size: int) -> memoryview:
        """Return the first ``size`` bytes, to read; mapped once."""
        mapping = self._mapping
        if mapping is None or len(mapping) < size:
            mapping = self._mapping = map_file(self.fd, size)
        return mapping[:size]

    def close(self) -> None:
        """Let go of the file; what is mapped stays mapped."""
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
    """Blocks of one segment: for what is too small, or too much, to have a file each.

    Blocks that are freed are used again, and writing into memory that is there already is several
    times faster than into fresh pages. So some of them keep theirs; the system has back what is
    more. Whoever reads from a block copies it, and does not map it. Not thread-safe.

    Args:
        directory: Where on disk; ``None``: in memory.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.segment = Segment(directory)
        self.used = 0
        """Bytes in blocks that are taken."""
        self._end = 0
        self._warm: dict[int, list[int]] = {}  # free blocks by size: those that have their memory
        self._warm_bytes = 0
        self._cold: dict[int, list[int]] = {}  # and those that are holes
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
        """Take a block back."""
        rounded = block_size(size)
        self.used -= rounded
        if not self.used:
            # All of it is free: begin again at the front, where the memory is.
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
    """Return the bytes that a block of an arena takes."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def map_file(
    fd: int, size: int, offset: int = 0, *, private: bool = False, writable: bool = False
) -> memoryview:
    """Map part of a file, to read; or to write, so that others see it or (``private``) do not.

    The file may be closed meanwhile. (Before Python 3.13 ``mmap.mmap`` keeps a descriptor of its
    own, and who holds a thousand arrays would have none left.)

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


_memory_device = -1  # that all anonymous files in memory are on, once it is known


def large_pages(size: int) -> mmap.mmap:
    """Return memory of this process alone, in pages that are large where the system has such."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:
            memory.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # the system has none
    return memory


def copy_into(target: mmap.mmap, at: int, data: bytes | memoryview) -> None:
    """Copy bytes into memory, without the GIL."""
    if at + len(data) > len(target):
        raise ValueError("more bytes than there is room for")
    _libc.memcpy(
        ctypes.c_void_p(address_of(memoryview(target)) + at),
        ctypes.c_void_p(address_of(data)),
        ctypes.c_size_t(len(data)),
    )


def same_bytes(one: bytes | memoryview, other: bytes | memoryview) -> bool:
    """Compare at the speed of memory, without the GIL."""
    size = len(one)
    if size != len(other):
        return False
    return bool(_memcmp(address_of(one), address_of(other), size) == 0)


def first_difference(one: bytes | memoryview, other: bytes | memoryview, start: int = 0) -> int:
    """Compare bytes, as many of each, at the speed of memory and without the GIL.

    Args:
        one: Bytes.
        other: As many.
        start: Where to begin: up to there they are known to be the same.

    Returns:
        Where the first block begins that is not the same; negative: there is none.
    """
    size = len(one)
    first, second = address_of(one), address_of(other)
    if _memcmp(first + start, second + start, size - start) == 0:
        return -1
    for at in range(start, size, BLOCK_BYTES):
        if _memcmp(first + at, second + at, min(BLOCK_BYTES, size - at)) != 0:
            return at
    return -1  # somebody has changed one of them meanwhile
