"""Bytes in files that other processes of this user can map: in memory, or on disk.

On Linux a segment is an anonymous file that others open through ``/proc/<pid>/fd``: it is gone with
the last process that has it open, whatever becomes of them. Elsewhere it is a file in a private
directory.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import tempfile
from collections.abc import Sequence

__all__ = ["BLOCK_BYTES", "PROC", "Arena", "Segment", "address_of", "map_private", "same_bytes"]

BLOCK_BYTES = 64 * 1024
"""Blocks of an arena are multiples of this."""
PROC = sys.platform.startswith("linux") and os.path.isdir("/proc/self/fd")
_WARM_BYTES = 64 * 1024 * 1024
"""What an arena keeps of its memory when nothing is in it."""
_libc = ctypes.CDLL(None)
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
        self._mapping: mmap.mmap | None = None
        self._named = ""
        self.fd = -1
        self.in_memory = directory is None
        if directory is None and hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("cloudexec-objects", os.MFD_CLOEXEC)
        elif PROC:
            with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
                self.fd = os.dup(file.fileno())
        else:
            self.fd, self._named = tempfile.mkstemp(prefix="cloudexec-object-", dir=directory)
        self.path = self._named or f"/proc/{os.getpid()}/fd/{self.fd}"

    @classmethod
    def adopt(cls, fd: int) -> Segment:
        """Take over an open file."""
        segment = cls.__new__(cls)
        segment._mapping = None
        segment._named = ""
        segment.fd = fd
        segment.in_memory = True
        segment.path = f"/proc/{os.getpid()}/fd/{fd}" if PROC else ""
        return segment

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

    def view(self, size: int) -> memoryview:
        """Return the first ``size`` bytes, to read; mapped once."""
        if self._mapping is None or len(self._mapping) < size:
            self._mapping = mmap.mmap(self.fd, size, prot=mmap.PROT_READ)
        return memoryview(self._mapping)[:size]

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
    times faster than into fresh pages. So whoever reads from a block copies it, and does not map
    it. Not thread-safe.

    Args:
        directory: Where on disk; ``None``: in memory.
    """

    def __init__(self, directory: str | None = None) -> None:
        self.segment = Segment(directory)
        self.used = 0
        """Bytes in blocks that are taken."""
        self._end = 0
        self._free: dict[int, list[int]] = {}

    def allocate(self, size: int) -> int:
        """Return the offset of a block of at least ``size`` bytes."""
        rounded = _rounded(size)
        self.used += rounded
        free = self._free.get(rounded)
        if free:
            return free.pop()
        offset = self._end
        self._end += rounded
        return offset

    def free(self, offset: int, size: int) -> None:
        """Take a block back."""
        rounded = _rounded(size)
        self.used -= rounded
        self._free.setdefault(rounded, []).append(offset)
        if not self.used and self._end > _WARM_BYTES:
            self._free.clear()
            self._end = 0
            os.ftruncate(self.segment.fd, _WARM_BYTES if self.segment.in_memory else 0)

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self._end


def _rounded(size: int) -> int:
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def map_private(fd: int, size: int, offset: int = 0) -> mmap.mmap:
    """Map part of a file so that it can be written to, and nobody else sees what was written."""
    return mmap.mmap(
        fd,
        size,
        flags=mmap.MAP_PRIVATE,
        prot=mmap.PROT_READ | mmap.PROT_WRITE,
        offset=offset,
    )


class _Buffer(ctypes.Structure):
    """CPython's ``Py_buffer``."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


def address_of(data: bytes | memoryview) -> int:
    """Return where the bytes are; they must be kept alive, and not be resized, meanwhile."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), ctypes.byref(buffer), 0)
    try:
        return buffer.buf or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


def same_bytes(one: bytes | memoryview, other: bytes | memoryview) -> bool:
    """Compare at the speed of memory, without the GIL."""
    size = len(one)
    if size != len(other):
        return False
    return bool(_memcmp(address_of(one), address_of(other), size) == 0)
