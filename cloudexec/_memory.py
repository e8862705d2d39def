"""Memory: where an object's bytes are, and large pages for what is about to be filled."""

from __future__ import annotations

import ctypes
import mmap
import sys
from typing import Any

__all__ = ["address_of", "prefer_large_pages", "room_for"]

_madvise = ctypes.CDLL(None).madvise if hasattr(mmap, "MADV_HUGEPAGE") else None
if _madvise is not None:
    _madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_LARGE_PAGES_FROM = 4 * 1024 * 1024
_resize = ctypes.pythonapi.PyByteArray_Resize
_resize.argtypes = [ctypes.py_object, ctypes.c_ssize_t]


def prefer_large_pages(buffer: Any) -> None:
    """Say of memory that is about to be filled for the first time that large pages will do.

    Where a system leaves that to programs, as most do, a large object is there twice as soon.

    Args:
        buffer: Writeable or not yet seen by anybody; what is too small is left alone.
    """
    view = memoryview(buffer)
    if _madvise is None or view.nbytes < _LARGE_PAGES_FROM:
        return
    address = address_of(view)
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (address + view.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    _madvise(first, size, mmap.MADV_HUGEPAGE)  # it may refuse: then the pages are small


def room_for(size: int) -> bytearray:
    """Return a buffer that is about to be filled, all of it: what is in it now is anything."""
    if not _LARGE_PAGES_FROM <= size <= sys.maxsize // 2:
        return bytearray(size)  # which says so, of an absurd one
    # Not bytearray(size): that writes zeros, so each page would be there already, a small one.
    room = bytearray()
    _resize(room, size)
    prefer_large_pages(room)
    return room


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
