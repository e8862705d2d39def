"""A slot: a process that runs one task at a time."""

from __future__ import annotations

import io
import json
import mmap
import multiprocessing
import os
import pickle
import socket
import struct
import sys
import threading
from collections.abc import Callable
from time import perf_counter
from typing import Any

from cloudexec import _direct, _payload
from cloudexec._errors import PayloadError
from cloudexec._payload import CHUNK_BYTES, INLINE_BYTES, Parts
from cloudexec.worker import frames
from cloudexec.worker.frames import (
    CURRENT,
    EPOCH,
    HEADER,
    PAGE_BYTES,
    RESULT,
    RESULTS_AT,
    USED,
    Kind,
    write_all,
)

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
        self._page = memoryview(mmap.mmap(page_fd, PAGE_BYTES))
        os.close(page_fd)
        self._cells = self._page[:RESULTS_AT].cast("Q")
        self._room = PAGE_BYTES - RESULTS_AT
        self._used = 0
        self._flushed_at = 0.0
        self._lock = threading.Lock()
        self._input = bytearray()
        self._at = 0
        self._functions: dict[int, Callable[..., Any]] = {}
        self._in_stream = False
        self.direct_path = ""
        self.token = b""
        self.forked = False
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        """In a process that a task forked: speak for this slot no more."""
        self.forked = True
        self._lock = threading.Lock()

    def _leave_if_forked(self) -> None:
        if self.forked:
            # A forked child came back from the task as its parent will: it ends here.
            self._flush_output()
            os._exit(0)

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
            have += len(data)

    def _next_frame(self) -> tuple[int, int, bytes]:
        self._need(HEADER.size)
        kind, length, number = HEADER.unpack_from(self._input, self._at)
        self._at += HEADER.size
        self._need(length)
        body = bytes(memoryview(self._input)[self._at : self._at + length])
        self._at += length
        return kind, number, body

    def _next_chunk(self) -> bytes | None:
        if not self._in_stream:
            return None
        kind, _, body = self._next_frame()
        if kind == Kind.ABORT:
            self._in_stream = False
            raise ConnectionAbortedError("the payload was cut off")
        if not body:
            self._in_stream = False
            return None
        return body

    def _skip_chunks(self) -> None:
        """Read up to the end of a large payload, so that its rest is not taken for frames."""
        try:
            while self._next_chunk() is not None:
                pass
        except ConnectionAbortedError:
            pass

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

    def _flush(self) -> None:
        used = self._used
        if used:
            page = self._page
            start = RESULTS_AT - HEADER.size
            HEADER.pack_into(page, start, Kind.RESULTS, used, 0)
            with self._lock:
                write_all(self._results_fd, page[start : RESULTS_AT + used])
            self._cells[USED] = self._used = 0
        self._flushed_at = perf_counter()

    def _put(self, lease: int, seconds: float, status: int, payload: bytes) -> None:
        """Put one result into the buffer, where the supervisor finds it whatever happens next."""
        size = RESULT.size + len(payload)
        if self._used + size > self._room:
            self._flush()
            if size > self._room:
                self.send(Kind.FAILURE, lease, _FAILURE.pack(seconds, status) + payload)
                return
        at = RESULTS_AT + self._used
        page = self._page
        _result_header(page, at, lease, seconds, status, len(payload))
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
            Kind.FUNCTION_STREAM: self._on_function_stream,
            Kind.FORGET: self._on_forget,
            Kind.BATCH: self._on_batch,
            Kind.TASK_STREAM: self._on_task_stream,
            Kind.TASK_DIRECT: self._on_task_direct,
        }
        while True:
            if len(self._input) == self._at:
                self._flush()
            kind, number, body = self._next_frame()
            if kind == Kind.STOP:
                self._flush()
                return
            handlers[kind](number, body)

    def _on_setup(self, number: int, body: bytes) -> None:
        setup = json.loads(body)
        if setup["sys_path"]:
            sys.path[:] = setup["sys_path"]
        if setup["modules"]:
            # Where a script's own directory would be.
            sys.path.insert(0, setup["modules"])
        sys.argv[:] = setup["argv"]
        if setup["authkey"]:
            # As in a process pool's workers: proxies of the client's managers work here.
            multiprocessing.current_process().authkey = bytes.fromhex(setup["authkey"])
        self.direct_path = setup["direct_path"]
        self.token = bytes.fromhex(setup["token"])
        if setup["cwd"]:
            try:
                os.chdir(setup["cwd"])
            except OSError:
                pass  # the client's directory is gone, or on another machine
        for stream, name in ((1, "stdout"), (2, "stderr")):
            buffer = io.BufferedWriter(_Output(self, stream), _OUTPUT_BYTES)
            errors = "backslashreplace" if stream == 2 else "surrogateescape"
            text = io.TextIOWrapper(buffer, encoding="utf-8", errors=errors, line_buffering=True)
            setattr(sys, name, text)
            setattr(sys, f"__{name}__", text)

    def _on_initializer(self, number: int, body: bytes) -> None:
        if number == 2:  # there is none
            self.send(Kind.READY)
            return
        try:
            if number == 1:
                self._in_stream = True
                initializer, initargs = _payload.load_chunks(self._next_chunk)
            else:
                initializer, initargs = _loads(body)
            initializer(*initargs)
        except BaseException as exc:
            self._flush_output()
            self.send(Kind.INITIALIZER_FAILED, 0, _payload.dumps_exception(exc))
        else:
            self.send(Kind.READY)

    def _on_function(self, number: int, body: bytes) -> None:
        self._functions[number] = _Pickled([body[1:]], fresh=bool(body[0]))

    def _on_function_stream(self, number: int, body: bytes) -> None:
        self._in_stream = True
        chunks = []
        while (chunk := self._next_chunk()) is not None:
            chunks.append(chunk)
        self._functions[number] = _Pickled(chunks, fresh=bool(body[0]), streamed=True)

    def _function(self, number: int) -> Callable[..., Any]:
        """Return a callable, unpickled under the first task that names it: it may do anything."""
        fn = self._functions[number]
        if type(fn) is _Pickled:
            pickled, fn = fn, fn.load()
            if not pickled.fresh:
                self._functions[number] = fn
        return fn

    def _on_forget(self, number: int, body: bytes) -> None:
        self._functions.pop(number, None)

    def _on_batch(self, epoch: int, body: bytes) -> None:
        (count,) = struct.unpack_from("<I", body)
        columns = struct.unpack_from(f"<{count}Q{count}I{count}I", body, 4)
        at = 4 + 16 * count
        view = memoryview(body)
        cells = self._cells
        functions = self._functions
        began = perf_counter()
        self._flushed_at = began
        for i in range(count):
            lease = columns[i]
            cells[CURRENT] = lease
            if cells[EPOCH] != epoch:
                self.send(Kind.DROPPED, lease, struct.pack("<Q", epoch))
                break
            end = at + columns[2 * count + i]
            payload = view[at:end]
            at = end
            try:
                number = columns[count + i]
                if number:
                    fn = functions[number]
                    if type(fn) is _Pickled:
                        fn = self._function(number)
                    args = _loads(payload)
                    kwargs: dict[str, Any] = {}
                    if type(args) is list:
                        args, kwargs = args
                else:
                    fn, args, kwargs = _loads(payload)
            except BaseException as exc:
                ended = perf_counter()
                self._fail_unpickling(lease, ended - began, exc)
                began = ended
                continue
            try:
                value = fn(*args, **kwargs)
            except BaseException as exc:
                self._leave_if_forked()
                ended = perf_counter()
                self._fail(lease, ended - began, exc)
                del exc
            else:
                if self.forked:
                    self._leave_if_forked()
                if value is None:
                    self._flush_stdout()
                    ended = perf_counter()
                    self._put(lease, ended - began, frames.OK, b"N.")
                else:
                    ended = perf_counter()
                    self._answer(lease, ended - began, value)
            # Nothing of a task outlives it here, not even until the next one.
            fn = args = kwargs = value = None  # type: ignore[assignment]
            if ended - self._flushed_at > _FLUSH_AFTER or self._used > _FLUSH_BYTES:
                self._flush()
            began = ended
        cells[CURRENT] = 0
        body = b""
        self._flush()

    def _on_task_stream(self, lease: int, body: bytes) -> None:
        self._in_stream = True
        try:
            self._run_large(lease, body, lambda: _payload.load_chunks(self._next_chunk))
        finally:
            self._skip_chunks()

    def _on_task_direct(self, lease: int, body: bytes) -> None:
        def load() -> Any:
            try:
                with _direct.connect(self.direct_path, self.token, _direct.FETCH, lease) as source:
                    _direct.receive_exactly(source, 1)
                    return _payload.load_records(lambda view: _direct.fill_from(source, view))
            except (EOFError, OSError) as exc:
                raise ConnectionAbortedError("the payload was cut off") from exc

        self._run_large(lease, body, load)

    def _run_large(self, lease: int, body: bytes, load: Callable[[], Any]) -> None:
        """Run one task whose payload is large, and comes apart from it."""
        number, epoch = struct.unpack("<IQ", body)
        began = perf_counter()
        self._cells[CURRENT] = lease
        try:
            if self._cells[EPOCH] != epoch:
                raise ConnectionAbortedError("it was taken back")
            args = load()
            kwargs: dict[str, Any] = {}
            if number:
                fn = self._function(number)
                if type(args) is list:
                    args, kwargs = args
            else:
                fn, args, kwargs = args
        except ConnectionAbortedError:
            self._cells[CURRENT] = 0
            self.send(Kind.DROPPED, lease, struct.pack("<Q", epoch))
            return
        except BaseException as exc:
            self._skip_chunks()
            self._fail_unpickling(lease, perf_counter() - began, exc)
        else:
            self._skip_chunks()
            try:
                value = fn(*args, **kwargs)
                del fn, args, kwargs
                self._leave_if_forked()
            except BaseException as exc:
                self._leave_if_forked()
                self._fail(lease, perf_counter() - began, exc)
            else:
                self._answer(lease, perf_counter() - began, value)
                del value
        self._cells[CURRENT] = 0
        self._flush()

    def _flush_stdout(self) -> None:
        try:
            sys.stdout.flush()
        except BaseException:
            pass  # the task closed it, or put something of its own there

    def _flush_output(self) -> None:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BaseException:
                pass  # the task closed it, or put something of its own there

    def _fail(self, lease: int, seconds: float, exc: BaseException) -> None:
        self._flush_output()
        self._put(lease, seconds, frames.RAISED, _payload.dumps_exception(exc))

    def _fail_unpickling(self, lease: int, seconds: float, exc: BaseException) -> None:
        error = PayloadError(
            f"the callable or its arguments could not be unpickled in the worker "
            f"({type(exc).__name__}: {exc}); what they need must be importable there"
        )
        error.__cause__ = exc
        self._flush_output()
        self._put(lease, seconds, frames.UNPICKLE_FAILED, _payload.dumps_exception(error))

    def _answer(self, lease: int, seconds: float, value: Any) -> None:
        """Pickle a result and put it into the buffer, or stream it if it is large."""
        self._flush_stdout()
        writer = _ResultWriter(self, lease, seconds)
        try:
            if type(value) in _payload._ATOMS:
                self._put(lease, seconds, frames.OK, pickle.dumps(value, 5))
                return
            _payload.Pickler(writer, protocol=5, buffer_callback=writer.take_buffer).dump(value)
            del value
            writer.close()
        except BaseException as exc:
            error: BaseException = exc
            if isinstance(exc, Exception):
                error = PayloadError(
                    f"the result could not be pickled ({type(exc).__name__}: {exc}); "
                    f"return something that survives pickle.dumps()"
                )
                error.__cause__ = exc
            writer.abandon(_payload.dumps_exception(error))


