"""Callables, arguments, results and exceptions <-> cloudpickle bytes.

A payload is plain ``bytes`` as long as it is small. A large one is :class:`Parts`: the pieces that
the pickler wrote, large ``bytes`` objects among them by reference and large writeable buffers as
one copy, so that it can be sent in chunks, and unpickled while the chunks arrive, with no second
copy of the whole on either side.

The chunks of a large payload join to a sequence of records: one byte of type, eight of length
(little-endian), then as many bytes. Type 0 is the next piece of the pickle, type 1 the next
out-of-band buffer (before the piece that refers to it), type 2 the same but read-only; type 3 ends
the payload.
"""

from __future__ import annotations

import pickle
import struct
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from types import NoneType
from typing import Any

import cloudpickle

from cloudexec import _inputs
from cloudexec._errors import PayloadError, RemoteTraceback

__all__ = [
    "CHUNK_BYTES",
    "INLINE_BYTES",
    "Parts",
    "Payload",
    "Unfinished",
    "dumps",
    "dumps_call",
    "load_chunks",
]

INLINE_BYTES = 64 * 1024
"""Largest payload that travels inside a control message (gRPC moves small messages whole)."""
CHUNK_BYTES = 1024 * 1024
"""Bytes per chunk of a large payload: gRPC moves these 30 times faster than one of 256 MiB."""

EXCEPTION_BYTES = 4 * 1024 * 1024
"""Largest exception that travels as itself: it rides in a control message."""
_TEXT_KEPT = 16 * 1024
_TRACEBACK_KEPT = 128 * 1024

_RECORD = struct.Struct("<BQ")
_IN_BAND, _BUFFER, _READONLY_BUFFER, _END = 0, 1, 2, 3
END_RECORD = _RECORD.pack(_END, 0)
_ATOMS = frozenset({int, float, complex, bool, NoneType})
_loads = pickle.loads


class Parts:
    """A large payload in pieces."""

    __slots__ = ("pieces", "size")

    def __init__(self, pieces: list[bytes | memoryview], size: int) -> None:
        self.pieces = pieces
        self.size = size

    def __len__(self) -> int:
        return self.size

    def chunks(self, size: int = CHUNK_BYTES) -> Iterator[bytes | memoryview]:
        """Cut the payload into chunks of at most ``size`` bytes; large pieces are not copied."""
        small: list[bytes | memoryview] = []
        pending = 0
        for piece in self.pieces:
            if len(piece) + pending <= size:
                small.append(piece)
                pending += len(piece)
                continue
            if small:
                yield b"".join(small)
                small, pending = [], 0
            view = memoryview(piece)
            whole = len(view) - len(view) % size
            for start in range(0, whole, size):
                yield view[start : start + size]
            if whole < len(view):
                small, pending = [view[whole:]], len(view) - whole
        if small:
            yield b"".join(small)


Payload = bytes | Parts


class Unfinished:
    """A call that was pickled with placeholders for the futures among its arguments.

    Attributes:
        payload: The pickle; it cannot be unpickled alone.
        futures: Whose results belong in the placeholders, by index. Each stands here once, however
            often it stands among the arguments.
    """

    __slots__ = ("futures", "payload")

    def __init__(self, payload: Payload, futures: list[Future[Any]]) -> None:
        self.payload = payload
        self.futures = futures


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """cloudpickle's, but arrays arrive writeable, as they do through a process pool."""

    futures: list[Future[Any]] | None = None
    """Those met so far, where futures may be arguments; ``None``: they may not."""

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind.__module__ == "numpy" and kind.__name__ == "ndarray":
            if not obj.flags.writeable:
                return obj.copy().__reduce_ex__(5)
            return NotImplemented
        if issubclass(kind, Future):
            return self._place(obj)
        return super().reducer_override(obj)

    def _place(self, future: Future[Any]) -> Any:
        """Pickle a future: as its value, if that is at hand, or as a placeholder."""
        futures = self.futures
        if futures is None:
            raise TypeError(
                "a future cannot be sent: pass it as an argument of submit(), and the call gets "
                "its value, or pass its result()"
            )
        # Bytes that nobody has decoded yet are better passed on as they are.
        decoded = getattr(future, "_decode", None) is None
        if future.done() and decoded and not future.cancelled() and future.exception() is None:
            return _inputs.same, (future.result(),)
        futures.append(future)
        return _inputs.take, (len(futures) - 1,)


