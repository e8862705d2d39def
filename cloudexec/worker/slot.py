"""A slot: a process that runs one task at a time."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import multiprocessing.resource_tracker  # noqa: F401 (here, before slots are forked)
import os
import pickle
import socket
import struct
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from time import perf_counter
from types import CoroutineType
from typing import TYPE_CHECKING, Any

from cloudexec import _direct, _logs, _nesting, _payload, _records, _settings, _sharing
from cloudexec._anew import set_process_number
from cloudexec._describing import describe, if_not_found, is_a, unfinished
from cloudexec._errors import NestingError, PayloadError
from cloudexec._forked import end_child
from cloudexec._objects.places import BlobGoneError, DirectSource, FileSource, Place, unpack_places
from cloudexec._objects.segments import map_file
from cloudexec._payload import INLINE_BYTES
from cloudexec.worker import frames
from cloudexec.worker.frames import (
    COMPOSED,
    CURRENT,
    FENCE,
    FLUSHES,
    FUNCTION,
    FUNCTION_NUMBER,
    HEADER,
    KEPT,
    PAGE_BYTES,
    RESULT,
    RESULTS_AT,
    USED,
    WAITING,
    Kind,
    write_all,
)
from cloudexec.worker.process import become

if TYPE_CHECKING:
    from cloudexec.worker.main_module import Definition, MainModule
    from cloudexec.worker.results import ResultFiles

__all__ = ["Slot"]

_FLUSH_AFTER = 0.001
"""Seconds that a finished result may wait in the buffer while the batch goes on."""
_FLUSH_BYTES = 64 * 1024
_OUTPUT_BYTES = 32 * 1024
_FAILURE = struct.Struct("<fB")
_loads = pickle.loads
_result_header = RESULT.pack_into


class _Output(io.RawIOBase):
    """What ``sys.stdout`` and ``sys.stderr`` of a task end in: frames that name the task."""

    def __init__(self, slot: Slot, stream: int) -> None:
        self._slot = slot
        self._stream = stream

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self._slot.forked:
            # A child of the task: the pipe of frames is its parent's alone.
            write_all(self._stream, view)
            return len(view)
        for start in range(0, len(view), _OUTPUT_BYTES):
            self._slot.send_output(self._stream, bytes(view[start : start + _OUTPUT_BYTES]))
        return len(view)


class Slot:
    """The child's side of the two pipes and the shared page.

    Args:
        tasks_fd: Read end of the pipe with frames for the slot.
        results_fd: Write end of the pipe with its answers.
        page_fd: File of the shared page.
    """

    def __init__(self, tasks_fd: int, results_fd: int, page_fd: int) -> None:
        self._tasks_fd = tasks_fd
        self._results_fd = results_fd
        self._page = map_file(page_fd, PAGE_BYTES, writable=True)
        os.close(page_fd)
        self._cells = self._page[:RESULTS_AT].cast("Q")
        self._room = PAGE_BYTES - RESULTS_AT
        self._used = 0
        self._flushed_at = 0.0
        self._lock = threading.Lock()
        self._input = bytearray()
        self._at = 0
        self._read = 0  # bytes, of all that was written to it
        self._functions: dict[int, Any] = {}
        self._main: MainModule = None  # type: ignore[assignment]  # until it is set up
        self._variables: tuple[int, dict[str, str]] | None = None  # of the task that comes next
        self._stash: deque[tuple[int, int, bytes]] = deque()
        self._results: ResultFiles | None = None
        self.direct_path = ""
        self.token = b""
        self.forked = False
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        """In a process that a task forked: speak for this slot no more."""
        self.forked = True
        self._lock = threading.Lock()

    def _leave_if_forked(self, exc: BaseException | None = None) -> None:
        if self.forked:
            # A forked child came back from the task as its parent will: it ends here.
            end_child(exc)

    # Reading.

    def _need(self, size: int) -> None:
        """Have at least ``size`` unread bytes in the input buffer."""
        have = len(self._input) - self._at
        if have >= size:
            return
        if self._at:
            del self._input[: self._at]
            self._at = 0
        while have < size:
            data = os.read(self._tasks_fd, max(65536, size - have))
            if not data:
                raise EOFError
            self._input += data
            self._read += len(data)
            have += len(data)

    def _next_frame(self) -> tuple[int, int, bytes]:
        self._need(HEADER.size)
        kind, length, number = HEADER.unpack_from(self._input, self._at)
        self._at += HEADER.size
        self._need(length)
        body = bytes(memoryview(self._input)[self._at : self._at + length])
        self._at += length
        return kind, number, body

    def await_release(self) -> None:
        """Read frames until one of them is a release; the others keep their order."""
        while True:
            frame = self._next_frame()
            if frame[0] == Kind.RELEASE:
                self._on_release(frame[1], frame[2])
                return
            self._stash.append(frame)

    # Writing.

    def send(self, kind: Kind, number: int = 0, body: bytes | memoryview = b"") -> None:
        """Send one frame, after the results that are waiting."""
        self._flush()
        with self._lock:
            write_all(self._results_fd, HEADER.pack(kind, len(body), number) + body)

    def send_output(self, stream: int, data: bytes) -> None:
        """Send what a task printed; any thread of the task may call this."""
        frame = HEADER.pack(Kind.OUTPUT, len(data) + 1, self._cells[CURRENT])
        with self._lock:
            write_all(self._results_fd, frame + bytes((stream,)) + data)

    def _send_record(self, record: bytes) -> bool:
        if not self.forked:
            self.send_output(_logs.LOG_STREAM, record)
        return not self.forked

    def _flush(self) -> None:
        used = self._used
        if used:
            page = self._page
            start = RESULTS_AT - HEADER.size
            HEADER.pack_into(page, start, Kind.RESULTS, used, 0)
            with self._lock:
                write_all(self._results_fd, page[start : RESULTS_AT + used])
            self._cells[FLUSHES] += 1  # before anything else is put there
            self._cells[USED] = self._used = 0
        self._flushed_at = perf_counter()

    def _put(self, delivery: int, seconds: float, status: int, payload: bytes) -> None:
        """Put one result into the buffer, where the supervisor finds it whatever happens next."""
        size = RESULT.size + len(payload)
        if self._used + size > self._room:
            self._flush()
            if size > self._room:
                self.send(Kind.FAILURE, delivery, _FAILURE.pack(seconds, status) + payload)
                return
        at = RESULTS_AT + self._used
        page = self._page
        _result_header(page, at, delivery, seconds, status, len(payload))
        at += RESULT.size
        page[at : at + len(payload)] = payload
        self._used += size
        self._cells[USED] = self._used

    # Running.

    def run(self) -> None:
        """Serve until told to stop."""
        handlers: dict[int, Callable[[int, bytes], None]] = {
            Kind.SETUP: self._on_setup,
            Kind.INITIALIZER: self._on_initializer,
            Kind.FUNCTION: self._on_function,
            Kind.FORGET: self._on_forget,
            Kind.BATCH: self._on_batch,
            Kind.RELEASE: self._on_release,
            Kind.READY: lambda *_: self.send(Kind.READY),
        }
        stash = self._stash
        cells = self._cells
        while True:
            if stash:
                kind, number, body = stash.popleft()
            else:
                if len(self._input) == self._at:
                    self._flush()
                    cells[WAITING] = self._read + 1  # all that was sent has been answered
                kind, number, body = self._next_frame()
                cells[WAITING] = 0
            if kind == Kind.STOP:
                self._flush()
                return
            if kind == Kind.ENVIRONMENT:
                self._variables = number, json.loads(body)
            elif kind == Kind.BATCH and self._variables is not None:
                with self._environment(number):
                    handlers[kind](number, body)
            else:
                handlers[kind](number, body)

    @contextlib.contextmanager
    def _environment(self, delivery: int) -> Iterator[None]:
        """Have the variables of one task in ``os.environ``, and afterwards what was there."""
        assert self._variables is not None
        (whose, variables), self._variables = self._variables, None
        if whose != delivery:
            variables = {}  # their task was taken back before it came
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value

    def _on_setup(self, number: int, body: bytes) -> None:
        setup = json.loads(body)
        if setup["sys_path"]:
            sys.path[:] = setup["sys_path"]
        if setup["modules"]:
            # Where a script's own directory would be.
            sys.path.insert(0, setup["modules"])
        sys.argv[:] = setup["argv"]
        # As in a process pool's workers: proxies of the client's managers work here.
        authkey = bytes.fromhex(setup["authkey"])
        become(setup["number"], setup["client_pid"], authkey, setup["inheritance"])
        from cloudexec.worker.main_module import MainModule, ResultPickler

        set_process_number(setup["number"])
        self._main = ResultPickler.main = MainModule(setup["main"])
        _payload.result_pickler = ResultPickler
        _nesting.loading.watch("a worker", __name__)
        os.environ[_nesting.DEPTH] = str(setup["depth"])
        self.direct_path = setup["direct_path"]
        self.token = bytes.fromhex(setup["token"])
        if self.direct_path:
            _sharing.ask(self.direct_path, self.token)
        if setup["cwd"]:
            try:
                os.chdir(setup["cwd"])
            except OSError:
                pass  # the client's directory is gone, or on another machine
        if "logging" in setup["inheritance"]:
            _logs.inherit(setup["inheritance"]["logging"], self._send_record)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            buffer = io.BufferedWriter(_Output(self, stream), _OUTPUT_BYTES)
            errors = "backslashreplace" if stream == 2 else "surrogateescape"
            text = io.TextIOWrapper(buffer, encoding="utf-8", errors=errors, line_buffering=True)
            setattr(sys, name, text)
            setattr(sys, f"__{name}__", text)
        forwarded = bool(setup["inheritance"].get("logging"))
        _settings.apply(bytes.fromhex(setup["settings"]), handlers=not forwarded)

    def _on_initializer(self, number: int, body: bytes) -> None:
        try:
            _nesting.loading.active = True
            try:
                if number & FUNCTION_NUMBER:
                    self._function(number & FUNCTION_NUMBER)
                load = self._load_composed if number & COMPOSED else _loads
                initializer, initargs = load(body)
            finally:
                _nesting.loading.active = False
                _nesting.loading.ended()
            initializer(*initargs)
        except BaseException as exc:
            self._flush_output()
            self.send(Kind.INITIALIZER_FAILED, 0, _payload.dumps_exception(exc))
        else:
            self.send(Kind.READY)

    def _on_function(self, number: int, body: bytes) -> None:
        fresh, composed, size = FUNCTION.unpack_from(body)
        at = FUNCTION.size + size
        pickled = body[at:]
        needs, names, module = json.loads(body[FUNCTION.size : at]) if size else ((), (), "")
        if names and names != ["*"]:
            self._functions[number] = self._definition(number, names, module, pickled, composed)
            return
        load = self._load_composed if composed else _loads
        self._functions[number] = _Pickled(pickled, load, needs, fresh=bool(fresh))

    def _definition(
        self, number: int, names: list[str], module: str, pickled: bytes, composed: bool
    ) -> Definition:
        from cloudexec.worker.main_module import Definition

        def load(unpickler: type[pickle.Unpickler]) -> Any:
            if composed:
                return self._load_composed(pickled, unpickler)
            return unpickler(io.BytesIO(pickled)).load()

        return Definition(number, names, module, load)

    # Large payloads.

    def _load_composed(
        self, data: bytes | memoryview, unpickler: type[pickle.Unpickler] = pickle.Unpickler
    ) -> Any:
        """Unpickle places of blobs and the head that refers to them.

        Raises:
            BlobGoneError: If whoever held them is gone.
            BaseException: Whatever unpickling raises.
        """
        places, at = unpack_places(data)
        found = {place.number: place for place in places}
        source = lambda number: self._source(found[number])  # noqa: E731
        return _records.load_composed(data[at:], source, unpickler)

    def _source(self, place: Place) -> Any:
        if not place.path:
            return DirectSource(place, self.direct_path, self.token)
        try:
            return FileSource(place)
        except OSError as exc:
            if self.direct_path:
                # Gone, or not for us to open, as in some sandboxes: the client may have it.
                return DirectSource(place, self.direct_path, self.token)
            raise BlobGoneError("whoever held this payload is gone") from exc

    def result_files(self) -> ResultFiles:
        """Return where large results are left to be fetched."""
        if self._results is None:
            from cloudexec.worker.results import ResultFiles

            self._results = ResultFiles(self._cells)
        return self._results

    def _on_release(self, number: int, body: bytes) -> None:
        if self._results is not None:
            self._results.release(number)

    def _function(self, number: int) -> Callable[..., Any] | None:
        """Return a callable, unpickled under the first task that names it: it may do anything.

        What it needs of the script is bound first, if it is not. ``None``: the callable comes with
        its arguments.
        """
        entry = self._functions[number]
        main = self._main
        if entry.needs and entry.generation != main.generation:
            for need in entry.needs:
                needed = self._functions[need]
                if type(needed) is _Pickled:
                    main.bind_all(need, [self._functions[each] for each in needed.needs])
                else:
                    main.bind(needed)
            if entry.generation < main.generation:
                entry.fn = None  # it may refer to what was bound before
            entry.generation = main.generation
        fn: Callable[..., Any] | None = entry.fn
        if fn is None and entry.pickled:
            fn = entry.load(entry.pickled)
            assert fn is not None
            if not entry.fresh:
                entry.fn = fn
                if not entry.needs:
                    self._functions[number] = fn
        return fn

    def _on_forget(self, number: int, body: bytes) -> None:
        self._functions.pop(number, None)

    def _on_batch(self, first: int, body: bytes) -> None:
        (count,) = struct.unpack_from("<I", body)
        columns = struct.unpack_from(f"<{count}Q{count}I{count}I", body, 4)
        at = 4 + 16 * count
        view = memoryview(body)
        cells = self._cells
        functions = self._functions
        loading = _nesting.loading
        began = perf_counter()
        self._flushed_at = began
        for i in range(count):
            delivery = first + i
            cells[CURRENT] = delivery
            if cells[FENCE] >= delivery:  # to be read after CURRENT has been written
                self.send(Kind.DROPPED, delivery)
                break
            end = at + columns[2 * count + i]
            payload = view[at:end]
            at = end
            number = columns[count + i]
            flags = 0
            loading.active = True
            try:
                if number > FUNCTION_NUMBER:
                    flags = number
                    number &= FUNCTION_NUMBER
                load = self._load_composed if flags & COMPOSED else _loads
                if number:
                    fn = functions[number]
                    if type(fn) is _Pickled:
                        fn = self._function(number)
                    args = load(payload)
                    kwargs: dict[str, Any] = {}
                    if fn is None:
                        fn, args, kwargs = args
                    elif type(args) is list:
                        args, kwargs = args
                else:
                    fn, args, kwargs = load(payload)
            except BaseException as exc:
                loading.active = False
                loading.ended()
                ended = perf_counter()
                if type(exc) is BlobGoneError and flags & COMPOSED:
                    self.send(Kind.GONE, delivery)
                    continue
                self._fail_unpickling(delivery, ended - began, exc)
                began = ended
                continue
            loading.active = False
            if loading.others is not None:
                loading.ended()
            try:
                value = fn(*args, **kwargs)
            except BaseException as exc:
                self._leave_if_forked(exc)
                ended = perf_counter()
                self._fail(delivery, ended - began, exc)
                del exc
            else:
                if self.forked:
                    self._leave_if_forked()
                if flags & KEPT:
                    ended = perf_counter()
                    self._answer(delivery, columns[i], ended - began, value, keep=True)
                elif value is None:
                    self._flush_stdout()
                    ended = perf_counter()
                    self._put(delivery, ended - began, frames.OK, b"N.")
                else:
                    ended = perf_counter()
                    self._answer(delivery, columns[i], ended - began, value)
            # Nothing of a task outlives it here, not even until the next one.
            fn = args = kwargs = value = None  # type: ignore[assignment]
            if ended - self._flushed_at > _FLUSH_AFTER or self._used > _FLUSH_BYTES:
                self._flush()
            began = ended
        cells[CURRENT] = 0
        body = b""
        self._flush()

    def _flush_stdout(self) -> None:
        try:
            sys.stdout.flush()
        except BaseException:
            pass  # the task closed it, or put something of its own there

    def _flush_output(self) -> None:
        for name in ("stdout", "stderr"):
            try:
                getattr(sys, name).flush()
            except BaseException:
                pass  # the task closed it, or put something of its own there

    def _fail(self, delivery: int, seconds: float, exc: BaseException) -> None:
        self._flush_output()
        self._put(delivery, seconds, frames.RAISED, _payload.dumps_exception(exc))

    def _fail_unpickling(self, delivery: int, seconds: float, exc: BaseException) -> None:
        error = exc
        if not is_a(exc, (NestingError, PayloadError)):
            remedy = _remedy(exc) or if_not_found(exc, "what they need must be importable there")
            error = PayloadError(
                f"the callable or its arguments could not be unpickled in the worker "
                f"({describe(exc)}){remedy}"
            )
            error.__cause__ = exc
        self._flush_output()
        self._put(delivery, seconds, frames.UNPICKLE_FAILED, _payload.dumps_exception(error))

    def _answer(
        self, delivery: int, lease: int, seconds: float, value: Any, *, keep: bool = False
    ) -> None:
        """Pickle a result and put it into the buffer, or where large ones go."""
        self._flush_stdout()
        writer = _ResultWriter(self, delivery, lease, seconds, keep=keep)
        try:
            if type(value) in _payload._ATOMS and not keep:
                self._put(delivery, seconds, frames.OK, pickle.dumps(value, 5))
                return
            _payload.result_pickler(writer, protocol=5, buffer_callback=writer.take_buffer).dump(
                value
            )
            value = None
            writer.close()
        except BaseException as exc:
            writer.abandon(_payload.dumps_exception(_pickling_error(exc, value)))


def _pickling_error(exc: BaseException, value: Any) -> BaseException:
    """Return what a task fails with whose result cannot be pickled, or has no room."""
    if not is_a(exc, Exception) or is_a(exc, PayloadError):
        return exc  # SystemExit as itself: CPython's own tests of its process pool expect that
    if why := unfinished(value):
        if type(value) is CoroutineType:
            value.close()  # or it warns that nobody has awaited it
        refused = PayloadError(f"the call returned {why}")
        refused.__cause__ = exc
        return refused
    said = ""
    remedy = _remedy(exc)
    if not remedy:
        from cloudexec._unsendable import explain_value

        remedy = "; return something that survives pickle.dumps()"
        said = explain_value("the result", value, exc, result=True)
    error = PayloadError(said or f"the result could not be pickled ({describe(exc)}){remedy}")
    error.__cause__ = exc
    return error


def _remedy(exc: BaseException) -> str:
    """Say what to do about a payload that there is no room for; nothing about any other."""
    if is_a(exc, MemoryError):
        return "; the worker has too little memory for it, or its limit (RLIMIT_AS) is too low"
    if type(exc) is OSError and exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "; the worker's disk is full, or its limit (RLIMIT_FSIZE) is too low"
    return ""


class _Pickled:
    """A callable that was sent; a fresh one is loaded anew for each task.

    Attributes:
        pickled: Its pickle; empty: the callables come with their arguments.
        needs: Numbers of what has to be bound in the script first.
        fn: What was unpickled last.
        generation: Of the script, when what it needs was last seen to be bound.
    """

    __slots__ = ("fn", "fresh", "generation", "load", "needs", "pickled")

    def __init__(
        self, pickled: bytes, load: Callable[[bytes], Any], needs: Any, *, fresh: bool
    ) -> None:
        self.pickled = pickled
        self.load = load
        self.needs = needs
        self.fresh = fresh
        self.fn: Callable[..., Any] | None = None
        self.generation = -1


class _ResultWriter:
    """A file for the pickler that keeps a small result, and brings a large one on its way.

    Arrays and other buffers are left in files that the supervisor, or the client on the same
    machine, opens. A large pickle that has none goes straight to such a client while it grows.
    """

    def __init__(
        self, slot: Slot, delivery: int, lease: int, seconds: float, *, keep: bool
    ) -> None:
        self._slot = slot
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
        self._pieces.append(data)
        self._size += len(data)
        if self._size > INLINE_BYTES and not self._places:
            slot = self._slot
            if slot.direct_path and not self._keep:
                self._go_direct()
        return len(data)

    def _go_direct(self) -> None:
        slot = self._slot
        slot._flush()
        direct = _direct.connect(slot.direct_path, slot.token, _direct.DELIVER, self._lease)
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
        # Results are writeable copies, read-only buffers included, as through a process pool.
        if self._direct is not None:
            self._direct.sendall(_records.record(1, raw.nbytes))
            self._direct.sendall(raw)
        else:
            self._leave(5, [raw], raw.nbytes)
        return False

    def _leave(self, kind: int, pieces: list[Any], size: int) -> None:
        place = self._slot.result_files().put(pieces, size)
        self._places.append(place)
        self._records.append(_records.record(kind, place.number))

    def close(self) -> None:
        """Bring the result to its end, and report it."""
        slot = self._slot
        if self._direct is not None:
            with self._direct as connection:
                connection.sendall(_records.END_RECORD)
                connection.shutdown(socket.SHUT_WR)
                _direct.receive_exactly(connection, 1)
            slot._put(self._delivery, self._seconds, frames.DELIVERED, b"")
            return
        if not self._places and self._size <= INLINE_BYTES and not self._keep:
            slot._put(self._delivery, self._seconds, frames.OK, b"".join(self._pieces))
            return
        if self._size > INLINE_BYTES:
            self._leave(4, self._pieces, self._size)
        else:
            pickled = b"".join(self._pieces)
            self._records += (_records.record(0, len(pickled)), pickled)
        head = b"".join((*self._records, _records.END_RECORD))
        if len(head) > INLINE_BYTES:
            self._records.clear()
            self._leave(7, [head], len(head))
            head = self._records[0]
        slot.result_files().send(
            slot, self._delivery, self._seconds, self._places, head, self._keep
        )

    def abandon(self, error: bytes) -> None:
        """Report that the result could not be pickled to its end."""
        if self._direct is not None:
            self._direct.close()
        if self._places:
            self._slot.result_files().drop(self._places)
        self._slot._put(self._delivery, self._seconds, frames.PICKLE_FAILED, error)
