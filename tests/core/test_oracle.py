"""The oracle is of use only if its digests depend on nothing but seeds and decisions."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from oracle import digest_of, digest_of_all

ROOT = Path(__file__).parents[2]


def test_its_digests_are_the_same_in_each_process() -> None:
    """Whatever the order of sets there, and wherever objects lie in memory."""
    printed = []
    for hash_seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-m", "tests.core.oracle", "--seeds", "2"],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            timeout=50,
        )
        assert run.returncode == 0, run.stderr
        printed.append(run.stdout.split())
    digests = [digest_of(0), digest_of(1)]
    assert digests[0] != digests[1]
    expected = ["seed", "0", digests[0], "seed", "1", digests[1], "all", digest_of_all(digests)]
    assert printed == [expected, expected]
