"""The random searches of ``python -m tests.soak``: a short run of each, with a fixed seed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import searches

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes of POSIX")


def soak(*options: str) -> subprocess.CompletedProcess[str]:
    """Run the command."""
    return subprocess.run(
        [sys.executable, "-m", "tests.soak", *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )


def test_no_task_runs_twice_or_after_it_was_cancelled() -> None:
    assert "tasks" in searches.once(7, 3.0)


def test_programs_beside_one_another_lose_no_task() -> None:
    assert searches.lost(7, 1.0, copies=3, tasks=20_000) == "3 programs"


def test_a_relay_that_dies_while_data_passes_it_loses_and_doubles_nothing() -> None:
    assert searches.relay(7, 0.1, tasks=3_000, mebibytes=64).startswith("3,000 tasks")


def test_each_run_of_a_search_says_its_seed() -> None:
    run = soak("--only", "core", "--seed", "11", "--seconds", "0.5")
    assert run.returncode == 0, run.stdout
    line, summary = run.stdout.splitlines()
    assert line.split()[:4] == ["ok", "core", "seed", "11"]
    assert summary.startswith("soak: 1 run of 1 search in ")
    assert summary.endswith(" 0 failed")


def test_seeds_are_drawn_until_the_time_is_over() -> None:
    run = soak("--only", "core", "--minutes", "0.05", "--seconds", "0.2")
    assert run.returncode == 0, run.stdout
    seeds = [line.split()[3] for line in run.stdout.splitlines()[:-1]]
    assert len(seeds) == len(set(seeds)) > 0


def test_what_was_found_says_how_to_see_it_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all that the search has printed; and the exit code says so."""
    monkeypatch.syspath_prepend(str(ROOT))
    import tests.soak.__main__ as command

    wrong = [sys.executable, "-c", "raise SystemExit('task 17 is lost')"]
    monkeypatch.setattr(command, "SEARCHES", {"wrong": lambda seed, seconds: wrong})
    assert command.main(["--only", "wrong", "--seed", "5", "--seconds", "1"]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("FAIL  wrong")
    assert "task 17 is lost" in said
    assert "FAILED: python -m tests.soak --only wrong --seed 5 --seconds 1" in said
    assert said[-1].endswith(" 1 failed")


@pytest.mark.parametrize("option", ["--minutes", "--seconds"])
@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf"])
def test_times_that_are_none_are_refused(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No search runs for no time."""
    monkeypatch.syspath_prepend(str(ROOT))
    import tests.soak.__main__ as command

    with pytest.raises(SystemExit) as ended:
        command.main([f"{option}={value}"])
    assert ended.value.code == 2
    assert f"{option} must be a number greater than 0" in capsys.readouterr().err
