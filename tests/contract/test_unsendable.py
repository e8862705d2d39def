"""What cannot be pickled is named: where it is, what it is, and what to do instead."""

from __future__ import annotations

import functools
import io
import os
import queue
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cloudpickle
import pytest

from cloudexec import BatchExecutor, PayloadError

cloudpickle.register_pickle_by_value(sys.modules[__name__])

DB = sqlite3.connect(":memory:", check_same_thread=False)
SETTINGS = {"db": SimpleNamespace(conn=DB)}
OPEN = "open it in an initializer, or in the call"
OF_DB = f"(sqlite3.Connection): it belongs to this process: {OPEN}"


@pytest.fixture(scope="module")
def executor() -> Iterator[BatchExecutor]:
    with BatchExecutor(1) as executor:
        yield executor


def work(*args: object, **kwargs: object) -> int:
    return len(args) + len(kwargs)


def query(*args: object) -> object:
    return DB.execute("select 1")


def look_up() -> object:
    return [SETTINGS[name] for name in ("db",)]


def indirect() -> object:
    return query()


def with_default(*, db: object = DB) -> object:
    return db


def over(connection: object) -> Callable[[], object]:
    return lambda: connection


class Job:
    def __init__(self) -> None:
        self.waiting: queue.Queue[int] = queue.Queue()

    def run(self) -> int:
        return self.waiting.qsize()

    def __call__(self) -> int:
        return self.run()


class Slotted:
    __slots__ = ("lock",)

    def __init__(self) -> None:
        self.lock = threading.Lock()


class Refuses:
    def __reduce__(self) -> Any:
        raise ValueError("not me")


class MakesAnother:
    """Pickled as something that it makes for that."""

    def __reduce__(self) -> Any:
        return list, ([threading.Lock()],)


def _nested(depth: int) -> list[Any]:
    nested: list[Any] = []
    for _ in range(depth):
        nested = [nested]
    return nested


def numbers() -> Iterator[int]:
    yield 1


async def answer() -> int:
    return 1


def _message(executor: BatchExecutor, fn: Any, *args: Any, **kwargs: Any) -> str:
    error = executor.submit(fn, *args, **kwargs).exception(30)
    assert type(error) is PayloadError
    assert error.__cause__ is not None  # what pickling has raised
    return str(error)


QUEUE = "(queue.Queue): it belongs to this process: use a queue of a multiprocessing.Manager()"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: (work, 1, DB), f"argument 1 of work() cannot be sent {OF_DB}"),
        (lambda: (query,), f"global DB of query() cannot be sent {OF_DB}"),
        (lambda: (look_up,), f"global SETTINGS['db'].conn of look_up() cannot be sent {OF_DB}"),
        (
            lambda: (indirect,),
            f"global DB of query(), which indirect() refers to, cannot be sent {OF_DB}",
        ),
        (
            lambda: (over(DB),),
            f"closure variable connection of over.<lambda>() cannot be sent {OF_DB}",
        ),
        (
            lambda: (work, over(DB)),
            f"closure variable connection of over.<lambda>(), in argument 0 of work(), cannot be "
            f"sent {OF_DB}",
        ),
        (
            lambda: (with_default,),
            f"default of parameter db of with_default() cannot be sent {OF_DB}",
        ),
        (
            lambda: (work, {"jobs": [1, Job()]}),
            f"['jobs'][1].waiting in argument 0 of work() cannot be sent {QUEUE}",
        ),
        (lambda: (Job().run,), f".waiting in the object of Job.run() cannot be sent {QUEUE}"),
        (lambda: (Job(),), f".waiting in the callable (tests.Job) cannot be sent {QUEUE}"),
        (
            lambda: (functools.partial(work, DB),),
            f"bound argument 0 of work() cannot be sent {OF_DB}",
        ),
        (lambda: (functools.partial(query, 1), 2), f"global DB of query() cannot be sent {OF_DB}"),
        (
            lambda: (work, Slotted()),
            ".lock in argument 0 of work() cannot be sent (_thread.lock): it belongs to this "
            "process: make it in the call, or use one of a multiprocessing.Manager()",
        ),
        (
            lambda: (work, Refuses()),
            "argument 0 of work() cannot be sent (tests.Refuses): ValueError: not me; pass "
            "a value that pickle.dumps() accepts",
        ),
        (
            lambda: (work, MakesAnother()),
            "argument 0 of work() cannot be sent (tests.MakesAnother): TypeError: cannot pickle",
        ),
        (
            lambda: (work, _nested(100_000)),
            "argument 0 of work() cannot be sent (list): PicklingError: Could not pickle object as "
            "excessively deep recursion required.; pass less, or less deeply nested",
        ),
        (
            lambda: (work, numbers()),
            "argument 0 of test_unsendable.work is the generator numbers(), which cannot be sent: "
            "make a list of what it yields, there",
        ),
        (
            lambda: (work, threading.Thread()),
            "argument 0 of work() cannot be sent (threading.Thread): it belongs to this process: "
            "start it in the call",
        ),
        (
            lambda: (work, threading.Event()),
            "argument 0 of work() cannot be sent (threading.Event): it belongs to this process: "
            "make it in the call",
        ),
    ],
)
def test_what_cannot_be_sent_is_named_with_the_remedy(
    executor: BatchExecutor, call: Callable[[], tuple[Any, ...]], said: str
) -> None:
    said = said.replace("(tests.", f"({__name__}.")
    assert _message(executor, *call()).startswith(said)


