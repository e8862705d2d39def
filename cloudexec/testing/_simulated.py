"""A worker without processes: the real protocol, with answers that a function makes up."""

from __future__ import annotations

import asyncio
import os
import pickle
import platform
from collections.abc import Callable
from typing import Any

import cloudpickle
import grpc
import grpc.aio

from cloudexec import _enrolment
from cloudexec._errors import ProtocolError
from cloudexec._launchers.base import Contact
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._wire import CHANNEL_OPTIONS, TOKEN_KEY, unpack_chunk

__all__ = ["Answer", "SimulatedWorker", "answer_none"]

Answer = Callable[[int, bytes], bytes]
"""Given a lease and the bytes of a call's arguments, returns the pickle of the call's result.

The bytes are a pickle of the arguments, as ``pickle.loads`` takes it, up to 64 KiB; larger ones are
framed, with buffers out of band."""

_BATCH_RESULTS = 2048
_BATCH_BYTES = 512 * 1024
_LARGEST_RESULT = 64 * 1024
_NONE = pickle.dumps(None, 5)


def answer_none(lease: int, payload: bytes) -> bytes:
    """Answer a task with ``None``, whatever it is."""
    return _NONE


class SimulatedWorker:
    """Connects to an executor as a worker does, and answers its tasks without running them.

    Everything a worker says on the wire is said: enrolment, results in batches, heartbeats,
    draining. No process is started, so that one process can hold thousands. Use it on one event
    loop, and best in another process than the executor's: where two loops of a process use
    ``grpc.aio``, each logs harmless ``BlockingIOError`` (grpc/grpc issue 25364).

        worker = SimulatedWorker(launch.contact, launch.launch_id)
        await worker.connect()
        await worker.serve()

    Args:
        contact: Where to dial, from ``ManualLaunch``; a Unix socket.
        identity: The launch id. The executor admits only those that it asked for, each once.
        slots: Tasks that it says it can run at once.
        answer: Makes up the result of each task. At most 64 KiB each; called on the event loop, so
            it must not block.

    Attributes:
        answered: Tasks answered so far.

    Raises:
        ValueError: If the contact is a TLS one, which this worker does not speak.
    """

    def __init__(
        self, contact: Contact, identity: str, *, slots: int = 1, answer: Answer = answer_none
    ) -> None:
        if contact.certificate_sha256:
            raise ValueError("a SimulatedWorker dials Unix sockets: leave the executor's listen=")
        self.answered = 0
        self._contact = contact
        self._identity = identity
        self._slots = slots
        self._answer = answer
        # A connection of its own, as a worker has: gRPC would share one among equal channels.
        options = [*CHANNEL_OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.aio.insecure_channel(contact.target, options=options)
        self._fetch = self._channel.unary_stream(
            "/cloudexec.v1.TaskServer/Fetch",
            request_serializer=pb.FetchRequest.SerializeToString,
            response_deserializer=unpack_chunk,
        )
        self._call: Any = None
        # gRPC allows one write at a time; results and heartbeats share the stream.
        self._writing = asyncio.Lock()
        self._welcome = pb.Welcome()

    @property
    def worker_id(self) -> str:
        """The name that the executor gave; empty before ``connect()``."""
        return self._welcome.worker_id

    async def connect(self) -> None:
        """Dial and enrol.

        Raises:
            ProtocolError: If either side refuses the other.
            grpc.aio.AioRpcError: If nobody answers.
        """
        contact = self._contact
        session = self._channel.stream_stream(
            "/cloudexec.v1.TaskServer/Session",
            request_serializer=pb.WorkerMessage.SerializeToString,
            response_deserializer=pb.ServerMessage.FromString,
        )
        self._call = session()
        nonce = _enrolment.make_nonce()
        hello = pb.Hello(
            wire_version=_enrolment.WIRE_VERSION,
            executor_id=contact.executor_id,
            identity=self._identity,
            nonce=nonce,
            cloudexec_version="simulated",
            python_version=_enrolment.python_version(),
            cloudpickle_version=cloudpickle.__version__,
            slots=self._slots,
            pid=os.getpid(),
            host=platform.node(),
        )
        await self._write(pb.WorkerMessage(hello=hello))
        challenge = (await self._expect("challenge")).challenge
        parts = (contact.executor_id, self._identity, nonce, challenge.nonce)
        if not _enrolment.proves(challenge.mac, _enrolment.proof(contact.key, "server", *parts)):
            raise ProtocolError(f"{contact.target} does not know this worker's key")
        mac = _enrolment.proof(contact.key, "worker", *parts)
        await self._write(pb.WorkerMessage(proof=pb.Proof(mac=mac)))
        self._welcome = (await self._expect("welcome")).welcome

    async def serve(self) -> str:
        """Answer tasks until the session ends.

        Returns:
            How it ended: ``"drained"``, ``"terminated"``, or ``"closed"`` if the executor went.

        Raises:
            Exception: Whatever ``answer`` raises; the executor sees a worker vanish.
            ValueError: If an answer is too large.
        """
        beating = asyncio.create_task(self._beat())
        try:
            return await self._receive()
        except grpc.aio.AioRpcError:
            return "closed"
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            await self.close()

    async def close(self) -> None:
        """Hang up without a word, as a worker does whose machine lost its power."""
        await self._channel.close()

    async def _receive(self) -> str:
        while True:
            message = await self._call.read()
            if message is grpc.aio.EOF:
                return "closed"
            if message.HasField("tasks"):
                await self._answer_all(message.tasks)
            if message.terminate:
                return "terminated"
            if message.drain:
                # Nothing is left to hand back: what came was answered at once.
                await self._write(pb.WorkerMessage(draining=True))
                await self._call.done_writing()
                while await self._call.read() is not grpc.aio.EOF:
                    pass
                return "drained"

    async def _answer_all(self, tasks: pb.Tasks) -> None:
        composed = dict(zip(tasks.composed, tasks.blob_counts, strict=True))
        blobs = iter(tasks.blobs)
        reply = pb.WorkerMessage()
        size = 0
        for index, (lease, payload) in enumerate(zip(tasks.leases, tasks.payloads, strict=True)):
            for _ in range(composed.get(index, 0)):
                payload += await self._fetched(next(blobs))
            result = self._answer(lease, payload)
            if len(result) > _LARGEST_RESULT:
                raise ValueError(
                    f"a simulated result is {_LARGEST_RESULT} bytes at most, not {len(result)}"
                )
            reply.results.leases.append(lease)
            reply.results.payloads.append(result)
            reply.results.seconds.append(0.0)
            size += len(result)
            if len(reply.results.leases) >= _BATCH_RESULTS or size >= _BATCH_BYTES:
                await self._send(reply)
                reply = pb.WorkerMessage()
                size = 0
        if reply.results.leases:
            await self._send(reply)

    async def _send(self, reply: pb.WorkerMessage) -> None:
        await self._write(reply)
        self.answered += len(reply.results.leases)

    async def _fetched(self, number: int) -> bytes:
        """Fetch a part of an argument that is too large to come along with its task."""
        request = pb.FetchRequest(blob=number)
        metadata = ((TOKEN_KEY, self._welcome.session_token),)
        chunks = [chunk async for chunk in self._fetch(request, metadata=metadata)]
        return b"".join([chunk for chunk in chunks if isinstance(chunk, memoryview)])

    async def _beat(self) -> None:
        interval = self._welcome.heartbeat_interval or 10.0
        while True:
            await asyncio.sleep(interval)
            await self._write(pb.WorkerMessage(heartbeat=pb.Heartbeat()))

    async def _write(self, message: pb.WorkerMessage) -> None:
        async with self._writing:
            await self._call.write(message)

    async def _expect(self, what: str) -> pb.ServerMessage:
        message = await self._call.read()
        if message is grpc.aio.EOF:
            raise ProtocolError("the client closed the connection during enrolment")
        if message.HasField("refusal"):
            raise ProtocolError(f"the client refused this worker: {message.refusal.reason}")
        if not message.HasField(what):
            raise ProtocolError(f"the client sent something else than {what}")
        return message  # type: ignore[no-any-return]
