"""What benchmarks take from the inside of the package is still there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def test_all_steps_of_a_start_are_found(tmp_path: Path) -> None:
    asked = '{"contender": "cloudexec", "workers": 1, "steps": true}'
    done = subprocess.run(
        [sys.executable, "startup.py", "--measure", asked, str(tmp_path / "figures")],
        cwd=BENCHMARKS,
        env={**os.environ, "BENCHMARK_STEPS": str(tmp_path / "steps")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    steps = {line.partition(" ")[2] for line in (tmp_path / "steps").read_text().splitlines()}
    assert {
        "client: cloudexec imported",
        "client: worker's process launched",
        "client: server up",
        "client: worker told whom to dial",
        "worker: process",
        "worker: what all its processes need imported",
        "worker: ready for the address",
        "worker: enrolled",
        "zygote: ready, and a slot asked for",
        "slot: forked",
        "slot: first task there",
        "slot: first task done",
    } <= steps
