"""A slot: a process that runs one task at a time, by the protocol that ``frames`` describes."""

from __future__ import annotations

import contextlib
import functools
import io
import multiprocessing.resource_tracker  # noqa: F401 (here, before slots are forked)
import os
import pickle
import struct
import sys
from collections import deque
from collections.abc import Callable, Iterator
from time import perf_counter
from typing import TYPE_CHECKING, Any

from cloudexec import _logs, _module_state, _nesting, _payload, _records, _settings, _sharing
from cloudexec._anew import set_process_number
from cloudexec._describing import describe, if_not_found, is_a
from cloudexec._errors import NestingError, PayloadError
from cloudexec._forked import end_child
from cloudexec._objects.places import (
    BlobGoneError,
    DirectSource,
    FileSource,
    KeptSource,
    Place,
    unpack_places,
)
from cloudexec._plain_json import decode
from cloudexec.worker import frames
from cloudexec.worker.frames import (
    COMPOSED,
    CURRENT,
    FENCE,
    FUNCTION,
    FUNCTION_NUMBER,
    HEADER,
    KEPT,
    WAITING,
    Kind,
)
from cloudexec.worker.outlet import Outlet, text_stream
from cloudexec.worker.process import become
from cloudexec.worker.result_writer import ResultPaths, ResultWriter, pickling_error, remedy_for

if TYPE_CHECKING:
    from cloudexec.worker.main_module import Definition, MainModule

__all__ = ["Slot"]

_FLUSH_AFTER = 0.001
"""Seconds that a finished result may wait in the buffer while further tasks of the batch run."""
_FLUSH_BYTES = 64 * 1024
_loads = pickle.loads


