"""Opens the server that workers connect to: a private Unix socket, or gRPC on the network.

If the network's server cannot be reached from the workers, it is registered with a relay.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cloudexec._errors import CloudexecError, LaunchError
from cloudexec._launchers.base import Contact, Network
from cloudexec._log import Log
from cloudexec._objects.store import BlobStore
from cloudexec._record_class import replace
from cloudexec._server.dialed import Dialed
from cloudexec._server.direct import DirectChannel
from cloudexec._server.service import Service

if TYPE_CHECKING:
    from cloudexec._relay.process import Tunnel
    from cloudexec._server.certificate import Certificate

__all__ = ["Listener"]

_logger = Log()
_STOP_TIMEOUT = 5.0
"""Seconds that the server may take to close its connections."""
_REGISTER_TIMEOUT = 60.0
"""Seconds within which the server must be registered with the relay."""
_REGISTER_USUALLY = 5.0
"""Seconds after which a warning says that it is not registered yet, and why."""


class Listener:
    """The server of one executor.

    Args:
        service: The executor, as its workers' calls see it.
    """

    def __init__(self, service: Service) -> None:
        self.address = ""
        """``host:port`` where the server listens, if that is a network address."""
        self.certificate: Certificate | None = None
        self._service = service
        self._directory: str | None = None
        self._direct: DirectChannel | None = None
        self._server: Any = None
        self._tunnels: list[Tunnel] = []
        self._at_relay: set[str] = set()

    def prepare(self, listen: str, gathers: BlobStore | None) -> bool:
        """Open the direct channel in a private directory, if all workers are on this machine.

        Args:
            listen: The network address to listen on; empty if all workers are on this machine.
            gathers: Store for results that stay pickled; see ``DirectChannel``.

        Returns:
            Whether the direct channel is open.
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
        """Listen; ``prepare`` must have been called before.

        Args:
            network: The addresses to listen on and to advertise, and the relay; or several ways in.
            is_plain: Whether all workers are started by this process, so that they need no gRPC.
            certificate: The certificate for the network; ``None`` to make one.

        Returns:
            What workers must know to connect.

        Raises:
            LaunchError: If the server cannot listen at the address, or cannot reach the relay.
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
            self._server, self.address = await start_server(self._service, listen, self.certificate)
        if not network.others:
            return await self._contact(network)
        distinct = list(dict.fromkeys(network.others))  # a relay takes a server only once
        ways = await asyncio.gather(*map(self._contact, distinct), return_exceptions=True)
        found: dict[Network, Contact | CloudexecError] = {}
        for way_in, way in zip(distinct, ways, strict=True):
            if not isinstance(way, Contact | CloudexecError):
                raise way
            found[way_in] = way
        contacts = [way for way in ways if isinstance(way, Contact)]
        if not contacts:
            raise next(way for way in ways if isinstance(way, CloudexecError))
        if len({contact.target for contact in contacts}) > 1:
            self._service.dialed = None  # what is true of one of them says nothing of the others
        return replace(contacts[0], others=tuple(found[each] for each in network.others))

    async def _contact(self, network: Network) -> Contact:
        """Return what workers must know to connect by this way.

        Raises:
            LaunchError: If its relay cannot be reached, or refuses.
            ConfigError: If the relay's address is wrong.
        """
        from cloudexec._server.network import target_of

        engine = self._service.engine
        key = network.key or engine.key
        sha256 = "" if self.certificate is None else self.certificate.sha256
        if not network.relay:
            target = self.address
            if not target.startswith("unix:"):
                target = target_of(target, network.advertise)
            self._service.dialed = Dialed(target, self.address)
            return Contact(target, engine.executor_id, key, sha256)
        target = await self._register(network, key)
        relay = "" if network.relay.startswith("ssh://") else network.relay
        return Contact(target, engine.executor_id, key, sha256, relay)

    async def _register(self, network: Network, key: bytes) -> str:
        """Register the server with a relay, which passes workers' connections on to it.

        Returns:
            The target that workers dial.

        Raises:
            LaunchError: If the relay cannot be reached, or refuses the registration.
            ConfigError: If the relay's address is wrong.
        """
        from cloudexec._relay.process import RelayTunnel, open_tunnel

        relay = network.relay

        def on_change(state: str, why: str) -> None:
            self._on_relay(relay, state, why)

        engine = self._service.engine
        try:
            tunnel = open_tunnel(
                relay,
                key,
                engine.executor_id,
                self.address,
                network.advertise,
                on_change,
            )
        except OSError as exc:
            raise LaunchError(f"cannot start the process that dials the relay: {exc}") from exc
        self._tunnels.append(tunnel)
        if network.moving is not None and isinstance(tunnel, RelayTunnel):
            network.moving.on_move = tunnel.move
            if network.moving.address != relay:
                tunnel.move(network.moving.address)
        saying = asyncio.ensure_future(self._say_why(relay, tunnel))
        try:
            is_registered = await tunnel.registered(_REGISTER_TIMEOUT)
        finally:
            saying.cancel()
        if not is_registered:
            # OpenSSH has settings of its own.
            by = "" if relay.startswith("ssh://") else " (HTTPS_PROXY names a proxy)"
            raise LaunchError(
                f"cannot reach the relay at {relay}: {tunnel.why}; is it still "
                f"there, and may this machine open connections to it{by}?"
            )
        return tunnel.target

    def _on_relay(self, relay: str, state: str, why: str) -> None:
        if state == "registered":
            _logger.debug("registered with the relay")
            self._at_relay.add(relay)
            return
        if relay in self._at_relay and not self._service.engine.is_closing:
            # Said once, however often it is dialed.
            _logger.warning("the connection to the relay is lost, and dialed again: %s", why)
        self._at_relay.discard(relay)

    async def _say_why(self, relay: str, tunnel: Tunnel) -> None:
        """Say once that a relay cannot be reached yet; one that starts needs some seconds."""
        await asyncio.sleep(_REGISTER_USUALLY)
        _logger.warning(
            "the relay at %s cannot be reached yet, and is tried for %g s in all: %s",
            relay,
            _REGISTER_TIMEOUT,
            tunnel.why or "no answer",
        )

    def close_direct(self) -> None:
        """Close the direct channel."""
        if self._direct is not None:
            self._direct.close()

    async def stop(self) -> None:
        """Close the server, in bounded time, and remove the directory."""
        if self._server is not None:
            stopping = asyncio.ensure_future(self._server.stop(grace=None))
            await asyncio.wait({stopping}, timeout=_STOP_TIMEOUT)
            self._server = None
        for tunnel in self._tunnels:
            tunnel.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)

    def join(self) -> None:
        """Wait for the threads of the direct channel and of the relay's tunnel, after ``stop``."""
        if self._direct is not None:
            self._direct.join()
        for tunnel in self._tunnels:
            tunnel.join()


@contextlib.contextmanager
def _quiet_grpc() -> Iterator[None]:
    """Set, while gRPC starts, that it adds no handlers to ``os.fork()`` and logs nothing to stderr.

    Its fork handlers would start gRPC's threads anew in a forked child. These threads serve the
    parent's connections there, and crash.
    """
    ours = {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "NONE"}
    added = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(added)
    try:
        from grpc._cython import cygrpc  # type: ignore[attr-defined]

        if reset := getattr(cygrpc, "reset_grpc_config_vars", None):
            reset()  # makes gRPC read its settings again, if the program has imported it before
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _private_directory() -> str:
    """Make a directory that only this user can enter, with a path short enough for a socket."""
    path = tempfile.mkdtemp(prefix="cloudexec-")
    if len(path) > 100:  # a Unix socket's path has at most 108 bytes
        shutil.rmtree(path)
        path = tempfile.mkdtemp(prefix="cloudexec-", dir="/tmp")
    return path