def test_what_must_be_closed_is_named_with_the_remedy(executor: BatchExecutor) -> None:
    coroutine = answer()
    assert _message(executor, work, coroutine).endswith(
        "submit a function that runs it, with asyncio.run()"
    )
    coroutine.close()


@pytest.mark.parametrize("mode", ["r", "rb", "w"])
def test_open_files_are_refused_whatever_they_are_open_for(
    executor: BatchExecutor, mode: str, tmp_path: Path
) -> None:
    """As by a process pool; cloudpickle would send a copy of what is in a text file."""
    path = tmp_path / "file"
    path.touch()
    with open(path, mode) as file:
        assert _message(executor, work, file).endswith(
            "it is an open file: pass its path, and open it in the call"
        )
        said = _message(executor, lambda: file.read())
        assert said.startswith("closure variable file of ")
        assert said.endswith("it is an open file: use its path, and open it in the call")


def test_standard_streams_and_files_in_memory_are_sent(
    executor: BatchExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(os.devnull, "w") as file:  # pytest has put something of its own there
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, file)
            assert executor.submit(_name, file).result(30) == name
            monkeypatch.undo()
    assert executor.submit(io.StringIO.getvalue, io.StringIO("text")).result(30) == "text"


def _name(stream: object) -> str:
    return "stdout" if stream is sys.stdout else "stderr" if stream is sys.stderr else "?"


@pytest.mark.parametrize("chunksize", [1, 2])
def test_map_names_the_argument_of_the_call(executor: BatchExecutor, chunksize: int) -> None:
    results = executor.map(work, [1, 2, 3], [4, 5, DB], chunksize=chunksize)
    assert next(results) == next(results) == 2
    with pytest.raises(PayloadError) as caught:
        next(results)
    assert str(caught.value) == f"argument 1 of work() cannot be sent {OF_DB}"


def test_put_and_initargs_name_what_they_cannot_send() -> None:
    with BatchExecutor(1, initializer=work, initargs=(1, [DB])) as executor:
        with pytest.raises(PayloadError) as caught:
            executor.submit(work)
    assert str(caught.value) == f"[0] in initargs[1] of work() cannot be sent {OF_DB}"
    with BatchExecutor(1) as executor:
        with pytest.raises(PayloadError) as caught:
            executor.put({"db": DB})
    assert str(caught.value) == f"['db'] in the value cannot be sent {OF_DB}"


def test_a_result_that_cannot_be_sent_is_named_with_the_remedy(executor: BatchExecutor) -> None:
    assert _message(executor, numbers).startswith("the call returned the generator numbers(), ")
    assert _message(executor, lambda: {"lock": threading.Lock()}) == (
        "['lock'] in the result cannot be sent (_thread.lock): it belongs to the worker: return "
        "data instead"
    )
    said = _message(executor, tempfile.TemporaryFile, "w+")
    assert said.endswith("it is an open file: return its path, or what is in it")


class _Breaks:
    """Cannot be unpickled where it arrives."""

    def __init__(self, how: type[BaseException]) -> None:
        self.how = how

    def __reduce__(self) -> Any:
        return _fail, (self.how,)


def _fail(how: type[BaseException]) -> None:
    raise how("here")


@pytest.mark.parametrize("how", [ImportError, AttributeError, ValueError])
def test_only_what_is_missing_is_to_be_made_importable(
    executor: BatchExecutor, how: type[BaseException]
) -> None:
    """Advice about modules helps nobody whose class raises something else."""
    error = executor.submit(work, _Breaks(how)).exception(30)
    assert f"could not be unpickled in the worker ({how.__name__}: here)" in str(error)
    assert ("importable" in str(error)) == (how is not ValueError)
    error = executor.submit(_Breaks, how).exception(30)
    assert f"could not be unpickled in the client ({how.__name__}: here)" in str(error)
    assert ("importable" in str(error)) == (how is not ValueError)


def test_nothing_is_looked_for_as_long_as_all_can_be_sent() -> None:
    """The module that does it is not even imported."""
    code = (
        "import sys\n"
        "from cloudexec import BatchExecutor\n"
        "with BatchExecutor(1) as executor:\n"
        "    assert executor.submit(abs, -1).result() == 1\n"
        "    assert list(executor.map(abs, [-1])) == [1]\n"
        "assert 'cloudexec._unsendable' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=50)
