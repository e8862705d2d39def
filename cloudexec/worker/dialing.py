"""Connects a worker with its client: dials, checks the client's proof, and proves its identity."""

from __future__ import annotations

import asyncio
import errno
import math
import os
import re
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

from cloudexec import _enrolment
from cloudexec._errors import LaunchError, ProtocolError
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._record_class import record, replace
from cloudexec._rpc import call_errors, is_end, status_of
from cloudexec._wire.channel import CHANNEL_OPTIONS, longest_pause
from cloudexec.worker.client import Client
from cloudexec.worker.refusals import Outcome, Refusals

__all__ = [
    "CONNECT_TIMEOUT",
    "MOVING_TIMEOUT",
    "REFUSED_FOR",
    "Address",
    "ClientGoneError",
    "SessionGoneError",
    "dial",
    "hang_up",
    "shake_hands",
]

CONNECT_TIMEOUT = 30.0
"""Seconds for which a client elsewhere is dialed the first time."""
MOVING_TIMEOUT = 120.0
"""The same, behind a relay that may have ended just now: the client starts another one, which takes
about a minute."""
REFUSED_FOR = 10.0
"""Seconds for which the client's own host refuses connections until its process is known to be
gone. A network that is gone is silent instead; a firewall that is loaded anew may refuse, for a
moment."""
_TRY_TIMEOUT = 10.0
_LONG_TRY = 40.0
"""Seconds of a try with a busy client. If thousands of workers dial again at once, each must wait
longer than a single one, and beginning anew would only add to the load."""
_SHORT_TRIES = 2
"""Number of short tries before the first long one. Three tries begin within the 30 seconds that a
client waits for a worker to come back (``reconnect_grace``). So a single connection that hangs, for
instance in a proxy, does not use up this time."""
_PROBE_TIMEOUT = 3.0
_LONGEST_ANSWER = 4096
_KEEPALIVE = [("grpc.keepalive_time_ms", 10_000), ("grpc.keepalive_timeout_ms", 10_000)]
"""A worker must notice a dead connection before its client does, because the worker dials again."""
_OWN = ("grpc.use_local_subchannel_pool", 1)
"""Gives a channel a connection of its own. gRPC would otherwise share that of an earlier channel to
the same address, which may be dead."""
_ADDRESS = re.compile(r"[\w.:\[\]-]{1,255}:\d{1,5}")
_found: dict[str, str] = {}
"""The last address of each relay, by the URL under which it can be read."""
_pinned: dict[str, str] = {}
"""Certificates in PEM, by fingerprint. When all workers dial again at once, after they have lost
their client, none of them needs to fetch the certificate again."""
_RETRIED = (
    "UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "RESOURCE_EXHAUSTED",
    "CANCELLED",
    "INTERNAL",
    "UNKNOWN",
)
"""Status codes of a busy client or network; other codes mean that the client refuses the worker."""


@record
class Address:
    """The client's address, and what the worker needs to identify it and itself.

    Attributes:
        target: ``plain:/path`` of a socket, or a gRPC target: ``unix:/path`` or ``host:port``.
        executor_id: Which executor.
        identity: Who this worker is.
        key: Shared with the executor.
        slots: Tasks to run at once.
        certificate_sha256: Of the server's certificate, in hex; empty for a Unix socket.
        relay: ``host:port`` of the relay that leads to the client; behind it, if that may change, a
            space and the URL where it is to be read; empty: the client is dialed itself.
        job_id: The platform's name for this worker.
        attempt: Which run of the launch this is, from 1.
        memory_mib: What this worker's container may use; 0: unknown.
        patience: Seconds for which the client is dialed the first time.
        drain_grace: Seconds after SIGTERM in which tasks may finish; ``None``: no limit.
        log: Whether to say on stderr what happens: where a platform keeps that.
        client: The client, if it has started this process itself.
    """

    target: str
    executor_id: str
    identity: str
    key: bytes
    slots: int
    certificate_sha256: str = ""
    relay: str = ""
    job_id: str = ""
    attempt: int = 1
    memory_mib: int = 0
    patience: float = CONNECT_TIMEOUT
    drain_grace: float | None = None
    log: bool = False
    client: Client | None = None

    @property
    def gate(self) -> str:
        """``host:port`` that this worker connects to: that of the relay, or of the client."""
        return self.relay or self.target

    @property
    def shown(self) -> str:
        """The target's name in messages."""
        relay = self.relay.partition(" ")[0]  # a URL is signed, and not for everybody
        return f"the relay {relay}" if relay else self.target

    def say(self, text: str) -> None:
        """Write a line to stderr, if this worker keeps a log."""
        if self.log:
            print(f"cloudexec worker {self.identity}: {text}", file=sys.stderr, flush=True)

    def __repr__(self) -> str:
        return f"Address(target={self.target!r}, identity={self.identity!r})"


