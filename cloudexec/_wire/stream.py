"""A stream of messages that survives cut connections, for both ends of a session.

A connection delivers in order and without gaps until it is cut; then neither end knows how much of
what it wrote the other end has read. So each message that must arrive has a number, each end tells
the other how many of its messages have come, and the next connection begins with what is missing.
No message is lost, and none is read twice.

A ``Stream`` does no I/O and reads no clock: its owner writes the messages and keeps the timer.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from cloudexec._proto import tasks_pb2 as pb

__all__ = ["Stream"]

_MessageT = TypeVar("_MessageT", pb.WorkerMessage, pb.ServerMessage)

_ACKNOWLEDGE_AFTER = 0.1
"""Seconds that an acknowledgement may wait for a message that can carry it."""
_ACKNOWLEDGE_AT = 32
"""Number of unacknowledged messages at which an acknowledgement is sent at once."""
_MOST_KEPT = 65_536
"""Number of messages that may be unacknowledged. A working peer acknowledges far earlier."""
_MOST_KEPT_BYTES = 256 * 1024 * 1024


class Stream(Generic[_MessageT]):
    """One end: it keeps sent messages until they are acknowledged, and counts received ones."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the other end's messages that have been received."""
        self._acknowledged = 0  # how many of these have been acknowledged
        self._sent = 0
        self._kept: deque[tuple[_MessageT, int]] = deque()  # each message with its size in bytes
        self._kept_bytes = 0

    @property
    def is_clear(self) -> bool:
        """Whether all sent messages have been acknowledged."""
        return not self._kept

    @property
    def has_begun(self) -> bool:
        """Whether the other end has acknowledged the first message."""
        return bool(self._sent) and (not self._kept or self._kept[0][0].number > 1)

    @property
    def owes(self) -> bool:
        """Whether messages have been received that are not acknowledged yet."""
        return self.received > self._acknowledged

    @property
    def acknowledge_within(self) -> float | None:
        """Seconds within which an acknowledgement must be sent; ``None`` if none is needed."""
        owed = self.received - self._acknowledged
        if not owed:
            return None
        return 0.0 if owed >= _ACKNOWLEDGE_AT else _ACKNOWLEDGE_AFTER

    def stamp(self, message: _MessageT) -> None:
        """Number a message that is about to be sent, and keep it until it is acknowledged.

        Raises:
            ValueError: If too many sent messages, or too many bytes, are unacknowledged.
        """
        if len(self._kept) >= _MOST_KEPT or self._kept_bytes >= _MOST_KEPT_BYTES:
            count, size = len(self._kept), self._kept_bytes
            raise ValueError(f"{count} messages, {size} bytes, were not acknowledged")
        self._sent += 1
        message.number = self._sent
        size = message.ByteSize()
        self._kept.append((message, size))
        self._kept_bytes += size
        self.acknowledge(message)

    def acknowledge(self, message: _MessageT) -> None:
        """Write into a message how many messages have been received."""
        message.received = self._acknowledged = self.received

    def take(self, message: pb.WorkerMessage | pb.ServerMessage) -> bool:
        """Note that a message was received.

        Returns:
            Whether the message is new. One that was received before must be ignored.

        Raises:
            ValueError: If its number leaves a gap, or it acknowledges messages never sent.
        """
        self.arrived(message.received)
        if not message.number:
            return True
        if message.number <= self.received:
            return False
        if message.number != self.received + 1:
            raise ValueError(f"message {message.number} behind message {self.received}")
        self.received += 1
        return True

    def arrived(self, count: int) -> None:
        """Note that the other end has received ``count`` messages, which are dropped here.

        Raises:
            ValueError: If fewer were sent.
        """
        if count > self._sent:
            raise ValueError(f"{count} messages are said to have arrived, of {self._sent}")
        kept = self._kept
        while kept and kept[0][0].number <= count:
            self._kept_bytes -= kept.popleft()[1]

    def missing(self) -> list[_MessageT]:
        """Return the unacknowledged messages, in order, which the next connection sends first."""
        return [message for message, _ in self._kept]
