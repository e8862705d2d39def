"""What tasks log, in the handlers of the client."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cloudexec import BatchExecutor


class _Records(logging.Handler):
    """Keeps what it is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@pytest.fixture
def logger() -> Iterator[logging.Logger]:
    """A logger with a level and a handler of its own, and the root above it."""
    logger = logging.getLogger("tests.of.logs")
    logger.setLevel(logging.DEBUG)
    yield logger
    logger.setLevel(logging.NOTSET)
    for handler in list(logger.handlers):
        logger.removeHandler(handler)


@pytest.fixture
def records(logger: logging.Logger) -> _Records:
    records = _Records()
    logger.addHandler(records)
    return records


def _log(n: int) -> None:
    logging.getLogger("tests.of.logs").debug("task says %d", n, extra={"n": n, "what": {1}})
    logging.getLogger("tests.others").info("below the level of the root")


def _fail() -> None:
    logger = logging.getLogger("tests.of.logs.below")
    try:
        raise ValueError("why")
    except ValueError:
        logger.exception("it failed")
    raise RuntimeError


def test_records_of_tasks_reach_the_handlers_here(
    records: _Records, caplog: pytest.LogCaptureFixture
) -> None:
    """Before the result does, once each, with levels, extras, process, worker and task."""
    caplog.set_level(logging.WARNING)
    caplog.handler.setLevel(logging.NOTSET)
    with BatchExecutor(2) as executor:
        for n in range(2):
            executor.with_options(name="speaking").submit(_log, n).result(30)
        list(executor.map(_log, range(2, 20)))
        seen = list(records.records)
        error = executor.submit(_fail).exception(30)
    assert sorted(record.getMessage() for record in seen) == sorted(
        f"task says {n}" for n in range(20)
    )
    first: Any = seen[0]
    assert (first.name, first.levelname, first.funcName) == ("tests.of.logs", "DEBUG", "_log")
    assert (first.n, first.what) == (0, "{1}")
    assert first.processName.startswith("BatchWorker-")
    assert (first.worker, first.task, first.task_name) == ("worker-1", 1, "speaking")
    assert [record for record in caplog.records if record.name.startswith("tests")][:1] == [first]
    failed: Any = records.records[-1]
    assert (failed.name, failed.getMessage()) == ("tests.of.logs.below", "it failed")
    assert "ValueError: why" in failed.exc_text
    assert "ERROR:tests.of.logs.below:it failed" in error.__cause__.output  # type: ignore[union-attr]
    assert not [record for record in caplog.records if record.name == "tests.others"]


def test_what_is_not_to_be_shown_is_logged_all_the_same(records: _Records) -> None:
    with BatchExecutor(1, output="off") as executor:
        executor.submit(_log, 0).result(30)
    assert [record.getMessage() for record in records.records] == ["task says 0"]


def test_records_can_be_kept_from_here(records: _Records) -> None:
    with BatchExecutor(1, forward_logs=False) as executor:
        executor.submit(_log, 0).result(30)
        assert executor.submit(logging.getLogger().hasHandlers).result(30) is False
    assert records.records == []


def _log_from_threads(count: int) -> None:
    threads = [threading.Thread(target=_log, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logging.getLogger("tests.of.logs").info("x" * 1_000_000)


def test_threads_of_a_task_log_whole_records(records: _Records) -> None:
    with BatchExecutor(1) as executor:
        executor.submit(_log_from_threads, 20).result(30)
    *seen, long = [record.getMessage() for record in records.records]
    assert sorted(seen) == sorted(f"task says {n}" for n in range(20))
    assert set(long) == {"x"}


def _nested() -> None:
    with BatchExecutor(1) as inner:
        inner.submit(_log, 1).result()


def test_tasks_of_tasks_are_heard_as_well(records: _Records) -> None:
    with BatchExecutor(1) as executor:
        executor.submit(_nested).result(50)
    assert [record.getMessage() for record in records.records] == ["task says 1"]


def test_a_program_without_handlers_shows_warnings_as_ever() -> None:
    """On standard error, once, without a prefix; and an initializer may set up its own logging."""
    program = """
import logging, sys
from cloudexec import BatchExecutor
def work(n):
    logging.info("hidden")
    logging.getLogger("lib").warning("shown %d", n)
def initialize():
    logging.basicConfig(level=logging.INFO, format="own: %(message)s", stream=sys.stdout)
logging.getLogger("lib").addHandler(logging.NullHandler())
logging.getLogger("lib").propagate = True
with BatchExecutor(1) as executor:
    executor.submit(logging.getLogger("app").warning, "plain").result()
with BatchExecutor(1, initializer=initialize) as executor:
    executor.submit(work, 2).result()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=50)
    assert done.stderr == b"plain\n"
    assert done.stdout == b"own: hidden\nown: shown 2\n"
