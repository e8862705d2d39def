"""Thousands of simulated workers, in processes of their own."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from typing import Any

from cloudexec.testing import ManualLaunch

__all__ = ["Crowd", "allow_files"]

_PER_PROCESS = 2_500
"""Simulated workers that share one process."""


def allow_files(workers: int) -> None:
    """Raise this process's limit on open files; those that it starts inherit it.

    Raises:
        RuntimeError: If the limit cannot be raised far enough.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < workers + 1_000:
        raise RuntimeError(f"{workers} connections need more files than the limit of {hard}")


class Crowd:
    """Simulated workers.

    Args:
        launches: The executor's requests for workers; each is for one worker.
    """

    def __init__(self, launches: list[ManualLaunch]) -> None:
        self._simulators = []
        for first in range(0, len(launches), _PER_PROCESS):
            some = launches[first : first + _PER_PROCESS]
            contact = some[0].contact
            simulator = subprocess.Popen(
                [sys.executable, os.path.join(os.path.dirname(__file__), "_simulator.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "GRPC_VERBOSITY": "NONE"},
            )
            self._simulators.append(simulator)
            request = {
                "target": contact.target,
                "executor_id": contact.executor_id,
                "key": contact.key.hex(),
                "sha256": contact.certificate_sha256,
                "identities": [launch.launch_id for launch in some],
            }
            self._tell(simulator, request)

    def wait(self) -> list[dict[str, Any]]:
        """Wait for one answer of each process, and return them."""
        return [self._heard(simulator) for simulator in self._simulators]

    def tell_all(self, **request: object) -> None:
        for simulator in self._simulators:
            self._tell(simulator, request)

    def ask_one(self, **request: object) -> dict[str, Any]:
        """Send a request to the first process, and return its answer."""
        self._tell(self._simulators[0], request)
        return self._heard(self._simulators[0])

    def end(self) -> list[dict[str, Any]]:
        """Wait until the executor has ended all workers; return the answer of each process."""
        self.tell_all(do="end")
        said = self.wait()
        for simulator in self._simulators:
            assert simulator.stdin is not None
            assert simulator.stdout is not None
            simulator.stdin.close()
            simulator.wait()
            simulator.stdout.close()
        return said

    def _tell(self, simulator: subprocess.Popen[str], request: dict[str, object]) -> None:
        assert simulator.stdin is not None
        simulator.stdin.write(json.dumps(request) + "\n")
        simulator.stdin.flush()

    def _heard(self, simulator: subprocess.Popen[str]) -> dict[str, Any]:
        assert simulator.stdout is not None
        line = simulator.stdout.readline()
        if not line:
            raise RuntimeError(f"the simulated workers ended with exit code {simulator.wait()}")
        said: dict[str, Any] = json.loads(line)
        return said
