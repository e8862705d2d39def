"""Exceptions, results and arguments whose own methods raise: one run, one outcome, no harm."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import pickle
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import contract_tasks as tasks
import hostile_tasks as hostile
import numpy as np
import pytest
from contract_helpers import PATIENCE, Signals, supervisors

from cloudexec import (
    BatchExecutor,
    BatchFuture,
    ConfigError,
    DependencyError,
    Graph,
    InitializerError,
    PayloadError,
    RemoteTraceback,
    StageError,
    run,
    stage,
)

pytestmark = pytest.mark.timeout(60)

NOT_INTERRUPTS = [kind for kind in hostile.KINDS if kind is not KeyboardInterrupt]
LARGE = b"x" * 1_000_000
"""Travels apart from its pickle, by another way than small values."""


@pytest.fixture(scope="module")
def executor() -> Iterator[BatchExecutor]:
    with BatchExecutor(1) as executor:
        yield executor


@pytest.fixture(autouse=True)
def _slot_survives(executor: BatchExecutor) -> Iterator[None]:
    """The process that ran the tasks of a test is the one that runs those of the next."""
    before = executor.submit(os.getpid).result(PATIENCE)
    yield
    assert executor.submit(os.getpid).result(PATIENCE) == before


def outcome(future: Future[Any]) -> BaseException:
    """Return what a call failed with; see that everything else can be asked of it too."""
    error = future.exception(PATIENCE)
    assert error is not None
    repr(future)
    try:
        future.result()
    except BaseException as exc:
        assert exc is error  # noqa: PT017 (pytest would format it)
    assert can_be_printed(error)
    return error


def can_be_printed(error: BaseException) -> bool:
    """Say whether a program that ends with an exception can say so."""
    try:
        traceback.print_exception(error)
    except BaseException:
        return False
    return True


def remote_traceback(error: BaseException) -> str:
    cause = vars(BaseException)["__cause__"].__get__(error)
    assert type(cause) is RemoteTraceback
    return str(cause)


# Exceptions that a task raises.


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_exception_whose_methods_raise_is_the_one_outcome_of_one_run(
    executor: BatchExecutor, tmp_path: Path, kind: type[BaseException]
) -> None:
    """It arrives itself, or as a PayloadError, with the remote traceback; the task runs once."""
    log = tmp_path / "log"
    cases = [(method, place) for method in hostile.METHODS for place in hostile.PLACES]
    futures = {
        case: executor.submit(hostile.fail, f"{log} {case}", case[0], kind, case[1])
        for case in cases
    }
    pid = executor.submit(os.getpid).result(PATIENCE)
    for case, future in futures.items():
        error = outcome(future)
        usual = ("Hostile", "PayloadError", "ValueError", "ExceptionGroup")
        assert type(error).__name__ in usual, case
        assert "in fail" in remote_traceback(error), case
        assert "Hostile" in remote_traceback(error), case
        assert executor.explain(future).events[-1].what == "exception", case
        assert Path(f"{log} {case}").read_text() == f"{pid}\n", case


def test_exception_that_no_program_could_print_arrives_as_a_payload_error(
    executor: BatchExecutor, tmp_path: Path
) -> None:
    """The interpreter ends without a word when it is to print one whose ``__notes__`` raise."""
    future = executor.submit(hostile.fail, str(tmp_path / "log"), "__notes__", SystemExit, "itself")
    error = outcome(future)
    assert type(error) is PayloadError
    assert "Hostile" in str(error)
    assert "in fail" in remote_traceback(error)


def test_exceptions_in_a_long_chain_and_in_deep_groups_are_told(executor: BatchExecutor) -> None:
    def fail(links: int, depth: int) -> None:
        error: Exception = hostile.hostile("__notes__", SystemExit)
        for number in range(links):
            other = ValueError(number)
            vars(BaseException)["__context__"].__set__(other, error)
            error = other
        for number in range(depth):
            error = ExceptionGroup(f"group {number}", [error])
        raise error

    for links, depth in ((5000, 0), (0, 400), (0, 3000)):
        error = outcome(executor.submit(fail, links, depth))
        assert remote_traceback(error)


# Results and arguments.


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_values_whose_methods_raise_pass_through(
    executor: BatchExecutor, kind: type[BaseException]
) -> None:
    """Nobody asks a value whether it is true, equal to another, or how long it is."""
    methods = [
        *("__bool__", "__eq__", "__ne__", "__len__", "__hash__", "__repr__", "__str__"),
        *("__iter__", "__contains__", "__format__", "__dir__", "__call__", "__getitem__"),
    ]
    made = [executor.submit(hostile.make, method, kind) for method in methods]
    values = [future.result(PATIENCE) for future in made]
    back = executor.map(hostile.give, values)
    assert [type(value).__name__ for value in back] == ["Hostile"] * len(methods)
    nested = executor.submit(hostile.give, {"values": values}, [made[0]], key=values[0])
    assert type(nested.exception(PATIENCE)) is TypeError  # it takes no keywords, and says so
    both = executor.submit(hostile.give, values[1], made[2]).result(PATIENCE)
    assert [type(value).__name__ for value in both] == ["Hostile"] * 2
    node = stage(hostile.give)(stage(hostile.make)(methods[0], kind))
    assert type(run(node, executor)).__name__ == "Hostile"


def test_arrays_are_compared_with_nothing(executor: BatchExecutor) -> None:
    """``==`` of arrays gives an array, which is neither true nor false."""
    small, large = np.arange(3), np.arange(100_000)
    assert [len(each) for each in executor.map(hostile.give, [small, large, small])] == [
        *(3, 100_000, 3)
    ]
    assert [len(each) for each in executor.submit(hostile.give, small, large).result(PATIENCE)] == [
        *(3, 100_000)
    ]

    def closed_over() -> int:
        return len(small) + len(large)

    assert executor.submit(closed_over).result(PATIENCE) == 100_003


@pytest.mark.parametrize("method", ["", "__str__", "__notes__", "__class__", "__bool__"])
@pytest.mark.parametrize("size", ["small", "large", "in an exception"])
def test_what_cannot_be_unpickled_in_the_client_fails_one_future(
    executor: BatchExecutor, size: str, method: str
) -> None:
    """Whatever unpickling raises; calls before and after it have their results."""
    futures = []
    for kind in NOT_INTERRUPTS:
        value = hostile.Unpickled(os.getpid(), kind, method)
        if size == "in an exception":
            futures.append(executor.submit(hostile.raise_with, value))
        else:
            filling = LARGE if size == "large" else b""
            futures.append(executor.submit(hostile.give, value, filling))
    last = executor.submit(abs, -1)
    for kind, future in zip(NOT_INTERRUPTS, futures, strict=True):
        error = outcome(future)
        assert type(error) is PayloadError, kind
        if size == "in an exception":
            assert "in raise_with" in remote_traceback(error)
        assert executor.explain(future).number
    assert last.result(PATIENCE) == 1


def test_what_unpickling_in_the_worker_raises_is_the_outcome(executor: BatchExecutor) -> None:
    pid = executor.submit(os.getpid).result(PATIENCE)
    for kind in hostile.KINDS:
        for method in ("", "__str__", "__notes__", "__class__", "__bool__"):
            value = hostile.Unpickled(pid, kind, method)
            for filling in (b"", LARGE):
                error = outcome(executor.submit(hostile.give, value, filling))
                assert type(error) is PayloadError
                assert "could not be unpickled in the worker" in str(error)


def test_what_a_handle_cannot_unpickle_is_a_payload_error(executor: BatchExecutor) -> None:
    """Also what unpickling raises when a value is asked for, kept on a worker or put here."""
    keep = executor.with_options(keep=True)
    for kind in NOT_INTERRUPTS:
        for method in ("", "__str__", "__class__"):
            value = hostile.Unpickled(os.getpid(), kind, method)
            kept = keep.submit(hostile.give, value, LARGE).result(PATIENCE)
            for ref in (kept, executor.put(value), executor.put([value, LARGE])):
                with pytest.raises(PayloadError, match="could not be unpickled in the client"):
                    ref.get(PATIENCE)


# What cannot be pickled in the client.


def _as_argument(executor: BatchExecutor, value: Any) -> Future[Any]:
    return executor.submit(hostile.give, value)


def _deep_in_arguments(executor: BatchExecutor, value: Any) -> Future[Any]:
    return executor.submit(hostile.give, {"a": [(value, LARGE)]})


def _as_keyword(executor: BatchExecutor, value: Any) -> Future[Any]:
    return executor.submit(tasks.echo, key=value)


def _beside_a_future(executor: BatchExecutor, value: Any) -> Future[Any]:
    return executor.submit(hostile.give, executor.submit(abs, -1), value)


def _as_callable(executor: BatchExecutor, value: Any) -> Future[Any]:
    return executor.submit(value)


def _bound(executor: BatchExecutor, value: Any) -> Future[Any]:
    return executor.submit(functools.partial(hostile.give, value))


def _in_a_closure(executor: BatchExecutor, value: Any) -> Future[Any]:
    return executor.submit(lambda: value)


def _of_a_view(executor: BatchExecutor, value: Any) -> Future[Any]:
    return executor.with_options(retries=0, name="view").submit(hostile.give, value)


WAYS = [
    _as_argument,
    _deep_in_arguments,
    _as_keyword,
    _beside_a_future,
    _as_callable,
    _bound,
    _in_a_closure,
    _of_a_view,
]


@pytest.mark.parametrize("way", WAYS)
def test_whatever_pickling_raises_belongs_on_the_future(
    executor: BatchExecutor, way: Callable[[BatchExecutor, Any], Future[Any]]
) -> None:
    """``SystemExit`` and its like do not leave ``submit()``, whatever they say of themselves."""
    for kind in NOT_INTERRUPTS:
        for method in ("", "__str__", "__class__", "__getattribute__"):
            error = outcome(way(executor, hostile.Unpicklable(kind, method)))
            assert type(error) is PayloadError, (kind, method)
            usual = kind if method in ("", "__str__") else RemoteTraceback
            assert isinstance(error.__cause__, (usual, pickle.PicklingError))


def test_whatever_pickling_raises_belongs_on_the_future_of_its_item(
    executor: BatchExecutor,
) -> None:
    """map() goes on with the others; a callable that cannot be pickled fails all of its calls."""
    for kind in NOT_INTERRUPTS:
        items = [1, hostile.Unpicklable(kind), 3]
        results = executor.map(hostile.give, items)
        assert next(results) == 1
        with pytest.raises(PayloadError):
            next(results)
        with pytest.raises(PayloadError):
            list(executor.map(hostile.Unpicklable(kind), [(), ()]))
        with pytest.raises(PayloadError):
            list(executor.map(hostile.give, items, chunksize=3))
        lazily = executor.map(hostile.give, items, buffersize=1)
        assert next(lazily) == 1


def test_what_put_and_graphs_cannot_pickle_is_a_payload_error(executor: BatchExecutor) -> None:
    for kind in NOT_INTERRUPTS:
        value = hostile.Unpicklable(kind, "__str__")
        with pytest.raises(PayloadError, match="Unpicklable") as caught:
            executor.put([value, LARGE])
        assert isinstance(caught.value.__cause__, (kind, pickle.PicklingError))
        with pytest.raises(StageError) as failed:
            run(stage(hostile.give)(value), executor)
        assert type(failed.value.__cause__) is PayloadError
        with pytest.raises(PayloadError):
            run(stage(value, name="stage")(), executor)


def test_what_repr_raises_changes_nothing(executor: BatchExecutor) -> None:
    """An item that cannot be pickled, and says nothing about itself either."""

    class Silent(hostile.Unpicklable):
        def __repr__(self) -> str:
            raise SystemExit("repr")

        def __getattr__(self, name: str) -> Any:
            raise SystemExit("getattr")

    for way in WAYS:
        assert type(outcome(way(executor, Silent(SystemExit)))) is PayloadError
    with pytest.raises(PayloadError):
        executor.put(Silent(SystemExit))
    with pytest.raises(PayloadError):
        next(executor.map(hostile.give, [Silent(SystemExit)]))


def test_callables_that_cannot_be_looked_at_are_called(executor: BatchExecutor) -> None:
    """Attributes that messages and statistics would like to know are not there, that is all."""

    class Silent:
        def __getattr__(self, name: str) -> Any:
            raise SystemExit(name)

        def __reduce__(self) -> Any:
            return functools.partial, (abs, -5)

        def __call__(self) -> int:
            return 5

    assert executor.submit(Silent()).result(PATIENCE) == 5
    used = Silent()

    def names_it() -> bool:
        return used is not None

    assert executor.submit(names_it).result(PATIENCE)


def test_ctrl_c_while_an_argument_is_pickled_interrupts_the_program(
    executor: BatchExecutor,
) -> None:
    """In the main thread it is the program's; in another thread nobody has pressed it."""

    class Slow:
        def __reduce__(self) -> Any:
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("it was not interrupted")

    for call in (
        lambda: executor.submit(hostile.give, Slow()),
        lambda: executor.map(hostile.give, [Slow()]),
        lambda: executor.put(Slow()),
    ):
        with pytest.raises(KeyboardInterrupt):
            call()
    assert executor.submit(abs, -1).result(PATIENCE) == 1
    found: list[Future[Any]] = []
    value = hostile.Unpicklable(KeyboardInterrupt)
    thread = threading.Thread(target=lambda: found.append(executor.submit(hostile.give, value)))
    thread.start()
    thread.join(PATIENCE)
    assert type(outcome(found[0])) is PayloadError


