"""Enrols workers: each proves that it knows the executor's key, and receives its settings.

The client proves to the worker that it knows the key, too, so that no worker runs the code of a
stranger. A worker whose connection was cut goes on with its session, without a new one.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from google.protobuf.message import DecodeError

from cloudexec import _enrolment, _nesting, _plain_json
from cloudexec._launchers.base import Arrival
from cloudexec._log import Log
from cloudexec._logs import state_of_logging
from cloudexec._objects.places import is_descendant
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._records import Composed
from cloudexec._rpc import is_end
from cloudexec._server.rpc.calls import LONGEST, abort
from cloudexec._server.rpc.gate import Gate, Guest
from cloudexec._server.rpc.session import WorkerSession
from cloudexec._server.service import Service
from cloudexec._versions import differences

__all__ = ["Enrolment"]

_logger = Log()
_ENROLMENT_TIMEOUT = 10.0
"""Seconds within which a peer must have proved who it is."""
_UNPROVEN_PEERS = 256
"""Number of peers that may be enrolling at once; ``Gate`` enforces it."""
_HELLO_BYTES = 16 * 1024
"""Largest message, in bytes, of a peer that has not proved who it is. Larger ones are not parsed: a
few megabytes of empty fields would become objects of hundreds of megabytes."""
_MOST_SLOTS = 65_536
_MOST_IMAGES = 16
"""Environments of workers whose packages are compared with those here."""


class _HungUpError(Exception):
    """A peer ended its call before it had proved who it is."""


class Enrolment:
    """Enrols the workers of one executor.

    Args:
        service: The executor, as its workers' calls see it.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._gate = Gate(_UNPROVEN_PEERS)
        self._compared: set[bytes] = set()
        """Versions that workers have told: those of an image are compared once."""

    async def enrol(self, context: Any) -> WorkerSession | None:
        """Enrol the worker that makes a call, and return its session.

        Returns:
            ``None`` if the peer was refused; most refusals abort the call by an exception instead.
        """
        service, peer = self._service, context.peer()
        guest = self._gate.enter(peer)
        if guest is None:
            service.refused("too many at once", f"{peer} is one of too many that come at once")
            await abort(context, "RESOURCE_EXHAUSTED", "too many peers at once")
            return None
        try:
            async with asyncio.timeout(_ENROLMENT_TIMEOUT) as guest.timeout:
                session = await self._let_in(context, guest)
        except TimeoutError:
            if guest.evicted:
                service.refused("too many at once", f"{peer} took its time, and others wait")
                await abort(context, "RESOURCE_EXHAUSTED", "too many peers at once")
            service.refused("too slow", f"{peer} did not say in time who it is")
            await abort(context, "DEADLINE_EXCEEDED", "enrolment took too long")
        except _HungUpError:
            # No reason for a warning: the worker was ended or has found its session gone, or the
            # network has failed again.
            _logger.debug("%s hung up before it had proved who it is", peer)
            await abort(context, "UNAUTHENTICATED", "say who you are")
        finally:
            self._gate.leave(guest)
        return session

    async def _let_in(self, context: Any, guest: Guest) -> WorkerSession | None:
        service = self._service
        heard_at = time.monotonic()
        message = await self._hear(context, guest)
        if not message.HasField("hello"):
            service.refused("no hello", f"{context.peer()} said something else than who it is")
            await abort(context, "UNAUTHENTICATED", "say hello first")
            return None
        hello = message.hello
        if len(hello.identity) > 1024 or len(hello.nonce) != _enrolment.NONCE_BYTES:
            service.refused("malformed hello", f"{context.peer()} sent a malformed hello")
            await abort(context, "INVALID_ARGUMENT", "malformed hello")
        if service.takeover is not None and not service.takeover.is_ready:
            # No refusal that counts: a worker of the run before comes again in a moment.
            await abort(context, "RESOURCE_EXHAUSTED", "workers cannot be taken over yet")
        claimed, hello.identity = hello.identity, service.workers.launch_of(hello.identity)
        if claimed and not hello.identity:
            # Nor is this one: the platform has started it, and says in a moment which one it is.
            await abort(context, "RESOURCE_EXHAUSTED", "it is not known yet which worker this is")
        nonce = _enrolment.make_nonce()
        key = service.workers.key_of(hello.identity)
        resumed: WorkerSession | None = None
        if hello.resume:
            # If the session was given up, the client proves to know the executor's key only, and
            # not the session's token. By that the worker learns that its session is gone.
            resumed = service.workers.session_to_resume(hello.identity, hello.resume)
            if resumed is not None:
                key = _enrolment.session_key(key, resumed.token)
        parts = (service.engine.executor_id, claimed, hello.nonce, nonce)
        mac = _enrolment.proof(key, "server", *parts)
        # A client that has taken the place of a killed one has none of its sessions.
        takeover = service.takeover if hello.resume and resumed is None else None
        takes_over = takeover is not None and takeover.takes(hello.identity)
        challenge = pb.Challenge(nonce=nonce, mac=mac, takes_over=takes_over)
        await context.write(pb.ServerMessage(challenge=challenge))
        message = await self._hear(context, guest)
        expected = _enrolment.proof(key, "worker", *parts)
        proved = _enrolment.proves(message.proof.mac, expected)
        if hello.executor_id != service.engine.executor_id or not proved:
            service.refused("no proof", f"{context.peer()} could not prove that it knows the key")
            await abort(context, "UNAUTHENTICATED", "proof refused")
        if hello.resume and not takes_over:
            return await self._resume(resumed, message.proof.received, context)
        mismatch = _enrolment.versions_mismatch(
            wire=hello.wire_version, python=hello.python_version, pickle=hello.cloudpickle_version
        )
        if not 0 < hello.slots <= _MOST_SLOTS:
            mismatch = f"a worker cannot have {hello.slots} slots"
        self._compare(hello.packages)
        service.workers.returning(hello.identity, hello.attempt)
        session = service.workers.unheard(hello.identity, hello.process)
        if session is not None:
            await context.write(pb.ServerMessage(welcome=session.welcome))
            return session  # type: ignore[no-any-return]
        unwanted = service.workers.admit(hello.identity)
        refusal = unwanted or mismatch
        if refusal is not None:
            try:
                await context.write(pb.ServerMessage(refusal=pb.Refusal(reason=refusal)))
            finally:  # also if the worker does not wait for the refusal
                if unwanted is None:
                    service.workers.refused(hello.identity, refusal)
                # A worker whose launch was withdrawn comes late, and is no reason for a warning.
                elif not service.launches.has_given_up(hello.identity):
                    what = f"{context.peer()} knows the key, but {unwanted}"
                    service.refused("not expected", what)
            return None
        resumable = not service.direct_path and service.machine.config.reconnect_grace > 0
        pid = _pid_of(service.workers.pid_of(hello.identity), hello.pid)
        session = WorkerSession(service, hello.identity, hello.attempt, pid, resumable=resumable)
        session.taken_over = takes_over
        setup = service.setup
        welcome = pb.Welcome(
            worker_id=session.worker_id,
            session_token=session.token,
            cwd=setup.cwd,
            sys_path=setup.sys_path,
            argv=setup.argv,
            settings=setup.settings,
            max_tasks_per_child=setup.max_tasks_per_child,
            orphan_timeout=setup.orphan_timeout,
            heartbeat_interval=service.machine.config.lease_timeout / 6,
            capture_output=service.setup.output != "off",
            min_slots=setup.min_workers,
            idle_timeout=-1.0 if setup.idle_timeout is None else setup.idle_timeout,
            direct_path=service.direct_path,
            authkey=_authkey() if service.machine.config.scaling.one_machine else b"",
            modules=bool(setup.modules),
            first_blob=session.first_blob,
            blob_memory=setup.objects.worker_memory or 0,  # type: ignore[arg-type]
            compress=service.compresses,
            resumable=resumable,
            refused_is_gone=(
                service.takeover is None and service.dialed is not None and service.dialed.is_own
            ),
            depth=_nesting.depth() + 1,
            inheritance=_inheritance(service),
            main=setup.main,
        )
        if service.transfers is not None:
            welcome.bucket_threshold = service.transfers.threshold
            welcome.bucket_part_bytes = service.transfers.part_bytes
        initializer = setup.initializer
        if type(initializer) is Composed:
            welcome.initializer_blobs.extend(map(session.told.describe, initializer.blobs))
            initializer = initializer.head
        assert type(initializer) is bytes
        welcome.initializer = initializer
        if setup.initializer_needs is not None:
            session.told.introduce_first(welcome, setup.initializer_needs)
            welcome.initializer_needs = setup.initializer_needs.number
        session.process, session.welcome = hello.process, welcome if resumable else None
        await context.write(pb.ServerMessage(welcome=welcome))
        # The write above may have taken time, so check once more.
        if service.workers.admit(hello.identity) is not None:
            return None
        pull, boot = _seconds(hello.pull_seconds) or None, _seconds(hello.boot_seconds)
        arrival = Arrival(hello.job_id[:256], hello.attempt, boot, pull)
        service.workers.connected(session, hello.slots, arrival, time.monotonic() - heard_at)
        return session

    def _compare(self, packages: bytes) -> None:
        """Warn of packages that workers have in another version: a pickle may not fit them."""
        if not packages or packages in self._compared or len(self._compared) >= _MOST_IMAGES:
            return
        self._compared.add(packages)
        if found := differences(packages):
            _logger.warning(
                "workers have other versions of packages than this program: %s. What is sent may "
                "not fit them: `Batch(packages='here')` gives them the versions that are here",
                found,
            )

    async def _resume(
        self, session: WorkerSession | None, received: int, context: Any
    ) -> WorkerSession | None:
        """Let a worker that has proved who it is go on with its session over this connection."""
        if session is None or session.is_closed:
            await context.write(pb.ServerMessage(refusal=pb.Refusal(reason="it was given up")))
            return None
        stream = session.stream
        try:
            stream.arrived(received)
        except ValueError as exc:
            self._service.refused("malformed hello", f"{session.worker_id} cannot go on: {exc}")
            await abort(context, "INVALID_ARGUMENT", str(exc))
        # Messages that still arrive over the old connection are sent again over the new one; their
        # numbers make sure that each is read once.
        answer = pb.ServerMessage(resumed=True)
        stream.acknowledge(answer)
        await context.write(answer)
        return session

    async def _hear(self, context: Any, guest: Guest) -> pb.WorkerMessage:
        """Read a message of a peer that has not proved who it is.

        Returns:
            The message; an empty one if the bytes are too many, or are no message.

        Raises:
            _HungUpError: If the peer sends nothing more.
        """
        async with self._gate.turn(guest):
            data = await context.read()
        if is_end(data):
            raise _HungUpError
        if len(data) > _HELLO_BYTES:
            return pb.WorkerMessage()
        try:
            return pb.WorkerMessage.FromString(data)
        except DecodeError:
            return pb.WorkerMessage()


def _pid_of(launched: int, claimed: int) -> int:
    """Return the id of the process of a worker on this machine, which decides whose files it owns.

    Args:
        launched: The process that was started for the worker; 0 if it is not known.
        claimed: The process that the worker says it is. It must be ``launched`` or one that this
            one has started.
    """
    return claimed if not launched or is_descendant(claimed, launched) else launched


def _seconds(value: float) -> float:
    """Return a duration that a peer has sent, or 0 if it cannot be one."""
    return value if 0.0 <= value < LONGEST else 0.0


def _inheritance(service: Service) -> bytes:
    """Return, as JSON, what slots' processes inherit from this one, as a forked child would."""
    import multiprocessing

    process: Any = multiprocessing.current_process()
    inheritance: dict[str, Any] = {
        "max_workers": service.setup.max_workers,
        "identity": process._identity,
        "name": process.name,
    }
    if service.setup.forward_logs:
        inheritance["logging"] = state_of_logging()
    if service.setup.module_state:
        inheritance["modules"] = service.setup.module_state.hex()
    return _plain_json.encode(inheritance)


def _authkey() -> bytes:
    import multiprocessing

    return bytes(multiprocessing.current_process().authkey)
