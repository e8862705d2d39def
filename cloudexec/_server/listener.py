"""Where workers reach this process: a private socket on this machine, or gRPC on the network."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cloudexec._errors import LaunchError
from cloudexec._launchers.base import Contact, Network
from cloudexec._log import Log
from cloudexec._objects.store import BlobStore
from cloudexec._server.direct import DirectChannel
from cloudexec._server.service import Service

if TYPE_CHECKING:
    from cloudexec._relay.process import Tunnel
    from cloudexec._server.certificate import Certificate

__all__ = ["Listener"]

_logger = Log()
_STOP_TIMEOUT = 5.0
"""Seconds in which the server must have let go of all connections."""
_REGISTER_TIMEOUT = 60.0
"""Seconds in which a relay must have been reached."""


class Listener:
    """The server of one executor.

    Args:
        service: What is served.
    """

    def __init__(self, service: Service) -> None:
        self.address = ""
        """``host:port`` where the server listens, if that is a network address."""
        self.certificate: Certificate | None = None
        self._service = service
        self._directory: str | None = None
        self._direct: DirectChannel | None = None
        self._server: Any = None
        self._tunnel: Tunnel | None = None
        self._at_relay = False

    def prepare(self, listen: str, gathers: BlobStore | None) -> bool:
        """Have a private directory, and a socket in it, where all workers are on this machine.

        Args:
            listen: What is to be listened on; empty: nothing in particular.
            gathers: Where results are left as they come; see ``DirectChannel``.

        Returns:
            Whether there is one.
        """
        if listen or not hasattr(os, "fork"):
            return False
        service = self._service
        self._directory = _private_directory()
        service.direct_path = f"{self._directory}/d"
        self._direct = DirectChannel(
            service.direct_path,
            service.blob_of,
            service.expects,
            service.deliver,
            service.session_of,
            gathers,
        )
        return True

    async def start(
        self, network: Network, *, is_plain: bool, certificate: Certificate | None
    ) -> Contact:
        """Listen; ``prepare`` was called.

        Args:
            network: Where.
            is_plain: Whether all workers are processes that this one starts, and need no gRPC.
            certificate: To be used on the network; ``None``: one is made.

        Returns:
            What workers must know to dial back.

        Raises:
            LaunchError: If it cannot listen where it was told to.
        """
        engine = self._service.engine
        if self._directory is not None and is_plain:
            from cloudexec._server.plain import start_plain_server

            path = f"{self._directory}/s"
            self._server = await start_plain_server(self._service, path)
            return Contact(f"plain:{path}", engine.executor_id, engine.key)
        listen = network.listen or "127.0.0.1:0"
        if self._directory is not None:
            listen = f"unix:{self._directory}/s"
        with _quiet_grpc():
            from cloudexec._server.network import start_server

            if not listen.startswith("unix:"):
                from cloudexec._server.certificate import make_certificate

                self.certificate = certificate or make_certificate()
            self._server, target, self.address = await start_server(
                self._service, listen, network.advertise, self.certificate
            )
        sha256 = "" if self.certificate is None else self.certificate.sha256
        if not network.relay:
            self._service.answers_itself = await asyncio.to_thread(
                _answers_itself, target, self.address
            )
            return Contact(target, engine.executor_id, engine.key, sha256)
        target = await self._register(network)
        relay = "" if network.relay.startswith("ssh://") else network.relay
        return Contact(target, engine.executor_id, engine.key, sha256, relay)

    async def _register(self, network: Network) -> str:
        """Have a relay send workers here.

        Returns:
            What workers call this server.

        Raises:
            LaunchError: If the relay cannot be reached, or refuses us.
            ConfigError: If it is none.
        """
        from cloudexec._relay.process import open_tunnel

        engine = self._service.engine
        try:
            self._tunnel = open_tunnel(
                network.relay,
                engine.key,
                engine.executor_id,
                self.address,
                network.advertise,
                self._on_relay,
            )
        except OSError as exc:
            raise LaunchError(f"cannot start the process that dials the relay: {exc}") from exc
        if not await self._tunnel.registered(_REGISTER_TIMEOUT):
            raise LaunchError(
                f"cannot reach the relay at {network.relay}: {self._tunnel.why}; is it still "
                f"there, and may this machine open connections to it (HTTPS_PROXY names a proxy)?"
            )
        return self._tunnel.target

    def _on_relay(self, state: str, why: str) -> None:
        if state == "registered":
            _logger.debug("registered with the relay")
        elif self._at_relay:  # said once, however often it is dialed
            _logger.warning("the connection to the relay is lost, and dialed again: %s", why)
        self._at_relay = state == "registered"

    def close_direct(self) -> None:
        """Close the socket of the private directory."""
        if self._direct is not None:
            self._direct.close()

    async def stop(self) -> None:
        """Close the server, in bounded time, and remove the directory."""
        if self._server is not None:
            stopping = asyncio.ensure_future(self._server.stop(grace=None))
            await asyncio.wait({stopping}, timeout=_STOP_TIMEOUT)
            self._server = None
        if self._tunnel is not None:
            self._tunnel.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def join(self) -> None:
        """Wait for what serves the private socket, and the relay, after ``stop``."""
        if self._direct is not None:
            self._direct.join()
        if self._tunnel is not None:
            self._tunnel.join()


def _answers_itself(target: str, address: str) -> bool:
    """Whether what workers dial is this machine, and the port that is listened on."""
    host, _, port = target.rpartition(":")
    if target.startswith("unix:") or port != address.rpartition(":")[2]:
        return False
    try:
        for family, kind, *_, found in socket.getaddrinfo(
            host.strip("[]"), 0, type=socket.SOCK_STREAM
        ):
            with socket.socket(family, kind) as tried:
                tried.bind(found)  # which works for addresses of this machine only
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _quiet_grpc() -> Iterator[None]:
    """Let gRPC read its settings as it starts: no handlers around ``os.fork()``, no log on stderr.

    Those handlers start gRPC's own threads anew in a forked child, where they serve this process's
    connections and crash.
    """
    ours = {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "NONE"}
    added = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(added)
    try:
        from grpc._cython import cygrpc  # type: ignore[attr-defined]

        if reset := getattr(cygrpc, "reset_grpc_config_vars", None):
            reset()  # the program may have imported gRPC before, which has it read them
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _private_directory() -> str:
    """Make a directory that only this user can enter, with a path short enough for a socket."""
    path = tempfile.mkdtemp(prefix="cloudexec-")
    if len(path) > 100:  # a socket's address has 108 bytes at most
        shutil.rmtree(path)
        path = tempfile.mkdtemp(prefix="cloudexec-", dir="/tmp")
    return path