def test_a_result_whose_unpickling_was_interrupted_is_still_there(executor: BatchExecutor) -> None:
    """Ctrl-C in the middle of unpickling is the program's; who asks again gets the result."""
    value = hostile.Unpickled(os.getpid(), KeyboardInterrupt)
    future = executor.submit(hostile.give, value)
    wait([future], PATIENCE)
    with pytest.raises(KeyboardInterrupt):
        future.result()
    found: list[BaseException | None] = []
    thread = threading.Thread(target=lambda: found.append(future.exception()))
    thread.start()
    thread.join(PATIENCE)
    assert type(found[0]) is PayloadError


def test_initargs_that_cannot_be_pickled_are_said_by_submit() -> None:
    """No task could run; the executor can still be shut down."""
    for kind in NOT_INTERRUPTS:
        value = hostile.Unpicklable(kind, "__str__")
        with BatchExecutor(1, initializer=hostile.give, initargs=(value,)) as executor:
            for _ in range(2):
                with pytest.raises(PayloadError, match="initargs"):
                    executor.submit(abs, -1)
        with pytest.raises(PayloadError, match="initargs"):
            BatchExecutor(1, min_workers=1, initializer=hostile.give, initargs=(value,))


def test_initializer_that_raises_what_cannot_be_formatted_breaks_the_executor(
    tmp_path: Path,
) -> None:
    for method in ("__str__", "__notes__", "__bool__"):
        arguments = (str(tmp_path / "log"), method, SystemExit, "itself")
        with BatchExecutor(1, initializer=hostile.fail, initargs=arguments) as executor:
            error = executor.submit(abs, -1).exception(PATIENCE)
        assert isinstance(error, InitializerError)
        assert isinstance(error.__cause__, BaseException)


