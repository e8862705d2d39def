"""``python -m cloudexec.worker``: start one worker.

A worker that the local launcher has started reads whom to dial from two lines of JSON on its
standard input. That keeps the key out of the environment and the list of processes, and the first
worker can be started before there is anybody to dial. A worker in a container learns it from the
variables ``CLOUDEXEC_TARGET``, ``_EXECUTOR_ID``, ``_SLOTS``, ``_KEY``, ``_CERTIFICATE_SHA256``,
``_MEMORY_MIB``, and ``_IDENTITY`` or ``_LAUNCH``, the number of the first worker of those that were
launched together. To that, the worker adds its own number among them: see ``platform``. After
``_AWAITED_UNTIL``, in Unix time, the client does not wait for the worker any more. After
``_LIFETIME`` seconds the worker ends, whatever it does.

With ``CLOUDEXEC_RELAY_PORT`` this process is a relay, and no worker: see ``relay``. With
``CLOUDEXEC_RUN_AT`` it runs a program of ``cloudexec run``. In a function of AWS Lambda it runs a
worker for each invocation: see ``function``.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any, NoReturn

from cloudexec import _plain_json
from cloudexec._descriptors import BASE_FILES, FILES_PER_SLOT, file_limits, raise_file_limit
from cloudexec._runs.protocol import RUN_VARIABLE
from cloudexec.worker.client import Client
from cloudexec.worker.platform import API_VARIABLE, OWN_VARIABLES, ask_metadata, find_place
from cloudexec.worker.relay import PORT_VARIABLE, run_as_relay

__all__ = ["EXIT_NO_CLIENT", "EXIT_RECLAIMED", "EXIT_REFUSED", "main"]

EXIT_REFUSED = 3
"""Exit code where either side refused the other: to try again is no use."""
EXIT_NO_CLIENT = 4
"""Exit code if the client cannot be reached, or no longer. A user who sees it can stop the workers
that still wait for a place."""
EXIT_RECLAIMED = 128 + 15
"""Exit code after SIGTERM: a platform that wants its machine back is to start the worker again
elsewhere, which AWS Batch does only for a job that failed."""
_LATE_PATIENCE = 5.0
"""Seconds for which the client is dialed by a worker that started when nobody waited for it any
more: usually because the client was killed, and each second of such a worker is paid for."""
_SESSION_PATIENCE = 10.0
"""Seconds for which a worker on AWS Lambda dials the client. It starts within seconds, so the
client was there a moment ago, and another worker is started as quickly."""
_LAST_SECONDS = 10.0
"""Seconds in which a worker may hand its tasks back, after those in which they may finish."""
_DRAIN_GRACE = 20.0
"""Seconds after SIGTERM in which tasks may finish. AWS sends SIGKILL after 30 seconds, and handing
tasks back takes a moment."""


def main(bootstrap: dict[str, Any] | None = None) -> NoReturn:
    """Run one worker, and end this process with its exit code.

    Args:
        bootstrap: The first line of JSON, with what is needed to prepare; ``None`` to read the
            environment instead.
    """
    is_child = bootstrap is not None
    if not is_child and RUN_VARIABLE in os.environ:
        os.execv(sys.executable, [sys.executable, "-m", "cloudexec._runs.inside"])
    if not is_child and API_VARIABLE in os.environ:
        from cloudexec.worker.function import serve  # other workers need none of it

        serve(os.environ, main)
    if not is_child and PORT_VARIABLE in os.environ:
        _blank("CLOUDEXEC_KEY")
        sys.exit(run_as_relay(os.environ, os.environ.pop("CLOUDEXEC_KEY", "")))
    if bootstrap is None:
        bootstrap = _from_environment()
    # These were set for the start of this interpreter only; processes that tasks start must not
    # inherit them.
    for name in bootstrap.get("unset", ()):
        os.environ.pop(name, None)
    # The limit is raised for this process and the zygote only; tasks get the user's own limit.
    wanted = BASE_FILES + FILES_PER_SLOT * int(bootstrap["slots"])
    files = raise_file_limit(wanted)
    ours, zygotes = socket.socketpair()
    supervisor_pid = os.getpid()
    # Modules stay until the end: to look for garbage among them takes a tenth of the start.
    gc.disable()
    # Imported before the fork, as both processes need most of these modules.
    from cloudexec.worker import slot  # noqa: F401
    from cloudexec.worker.zygote import adopt_orphans, run_zygote

    # If the zygote is killed, processes that tasks left behind become children of this one.
    adopt_orphans()
    # Forked now, before gRPC is imported and starts threads.
    if os.fork() == 0:
        ours.close()
        gc.enable()
        run_zygote(zygotes, supervisor_pid, files, bootstrap)
    zygotes.close()
    if (lifetime := bootstrap.get("lifetime")) is not None:
        _end_after(lifetime, bootstrap.get("drain_grace") or _DRAIN_GRACE)
    # Without this, gRPC logs to stderr. It is set after the fork, so that tasks do not inherit it.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # This allows only a TLS 1.2 suite whose kind of key the client's certificate does not have. So
    # the worker's connection uses TLS 1.3 or fails.
    os.environ["GRPC_SSL_CIPHER_SUITES"] = "ECDHE-RSA-AES256-GCM-SHA384"

    asyncio = _import_asyncio()
    from cloudexec._errors import CloudexecError, ProtocolError
    from cloudexec.worker.dialing import (
        CONNECT_TIMEOUT,
        MOVING_TIMEOUT,
        Address,
        ClientGoneError,
    )
    from cloudexec.worker.running import run_worker

    gc.freeze()
    gc.enable()
    client = Client(bootstrap["client_pid"]) if is_child else None
    if client is not None:
        bootstrap |= _second_line(client)
    relay = bootstrap.get("relay", "")
    # Behind a space is where a relay that may move is to be read.
    patience = MOVING_TIMEOUT if " " in relay else CONNECT_TIMEOUT
    if bootstrap.get("session"):
        patience = CONNECT_TIMEOUT if " " in relay else _SESSION_PATIENCE
    address = Address(
        target=bootstrap["target"],
        executor_id=bootstrap["executor_id"],
        identity=bootstrap["identity"],
        key=bytes.fromhex(bootstrap["key"]),
        slots=_slots_with_files(int(bootstrap["slots"])),
        certificate_sha256=bootstrap.get("certificate_sha256", ""),
        relay=relay,
        job_id=bootstrap.get("job_id", ""),
        attempt=int(bootstrap.get("attempt") or 1),
        memory_mib=int(bootstrap.get("memory_mib") or 0),
        patience=_LATE_PATIENCE if bootstrap.get("late") else patience,
        drain_grace=bootstrap.get("drain_grace"),
        session=bootstrap.get("session") or 0.0,
        log=bootstrap.get("log", False),
        client=client,
    )
    try:
        code = EXIT_RECLAIMED if asyncio.run(run_worker(address, ours)) else 0
    except ProtocolError as exc:
        print(f"cloudexec worker: {exc}", file=sys.stderr)
        code = EXIT_REFUSED
    except CloudexecError as exc:
        print(f"cloudexec worker: {exc}", file=sys.stderr)
        code = 1
        if isinstance(exc, ClientGoneError):
            code = EXIT_NO_CLIENT
            if stop := bootstrap.get("stop"):
                print(
                    f"cloudexec worker: if that program has ended, `{stop}` ends those of its "
                    f"workers that still wait for a place",
                    file=sys.stderr,
                )
    sys.stdout.flush()
    sys.stderr.flush()
    # Ended at once: gRPC would wait two seconds for a TLS connection, and nothing is left to do.
    os._exit(code)


def _import_asyncio() -> Any:
    """Import asyncio without its TLS connections, of which this process has none.

    The module ``ssl``, which a worker on its client's machine does not need either, takes a sixth
    of the time of all its imports.
    """
    if "ssl" not in sys.modules and "asyncio" not in sys.modules:
        sys.modules["ssl"] = None  # type: ignore[assignment]
        try:
            import asyncio
        finally:
            del sys.modules["ssl"]
    import asyncio

    return asyncio


def _end_after(seconds: float, grace: float) -> None:
    """End this process after so many seconds, for platforms that have no time limit themselves.

    It is told to end as a platform tells it (SIGTERM). If it cannot listen, the kernel ends it some
    seconds later (SIGALRM), whatever hangs in it.

    Args:
        seconds: Until it is told.
        grace: Seconds after that in which tasks may finish.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds + grace + _LAST_SECONDS)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()


