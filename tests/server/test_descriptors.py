"""Limits on open files: raised where workers need it, left alone elsewhere, said where too low."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(sys.platform == "win32", reason="there are no such limits"),
]

SCRIPT = """
import logging, resource, sys
from cloudexec import BatchExecutor
from cloudexec.testing import ManualLauncher

soft, hard, workers = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
logging.basicConfig(format="%(message)s")
launcher = ManualLauncher()
with BatchExecutor(workers, min_workers=1, launcher=launcher, output="off"):
    launcher.wait(1, timeout=20)
    print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def limit_after(soft: int, hard: int, workers: int) -> tuple[int, str]:
    """Return a client's limit once its executor has started, and what it said."""
    words = [sys.executable, "-c", SCRIPT, str(soft), str(hard), str(workers)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=50, check=True)
    return int(run.stdout), run.stderr


def test_the_limit_is_raised_as_far_as_many_workers_need() -> None:
    limit, said = limit_after(512, 4096, 1000)
    assert 1000 + 256 < limit < 4096
    assert not said


def test_the_limit_is_left_alone_for_a_few_workers() -> None:
    assert limit_after(512, 4096, 8) == (512, "")


def test_a_limit_that_is_too_low_for_the_workers_is_said() -> None:
    """With what there is, and what to do; as many as can connect do."""
    limit, said = limit_after(512, 600, 1000)
    assert limit == 600
    assert "1000 workers may want to connect" in said
    assert "no more than 344" in said
