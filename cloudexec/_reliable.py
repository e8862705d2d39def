"""A session's messages over more than one connection: numbered, and kept until they arrived.

A stream delivers in order and without gaps until it is cut; then neither side knows what the other
has. So each message that must arrive has a number, each side says how many of the other's have
come, and what is missing is sent again over the next connection. Nothing is lost, nothing doubled.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

from cloudexec._proto import tasks_pb2 as pb

__all__ = ["ACKNOWLEDGE_AFTER", "Reliable", "longest_pause"]

_MessageT = TypeVar("_MessageT", pb.WorkerMessage, pb.ServerMessage)

ACKNOWLEDGE_AFTER = 0.1
"""Seconds after which it is said what has come, if there is nothing else to say."""
_ACKNOWLEDGE_AT = 32
"""Messages after which they are acknowledged though there is nothing else to say."""
_MOST_KEPT = 65_536
"""Messages that may be on their way; a peer that takes them has acknowledged long before."""
_MOST_KEPT_BYTES = 256 * 1024 * 1024
_LONGEST_PAUSE = 4.0
_PART_OF_PATIENCE = 20
"""Who has minutes to go on dials less often in the end: ten thousand workers that dial again
every few seconds would keep their client, once it is there, too busy to let them in."""
_MOST_PAUSE = 15.0


def longest_pause(patience: float) -> float:
    """Say how long a worker waits, at most and on average, between two tries to reach its client.

    Args:
        patience: Seconds for which it tries.
    """
    return min(max(_LONGEST_PAUSE, patience / _PART_OF_PATIENCE), _MOST_PAUSE)


class Reliable(Generic[_MessageT]):
    """One side of a session: what it sent that may not have arrived, and what has come."""

    def __init__(self) -> None:
        self.received = 0
        """Messages of the other side that have come."""
        self._acknowledged = 0  # of these, how many the other side knows of
        self._sent = 0
        self._kept: deque[tuple[_MessageT, int]] = deque()  # with their bytes
        self._kept_bytes = 0

    @property
    def is_clear(self) -> bool:
        """Whether all that was sent has arrived."""
        return not self._kept

    @property
    def has_begun(self) -> bool:
        """Whether the first message has arrived."""
        return bool(self._sent) and (not self._kept or self._kept[0][0].number > 1)

    @property
    def owes(self) -> bool:
        """Whether messages have come that the other side does not know to have arrived."""
        return self.received > self._acknowledged

    @property
    def is_urgent(self) -> bool:
        """Whether it is time to say so."""
        return self.received - self._acknowledged >= _ACKNOWLEDGE_AT

    def stamp(self, message: _MessageT) -> None:
        """Number a message that is about to be sent, and keep it.

        Raises:
            ValueError: If the other side acknowledges nothing.
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
        """Say in a message what has come."""
        message.received = self._acknowledged = self.received

    def take(self, message: pb.WorkerMessage | pb.ServerMessage) -> bool:
        """Note a message that came; say whether it is to be read: it may have come before.

        Raises:
            ValueError: If it says what cannot be.
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
        """The other side has that many of our messages; those need not be kept.

        Raises:
            ValueError: If there are not that many.
        """
        if count > self._sent:
            raise ValueError(f"{count} messages are said to have arrived, of {self._sent}")
        kept = self._kept
        while kept and kept[0][0].number <= count:
            self._kept_bytes -= kept.popleft()[1]

    def missing(self) -> list[_MessageT]:
        """Return what is to be sent again, in order."""
        return [message for message, _ in self._kept]
