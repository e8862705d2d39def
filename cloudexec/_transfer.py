"""What client and worker must agree on to move an object through S3: parts, and signed requests."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["PART_BYTES", "Part", "SignedRequest", "part_length", "parts_of"]

PART_BYTES = 16 * 1024 * 1024
"""Objects up to this go in one request, larger ones in parts of this."""
_MIB = 1024 * 1024
_MIN_PART = 5 * _MIB
_MAX_PARTS = 10_000


@dataclass(frozen=True, slots=True)
class Part:
    """A stretch of an object.

    Attributes:
        number: As S3 counts: from 1.
        offset: First byte.
        length: Bytes.
    """

    number: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class SignedRequest:
    """A request that whoever holds it may make until it expires: keep it out of logs.

    Attributes:
        url: Where to, with the signature.
        headers: To be sent exactly so: they are signed too.
        expires_at: Unix time from which on S3 refuses it. Where credentials end at a time that
            cannot be known, it may be refused earlier.
    """

    url: str
    headers: tuple[tuple[str, str], ...]
    expires_at: float


def part_length(size: int, part_bytes: int = PART_BYTES) -> int:
    """Return how long the parts of an object are; the last may be shorter.

    Args:
        size: Of the object.
        part_bytes: As wanted; more where the object would have too many parts.

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
    """Cut an object into parts; one that is sent in one request is one part, be it empty."""
    length = part_length(size, part_bytes)
    starts = range(0, max(size, 1), length)
    return [
        Part(number, start, min(length, size - start)) for number, start in enumerate(starts, 1)
    ]
