"""Pickles the results of tasks in a slot: small ones into the page, large ones into files."""

from __future__ import annotations

import errno
import pickle
import socket
from collections.abc import Callable
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from cloudexec import _direct, _records
from cloudexec._describing import describe, is_a, unfinished
from cloudexec._errors import PayloadError
from cloudexec._objects.places import Place
from cloudexec._payload import INLINE_BYTES
from cloudexec.worker import frames
from cloudexec.worker.outlet import Outlet

if TYPE_CHECKING:
    from cloudexec.worker.results import ResultFiles

__all__ = ["ResultPaths", "ResultWriter", "pickling_error", "remedy_for"]

_OWN_FILES = 16
"""Number of parts of one result from which on further ``bytes`` have no file of their own."""


class ResultPaths:
    """The ways by which results leave one slot.

    Args:
        outlet: Sends small results, and the descriptions of large ones.
        await_release: Returns once the supervisor has released a file.

    Attributes:
        direct_path: The client's socket for large data; empty if it is on another machine.
        token: The session's token, which the client asks for on that socket.
    """

    def __init__(self, outlet: Outlet, await_release: Callable[[], None]) -> None:
        self.outlet = outlet
        self.direct_path = ""
        self.token = b""
        self._await_release = await_release
        self._files: ResultFiles | None = None

    def files(self) -> ResultFiles:
        """Return the files into which large results are written."""
        if self._files is None:
            from cloudexec.worker.results import ResultFiles

            self._files = ResultFiles(self.outlet, self._await_release)
        return self._files

    def release(self, number: int) -> None:
        """Note that a blob has been taken; see ``ResultFiles.release``."""
        if self._files is not None:
            self._files.release(number)


class ResultWriter:
    """The file that the pickler writes to: it keeps a small result, and passes a large one on.

    Arrays and other buffers are written into files, which the supervisor opens, or the client on
    the same machine. A large pickle without buffers is sent to such a client while it is made.
    """

    def __init__(
        self, paths: ResultPaths, delivery: int, lease: int, seconds: float, *, keep: bool
    ) -> None:
        self._paths = paths
        self._delivery = delivery
        self._lease = lease
        self._seconds = seconds
        self._keep = keep
        self._pieces: list[bytes] = []
        self._size = 0
        self._direct: socket.socket | None = None
        self._records: list[bytes] = []
        self._places: list[Place] = []

    def write(self, data: Any) -> int:
        if type(data) is not bytes:
            data = bytes(data)
        if self._direct is not None:
            self._direct.sendall(_records.record(0, len(data)))
            self._direct.sendall(data)
            return len(data)
        if len(data) >= _records.LARGE and len(self._places) < _OWN_FILES and not self._goes_direct:
            # Where it arrives, a part of its own is read into its object, in large pages.
            self._flush()
            self._leave(4, [data], len(data))
            return len(data)
        self._pieces.append(data)
        self._size += len(data)
        if self._size > INLINE_BYTES and self._goes_direct:
            self._go_direct()
        return len(data)

    @property
    def _goes_direct(self) -> bool:
        return bool(self._paths.direct_path) and not (self._places or self._keep)

    def _flush(self) -> None:
        """Turn the pieces of the pickle so far into a record."""
        if self._size > INLINE_BYTES:
            self._leave(4, self._pieces, self._size)
        elif self._pieces:
            pickled = b"".join(self._pieces)
            self._records += (_records.record(0, len(pickled)), pickled)
        self._pieces, self._size = [], 0

    def _go_direct(self) -> None:
        paths = self._paths
        paths.outlet.flush()
        direct = _direct.connect(paths.direct_path, paths.token, _direct.DELIVER, self._lease)
        _direct.receive_exactly(direct, 1)
        pieces, self._pieces = self._pieces, []
        for piece in pieces:
            direct.sendall(_records.record(0, len(piece)))
            direct.sendall(piece)
        self._direct = direct

    def take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:
            return True
        if raw.nbytes <= INLINE_BYTES:
            return True
        # Results are writable copies, even of read-only buffers, as with a process pool.
        if self._direct is not None:
            self._direct.sendall(_records.record(1, raw.nbytes))
            self._direct.sendall(raw)
        else:
            self._leave(5, [raw], raw.nbytes)
        return False

    def _leave(self, kind: int, pieces: list[Any], size: int) -> None:
        place = self._paths.files().put(pieces, size)
        self._places.append(place)
        self._records.append(_records.record(kind, place.number))

    def close(self) -> None:
        """Finish the result, and report it."""
        outlet = self._paths.outlet
        if self._direct is not None:
            with self._direct as connection:
                connection.sendall(_records.END_RECORD)
                connection.shutdown(socket.SHUT_WR)
                _direct.receive_exactly(connection, 1)
            outlet.put(self._delivery, self._seconds, frames.DELIVERED, b"")
            return
        if not self._places and self._size <= INLINE_BYTES and not self._keep:
            outlet.put(self._delivery, self._seconds, frames.OK, b"".join(self._pieces))
            return
        self._flush()
        head = b"".join((*self._records, _records.END_RECORD))
        if len(head) > INLINE_BYTES:
            self._records.clear()
            self._leave(7, [head], len(head))
            head = self._records[0]
        self._paths.files().send(self._delivery, self._seconds, self._places, head, self._keep)

    def abandon(self, error: bytes) -> None:
        """Report that pickling the result has failed halfway."""
        if self._direct is not None:
            self._direct.close()
        if self._places:
            self._paths.files().drop(self._places)
        self._paths.outlet.put(self._delivery, self._seconds, frames.PICKLE_FAILED, error)


def pickling_error(exc: BaseException, value: Any) -> BaseException:
    """Return the exception of a task whose result cannot be pickled, or does not fit."""
    if not is_a(exc, Exception) or is_a(exc, PayloadError):
        return exc  # SystemExit stays as it is, as CPython's tests of its process pool expect
    if why := unfinished(value):
        if type(value) is CoroutineType:
            value.close()  # without this, Python warns that it was never awaited
        refused = PayloadError(f"the call returned {why}")
        refused.__cause__ = exc
        return refused
    said = ""
    remedy = remedy_for(exc)
    if not remedy:
        from cloudexec._unsendable import explain_value

        remedy = "; return something that survives pickle.dumps()"
        said = explain_value("the result", value, exc, result=True)
    error = PayloadError(said or f"the result could not be pickled ({describe(exc)}){remedy}")
    error.__cause__ = exc
    return error


def remedy_for(exc: BaseException) -> str:
    """Return a remedy if a payload does not fit; empty for any other exception."""
    if is_a(exc, MemoryError):
        return "; the worker has too little memory for it, or its limit (RLIMIT_AS) is too low"
    if type(exc) is OSError and exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "; the worker's disk is full, or its limit (RLIMIT_FSIZE) is too low"
    return ""
