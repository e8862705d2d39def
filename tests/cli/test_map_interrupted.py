"""Runs that are interrupted, killed and resumed, and what is run twice by it: nothing finished."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]

# Row 5 fails, which is said on standard error once rows 1 to 5 are in the output, as there is one
# worker. From row 6 on calls wait for the gate, a pipe that nobody opens.
JOBS = """
import pathlib, uuid

def work(n):
    pathlib.Path("calls", f"{n}.{uuid.uuid4()}").touch()
    if n == 5:
        raise ValueError("five")
    if n > 5:
        open("gate").close()
    return {"n": n}
"""

OUTPUTS = ("out.jsonl", "out.csv")


@pytest.fixture(autouse=True)
def jobs(folder: Path) -> None:
    """Ten rows, and a closed gate."""
    Path("calls").mkdir()
    Path("jobs.py").write_text(JOBS)
    Path("rows.csv").write_text("n\n" + "".join(f"{n}\n" for n in range(1, 11)))
    os.mkfifo("gate")


def command(output: str, *more: str) -> tuple[str, ...]:
    return ("map", "jobs.py:work", "rows.csv", "-o", output, "--workers", "1", *more)


def wait_for_row_5(process: subprocess.Popen[str]) -> None:
    """Return when five rows are in the output."""
    assert process.stderr is not None
    seen = [
        line for line in iter(process.stderr.readline, "row 5 failed: ValueError: five\n") if line
    ]
    assert process.poll() is None, seen


def open_gate() -> None:
    """Let calls through, from now on and those that wait."""
    os.rename("gate", "waiting")
    Path("gate").touch()
    with contextlib.suppress(OSError):  # nobody waits
        os.close(os.open("waiting", os.O_WRONLY | os.O_NONBLOCK))


def calls() -> list[int]:
    """How often each row was called."""
    names = [path.name.split(".")[0] for path in Path("calls").iterdir()]
    return [names.count(str(n)) for n in range(1, 11)]


def rows_in(output: str) -> list[int]:
    lines = Path(output).read_text().splitlines()
    if output.endswith(".csv"):
        return [int(line.split(",")[0]) for line in lines if line.split(",")[0].isdecimal()]
    return [json.loads(line)["row"] for line in lines]


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_run_goes_on_where_it_stopped(
    start: Start, run: Run, output: str, number: int, code: int
) -> None:
    """After a signal, the same command runs what is not in the output, and nothing else."""
    process = start(*command(output))
    wait_for_row_5(process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert errors.splitlines()[-1] == (
        f"Interrupted: 5 of 10 rows are in {output}. Run the same command again to go on."
    )
    assert rows_in(output) == [1, 2, 3, 4, 5]
    begun = calls()
    assert begun[5] <= 1  # it waits for the gate, if it has begun
    assert begun == [1, 1, 1, 1, 1, begun[5], 0, 0, 0, 0]
    open_gate()
    done = run(*command(output))
    assert done.returncode == 1  # row 5 failed, then as now
    assert f"Resuming: 5 of 10 rows are in {output} already." in done.stderr
    assert rows_in(output) == list(range(1, 11))
    assert calls() == [1, 1, 1, 1, 1, begun[5] + 1, 1, 1, 1, 1]


@pytest.mark.parametrize("output", OUTPUTS)
def test_killed_run_goes_on_where_it_stopped(start: Start, run: Run, output: str) -> None:
    """SIGKILL loses no row that was finished, and a line that it tore is run again."""
    process = start(*command(output))
    wait_for_row_5(process)
    process.kill()
    process.wait()
    assert rows_in(output) == [1, 2, 3, 4, 5]
    torn = Path(output).read_bytes()
    Path(output).write_bytes(torn[:-20])
    open_gate()
    done = run(*command(output, "--resume"))
    assert done.returncode == 1
    assert f"Resuming: 4 of 10 rows are in {output} already." in done.stderr
    assert rows_in(output) == list(range(1, 11))
    # A worker may begin rows that were sent to it ahead before it notices that its client is gone:
    # nothing is said of rows that were not in the output.
    assert calls()[:5] == [1, 1, 1, 1, 2]


def test_ordered_run_is_in_order_after_it_was_resumed(start: Start, run: Run) -> None:
    """Gaps that a first, unordered run left are filled in their places."""
    Path("rows.csv").write_text("n\n6\n1\n7\n2\n3\n4\n5\n")
    process = start(*command("out.jsonl")[:-2], "--workers", "3")
    assert process.stderr is not None
    assert "row 7 failed: ValueError: five\n" in iter(process.stderr.readline, "")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert 1 not in rows_in("out.jsonl")
    open_gate()
    run(*command("out.jsonl", "--ordered"))
    assert rows_in("out.jsonl") == [1, 2, 3, 4, 5, 6, 7]
    assert calls()[:5] == [1, 1, 1, 1, 1]


def test_output_of_other_code_is_gone_on_with_only_if_that_is_said(run: Run) -> None:
    """The error names what has changed, in the function's module or in what that imports."""
    open_gate()
    Path("helper.py").write_text("FACTOR = 1\n")
    Path("jobs.py").write_text(JOBS.replace("import pathlib", "import helper, pathlib"))
    base = ("map", "jobs.py:work", "rows.csv", "-o", "out.jsonl", "--workers", "1")
    assert run(*base, "--max-failures", "1").returncode == 1
    done = rows_in("out.jsonl")
    assert done[:5] == [1, 2, 3, 4, 5]
    # Whatever had begun when the fifth failed is in the output too.
    assert calls() == [int(n in done) for n in range(1, 11)]
    Path("helper.py").write_text("# a comment\nFACTOR = 1\n")
    Path("other.py").write_text("")
    assert run(*base, "--dry-run").returncode == 0
    Path("helper.py").write_text("FACTOR = 2\n")
    before = Path("out.jsonl").read_bytes()
    refused = run(*base, "--quiet")
    assert (refused.returncode, refused.stderr) == (
        2,
        f"Error: out.jsonl has {len(done)} rows that other code made: helper.py has changed since "
        "then. Add --resume to keep them, or --overwrite to run all rows again\n",
    )
    assert Path("out.jsonl").read_bytes() == before
    resumed = run(*base, "--resume")
    assert "helper.py has changed since out.jsonl was begun" in resumed.stderr
    assert sorted(rows_in("out.jsonl")) == list(range(1, 11))
    assert calls() == [1] * 10
    Path("helper.py").write_text("FACTOR = 3\n")
    retried = run(*base, "--retry-failed")
    assert "helper.py has changed since out.jsonl was begun" in retried.stderr
    assert calls() == [1, 1, 1, 1, 2, 1, 1, 1, 1, 1]
    assert run(*base, "--dry-run").returncode == 0  # nothing has changed since
    Path("helper.py").write_text("FACTOR = 4\n")
    assert run(*base, "--overwrite").returncode == 1
    assert calls() == [2, 2, 2, 2, 3, 2, 2, 2, 2, 2]


