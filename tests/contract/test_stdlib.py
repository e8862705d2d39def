"""CPython's own executor tests, run against ``BatchExecutor``.

Every class of the suite that takes an executor gets a subclass here, made at run time. Tests that
expect the whole pool to break (``BrokenProcessPool``) run with the errors that fail one future here
in its place. What is left out stands in ``DESELECTED``, with its reason.
"""

from __future__ import annotations

import functools
import multiprocessing
import sys
import threading
import unittest
import unittest.mock
from concurrent import futures
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, cast

import pytest
from cpython_suite import HOW_TO_GET_IT, assert_python_ok, find_suites, load

import cloudexec
from cloudexec import PayloadError, RemoteTraceback, WorkerLostError

pytestmark = [pytest.mark.timeout(60), pytest.mark.filterwarnings("default")]

_PROCESSES = "It watches the pool's _processes, which belong to another process here."
_MANAGER = "It replaces or watches the pool's _executor_manager_thread, which does not exist here."
_ITSELF = "It makes a ProcessPoolExecutor instead of the executor under test."

DESELECTED = {
    "ProcessPoolExecutorTest.test_idle_process_reuse_multiple": _PROCESSES,
    "ProcessPoolExecutorTest.test_idle_process_reuse_one": _PROCESSES,
    "ProcessPoolExecutorTest.test_killed_child": (
        "It kills a process and expects the whole pool to break, where one future fails here."
    ),
    "ProcessPoolExecutorTest.test_max_tasks_per_child": _PROCESSES,
    "ProcessPoolExecutorTest.test_max_tasks_per_child_defaults_to_spawn_context": (
        "It looks at _mp_context, which does not exist here."
    ),
    "ProcessPoolExecutorTest.test_max_workers_too_large": (
        "It makes a ProcessPoolExecutor and looks at a limit of that on Windows."
    ),
    "ProcessPoolExecutorTest.test_python_finalization_error": (
        "It makes the start of the pool's queue feeder thread fail, which does not exist here."
    ),
    "ProcessPoolExecutorTest.test_saturation": _PROCESSES,
    "ProcessPoolShutdownTest.test_context_manager_shutdown": _ITSELF,
    "ProcessPoolShutdownTest.test_del_shutdown": _ITSELF,
    "ProcessPoolShutdownTest.test_processes_terminate": _PROCESSES,
    "ProcessPoolShutdownTest.test_shutdown_no_wait": _ITSELF,
    "ExecutorShutdownTest.test_cancel_futures": (
        "It expects that calls in the pool's call queue count as running, where calls that no "
        "process has begun are cancelled here."
    ),
    "ExecutorDeadlockTest.test_gh105829_should_not_deadlock_if_wakeup_pipe_full": _MANAGER,
    "ExecutorDeadlockTest.test_shutdown_deadlock_pickle": _MANAGER,
}

_SINCE_3_12 = {
    "ExecutorDeadlockTest.test_gh105829_should_not_deadlock_if_wakeup_pipe_full",
    "ProcessPoolExecutorTest.test_python_finalization_error",
}

_LEAST_CASES = 45
"""How many cases must be left: Python 3.11's suite, the smallest, leaves 46."""

_modules, _path = load()


class _Executor(cloudexec.BatchExecutor):
    """Takes the one argument of ``ProcessPoolExecutor`` that has no meaning here."""

    def __init__(self, *args: Any, mp_context: BaseContext | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)


_Executor.__name__ = "BatchExecutor"  # the tests write it into scripts


class _OnBatchExecutor:
    """What is added to every generated class: the executor, and what stands in for the pool's."""

    executor_type = _Executor
    _threads: int

    def get_context(self) -> BaseContext:
        """Return a context for the test's own use; the executor ignores it."""
        return multiprocessing.get_context("spawn")

    def setUp(self) -> None:
        case = cast(unittest.TestCase, self)
        for module in _modules:
            for name, value in _STAND_INS.items():
                if hasattr(module, name):
                    patch = unittest.mock.patch.object(module, name, value)
                    patch.start()
                    case.addCleanup(patch.stop)
        patch = unittest.mock.patch("concurrent.futures.process._RemoteTraceback", RemoteTraceback)
        patch.start()
        case.addCleanup(patch.stop)
        _ran.append(case.id())
        self._threads = len(threading.enumerate())
        super().setUp()  # type: ignore[misc]

    def tearDown(self) -> None:
        from test import support

        support.environment_altered = False
        super().tearDown()  # type: ignore[misc]
        # The suite only warns of threads and child processes that a test left behind.
        altered, support.environment_altered = support.environment_altered, False
        if sys.version_info < (3, 11, 4):
            # There it counts threads that have ended, and that garbage collection will delete.
            altered = len(threading.enumerate()) > self._threads
            altered = altered or bool(multiprocessing.active_children())
        assert not altered, f"threads or processes were left behind: {threading.enumerate()}"


