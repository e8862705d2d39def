"""Who is in the middle of enrolment: how many at once, and who has to go when there are more."""

from __future__ import annotations

import asyncio

__all__ = ["Gate", "Guest"]

_HEADSTART = 1.0
"""Seconds in which a peer is not made to give way to another one from the same address: an honest
worker is through in a few milliseconds, and a crowd of them does not push each other out."""


class Guest:
    """One peer that has not proved yet who it is."""

    __slots__ = ("address", "came_at", "evicted", "timeout")

    def __init__(self, address: str, came_at: float) -> None:
        self.address = address
        self.came_at = came_at
        self.evicted = False
        self.timeout: asyncio.Timeout | None = None
        """What ends its enrolment."""


class Gate:
    """Lets in so many peers at once. On the loop thread.

    When it is full, somebody of the address that has the most peers inside gives way, the one that
    came first: whoever opens connections and says nothing pushes out its own, and nobody else. To
    a newcomer of that same address it gives way only after a moment.

    Args:
        most: Peers inside at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._inside: dict[str, dict[Guest, None]] = {}  # by address, in the order they came
        self._count = 0

    def enter(self, peer: str) -> Guest | None:
        """Let a peer in; ``None``: it is to come again later.

        Args:
            peer: What gRPC calls it, such as ``ipv4:192.0.2.1:40000``.
        """
        loop = asyncio.get_running_loop()
        address, now = _address(peer), loop.time()
        if self._count >= self._most and not self._make_room(address, now):
            return None
        guest = Guest(address, now)
        self._inside.setdefault(address, {})[guest] = None
        self._count += 1
        return guest

    def _make_room(self, address: str, now: float) -> bool:
        crowd = max(self._inside, key=lambda each: len(self._inside[each]))
        oldest = next(iter(self._inside[crowd]))
        own = len(self._inside.get(address, ()))
        if own + 1 >= len(self._inside[crowd]) and now - oldest.came_at < _HEADSTART:
            return False
        self.leave(oldest)
        oldest.evicted = True
        if oldest.timeout is not None:
            oldest.timeout.reschedule(now)
        return True

    def leave(self, guest: Guest) -> None:
        """A peer is through, or gone."""
        inside = self._inside.get(guest.address)
        if inside is not None and guest in inside:
            del inside[guest]
            self._count -= 1
            if not inside:
                del self._inside[guest.address]


def _address(peer: str) -> str:
    """Return the machine that a peer is on, as far as one can tell; without its port."""
    return peer.rpartition(":")[0] if peer.startswith("ipv") else peer.partition(":")[0]
