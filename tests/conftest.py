"""Set-up for all tests."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator

import pytest

pytest_plugins = ["suite_plugin", "load_plugin", "sdk_plugin"]

# A shell that starts the run in the background makes it ignore SIGINT. Children inherit that, and
# programs that tests interrupt would ignore the signal, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# A run that is to outlive its terminal ignores SIGHUP, with the same effect.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

_over = threading.Event()
_TEMPORARY = "CE_TESTS_TEMPORARY"
_ours: list[str] = []


def pytest_configure() -> None:
    """Make a directory for the temporary files of this run, as killed programs leave some."""
    if _TEMPORARY not in os.environ:
        # pytest's own directories stay where they are, as paths of sockets in them must be short.
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
        _ours.append(tempfile.mkdtemp(prefix="ce-tests-"))
        os.environ[_TEMPORARY] = _ours[0]
    # What tests put into images is not remembered beyond them.
    os.environ["CLOUDEXEC_CACHE_DIR"] = os.path.join(os.environ[_TEMPORARY], "cache")
    os.environ["TMPDIR"] = tempfile.tempdir = os.environ[_TEMPORARY]


def pytest_unconfigure() -> None:
    """Remove that directory, in the process that made it; the others of the run only use it."""
    for directory in _ours:
        shutil.rmtree(directory, ignore_errors=True)


def pytest_sessionstart() -> None:
    """Start a second thread, as xdist does, so that workers are not forked from this process.

    So tests find the same processes with and without xdist. Programs that tests start have one
    thread, and their workers are forked copies of them.
    """
    threading.Thread(target=_over.wait, name="second", daemon=True).start()


def pytest_sessionfinish() -> None:
    """End the thread."""
    _over.set()


def pytest_collection_finish() -> None:
    """Keep what all tests consist of out of garbage collections: it is there until the end.

    Many tests collect garbage, and with the objects of 3,500 tests that takes up to a second.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show with a test that failed what the workers of its emulated AWS wrote that failed, too."""
    report = yield
    aws = getattr(item, "funcargs", {}).get("aws")
    # By its name, as its module is not there in each environment that tests run in.
    if report.when == "call" and report.failed and type(aws).__name__ == "FakeAWS":
        with contextlib.suppress(RuntimeError):  # the test has ended its emulation itself
            for job in aws.jobs():
                if job.exit_code not in (None, 0, 143):
                    last = "\n".join(aws.logs(job.job_id)[-40:])
                    report.sections.append((f"Log of job {job.job_id}, {job.status_reason}", last))
    return report


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


@pytest.fixture(autouse=True)
def _same_settings_after_each_test() -> Iterator[None]:
    """Restore the settings of AWS and of cloudexec.

    ``monkeypatch`` and an emulated AWS both restore them, to different values where they do it in
    the wrong order, which depends on the fixtures of a test.
    """

    def settings() -> dict[str, str]:
        ours = [key for key in os.environ if key.startswith(("AWS_", "CLOUDEXEC_"))]
        return {key: os.environ[key] for key in ours}

    before = settings()
    yield
    for key in settings().keys() - before.keys():
        del os.environ[key]
    os.environ.update(before)


@pytest.fixture
def restless() -> Iterator[Callable[[float], None]]:
    """A function that sets after how many seconds Python switches between this test's threads."""
    before = sys.getswitchinterval()
    yield sys.setswitchinterval
    sys.setswitchinterval(before)
