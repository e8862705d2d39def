"""Limits on open files: raised where workers need it, left alone elsewhere, said where too low."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


def _with_few_files(what: str, limit: int, workers: int, lines: Path) -> tuple[list[str], str]:
    """Run a program of ``few_files``; return its tasks' errors, and what was said meanwhile."""
    lines.touch()
    script = Path(__file__).with_name("few_files.py")
    words = [sys.executable, str(script), what, str(limit), str(workers), str(lines)]
    run = subprocess.run(words, capture_output=True, text=True, timeout=55, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), run.stderr


def test_with_few_files_fewer_slots_run_all_tasks_once(tmp_path: Path) -> None:
    """32 slots would need two hundred files; that they are not there is said at the start."""
    errors, said = _with_few_files("at_the_start", 64, 32, tmp_path / "lines")
    assert errors == [""] * 100
    assert "may have 64 files open here, and this executor needs 216" in said
    assert "ulimit -n 4096" in said
    ran = (tmp_path / "lines").read_text().split()
    assert sorted(map(int, ran)) == list(range(100))


def test_with_too_few_files_for_one_slot_tasks_fail_with_the_remedy(tmp_path: Path) -> None:
    """None of them runs, and the program goes on."""
    errors, _ = _with_few_files("at_the_start", 26, 2, tmp_path / "lines")
    assert all(error.startswith("LaunchError") and "ulimit -n 4096" in error for error in errors)
    assert not (tmp_path / "lines").read_text()


def test_results_wait_until_the_client_may_open_their_files(tmp_path: Path) -> None:
    """The program has as many files open as it may, for a while: no task is run again for that."""
    errors, _ = _with_few_files("in_the_client", 128, 2, tmp_path / "lines")
    assert errors == [""] * 8
    ran = (tmp_path / "lines").read_text().split()
    assert sorted(map(int, ran)) == list(range(-1, 8))


def test_results_that_need_no_file_arrive_while_the_client_has_none_left(tmp_path: Path) -> None:
    """One spare file is kept for the connections by which they come, one after the other."""
    errors, _ = _with_few_files("to_the_end", 128, 2, tmp_path / "lines")
    assert errors == [""] * 5
    ran = (tmp_path / "lines").read_text().split()
    assert sorted(map(int, ran)) == list(range(-1, 5))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no files by descriptor here")
def test_a_slot_whose_files_a_task_has_used_up_says_so(tmp_path: Path) -> None:
    """What needs a file fails, once, with the remedy; all else goes on."""
    errors, _ = _with_few_files("in_a_slot", 200, 1, tmp_path / "lines")
    assert errors[0].startswith("OSError")  # the task's own
    for error in errors[1:]:
        assert error.startswith("PayloadError")
        assert "this process may have 200 files open: raise the limit (ulimit -n 4096)" in error
