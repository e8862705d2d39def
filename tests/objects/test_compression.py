"""Chunks are compressed where the link is slow and the content allows it, and nowhere else."""

from __future__ import annotations

import itertools
import random
import socket
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
def _executor_behind(
    rate: float, *, compression: bool, slots: int = 1
) -> Iterator[tuple[BatchExecutor, Relay]]:
    """An executor with one worker, which reaches it through a relay."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ObjectOptions(compression=compression)
    with (
        Relay(port, rate=rate) as relay,
        BatchExecutor(
            slots,
            listen=f"127.0.0.1:{port}",
            advertise=f"127.0.0.1:{relay.port}",
            objects=options,
        ) as executor,
    ):
        assert executor.submit(pow, 2, 3).result(timeout=30) == 8
        relay.passed.update(up=0, down=0)
        yield executor, relay


def test_compressible_content_crosses_a_slow_link_several_times_faster() -> None:
    """An argument and a result: bytes on the link are counted, as it is what takes the time."""
    with _executor_behind(RATE, compression=True) as (executor, relay):
        assert executor.submit(_length, EASY).result(timeout=60) == (len(EASY), EASY[-1])
        assert executor.submit(_easy, len(EASY)).result(timeout=60) == EASY
        # Content is counted, not what went over the wire.
        assert executor.stats().bytes_sent >= len(EASY)
        assert executor.stats().bytes_received >= len(EASY)
        assert relay.passed["up"] < len(EASY) / 2.5
        assert relay.passed["down"] < len(EASY) / 2.5


def test_nothing_is_compressed_unless_asked_for() -> None:
    """On a slow link too."""
    data = EASY[: 8 * MIB]
    with _executor_behind(RATE, compression=False) as (executor, relay):
        assert executor.submit(_length, data).result(timeout=60)[0] == len(data)
        assert executor.submit(_easy, len(data)).result(timeout=60) == data
        assert relay.passed["up"] >= len(data)
        assert relay.passed["down"] >= len(data)


def test_incompressible_content_goes_as_it_is() -> None:
    """On a slow link it is looked at, and found not to be worth it."""
    with _executor_behind(RATE, compression=True) as (executor, relay):
        assert executor.submit(_length, HARD).result(timeout=60)[0] == len(HARD)
        assert len(HARD) <= relay.passed["down"] < len(HARD) * 1.1
        assert executor.submit(_hard, len(HARD)).result(timeout=60) == _hard(len(HARD))
        assert len(HARD) <= relay.passed["up"] < len(HARD) * 1.1


def test_nothing_is_compressed_on_a_fast_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of all not on this machine, which is never too busy to be faster than the limit here."""
    monkeypatch.setattr("cloudexec._objects.link._FASTEST", 1e6)
    with _executor_behind(0, compression=True) as (executor, relay):
        assert executor.submit(_length, EASY).result(timeout=60)[0] == len(EASY)
        assert relay.passed["down"] > len(EASY) / 2


class _Link(Link):
    """A link that is as fast as said, however busy this machine is: it has a clock of its own."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.now = 0.0
        super().__init__(enabled=enabled, clock=lambda: self.now)

    def send(self, data: bytes, chunks: int, rate: float) -> int:
        """Send chunks at so many bytes per second; say how many went compressed."""
        packed = 0
        for _ in range(chunks):
            chunk = self.pack(data)
            packed += isinstance(chunk, Chunk)
            self.begin()
            self.now += (len(chunk.data) if isinstance(chunk, Chunk) else len(chunk)) / rate
            self.end(chunk)
        return packed


def test_a_link_is_judged_by_what_it_carries() -> None:
    """Slow: compressed after the first chunks; fast, or content that does not shrink: never."""
    easy, hard = EASY[:MIB], HARD[:MIB]
    assert _Link().send(easy, 12, 10e6) == 8
    assert _Link().send(hard, 12, 10e6) == 0
    assert _Link().send(easy, 30, 1e9) == 0
    assert _Link(enabled=False).send(easy, 8, 10e6) == 0


def test_a_machine_that_stops_in_between_is_not_slow_at_compressing() -> None:
    """However late it is after each step: what counts is how long compressing itself takes."""
    looks = itertools.count()
    link = Link(enabled=True, clock=lambda: 0.1 * next(looks))
    packed = 0
    for _ in range(12):
        chunk = link.pack(EASY[:MIB])
        packed += isinstance(chunk, Chunk)
        link.begin()
        link.end(chunk)
    assert packed == 8


def test_a_link_that_becomes_fast_is_noticed() -> None:
    """After so many compressed chunks it is measured anew."""
    link = _Link()
    assert link.send(EASY[:MIB], 8, 10e6)
    small = EASY[: 128 * 1024]
    link.send(small, 260, 1e9)
    assert link.send(EASY[:MIB], 30, 1e9) == 0


def test_writes_at_the_same_time_count_once() -> None:
    """Four streams that share a link are not taken for a link of a quarter of its speed."""
    link = _Link()
    data = EASY[: 4 * MIB]
    for _ in range(4):
        for _ in range(4):
            link.begin()
        link.now += 4 * len(data) / 200e6
        for _ in range(4):
            link.end(data)
    assert link.pack(data) is data


def test_small_calls_do_not_wait_for_large_ones() -> None:
    """They overtake what has not been written to the connection yet: no more is in front of each.

    That is counted in bytes on the link, so that it does not matter how busy the machine is.
    """
    with _executor_behind(3 * RATE, compression=False, slots=2) as (executor, relay):
        large = executor.submit(_length, HARD * 4)
        while relay.passed["down"] < MIB:
            assert not large.done()
        passed = 0
        while relay.passed["down"] < 48 * MIB:
            executor.submit(abs, -1).result(timeout=60)
            passed += 1
        assert large.result(timeout=60) == (len(HARD) * 4, HARD[-1])
    assert passed >= 5
