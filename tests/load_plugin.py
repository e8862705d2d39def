"""Runs of the suite on a machine that is busy, and with threads that take turns all the time.

``--busy`` keeps three processes computing beside the tests. ``--restless`` has the threads of every
Python of this environment take turns after 2 microseconds, for as long as the run lasts. What a
test or the product says about an order of things must hold with both. Timeouts of tests are three
times as long, and Hypothesis takes no example for too slow.
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

# No child of the process that runs the tests, which look for what they leave behind.
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

# In one line, as a .pth file wants it; of no effect when the process that wrote it is gone.
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
    """Have threads take turns all the time, in every process of this environment."""
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
    """Give every test three times as long."""
    if not (config.option.busy or config.option.restless):
        return
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = marker.args[0] if marker else config.getini("timeout")
        if seconds:
            item.add_marker(pytest.mark.timeout(3 * float(seconds)), append=False)
