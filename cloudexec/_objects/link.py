"""How fast a link is, and whether compressing what goes over it makes it faster."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable

from cloudexec._proto.tasks_pb2 import Chunk

__all__ = ["Link"]

_LEVEL = 1
_SAMPLE_BYTES = 64 * 1024
_WORTH = 0.8
"""Part of its size that a sample must shrink to."""
_MARGIN = 3.0
"""How much faster than the link compressing must be."""
_FASTEST = 50e6
"""Bytes per second from which on nothing is compressed: where a link seems so fast that compressing
might help a little, it is as likely that this machine was just busy."""
_LEAST_BYTES = 4 * 1024 * 1024
"""Bytes that must have gone before the link is judged: the first ones only fill buffers."""
_DECAY = 0.8
"""What a chunk counts when the next one has gone."""
_SKIP = 16
"""Chunks that go as they are when a sample did not shrink."""
_PACKED = 256
"""Compressed chunks after which the link is looked at anew."""


class Link:
    """One direction of the connection to one peer.

    Only time in which a write was under way counts, and only of chunks that went as they are: with
    compressed ones the processor may be what is slow.

    Args:
        enabled: Whether to compress at all.
        clock: What says how late it is, in seconds.
    """

    def __init__(self, *, enabled: bool, clock: Callable[[], float] = time.perf_counter) -> None:
        self._enabled = enabled
        self._clock = clock
        self._writing = 0
        self._since = 0.0
        self._bytes = 0.0
        self._seconds = 0.0
        self._interval = 0.0
        self._measured = 0
        self._skip = 0
        self._packed = 0

    # On the event loop.

    def begin(self) -> None:
        """A write begins; several may at a time."""
        now = self._clock()
        if self._writing:
            self._interval += now - self._since
        self._since = now
        self._writing += 1

    def end(self, chunk: object) -> None:
        """A write has ended."""
        now = self._clock()
        interval = self._interval + now - self._since
        self._interval = 0.0
        self._since = now
        self._writing -= 1
        if not isinstance(chunk, Chunk):
            size = len(chunk)  # type: ignore[arg-type]
            self._measured += size
            self._bytes = _DECAY * self._bytes + size
            self._seconds = _DECAY * self._seconds + interval

    @property
    def is_slow(self) -> bool:
        """Whether compressing may be worth it, as far as that is known."""
        known = self._enabled and self._measured >= _LEAST_BYTES
        return known and self._bytes < _FASTEST * self._seconds

    # In a thread.

    def pack(self, data: bytes | memoryview) -> bytes | memoryview | Chunk:
        """Return a chunk as it is to be sent: compressed where that is faster."""
        if not self._enabled or self._measured < _LEAST_BYTES or len(data) < 2 * _SAMPLE_BYTES:
            return data
        if self._bytes >= _FASTEST * self._seconds:
            return data
        if self._skip:
            self._skip -= 1
            return data
        middle = (len(data) - _SAMPLE_BYTES) // 2
        # Of this thread alone: what else this machine did meanwhile says nothing about compressing.
        began = time.thread_time()
        size = len(zlib.compress(data[middle : middle + _SAMPLE_BYTES], _LEVEL))
        speed = _SAMPLE_BYTES / max(time.thread_time() - began, 1e-6)
        if size > _WORTH * _SAMPLE_BYTES or speed * self._seconds < _MARGIN * self._bytes:
            self._skip = _SKIP
            return data
        packed = zlib.compress(data, _LEVEL)
        if len(packed) > _WORTH * len(data):
            self._skip = _SKIP
            return data
        self._packed += 1
        if self._packed >= _PACKED:
            self._packed = self._measured = 0
            self._bytes = self._seconds = 0.0
        return Chunk(data=packed, deflated=True)