def test_a_key_that_raises_is_the_outcome_of_its_call(tmp_path: Path) -> None:
    """The function for ``with_options(key=)`` is called in submit(), and may raise anything."""

    def refuse(value: int) -> str:
        raise SystemExit(value)

    with BatchExecutor(1, journal=tmp_path / "journal") as executor:
        view = executor.with_options(key=refuse)
        assert type(view.submit(abs, -1).exception(PATIENCE)) is SystemExit
        assert executor.submit(hostile.give, 1).result(PATIENCE) == 1
        for method in ("", "__str__"):
            unpicklable = hostile.Unpicklable(SystemExit, method)
            assert type(outcome(executor.submit(hostile.give, unpicklable))) is PayloadError


# What others make of such an exception.


@pytest.mark.parametrize("method", ["__str__", "__bool__", "__getattribute__", "__class__"])
def test_who_depends_on_a_call_that_failed_so_is_told(
    executor: BatchExecutor, tmp_path: Path, method: str
) -> None:
    arguments = (str(tmp_path / "log"), method, SystemExit, "itself")
    first = executor.submit(hostile.fail, *arguments)
    second = executor.submit(hostile.give, {hostile.hostile("__repr__", SystemExit): [first]})
    third = executor.submit(hostile.give, [second])
    for future in (second, third):
        error = outcome(future)
        assert type(error) is DependencyError
        assert type(error.__cause__) is type(first.exception())
    foreign: Future[Any] = Future()
    foreign.set_exception(hostile.hostile(method, SystemExit))
    assert type(outcome(executor.submit(hostile.give, foreign))) is DependencyError
    with pytest.raises(StageError):
        run(stage(hostile.give)(stage(hostile.fail)(*arguments)), executor)
    (found,) = Graph([stage(hostile.fail)(*arguments)]).run(executor, return_exceptions=True)
    assert type(found) is StageError


