"""How client and worker move an object through S3: its parts, signed requests, and threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from cloudexec._record_class import record

__all__ = ["PART_BYTES", "Part", "SignedRequest", "on_thread", "part_length", "parts_of"]

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


async def on_thread(
    run: Callable[[], object], on_cancel: Callable[[], object] = lambda: None
) -> None:
    """Call something in a thread, and return only once that call has ended.

    A thread cannot be cancelled, and the caller may use the same file for something else when this
    has returned.

    Args:
        run: What is called.
        on_cancel: Called if this is cancelled meanwhile, so that ``run`` ends soon.

    Raises:
        BaseException: What ``run`` raised.
    """
    running = asyncio.ensure_future(asyncio.to_thread(run))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        on_cancel()
        while not running.done():
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError:
                pass  # raised below
        if not running.cancelled():
            running.exception()
        raise
