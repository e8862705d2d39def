"""Measures how fast a connection is, and decides whether compressing its chunks saves time."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable

from cloudexec._proto.tasks_pb2 import Chunk

__all__ = ["Link"]

_LEVEL = 1
_SAMPLE_BYTES = 64 * 1024
_WORTH = 0.8
"""A chunk is compressed if a sample of it shrinks to at most this part of its size."""
_MARGIN = 3.0
"""A chunk is compressed only if that is faster than the link by this factor."""
_FASTEST = 50e6
"""Bytes per second: on faster links nothing is compressed. Compression would help little there, and
the measurement may only be low because this machine was busy."""
_LEAST_BYTES = 4 * 1024 * 1024
"""Bytes that must have been sent before the speed is known: the first ones only fill buffers."""
_DECAY = 0.8
"""Weight of the measurements so far, relative to the chunk that was sent last."""
_SKIP = 16
"""Chunks that are sent uncompressed after a sample that did not shrink enough."""
_PACKED = 256
"""Compressed chunks after which the speed is measured anew, with uncompressed chunks."""


class Link:
    """One direction of the connection to one peer.

    The speed is measured with uncompressed chunks only, and only while a write is under way. With
    compressed chunks the processor may be the slow part.

    Args:
        enabled: Whether to compress at all.
        clock: Returns the time in seconds.
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
        """Note that a write begins; several writes may be under way at a time."""
        now = self._clock()
        if self._writing:
            self._interval += now - self._since
        self._since = now
        self._writing += 1

    def end(self, chunk: object) -> None:
        """Note that the write of a chunk has ended."""
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
        """Whether the link is known to be so slow that compression may save time."""
        known = self._enabled and self._measured >= _LEAST_BYTES
        return known and self._bytes < _FASTEST * self._seconds

    # In a thread.

    def pack(self, data: bytes | memoryview) -> bytes | memoryview | Chunk:
        """Return the chunk to send: compressed if that is faster, or else the data as it is."""
        if not self._enabled or self._measured < _LEAST_BYTES or len(data) < 2 * _SAMPLE_BYTES:
            return data
        if self._bytes >= _FASTEST * self._seconds:
            return data
        if self._skip:
            self._skip -= 1
            return data
        middle = (len(data) - _SAMPLE_BYTES) // 2
        # The processor time of this thread: other work on this machine must not count.
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
