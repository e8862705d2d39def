"""Runs of the suite on a machine that is busy, and with threads that take turns all the time.

``--busy`` keeps three processes computing beside the tests. ``--restless`` has the threads of every
Python of this environment take turns after 2 microseconds, for as long as the run lasts. What a
test or the product says about an order of things must hold with both. Timeouts of tests are three
times as long.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

BUSY = 3
SWITCH_INTERVAL = 2e-6

_COMPUTE = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: sum(range(100_000))"

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


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or config.option.suite_reports:
        return
    if config.option.restless:
        path = Path(sysconfig.get_path("purelib"), f"restless-{os.getpid()}.pth")
        path.write_text(_PTH.format(pid=os.getpid(), interval=SWITCH_INTERVAL))
        config.add_cleanup(path.unlink)
        sys.setswitchinterval(SWITCH_INTERVAL)
    if config.option.busy:
        for _ in range(BUSY):
            config.add_cleanup(subprocess.Popen([sys.executable, "-S", "-c", _COMPUTE]).kill)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Give every test three times as long."""
    if not (config.option.busy or config.option.restless):
        return
    for item in items:
        marker = item.get_closest_marker("timeout")
        seconds = marker.args[0] if marker else config.getini("timeout")
        if seconds:
            item.add_marker(pytest.mark.timeout(3 * float(seconds)), append=False)
