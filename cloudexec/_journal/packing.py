"""Turns results into the bytes that a journal stores, and back.

A small result is stored as the pickle that came from its worker. A large result consists of a head
(a pickle that refers to blobs by number) and its blobs (large pieces). It is stored as a table,
the head, and the blobs' contents. The table gives the number of blobs, the size of the head, and
each blob's number and size.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cloudexec._errors import JournalError
from cloudexec._records import Composed, Held, Payload, load_composed

if TYPE_CHECKING:
    from cloudexec._objects.store import Blob, BlobStore

__all__ = ["Reader", "Stored", "check_of", "pack", "unpack"]

_COUNTS = struct.Struct("<II")  # the number of blobs, and the bytes of the head
_BLOB = struct.Struct("<QQ")  # a blob's number and its size
_MOST_BLOBS = 1 << 24
_CHUNK = 1024 * 1024
_CHECK_BYTES = 8

Reader = Callable[[int, memoryview], None]
"""Fills a buffer with the bytes from an offset on. It may raise OSError or JournalError."""


def pack(payload: Payload) -> list[Any]:
    """Return a result as pieces that are stored one after the other; blobs are not copied."""
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
    """Return the check bytes of a record: a digest of its key and content, to detect damage."""
    if len(pieces) == 1 and len(pieces[0]) < _CHUNK:
        return hashlib.sha256(key + pieces[0]).digest()[:_CHECK_BYTES]
    found = hashlib.sha256(key)
    for piece in pieces:
        view = memoryview(piece)
        for at in range(0, len(view), _CHUNK):
            found.update(view[at : at + _CHUNK])
    return found.digest()[:_CHECK_BYTES]


def unpack(size: int, read: Reader) -> Stored:
    """Read the table and the head of a large result; its blobs are read later.

    Args:
        size: Bytes of the whole result.
        read: Reads these bytes.

    Raises:
        JournalError: If the table does not fit the size.
        OSError: If the bytes cannot be read.
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
    """A large result whose blobs stay in the journal until the program asks for the result.

    Args:
        head: The result's head, which refers to its blobs by number.
        blobs: The number and the size of each blob.
        start: The offset of the first blob.
        read: Reads the result's bytes.
    """

    __slots__ = ("_blobs", "_head", "_read", "_start")

    def __init__(self, head: bytes, blobs: list[tuple[int, int]], start: int, read: Reader) -> None:
        self._head = head
        self._blobs = blobs
        self._start = start
        self._read = read

    def load(self) -> Any:
        """Read and unpickle the result.

        Raises:
            JournalError: If the journal cannot be read any more.
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
        """Return the result as a payload that can be sent to tasks.

        Args:
            store: The client's blobs, which the result's blobs are copied to.

        Raises:
            JournalError: If the journal cannot be read any more.
            PayloadTooLargeError: If the store has no room for the result.
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
