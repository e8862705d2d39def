"""Starts and watches the process at the client's end of a relay: ``tunnel``, or OpenSSH."""

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
"""Seconds that the process may take to end by itself after it was told to."""
_PAUSE = 0.5
"""Seconds after which a process that has ended is started again."""
_PROBE_TIMEOUT = 10.0
"""Seconds within which a port that OpenSSH has opened must accept a connection."""
_ALLOCATED = re.compile(r"Allocated port (\d+) for remote forward")

OnChange = Callable[[str, str], None]


class Tunnel(ABC):
    """A process through which workers reach this process's server. If it ends, it starts again.

    It is used on one event loop.

    Args:
        on_change: Called with ``registered``, ``lost`` or ``refused``, and with the reason.
    """

    def __init__(self, on_change: OnChange) -> None:
        self._on_change = on_change
        self._loop = asyncio.get_running_loop()
        self._decided: asyncio.Future[bool] = self._loop.create_future()
        self._is_closed = False
        self._probing: asyncio.Task[None] | None = None
        self._said = ""
        self.why = "no answer"
        """The reason why workers cannot reach the server, if they cannot."""
        self.start()

    ends_as = "lost"
    """The state that the end of the process means."""

    @property
    @abstractmethod
    def target(self) -> str:
        """``host:port`` that workers dial, or ask the relay for."""

    @abstractmethod
    def command(self) -> Sequence[str]:
        """Return the command line of the process."""

    def input(self) -> bytes:
        """Return the bytes that the process reads first from its standard input."""
        return b""

    @abstractmethod
    def heard(self, line: str) -> None:
        """Take a line that the process has printed."""

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
            # Ctrl-C in the terminal must reach the client only.
            start_new_session=True,
        )
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        self._output: IO[bytes] = self._popen.stdout
        with contextlib.suppress(OSError):  # if it is dead already, ``_ended`` handles that
            self._popen.stdin.write(self.input())
        os.set_blocking(self._output.fileno(), False)
        self._loop.add_reader(self._output.fileno(), self._read)

    async def registered(self, patience: float) -> bool:
        """Wait until workers can reach the server.

        Args:
            patience: Seconds to wait at most.

        Returns:
            Whether they can; if not, ``why`` has the reason.
        """
        await asyncio.wait({self._decided}, timeout=patience)
        return self._decided.done() and self._decided.result()

    def changed(self, state: str, why: str) -> None:
        """Take a new state of the connection: ``registered``, ``lost`` or ``refused``."""
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
        """Tell the process to end; the connections of workers end with it."""
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
    """Runs ``tunnel``, which is registered with a relay of cloudexec.

    Args:
        relay: ``host:port`` of the relay.
        key: The key that client and workers share.
        executor_id: The executor's id.
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
        """The name of the executor's server, for which workers ask the relay."""
        return f"{self._executor_id}.cloudexec.invalid:443"

    def move(self, relay: str) -> None:
        """Dial another relay: the process is started again, and told of it.

        Args:
            relay: ``host:port`` of that one.
        """
        self._route["host"], self._route["port"] = _split(relay)
        self._popen.kill()

    def command(self) -> Sequence[str]:
        """Return the command line of ``tunnel``."""
        # -P keeps modules of the user's, in the current folder, from replacing Python's.
        return [sys.executable, "-P", "-c", _BOOT, str(Path(__file__).parents[2])]

    def input(self) -> bytes:
        """Return the route, which holds the key: other users could read that on a command line."""
        return json.dumps(self._route).encode() + b"\n"

    def heard(self, line: str) -> None:
        """Take a state that ``tunnel`` reports."""
        with contextlib.suppress(ValueError):  # the line may be part of a traceback
            said = json.loads(line)
            self.changed(said["state"], said["why"])


