"""Runs the whole suite in three steps: in several processes, tests that run alone, failed tests.

Most tests wait longer than they compute, so pytest-xdist runs them in three times as many processes
as there are cores. Tests that are marked ``alone``, because they measure time, run one at a time
after all others. A test that has failed runs once more, alone, at the very end. If it passes then,
it is listed as FLAKY with its output of the first time. Three such tests are accepted; with a
fourth the run fails.

``--suite=auto``, the default, does this if no tests are selected. ``on`` does it always and ``off``
never. With ``-x`` or ``--maxfail`` no test runs twice.
"""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Generator
from pathlib import Path
from typing import IO, Any

import pytest

FLAKY_AT_MOST = 3
"""Number of tests that may fail the first time and pass the second time."""
AGAIN_AT_MOST = 15
"""If more tests have failed, none is run again, as so many do not fail by chance."""
TOGETHER = ("tests/images/", "tests/testing/test_fake_containers.py")
"""Tests that use the same images of a container engine, and so must run in one process."""
SLOW = (
    *TOGETHER,
    "tests/cli/test_every_request.py",
    "tests/cli/test_map_taken_over.py",
    "tests/cli/test_run_",
    "tests/environment/test_collection.py",
    "tests/launchers/test_ec2",
    "tests/launchers/test_fargate",
    "tests/launchers/test_kubernetes_example.py",
    "tests/launchers/test_lambda",
    "tests/launchers/test_slurm_example.py",
    "tests/relay/",
    "tests/soak/",
    "tests/worker/test_chaos.py",
)
"""Tests that take long for their number. They begin first, so that no process waits for the last of
them in the end; other files follow with the largest number of tests first."""
HANG_AFTER = 30.0
"""Seconds after a test's timeout after which the test's process is ended."""

_STDERR = pytest.StashKey[IO[str]]()
_AGAIN, _FLAKY = "again", "flaky"
"""Outcomes of a report: its test will run once more, or has passed the second time."""

Take = Callable[[pytest.TestReport], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("suite", "the whole suite")
    group.addoption(
        "--suite",
        choices=("auto", "on", "off"),
        default="auto",
        help="run in several processes, then what is marked alone, then what failed once more; "
        "auto: where no tests are selected",
    )
    group.addoption("--suite-reports", default="", help="file that reports are appended to")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Decide whether ``auto`` means on or off, before xdist reads its options."""
    option = config.option
    if hasattr(config, "workerinput"):
        # In one of xdist's processes, the process that started it has decided.
        option.suite = config.workerinput.get("suite", "off")
        return
    if option.suite == "auto":
        selected = config.args_source is pytest.Config.ArgsSource.ARGS
        selected = selected or option.keyword or option.markexpr
        option.suite = "off" if selected or option.usepdb or option.collectonly else "on"
    if option.suite == "on" and hasattr(option, "numprocesses") and not option.tx:
        if option.numprocesses is None:
            option.numprocesses = min(8, 3 * (os.cpu_count() or 1))
        if option.numprocesses and option.dist == "no":
            option.dist = "loadfile"


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Run the tests of a file in one process, as they share fixtures; likewise ``TOGETHER``."""
    if config.option.suite != "on" or config.option.dist != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

        def remove_node(self, node: Any) -> str | None:
            """Do not run a test again that has ended its process; xdist's own scheduler would."""
            units = self.assigned_work.pop(node)
            left = [(unit, each) for unit in units.values() for each in unit if not unit[each]]
            if not left:
                return None
            unit, crashed = left[0]
            unit[crashed] = True
            self.workqueue.update(
                (scope, unit) for scope, unit in units.items() if not all(unit.values())
            )
            for other in self.assigned_work:
                self._reschedule(other)
            return str(crashed)

    config.option.loadscopereorder = False  # the order is that of the collection
    return Scheduling(config, log)


def _scope(nodeid: str) -> str:
    """Return what the tests that run in one process have in common: their file or the engine."""
    path = nodeid.partition("::")[0]
    return "containers" if path.startswith(TOGETHER) else path


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "alone: runs after all others, while nothing else does")
    if hasattr(config, "workerinput") or config.option.suite_reports:
        # Kept before pytest captures standard error, to print the stack of a test that hangs.
        config.stash[_STDERR] = os.fdopen(os.dup(2), "w")
        config.add_cleanup(config.stash[_STDERR].close)
    if config.option.suite_reports:
        config.pluginmanager.register(_Reporting(config), "suite-reporting")
    elif config.option.suite == "on" and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Suite(config), "suite")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Order the tests, and leave those that run alone to the process that runs xdist."""
    if config.option.suite != "on":
        return
    alone = [item for item in items if item.get_closest_marker("alone")]
    others = [item for item in items if not item.get_closest_marker("alone")]
    if hasattr(config, "workerinput"):
        config.workeroutput["alone"] = [item.nodeid for item in alone]  # type: ignore[attr-defined]
        alone = []
    sizes = Counter(_scope(item.nodeid) for item in others)
    others.sort(key=lambda each: (not each.nodeid.startswith(SLOW), -sizes[_scope(each.nodeid)]))
    items[:] = others + alone


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """End a process of xdist if its test hangs and no signal can interrupt it."""
    seconds = _timeout(item)
    stderr = item.config.stash.get(_STDERR, None)
    if stderr is None or not seconds:
        return (yield)
    faulthandler.dump_traceback_later(seconds + HANG_AFTER, exit=True, file=stderr)
    try:
        return (yield)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _timeout(item: pytest.Item) -> float:
    """Return a test's timeout in seconds, as pytest-timeout knows it; 0 means no limit."""
    marker = item.get_closest_marker("timeout")
    if marker is not None:
        return float(marker.args[0] if marker.args else marker.kwargs.get("timeout", 0))
    given = getattr(item.config.option, "timeout", None)
    return float(given if given is not None else item.config.getini("timeout") or 0)


