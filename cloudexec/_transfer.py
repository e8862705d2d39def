"""What client and worker have to say about an object in S3: its parts, digests and requests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from typing import TypeAlias

from cloudexec._record_class import record

__all__ = [
    "CHUNK",
    "PART_BYTES",
    "Digests",
    "File",
    "Part",
    "SignedRequest",
    "Sink",
    "Source",
    "digest",
    "digests",
    "part_length",
    "parts_of",
    "piece",
]

Source: TypeAlias = Callable[[int, int], "bytes | bytearray | memoryview"]
"""Returns the content at an offset, of a length. It may block. Calls come from several threads at a
time, and again for the same content if a request is repeated."""
Sink: TypeAlias = Callable[[int, bytes], object]
"""Takes the content at an offset. It may block. Calls come in any order and from several threads at
a time, but never after the transfer has ended."""

CHUNK = 1024 * 1024
"""Bytes that are hashed at a time."""

PART_BYTES = 16 * 1024 * 1024
"""Objects of up to so many bytes are sent in one request, larger ones in parts of this size."""
_MIB = 1024 * 1024
_MIN_PART = 5 * _MIB
_MAX_PARTS = 10_000


@record
class Part:
    """A part of an object.

    Attributes:
        number: Number of the part in S3, from 1.
        offset: Position of its first byte in the object.
        length: Number of bytes.
    """

    number: int
    offset: int
    length: int


@record
class SignedRequest:
    """A signed request. It must not be logged, as anyone who has it can make it until it expires.

    Attributes:
        url: The URL with the signature.
        headers: The headers, which are signed too and must be sent exactly as they are.
        expires_at: Unix time from which on S3 refuses the request. S3 may refuse it earlier if the
            credentials expire at an unknown time.
    """

    url: str
    headers: tuple[tuple[str, str], ...]
    expires_at: float


def part_length(size: int, part_bytes: int = PART_BYTES) -> int:
    """Return the length of an object's parts in bytes; the last part may be shorter.

    Args:
        size: Size of the object in bytes.
        part_bytes: Wanted length; the result is larger if there would be too many parts.

    Raises:
        ValueError: If ``part_bytes`` is less than S3 allows.

    References:
        1 to 10,000 parts, of 5 MiB and more: Amazon S3 User Guide, "Multipart upload limits".
    """
    if part_bytes < _MIN_PART:
        raise ValueError(f"parts have at least {_MIN_PART} bytes, not {part_bytes}")
    least = -(-size // _MAX_PARTS)
    return max(part_bytes, -(-least // _MIB) * _MIB)


def parts_of(size: int, part_bytes: int = PART_BYTES) -> list[Part]:
    """Divide an object into parts; an object that is sent in one request is a single part."""
    length = part_length(size, part_bytes)
    starts = range(0, max(size, 1), length)
    return [
        Part(number, start, min(length, size - start)) for number, start in enumerate(starts, 1)
    ]


class File:
    """An object's place in a file; its methods are the source and the sink of a transfer.

    Args:
        fd: The file, open for what is done with it.
        offset: The object's offset in the file.
    """

    __slots__ = ("_fd", "_offset")

    def __init__(self, fd: int, offset: int = 0) -> None:
        self._fd = fd
        self._offset = offset

    def read(self, at: int, length: int) -> bytes:
        """Return a part of the object; fewer bytes if the file ends before."""
        return os.pread(self._fd, length, self._offset + at)

    def write(self, at: int, data: bytes) -> None:
        """Write a part of the object.

        Raises:
            OSError: If there is no room.
        """
        view = memoryview(data)
        while view:
            done = os.pwrite(self._fd, view, self._offset + at)
            view = view[done:]
            at += done


@record
class Digests:
    """The digests by which S3 checks an upload.

    Attributes:
        sha256: SHA-256 of the whole.
        parts: SHA-256 of each part. If there is one part, it is that of the whole.
    """

    sha256: bytes
    parts: tuple[bytes, ...]


def digests(source: Source, size: int, *, part_bytes: int = PART_BYTES) -> Digests:
    """Read an object and return its digests.

    Args:
        source: Returns the content.
        size: Bytes of the object.
        part_bytes: As for ``parts_of``.

    Raises:
        OSError: If the content cannot be read, or is too short.
    """
    parts = parts_of(size, part_bytes)
    if len(parts) == 1:
        sha256 = digest(source, 0, size)
        return Digests(sha256, (sha256,))
    whole = hashlib.sha256()
    found = tuple(digest(source, part.offset, part.length, whole) for part in parts)
    return Digests(whole.digest(), found)


def digest(source: Source, offset: int, length: int, whole: hashlib._Hash | None = None) -> bytes:
    """Return the SHA-256 of a part of an object, and hash it into that of the whole too.

    Raises:
        OSError: If the content cannot be read, or is too short.
    """
    found = hashlib.sha256()
    for at in range(offset, offset + length, CHUNK):
        data = piece(source, at, min(CHUNK, offset + length - at))
        found.update(data)
        if whole is not None:
            whole.update(data)
    return found.digest()


def piece(source: Source, at: int, length: int) -> bytes | bytearray | memoryview:
    """Return a part of an object.

    Raises:
        OSError: If it cannot be read, or is too short.
    """
    data = source(at, length)
    if len(data) != length:
        raise OSError(f"{length} bytes at {at} were announced, and there are {len(data)} of them")
    return data
