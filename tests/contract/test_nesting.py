"""Executors inside of tasks: on purpose, by accident, and how deep."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from cloudexec import BatchExecutor, InitializerError, NestingError

PATIENCE = 40

_UNGUARDED = """
import multiprocessing, threading
from pathlib import Path
from cloudexec import BatchExecutor, NestingError, stage

NOTES = Path(__file__).with_name("notes")
unused = BatchExecutor(1)

def note(text):
    with NOTES.open("a") as file:
        file.write(text + "\\n")

def start(use=lambda executor: executor.submit(abs, -1).result()):
    try:
        with BatchExecutor(1) as executor:
            use(executor)
    except NestingError:
        note("refused")
        raise
    note("started")

def same(value):
    return value

class Thing:
    pass

if NOTES.exists():
    {statement}
"""


@pytest.fixture
def unguarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A module that does something when it is imported, but not when it is imported here."""

    def make(statement: str) -> ModuleType:
        name = f"unguarded_{abs(hash(tmp_path))}"
        (tmp_path / f"{name}.py").write_text(_UNGUARDED.format(statement=statement))
        monkeypatch.syspath_prepend(str(tmp_path))
        module = importlib.import_module(name)
        module.NOTES.touch()
        return module

    return make


def _apply(fn: Callable[..., Any], *args: Any) -> Any:
    return fn(*args)


def test_a_module_that_starts_an_executor_fails_the_tasks_that_it_is_imported_for(
    unguarded: Callable[[str], ModuleType],
) -> None:
    """Each of them once, with what to do; the module runs once for all of them."""
    module = unguarded("start()")
    with BatchExecutor(1) as executor:
        errors = [
            executor.submit(module.same, 1).exception(PATIENCE),
            executor.submit(_apply, module.same, 1).exception(PATIENCE),
            executor.submit(len, [module.Thing()]).exception(PATIENCE),
        ]
        with pytest.raises(NestingError) as caught:
            list(executor.map(module.same, range(100)))
        assert executor.submit(abs, -1).result(PATIENCE) == 1
    for error in (*errors, caught.value):
        assert isinstance(error, NestingError)
        assert 'if __name__ == "__main__":' in str(error)
        assert repr(module.__name__) in str(error)
        assert str(module.__file__) in str(error)
    assert module.NOTES.read_text() == "refused\n"


_WAYS = """
    thread = threading.Thread(target=start)
    child = multiprocessing.get_context("fork").Process(target=start)
    for each in (thread, child):
        each.start()
        each.join()
    for use in (
        lambda executor: executor.map(abs, [-1]),
        lambda executor: executor.put(1),
        lambda executor: executor.with_options(retries=0).submit(abs, -1),
        lambda executor: stage(abs)(-1).run(executor),
    ):
        try:
            start(use)
        except NestingError:
            pass
"""


def test_no_way_to_start_an_executor_is_open_while_a_module_is_imported(
    unguarded: Callable[[str], ModuleType],
) -> None:
    """Nor to a thread or a forked child of it; it may catch what it is told."""
    module = unguarded(_WAYS.strip())
    with BatchExecutor(1) as executor:
        assert executor.submit(module.same, 1).result(PATIENCE) == 1
    assert module.NOTES.read_text() == 6 * "refused\n"


_THREAD = """
    go = threading.Event()
    thread = threading.Thread(target=lambda: go.wait() and start())
    thread.start()

    def let_go():
        go.set()
        thread.join()
"""


def test_a_thread_that_an_import_has_started_starts_no_executor_later(
    unguarded: Callable[[str], ModuleType],
) -> None:
    """Its module is imported by then."""
    module = unguarded(_THREAD.strip())
    with BatchExecutor(1) as executor:
        executor.submit(_let_go, module.Thing()).result(PATIENCE)
    assert module.NOTES.read_text() == "refused\n"


def _let_go(thing: object) -> None:
    importlib.import_module(type(thing).__module__).let_go()


@pytest.mark.parametrize("as_argument", [False, True])
def test_an_initializer_is_looked_for_in_such_a_module(
    unguarded: Callable[[str], ModuleType], as_argument: bool
) -> None:
    """The executor is broken, and says why."""
    module = unguarded("start()")
    initializer, argument = (print, module.Thing()) if as_argument else (module.same, 1)
    with BatchExecutor(1, initializer=initializer, initargs=(argument,)) as executor:
        error = executor.submit(abs, -1).exception(PATIENCE)
    assert isinstance(error, InitializerError)
    assert isinstance(error.__cause__, NestingError)
    assert "__main__" in str(error)
    assert module.NOTES.read_text() == "refused\n"


def _deep() -> list[str]:
    """Return the depth of each task that is inside of another one, and what ended that."""
    here = [os.environ["CLOUDEXEC_DEPTH"]]
    try:
        with BatchExecutor(1) as executor:
            return here + executor.submit(_deep).result()
    except NestingError as error:
        return [*here, str(error)]


def test_executors_in_tasks_are_limited_in_depth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of them are inside of one another; the fifth says so. Two are outside of this test."""
    monkeypatch.setenv("CLOUDEXEC_DEPTH", "2")
    with BatchExecutor(1) as executor:
        *depths, said = executor.submit(_deep).result(PATIENCE)
    assert depths == ["3", "4"]
    assert "inside 4 nested executors" in said


def test_depth_is_told_to_workers_that_dial_a_network_address() -> None:
    """Nothing of this process's environment reaches those."""
    with BatchExecutor(1, listen="127.0.0.1:0") as executor:
        assert executor.submit(os.getenv, "CLOUDEXEC_DEPTH").result(PATIENCE) == "1"
