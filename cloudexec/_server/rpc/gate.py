"""Limits how many peers may be enrolling at once, and decides which of them must give way."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

__all__ = ["Gate", "Guest"]

_HEADSTART = 1.0
"""Seconds for which a peer need not give way to another one of the same address. An honest worker
enrols in a few milliseconds, so honest workers of one address do not push each other out."""


_READ_AT_ONCE = 4
"""Number of peers whose message is read at once. gRPC receives up to 8 MiB of a message before its
size can be seen. The others can send no more than their windows, of 64 KiB each."""
_TURN = 1.0
"""Seconds that reading a message may take while other peers wait for their turn."""


class Guest:
    """One peer that has not proved yet who it is."""

    __slots__ = ("address", "came_at", "evicted", "timeout", "turn_at")

    def __init__(self, address: str, came_at: float) -> None:
        self.address = address
        self.came_at = came_at
        self.evicted = False
        self.turn_at = came_at
        self.timeout: asyncio.Timeout | None = None
        """The time limit of its enrolment, which ``Gate`` shortens to make room."""


class Gate:
    """Lets in a limited number of peers at once. Used on the loop thread only.

    When it is full, the oldest peer of the address that has the most peers must give way. So a
    machine that opens many connections and sends nothing pushes out its own connections only. A
    newcomer of that same address can replace the oldest peer only if that has had some time.

    Args:
        most: Number of peers that may be inside at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        # By address: the peers inside, in the order in which they came.
        self._inside: dict[str, dict[Guest, None]] = {}
        self._count = 0
        self._read: dict[Guest, None] = {}  # whose messages are read, in the order of their turns
        self._waiting: dict[Guest, asyncio.Future[None]] = {}  # in the order in which they came
        self._hurry: asyncio.TimerHandle | None = None

    def enter(self, peer: str) -> Guest | None:
        """Let a peer in; ``None`` if there is no room, so that it must try again later.

        Args:
            peer: The peer's address as gRPC gives it, such as ``ipv4:192.0.2.1:40000``.
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
        """Wait until a guest's message may be read, which the caller does within this context."""
        loop = asyncio.get_running_loop()
        if not guest.address.startswith("ipv"):
            yield  # only this user can reach the Unix socket, so no limit is needed
            return
        if len(self._read) >= _READ_AT_ONCE:
            waiting = self._waiting[guest] = loop.create_future()
            self._look(loop)
            try:
                await waiting
            except asyncio.CancelledError:
                if self._read.pop(guest, self) is None:  # the guest had just been given its turn
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
        """Give the turn to the newest waiting guest of an address that has the fewest guests.

        Honest guests need their turn for a moment only, so a guest that has waited for long is
        probably not honest.
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
        """Evict guests whose turn has lasted too long while others wait."""
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
        """Note that a peer has enrolled, or is gone."""
        inside = self._inside.get(guest.address)
        if inside is not None and guest in inside:
            del inside[guest]
            self._count -= 1
            if not inside:
                del self._inside[guest.address]


def _address(peer: str) -> str:
    """Return a peer's address without its port."""
    return peer.rpartition(":")[0] if peer.startswith("ipv") else peer.partition(":")[0]