class ClientGoneError(LaunchError):
    """The client cannot be reached, for as long as a worker waits for it."""


class SessionGoneError(ProtocolError):
    """The client has proved who it is, but has given up the session that the worker had."""


async def _channel(address: Address, patience: float) -> Any:
    """Open a gRPC channel, or a plain one on the client's own machine.

    Raises:
        OSError: If the client cannot be reached.
        ProtocolError: If something else answers there.
    """
    if address.target.startswith("plain:"):
        from cloudexec._plain import Channel

        return Channel(address.target.removeprefix("plain:"))
    import grpc
    import grpc.aio

    if not address.certificate_sha256:
        return grpc.aio.insecure_channel(address.target, options=[*CHANNEL_OPTIONS, _OWN])
    # A stranger may answer with any certificate. The one with the known fingerprint is fetched
    # first, and is then the only certificate that the channel trusts.
    pem = _pinned.get(address.certificate_sha256)
    if pem is None:
        import hashlib
        import ssl

        ticket = await _ticket(address) if address.relay else ""
        certificate = await asyncio.to_thread(_certificate, address, ticket, patience)
        found = hashlib.sha256(certificate).hexdigest()
        if found != address.certificate_sha256:
            raise ProtocolError(
                f"{address.shown} has another certificate than the one pinned for this worker "
                f"(sha256 {found}): refusing to talk to it"
            )
        pem = _pinned[found] = ssl.DER_cert_to_PEM_cert(certificate)
    credentials = grpc.ssl_channel_credentials(root_certificates=pem.encode())
    options = [
        *CHANNEL_OPTIONS,
        *_KEEPALIVE,
        ("grpc.ssl_target_name_override", "cloudexec"),
        ("grpc.min_reconnect_backoff_ms", int(_LONG_TRY * 1000)),  # the time for connecting
        _OWN,
    ]
    if address.relay:
        ticket = await _ticket(address)
        options = [each for each in options if each[0] != "grpc.enable_http_proxy"]
        options.append(("grpc.http_proxy", f"http://worker:{ticket}@{address.relay}"))
    return grpc.aio.secure_channel(address.target, credentials, options=options)


async def _located(address: Address) -> Address:
    """Find out where the relay is now, if it may be elsewhere than before.

    If that cannot be read, as the right to do so has ended, it may still be where it was.
    """
    first, _, url = address.relay.partition(" ")
    if not url:
        return address
    try:
        _found[url] = await asyncio.to_thread(_read_address, url)
    except OSError as exc:
        address.say(f"it cannot be read whether the relay has moved: {exc}")
    return replace(address, relay=_found.get(url, first))


def _read_address(url: str) -> str:
    import urllib3

    from cloudexec._objects.s3_link import Link, Settings

    link = Link(Settings(timeout=_TRY_TIMEOUT))
    try:
        response = link.request("GET", url, ())
        status, text = response.status, response.read(_LONGEST_ANSWER).decode("ascii", "replace")
    except urllib3.exceptions.HTTPError as exc:
        raise ConnectionError(f"{link.place}: {exc}") from exc
    finally:
        link.close()
    if status != 200 or not _ADDRESS.fullmatch(text):
        raise ConnectionError(f"{link.place} does not say where the relay is (status {status})")
    return text


