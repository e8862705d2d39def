"""Remote tracebacks name file and line of what a program defines, and show its source."""

from __future__ import annotations

import asyncio
import linecache
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from contract_helpers import PATIENCE

from cloudexec import BatchExecutor
from cloudexec._describing import with_sources

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def executor() -> Iterator[BatchExecutor]:
    with BatchExecutor(1) as executor:
        yield executor


def remote_traceback(executor: BatchExecutor, fn: Callable[..., Any], *args: Any) -> str:
    error = executor.submit(fn, *args).exception(PATIENCE)
    assert error is not None
    return str(error.__cause__)


# All of these are in a function, so that they travel by value.


def _nested() -> Callable[[], Any]:
    def outer() -> None:
        def inner() -> None:
            raise ValueError("in a nested function")

        inner()

    return outer


def _lambda() -> Callable[[], Any]:
    return lambda: int("in a lambda")


def _method() -> Callable[[], Any]:
    class Local:
        def method(self) -> None:
            raise ValueError("in a method")

    return Local().method


def _property() -> Callable[[], Any]:
    class Local:
        @property
        def value(self) -> int:
            raise ValueError("in a property")

    made = Local()
    return lambda: made.value


def _generator() -> Callable[[], Any]:
    def generate() -> Iterator[int]:
        yield 1
        raise ValueError("in a generator")

    return lambda: list(generate())


def _coroutine() -> Callable[[], Any]:
    async def work() -> None:
        await asyncio.sleep(0)
        raise ValueError("in a coroutine")

    return lambda: asyncio.run(work())


def _comprehension() -> Callable[[], Any]:
    return lambda: [int("in a comprehension") for _ in range(1)]


def _wrapped() -> Callable[[], Any]:
    def decorate(fn: Callable[[], None]) -> Callable[[], None]:
        def wrapper() -> None:
            fn()

        return wrapper

    @decorate
    def wrapped() -> None:
        raise ValueError("in a wrapped function")

    return wrapped


@pytest.mark.parametrize(
    "make",
    [_nested, _lambda, _method, _property, _generator, _coroutine, _comprehension, _wrapped],
)
def test_traceback_names_file_and_line(
    executor: BatchExecutor, make: Callable[[], Callable[[], Any]]
) -> None:
    """Of whatever kind of code it is; the line number is that of the line that is shown."""
    text = remote_traceback(executor, make())
    lines = text.splitlines()
    shown = next(n for n, line in enumerate(lines) if f'"in a {make.__name__[1:]}' in line)
    before = max(n for n in range(shown) if lines[n].startswith('  File "'))
    assert f'File "{__file__}", line ' in lines[before]
    number = int(lines[before].split(", line ")[1].split(",")[0])
    source = Path(__file__).read_text().splitlines()[number - 1]
    assert source.strip() == lines[shown].strip()


def test_traceback_through_a_classs_own_exception_names_its_file(executor: BatchExecutor) -> None:
    """Classes of exceptions travel by value too, and what their methods do is told as well."""

    class Local(Exception):
        def explain(self) -> None:
            raise ValueError("in an exception's method")

    def fail() -> None:
        raise Local("first")

    error = executor.submit(fail).exception(PATIENCE)
    assert error is not None
    text = remote_traceback(executor, error.explain)  # type: ignore[attr-defined]
    assert f'File "{__file__}", line ' in text
    assert 'raise ValueError("in an exception\'s method")' in text


SCRIPT = """
from cloudexec import BatchExecutor

class Tool:
    def use(self):
        raise ValueError("in the script")

def fail():
    Tool().use()

if __name__ == "__main__":
    with BatchExecutor(1) as executor:
        for future in (executor.submit(fail), executor.submit(lambda: fail())):
            text = str(future.exception(60).__cause__)
            assert text.count(__file__) == text.count("File "), text
            assert 'raise ValueError("in the script")' in text, text
            assert "Tool().use()" in text, text
        for error in executor.map(lambda kind: kind, [KeyError]):
            pass
        try:
            list(executor.map(lambda tool: tool.use(), [Tool()]))
        except ValueError as exc:
            assert 'raise ValueError("in the script")' in str(exc.__cause__)
    print("ok")
"""


def test_traceback_names_the_script(tmp_path: Path) -> None:
    script = tmp_path / "a script.py"
    script.write_text(SCRIPT)
    run = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert (run.returncode, run.stdout) == (0, "ok\n"), run.stderr


def test_source_that_only_the_client_has_is_shown(executor: BatchExecutor) -> None:
    """A notebook's cells are in no file, and a worker elsewhere has no copy of the script."""
    source = (
        "def fail(depth):\n    if depth:\n        fail(depth - 1)\n    raise ValueError('cell')\n"
    )
    name = "/nowhere/ipykernel_1/cell.py"
    linecache.cache[name] = (len(source), None, source.splitlines(True), name)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(source, name, "exec"), names)
    text = remote_traceback(executor, names["fail"], 2)
    assert f"File \"{name}\", line 4, in fail\n    raise ValueError('cell')" in text
    assert text.count("    fail(depth - 1)\n") == 2

    def together() -> None:
        try:
            names["fail"](0)
        except ValueError as exc:
            raise ExceptionGroup("both", [exc, ValueError("other")]) from None

    text = remote_traceback(executor, together)
    frame = f'File "{name}", line 4, in fail'
    assert re.search(rf"\|   {frame}\n[ |]+    raise ValueError\(", text)
    assert "    raise ValueError('cell')" in text
    del linecache.cache[name]


def test_no_other_file_is_read_for_a_traceback(tmp_path: Path) -> None:
    """Whatever a worker says: only files of modules that this process has loaded."""
    secret = tmp_path / "secret.py"
    secret.write_text("a secret\n")
    text = f'  File "{secret}", line 1, in f\nValueError'
    assert with_sources(text) == text
    own = f'  File "{__file__}", line 1, in f\nValueError'
    assert Path(__file__).read_text().splitlines()[0] in with_sources(own)
    own += ": 1"
    assert with_sources(with_sources(own)) == with_sources(own)


def test_code_itself_arrives_with_the_name_of_its_file(executor: BatchExecutor) -> None:
    """There and back: a code object is no function, and may stand anywhere."""
    code = _nested().__code__
    found = executor.submit(lambda: [code, {"code": code}]).result(PATIENCE)[0]
    assert (found, found.co_filename) == (code, __file__)