class SshTunnel(Tunnel):
    """Runs OpenSSH, which forwards a port of the user's host to this machine; workers dial that.

    Args:
        url: ``ssh://user@host:port``. ``~/.ssh/config`` supplies parts that are left out.
        server: ``host:port`` where the executor listens.
        advertise: The host that workers dial; empty for the host of the URL.
        on_change: As ``Tunnel`` takes it.

    Raises:
        ConfigError: If the URL names no host.
        OSError: If OpenSSH is not installed here.
    """

    ends_as = "refused"  # OpenSSH has reported an error, and would report it again

    def __init__(self, url: str, server: str, advertise: str, on_change: OnChange) -> None:
        self._user, self._host, self._ssh_port = _parts_of(url)
        self._server = server
        self._advertise = advertise or self._host
        self._port = 0  # the host chooses a port; after a restart the same port is asked for
        super().__init__(on_change)

    @property
    def target(self) -> str:
        """``host:port`` that workers dial."""
        host = self._advertise
        return f"[{host}]:{self._port}" if ":" in host else f"{host}:{self._port}"

    def command(self) -> Sequence[str]:
        """Return the command line of OpenSSH."""
        options = ["BatchMode=yes", "ExitOnForwardFailure=yes", "ServerAliveInterval=10"]
        return [
            *("ssh", "-N", "-T", "-R", f"*:{self._port}:{self._server}"),
            *[part for option in (*options, "ServerAliveCountMax=2") for part in ("-o", option)],
            *(() if self._ssh_port is None else ("-p", str(self._ssh_port))),
            *(() if self._user is None else ("-l", self._user)),
            self._host,
        ]

    def start(self) -> None:
        """Start OpenSSH, and probe its port: OpenSSH does not report a port that was asked for."""
        super().start()
        if self._port:
            self._probe_soon()

    def heard(self, line: str) -> None:
        """Take a line of OpenSSH: the port that the host has chosen, or an error."""
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
        """Check that other machines can connect to the port, and not only the host itself."""
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
            f"{self._host} has opened port {self._port}, but {self.target} accepts no connection "
            f"({why}): the host needs `GatewayPorts clientspecified` in its sshd_config, and its "
            f"firewall must let the port through",
        )


def open_tunnel(
    relay: str, key: bytes, executor_id: str, server: str, advertise: str, on_change: OnChange
) -> Tunnel:
    """Start the process through which workers reach this process's server.

    Args:
        relay: ``host:port`` of a relay of cloudexec, or ``ssh://user@host``.
        key: The key that client and workers share.
        executor_id: The executor's id.
        server: ``host:port`` where the executor listens.
        advertise: The host that workers dial, with OpenSSH; empty for the host of the URL.
        on_change: As ``Tunnel`` takes it.

    Raises:
        ConfigError: If ``relay`` is neither.
        OSError: If the process cannot be started.
    """
    if relay.startswith("ssh://"):
        return SshTunnel(relay, server, advertise, on_change)
    return RelayTunnel(relay, key, executor_id, server, on_change)


def check_relay(relay: str) -> None:
    """Check the form of a relay's address.

    Raises:
        ConfigError: If it is neither ``host:port`` nor ``ssh://user@host``.
    """
    if relay.startswith("ssh://"):
        _parts_of(relay)
    else:
        _split(relay)


def _parts_of(url: str) -> tuple[str | None, str, int | None]:
    """Return the user, host and port of an ``ssh://`` URL."""
    why = ""
    try:
        parts = urllib.parse.urlsplit(url)
        user, host = parts.username, parts.hostname or ""
        if parts.password is not None:
            why = ": OpenSSH takes no password from an address, but a key of yours"
        elif parts.path.strip("/") or parts.query or parts.fragment:
            why = ": nothing may follow the host and its port"
        elif host and not host.startswith("-") and not re.search(r"[\s@]", f"{user}{host}"):
            return user, host, parts.port
    except ValueError:
        pass  # the port is no number, or too large
    raise ConfigError(
        f"relay must be like 'ssh://user@host' or 'ssh://user@host:port', not {_shown(url)!r}{why}"
    )


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    is_port = port.isdecimal() and 0 < int(port) < 65536
    name = host[1:-1] if re.fullmatch(r"\[.*\]", host) else host.replace(":", "/")
    if not name or not is_port or re.search(r"[\s/@\[\]]", name):
        raise ConfigError(
            f"relay must be True, False, 'auto', 'host:port', '[IPv6 address]:port' or "
            f"'ssh://user@host', not {_shown(address)!r}"
        )
    return name, int(port)


def _shown(address: str) -> str:
    """Return an address without what may be a password, or a key in a query."""
    scheme, sign, rest = address.partition("://")
    if not sign:
        scheme, rest = "", address
    user, at, host = rest.rpartition("@")
    user = "****" if re.search(r"[:/?#]", user) else user
    host = re.sub(r"[?#].*", lambda found: f"{found[0][0]}****", host)
    return f"{scheme}{sign}{user}{at}{host}"
