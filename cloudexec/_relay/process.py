"""Start and watch the process at the client's end of a relay: our own, or OpenSSH's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.parse
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from cloudexec._errors import ConfigError
from cloudexec._relay.handshake import relay_key
from cloudexec._relay.joining import dial

__all__ = ["RelayTunnel", "SshTunnel", "Tunnel", "check_relay", "open_tunnel"]

_BOOT = "import sys; sys.path.append(sys.argv[1]); from cloudexec._relay.tunnel import main; main()"
_END_TIMEOUT = 2.0
"""Seconds in which the process ends by itself once it is told to."""
_PAUSE = 0.5
"""Seconds before a process that has ended is followed by another."""
_PROBE_TIMEOUT = 10.0
"""Seconds in which a port that OpenSSH has opened must take a connection."""
_ALLOCATED = re.compile(r"Allocated port (\d+) for remote forward")

OnChange = Callable[[str, str], None]


class Tunnel(ABC):
    """A process that leads workers to this process's server. If it ends it is started again.

    It is used in one event loop.

    Args:
        on_change: Is called with ``registered``, ``lost`` or ``refused``, and with why.
    """

    def __init__(self, on_change: OnChange) -> None:
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._decided: asyncio.Future[bool] = self._loop.create_future()
        self._is_closed = False
        self._probing: asyncio.Task[None] | None = None
        self._said = ""
        self.why = "no answer"
        """Why workers are not led here, if they are not."""
        self.start()

    ends_as = "lost"
    """What the end of the process means."""

    @property
    @abstractmethod
    def target(self) -> str:
        """``host:port`` that workers dial, or ask the relay for."""

    @abstractmethod
    def command(self) -> Sequence[str]:
        """Return the command."""

    def input(self) -> bytes:
        """Return what the command reads first."""
        return b""

    @abstractmethod
    def heard(self, line: str) -> None:
        """Take a line that the command has printed."""

    def start(self) -> None:
        """Start the process.

        Raises:
            OSError: If it cannot be started.
        """
        self._rest = b""
        self._popen = subprocess.Popen(
            self.command(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            # Ctrl-C in the terminal is the client's to handle.
            start_new_session=True,
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._output: IO[bytes] = self._popen.stdout
        with contextlib.suppress(OSError):  # it is dead already, and its end says so
            self._popen.stdin.write(self.input())
        os.set_blocking(self._output.fileno(), False)
        self._loop.add_reader(self._output.fileno(), self._read)

    async def registered(self, patience: float) -> bool:
        """Wait until workers are led here.

        Args:
            patience: Seconds to wait at most.

        Returns:
            Whether they are; ``why`` says why not.
        """
        await asyncio.wait({self._decided}, timeout=patience)
        return self._decided.done() and self._decided.result()

    def changed(self, state: str, why: str) -> None:
        """Say what has become of the connection: ``registered``, ``lost`` or ``refused``."""
        self.why = why
        if state != "lost" and not self._decided.done():
            self._decided.set_result(state == "registered")
        self._on_change(state, why)

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
            self._said = line.decode(errors="replace").strip()
            self.heard(self._said)

    def _ended(self) -> None:
        self._close_pipes()
        self._popen.kill()
        code = self._popen.wait()
        self.changed(self.ends_as, f"its process ended with exit code {code}: {self._said}")
        self._loop.call_later(_PAUSE, self._start_again)

    def _start_again(self) -> None:
        if self._is_closed:
            return
        try:
            self.start()
        except OSError as exc:
            self.changed("lost", f"its process cannot be started: {exc}")
            self._loop.call_later(_PAUSE, self._start_again)

    def _close_pipes(self) -> None:
        self._loop.remove_reader(self._output.fileno())
        assert self._popen.stdin is not None
        self._popen.stdin.close()
        self._output.close()

    def close(self) -> None:
        """Have the process end. Connections of workers end with it."""
        self._is_closed = True
        if self._probing is not None:
            self._probing.cancel()
        if not self._output.closed:
            self._close_pipes()

    def join(self) -> None:
        """Wait until the process has ended, after ``close``; kill it if it takes too long."""
        try:
            self._popen.wait(_END_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


class RelayTunnel(Tunnel):
    """Is registered with a relay of ours.

    Args:
        relay: ``host:port`` of the relay.
        key: What client and workers share.
        executor_id: Which executor.
        server: ``host:port`` where the executor listens.
        on_change: As ``Tunnel`` takes it.

    Raises:
        OSError: If the process cannot be started.
    """

    def __init__(
        self, relay: str, key: bytes, executor_id: str, server: str, on_change: OnChange
    ) -> None:
        host, port = _split(relay)
        target_host, target_port = _split(server)
        self._executor_id = executor_id
        self._route = {
            "host": host,
            "port": port,
            "key": relay_key(key).hex(),
            "executor_id": executor_id,
            "target_host": target_host,
            "target_port": target_port,
        }
        super().__init__(on_change)

    @property
    def target(self) -> str:
        """What workers ask the relay for."""
        return f"{self._executor_id}.cloudexec.invalid:443"

    def command(self) -> Sequence[str]:
        """Return the command of our own tunnel."""
        # -P: a module of the user's, in the current folder, is none of Python's own.
        return [sys.executable, "-P", "-c", _BOOT, str(Path(__file__).parents[2])]

    def input(self) -> bytes:
        """Return where it leads: the key is on no command line."""
        return json.dumps(self._route).encode() + b"\n"

    def heard(self, line: str) -> None:
        """Take what it says of itself."""
        with contextlib.suppress(ValueError):  # the end of a traceback
            said = json.loads(line)
            self.changed(said["state"], said["why"])


class SshTunnel(Tunnel):
    """Has OpenSSH forward a port of a host of the user's: workers dial that.

    Args:
        url: ``ssh://user@host:port``; what is left out says ``~/.ssh/config``.
        server: ``host:port`` where the executor listens.
        advertise: Host that workers dial; empty: that of the URL.
        on_change: As ``Tunnel`` takes it.

    Raises:
        ConfigError: If the URL names no host.
        OSError: If there is no OpenSSH here.
    """

    ends_as = "refused"  # OpenSSH has said why, and would say the same again

    def __init__(self, url: str, server: str, advertise: str, on_change: OnChange) -> None:
        self._user, self._host, self._ssh_port = _parts_of(url)
        self._server = server
        self._advertise = advertise or self._host
        self._port = 0  # one that the host chooses, and then that one again
        super().__init__(on_change)

    @property
    def target(self) -> str:
        """What workers dial."""
        host = self._advertise
        return f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}"

    def command(self) -> Sequence[str]:
        """Return OpenSSH's command."""
        options = ["BatchMode=yes", "ExitOnForwardFailure=yes", "ServerAliveInterval=10"]
        return [
            *("ssh", "-N", "-T", "-R", f"*:{self._port}:{self._server}"),
            *[part for option in (*options, "ServerAliveCountMax=2") for part in ("-o", option)],
            *(() if self._ssh_port is None else ("-p", str(self._ssh_port))),
            *(() if self._user is None else ("-l", self._user)),
            self._host,
        ]

    def start(self) -> None:
        """Start OpenSSH; when it is given its earlier port again, it says nothing of it."""
        super().start()
        if self._port:
            self._probe_soon()

    def heard(self, line: str) -> None:
        """Take what OpenSSH says: the port, or what is wrong."""
        found = _ALLOCATED.search(line)
        if found is not None:
            self._port = int(found[1])
            self._probe_soon()
        else:
            self.why = line

    def _probe_soon(self) -> None:
        if self._probing is not None:
            self._probing.cancel()
        self._probing = self._loop.create_task(self._probe())

    async def _probe(self) -> None:
        """Find out whether the port is there for others, and not for the host alone."""
        deadline = self._loop.time() + _PROBE_TIMEOUT
        why = "no answer"
        while self._loop.time() < deadline:
            try:
                async with asyncio.timeout_at(deadline):
                    connection = await dial(self._advertise, self._port)
            except OSError as exc:
                why = str(exc) or why
                await asyncio.sleep(_PAUSE)  # OpenSSH may still be logging in
            else:
                connection.close()
                self.changed("registered", "")
                return
        self.changed(
            "refused",
            f"{self._host} has opened port {self._port}, and {self.target} takes no connection "
            f"({why}): the host needs `GatewayPorts clientspecified` in its sshd_config, and its "
            f"firewall must let the port through",
        )