@pytest.mark.parametrize(
    "method", ["done", "cancelled", "exception", "result", "add_done_callback", "__hash__"]
)
def test_a_future_of_a_class_of_the_programs_may_raise_what_it_likes(
    executor: BatchExecutor, method: str
) -> None:
    """When the thread that serves the network asks it, the call that waits for it fails."""
    failing = threading.Event()

    def refuse(self: Future[Any], *args: object) -> Any:
        if failing.is_set() or method == "__hash__":
            raise SystemExit(method)
        return getattr(Future, method)(self, *args)

    future = type("Foreign", (Future,), {method: refuse})()
    waiting = executor.submit(hostile.give, future)
    failing.set()
    future.set_result(1)
    error = waiting.exception(PATIENCE)
    assert error is None or type(error) in (DependencyError, PayloadError)
    failing.clear()
    assert executor.submit(abs, -1).result(PATIENCE) == 1


def test_the_key_of_an_item_that_failed_is_not_asked_what_it_is_called(
    executor: BatchExecutor,
) -> None:
    """Where a dependency stands is said by the thread that serves the network."""

    class Key:
        def __repr__(self) -> str:
            raise SystemExit("repr")

    future = executor.submit(hostile.give, {Key(): executor.submit(divmod, 1, 0)})
    assert type(outcome(future)) is DependencyError