class _Collector:
    """A file for the pickler: large bytes objects reach ``write`` themselves, not as copies."""

    def __init__(self) -> None:
        self.records: list[tuple[int, bytes | memoryview]] = []
        self.size = 0

    def write(self, data: Any) -> int:
        if type(data) is not bytes:
            data = bytes(data)
        self.records.append((_IN_BAND, data))
        self.size += len(data)
        return len(data)

    def take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:
            return True  # not contiguous: pickled in band
        if raw.nbytes <= INLINE_BYTES:
            return True
        # A snapshot now: the caller may change a writeable buffer as soon as submit() returns.
        # Only bytes never change; a read-only view may show what others write.
        data = raw if type(raw.obj) is bytes else memoryview(bytes(raw))
        self.records.append((_READONLY_BUFFER if raw.readonly else _BUFFER, data))
        self.size += raw.nbytes
        return False

    def payload(self) -> Payload:
        in_band_only = all(kind == _IN_BAND for kind, _ in self.records)
        if in_band_only and self.size <= INLINE_BYTES:
            if len(self.records) == 1:
                return self.records[0][1]  # type: ignore[return-value]
            return b"".join(data for _, data in self.records)
        pieces: list[bytes | memoryview] = []
        for kind, data in self.records:
            pieces.append(_RECORD.pack(kind, len(data)))
            pieces.append(data)
        pieces.append(END_RECORD)
        return Parts(pieces, sum(map(len, pieces)))


def dumps(obj: object) -> Payload:
    """Pickle one object, by value what cannot be imported elsewhere.

    Raises:
        BaseException: Whatever pickling raises.
    """
    if type(obj) in _ATOMS:
        return pickle.dumps(obj, 5)
    collector = _Collector()
    Pickler(collector, protocol=5, buffer_callback=collector.take_buffer).dump(obj)
    return collector.payload()


def _is_plain(values: tuple[Any, ...]) -> bool:
    """Whether plain pickle, an order of magnitude faster than cloudpickle, gives the same."""
    for value in values:
        kind = type(value)
        if kind in _ATOMS:
            continue
        if (kind is str or kind is bytes) and len(value) < 16384:
            continue
        if kind is tuple and len(value) <= 8 and _is_plain(value):
            continue
        return False
    return True


def dumps_arguments(args: tuple[Any, ...], kwargs: dict[str, Any] | None) -> Payload | Unfinished:
    """Pickle a call's arguments: a tuple, or a list of tuple and dict where there are keywords."""
    if not kwargs:
        if _is_plain(args):
            return pickle.dumps(args, 5)
        return _dumps_unfinished(args)
    return _dumps_unfinished([args, kwargs])


def _dumps_unfinished(obj: object) -> Payload | Unfinished:
    """Pickle what may have futures in it: the pickler comes by every object anyway."""
    collector = _Collector()
    pickler = Pickler(collector, protocol=5, buffer_callback=collector.take_buffer)
    futures: list[Future[Any]] = []
    pickler.futures = futures
    pickler.dump(obj)
    return Unfinished(collector.payload(), futures) if futures else collector.payload()


_TOGETHER = struct.Struct("<I")


