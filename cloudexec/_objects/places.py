"""Lets processes of one machine tell each other where a blob is, and read it from there."""

from __future__ import annotations

import os
import pickle
import stat
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cloudexec import _direct
from cloudexec._descriptors import too_many_files
from cloudexec._errors import PayloadError
from cloudexec._memory import room_for
from cloudexec._objects.segments import NAMED, PROC, is_unwritten, map_file, map_private

__all__ = [
    "BlobGoneError",
    "DirectSource",
    "FileSource",
    "KeptSource",
    "Place",
    "is_descendant",
    "is_path_of",
    "open_shared",
    "pack_places",
    "unpack_places",
]

_COUNT = struct.Struct("<I")
_PLACE = struct.Struct("<QQQBH")
_GENERATIONS = 64


class Place(NamedTuple):
    """The place of one blob.

    Attributes:
        number: The blob's number.
        size: The blob's size in bytes.
        path: The file that the blob is in. If it is empty, the client is asked for the blob through
            the direct channel (a Unix socket).
        offset: The blob's offset in the file.
        mappable: Whether that part of the file never changes, so that it can be mapped.
    """

    number: int
    size: int
    path: str
    offset: int
    mappable: bool

    def shared_path(self, fd: int) -> str:
        """Return the path by which other processes open the file that is open here as ``fd``."""
        return f"/proc/{os.getpid()}/fd/{fd}" if PROC else self.path


def pack_places(places: Sequence[Place]) -> bytes:
    """Serialize places. Other bytes may follow them in the message."""
    parts = [_COUNT.pack(len(places))]
    for number, size, path, offset, mappable in places:
        encoded = path.encode()
        parts += (_PLACE.pack(number, size, offset, mappable, len(encoded)), encoded)
    return b"".join(parts)


def unpack_places(data: bytes | memoryview) -> tuple[list[Place], int]:
    """Read places; return them, and the offset of the bytes behind them."""
    (count,) = _COUNT.unpack_from(data)
    at = _COUNT.size
    places = []
    for _ in range(count):
        number, size, offset, mappable, length = _PLACE.unpack_from(data, at)
        at += _PLACE.size
        path = bytes(data[at : at + length]).decode()
        at += length
        places.append(Place(number, size, path, offset, bool(mappable)))
    return places, at


class BlobGoneError(ConnectionAbortedError):
    """The process that held a blob has dropped it, or has ended."""


def is_path_of(pid: int, path: str) -> bool:
    """Say whether a path that a process named is one of its own files of blobs."""
    if not PROC:
        return os.path.basename(path).startswith(NAMED)
    number = path.removeprefix(f"/proc/{pid}/fd/")
    return number != path and number.isascii() and number.isdigit()


def is_descendant(pid: int, ancestor: int) -> bool:
    """Say whether a process is the ancestor itself, or was started by it, however indirectly."""
    if not PROC:
        return pid == ancestor
    for _ in range(_GENERATIONS):
        if pid in (0, 1, ancestor):
            break
        try:
            with open(f"/proc/{pid}/stat", "rb") as file:
                # Behind the process's name, which may hold any character: its state, its parent.
                pid = int(file.read().rpartition(b")")[2].split()[1])
        except OSError:
            return False  # the process has ended
    return pid == ancestor


def open_shared(place: Place) -> int:
    """Open the file of another process that a blob is in.

    Raises:
        OSError: If the file cannot be opened, because the process has ended.
        PayloadError: If it is no file, or too short, or this process has too many files open.
    """
    try:
        # Not blocking, as the path could name a pipe, whose open() waits for a writer.
        fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as exc:
        remedy = too_many_files(exc)
        if not remedy:
            raise
        # The blob exists: with an OSError the caller would take it for lost and compute it again.
        raise PayloadError(f"{place.size} bytes could not be read: {exc.strerror}{remedy}") from exc
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_size < place.offset + place.size:
        os.close(fd)
        raise PayloadError(f"{place.path} does not hold the {place.size} bytes that it should")
    return fd


class FileSource:
    """A blob in a file of another process.

    Args:
        place: The blob's place.

    Raises:
        OSError: If the file cannot be opened, because the process has ended.
        PayloadError: If the file does not hold the blob.
    """

    def __init__(self, place: Place) -> None:
        self.size = place.size
        self._place = place
        self.fd = -1
        self.fd = open_shared(place)

    def view(self) -> memoryview | None:
        if not self._place.mappable:
            return memoryview(self.buffer())
        return map_file(self.fd, self.size, self._place.offset)

    def buffer(self) -> Any:
        if self._place.mappable:
            return map_private(self.fd, self.size, self._place.offset)
        data = room_for(self.size)
        self.reader()(memoryview(data))
        return data

    def reader(self) -> Callable[[memoryview], None]:
        at = self._place.offset

        def fill(target: memoryview) -> None:
            nonlocal at
            done = 0
            while done < len(target):
                n = os.preadv(self.fd, [target[done:]], at)
                if not n:
                    raise EOFError("a blob's file ended early")
                done += n
                at += n

        return fill

    def close(self) -> None:
        """Close the file; memory that is mapped from it stays valid."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


class KeptSource(FileSource):
    """A blob in a file whose memory is mapped once for several loads.

    Each load gets memory that nobody has written to and nobody else uses. Mapping large memory
    again takes longer than looking whether that is so.

    Args:
        place: The blob's place.
        kept: The memory of earlier loads, by the numbers of blobs.
    """

    def __init__(self, place: Place, kept: dict[int, Any]) -> None:
        super().__init__(place)
        self._kept = kept

    def buffer(self) -> Any:
        if not self._place.mappable:
            return super().buffer()
        memory = self._kept.pop(self._place.number, None)
        if memory is None or sys.getrefcount(memory) > _NOT_USED or not is_unwritten(memory):
            memory = super().buffer().obj
        self._kept[self._place.number] = memory
        return pickle.PickleBuffer(memory).raw()


_NOT_USED = 2
"""References to an object that only one variable refers to, as ``sys.getrefcount()`` counts."""


class DirectSource:
    """A blob that the client holds as a Python object. It is read through the direct channel."""

    def __init__(self, place: Place, path: str, token: bytes) -> None:
        self.size = place.size
        self._number = place.number
        self._path = path
        self._token = token

    def view(self) -> memoryview | None:
        return None

    def buffer(self) -> Any:
        data = room_for(self.size)
        self.reader()(memoryview(data))
        return data

    def reader(self) -> Callable[[memoryview], None]:
        try:
            connection = _direct.connect(self._path, self._token, _direct.FETCH, self._number)
            _direct.receive_exactly(connection, 1)
        except (EOFError, OSError) as exc:
            raise BlobGoneError("the client no longer has this payload") from exc
        left = self.size

        def fill(target: memoryview) -> None:
            nonlocal left
            try:
                _direct.fill_from(connection, target)
            except (EOFError, OSError) as exc:
                raise BlobGoneError("the payload was cut off") from exc
            left -= len(target)
            if left <= 0:
                connection.close()

        return fill
