"""What holds for every test."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator

import pytest

pytest_plugins = ["suite_plugin", "load_plugin"]

# A shell that starts the run in the background has SIGINT ignored, and children inherit that:
# those that are to be interrupted would not notice.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# And one that outlives its terminal, SIGHUP.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

_over = threading.Event()
_TEMPORARY = "CE_TESTS_TEMPORARY"
_ours: list[str] = []


def pytest_configure() -> None:
    """Have a directory for temporary files of this run, which programs that tests kill leave."""
    if _TEMPORARY not in os.environ:
        # pytest's own directories stay where they are: sockets in them have short paths.
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
        _ours.append(tempfile.mkdtemp(prefix="ce-tests-"))
        os.environ[_TEMPORARY] = _ours[0]
    os.environ["TMPDIR"] = tempfile.tempdir = os.environ[_TEMPORARY]


def pytest_unconfigure() -> None:
    """Remove it, where it was made: other processes of the run share it."""
    for directory in _ours:
        shutil.rmtree(directory, ignore_errors=True)


def pytest_sessionstart() -> None:
    """Have a second thread, as xdist has one: workers of this process are no copies of it then.

    So tests find the same processes with xdist and without. Programs that tests start have copies.
    """
    threading.Thread(target=_over.wait, name="second", daemon=True).start()


def pytest_sessionfinish() -> None:
    """Let the thread end."""
    _over.set()


def pytest_collection_finish() -> None:
    """Keep what all tests consist of out of garbage collections: it is there until the end.

    Many tests collect garbage, and with the objects of 3,500 tests that takes up to a second.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Generator[None, object, object]:
    """Do the same with what a file of tests leaves behind for good, such as models of botocore."""
    try:
        return (yield)
    finally:
        if nextitem is not None and nextitem.path != item.path:
            gc.collect()
            gc.freeze()


@pytest.fixture
def restless() -> Iterator[Callable[[float], None]]:
    """Say after how many seconds this test's threads take turns."""
    before = sys.getswitchinterval()
    yield sys.setswitchinterval
    sys.setswitchinterval(before)
