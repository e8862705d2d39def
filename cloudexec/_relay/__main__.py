"""``python -m cloudexec._relay``: runs a relay on a machine where only a worker is installed."""

from __future__ import annotations

import argparse
import os
import sys

from cloudexec._relay.program import DEFAULT_IDLE, DEFAULT_LISTEN, run_relay

_KEY_VARIABLE = "CLOUDEXEC_KEY"


def main() -> int:
    """Read the options and the key, and run the relay."""
    parser = argparse.ArgumentParser(
        prog="python -m cloudexec._relay",
        description="Join workers with clients that accept no connections. The key that both share "
        f"is read from {_KEY_VARIABLE}, as hexadecimal digits.",
    )
    parser.add_argument(
        "--listen", default=DEFAULT_LISTEN, help="host:port; port 0 means any free port"
    )
    parser.add_argument(
        "--idle",
        type=float,
        default=DEFAULT_IDLE,
        help="seconds without a client or worker after which the relay ends",
    )
    options = parser.parse_args()
    try:
        key = bytes.fromhex(os.environ.get(_KEY_VARIABLE, ""))
    except ValueError:
        key = b""
    if not key:
        parser.error(f"{_KEY_VARIABLE} must be set to hexadecimal digits")
    return run_relay(options.listen, key, options.idle)


if __name__ == "__main__":
    sys.exit(main())
