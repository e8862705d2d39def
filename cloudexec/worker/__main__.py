"""``python -m cloudexec.worker``: start one worker.

It learns whom to dial from one line of JSON on its standard input (the local launcher, which so
keeps the key out of environment and process list), or from the environment (containers).
"""

from __future__ import annotations

import json
import os
import socket
import sys
from typing import Any

__all__ = ["EXIT_REFUSED", "main"]

EXIT_REFUSED = 3
"""Exit code where either side refused the other: to try again is no use."""


def main(bootstrap: dict[str, Any] | None = None) -> int:
    """Run one worker; return its exit code.

    Args:
        bootstrap: Where the client is and who this worker is; ``None``: read the environment.
    """
    if bootstrap is None:
        bootstrap = _from_environment()
    ours, zygotes = socket.socketpair()
    supervisor_pid = os.getpid()
    # Forked now, before gRPC is imported and starts threads.
    if os.fork() == 0:
        ours.close()
        from cloudexec.worker.zygote import run_zygote

        run_zygote(zygotes, supervisor_pid)
    zygotes.close()
    # gRPC writes its own log to stderr otherwise. Set after the fork: tasks see the user's own.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")

    import asyncio

    from cloudexec._errors import CloudexecError, ProtocolError
    from cloudexec.worker.session import Address, run_worker

    address = Address(
        target=bootstrap["target"],
        executor_id=bootstrap["executor_id"],
        identity=bootstrap["identity"],
        key=bytes.fromhex(bootstrap["key"]),
        slots=int(bootstrap["slots"]),
        certificate_sha256=bootstrap.get("certificate_sha256", ""),
    )
    try:
        asyncio.run(run_worker(address, ours))
    except ProtocolError as exc:
        print(f"cloudexec worker: {exc}", file=sys.stderr)
        return EXIT_REFUSED
    except CloudexecError as exc:
        print(f"cloudexec worker: {exc}", file=sys.stderr)
        return 1
    return 0


def _from_environment() -> dict[str, Any]:
    names = ("target", "executor_id", "identity", "key", "slots", "certificate_sha256")
    found = {name: os.environ.get(f"CLOUDEXEC_{name.upper()}", "") for name in names}
    missing = [f"CLOUDEXEC_{name.upper()}" for name in names[:5] if not found[name]]
    if missing:
        raise SystemExit(f"cloudexec worker: not set: {', '.join(missing)}")
    return found


def main_from_stdin() -> int:
    """Run one worker that the local launcher started."""
    return main(json.loads(sys.stdin.buffer.readline()))


if __name__ == "__main__":
    sys.exit(main())