async def _ticket(address: Address) -> str:
    """Prove to the relay that we belong to the executor; return a ticket for one connection.

    Raises:
        OSError: If the relay cannot be reached, or refuses us.
    """
    from cloudexec._relay.handshake import TICKET, Line, greet, relay_key
    from cloudexec._relay.joining import dial as dial_relay

    async with asyncio.timeout(_TRY_TIMEOUT):
        connection = await dial_relay(*_parts(address.relay))
        with connection:
            key = relay_key(address.key)
            return await greet(Line(connection), key, TICKET, address.executor_id)


def _parts(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _certificate(address: Address, ticket: str, patience: float) -> bytes:
    """Fetch the certificate of the server; TLS 1.3 proves that the server has its key.

    Raises:
        OSError: If the server cannot be reached.
    """
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the fingerprint is compared instead
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    with socket.create_connection(_parts(address.gate), patience) as connection:
        if ticket:
            _pass_relay(connection, address.target, ticket)
        with context.wrap_socket(connection, server_hostname="cloudexec") as secured:
            return secured.getpeercert(binary_form=True) or b""


def _pass_relay(connection: socket.socket, target: str, ticket: str) -> None:
    """Ask a relay to join a connection with the client, as gRPC does for its own connections.

    Raises:
        OSError: If the relay refuses.
    """
    import base64

    login = base64.b64encode(f"worker:{ticket}".encode()).decode()
    head = f"CONNECT {target} HTTP/1.1\r\nProxy-Authorization: Basic {login}\r\n\r\n"
    connection.sendall(head.encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        byte = connection.recv(1)  # byte by byte, because TLS follows behind the answer
        answer += byte
        if not byte or len(answer) > _LONGEST_ANSWER:
            raise ConnectionResetError("the relay has closed the connection")
    status = answer.split(b"\r\n", 1)[0].decode("latin-1")
    if " 200 " not in status:
        raise OSError(f"the relay answers {status!r}")  # its machine is there: no refusal


def _is_cancelled() -> bool:
    """Say whether this task was cancelled.

    gRPC raises ``CancelledError`` also if only a call was cancelled. The task must not end then, or
    the worker would never dial again.
    """
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def dial(
    address: Address,
    enrol: Callable[[Any], Awaitable[None]],
    patience: float = CONNECT_TIMEOUT,
    refusals: float = math.inf,
) -> None:
    """Connect and enrol, and try again for a while if the network or a busy client fails.

    The first failure is logged at once, and each one of another kind.

    Args:
        address: Where to.
        enrol: Says who we are over a channel, which is closed if that fails; or called with the
            same one again, if it failed for no other reason than that the client is busy.
        patience: Seconds for which it is tried.
        refusals: Seconds after which it is not tried any more, if connections were refused for so
            long; see ``Refusals``.

    Raises:
        ClientGoneError: If the client cannot be reached.
        ProtocolError: If either side refuses the other.
    """
    deadline = time.monotonic() + patience
    longest = longest_pause(patience)
    pause, limit = 0.1, min(_TRY_TIMEOUT, patience)
    short = _SHORT_TRIES
    tried = False
    told: str | None = None
    refusing = Refusals(refusals)
    channel = None
    here = address
    try:
        while True:
            try:
                if channel is None:
                    here = await _located(address)
                    if tried:
                        await _probe(here.gate)
                    channel = await _channel(here, limit)
                async with asyncio.timeout(limit):
                    await enrol(channel)
                return
            except call_errors(OSError, asyncio.InvalidStateError, asyncio.CancelledError) as exc:
                if isinstance(exc, asyncio.CancelledError) and _is_cancelled():
                    raise
                # A TimeoutError is an OSError.
                code, reason = None, str(exc)
                if isinstance(exc, call_errors()):
                    code, reason = status_of(exc), exc.details()  # type: ignore[attr-defined]
                refused = code is not None and code not in _RETRIED
                # On the same machine no network can fail: a client that does not answer is gone.
                near = not address.certificate_sha256
                now = time.monotonic()
                known = channel is not None
                what = "" if near else _what_happened(exc, reason or "", here, is_known=known)
                refusing.note(_outcome(exc, what, is_known=known), now)
                if refused or near or refusing.is_gone or now + pause > deadline:
                    reason = "; ".join(filter(None, (what, reason)))
                    raise ClientGoneError(_unreachable(here, reason)) from exc
                if what != told:
                    told = what
                    left = f"dialing again, for {min(deadline - now, refusals):.0f} s at most"
                    address.say(f"no connection to {here.shown} yet: {what or reason}; {left}")
                # What a connection has cost both sides is not spent again on one that works.
                if channel is not None and code != "RESOURCE_EXHAUSTED":
                    hang_up(channel)
                    channel = None
                tried = True
                if isinstance(exc, TimeoutError):
                    short -= 1  # tries that fail early cost no time, and do not count
                if short <= 0:
                    limit = max(_TRY_TIMEOUT, min(_LONG_TRY, deadline - time.monotonic()))
            # A random pause, as hundreds of workers may start, or lose their client, together.
            random = 0.5 + int.from_bytes(os.urandom(2)) / 65535
            await asyncio.sleep(refusing.pause(pause * random))
            pause = min(2 * pause, longest)
    except BaseException:
        if channel is not None:
            hang_up(channel)
        raise


_REFUSED = "it was refused, as the host is there and nobody listens at that port"
_NO_WAY = (errno.EHOSTUNREACH, errno.ENETUNREACH)
"""What a system says itself when no packet comes back, and it gives up before we do."""


def _outcome(error: BaseException, what: str, *, is_known: bool) -> Outcome:
    """Return what a try to connect has shown about the client.

    Args:
        error: What it raised.
        what: What ``_what_happened`` says of it.
        is_known: Whether the right client had answered before.
    """
    if what == _REFUSED:
        return Outcome.REFUSED
    is_silent = isinstance(error, TimeoutError) and not is_known
    if is_silent or (isinstance(error, OSError) and error.errno in _NO_WAY):
        return Outcome.SILENT
    return Outcome.ANSWERED


def _what_happened(error: BaseException, reason: str, to: Address, *, is_known: bool) -> str:
    """Tell apart how a try to connect ended; empty: otherwise.

    Args:
        error: What it raised.
        reason: Its words.
        to: What was dialed.
        is_known: Whether the right client had answered before.
    """
    if isinstance(error, ConnectionRefusedError) or "Connection refused" in reason:
        return _REFUSED
    if isinstance(error, TimeoutError):
        if is_known:
            return "the client was there, and does not answer in time"
        if to.relay:
            return "the relay does not answer, as if it had ended or a firewall drops what is sent"
        return (
            "nobody answers, as if a security group, a firewall or a missing route drops what is "
            "sent"
        )
    # An error of TLS; not imported for this, where there is none.
    is_tls = type(error).__module__ == "ssl"
    if is_tls or isinstance(error, ConnectionResetError | BrokenPipeError):
        if to.relay:
            return "it was accepted and closed again, as by a relay that ends, or another program"
        return (
            "it was accepted and closed again, as by a forwarded port with nobody behind it, or by "
            "another program"
        )
    return ""


def _unreachable(to: Address, reason: str | None) -> str:
    """Return a message that says that the client does not answer, and which causes are likely."""
    target = to.shown
    if to.relay:
        return (
            f"cannot reach the client through {target}: {reason or 'no answer'}; is the relay "
            f"still there and reachable from this network, and does the program that started this "
            f"worker still run?"
        )
    if target.startswith("unix:"):
        return (
            f"cannot reach the client at {target.removeprefix('unix:')}, a socket on this machine "
            f"({reason or 'no answer'}): has the program that started this worker ended, or was "
            f"its temporary directory deleted?"
        )
    return (
        f"cannot reach the client at {target}: {reason or 'no answer'}; is it still there, "
        f"reachable from this network, and its port open?"
    )


async def _probe(target: str) -> None:
    """Check that a target accepts connections, before gRPC waits long for one.

    Raises:
        OSError: If it does not.
    """
    async with asyncio.timeout(_PROBE_TIMEOUT):
        _, writer = await asyncio.open_connection(*_parts(target))
    writer.close()


def hang_up(channel: Any) -> None:
    """Close a channel at once; calls that are under way end.

    The channel's own ``close()`` searches all tasks of the loop for its calls. With thousands of
    workers on one loop, as in tests, that takes minutes.
    """
    if hasattr(channel, "abort"):
        channel.abort()
        return
    inner = channel._channel
    if not inner.closed():
        inner.close()


async def shake_hands(
    call: Any, hello: pb.Hello, key: bytes, target: str, *, token: bytes = b"", received: int = 0
) -> pb.ServerMessage:
    """Prove who we are, and check that the server knows the executor's key.

    Args:
        call: A ``Session`` call.
        hello: The worker's first message; its nonce and session are filled in here.
        key: The key that worker and executor share.
        target: The client's name in messages.
        token: The token of the session to go on with; empty to begin a new session.
        received: Number of that session's messages that have been received.

    Returns:
        The message that welcomes the worker, or that lets the session go on. If a session was to go
        on, a welcome comes from a client that has taken the worker over.

    Raises:
        ProtocolError: If the server is an impostor, or refuses us; the message says why.
        SessionGoneError: If the client has given up the session.
        CallError: If the connection fails.
    """
    try:
        return await _shake_hands(call, hello, key, target, token=token, received=received)
    except BaseException:
        call.cancel()  # so that the other side learns that this worker does not listen any more
        raise


async def _shake_hands(
    call: Any, hello: pb.Hello, key: bytes, target: str, *, token: bytes, received: int
) -> pb.ServerMessage:
    hello.nonce = nonce = _enrolment.make_nonce()
    if token:
        hello.resume = _enrolment.session_name(token)
    await call.write(pb.WorkerMessage(hello=hello))
    challenge = (await _expect(call, "challenge")).challenge
    parts = (hello.executor_id, hello.identity, nonce, challenge.nonce)
    if token:
        session_key = _enrolment.session_key(key, token)
        if _enrolment.proves(challenge.mac, _enrolment.proof(session_key, "server", *parts)):
            key, token = session_key, b""
    if not _enrolment.proves(challenge.mac, _enrolment.proof(key, "server", *parts)):
        raise ProtocolError(f"{target} does not know this worker's key: an impostor?")
    if token and not challenge.takes_over:
        raise SessionGoneError(f"the client at {target} has given this worker up")
    mac = _enrolment.proof(key, "worker", *parts)
    await call.write(pb.WorkerMessage(proof=pb.Proof(mac=mac, received=received)))
    goes_on = hello.resume and not challenge.takes_over
    return await _expect(call, "resumed" if goes_on else "welcome")


async def _expect(call: Any, what: str) -> pb.ServerMessage:
    message = await call.read()
    if is_end(message):
        raise ProtocolError("the client closed the connection during enrolment")
    if message is None:
        raise ProtocolError("the client sent what is no message")
    if message.HasField("refusal"):
        raise ProtocolError(f"the client refused this worker: {message.refusal.reason}")
    if not (message.resumed if what == "resumed" else message.HasField(what)):
        raise ProtocolError(f"the client sent something else than {what}")
    return message  # type: ignore[no-any-return]
