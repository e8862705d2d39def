"""The digests by which S3 checks an upload: the SHA-256 of the whole, and of each part."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

from cloudexec._transfer import PART_BYTES, parts_of

__all__ = ["Digests", "digests", "read_at"]

_CHUNK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Digests:
    """The digests of an upload.

    Attributes:
        sha256: SHA-256 of the whole.
        parts: SHA-256 of each part. If there is one part, it is that of the whole.
    """

    sha256: bytes
    parts: tuple[bytes, ...]


def digests(
    fd: int, size: int, *, offset: int = 0, part_bytes: int = PART_BYTES, sha256: bytes = b""
) -> Digests:
    """Read a part of a file and return its digests.

    Args:
        fd: The file, open for reading.
        size: Bytes to read.
        offset: Their offset in the file.
        part_bytes: As for ``parts_of``.
        sha256: SHA-256 of the whole, if it is known; this saves at least half of the work.

    Raises:
        OSError: If the file cannot be read, or is too short.
    """
    parts = parts_of(size, part_bytes)
    if sha256 and len(parts) == 1:
        return Digests(sha256, (sha256,))
    whole = hashlib.sha256()
    found = []
    for part in parts:
        of_part = hashlib.sha256()
        at, end = offset + part.offset, offset + part.offset + part.length
        while at < end:
            data = read_at(fd, min(_CHUNK, end - at), at)
            of_part.update(data)
            if not sha256 and len(parts) > 1:
                whole.update(data)
            at += len(data)
        found.append(of_part.digest())
    return Digests(sha256 or (whole.digest() if len(parts) > 1 else found[0]), tuple(found))


def read_at(fd: int, length: int, offset: int) -> bytes:
    """Read up to ``length`` bytes of a file, at least one.

    Raises:
        OSError: If the file ends before the offset, or cannot be read.
    """
    data = os.pread(fd, length, offset)
    if not data:
        raise OSError(f"the file ends at {offset}, and {length} bytes more were announced")
    return data
