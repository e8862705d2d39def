"""The client's end of the direct channel, a Unix socket for large data of workers on this machine.

A connection carries one transfer: a blob to a worker, an open file, or a large result to the
client. Each transfer that is under way has a thread of its own; at least one thread is always
there.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import socket
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Any

from cloudexec import _direct, _records, _sharing
from cloudexec._describing import describe, presentable
from cloudexec._errors import PayloadError
from cloudexec._log import Log
from cloudexec._memory import room_for
from cloudexec._objects.options import memory_of_machine
from cloudexec._objects.store import Blob, BlobStore
from cloudexec._payload import compose
from cloudexec._records import Composed

__all__ = ["DirectChannel", "Delivered", "unpickle_result"]

_logger = Log()
_REQUEST_TIMEOUT = 10.0
"""Seconds within which a peer must send its request."""
_ACCEPT_PAUSE = 0.1
_LOOK_PAUSE = 1.0
"""Seconds after which a thread that waits for the loop checks whether the loop still runs."""
_MOST_CONNECTIONS = 1024
_GATHERED_BYTES = 8 * 1024 * 1024
"""Bytes: pieces of a pickle that is not unpickled at once are joined into blobs of this size."""


class Delivered:
    """A large result that was unpickled while it arrived, or the error of that."""

    __slots__ = ("error", "value")

    def __init__(self, value: Any, error: BaseException | None) -> None:
        self.value = value
        self.error = error


def unpickle_result(load: Callable[[], Any]) -> Delivered:
    """Unpickle a large result. Errors other than those of the connection become its error.

    Raises:
        EOFError: If the connection ends early.
        OSError: If the connection fails.
    """
    try:
        return Delivered(load(), None)
    except (EOFError, OSError):
        raise
    except BaseException as exc:
        error = PayloadError(f"the result could not be unpickled in the client ({describe(exc)})")
        error.__cause__ = presentable(exc)
        return Delivered(None, error)


def _gather(fill: Callable[[memoryview], None], store: BlobStore) -> Composed:
    """Receive a large result without unpickling it.

    Args:
        fill: Fills a buffer with the next bytes of the connection.
        store: Takes the result's blobs.

    Raises:
        PayloadError: If the store has no room for it, or it has records that slots never send.
    """
    header = bytearray(_records.RECORD.size)
    records: list[bytes] = []
    blobs: dict[int, Blob] = {}
    pickled = bytearray()

    def leave(kind: int, content: bytearray) -> None:
        blob = store.take_over(len(content), content=content, spill=True)
        blobs[blob.id] = blob
        records.append(_records.record(kind, blob.id))

    while True:
        fill(memoryview(header))
        kind, left = _records.RECORD.unpack(header)
        if kind == _records.END:
            break
        if kind not in (_records.IN_BAND, _records.BUFFER):
            raise PayloadError(f"a large result with records of type {kind}")
        if kind == _records.BUFFER:
            if pickled:  # the records must stay in their order
                leave(_records.IN_BAND_BLOB, pickled)
                pickled = bytearray()
            if not store.has_room(left):
                raise PayloadError(f"there is no room for a result of {left} bytes")
            whole = room_for(left)
            fill(memoryview(whole))
            leave(_records.BUFFER_BLOB, whole)
            continue
        while left:
            piece = bytearray(min(left, _GATHERED_BYTES))
            fill(memoryview(piece))
            left -= len(piece)
            pickled += piece
            if len(pickled) >= _GATHERED_BYTES:
                leave(_records.IN_BAND_BLOB, pickled)
                pickled = bytearray()
    if pickled:
        leave(_records.IN_BAND_BLOB, pickled)
    return compose(records, blobs, store)


class DirectChannel:
    """Listens on the Unix socket of the direct channel.

    The functions that it is given are called on the loop thread.

    Args:
        path: The socket's path, in a directory that only this user can enter.
        blob_of: Returns the blob of a session's token and a blob's number, or ``None``.
        expects: Says whether the result of a session's token and a lease is expected.
        deliver: Takes a result that has arrived, with its token and lease.
        knows: Returns the session of a token, or ``None``.
        gathers: Store for results that stay pickled, as a journal needs them. With ``None``,
            results are unpickled while they arrive.
    """

    def __init__(
        self,
        path: str,
        blob_of: Callable[[bytes, int], Blob | None],
        expects: Callable[[bytes, int], bool],
        deliver: Callable[[bytes, int, Delivered | Composed], None],
        knows: Callable[[bytes], object],
        gathers: BlobStore | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._blob_of = blob_of
        self._expects = expects
        self._deliver = deliver
        self._knows = knows
        self._gathers = gathers
        self._connections: set[socket.socket] = set()
        self._waiting: queue.SimpleQueue[socket.socket | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False
        # The first thread starts now, because none can be started while the interpreter ends.
        self._start_thread()
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind(path)
        os.chmod(path, 0o600)
        self._listener.listen(256)
        self._loop.add_reader(self._listener.fileno(), self._accept)
        # A spare file, which is closed to accept a connection when the program has no file left.
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError:
            # Too many files are open. One connection takes the place of the spare file. The next
            # one is accepted when that transfer has ended, or the program has closed some files.
            if self._spare >= 0:
                os.close(self._spare)
                self._spare = -1
                self._accept()
            else:
                self._loop.remove_reader(self._listener.fileno())
                self._loop.call_later(_ACCEPT_PAUSE, self._accept_again)
            return
        if len(self._connections) >= _MOST_CONNECTIONS:
            connection.close()
            return
        with self._lock:
            self._connections.add(connection)
            busy = len(self._connections)
        self._waiting.put(connection)
        if busy > len(self._threads):
            self._start_thread()

    def _accept_again(self) -> None:
        if self._closed:
            return
        try:
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._loop.call_later(_ACCEPT_PAUSE, self._accept_again)
        else:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _start_thread(self) -> None:
        thread = threading.Thread(target=self._run, name="cloudexec-direct", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            return  # the interpreter ends: the transfer waits for a thread that exists
        self._threads.append(thread)

    def _run(self) -> None:
        while (connection := self._waiting.get()) is not None:
            self._serve(connection)

    def _on_loop(self, fn: Callable[..., Any], *args: object) -> Any:
        async def call() -> Any:
            return fn(*args)

        calling = asyncio.run_coroutine_threadsafe(call(), self._loop)
        while True:
            try:
                return calling.result(_LOOK_PAUSE)
            except TimeoutError:
                # Go on waiting, unless the loop may have ended and will never answer.
                if self._closed or calling.done():
                    raise

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                    connection.setsockopt(socket.SOL_SOCKET, option, _direct.BUFFER_BYTES)
                connection.settimeout(_REQUEST_TIMEOUT)
                # An honest peer sends the request whole. One that sends it byte by byte, and would
                # occupy this thread, is dropped.
                request = connection.recv(_direct.REQUEST.size)
                if len(request) != _direct.REQUEST.size:
                    return
                token, wanted, number = _direct.REQUEST.unpack(request)
                connection.settimeout(None)
                if wanted == _direct.FETCH:
                    self._send(connection, token, number)
                elif wanted == _direct.FILE and self._on_loop(self._knows, token):
                    _sharing.send_file(connection, number)
                elif wanted == _direct.DELIVER and self._on_loop(self._expects, token, number):
                    self._receive(connection, token, number)
        except (EOFError, OSError, RuntimeError, CancelledError):
            pass  # the slot's process died, which is reported otherwise, or the executor ended
        except BaseException:
            _logger.exception("internal error in a transfer")  # the slot sees a closed connection
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _send(self, connection: socket.socket, token: bytes, number: int) -> None:
        blob = self._on_loop(self._blob_of, token, number)
        if blob is not None:
            connection.sendall(_direct.ACCEPTED)
            connection.sendall(blob.view())

    def _receive(self, connection: socket.socket, token: bytes, lease: int) -> None:
        connection.sendall(_direct.ACCEPTED)

        def fill(view: memoryview) -> None:
            _direct.fill_from(connection, view)

        store = self._gathers
        if store is not None:
            delivered = unpickle_result(lambda: _gather(fill, store))
        else:
            delivered = unpickle_result(lambda: _records.load_records(fill, memory_of_machine()))
        if delivered.error is not None:
            # The slot is still sending. Read the rest, so that it does not fail halfway.
            connection.settimeout(_REQUEST_TIMEOUT)
            with contextlib.suppress(TimeoutError):
                while connection.recv(1 << 20) != b"":
                    pass
        gathered = type(delivered.value) is Composed
        self._on_loop(self._deliver, token, lease, delivered.value if gathered else delivered)
        del delivered
        with contextlib.suppress(OSError):
            connection.sendall(_direct.ACCEPTED)

    def close(self) -> None:
        """Stop listening, and cut the transfers that are under way."""
        self._closed = True
        self._loop.remove_reader(self._listener.fileno())
        self._listener.close()
        if self._spare >= 0:
            os.close(self._spare)
        with self._lock:
            for connection in self._connections:
                with contextlib.suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
        for _ in self._threads:
            self._waiting.put(None)

    def join(self) -> None:
        """Wait for the threads, after ``close``. The loop thread must not call this."""
        for thread in self._threads:
            thread.join()
