"""The format of a large payload, which is a sequence of records, and its reader.

A payload is a pickled callable, arguments or result. A record has one byte of type, eight bytes
(little-endian) with a length or with a blob's number, and then as many bytes as the length says. A
blob is a large part that is stored separately under a number. A payload's head is its records
without the contents of its blobs. The types of records are:

- 0 is the next piece of the pickle.
- 1 is the next out-of-band buffer; it stands before the piece of the pickle that refers to it.
- 2 is such a buffer that is read-only.
- 3 ends the payload.
- 4, 5 and 6 are like 0, 1 and 2, but the content is that of a blob.
- 7 says that a blob contains all the records.
"""

from __future__ import annotations

import pickle
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from cloudexec._objects.store import Blob

__all__ = [
    "END_RECORD",
    "LARGE",
    "Composed",
    "Held",
    "Payload",
    "Source",
    "buffer_record",
    "in_band_record",
    "load_composed",
    "load_nested",
    "load_records",
    "record",
]

RECORD = struct.Struct("<BQ")
NUMBER = struct.Struct("<Q")
IN_BAND, BUFFER, READONLY_BUFFER, END = 0, 1, 2, 3
IN_BAND_BLOB, BUFFER_BLOB, READONLY_BLOB, HEAD_BLOB = 4, 5, 6, 7
END_RECORD = RECORD.pack(END, 0)
_loads = pickle.loads
LARGE = 4 * 1024 * 1024
"""Buffers of fewer bytes do not need ``_memory``, which is then not imported."""


def _prefer_large_pages(buffer: Any) -> None:
    from cloudexec._memory import prefer_large_pages

    prefer_large_pages(buffer)


def _read(readinto: Callable[[Any], int], size: int) -> bytes:
    """Return up to ``size`` bytes; large ones are read into their object and not copied."""
    if size >= LARGE:
        from cloudexec._memory import bytes_from

        return bytes_from(readinto, size)
    data = bytearray(size)
    return bytes(memoryview(data)[: readinto(data)])


class Source(Protocol):
    """Gives access to the content of one blob."""

    size: int

    def view(self) -> memoryview | None:
        """Return the bytes read-only if they are in this process, otherwise ``None``."""

    def buffer(self) -> Any:
        """Return a new writeable copy of the bytes."""

    def reader(self) -> Callable[[memoryview], None]:
        """Return a function that fills a buffer with the next bytes."""


class _RecordReader:
    """A file for the unpickler that has the pickle, and separately the out-of-band buffers."""

    def __init__(self, fill: Callable[[memoryview], None], most: int) -> None:
        self._fill = fill
        self._most = most
        self._left = 0  # bytes of the current piece of the pickle that were not read yet
        self._ended = False
        self.buffers: deque[Any] = deque()

    def _next_record(self) -> bool:
        """Load the buffers up to the next piece of the pickle, and return whether there is one."""
        header = bytearray(RECORD.size)
        while not self._ended:
            self._fill(memoryview(header))
            kind, length = RECORD.unpack(header)
            if kind == IN_BAND:
                self._left = length
                if length:
                    return True
            elif kind in (BUFFER, READONLY_BUFFER):
                buffer = self._room(length)
                self._fill(memoryview(buffer))
                self.buffers.append(
                    memoryview(buffer).toreadonly() if kind == READONLY_BUFFER else buffer
                )
            elif kind == END:
                self._ended = True
            else:
                raise pickle.UnpicklingError(f"unknown record type {kind} in a payload")
        return False

    def finish(self) -> None:
        """Check that the payload ends where the pickle ends."""
        if self._left or self._next_record():
            raise pickle.UnpicklingError("there are bytes after the end of the pickle")

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        if len(view) >= LARGE:
            _prefer_large_pages(view)
        at = 0
        while at < len(view):
            if not self._left and not self._next_record():
                break
            n = min(len(view) - at, self._left)
            self._fill(view[at : at + n])
            self._left -= n
            at += n
        return at

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            raise pickle.UnpicklingError("unbounded read of a payload")
        self._check(size)
        return _read(self.readinto, size)

    def _check(self, size: int) -> None:
        if size > self._most:
            # If this raised UnpicklingError, the unpickler would take it for the end of the file.
            raise MemoryError(f"{size} bytes are more than a payload may have")

    def _room(self, size: int) -> bytearray:
        self._check(size)
        if size < LARGE:
            return bytearray(size)
        from cloudexec._memory import room_for

        return room_for(size)

    def readline(self) -> bytes:
        line = bytearray()
        while byte := self.read(1):
            line += byte
            if byte == b"\n":
                break
        return bytes(line)

    def __iter__(self) -> Iterator[Any]:
        while True:
            # A buffer has been loaded before the piece of the pickle that refers to it.
            yield self.buffers.popleft()


def load_records(fill: Callable[[memoryview], None], most: int = sys.maxsize) -> Any:
    """Unpickle a large payload while it arrives.

    Args:
        fill: Fills a whole buffer with the next bytes, and waits for them if necessary.
        most: Largest length in bytes that a record may announce.

    Raises:
        BaseException: Any exception of ``fill`` or of unpickling.
    """
    reader = _RecordReader(fill, most)
    value = pickle.Unpickler(reader, buffers=iter(reader)).load()
    reader.finish()
    return value


def record(kind: int, size: int) -> bytes:
    """Return the header of one record."""
    return RECORD.pack(kind, size)


def buffer_record(blob: Blob) -> bytes:
    """Return the record of a buffer that is a blob."""
    return RECORD.pack(BUFFER_BLOB, blob.id)


