"""``python -m cloudexec._relay``: a relay where nothing but a worker's environment is installed."""

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
        description="Join workers with clients that nothing can dial. The key that both share is "
        f"read from {_KEY_VARIABLE}, as hexadecimal digits.",
    )
    parser.add_argument("--listen", default=DEFAULT_LISTEN, help="host:port; port 0: any free one")
    parser.add_argument(
        "--idle",
        type=float,
        default=DEFAULT_IDLE,
        help="seconds without peers after which it ends",
    )
    options = parser.parse_args()
    try:
        key = bytes.fromhex(os.environ.get(_KEY_VARIABLE, ""))
    except ValueError:
        key = b""
    if not key:
        parser.error(f"{_KEY_VARIABLE} must be hexadecimal digits, and is not set to such")
    return run_relay(options.listen, key, options.idle)


if __name__ == "__main__":
    sys.exit(main())
