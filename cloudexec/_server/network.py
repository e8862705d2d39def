"""The gRPC server for workers on other machines, or that this process has not started itself."""

from __future__ import annotations

import errno
import os
import socket
from typing import Any

import grpc
import grpc.aio

from cloudexec._errors import LaunchError
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._server.certificate import Certificate
from cloudexec._server.descriptors import most_connections
from cloudexec._server.rpc.calls import lenient
from cloudexec._server.rpc.servicer import Servicer
from cloudexec._server.service import Service
from cloudexec._wire.channel import CHANNEL_OPTIONS, TOKEN_KEY, pack_chunk, unpack_chunk

__all__ = ["start_server", "target_of"]


class _Methods(grpc.GenericRpcHandler):
    """Finds the handler of a call, and refuses strangers before their request is read."""

    def __init__(self, service: Service, handlers: grpc.GenericRpcHandler) -> None:
        self._service = service
        self._handlers = handlers
        self._stranger: Any = grpc.stream_stream_rpc_method_handler(self._turn_away)

    def service(self, details: Any) -> Any:
        handler = self._handlers.service(details)
        if handler is None:
            self._service.refused("unknown method", "a peer called a method that there is none of")
            return None
        if details.method.endswith("/Session"):
            return handler
        # Without the token of a session, not even the call's first message is read.
        token = dict(details.invocation_metadata or ()).get(TOKEN_KEY)
        known = isinstance(token, bytes) and self._service.session_of(token) is not None
        return handler if known else self._stranger

    async def _turn_away(self, _: Any, context: Any) -> None:
        self._service.refused("no session", f"{context.peer()} has no session, or has it no more")
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, "unknown session")


def _handlers(service: Service) -> grpc.GenericRpcHandler:
    servicer = Servicer(service)
    handlers = grpc.method_handlers_generic_handler(
        "cloudexec.v1.TaskServer",
        {
            "Session": grpc.stream_stream_rpc_method_handler(
                servicer.session,
                # Requests are parsed by the handler, as the allowed size depends on the peer.
                response_serializer=pb.ServerMessage.SerializeToString,
            ),
            "Fetch": grpc.unary_stream_rpc_method_handler(
                servicer.transfers.fetch,
                request_deserializer=lenient(pb.FetchRequest),
                response_serializer=pack_chunk,
            ),
            "Deliver": grpc.stream_unary_rpc_method_handler(
                servicer.transfers.deliver,
                request_deserializer=unpack_chunk,
                response_serializer=pb.DeliverReply.SerializeToString,
            ),
            "Locate": grpc.unary_unary_rpc_method_handler(
                servicer.transfers.locate,
                request_deserializer=lenient(pb.LocateRequest),
                response_serializer=pb.Location.SerializeToString,
            ),
            "Store": grpc.unary_unary_rpc_method_handler(
                servicer.transfers.store,
                request_deserializer=lenient(pb.StoreRequest),
                response_serializer=pb.StoreReply.SerializeToString,
            ),
        },
    )
    return _Methods(service, handlers)


def _server_options(workers: int) -> dict[str, int]:
    """Return gRPC options that limit what hostile peers can do; honest workers stay below them.

    Args:
        workers: The largest number of workers that may be connected at once.
    """
    return {
        "grpc.so_reuseport": 0,
        "grpc.max_allowed_incoming_connections": most_connections(workers),
        "grpc.server_handshake_timeout_ms": 10_000,
        "grpc.http2.settings_timeout": 10_000,
        # Closes connections without a call; a worker's session is a call that stays open.
        "grpc.max_connection_idle_ms": 30_000,
        # A stream may send at most 64 KiB that is not read yet, beside the rest of the message that
        # is being read. With windows that grow (BDP probing: to 16 MiB each), strangers could make
        # this process hold gigabytes.
        "grpc.http2.lookahead_bytes": 64 * 1024,
        "grpc.http2.bdp_probe": 0,
        "grpc.max_concurrent_streams": 1024,
        "grpc.max_metadata_size": 8 * 1024,
        "grpc.absolute_max_metadata_size": 16 * 1024,
        # A worker sends a keepalive ping every 10 s. Pings less than 5 s apart count as strikes.
        "grpc.http2.min_ping_interval_without_data_ms": 5_000,
        "grpc.http2.max_ping_strikes": 100,
    }


async def start_server(
    service: Service, listen: str, certificate: Certificate | None
) -> tuple[grpc.aio.Server, str]:
    """Start the gRPC server.

    Args:
        service: The executor, as its workers' calls see it.
        listen: ``unix:/path``, or ``host:port`` with TLS. Port 0 means any free port.
        certificate: The server's certificate for TLS; ``None`` for a Unix socket.

    Returns:
        The server, and the address that it listens on.

    Raises:
        LaunchError: If the server cannot listen at the address.
    """
    scaling = service.machine.config.scaling
    workers = -(-scaling.max_slots // scaling.slots_per_worker)
    options = {**dict(CHANNEL_OPTIONS), **_server_options(workers)}
    server = grpc.aio.server(options=list(options.items()))
    server.add_generic_rpc_handlers((_handlers(service),))
    try:
        if certificate is None:
            server.add_insecure_port(listen)
        else:
            credentials = grpc.ssl_server_credentials([(certificate.key_pem, certificate.pem)])
            port = server.add_secure_port(listen, credentials)
            listen = f"{listen.rpartition(':')[0]}:{port}"
    except RuntimeError as exc:
        raise LaunchError(_cannot_listen(listen, exc)) from None
    await server.start()
    if listen.startswith("unix:"):
        os.chmod(listen.removeprefix("unix:"), 0o600)
    return server, listen


def target_of(address: str, advertise: str) -> str:
    """Return what workers dial, as ``host:port``.

    Args:
        address: ``host:port`` that the server listens on.
        advertise: Host, or ``host:port``, that they are to dial; empty for that address.
    """
    alone = ":" not in advertise or advertise.endswith("]")
    if not advertise:
        return address
    return f"{advertise}:{address.rpartition(':')[2]}" if alone else advertise


def _cannot_listen(listen: str, error: RuntimeError) -> str:
    """Return a message that says why an address cannot be listened on; gRPC's error does not."""
    if listen.startswith("unix:"):
        return f"cannot listen on the socket {listen.removeprefix('unix:')}: {error}"
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as tried:
            if os.name == "posix":
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
            tried.listen()
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            return (
                f"cannot listen on {listen}: another program, or another executor, has port "
                f"{port}; give listen= another one, or {host}:0 for any that is free"
            )
        if exc.errno == errno.EADDRNOTAVAIL or isinstance(exc, socket.gaierror):
            return (
                f"cannot listen on {listen}: this machine has no address {host}; give listen= one "
                f"of its own, or 0.0.0.0 for all of them, and advertise= what workers dial"
            )
        if exc.errno == errno.EACCES:
            return (
                f"cannot listen on {listen}: this user may not have port {port}; give listen= one "
                f"from 1024 on, or {host}:0 for any that is free"
            )
        return f"cannot listen on {listen}: {exc.strerror or exc}"
    return f"cannot listen on {listen}: it was taken, and is free again now"