def open_tunnel(
    relay: str, key: bytes, executor_id: str, server: str, advertise: str, on_change: OnChange
) -> Tunnel:
    """Lead workers to this process's server.

    Args:
        relay: ``host:port`` of a relay of ours, or ``ssh://user@host``.
        key: What client and workers share.
        executor_id: Which executor.
        server: ``host:port`` where the executor listens.
        advertise: Host that workers dial where it is not that of the URL.
        on_change: As ``Tunnel`` takes it.

    Raises:
        ConfigError: If ``relay`` is neither.
        OSError: If the process cannot be started.
    """
    if relay.startswith("ssh://"):
        return SshTunnel(relay, server, advertise, on_change)
    return RelayTunnel(relay, key, executor_id, server, on_change)


def check_relay(relay: str) -> None:
    """Refuse what is no relay.

    Raises:
        ConfigError: If it is neither ``host:port`` nor ``ssh://user@host``.
    """
    if relay.startswith("ssh://"):
        _parts_of(relay)
    else:
        _split(relay)


def _parts_of(url: str) -> tuple[str | None, str, int | None]:
    """Return user, host and port of a URL of OpenSSH."""
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.hostname and not parts.hostname.startswith("-") and not parts.password:
            return parts.username, parts.hostname, parts.port
    except ValueError:  # a port that is none
        pass
    raise ConfigError(f"relay must be like 'ssh://user@host', not {url!r}")


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(f"relay must be 'host:port' or 'ssh://user@host', not {address!r}")
    return host.strip("[]"), int(port)
