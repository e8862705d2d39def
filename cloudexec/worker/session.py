"""The worker's session with the client: dial, enrol, then tasks in and answers out."""

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
"""Seconds for which a client that has all is waited for: a platform gives a worker no more time."""


class Session:
    """What a worker and its client say to each other, over one connection after the other.

    Args:
        address: Of the client.

    Attributes:
        welcome: What the client said at the start.
        outbox: Where the answers of the pool go.
        flushed: Set when, after ``flush``, the client has all that was to be said.
    """

    def __init__(self, address: Address) -> None:
        self.welcome = pb.Welcome()
        self.flushed = asyncio.Event()
        self._address = address
        self._calls = Calls()
        self.outbox = Outbox(
            self._wake, lambda *args, **kwargs: self._uploads.composed(*args, **kwargs)
        )
        self._stream: Stream[pb.WorkerMessage] = Stream()
        self._call: Any = None
        self._straight: Any = None  # a plain connection that is ready for answers
        self._acknowledge_handle: asyncio.TimerHandle | None = None
        # How far it is; each of these is independent of the connections that come and go.
        self._started = False
        self._heartbeat_due = False
        self._flushing = False
        self._said_goodbye = False
        self.pool: SlotPool | None = None
        """``None``: tasks cannot come yet, as ``attach`` has not been called."""

    @property
    def is_connected(self) -> bool:
        """Whether there is a connection to the client."""
        return self._calls.connected.is_set()

    def attach(self, pool: SlotPool, blobs: BlobCache) -> None:
        """Begin to serve: tasks go to this pool from now on."""
        self.pool = pool
        self._blobs = blobs
        self._uploads: Uploads = Uploads(self._calls, self.outbox, pool, blobs, self._address.say)
        self._uploads.take_welcome(self.welcome)
        self._inbox = Inbox(pool, blobs, self.outbox, self._uploads)

    async def enrol(self, channel: Any) -> None:
        """Prove who we are and check that the server is the right one.

        Args:
            channel: The connection that is to be used from now on.

        Raises:
            ProtocolError: The server is an impostor, or refuses us; the message says why.
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
        """Prepare for a client that has the journal of the one before, and nothing else.

        What runs goes on, if it has a name in the journal; what came of it is said again. All else
        that is here was for a client that is gone.
        """
        pool, blobs, holdings = self.pool, self._blobs, self._inbox.holdings
        assert pool is not None
        sent = self._stream.missing()
        self._stream = Stream()
        self._uploads.take_welcome(self.welcome)
        running = pool.hand_back()
        self.outbox.begin_anew(sent, holdings, running, pool)
        # What nobody knows any more does not stand in the way of what comes.
        pool.kill([lease for lease in running if lease not in holdings], KILLED)
        pool.forget_functions(pool.functions())
        blobs.forget(blobs.all_but(pool.blobs_in_use()))
        self._uploads.mind_memory()
        pool.resume_output()
        self._uploads.allow(yes=False)

    # What the client is asked for.

    async def load_blob(self, number: int, known: Known, blob: Blob) -> None:
        """Fetch a blob of the client's into a file; see ``fetch_blob``."""
        await fetch_blob(self._calls, number, known, blob)

    async def fetch_modules(self) -> str:
        """Fetch the user's own modules, before ``converse``; return the directory they are in now.

        A connection that is cut meanwhile is replaced, as later: tasks may have been sent already.

        Raises:
            LaunchError: If the client cannot be reached any more.
            ProtocolError: If it has given this worker up.
            CallError: If they do not come although it can be reached.
        """
        deadline = time.monotonic() + self.welcome.orphan_timeout
        pause = 0.1
        while True:
            try:
                return await fetch_modules(self._calls)
            except call_errors(asyncio.InvalidStateError) as exc:
                # The latter is of a channel that is closed.
                is_cut = isinstance(exc, asyncio.InvalidStateError) or status_of(exc) in CUT
                if not self.welcome.resumable or not is_cut or time.monotonic() > deadline:
                    raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, 5.0)
            await self._dial_again()

    async def _dial_again(self) -> None:
        """Replace a connection that was cut.

        Raises:
            LaunchError: If the client cannot be reached for as long as it may stay away.
            ProtocolError: If it has given this worker up.
        """
        self._calls.note_cut()
        patience = self.welcome.orphan_timeout
        refusals = REFUSED_FOR if self.welcome.refused_is_gone else patience
        self._address.say(f"the connection was lost; dialing again, for {patience:g} s")
        await dial(self._address, self.enrol, patience, refusals)
        self._address.say("connected again")

    # The stream.

    def _wake(self) -> None:
        """See to it that what there is to say is sent soon, or at once."""
        outbox, frames = self.outbox, self._straight
        # The client is told that a slot is ready by the one who then lets it begin.
        if frames is None or self._flushing or not outbox.is_small or not frames.is_writable:
            outbox.wanted.set()
        elif (message := outbox.compose(self.pool)) is not None:
            frames.send_now(message.SerializeToString())
        else:
            outbox.wanted.set()

    async def converse(self, ends: asyncio.Queue[str]) -> str:
        """Exchange messages until the session ends; say how it ended.

        A connection that is cut is replaced, for as long as the client may stay away: what runs
        here goes on meanwhile.

        Args:
            ends: Where a request to drain goes: the session goes on until that is done.

        Raises:
            Exception: A bug of ours.
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
                    # The client closes its half once it has read all: to hang up before may
                    # overtake what is on its way. Nothing is, if all was acknowledged.
                    # Otherwise it may be stopped for a while, as a program may be.
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
                self.flushed.set()  # it was acknowledged before
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
        """Send answers as they come, in batches as large as the stream makes them.

        What was sent over an earlier connection, and may not have arrived, comes first.
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
                wanted.set()  # until there is nothing more to write

    def _sign_of_life(self) -> pb.WorkerMessage:
        """Return what need not arrive."""
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
        """Send what is left, large results included, and close our half of the stream.

        ``flushed`` is set when all of it has arrived.
        """
        await self._uploads.wait_for_deliveries()
        self._flushing = True
        self.outbox.wanted.set()

    async def beat(self) -> None:
        """Send a heartbeat now and then: the supervisor lives, whatever its tasks do."""
        interval = self.welcome.heartbeat_interval or 10.0
        while True:
            await asyncio.sleep(interval)
            if self.pool is not None:
                self.pool.audit()
            self._heartbeat_due = True
            self._wake()

    async def _receive(self, ends: asyncio.Queue[str]) -> str:
        """Take messages until the client ends the session; say how it ended."""
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
        """Take a message as it comes over a plain connection; False: it is to be read."""
        message = pb.ServerMessage.FromString(data)
        if message.terminate or message.drain:
            return False
        self._inbox.take(message, self._stream.missing)
        return True

    def _is_news(self, message: pb.ServerMessage) -> bool:
        """Take note of a message's number; say whether it is to be read."""
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
