"""The worker's session with the client: it connects, enrols, and exchanges messages.

If the connection is cut, the session goes on over the next one (``_wire.stream``).
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
from typing import Any

import cloudpickle

from cloudexec import _enrolment
from cloudexec._errors import LaunchError, ProtocolError
from cloudexec._objects.store import Blob
from cloudexec._proto import tasks_pb2 as pb
from cloudexec._rpc import call_errors, is_end, status_of
from cloudexec._versions import pack_versions
from cloudexec._wire.stream import Stream
from cloudexec.worker.birth import pull_seconds, seconds_since_start
from cloudexec.worker.blobs import BlobCache, Known
from cloudexec.worker.calls import CUT, Calls
from cloudexec.worker.dialing import REFUSED_FOR, Address, dial, shake_hands
from cloudexec.worker.downloads import fetch_blob, fetch_modules
from cloudexec.worker.inbox import Inbox
from cloudexec.worker.outbox import Outbox
from cloudexec.worker.supervisor import SlotPool
from cloudexec.worker.tasks import KILLED
from cloudexec.worker.uploads import Uploads

__all__ = ["Session"]

_FAREWELL = 5.0
"""Seconds to wait for a client that has received all messages to end the session. A platform gives
a worker no more time."""


class Session:
    """The session of a worker with its client, over one connection after the other.

    Args:
        address: The client's address.

    Attributes:
        welcome: The client's first message, with all settings.
        outbox: Takes the answers of the pool.
        flushed: Set when, after ``flush``, the client has received all messages.
    """

    def __init__(self, address: Address) -> None:
        self.welcome = pb.Welcome()
        self.flushed = asyncio.Event()
        self._address = address
        self._process = os.urandom(16)
        self._calls = Calls()
        self.outbox = Outbox(
            self._wake, lambda *args, **kwargs: self._uploads.composed(*args, **kwargs)
        )
        self._stream: Stream[pb.WorkerMessage] = Stream()
        self._call: Any = None
        self._straight: Any = None  # a plain connection, on which answers are sent at once
        self._acknowledge_handle: asyncio.TimerHandle | None = None
        # The session's progress, which does not depend on the connections.
        self._started = False
        self._heartbeat_due = False
        self._flushing = False
        self._said_goodbye = False
        self.pool: SlotPool | None = None
        """The slots; ``None`` before ``attach``, when no tasks can come yet."""

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to the client."""
        return self._calls.connected.is_set()

    def attach(self, pool: SlotPool, blobs: BlobCache) -> None:
        """Begin to serve: pass tasks to this pool from now on."""
        self.pool = pool
        self._blobs = blobs
        self._uploads: Uploads = Uploads(self._calls, self.outbox, pool, blobs, self._address.say)
        self._uploads.take_welcome(self.welcome)
        self._inbox = Inbox(pool, blobs, self.outbox, self._uploads)

    async def enrol(self, channel: Any) -> None:
        """Prove who we are, and check that the server knows the executor's key.

        Args:
            channel: The connection, which is used from now on.

        Raises:
            ProtocolError: If the server is an impostor, or refuses us; the message says why.
            CallError: If the connection fails.
        """
        address = self._address
        is_new = not self._calls.token
        pull = await asyncio.to_thread(pull_seconds) if is_new and address.job_id else 0.0
        hello = pb.Hello(
            wire_version=_enrolment.WIRE_VERSION,
            executor_id=address.executor_id,
            identity=address.identity,
            python_version=_enrolment.python_version(),
            cloudpickle_version=cloudpickle.__version__,
            slots=address.slots,
            pid=os.getpid(),
            job_id=address.job_id,
            attempt=address.attempt,
            boot_seconds=seconds_since_start() if is_new else 0.0,
            pull_seconds=pull,
            packages=pack_versions() if is_new and address.job_id else b"",
            process=self._process,
        )
        await self._calls.bind(channel)
        self._call = self._calls.session()
        answer = await shake_hands(
            self._call,
            hello,
            address.key,
            address.shown,
            token=self._calls.token,
            received=self._stream.received,
        )
        if answer.resumed:
            self._stream.arrived(answer.received)
            return
        self.welcome = answer.welcome
        self._calls.take_welcome(self.welcome)
        self.outbox.captures_output = self.welcome.capture_output
        if not is_new:
            self._address.say("another client takes this worker over")
            if self.pool is None:
                self._stream = Stream()
                self.outbox.hold_nothing()
            else:
                self._begin_anew()

    def _begin_anew(self) -> None:
        """Prepare for a client that takes this worker over, and has only the journal.

        Tasks that have a key in the journal go on, and their outcomes are sent again. All other
        tasks and messages were for the client that is gone, and are dropped.
        """
        pool, blobs, holdings = self.pool, self._blobs, self._inbox.holdings
        assert pool is not None
        sent = self._stream.missing()
        self._stream = Stream()
        self._uploads.take_welcome(self.welcome)
        running = pool.hand_back()
        self.outbox.begin_anew(sent, holdings, running, pool)
        # Kill tasks that no client knows any more, to free their slots.
        pool.kill([lease for lease in running if lease not in holdings], KILLED)
        pool.forget_functions(pool.functions())
        blobs.forget(blobs.all_but(pool.blobs_in_use()))
        self._uploads.mind_memory()
        pool.resume_output()
        self._uploads.allow(yes=False)

    # Requests to the client.

    async def load_blob(self, number: int, known: Known, blob: Blob) -> None:
        """Fetch the content of one of the client's blobs; see ``fetch_blob``."""
        await fetch_blob(self._calls, number, known, blob)

    async def fetch_modules(self) -> str:
        """Fetch the user's own modules, and return the directory that they were put into.

        Called before ``converse``. A connection that is cut meanwhile is replaced, because the
        client may have sent tasks already.

        Raises:
            LaunchError: If the client cannot be reached any more.
            ProtocolError: If the client has given this worker up.
            CallError: If the modules cannot be fetched although the client can be reached.
        """
        deadline = time.monotonic() + self.welcome.orphan_timeout
        pause = 0.1
        while True:
            try:
                return await fetch_modules(self._calls)
            except call_errors(asyncio.InvalidStateError) as exc:
                # InvalidStateError is raised if the channel is closed.
                is_cut = isinstance(exc, asyncio.InvalidStateError) or status_of(exc) in CUT
                if not self.welcome.resumable or not is_cut or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)
            await self._dial_again()

    async def _dial_again(self) -> None:
        """Replace a connection that was cut.

        Raises:
            LaunchError: If the client cannot be reached for ``orphan_timeout`` seconds.
            ProtocolError: If the client has given this worker up.
        """
        self._calls.note_cut()
        patience = self.welcome.orphan_timeout
        refusals = REFUSED_FOR if self.welcome.refused_is_gone else patience
        self._address.say(f"the connection was lost; dialing again, for {patience:g} s")
        await dial(self._address, self.enrol, patience, refusals)
        self._address.say("connected again")

    # The stream.

    def _wake(self) -> None:
        """Send the answers in the outbox soon, or at once over a plain connection."""
        outbox, frames = self.outbox, self._straight
        # ``_send`` reports that a slot is ready, because it also lets the slot begin then.
        if frames is None or self._flushing or not outbox.is_small or not frames.is_writable:
            outbox.wanted.set()
        elif (message := outbox.compose(self.pool)) is not None:
            frames.send_now(message.SerializeToString())
        else:
            outbox.wanted.set()

    async def converse(self, ends: asyncio.Queue[str]) -> str:
        """Exchange messages until the session ends; return how it ended.

        A connection that is cut is replaced, for ``orphan_timeout`` seconds. Tasks run on
        meanwhile.

        Args:
            ends: Takes a request to drain; the session goes on until that is done.

        Raises:
            Exception: If this code has a bug.
        """
        loop = asyncio.get_running_loop()
        while True:
            self._calls.connected.set()
            receiving = loop.create_task(self._receive(ends))
            sending = loop.create_task(self._send())
            both = (receiving, sending)
            try:
                done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
                if done == {sending} and self._said_goodbye:
                    # The client closes the stream once it has read all messages. Hanging up
                    # earlier may drop messages on their way, unless all were acknowledged. Without
                    # acknowledgements wait longer, because the client's process may be stopped.
                    most = _FAREWELL if self.welcome.resumable else self.welcome.orphan_timeout
                    await asyncio.wait({receiving}, timeout=most)
            finally:
                for task in both:
                    task.cancel()
                outcomes = await asyncio.gather(*both, return_exceptions=True)
            errors = [each for each in outcomes if isinstance(each, Exception)]
            for error in errors:
                if not isinstance(error, call_errors(asyncio.InvalidStateError)):
                    raise error
            if isinstance(outcomes[0], str):
                if self._said_goodbye:
                    self.flushed.set()
                return outcomes[0]
            if not self.welcome.resumable:
                return "disconnected"
            if self._said_goodbye:
                self.flushed.set()  # all messages were acknowledged before
                return "closed"
            try:
                await self._dial_again()
            except LaunchError as exc:
                self._address.say(str(exc))
                return "orphaned"
            except ProtocolError as exc:
                self._address.say(str(exc))
                return "gone"

    async def _send(self) -> None:
        """Send answers until the connection ends.

        Messages that were sent over an earlier connection and may not have arrived come first.
        While the connection is busy, answers are collected for the next message.
        """
        stream, resumable = self._stream, self.welcome.resumable
        outbox, wanted = self.outbox, self.outbox.wanted
        for sent in stream.missing():
            await self._call.write(sent)
        wanted.set()
        while True:
            await wanted.wait()
            wanted.clear()
            message = outbox.compose(self.pool)
            if message is not None:
                if resumable:
                    stream.stamp(message)
                await self._call.write(message)
                if message.ready and self.pool is not None:
                    self.pool.announced()
            elif self._heartbeat_due or stream.owes:
                await self._call.write(self._sign_of_life())
            elif self._flushing and stream.is_clear:
                await self._call.write(pb.WorkerMessage(goodbye=True))
                await self._call.done_writing()
                self._said_goodbye = True
                return
            else:
                continue
            if self._flushing:
                wanted.set()  # go on until nothing is left to write

    def _sign_of_life(self) -> pb.WorkerMessage:
        """Return a message that need not arrive: an acknowledgement, perhaps with a heartbeat."""
        message = pb.WorkerMessage()
        self._stream.acknowledge(message)
        if self._heartbeat_due and self.pool is not None:
            self._heartbeat_due = False
            message.heartbeat.resident_bytes = (
                resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            )
            message.heartbeat.running = self.pool.running
            message.heartbeat.queued = self.pool.queued
        return message

    async def flush(self) -> None:
        """Send all remaining messages and large results, and close this end of the stream.

        ``flushed`` is set when all of them have arrived.
        """
        await self._uploads.wait_for_deliveries()
        self._flushing = True
        self.outbox.wanted.set()

    async def beat(self) -> None:
        """Send heartbeats, which show that the supervisor lives even if its tasks hang."""
        interval = self.welcome.heartbeat_interval or 10.0
        while True:
            await asyncio.sleep(interval)
            if self.pool is not None:
                self.pool.audit()
            self._heartbeat_due = True
            self._wake()

    async def _receive(self, ends: asyncio.Queue[str]) -> str:
        """Handle messages until the client ends the session; return how it ended."""
        pool = self.pool
        assert pool is not None
        if not self._started:
            first = (*self.welcome.initializer_blobs, *self.welcome.function_blobs)
            await self._blobs.ready([blob.id for blob in first])
            self._started = True
            pool.start()
        call = self._call
        if (frames := getattr(call, "frames", None)) is not None:
            frames.at_once = self._take_at_once
            self._straight = frames
        while True:
            message = await call.read()
            if is_end(message):
                return "closed"
            if not self._is_news(message):
                continue
            self._inbox.take(message, self._stream.missing)
            if message.terminate:
                return "terminate"
            if message.drain:
                ends.put_nowait("drain")

    def _take_at_once(self, data: bytes) -> bool:
        """Handle a message of a plain connection at once; return false to leave it to be read."""
        message = pb.ServerMessage.FromString(data)
        if message.terminate or message.drain:
            return False
        self._inbox.take(message, self._stream.missing)
        return True

    def _is_news(self, message: pb.ServerMessage) -> bool:
        """Note a message's number; say whether the message is new and must be handled."""
        stream = self._stream
        try:
            is_news = stream.take(message)
        except ValueError as exc:
            raise ProtocolError(f"the client's messages are out of order: {exc}") from exc
        if stream.has_begun:
            self._uploads.allow(yes=True)
        if self._flushing and stream.is_clear:
            self.outbox.wanted.set()
        pause = stream.acknowledge_within
        if pause == 0:
            self.outbox.wanted.set()
        elif pause is not None and self._acknowledge_handle is None:
            loop = asyncio.get_running_loop()
            self._acknowledge_handle = loop.call_later(pause, self._acknowledge)
        return is_news

    def _acknowledge(self) -> None:
        self._acknowledge_handle = None
        if self._stream.owes:
            self.outbox.wanted.set()

    async def close(self) -> None:
        """Close the connection."""
        if self._acknowledge_handle is not None:
            self._acknowledge_handle.cancel()
        if self.pool is not None:
            await self._uploads.close()
        await self._calls.close()