@pytest.mark.parametrize("method", ["__str__", "__bool__", "__notes__", "__getattribute__"])
def test_retry_on_takes_exceptions_by_their_type(
    executor: BatchExecutor, tmp_path: Path, method: str
) -> None:
    """Types decide, whatever the exception says of itself; a predicate may raise anything."""
    log = tmp_path / "log"
    arguments = (str(log), method, SystemExit, "itself")
    error = outcome(
        executor.with_options(retry_on=Exception, retries=1).submit(hostile.fail, *arguments)
    )
    assert remote_traceback(error)
    assert log.read_text().count("\n") == 2

    def refuse(exc: BaseException) -> bool:
        raise hostile.hostile(method, SystemExit)

    error = outcome(
        executor.with_options(retry_on=refuse, retries=1).submit(hostile.fail, *arguments)
    )
    assert log.read_text().count("\n") == 3


def test_what_a_task_raises_that_makes_a_kept_result_again_is_the_outcome(tmp_path: Path) -> None:
    """It runs no event loop into the ground, and nobody waits for ever."""

    def make(path: str, kind: type[BaseException]) -> bytes:
        tasks.append(path, "ran")
        with open(path) as file:
            if len(file.readlines()) > 1:
                raise kind("made again")
        return LARGE

    kinds = (*hostile.KINDS, StopIteration)
    others = supervisors()
    with BatchExecutor(1) as executor:
        keep = executor.with_options(keep=True)
        made = [keep.submit(make, str(tmp_path / kind.__name__), kind) for kind in kinds]
        refs = [future.result(PATIENCE) for future in made]
        for worker in supervisors():
            if worker not in others:
                worker.kill()
        futures = [executor.submit(len, ref) for ref in refs]
        for kind, future, ref in zip(kinds, futures, refs, strict=True):
            assert type(future.exception(PATIENCE)) is kind
            with pytest.raises(kind):
                ref.get(PATIENCE)
        assert executor.submit(abs, -1).result(PATIENCE) == 1


