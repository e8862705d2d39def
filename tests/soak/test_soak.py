"""A short soak run: everything fails at once; nothing is lost, doubled, wrong or left behind."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cloudexec

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks into /proc"),
]

ROOT = Path(__file__).parents[2]
ROW = re.compile(r"^\| \**([^|*]+)\** \| \**([\d,]+)\** \|$", re.MULTILINE)
MUST_BE_ZERO = (
    "results lost",
    "results doubled",
    "results wrong",
    "processes left",
    "threads left",
    "files left open",
    "sockets left open",
    "directories left",
)


def test_nothing_is_lost_doubled_or_left_behind_when_everything_fails_at_once() -> None:
    """``python -m tests.soak`` does it for longer, and with other seeds."""
    options = ["--minutes", "0.2", "--seed", "2026", "--period", "0.15", "--grace", "2"]
    run = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "soak.py"), *options],
        env={**os.environ, "PYTHONPATH": str(Path(cloudexec.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=180,
    )
    said = f"{run.stdout}\n{run.stderr}"
    numbers = {
        what: int(number.replace(",", ""))
        for what, number in re.findall(
            r"^\| \**([^|*]+)\** \| \**([\d,]+)\** \|$", run.stdout, re.M
        )
    }
    assert run.returncode == 0, said
    assert [numbers[what] for what in MUST_BE_ZERO] == [0] * len(MUST_BE_ZERO), said
    assert numbers["faults injected"] >= 10, said
    assert numbers["tasks run"] >= 300, said