def _second_line(client: Client) -> dict[str, Any]:
    """Wait for the second line, with the client's address and this worker's identity.

    The process ends if the client is gone.
    """
    line = b""
    while not line.endswith(b"\n"):
        # Another child of the client may keep the pipe open, so check whether the client is gone.
        data = os.read(0, 65536) if select.select([0], [], [], 1.0)[0] else None
        if data == b"" or client.is_gone():
            os._exit(0)
        line += data or b""
    found: dict[str, Any] = _plain_json.decode(line)
    return found


def _slots_with_files(slots: int) -> int:
    """Return the number of slots for which this process may open files; end it if that is none."""
    limits = file_limits()
    if limits is None:
        return slots
    most = (limits[0] - BASE_FILES) // FILES_PER_SLOT
    if most < 1:
        print(
            f"cloudexec worker: this process may have {limits[0]} files open, and a worker needs "
            f"{BASE_FILES + FILES_PER_SLOT}: raise its limit (ulimit -n 4096)",
            file=sys.stderr,
        )
        raise SystemExit(EXIT_REFUSED)
    if most < slots:
        print(
            f"cloudexec worker: {most} slots instead of {slots}: this process may have "
            f"{limits[0]} files open; raise its limit (ulimit -n 4096)",
            file=sys.stderr,
        )
    return min(slots, most)


