"""A worker without processes: it uses the real protocol, and a function makes up its answers."""

from __future__ import annotations

import asyncio
import os
import pickle
from collections import deque
from collections.abc import Callable
from typing import Any

import cloudpickle
import grpc
import grpc.aio

from cloudexec import _enrolment
from cloudexec._errors import LaunchError, ProtocolError
from cloudexec._launchers.base import Contact
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._wire.channel import TOKEN_KEY, unpack_chunk
from cloudexec._wire.stream import Stream
from cloudexec.worker.dialing import CONNECT_TIMEOUT, Address, dial, hang_up, shake_hands

__all__ = ["Answer", "SimulatedWorker", "answer_none"]

Answer = Callable[[int, bytes], bytes]
"""Returns the pickle of a call's result, given the lease and the bytes of the call's arguments.

Up to 64 KiB, these bytes are a pickle that ``pickle.loads`` can read. Larger ones are divided into
records, with buffers out of band."""

_BATCH_RESULTS = 2048
_BATCH_BYTES = 512 * 1024
_LARGEST_RESULT = 64 * 1024
_NONE = pickle.dumps(None, 5)


def answer_none(lease: int, payload: bytes) -> bytes:
    """Answer any task with ``None``."""
    return _NONE


class SimulatedWorker:
    """Connects to an executor as a worker does, and answers its tasks without running them.

    It sends all messages of a real worker: enrolment, results in batches, heartbeats, draining. If
    it is connected by TLS and its connection is cut, it dials again and goes on with its session.
    It starts no process, so one process can hold thousands of simulated workers. Use it on one
    event loop, and best in another process than the executor's: if two loops of a process use
    ``grpc.aio``, each logs harmless ``BlockingIOError`` (grpc/grpc issue 25364).

        worker = SimulatedWorker(launch.contact, launch.launch_id)
        await worker.connect()
        await worker.serve()

    Args:
        contact: The address to dial, from ``ManualLaunch``.
        identity: The launch id. The executor admits only launches that it asked for, each once.
        slots: Number of tasks that the worker claims to run at once.
        answer: Makes up the result of each task, of at most 64 KiB. It is called on the event loop,
            so it must not block.

    Attributes:
        answered: Number of tasks answered so far.
        reconnected: How often it has dialed again and continued its session.
    """

    def __init__(
        self, contact: Contact, identity: str, *, slots: int = 1, answer: Answer = answer_none
    ) -> None:
        self.answered = 0
        self.reconnected = 0
        self._address = Address(
            contact.target,
            contact.executor_id,
            identity,
            contact.key,
            slots,
            contact.certificate_sha256,
        )
        self._answer = answer
        self._channel: grpc.aio.Channel | None = None
        self._fetch: Any = None
        self._call: Any = None
        # gRPC allows one write at a time; results and heartbeats share the stream.
        self._writing = asyncio.Lock()
        self._stream: Stream[pb.WorkerMessage] = Stream()
        self._todo: deque[tuple[int, bytes, list[int]]] = deque()  # lease, payload, blobs
        self._draining = False
        self._welcome = pb.Welcome()

    @property
    def worker_id(self) -> str:
        """The name that the executor gave to the worker; empty before ``connect()``."""
        return self._welcome.worker_id

    async def connect(self, patience: float = CONNECT_TIMEOUT) -> None:
        """Dial and enrol.

        Args:
            patience: Seconds for which to try. Over a Unix socket it tries once.

        Raises:
            ProtocolError: If worker or executor refuses the other.
            LaunchError: If the executor does not answer.
        """
        await dial(self._address, self._enrol, patience)

    async def _enrol(self, channel: grpc.aio.Channel) -> None:
        if self._channel is not channel:
            await self.close()
        self._channel = channel
        self._fetch = channel.unary_stream(
            "/cloudexec.v1.TaskServer/Fetch",
            request_serializer=pb.FetchRequest.SerializeToString,
            response_deserializer=unpack_chunk,
        )
        session = channel.stream_stream(
            "/cloudexec.v1.TaskServer/Session",
            request_serializer=pb.WorkerMessage.SerializeToString,
            response_deserializer=pb.ServerMessage.FromString,
        )
        self._call = session()
        address = self._address
        hello = pb.Hello(
            wire_version=_enrolment.WIRE_VERSION,
            executor_id=address.executor_id,
            identity=address.identity,
            python_version=_enrolment.python_version(),
            cloudpickle_version=cloudpickle.__version__,
            slots=address.slots,
            pid=os.getpid(),
        )
        token = self._welcome.session_token
        answer = await shake_hands(
            self._call,
            hello,
            address.key,
            address.target,
            token=token,
            received=self._stream.received,
        )
        if answer.resumed:
            self._stream.arrived(answer.received)
        elif token:
            raise ProtocolError("its client was killed, and it has nothing to hand to the next one")
        else:
            self._welcome = answer.welcome

    async def serve(self) -> str:
        """Answer tasks until the session ends.

        Returns:
            How it ended: ``"drained"``, ``"terminated"``, or ``"closed"`` if the executor ended.
            After the connection was cut: ``"orphaned"`` if the executor did not answer for its
            ``orphan_timeout``, or ``"given up"`` if the executor counts the worker as lost.

        Raises:
            Exception: Whatever ``answer`` raises; to the executor, the worker vanishes then.
            ValueError: If an answer is too large.
        """
        beating = asyncio.create_task(self._beat())
        try:
            while True:
                try:
                    return await self._converse()
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                    if not self._welcome.resumable:
                        return "closed"
                try:
                    async with self._writing:  # no heartbeat may be sent before enrolment
                        await dial(self._address, self._enrol, self._welcome.orphan_timeout)
                except LaunchError:
                    return "orphaned"
                except ProtocolError:
                    return "given up"
                self.reconnected += 1
        finally:
            beating.cancel()
            await asyncio.gather(beating, return_exceptions=True)
            await self.close()

    async def close(self) -> None:
        """Hang up without a message, as a worker does whose machine has lost its power."""
        call, self._call = self._call, None
        channel, self._channel = self._channel, None
        if call is not None:
            call.cancel()
        if channel is not None:
            hang_up(channel)

    async def _converse(self) -> str:
        """Exchange messages over one connection, until the session ends."""
        async with self._writing:
            for sent in self._stream.missing():
                await self._call.write(sent)
        await self._answer_all()
        while True:
            if self._draining and self._stream.is_clear:
                # No task is left to hand back, because all were answered at once.
                await self._write(pb.WorkerMessage(goodbye=True), keep=False)
                await self._call.done_writing()
                while await self._call.read() is not grpc.aio.EOF:
                    pass
                return "drained"
            message = await self._call.read()
            if message is grpc.aio.EOF:
                return "closed"
            if self._welcome.resumable and not self._stream.take(message):
                continue
            if message.HasField("tasks"):
                self._take(message.tasks)
                await self._answer_all()
            if message.terminate:
                return "terminated"
            if message.drain:
                self._draining = True
                await self._write(pb.WorkerMessage(draining=True))

    def _take(self, tasks: pb.Tasks) -> None:
        composed = dict(zip(tasks.composed, tasks.blob_counts, strict=True))
        blobs = iter(tasks.blobs)
        for index, (lease, payload) in enumerate(zip(tasks.leases, tasks.payloads, strict=True)):
            parts = [next(blobs) for _ in range(composed.get(index, 0))]
            self._todo.append((lease, payload, parts))

    async def _answer_all(self) -> None:
        reply = pb.WorkerMessage()
        size = 0
        while self._todo:
            lease, payload, blobs = self._todo[0]
            for blob in blobs:
                payload += await self._fetched(blob)
            result = self._answer(lease, payload)
            if len(result) > _LARGEST_RESULT:
                raise ValueError(
                    f"a simulated result is {_LARGEST_RESULT} bytes at most, not {len(result)}"
                )
            # Removed only now, so that the task is answered again if the connection is cut before.
            self._todo.popleft()
            reply.results.leases.append(lease)
            reply.results.payloads.append(result)
            reply.results.seconds.append(0.0)
            size += len(result)
            enough = len(reply.results.leases) >= _BATCH_RESULTS or size >= _BATCH_BYTES
            if enough or not self._todo or self._todo[0][2]:
                self.answered += len(reply.results.leases)
                await self._write(reply)
                reply = pb.WorkerMessage()
                size = 0

    async def _fetched(self, number: int) -> bytes:
        """Fetch a blob, which is too large to be sent together with its task."""
        request = pb.FetchRequest(blob=number)
        metadata = ((TOKEN_KEY, self._welcome.session_token),)
        chunks = [chunk async for chunk in self._fetch(request, metadata=metadata)]
        return b"".join([chunk for chunk in chunks if isinstance(chunk, memoryview)])

    async def _beat(self) -> None:
        interval = self._welcome.heartbeat_interval or 10.0
        while True:
            await asyncio.sleep(interval)
            try:
                await self._write(pb.WorkerMessage(heartbeat=pb.Heartbeat()), keep=False)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                pass  # reading from the stream fails, too, which is handled there

    async def _write(self, message: pb.WorkerMessage, *, keep: bool = True) -> None:
        """Write a message, which is kept until it has arrived if it must arrive."""
        async with self._writing:
            if self._welcome.resumable:
                if keep:
                    self._stream.stamp(message)
                else:
                    self._stream.acknowledge(message)
            await self._call.write(message)
