"""Who is in the middle of enrolment: how many at once, and who has to go when there are more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

__all__ = ["Gate", "Guest"]

_HEADSTART = 1.0
"""Seconds in which a peer is not made to give way to another one from the same address: an honest
worker is through in a few milliseconds, and a crowd of them does not push each other out."""


_READ_AT_ONCE = 4
"""Peers whose message is being read at once: gRPC takes up to 8 MiB of it before anybody can see
how large it is. What the others send stays within their windows, of 64 KiB each."""
_TURN = 1.0
"""Seconds that this may take while others wait for their turn."""


class Guest:
    """One peer that has not proved yet who it is."""

    __slots__ = ("address", "came_at", "evicted", "timeout", "turn_at")

    def __init__(self, address: str, came_at: float) -> None:
        self.address = address
        self.came_at = came_at
        self.evicted = False
        self.turn_at = came_at
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
        self._read: dict[Guest, None] = {}  # in the order in which their turn came
        self._waiting: dict[Guest, asyncio.Future[None]] = {}  # in the order in which they came
        self._hurry: asyncio.TimerHandle | None = None

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
        self._evict(oldest, now)
        return True

    def _evict(self, guest: Guest, now: float) -> None:
        self.leave(guest)
        guest.evicted = True
        if guest.timeout is not None:
            guest.timeout.reschedule(now)

    @contextlib.asynccontextmanager
    async def turn(self, guest: Guest) -> AsyncIterator[None]:
        """Wait until a message of a guest may be read; it is to be read while this is open."""
        loop = asyncio.get_running_loop()
        if not guest.address.startswith("ipv"):
            yield  # on a socket that only this user can reach
            return
        if len(self._read) >= _READ_AT_ONCE:
            waiting = self._waiting[guest] = loop.create_future()
            self._look(loop)
            try:
                await waiting
            except asyncio.CancelledError:
                if self._read.pop(guest, self) is None:  # it had just been given
                    self._next(loop)
                raise
            finally:
                self._waiting.pop(guest, None)
        guest.turn_at = loop.time()
        self._read[guest] = None
        try:
            yield
        finally:
            self._read.pop(guest, None)
            self._next(loop)

    def _next(self, loop: asyncio.AbstractEventLoop) -> None:
        """Give the turn to the one that came last, of an address that has the fewest inside.

        Honest peers are done at once, so that who has waited for long is not one of them.
        """
        if len(self._read) >= _READ_AT_ONCE:
            return
        waiting = [guest for guest, turn in self._waiting.items() if not turn.done()]
        if waiting:
            fewest = min(len(self._inside.get(guest.address, ())) for guest in waiting)
            guest = next(
                each
                for each in reversed(waiting)
                if len(self._inside.get(each.address, ())) == fewest
            )
            self._read[guest] = None
            guest.turn_at = loop.time()
            self._waiting[guest].set_result(None)

    def _look(self, loop: asyncio.AbstractEventLoop) -> None:
        """While others wait, end whoever has had his turn for long."""
        if self._hurry is not None:
            return
        now = loop.time()
        for guest in [each for each in self._read if now >= each.turn_at + _TURN]:
            self._evict(guest, now)
        if self._waiting and self._read:
            due = min(guest.turn_at for guest in self._read) + _TURN
            self._hurry = loop.call_at(max(due, now + 0.05), self._look_again, loop)

    def _look_again(self, loop: asyncio.AbstractEventLoop) -> None:
        self._hurry = None
        self._look(loop)

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