class _Reporting:
    """Writes each test's reports to a file, in a process that runs single tests."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        # Unbuffered, so that reports written before a crash are kept.
        self._file = open(config.option.suite_reports, "ab", buffering=0)  # noqa: SIM115

    def _note(self, what: str, value: object) -> None:
        self._file.write(json.dumps([what, value]).encode() + b"\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._note("start", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        hook = self._config.hook
        data = hook.pytest_report_to_serializable(config=self._config, report=report)
        self._note("report", data)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._note("finish", nodeid)

    def pytest_unconfigure(self) -> None:
        self._file.close()


class _Suite:
    """Runs the second and third step, in the main process of the run."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._alone: list[str] | None = None
        self._failed: dict[str, list[pytest.TestReport]] = {}
        self._counted: set[str] = set()
        self._flaky: list[tuple[str, list[pytest.TestReport]]] = []
        self._holding = not config.option.maxfail

    @property
    def _terminal(self) -> Any:
        return self._config.pluginmanager.getplugin("terminalreporter")

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        """Pass the decision to a process that xdist is about to start."""
        node.workerinput["suite"] = "on"

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Take over the tests that a process of xdist has left to run alone."""
        output = getattr(node, "workeroutput", None) or {}
        self._alone = output.get("alone", self._alone)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> Generator[None, None, None]:
        if self._holding and report.failed:
            report.outcome = _AGAIN  # type: ignore[assignment]
            self._failed.setdefault(report.nodeid, []).append(report)
        elif (report.passed and report.when == "call") or report.skipped:
            self._counted.add(report.nodeid)
        return (yield)

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(
        self, report: pytest.TestReport
    ) -> tuple[str, str, tuple[str, dict[str, bool]]] | None:
        if report.outcome == _AGAIN:  # type: ignore[comparison-overlap]
            return "", "R", ("FAILED, RUNS AGAIN LATER", {"yellow": True})
        if report.outcome == _FLAKY:  # type: ignore[comparison-overlap]
            return "flaky", "f", ("FLAKY", {"yellow": True})
        return None

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Generator[None, object, object]:
        """Run the tests that are left after all others have ended."""
        try:
            result = yield
            if getattr(self._config.option, "tx", None) and not self._config.option.collectonly:
                self._run_alone(session)
            self._run_again()
        finally:
            # If the run ends early, failed tests do not run again and count as failed.
            self._holding = False
            for reports in self._failed.values():
                self._log(reports, "failed")
        return result

    def _run_alone(self, session: pytest.Session) -> None:
        if self._alone is None:
            raise RuntimeError("no process has lived to say which tests run alone")
        session.testscollected += len(self._alone)
        if self._alone:
            self._say(f"alone, one at a time: {len(self._alone)}")
            hook = self._config.hook
            self._run(self._alone, lambda report: hook.pytest_runtest_logreport(report=report))

    def _run_again(self) -> None:
        self._holding = False
        if not self._failed or len(self._failed) > AGAIN_AT_MOST:
            return
        self._say(f"failed, once more: {len(self._failed)}")
        second: dict[str, list[pytest.TestReport]] = {nodeid: [] for nodeid in self._failed}
        self._run(list(self._failed), lambda report: second[report.nodeid].append(report))
        for nodeid, reports in second.items():
            first = self._failed.pop(nodeid)
            failures = [report for report in reports if report.failed]
            if failures:
                said = "\n".join(report.longreprtext for report in failures)
                first[-1].sections.append(("It ran once more, alone, and failed again", said))
                self._log(first, "failed")
            elif len(self._flaky) >= FLAKY_AT_MOST:
                why = f"with this one, more than {FLAKY_AT_MOST} tests are flaky"
                first[-1].sections.append(("It ran once more, alone, and passed", why))
                self._log(first, "failed")
            else:
                self._flaky.append((nodeid, first))
                self._log(first[:1], _FLAKY)
                if nodeid not in self._counted:
                    self._log(reports)

    def _log(self, reports: list[pytest.TestReport], outcome: Any = None) -> None:
        for report in reports:
            report.outcome = outcome or report.outcome
            self._config.hook.pytest_runtest_logreport(report=report)

    def _say(self, what: str) -> None:
        self._terminal.write_line("")
        self._terminal.write_line(what)

    def pytest_terminal_summary(self) -> None:
        """Show the first reports of flaky tests."""
        if not self._flaky:
            return
        terminal = self._terminal
        terminal.write_sep("=", "FLAKY: failed, and passed when run alone", yellow=True, bold=True)
        for nodeid, reports in self._flaky:
            terminal.write_line(f"FLAKY {nodeid}", yellow=True, bold=True)
            for report in reports:
                report.toterminal(terminal._tw)
                for title, text in report.sections:
                    terminal.write_sep("-", title)
                    terminal.write_line(text)

    # Tests that run one at a time in a separate process.

    def _run(self, nodeids: list[str], take: Take) -> None:
        """Run tests one after the other, and continue in a new process if one ends its process."""
        left = dict.fromkeys(nodeids)
        with tempfile.TemporaryDirectory() as directory:
            while left:
                before = len(left)
                reports, output = Path(directory, "reports"), Path(directory, "output")
                reports.write_bytes(b"")
                with open(output, "wb") as log, open(reports, "rb") as notes:
                    process = subprocess.Popen(
                        self._command(list(left), str(reports)),
                        cwd=self._config.invocation_params.dir,
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                    try:
                        running = self._follow(process, notes, left, take)
                    finally:
                        process.kill()
                        process.wait()
                why = f"Its process ended with {process.returncode}.\n" + output.read_text(
                    errors="replace"
                )
                if running is not None:
                    take(_crashed(running, why))
                    left.pop(running, None)
                if len(left) == before:
                    for nodeid in left:
                        take(_crashed(nodeid, why))
                    return

    def _command(self, nodeids: list[str], reports: str) -> list[str]:
        config = self._config
        args = list(map(str, config.invocation_params.args))
        if config.args_source is pytest.Config.ArgsSource.ARGS:
            args = [arg for arg in args if arg not in config.args]
        if hasattr(config.option, "numprocesses"):
            args.append("-n0")
        if getattr(config.option, "xmlpath", None):
            args.append(f"--junitxml={reports}.xml")
        args += ["--suite=off", f"--suite-reports={reports}", "--"]
        return [
            *(sys.executable, "-m", "pytest"),
            *args,
            *(f"{config.rootpath}{os.sep}{nodeid}" for nodeid in nodeids),
        ]

    def _follow(
        self, process: subprocess.Popen[bytes], notes: IO[bytes], left: dict[str, None], take: Take
    ) -> str | None:
        """Take reports as they arrive; return the test that ran when the process ended."""
        running: str | None = None
        rest = b""
        ended = False
        while not ended:
            try:
                process.wait(0.1)
                ended = True
            except subprocess.TimeoutExpired:
                pass
            *lines, rest = (rest + notes.read()).split(b"\n")
            for line in lines:
                what, value = json.loads(line)
                if what == "start":
                    running = value
                elif what == "finish":
                    running = None
                    left.pop(value, None)
                else:
                    hook = self._config.hook
                    take(hook.pytest_report_from_serializable(config=self._config, data=value))
        return running


def _crashed(nodeid: str, why: str) -> pytest.TestReport:
    path = nodeid.partition("::")[0]
    return pytest.TestReport(nodeid, (path, None, nodeid), {}, "failed", why, "call")
