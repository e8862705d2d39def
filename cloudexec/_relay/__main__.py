"""The relay as a program: ``python -m cloudexec._relay --listen 0.0.0.0:443``."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import socket
import sys

from cloudexec._relay.handshake import relay_key
from cloudexec._relay.server import Relay

KEY_VARIABLE = "CLOUDEXEC_KEY"


def main() -> int:
    """Run until nobody needs the relay any more, or it is told to end."""
    parser = argparse.ArgumentParser(
        prog="python -m cloudexec._relay",
        description="Join workers with clients that nothing can dial. The key that both share is "
        f"read from {KEY_VARIABLE}.",
    )
    parser.add_argument("--listen", default="0.0.0.0:443", help="host:port; port 0: any free one")
    parser.add_argument(
        "--idle", type=float, default=600.0, help="seconds without peers after which it ends"
    )
    options = parser.parse_args()
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        parser.error(f"{KEY_VARIABLE} is not set")
    host, _, port = options.listen.rpartition(":")
    host = host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, int(port)), family=family, backlog=4096)
    except (OSError, ValueError, OverflowError) as exc:
        print(f"cloudexec relay: cannot listen on {options.listen}: {exc}", file=sys.stderr)
        return 1
    address, number = listening.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    print(f"cloudexec relay: listening on {shown}:{number}", flush=True)
    asyncio.run(_serve(listening, relay_key(bytes.fromhex(key)), options.idle))
    return 0


async def _serve(listening: socket.socket, key: bytes, idle: float) -> None:
    serving = asyncio.ensure_future(Relay(key, idle=idle, log=True).serve(listening))
    loop = asyncio.get_running_loop()
    for each in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(each, serving.cancel)
    try:
        await serving
    except asyncio.CancelledError:
        print("cloudexec relay: told to end", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
