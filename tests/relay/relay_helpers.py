"""A relay in a separate process, and real workers that reach their client through it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cloudexec
from cloudexec._launchers.base import Contact, LaunchEnd, LaunchRequest, Network
from cloudexec.testing import ManualLauncher

KEY = bytes(range(32))
PACKAGE = str(Path(cloudexec.__file__).parents[1])


class RelayProcess:
    """A relay on this machine.

    Args:
        listen: ``host:port``.
        idle: Seconds without clients and workers after which the relay ends.
        prefix: Words before the command, such as ``ip netns exec``.
    """

    def __init__(
        self,
        listen: str = "127.0.0.1:0",
        *,
        idle: float = 60.0,
        prefix: Sequence[str] = (),
        key: bytes = KEY,
    ) -> None:
        self._prefix, self._idle, self._key = list(prefix), idle, key
        self._start(listen)

    def _start(self, listen: str) -> None:
        command = [sys.executable, "-m", "cloudexec._relay", "--listen", listen]
        self.process = subprocess.Popen(
            [*self._prefix, *command, "--idle", str(self._idle)],
            env={**os.environ, "PYTHONPATH": PACKAGE, "CLOUDEXEC_KEY": self._key.hex()},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        found = re.search(r"listening on (\S+)", self.process.stdout.readline())
        assert found is not None
        self.address = found[1]

    def kill(self) -> None:
        """Kill the relay, as if its machine had failed."""
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def restart(self) -> None:
        """Kill the relay, and start another one at the same address."""
        self.kill()
        self._start(self.address)


class RelayLauncher(ManualLauncher):
    """Starts real workers that connect to a relay.

    Args:
        relay: ``host:port``.
        prefix: Words before each worker's command.
        slots_per_worker: Tasks that each worker runs at once.
        key: The key that client and workers share.
        advertise: Host to which workers connect instead of the relay's.
        environment: Additional environment variables of the workers.
    """

    def __init__(
        self,
        relay: str,
        *,
        prefix: Sequence[str] = (),
        slots_per_worker: int = 1,
        key: bytes = KEY,
        advertise: str = "",
        environment: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(needs_network=True, slots_per_worker=slots_per_worker)
        self.relay = relay
        self.workers: dict[str, subprocess.Popen[bytes]] = {}
        self._prefix, self._key, self._advertise = list(prefix), key, advertise
        self._environment = dict(environment or {})

    async def start(self, *_: Any) -> Network:
        """Return the network settings that make the client register with the relay."""
        return Network("127.0.0.1:0", self._advertise, self._key, self.relay)

    def launch(
        self,
        contact: Contact,
        requests: Sequence[LaunchRequest],
        on_end: Callable[[str, LaunchEnd], None],
    ) -> None:
        """Start a worker for each request."""
        super().launch(contact, requests, on_end)
        for request in requests:
            self.workers[request.launch_id] = subprocess.Popen(
                [*self._prefix, sys.executable, "-m", "cloudexec.worker"],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join([PACKAGE, *sys.path]),
                    "CLOUDEXEC_TARGET": contact.target,
                    "CLOUDEXEC_RELAY": contact.relay,
                    "CLOUDEXEC_EXECUTOR_ID": contact.executor_id,
                    "CLOUDEXEC_IDENTITY": request.launch_id,
                    "CLOUDEXEC_KEY": contact.key.hex(),
                    "CLOUDEXEC_SLOTS": str(request.slots),
                    "CLOUDEXEC_CERTIFICATE_SHA256": contact.certificate_sha256,
                    **self._environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def close_workers(self) -> None:
        """End all workers that still run."""
        for worker in self.workers.values():
            worker.kill()
            worker.wait()