# Callbacks, and others who run the program's own code in threads of ours.


@pytest.mark.parametrize("kind", hostile.KINDS)
def test_a_callback_that_raises_anything_ends_no_other(
    executor: BatchExecutor,
    kind: type[BaseException],
    caplog: pytest.LogCaptureFixture,
    signals: Signals,
) -> None:
    """It is logged; others of its future, later ones and asyncio's run."""
    called = threading.Event()

    def refuse(future: Future[Any]) -> None:
        raise kind("from a callback")

    future = executor.submit(tasks.hold, signals.told, signals.gate)
    future.add_done_callback(refuse)
    future.add_done_callback(lambda _: called.set())
    signals.release()
    assert called.wait(PATIENCE)
    assert "exception calling callback for <BatchFuture" in caplog.text
    assert "from a callback" in caplog.text

    async def later() -> int:
        work = asyncio.get_running_loop().run_in_executor(executor, abs, -2)
        return await asyncio.wait_for(work, PATIENCE)

    assert asyncio.run(later()) == 2


@pytest.mark.parametrize("method", ["__str__", "__notes__", "__bool__", "__class__"])
def test_what_a_callback_raises_need_not_be_one_that_can_be_logged(
    executor: BatchExecutor, method: str, caplog: pytest.LogCaptureFixture, signals: Signals
) -> None:
    called = threading.Event()

    def refuse(future: Future[Any]) -> None:
        raise hostile.hostile(method, SystemExit)

    future = executor.submit(tasks.hold, signals.told, signals.gate)
    future.add_done_callback(refuse)
    future.add_done_callback(lambda _: called.set())
    signals.release()
    assert called.wait(PATIENCE)
    assert "exception calling callback for <BatchFuture" in caplog.text
    assert "in refuse" in caplog.text


def test_a_callback_in_a_thread_of_the_program_is_the_programs(executor: BatchExecutor) -> None:
    """As in the standard library: what is no ``Exception`` goes on from where it was raised."""
    done = executor.submit(abs, -1)
    done.result(PATIENCE)

    def refuse(future: Future[Any]) -> None:
        raise SystemExit("at once")

    with pytest.raises(SystemExit):
        done.add_done_callback(refuse)
    done.add_done_callback(lambda future: 1 / 0)


class _Refusing(logging.Handler):
    """A handler of the program's own that raises."""

    def __init__(self, kind: type[BaseException]) -> None:
        super().__init__()
        self.kind = kind
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1
        raise self.kind("from a handler")