def test_resuming_contradicts_starting_anew(run: Run) -> None:
    """To resume is the default; said aloud, it needs a file, and not to be thrown away."""
    done = run(*command("out.jsonl", "--resume", "--overwrite"))
    assert (done.returncode, done.stderr) == (
        2,
        "Error: --overwrite starts again and --resume continues: give one of them\n",
    )
    done = run("map", "jobs.py:work", "rows.csv", "--resume")
    assert (done.returncode, done.stderr) == (
        2,
        "Error: --resume is for a file of results: name it with --output\n",
    )


def test_two_runs_on_one_output_are_kept_apart(start: Start, run: Run) -> None:
    """The second run is refused as long as the first one lives."""
    process = start(*command("out.jsonl"))
    wait_for_row_5(process)
    done = run(*command("out.jsonl"))
    assert (done.returncode, done.stderr) == (
        2,
        "Error: out.jsonl is being written by another run\n",
    )
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert rows_in("out.jsonl") == [1, 2, 3, 4, 5]


def test_interrupted_overwrite_says_how_to_go_on(start: Start) -> None:
    """The same command would throw away what there is."""
    process = start(*command("out.jsonl", "--overwrite"))
    wait_for_row_5(process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert errors.splitlines()[-1] == (
        "Interrupted: 5 of 10 rows are in out.jsonl. Run the command without --overwrite to go on."
    )


def test_interrupted_stream_says_what_to_do_another_time(start: Start) -> None:
    """Without --output there is nothing to go on from."""
    process = start("map", "jobs.py:work", "rows.csv", "--workers", "1")
    wait_for_row_5(process)
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert len(out.splitlines()) == 5
    assert errors.splitlines()[-1] == (
        "Interrupted after 5 rows. With --output, a run can go on where it was interrupted."
    )
