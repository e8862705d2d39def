"""Results as they lie in a journal: one run of bytes each, and back.

A small result is the pickle that came from its worker. A large one is a count of blobs, the number
that its head gives each of them and their sizes, the head, and the blobs' contents.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cloudexec._errors import JournalError
from cloudexec._payload import Composed, Payload
from cloudexec._records import Held, load_composed

if TYPE_CHECKING:
    from cloudexec._objects.store import Blob, BlobStore

__all__ = ["Reader", "Stored", "check_of", "pack", "unpack"]

_COUNTS = struct.Struct("<II")  # blobs, bytes of the head
_BLOB = struct.Struct("<QQ")  # number, size
_MOST_BLOBS = 1 << 24
_CHUNK = 1024 * 1024
_CHECK_BYTES = 8

Reader = Callable[[int, memoryview], None]
"""Fills a buffer with what begins at an offset; ``OSError`` or ``JournalError`` if it cannot."""


def pack(payload: Payload) -> list[Any]:
    """Return the pieces that, one behind the other, are a result; blobs are not copied."""
    if type(payload) is bytes:
        return [payload]
    assert isinstance(payload, Composed)
    table = [_COUNTS.pack(len(payload.blobs), len(payload.head))]
    table += [
        _BLOB.pack(number, blob.size)
        for number, blob in zip(payload.numbers, payload.blobs, strict=True)
    ]
    return [b"".join((*table, payload.head)), *[blob.view() for blob in payload.blobs]]


def check_of(key: bytes, pieces: Sequence[Any]) -> bytes:
    """Return what a record is recognised by as whole: of its key and its content."""
    if len(pieces) == 1 and len(pieces[0]) < _CHUNK:
        return hashlib.sha256(key + pieces[0]).digest()[:_CHECK_BYTES]
    found = hashlib.sha256(key)
    for piece in pieces:
        view = memoryview(piece)
        for at in range(0, len(view), _CHUNK):
            found.update(view[at : at + _CHUNK])
    return found.digest()[:_CHECK_BYTES]


def unpack(size: int, read: Reader) -> Stored:
    """Return a large result, of which only the table has been read.

    Raises:
        JournalError: If it is no such thing.
        OSError: If it cannot be read.
    """

    def take(offset: int, length: int) -> bytearray:
        if offset + length > size:
            raise JournalError("a result in the journal is shorter than it says")
        data = bytearray(length)
        read(offset, memoryview(data))
        return data

    count, head_size = _COUNTS.unpack(take(0, _COUNTS.size))
    if count > _MOST_BLOBS:
        raise JournalError("a result in the journal has an impossible table")
    entries = list(_BLOB.iter_unpack(take(_COUNTS.size, count * _BLOB.size)))
    at = _COUNTS.size + count * _BLOB.size
    head = bytes(take(at, head_size))
    if at + head_size + sum([length for _, length in entries]) != size:
        raise JournalError("a result in the journal is not as long as it says")
    return Stored(head, entries, at + head_size, read)


class Stored:
    """A large result that is in a journal until somebody asks for it.

    Args:
        head: Its records.
        blobs: Number and size of each blob.
        start: Where the first one begins.
        read: Reads.
    """

    __slots__ = ("_blobs", "_head", "_read", "_start")

    def __init__(self, head: bytes, blobs: list[tuple[int, int]], start: int, read: Reader) -> None:
        self._head = head
        self._blobs = blobs
        self._start = start
        self._read = read

    def load(self) -> Any:
        """Unpickle it, here.

        Raises:
            JournalError: If it is not to be had any more.
            BaseException: Whatever unpickling raises.
        """
        parts: dict[int, Any] = {}
        at = self._start
        for number, size in self._blobs:
            buffer = bytearray(size)
            self._fill(at, memoryview(buffer))
            parts[number] = Held(buffer)
            at += size
        return load_composed(self._head, parts.__getitem__)

    def composed(self, store: BlobStore) -> Composed:
        """Return it as a payload that tasks take, with its blobs in a store.

        Raises:
            JournalError: If it is not to be had any more.
            PayloadTooLargeError: If there is no room for it.
        """
        blobs: list[Blob] = []
        at = self._start
        for _, size in self._blobs:
            blob = store.new(size)
            for offset in range(0, size, _CHUNK):
                chunk = bytearray(min(_CHUNK, size - offset))
                self._fill(at + offset, memoryview(chunk))
                blob.write(memoryview(chunk), offset)
            blobs.append(blob)
            at += size
        numbers = tuple([number for number, _ in self._blobs])
        return Composed(self._head, tuple(blobs), numbers)

    def _fill(self, offset: int, target: memoryview) -> None:
        try:
            self._read(offset, target)
        except OSError as exc:
            raise JournalError(f"a result in the journal cannot be read: {exc}") from exc
