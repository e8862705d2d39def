"""Blobs that a worker fetches from the client: what is cut off, or damaged, on the way."""

from __future__ import annotations

import asyncio
import random
import zlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
import pytest

from cloudexec import PayloadError
from cloudexec._objects.options import Limits
from cloudexec._objects.store import Blob, BlobStore
from cloudexec._objects.transfer import fetch_into
from cloudexec._proto.tasks_pb2 import Chunk

pytestmark = pytest.mark.timeout(30)
MIB = 1024 * 1024
CONTENT = random.Random(1).randbytes(5 * MIB)


def fetch(send: Callable[[int, int], list[Any]]) -> tuple[Blob, list[int]]:
    """Fetch the content from what ``send`` gives for the number of a try and an offset.

    Returns:
        The blob, and the offsets that were asked for.
    """
    asked: list[int] = []

    async def chunks(at: int) -> AsyncIterator[Any]:
        asked.append(at)
        for each in send(len(asked), at):
            yield each

    async def is_cut(code: grpc.StatusCode) -> bool:
        return False

    blob = BlobStore(Limits(64 * MIB, 0), shared=True).new(len(CONTENT))
    asyncio.run(fetch_into(blob, chunks, is_cut))
    return blob, asked


def whole(content: bytes, at: int = 0) -> list[Any]:
    pieces = [memoryview(content)[n : n + MIB] for n in range(at, len(content), MIB)]
    return [*pieces, Chunk(crc32=zlib.crc32(CONTENT))]


def damaged() -> bytes:
    content = bytearray(CONTENT)
    content[3 * MIB] ^= 1
    return bytes(content)


@pytest.mark.parametrize(
    "first",
    [
        whole(damaged()),
        whole(CONTENT)[:3],
        [*whole(CONTENT)[:-1], *whole(CONTENT)],
        [Chunk(data=b"not deflated", deflated=True)],
    ],
    ids=["another byte", "too little", "too much", "not compressed"],
)
def test_what_arrives_damaged_is_fetched_again_from_the_start(first: list[Any]) -> None:
    """One bit on the way costs time, and not the tasks that take it."""
    blob, asked = fetch(lambda number, at: first if number == 1 else whole(CONTENT))
    assert blob.view() == CONTENT
    assert asked == [0, 0]


def test_what_always_arrives_damaged_is_an_error_in_the_end() -> None:
    """A few times are enough."""
    with pytest.raises(PayloadError, match="other than they were sent"):
        fetch(lambda number, at: whole(damaged()))