def in_band_record(blob: Blob) -> bytes:
    """Return the record of a piece of the pickle that is a blob."""
    return RECORD.pack(IN_BAND_BLOB, blob.id)


class _Pieces:
    """A file for the unpickler that has the pieces of the pickle, including those in blobs."""

    def __init__(self, pieces: list[Any]) -> None:
        self._pieces = deque(pieces)
        self._left = 0
        self._fill: Callable[[memoryview], None] = lambda target: None

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        if len(view) >= LARGE:
            _prefer_large_pages(view)
        at = 0
        while at < len(view):
            if not self._left:
                if not self._pieces:
                    break
                piece = self._pieces.popleft()
                if isinstance(piece, (bytes, memoryview)):
                    self._left, self._fill = len(piece), _filler(memoryview(piece))
                else:
                    self._left, self._fill = piece.size, piece.reader()
                continue
            n = min(len(view) - at, self._left)
            self._fill(view[at : at + n])
            self._left -= n
            at += n
        return at

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            raise pickle.UnpicklingError("unbounded read of a payload")
        return _read(self.readinto, size)

    def readline(self) -> bytes:
        line = bytearray()
        while byte := self.read(1):
            line += byte
            if byte == b"\n":
                break
        return bytes(line)


def _filler(view: memoryview) -> Callable[[memoryview], None]:
    at = 0

    def fill(target: memoryview) -> None:
        nonlocal at
        target[:] = view[at : at + len(target)]
        at += len(target)

    return fill


def load_composed(
    head: bytes | memoryview,
    source: Callable[[int], Any],
    unpickler: type[pickle.Unpickler] = pickle.Unpickler,
) -> Any:
    """Unpickle a large payload.

    Args:
        head: The payload's records.
        source: Returns the :class:`Source` of a blob, given its number.
        unpickler: Class of the unpickler.

    Raises:
        BaseException: Any exception of a source or of unpickling.
    """
    pieces: list[Any] = []
    buffers: list[Any] = []
    at = 0
    while at < len(head):
        kind, number = RECORD.unpack_from(head, at)
        at += RECORD.size
        if kind < END:
            data = head[at : at + number]
            at += number
            if kind == IN_BAND:
                pieces.append(data)
            else:
                buffers.append(bytearray(data) if kind == BUFFER else memoryview(data))
        elif kind == END:
            break
        elif kind == IN_BAND_BLOB:
            pieces.append(source(number))
        elif kind == BUFFER_BLOB:
            buffers.append(source(number).buffer())
        elif kind == READONLY_BLOB:
            buffers.append(memoryview(source(number).buffer()).toreadonly())
        elif kind == HEAD_BLOB:
            records = bytearray(source(number).size)
            source(number).reader()(memoryview(records))
            return load_composed(bytes(records), source, unpickler)
        else:
            raise pickle.UnpicklingError(f"unknown record type {kind} in a payload")
    if len(pieces) == 1 and unpickler is pickle.Unpickler:
        piece = pieces[0]
        if not isinstance(piece, (bytes, memoryview)):
            piece = piece.view()
        if piece is not None:
            return _loads(piece, buffers=buffers)
    return unpickler(_Pieces(pieces), buffers=buffers).load()


class Held:
    """The source of a blob whose content has been loaded into a buffer."""

    def __init__(self, buffer: Any) -> None:
        self._buffer = buffer
        self.size = memoryview(buffer).nbytes

    def view(self) -> memoryview:
        return memoryview(self._buffer).cast("B")

    def buffer(self) -> Any:
        return self._buffer

    def reader(self) -> Callable[[memoryview], None]:
        return _filler(self.view())


def load_nested(head: bytes, numbers: bytes, buffers: tuple[Any, ...]) -> Any:
    """Unpickle a large payload that is part of another payload.

    Args:
        head: The inner payload's records.
        numbers: The numbers of its blobs, 8 bytes each.
        buffers: The contents of these blobs.

    Raises:
        BaseException: Any exception of unpickling.
    """
    held = {
        number: Held(buffer)
        for (number,), buffer in zip(NUMBER.iter_unpack(numbers), buffers, strict=True)
    }
    return load_composed(head, held.__getitem__)


class Composed:
    """A large payload: a small head, and the blobs it refers to.

    Attributes:
        head: Records; see ``_records``.
        blobs: Each blob once.
        numbers: What the head calls them; their own numbers, but in results.
        shared: Whether something else than the future it belongs to may still load it.
        recipe: How to make it again, should a worker that keeps it be lost; see ``keeper.Recipe``.
        files: Held open for the process that unpickles it.
    """

    __slots__ = ("__weakref__", "blobs", "files", "head", "numbers", "recipe", "shared")

    def __init__(
        self, head: bytes, blobs: tuple[Blob, ...], numbers: tuple[int, ...] | None = None
    ) -> None:
        self.head = head
        self.blobs = blobs
        self.numbers = tuple([blob.id for blob in blobs]) if numbers is None else numbers
        self.shared = False
        self.recipe: Any = None
        self.files: tuple[object, ...] = ()

    def __len__(self) -> int:
        return len(self.head) + sum([blob.size for blob in self.blobs])

    def load(self) -> Any:
        """Unpickle it, here.

        Raises:
            BaseException: Whatever unpickling raises.
        """
        blobs: dict[int, Any] = dict(zip(self.numbers, self.blobs, strict=True))
        if not self.shared:
            # Nobody else will: what came as an object of our own need not be copied.
            for number, blob in blobs.items():
                if blob.segment is None and type(blob.content) is not bytes:
                    blobs[number] = Held(blob.content)
        return load_composed(self.head, blobs.__getitem__)


Payload = bytes | Composed
