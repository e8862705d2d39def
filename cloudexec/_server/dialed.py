"""Whether what workers dial is this machine, so that nobody else can refuse in its place."""

from __future__ import annotations

import socket

__all__ = ["Dialed"]


class Dialed:
    """What workers dial. Made in a thread: a name is looked up.

    Args:
        target: ``host:port``.
    """

    def __init__(self, target: str) -> None:
        host = target.rpartition(":")[0].strip("[]")
        self._is_own = False
        self._found: list[tuple[int, tuple[object, ...]]] = []
        try:
            looked_up = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        except OSError:
            return
        self._found = [(family, address) for family, *_, address in looked_up]

    @property
    def is_own(self) -> bool:
        """Whether all of it are addresses that this machine has.

        Looked at when a worker comes: the address of a bridge to containers is there only once one
        of them runs.
        """
        if not self._is_own and self._found:
            self._is_own = all(_has(*each) for each in self._found)
        return self._is_own


def _has(family: int, address: tuple[object, ...]) -> bool:
    try:
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.bind(address)  # which works for addresses of this machine only
    except OSError:
        return False
    return True
