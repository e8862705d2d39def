"""Addresses of objects' bytes, and memory in large pages for buffers that will be filled."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["address_of", "bytes_from", "prefer_large_pages", "room_for"]

_madvise = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None
if _madvise is not None:
    _madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LARGE_PAGES_FROM = 4 * 1024 * 1024
_resize = ctypes.pythonapi.PyByteArray_Resize
_resize.argtypes = [ctypes.py_object, ctypes.c_ssize_t]
_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t]
_new_bytes.restype = ctypes.py_object


def prefer_large_pages(buffer: Any) -> None:
    """Ask the system for large pages for memory that is about to be filled for the first time.

    Most systems use large pages only if a program asks. They halve the time to fill a large object.

    Args:
        buffer: The memory, which is writeable or not yet in use. Small buffers are left alone.
    """
    view = memoryview(buffer)
    if _madvise is None or view.nbytes < _LARGE_PAGES_FROM:
        return
    address = address_of(view)
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address + view.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    _madvise(first, size, mmap.MADV_HUGEPAGE)  # if the system refuses, the pages stay small


def room_for(size: int) -> bytearray:
    """Return a buffer with undefined content, all of which the caller must fill."""
    if not _LARGE_PAGES_FROM <= size <= sys.maxsize // 2:
        return bytearray(size)  # raises MemoryError if the size is absurd
    # bytearray(size) would write zeros, and so make the system allocate small pages at once.
    room = bytearray()
    _resize(room, size)
    prefer_large_pages(room)
    return room


def bytes_from(fill: Callable[[memoryview], int], size: int) -> bytes:
    """Return bytes that are filled in place, and not copied from a buffer.

    Args:
        fill: Fills a buffer from its start, and returns how many bytes it has written. It asks for
            large pages itself.
        size: The largest number of bytes.

    References:
        ``PyBytes_FromStringAndSize()`` without a string makes bytes of undefined content, which
        may be written to as long as nothing else knows them (Python/C API, "Bytes Objects").
    """
    data: bytes = _new_bytes(None, size)
    if not size:
        return data
    view = memoryview((ctypes.c_ubyte * size).from_address(address_of(data))).cast("B")
    done = fill(view)
    return data if done == size else data[:done]


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
    """Return the address of the bytes, which is valid while they are alive and not resized."""
    buffer = _Buffer()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(data), ctypes.byref(buffer), 0)
    try:
        return buffer.buf or 0
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))
