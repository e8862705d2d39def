"""What editors, help() and the interactive prompt show."""

from __future__ import annotations

import doctest
import importlib.metadata
import inspect
import os
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import cloudexec
from cloudexec import BatchExecutor, ConfigError


def _public() -> Iterator[tuple[str, Any]]:
    for name in cloudexec.__all__:
        each = getattr(cloudexec, name)
        yield name, each
        if inspect.isclass(each):
            for member, value in inspect.getmembers(each):
                if not member.startswith("_"):
                    yield f"{name}.{member}", value


def test_no_signature_shows_the_address_of_an_object() -> None:
    shown = {}
    for name, each in _public():
        if callable(each):
            try:
                shown[name] = str(inspect.signature(each))
            except ValueError:
                continue
    assert "timeout: 'float | None' = unchanged" in shown["BatchExecutor.with_options"]
    assert [text for text in shown.values() if "<object" in text or " at 0x" in text] == []


def test_choices_are_in_the_signature() -> None:
    parameters = inspect.signature(BatchExecutor).parameters
    assert "'logging'" in parameters["output"].annotation.replace('"', "'")
    assert "'raise'" in parameters["when_full"].annotation.replace('"', "'")
    assert BatchExecutor.__enter__.__annotations__["return"] == "Self"


def test_the_version_is_that_of_the_installation() -> None:
    assert cloudexec.__version__ == importlib.metadata.version("cloudexec")
    assert "__version__" in dir(cloudexec)


def test_examples_in_docstrings_run() -> None:
    parse, runner = doctest.DocTestParser().get_doctest, doctest.DocTestRunner()
    texts = {each.__doc__: name for name, each in _public() if ">>>" in (each.__doc__ or "")}
    assert len(texts) >= 4
    for text, name in texts.items():
        runner.run(parse(text, {"os": os, **vars(cloudexec)}, name, None, None))
    assert runner.summarize(verbose=False).failed == 0


def _fail() -> None:
    raise LookupError("gone")


def test_a_future_shows_its_outcome_before_anybody_has_asked_for_it() -> None:
    with BatchExecutor(1) as executor:
        failed, good = executor.submit(_fail), executor.submit(abs, -1)
    assert repr(failed).endswith("state=finished raised LookupError>")
    assert repr(good).endswith("state=finished returned int>")


@pytest.mark.parametrize(
    "mistake",
    [
        lambda: BatchExecutor(0),
        lambda: BatchExecutor(1, output="loud"),  # type: ignore[arg-type]
        lambda: BatchExecutor(1, idle_timeout=-1),
        lambda: BatchExecutor(1, initializer=5),  # type: ignore[arg-type]
        lambda: BatchExecutor(1).with_options(cpus=-1),
    ],
)
def test_a_mistake_in_settings_ends_at_the_line_that_made_it(mistake: Callable[[], Any]) -> None:
    with pytest.raises((ConfigError, TypeError)) as caught:
        mistake()
    assert caught.value.__cause__ is None
    assert len(traceback.extract_tb(caught.value.__traceback__)) == 3  # test, lambda, the call


def test_statistics_print_as_a_table_of_what_is_not_zero() -> None:
    with BatchExecutor(1) as executor:
        list(executor.map(abs, range(3)))
        stats = executor.stats()
    lines = str(stats).splitlines()
    assert lines[0].split("  ")[-1].strip() == "3 succeeded"
    assert lines[1].startswith("workers")
    assert repr(stats) == str(stats)
    assert "0 failed" not in str(stats)
    assert stats.tasks.succeeded == 3
    assert str(cloudexec.ExecutorStats()).splitlines()[0].endswith("none")


def _square(n: int) -> int:
    return n * n


def test_process_map_of_tqdm_runs_on_an_executor(capsys: pytest.CaptureFixture[str]) -> None:
    """Each result moves the bar once, by a callback.

    What the bar shows last is not ours to say: callbacks have a thread of their own, and tqdm
    closes the bar when it has the results, maybe before the last of them has been called.
    """
    from tqdm.contrib.concurrent import _executor_map
    from tqdm.std import tqdm

    moves = []

    class Bar(tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            moves.append(n)
            return super().update(n)

    found = _executor_map(
        BatchExecutor, _square, range(5), max_workers=2, lock_name="mp_lock", tqdm_class=Bar
    )
    assert found == [n * n for n in range(5)]
    assert moves == [1] * 5
    assert "/5 [" in capsys.readouterr().err
