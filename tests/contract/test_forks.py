"""Forked children of a program that uses executors: those that leave these alone live."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

_STORM = Path(__file__).with_name("fork_storm.py")


@pytest.mark.parametrize("first", [(), ("grpc",)], ids=["plain", "grpc imported first"])
def test_children_forked_beside_executors_live(first: tuple[str, ...]) -> None:
    """Also on a busy machine, and where gRPC was imported with its fork handlers switched on."""
    environ = {k: v for k, v in os.environ.items() if k != "GRPC_ENABLE_FORK_SUPPORT"}
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        done = subprocess.run(
            [sys.executable, str(_STORM), "3", "12", *first],
            env=environ,
            capture_output=True,
            text=True,
            timeout=50,
        )
    finally:
        for each in busy:
            each.kill()
            each.wait()
    assert done.stdout == "{'ok': 15}\n", done.stderr
    assert done.returncode == 0


def test_the_pytest_plugin_does_not_import_grpc() -> None:
    """It is loaded in every run, of whatever tests: gRPC would be there with its usual settings."""
    code = "import sys, cloudexec.testing.pytest_plugin; print('grpc' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