_STAND_INS: dict[str, Any] = {
    "BrokenProcessPool": (WorkerLostError, PayloadError),
    "assert_python_ok": functools.partial(assert_python_ok, _path),
}
_ran: list[str] = []
_ALONE = {"WaitTests.test_timeout"}
"""Gives five seconds to an executor that has not started yet, however busy the machine is."""


def _generate() -> dict[str, type[unittest.TestCase]]:
    """Make a test case of every class that tests an executor it is given."""
    found = {
        name: value
        for module in _modules
        for name, value in vars(module).items()
        if isinstance(value, type)
        and value.__module__ == module.__name__
        and not issubclass(value, unittest.TestCase)
        and any(method.startswith("test") for method in dir(value))
    }
    base = next(vars(m)["BaseTestCase"] for m in _modules if hasattr(m, "BaseTestCase"))
    mixin = next(vars(m)["ExecutorMixin"] for m in _modules if hasattr(m, "ExecutorMixin"))
    made: dict[str, type[unittest.TestCase]] = {}
    for name, tests in found.items():
        if any(tests in other.__mro__[1:] for other in found.values()):
            continue  # its tests run as those of the class that extends it
        deselected = {
            method: None
            for method in dir(tests)
            for owner in tests.__mro__
            if f"{owner.__name__}.{method}" in DESELECTED
        }
        alone = {
            method: pytest.mark.alone(getattr(tests, method))
            for method in dir(tests)
            if f"{name}.{method}" in _ALONE
        }
        bases = (_OnBatchExecutor, tests, mixin, base)
        body = {**deselected, **alone, "__module__": __name__}
        made[f"Test{name}"] = type(f"Test{name}", bases, body)
    return made


_classes = _generate() if _modules else {}
globals().update(_classes)


def setup_module() -> None:
    sys.path[:0] = _path


def teardown_module() -> None:
    del sys.path[: len(_path)]


def test_suite_is_installed() -> None:
    """Without the suite nothing of this file runs, and that is said."""
    if not _modules:
        pytest.skip(HOW_TO_GET_IT)
    assert futures.ProcessPoolExecutor.__name__ == "ProcessPoolExecutor"
    names = {name.removeprefix("Test") for name in _classes}
    assert names >= {
        "AsCompletedTests",
        "ExecutorDeadlockTest",
        "FailingInitializerMixin",
        "InitializerMixin",
        "ProcessPoolExecutorTest",
        "ProcessPoolShutdownTest",
        "WaitTests",
    }


def test_deselected_cases_are_documented() -> None:
    """The page for those who change the class names each of them with its reason."""
    page = (Path(__file__).parents[2] / "docs" / "porting.md").read_text()
    rows = [f"| `{case}` | {why} |" for case, why in DESELECTED.items()]
    assert [row for row in rows if row not in page] == []
    assert f"{len(rows)} cases" in page


def test_deselected_cases_exist() -> None:
    """Every name in the table is that of a case in a suite found here."""
    suites = find_suites()
    if not suites:
        pytest.skip(HOW_TO_GET_IT)
    known = set().union(*(suite.cases() for suite in suites))
    unknown = set(DESELECTED) - known
    if max(suite.version for suite in suites) < (3, 12):
        unknown -= _SINCE_3_12
    assert not unknown
    assert set(DESELECTED) >= _SINCE_3_12


def test_enough_cases_ran(request: pytest.FixtureRequest) -> None:
    """The table leaves most of the suite, and what is left ran."""
    if not _modules:
        pytest.skip(HOW_TO_GET_IT)
    cases = [
        f"{made.__module__}.{made.__name__}.{method}"
        for made in _classes.values()
        for method in unittest.TestLoader().getTestCaseNames(made)
    ]
    assert len(cases) >= _LEAST_CASES
    here = [item for item in request.session.items if item.fspath == request.node.fspath]
    together = {case for case in cases if not case.endswith(tuple(_ALONE))}
    if len(here) >= len(together) + 3:  # all were asked for
        assert set(_ran) >= together
