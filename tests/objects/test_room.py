"""Memory for what is about to be filled."""

from __future__ import annotations

import mmap
import os
import re
import sys
from pathlib import Path

import pytest

from cloudexec._memory import _LARGE_PAGES_FROM, address_of, prefer_large_pages, room_for

MIB = 1024 * 1024
AROUND = [_LARGE_PAGES_FROM + each for each in (-1, 0, 1, mmap.PAGESIZE + 1)]


@pytest.mark.parametrize("size", [0, 1, *AROUND])
def test_room_has_the_size_that_was_asked_for(size: int) -> None:
    room = room_for(size)
    assert len(room) == size
    room[:] = b"x" * size
    assert room.count(b"x") == size
    room += b"y"  # it is a bytearray like others
    assert len(room) == size + 1


@pytest.mark.parametrize("size", [sys.maxsize // 4, sys.maxsize, 2**64 - 1])
def test_room_of_an_absurd_size_is_refused(size: int) -> None:
    with pytest.raises((MemoryError, OverflowError)):
        room_for(size)


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs Linux")
def test_nothing_is_written_into_room_before_it_is_filled() -> None:
    """Pages that are there already are not large, and writing zeros takes as long as filling it."""
    room = room_for(64 * MIB)
    middle = address_of(memoryview(room)) + len(room) // 2
    assert resident(middle) < 4 * MIB
    room[:] = bytes(len(room))
    assert resident(middle) > 60 * MIB


def resident(address: int) -> int:
    """Return how many bytes are in memory of the mapping that an address is in."""
    within = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            within = int(found[1], 16) <= address < int(found[2], 16)
        elif within and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the address is in no mapping")


@pytest.mark.parametrize("size", AROUND)
@pytest.mark.parametrize("start", [0, 1, mmap.PAGESIZE - 1])
def test_preferring_large_pages_changes_no_content(start: int, size: int) -> None:
    buffer = bytearray(os.urandom(size + start + mmap.PAGESIZE))
    before = bytes(buffer)
    prefer_large_pages(memoryview(buffer)[start : start + size])
    assert buffer == before
