"""Looks at the relay that is named, and at the proxy on the way to it."""

from __future__ import annotations

import ipaddress

from cloudexec._errors import ConfigError
from cloudexec._relay.process import check_relay
from cloudexec._relay.proxies import ProxyError, named_proxy

__all__ = ["by_proxy", "look_at_relay"]


def look_at_relay(relay: str, source: str) -> tuple[str, str]:
    """Return what was found of the address of a relay, and what to do; empty: nothing.

    Args:
        relay: The address.
        source: What names it.
    """
    try:
        check_relay(relay)
    except ConfigError as exc:
        return f"no executor can start: {exc}, which {source} has", f"correct {source}"
    found = f"workers connect through the relay {relay}: from {source}"
    host = relay.rpartition(":")[0].strip("[]")
    if _is_of_each_machine(host):
        return (
            f"{found}; but {host} is an address that each machine has for itself",
            f"name an address in {source} at which workers reach the relay, too",
        )
    return by_proxy(found, relay)


def _is_of_each_machine(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower().rstrip(".") == "localhost"
    return address.is_loopback or address.is_unspecified


def by_proxy(found: str, relay: str = "192.0.2.1:443") -> tuple[str, str]:
    """Add through which proxy this side connects to a relay, and what to do if it cannot.

    Args:
        found: What was found of the relay.
        relay: Its address; by default any.
    """
    if relay.startswith("ssh://"):
        return found, ""  # OpenSSH has settings of its own
    try:
        proxy = named_proxy(relay.rpartition(":")[0].strip("[]"))
    except ProxyError as exc:
        remedy = "correct that variable, or install what it needs"
        return f"{found}; but this side cannot connect to it: {exc}", remedy
    return (f"{found}; this side connects to it by the proxy {proxy}" if proxy else found), ""
