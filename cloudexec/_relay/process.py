"""Start and watch the process at the client's end of a relay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from cloudexec._relay.handshake import relay_key

__all__ = ["TunnelProcess"]

_BOOT = (
    "import sys; sys.path.insert(0, sys.argv[1]); from cloudexec._relay.tunnel import main; main()"
)
_END_TIMEOUT = 2.0
"""Seconds in which the process ends by itself once it is told to."""
_PAUSE = 0.5
"""Seconds before a process that has ended is followed by another."""


class TunnelProcess:
    """The process that joins workers which dial a relay with this process's server.

    It is used in one event loop.

    Args:
        relay: ``host:port`` of the relay.
        key: What client and workers share.
        executor_id: Which executor.
        target: ``host:port`` where the executor listens.
        on_change: Is called with ``registered`` or ``lost``, and with why.

    Raises:
        OSError: If the process cannot be started.
    """

    def __init__(
        self,
        relay: str,
        key: bytes,
        executor_id: str,
        target: str,
        on_change: Callable[[str, str], None],
    ) -> None:
        host, _, port = relay.rpartition(":")
        target_host, _, target_port = target.rpartition(":")
        route = {
            "host": host.strip("[]"),
            "port": int(port),
            "key": relay_key(key).hex(),
            "executor_id": executor_id,
            "target_host": target_host.strip("[]"),
            "target_port": int(target_port),
        }
        self._on_change = on_change
        self._rest = b""
        self._loop = asyncio.get_running_loop()
        self._registered: asyncio.Future[None] = self._loop.create_future()
        self.why = "no answer"
        """Why it is not registered, if it is not."""
        self._route = json.dumps(route).encode() + b"\n"
        self._is_closed = False
        self._start()

    def _start(self) -> None:
        root = str(Path(__file__).parents[2])
        self._popen = subprocess.Popen(
            [sys.executable, "-c", _BOOT, root],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            # Ctrl-C in the terminal is the client's to handle.
            start_new_session=True,
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._output = self._popen.stdout
        with contextlib.suppress(OSError):  # it is dead already, and its end says so
            self._popen.stdin.write(self._route)
        os.set_blocking(self._output.fileno(), False)
        self._loop.add_reader(self._output.fileno(), self._read)

    async def registered(self, patience: float) -> bool:
        """Wait until the relay knows the executor.

        Args:
            patience: Seconds to wait at most.

        Returns:
            Whether it does; ``why`` says why not.
        """
        await asyncio.wait({self._registered}, timeout=patience)
        return self._registered.done()

    def _read(self) -> None:
        try:
            data = os.read(self._output.fileno(), 65536)
        except BlockingIOError:
            return
        if not data:
            self._ended()
            return
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            said = json.loads(line)
            self._changed(said["state"], said["why"])

    def _ended(self) -> None:
        """Start another process: this one was killed."""
        self._close_pipes()
        self._popen.kill()
        self._changed("lost", f"its process ended with exit code {self._popen.wait()}")
        self._loop.call_later(_PAUSE, self._start_again)

    def _start_again(self) -> None:
        if self._is_closed:
            return
        try:
            self._start()
        except OSError as exc:
            self._changed("lost", f"its process cannot be started: {exc}")
            self._loop.call_later(_PAUSE, self._start_again)

    def _close_pipes(self) -> None:
        self._loop.remove_reader(self._output.fileno())
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._output.close()

    def _changed(self, state: str, why: str) -> None:
        self.why = why
        if state == "registered" and not self._registered.done():
            self._registered.set_result(None)
        self._on_change(state, why)

    def close(self) -> None:
        """Have the process end. Connections of workers end with it."""
        self._is_closed = True
        self._registered.cancel()
        if not self._output.closed:
            self._close_pipes()

    def join(self) -> None:
        """Wait until the process has ended, after ``close``; kill it if it takes too long."""
        try:
            self._popen.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()