def dumps_call(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Payload | Unfinished:
    """Pickle a whole call together, so that what callable and arguments share stays shared."""
    return _dumps_unfinished((fn, args, kwargs))


class _RecordReader:
    """A file for the unpickler that keeps out-of-band buffers apart from the pickle."""

    def __init__(self, fill: Callable[[memoryview], None]) -> None:
        self._fill = fill
        self._left = 0  # of the current in-band record
        self._ended = False
        self.buffers: deque[Any] = deque()

    def _next_record(self) -> bool:
        """Move on to the next piece of pickle, loading the buffers that stand before it."""
        header = bytearray(_RECORD.size)
        while not self._ended:
            self._fill(memoryview(header))
            kind, length = _RECORD.unpack(header)
            if kind == _IN_BAND:
                self._left = length
                if length:
                    return True
            elif kind in (_BUFFER, _READONLY_BUFFER):
                buffer = bytearray(length)
                self._fill(memoryview(buffer))
                self.buffers.append(
                    memoryview(buffer).toreadonly() if kind == _READONLY_BUFFER else buffer
                )
            elif kind == _END:
                self._ended = True
            else:
                raise pickle.UnpicklingError(f"unknown record type {kind} in a payload")
        return False

    def finish(self) -> None:
        """Check that the payload ends where the pickle does."""
        if self._left or self._next_record():
            raise pickle.UnpicklingError("there is more after the end of the pickle")

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        at = 0
        while at < len(view):
            if not self._left and not self._next_record():
                break
            n = min(len(view) - at, self._left)
            self._fill(view[at : at + n])
            self._left -= n
            at += n
        return at

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            raise pickle.UnpicklingError("unbounded read of a payload")
        data = bytearray(size)
        n = self.readinto(data)
        return bytes(data[:n]) if n < size else bytes(data)

    def readline(self) -> bytes:
        line = bytearray()
        while byte := self.read(1):
            line += byte
            if byte == b"\n":
                break
        return bytes(line)

    def __iter__(self) -> Iterator[Any]:
        while True:
            # A buffer stands before the piece of pickle that refers to it.
            yield self.buffers.popleft()


def load_records(fill: Callable[[memoryview], None]) -> Any:
    """Unpickle a large payload while it arrives.

    Args:
        fill: Fills the whole of a buffer with the next bytes, waiting for them if need be.

    Raises:
        BaseException: Whatever ``fill`` or unpickling raises.
    """
    reader = _RecordReader(fill)
    value = pickle.Unpickler(reader, buffers=iter(reader)).load()
    reader.finish()
    return value


def load_chunks(next_chunk: Callable[[], bytes | memoryview | None]) -> Any:
    """Unpickle a large payload while its chunks arrive.

    Args:
        next_chunk: Returns the next chunk, waiting for it if need be, or ``None`` at the end.

    Raises:
        EOFError: If the chunks end early.
        BaseException: Whatever ``next_chunk`` or unpickling raises.
    """
    chunk = memoryview(b"")

    def fill(target: memoryview) -> None:
        nonlocal chunk
        at = 0
        while at < len(target):
            if not len(chunk):
                following = next_chunk()
                if following is None:
                    raise EOFError("the payload ended early")
                chunk = memoryview(following)
            n = min(len(target) - at, len(chunk))
            target[at : at + n] = chunk[:n]
            chunk = chunk[n:]
            at += n

    return load_records(fill)


def record(kind: int, size: int) -> bytes:
    """Return the header of one record."""
    return _RECORD.pack(kind, size)


def loads_payload(payload: Payload) -> Any:
    """Unpickle a payload that is here as a whole."""
    if isinstance(payload, bytes):
        return _loads(payload)
    chunks = payload.chunks()
    return load_chunks(lambda: next(chunks, None))


def dumps_exception(exc: BaseException) -> bytes:
    """Pickle an exception with its traceback as text, for the client.

    What does not survive the round trip (a required ``__init__`` argument that ``args`` does not
    hold, an attribute that cannot be pickled) arrives as a PayloadError that carries the text.
    """
    # The first frame is the worker's own.
    tb = exc.__traceback__
    text = "".join(traceback.format_exception(type(exc), exc, tb.tb_next if tb else None))
    if len(text) > 2 * _TRACEBACK_KEPT:
        text = f"{text[:_TRACEBACK_KEPT]}\n[...]\n{text[-_TRACEBACK_KEPT:]}"
    try:
        plain = _without_links(exc)
        data: bytes = cloudpickle.dumps(plain, 5)
        if len(data) > EXCEPTION_BYTES:
            raise PayloadError(f"it has {len(data)} bytes, and {EXCEPTION_BYTES} are allowed")
        if type(_loads(data)) is not type(exc) and type(exc).__module__ != "__main__":
            raise PayloadError("the exception changed its type in the round trip")
    except BaseException as why:
        text = text[-_TEXT_KEPT:]
        replacement = PayloadError(
            f"the task raised {type(exc).__qualname__}, which cannot be sent "
            f"({type(why).__name__}: {_text_of(why)}); make it survive "
            f"pickle.loads(pickle.dumps(exc)). Its text: {_text_of(exc)}"
        )
        data = pickle.dumps(replacement, 5)
    # Apart from each other: the traceback arrives although the exception cannot be loaded there.
    return pickle.dumps((data, text), 5)


def _text_of(exc: BaseException) -> str:
    try:
        return str(exc)[:_TEXT_KEPT]
    except Exception:
        return "(its __str__ fails)"


def _without_links(exc: BaseException) -> BaseException:
    exc.__traceback__ = None
    return exc


def loads_exception(data: bytes) -> BaseException:
    """Unpickle an exception; its remote traceback is its ``__cause__``."""
    pickled, text = _loads(data)
    exc: BaseException
    try:
        loaded = _loads(pickled)
        if not isinstance(loaded, BaseException):
            raise TypeError(f"{type(loaded).__name__} is no exception")
        exc = loaded
    except KeyboardInterrupt:
        raise
    except BaseException as why:
        exc = PayloadError(
            f"the task raised an exception that cannot be unpickled here "
            f"({type(why).__name__}: {why}); is its module importable in the client?"
        )
    exc.__cause__ = RemoteTraceback(text)
    return exc