def _from_environment() -> dict[str, Any]:
    environ = os.environ
    who = "identity" if "CLOUDEXEC_IDENTITY" in environ else "launch"
    needed = ("target", "executor_id", who, "key", "slots")
    names = (*needed, "certificate_sha256", "memory_mib", "relay")
    # Removed from the environment: processes that tasks start must not inherit the key, and tasks
    # that print their environment must not show it.
    _blank("CLOUDEXEC_KEY")
    found: dict[str, Any] = {name: environ.pop(f"CLOUDEXEC_{name.upper()}", "") for name in names}
    missing = [f"CLOUDEXEC_{name.upper()}" for name in needed if not found[name]]
    if missing:
        raise SystemExit(
            f"cloudexec worker: not set: {', '.join(missing)}. This is the worker of a "
            f"cloudexec.BatchExecutor, which sets them when it starts one; alone it does nothing"
        )
    for name in {"slots", who} - {"identity"}:
        if not found[name].isdigit():
            raise SystemExit(f"cloudexec worker: CLOUDEXEC_{name.upper()} must be a whole number")
    try:
        place = find_place(environ)
    except ValueError as exc:
        raise SystemExit(f"cloudexec worker: {exc}") from exc
    for name in OWN_VARIABLES:
        environ.pop(name, None)
    if who == "launch":
        found["identity"] = str(int(found["launch"]) + place.launch_index)
    # A worker that its platform starts once more is expected whenever it comes.
    until = environ.pop("CLOUDEXEC_AWAITED_UNTIL", "")
    found["late"] = until.isdecimal() and place.attempt == 1 and time.time() > int(until)
    found["stop"] = place.stop and place.stop.format(executor=found["executor_id"])
    found["job_id"] = place.job_id or str(ask_metadata(place).get("TaskARN", ""))
    found["attempt"] = place.attempt
    found["unset"] = environ.pop("CLOUDEXEC_UNSET", "").split()
    found["log"] = True
    lifetime = environ.pop("CLOUDEXEC_LIFETIME", "")
    found["lifetime"] = float(lifetime) if lifetime.isdecimal() else None
    found["drain_grace"] = float(environ.pop("CLOUDEXEC_DRAIN_GRACE", _DRAIN_GRACE))
    found["session"] = float(environ.pop("CLOUDEXEC_SESSION", 0.0))
    return found


def _blank(name: str) -> None:
    """Overwrite a variable in the memory that ``/proc`` shows as this process's environment."""
    value = os.environ.get(name)
    if value is None:
        return
    import ctypes

    getenv = ctypes.CDLL(None).getenv
    getenv.restype = ctypes.c_void_p
    where = getenv(name.encode())
    if where:
        ctypes.memset(where, ord("-"), len(os.fsencode(value)))


if __name__ == "__main__":
    main()
