"""Chunks are compressed where the link is slow and the content allows it, and nowhere else."""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from relay import Relay

from cloudexec import BatchExecutor, ObjectOptions
from cloudexec._objects.link import Link
from cloudexec._proto.tasks_pb2 import Chunk

pytestmark = pytest.mark.timeout(120)

MIB = 1024 * 1024
RATE = 8e6
EASY = b"all work and no play makes a dull link; " * (48 * MIB // 40)
HARD = random.Random(1).randbytes(16 * MIB)


def _length(data: bytes) -> tuple[int, int]:
    return len(data), data[-1]


def _easy(size: int) -> bytes:
    return EASY[:size]


def _hard(size: int) -> bytes:
    return random.Random(2).randbytes(size)


@contextmanager
def _executor_behind(rate: float, *, compression: bool) -> Iterator[tuple[BatchExecutor, Relay]]:
    """An executor with one worker, which reaches it through a relay."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ObjectOptions(compression=compression)
    with (
        Relay(port, rate=rate) as relay,
        BatchExecutor(
            1,
            listen=f"127.0.0.1:{port}",
            advertise=f"127.0.0.1:{relay.port}",
            objects=options,
        ) as executor,
    ):
        assert executor.submit(pow, 2, 3).result(timeout=30) == 8
        relay.passed.update(up=0, down=0)
        yield executor, relay


@pytest.mark.alone
def test_compressible_content_crosses_a_slow_link_several_times_faster() -> None:
    """An argument and a result, with and without."""
    seconds: dict[tuple[bool, str], float] = {}
    for compression in (True, False):
        with _executor_behind(RATE, compression=compression) as (executor, relay):
            began = time.monotonic()
            size, last = executor.submit(_length, EASY).result(timeout=60)
            seconds[compression, "argument"] = time.monotonic() - began
            assert (size, last) == (len(EASY), EASY[-1])
            began = time.monotonic()
            assert executor.submit(_easy, len(EASY)).result(timeout=60) == EASY
            seconds[compression, "result"] = time.monotonic() - began
            # Content is counted, not what went over the wire.
            assert executor.stats().bytes_sent >= len(EASY)
            assert executor.stats().bytes_received >= len(EASY)
            if compression:
                assert relay.passed["up"] < len(EASY) / 2
                assert relay.passed["down"] < len(EASY) / 2
    for what in ("argument", "result"):
        assert seconds[True, what] < seconds[False, what] / 2.5, seconds


def test_incompressible_content_goes_as_it_is() -> None:
    """On a slow link it is looked at, and found not to be worth it."""
    with _executor_behind(RATE, compression=True) as (executor, relay):
        assert executor.submit(_length, HARD).result(timeout=60)[0] == len(HARD)
        assert len(HARD) <= relay.passed["down"] < len(HARD) * 1.1
        assert executor.submit(_hard, len(HARD)).result(timeout=60) == _hard(len(HARD))
        assert len(HARD) <= relay.passed["up"] < len(HARD) * 1.1


def test_nothing_is_compressed_on_a_fast_link() -> None:
    """Most of all not on this machine; a moment in which it is busy may look like a slow link."""
    with _executor_behind(0, compression=True) as (executor, relay):
        assert executor.submit(_length, EASY).result(timeout=60)[0] == len(EASY)
        assert relay.passed["down"] > len(EASY) / 2


def _send(link: Link, data: bytes, chunks: int, rate: float) -> int:
    """Send chunks over a link of so many bytes per second; say how many went compressed."""
    packed = 0
    for _ in range(chunks):
        chunk = link.pack(data)
        packed += isinstance(chunk, Chunk)
        link.begin()
        size = len(chunk.data) if isinstance(chunk, Chunk) else len(chunk)
        time.sleep(size / rate)
        link.end(chunk)
    return packed


def test_a_link_is_judged_by_what_it_carries() -> None:
    """Slow: compressed after the first chunks; fast, or content that does not shrink: never."""
    easy, hard = EASY[:MIB], HARD[:MIB]
    assert _send(Link(enabled=True), easy, 12, 10e6) >= 6
    assert _send(Link(enabled=True), hard, 12, 10e6) == 0
    assert _send(Link(enabled=True), easy, 30, 1e9) == 0
    assert _send(Link(enabled=False), easy, 8, 10e6) == 0


def test_a_link_that_becomes_fast_is_noticed() -> None:
    """After so many compressed chunks it is measured anew."""
    link = Link(enabled=True)
    assert _send(link, EASY[:MIB], 8, 10e6)
    small = EASY[: 128 * 1024]
    _send(link, small, 260, 1e9)
    assert _send(link, EASY[:MIB], 30, 1e9) == 0


def test_writes_at_the_same_time_count_once() -> None:
    """Four streams that share a link are not taken for a link of a quarter of its speed."""
    link = Link(enabled=True)
    data = EASY[: 4 * MIB]
    for _ in range(4):
        for _ in range(4):
            link.begin()
        time.sleep(4 * len(data) / 200e6)
        for _ in range(4):
            link.end(data)
    assert link.pack(data) is data
