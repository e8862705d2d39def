"""The relay as a program: it listens, serves, and ends when it is unused or receives a signal."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys

from cloudexec._relay.handshake import relay_key
from cloudexec._relay.server import Relay

__all__ = ["DEFAULT_IDLE", "DEFAULT_LISTEN", "run_relay"]

DEFAULT_LISTEN = "0.0.0.0:443"
DEFAULT_IDLE = 600.0


def run_relay(listen: str, key: bytes, idle: float | None, *, user: int | None = None) -> int:
    """Run a relay.

    Args:
        listen: ``host:port``; port 0 means any free port. The address is printed.
        key: The key that clients and workers share.
        idle: Seconds without a client or worker after which it ends; ``None`` for no limit.
        user: Number of the user and the group that root becomes once the port is open.

    Returns:
        The exit code: 1 if it cannot listen at the address.
    """
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, int(port)), family=family, backlog=4096)
    except (OSError, ValueError, OverflowError) as exc:
        print(f"cloudexec relay: cannot listen on {listen}: {exc}", file=sys.stderr)
        return 1
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    address, number = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    print(f"cloudexec relay: listening on {shown}:{number}", flush=True)
    asyncio.run(_serve(listening, relay_key(key), idle))
    return 0


async def _serve(listening: socket.socket, key: bytes, idle: float | None) -> None:
    serving = asyncio.ensure_future(Relay(key, idle=idle, log=True).serve(listening))
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, serving.cancel)
    try:
        await serving
    except asyncio.CancelledError:
        print("cloudexec relay: told to end", file=sys.stderr, flush=True)