@pytest.mark.parametrize("kind", [ValueError, SystemExit, KeyboardInterrupt])
def test_a_handler_of_the_log_that_raises_ends_nothing(
    kind: type[BaseException], signals: Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    """What tasks print, warnings, callbacks and predicates are logged in threads of ours."""
    handler = _Refusing(kind)
    loggers = [logging.getLogger(name) for name in ("cloudexec", "concurrent.futures")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
    try:
        with BatchExecutor(1, output="logging") as executor:
            assert executor.submit(print, "a line").result(PATIENCE) is None
            future = executor.submit(tasks.hold, signals.told, signals.gate)
            future.add_done_callback(lambda future: 1 / 0)
            signals.release()
            view = executor.with_options(retry_on=lambda exc: 1 / 0, retries=1)
            assert view.submit(divmod, 1, 0).exception(PATIENCE)
            lost = executor.with_options(retries=0).submit(os._exit, 3)
            assert lost.exception(PATIENCE)
            assert executor.submit(abs, -1).result(PATIENCE) == 1
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
    assert handler.count > 3
    assert "Logging error" in capfd.readouterr().err


def test_a_stream_of_the_program_that_raises_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a task prints is lost then; its result is not, and the executor ends."""

    class Stream:
        def write(self, text: str) -> int:
            raise SystemExit("from a stream")

        def flush(self) -> None:
            raise SystemExit("from a stream")

    with BatchExecutor(1) as executor:
        monkeypatch.setattr(sys, "stdout", Stream())
        for _ in range(2):
            assert executor.submit(print, "a line").result(PATIENCE) is None
        monkeypatch.undo()


def test_a_failed_future_is_failed_although_its_exception_is_false(
    executor: BatchExecutor,
) -> None:
    """Who waits for the first exception is woken by one that is false, or has no length."""
    for method in ("__bool__", "__len__"):
        future: BatchFuture[None] = BatchFuture()
        future.set_running_or_notify_cancel()
        timer = threading.Timer(0.05, future.set_exception, [hostile.hostile(method, SystemExit)])
        timer.start()
        done, _ = wait([future, BatchFuture()], PATIENCE, return_when="FIRST_EXCEPTION")
        timer.join()
        assert future in done


def test_a_task_without_streams_fails_once(executor: BatchExecutor, tmp_path: Path) -> None:
    """A task that deletes ``sys.stdout`` and raises has the outcome that it raised."""

    def fail(path: str) -> None:
        tasks.append(path, "ran")
        del sys.stdout, sys.stderr
        raise ValueError("without streams")

    def restore() -> None:
        sys.stdout, sys.stderr = sys.__stdout__, sys.__stderr__

    log = tmp_path / "log"
    assert type(outcome(executor.submit(fail, str(log)))) is ValueError
    assert log.read_text() == "ran\n"
    assert executor.submit(restore).result(PATIENCE) is None


class _Unpicklable:
    """Raises something of choice when it is pickled."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind

    def __reduce__(self) -> str:
        raise self.kind("while it is pickled")


@pytest.mark.parametrize("kind", [SystemExit, GeneratorExit, MemoryError])
def test_what_pickling_a_result_raises_is_the_outcome(
    kind: type[BaseException], executor: BatchExecutor
) -> None:
    """An error as a ``PayloadError``, ``SystemExit`` as itself, as through a process pool."""
    pid = executor.submit(os.getpid).result(60)
    error = executor.submit(_Unpicklable, kind).exception(60)
    assert type(error) is (PayloadError if issubclass(kind, Exception) else kind)
    assert executor.submit(os.getpid).result(60) == pid


@pytest.mark.parametrize("port", ["99999", "-5", "http", ""])
def test_a_port_that_cannot_be_is_refused(port: str) -> None:
    with pytest.raises(ConfigError, match="must be a number from 0 to 65535"):
        BatchExecutor(1, listen=f"127.0.0.1:{port}")