class _Pickled:
    """Stands for a callable until a task names it; a fresh one is loaded anew for each task."""

    def __init__(self, chunks: list[bytes], *, fresh: bool, streamed: bool = False) -> None:
        self.fresh = fresh
        self._chunks = chunks
        self._streamed = streamed

    def load(self) -> Callable[..., Any]:
        if self._streamed:
            chunks = iter(self._chunks)
            return _payload.load_chunks(lambda: next(chunks, None))  # type: ignore[no-any-return]
        return _loads(self._chunks[0])  # type: ignore[no-any-return]

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError("a callable that was not unpickled")


class _ResultWriter:
    """A file for the pickler that keeps a small result and sends a large one as it grows."""

    def __init__(self, slot: Slot, lease: int, seconds: float) -> None:
        self._slot = slot
        self._lease = lease
        self._seconds = seconds
        self._small: list[tuple[int, bytes | memoryview]] = []
        self._size = 0
        self._direct: socket.socket | None = None
        self.streaming = False

    def write(self, data: Any) -> int:
        if type(data) is not bytes:
            data = bytes(data)
        self._add(0, data)
        return len(data)

    def take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        try:
            raw = buffer.raw()
        except BufferError:
            return True
        if raw.nbytes <= INLINE_BYTES:
            return True
        # Results are writeable copies, read-only buffers included, as through a process pool.
        self._add(1, raw)
        return False

    def _add(self, kind: int, data: bytes | memoryview) -> None:
        if self.streaming:
            self._send_record(kind, data)
            return
        self._small.append((kind, data))
        self._size += len(data)
        if self._size > INLINE_BYTES or kind:
            self._begin()
            small, self._small = self._small, []
            for held_kind, held in small:
                self._send_record(held_kind, held)

    def _begin(self) -> None:
        slot = self._slot
        if slot.direct_path:
            slot._flush()
            path, token = slot.direct_path, slot.token
            self._direct = _direct.connect(path, token, _direct.DELIVER, self._lease)
            _direct.receive_exactly(self._direct, 1)
        else:
            slot.send(Kind.RESULT_STREAM, self._lease, struct.pack("<f", self._seconds))
        self.streaming = True

    def _send_record(self, kind: int, data: bytes | memoryview) -> None:
        header = _payload.record(kind, len(data))
        if self._direct is not None:
            self._direct.sendall(header)
            self._direct.sendall(data)
            return
        slot = self._slot
        for chunk in Parts([header, data], 0).chunks(CHUNK_BYTES):
            with slot._lock:
                write_all(slot._results_fd, HEADER.pack(Kind.CHUNK, len(chunk), self._lease))
                write_all(slot._results_fd, chunk)

    def close(self) -> None:
        """Bring the result to its end, and report it."""
        slot = self._slot
        if not self.streaming:
            payload = b"".join(data for _, data in self._small)
            slot._put(self._lease, self._seconds, frames.OK, payload)
        elif self._direct is None:
            self._send_record(3, b"")
            slot.send(Kind.CHUNK, self._lease)
        else:
            with self._direct as connection:
                connection.sendall(_payload.END_RECORD)
                connection.shutdown(socket.SHUT_WR)
                _direct.receive_exactly(connection, 1)
            slot._put(self._lease, self._seconds, frames.DELIVERED, b"")

    def abandon(self, error: bytes) -> None:
        """Report that the result could not be pickled to its end."""
        slot = self._slot
        if self._direct is not None:
            self._direct.close()
        if self.streaming and self._direct is None:
            body = _FAILURE.pack(self._seconds, frames.PICKLE_FAILED) + error
            slot.send(Kind.FAILURE, self._lease, body)
        else:
            slot._put(self._lease, self._seconds, frames.PICKLE_FAILED, error)
