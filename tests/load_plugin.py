"""Runs the suite on a busy machine, or with frequent switches between threads.

``--busy`` runs three computing processes beside the tests. ``--restless`` makes every Python of
this environment switch between its threads after 2 microseconds while the run lasts. Tests and code
that depend on an order of events must work with both. Timeouts of tests are three times as long,
and Hypothesis does not reject slow examples.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

BUSY = 3
SWITCH_INTERVAL = 2e-6

# The program forks and the parent exits, so that the computing process is no child of the process
# that runs the tests, as tests look for child processes that are left.
_COMPUTE = """
import os, sys
if pid := os.fork():
    print(pid, flush=True)
    os._exit(0)
os.close(1)
os.close(2)
while True:
    os.kill(int(sys.argv[1]), 0)  # raises when that one is gone
    sum(range(100_000))
"""

# One line, as a .pth file requires; it has no effect after the process that wrote it has ended.
_PTH = (
    "import os, sys; exec('try: os.kill({pid}, 0)\\nexcept OSError: pass\\n"
    "else: sys.setswitchinterval({interval})')\n"
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("load", "under load")
    group.addoption(
        "--busy", action="store_true", help=f"with {BUSY} processes that compute beside the tests"
    )
    group.addoption(
        "--restless",
        action="store_true",
        help=f"with sys.setswitchinterval({SWITCH_INTERVAL}) in every process of this environment",
    )


@contextlib.contextmanager
def restless() -> Iterator[None]:
    """Make every Python process of this environment switch between threads very often."""
    before = sys.getswitchinterval()
    path = Path(sysconfig.get_path("purelib"), f"restless-{os.getpid()}.pth")
    path.write_text(_PTH.format(pid=os.getpid(), interval=SWITCH_INTERVAL))
    sys.setswitchinterval(SWITCH_INTERVAL)
    try:
        yield
    finally:
        path.unlink()
        sys.setswitchinterval(before)


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Keep the machine busy."""
    command = [sys.executable, "-S", "-c", _COMPUTE, str(os.getpid())]
    pids = [int(subprocess.check_output(command)) for _ in range(BUSY)]
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.restless or config.option.busy:
        with contextlib.suppress(ImportError):
            from hypothesis import HealthCheck, settings

            slow = [HealthCheck.too_slow]
            settings.register_profile("load", deadline=None, suppress_health_check=slow)
            settings.load_profile("load")
    if hasattr(config, "workerinput") or config.option.suite_reports:
        return
    stack = contextlib.ExitStack()
    config.add_cleanup(stack.close)
    if config.option.restless:
        stack.enter_context(restless())
    if config.option.busy:
        stack.enter_context(busy())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Make the timeout of every test three times as long."""
    if not (config.option.busy or config.option.restless):
        return
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = marker.args[0] if marker else config.getini("timeout")
        if seconds:
            item.add_marker(pytest.mark.timeout(3 * float(seconds)), append=False)