class Slot:
    """The slot's end of the two pipes and of the shared page.

    Args:
        tasks_fd: Read end of the pipe with frames for the slot.
        results_fd: Write end of the pipe with its answers.
        page_fd: File of the shared page.
    """

    def __init__(self, tasks_fd: int, results_fd: int, page_fd: int) -> None:
        self._tasks_fd = tasks_fd
        self._outlet = Outlet(results_fd, page_fd)
        self._cells = self._outlet.cells
        self._input = bytearray()
        self._at = 0
        self._read = 0  # bytes that were read from the pipe in all
        self._functions: dict[int, Any] = {}
        self._main: MainModule = None  # type: ignore[assignment]  # set by the frame SETUP
        # Environment variables of the next task, and its delivery.
        self._variables: tuple[int, dict[str, str]] | None = None
        self._stash: deque[tuple[int, int, bytes]] = deque()
        self._paths = ResultPaths(self._outlet, self._await_release)

    def _leave_if_forked(self, exc: BaseException | None = None) -> None:
        if self._outlet.forked:
            # A child that the task has forked has returned from the task: it must end here.
            end_child(exc)

    # Reading.

    def _need(self, size: int) -> None:
        """Read until the input buffer holds at least ``size`` unread bytes."""
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

    def _await_release(self) -> None:
        """Read frames until a release comes, and keep the other frames, in order, for later."""
        while True:
            frame = self._next_frame()
            if frame[0] == Kind.RELEASE:
                self._on_release(frame[1], frame[2])
                return
            self._stash.append(frame)

    def _send_record(self, record: bytes) -> bool:
        if not self._outlet.forked:
            self._outlet.send_output(_logs.LOG_STREAM, record)
        return not self._outlet.forked

    # Running.

    def run(self) -> None:
        """Serve until a frame says to stop."""
        handlers: dict[int, Callable[[int, bytes], None]] = {
            Kind.SETUP: self._on_setup,
            Kind.INITIALIZER: self._on_initializer,
            Kind.FUNCTION: self._on_function,
            Kind.FORGET: self._on_forget,
            Kind.BATCH: self._on_batch,
            Kind.RELEASE: self._on_release,
            Kind.READY: lambda *_: self._outlet.send(Kind.READY),
        }
        stash = self._stash
        cells = self._cells
        while True:
            if stash:
                kind, number, body = stash.popleft()
            else:
                if len(self._input) == self._at:
                    self._outlet.flush()
                    cells[WAITING] = self._read + 1  # all tasks that were read have been answered
                kind, number, body = self._next_frame()
                cells[WAITING] = 0
            if kind == Kind.STOP:
                self._outlet.flush()
                return
            if kind == Kind.ENVIRONMENT:
                self._variables = number, decode(body)
            elif kind == Kind.BATCH and self._variables is not None:
                with self._environment(number):
                    handlers[kind](number, body)
            else:
                handlers[kind](number, body)

    @contextlib.contextmanager
    def _environment(self, delivery: int) -> Iterator[None]:
        """Set the environment variables of one task, and restore the old ones afterwards."""
        assert self._variables is not None
        (whose, variables), self._variables = self._variables, None
        if whose != delivery:
            variables = {}  # they belong to a task that was taken back before it was sent
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
        setup = decode(body)
        if setup["sys_path"]:
            sys.path[:] = setup["sys_path"]
        if setup["modules"]:
            # At the front, where the directory of a script would be.
            sys.path.insert(0, setup["modules"])
        sys.argv[:] = setup["argv"]
        # As in the workers of a process pool, so that proxies of the client's managers work here.
        authkey = bytes.fromhex(setup["authkey"])
        become(setup["number"], setup["client_pid"], authkey, setup["inheritance"])
        from cloudexec.worker.main_module import MainModule, ResultPickler

        set_process_number(setup["number"])
        self._main = ResultPickler.main = MainModule(setup["main"])
        _payload.result_pickler = ResultPickler
        _nesting.loading.watch("a worker", __name__)
        os.environ[_nesting.DEPTH] = str(setup["depth"])
        paths = self._paths
        paths.direct_path = setup["direct_path"]
        self._main.is_near = bool(paths.direct_path)
        paths.token = bytes.fromhex(setup["token"])
        if paths.direct_path:
            _sharing.ask(paths.direct_path, paths.token)
        if setup["cwd"]:
            try:
                os.chdir(setup["cwd"])
            except OSError:
                pass  # the client's directory was removed, or does not exist on this machine
        if "logging" in setup["inheritance"]:
            _logs.inherit(setup["inheritance"]["logging"], self._send_record)
        for stream, name in ((1, "stdout"), (2, "stderr")):
            text = text_stream(self._outlet, stream)
            setattr(sys, name, text)
            setattr(sys, f"__{name}__", text)
        forwarded = bool(setup["inheritance"].get("logging"))
        _settings.apply(bytes.fromhex(setup["settings"]), handlers=not forwarded)
        _module_state.apply(bytes.fromhex(setup["inheritance"].get("modules", "")))

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
            self._outlet.send(Kind.INITIALIZER_FAILED, 0, _payload.dumps_exception(exc))
        else:
            self._outlet.send(Kind.READY)

    def _on_function(self, number: int, body: bytes) -> None:
        fresh, composed, size = FUNCTION.unpack_from(body)
        at = FUNCTION.size + size
        pickled = body[at:]
        needs, names, module = decode(body[FUNCTION.size : at]) if size else ((), (), "")
        if names and names != ["*"]:
            self._functions[number] = self._definition(number, names, module, pickled, composed)
            return
        load: Callable[[bytes], Any] = self._load_composed if composed else _loads
        if fresh and composed:
            load = functools.partial(self._load_composed, kept={})
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
        self,
        data: bytes | memoryview,
        unpickler: type[pickle.Unpickler] = pickle.Unpickler,
        kept: dict[int, Any] | None = None,
    ) -> Any:
        """Unpickle places of blobs and the head that refers to them.

        Args:
            data: The places and the head.
            unpickler: Class of the unpickler.
            kept: Memory of earlier loads of the same, which may be used again.

        Raises:
            BlobGoneError: If the process that held a blob is gone.
            BaseException: Whatever unpickling raises.
        """
        places, at = unpack_places(data)
        found = {place.number: place for place in places}
        source = lambda number: self._source(found[number], kept)  # noqa: E731
        return _records.load_composed(data[at:], source, unpickler)

    def _source(self, place: Place, kept: dict[int, Any] | None) -> Any:
        if not place.path:
            return DirectSource(place, self._paths.direct_path, self._paths.token)
        try:
            return FileSource(place) if kept is None else KeptSource(place, kept)
        except OSError as exc:
            if self._paths.direct_path:
                # The file is gone, or may not be opened in this sandbox: ask the client for it.
                return DirectSource(place, self._paths.direct_path, self._paths.token)
            raise BlobGoneError("the process that kept this payload has ended") from exc

    def _on_release(self, number: int, body: bytes) -> None:
        self._paths.release(number)

    def _function(self, number: int) -> Callable[..., Any] | None:
        """Return a callable. It is unpickled for the first task that names it.

        Unpickling may run any code, so it must count as part of a task. The definitions that the
        callable needs of the script are bound before.

        Returns:
            ``None`` if the callable is part of each task's arguments.
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
                entry.fn = None  # unpickle again, as it may refer to earlier definitions
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
        outlet = self._outlet
        began = perf_counter()
        outlet.flushed_at = began
        for i in range(count):
            delivery = first + i
            cells[CURRENT] = delivery
            if cells[FENCE] >= delivery:  # must be read after CURRENT has been written
                outlet.send(Kind.DROPPED, delivery)
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
                    outlet.send(Kind.GONE, delivery)
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
                if outlet.forked:
                    self._leave_if_forked()
                if flags & KEPT:
                    ended = perf_counter()
                    self._answer(delivery, columns[i], ended - began, value, keep=True)
                elif value is None:
                    self._flush_stdout()
                    ended = perf_counter()
                    outlet.put(delivery, ended - began, frames.OK, b"N.")
                else:
                    ended = perf_counter()
                    self._answer(delivery, columns[i], ended - began, value)
            # Delete all objects of a task at its end, and not only when the next one begins.
            fn = args = kwargs = value = None  # type: ignore[assignment]
            if ended - outlet.flushed_at > _FLUSH_AFTER or outlet.used > _FLUSH_BYTES:
                outlet.flush()
            began = ended
        cells[CURRENT] = 0
        body = b""
        outlet.flush()

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
        self._outlet.put(delivery, seconds, frames.RAISED, _payload.dumps_exception(exc))

    def _fail_unpickling(self, delivery: int, seconds: float, exc: BaseException) -> None:
        error = exc
        if not is_a(exc, (NestingError, PayloadError)):
            remedy = remedy_for(exc) or if_not_found(exc, "what they need must be importable there")
            error = PayloadError(
                f"the callable or its arguments could not be unpickled in the worker "
                f"({describe(exc)}){remedy}"
            )
            error.__cause__ = exc
        self._flush_output()
        self._outlet.put(delivery, seconds, frames.UNPICKLE_FAILED, _payload.dumps_exception(error))

    def _answer(
        self, delivery: int, lease: int, seconds: float, value: Any, *, keep: bool = False
    ) -> None:
        """Pickle a result, and put it into the buffer or, if it is large, into files."""
        self._flush_stdout()
        writer = ResultWriter(self._paths, delivery, lease, seconds, keep=keep)
        try:
            if type(value) in _payload._ATOMS and not keep:
                self._outlet.put(delivery, seconds, frames.OK, pickle.dumps(value, 5))
                return
            _payload.result_pickler(writer, protocol=5, buffer_callback=writer.take_buffer).dump(
                value
            )
            value = None
            writer.close()
        except BaseException as exc:
            writer.abandon(_payload.dumps_exception(pickling_error(exc, value)))


class _Pickled:
    """A callable that was sent; one that is marked as fresh is unpickled for each task.

    Attributes:
        pickled: The pickle; empty if the callable is part of each task's arguments.
        needs: Numbers of the definitions that must be bound in the script before.
        fn: The unpickled callable.
        generation: ``MainModule.generation`` when its definitions were last known to be bound.
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
