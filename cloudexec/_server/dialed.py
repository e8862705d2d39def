"""Whether workers dial this machine itself, so that nothing else can refuse in its place."""

from __future__ import annotations

import ipaddress
import socket

__all__ = ["Dialed"]


class Dialed:
    """What workers dial.

    Args:
        target: ``host:port`` that workers dial.
        address: ``host:port`` that this process listens on.
    """

    def __init__(self, target: str, address: str) -> None:
        host, _, port = target.rpartition(":")
        listened, _, own_port = address.rpartition(":")
        self._is_own = False
        self._host = ""
        try:
            dialed = ipaddress.ip_address(host.strip("[]"))
            here = ipaddress.ip_address(listened.strip("[]"))
        except ValueError:
            return  # a name may lead workers to another machine
        # If all addresses are listened on, no other process can have the port. The loopback
        # address is that of a tunnel where workers on other machines dial it.
        if port == own_port and (
            dialed == here or (here.is_unspecified and not dialed.is_loopback)
        ):
            self._host = str(dialed)

    @property
    def is_own(self) -> bool:
        """Whether this machine has the address.

        The check is made when a worker connects, because a bridge to containers has its address
        only once one of them runs.
        """
        if not self._is_own and self._host:
            self._is_own = _has(self._host) and not _binds_any_address()
        return self._is_own


def _has(host: str) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as tried:
            tried.bind((host, 0))  # this succeeds for addresses of this machine only
    except OSError:
        return False
    return True


def _binds_any_address() -> bool:
    """Whether the system lets programs bind addresses of other machines, too (Linux, ip(7))."""
    try:
        with open("/proc/sys/net/ipv4/ip_nonlocal_bind") as file:
            return file.read().strip() == "1"
    except OSError:
        return False
