"""A relay in the place of a worker: the same image, told so by its environment."""

from __future__ import annotations

import os
from collections.abc import Mapping

from cloudexec.worker.platform import ask_metadata, find_place

__all__ = ["PORT_VARIABLE", "run_as_relay"]

PORT_VARIABLE = "CLOUDEXEC_RELAY_PORT"
"""If it is set, there is to be a relay: an image's entry point starts workers, and nothing else."""
_USER = 10001
"""Who the relay is once it has its port, which may be one of those for root alone."""


def run_as_relay(environ: Mapping[str, str], key: str) -> int:
    """Run a relay until nobody needs it any more.

    Args:
        environ: With the port, and after how many seconds without anybody it ends.
        key: What clients and workers share, in hexadecimal digits.

    Returns:
        The exit code.
    """
    from cloudexec._relay.program import DEFAULT_IDLE, run_relay

    try:
        secret = bytes.fromhex(key)
        idle = float(environ.get("CLOUDEXEC_RELAY_IDLE", DEFAULT_IDLE))
    except ValueError:
        secret = b""
    if not secret:
        raise SystemExit(
            f"cloudexec relay: {PORT_VARIABLE} is set, and CLOUDEXEC_KEY is no key, or "
            f"CLOUDEXEC_RELAY_IDLE no number"
        )
    host = _own_address(environ) or "0.0.0.0"
    user = _USER if os.geteuid() == 0 else None
    return run_relay(f"{host}:{environ[PORT_VARIABLE]}", secret, idle, user=user)


def _own_address(environ: Mapping[str, str]) -> str:
    """Return the address of this task's network interface; empty: the platform does not say.

    References:
        Amazon ECS Developer Guide, "Task metadata endpoint version 4".
    """
    for container in ask_metadata(find_place(environ)).get("Containers", ()):
        for network in container.get("Networks", ()):
            for address in network.get("IPv4Addresses", ()):
                return str(address)
    return ""
