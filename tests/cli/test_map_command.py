"""The command ``cloudexec map``, run as users run it, with real workers."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]

JOBS = """
import os, pathlib, sys, threading, uuid

def note(name):
    pathlib.Path("calls").mkdir(exist_ok=True)
    pathlib.Path("calls", f"{name}.{uuid.uuid4()}").touch()

def double(x: int):
    note(x)
    if x < 0:
        raise ValueError(f"{x} is negative")
    return 2 * x

def describe(**row):
    return {name: type(value).__name__ for name, value in row.items()}

def size(path):
    return len(pathlib.Path(path).read_text())

def chatty(x):
    print("hello from", x)
    return x

def die(x):
    if x == 2:
        os._exit(9)
    return x

def hang(x):
    if x == 2:
        threading.Event().wait()
    return x

def shape(x):
    return {"x": x, "square": x * x}

class Odd(Exception):
    def __init__(self, code, *, hint):
        super().__init__(f"code {code}")

def odd(x):
    raise Odd(x, hint="none")
"""


@pytest.fixture(autouse=True)
def jobs(folder: Path) -> None:
    """A file of functions, and a CSV file of three numbers."""
    Path("jobs.py").write_text(JOBS)
    Path("three.csv").write_text("x\n1\n2\n3\n")


def records(text: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in text.splitlines()]


def values(text: str) -> dict[object, object]:
    return {record["row"]: record.get("value") for record in records(text)}


def calls(name: object) -> int:
    """How often a function noted that it was called."""
    return len(list(Path("calls").glob(f"{name}.*"))) if Path("calls").exists() else 0


def refused(done: subprocess.CompletedProcess[str]) -> str:
    """The one line with which a run was refused before any call."""
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert not Path("calls").exists()
    return done.stderr.strip()


def test_results_go_to_standard_output_and_the_rest_does_not(run: Run) -> None:
    """Without --output, standard output has one JSON line per row and nothing else."""
    done = run("map", "jobs.py:double", "three.csv")
    assert done.returncode == 0
    assert values(done.stdout) == {1: 2, 2: 4, 3: 6}
    record = records(done.stdout)[0]
    assert set(record) == {"row", "input", "value", "seconds", "worker", "attempts", "function"}
    assert record["attempts"] == 1
    assert "succeeded" in done.stderr


def test_module_function_is_called_as_a_file_s_is(run: Run) -> None:
    """``package.module:name`` works for a module in the current folder."""
    assert values(run("map", "jobs:double", "three.csv").stdout) == {1: 2, 2: 4, 3: 6}


def test_columns_have_types(run: Run) -> None:
    """Cells arrive as int, float, bool and str."""
    Path("typed.csv").write_text("i,f,b,s,zip\n1,2,true,x,01234\n2,2.5,false,y,56789\n")
    done = run("map", "jobs.py:describe", "typed.csv", "--ordered")
    assert records(done.stdout)[1]["value"] == {
        "i": "int",
        "f": "float",
        "b": "bool",
        "s": "str",
        "zip": "str",
    }
    assert records(done.stdout)[0]["input"] == {
        "i": 1,
        "f": 2.0,
        "b": True,
        "s": "x",
        "zip": "01234",
    }


def test_failed_row_is_recorded_and_told_by_the_exit_code(run: Run) -> None:
    """One bad row fails alone: the others have values, and the exit code is 1."""
    Path("rows.jsonl").write_text('{"x": 1}\n{"x": -5}\n{"x": 3}\n')
    done = run("map", "jobs.py:double", "rows.jsonl", "--output", "out.jsonl")
    assert done.returncode == 1
    assert done.stdout == ""
    assert "row 2 failed: ValueError: -5 is negative" in done.stderr
    assert "1 row failed: to run it again, add --retry-failed." in done.stderr
    found = {record["row"]: record for record in records(Path("out.jsonl").read_text())}
    assert found[1]["value"] == 2
    error = found[2]["error"]
    assert isinstance(error, dict)
    assert (error["type"], error["message"]) == ("ValueError", "-5 is negative")
    assert "in double" in error["traceback"]


def test_ordered_results_are_in_the_input_s_order(run: Run) -> None:
    """With --ordered, row follows row, whichever worker is faster."""
    Path("many.csv").write_text("x\n" + "".join(f"{n}\n" for n in range(200)))
    done = run("map", "jobs.py:double", "many.csv", "--ordered", "--workers", "2")
    assert list(values(done.stdout)) == list(range(1, 201))


def test_csv_output_has_flat_columns(run: Run) -> None:
    """A CSV output spreads the input and the value."""
    done = run("map", "jobs.py:shape", "three.csv", "-o", "out.csv", "--ordered")
    assert done.returncode == 0
    with open("out.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(r["row"], r["input.x"], r["value.square"], r["error.type"]) for r in rows] == [
        ("1", "1", "1", ""),
        ("2", "2", "4", ""),
        ("3", "3", "9", ""),
    ]
    assert (
        "All 3 rows are in out.csv already."
        in run("map", "jobs.py:shape", "three.csv", "-o", "out.csv", "--ordered").stderr
    )


def test_glob_passes_each_file_s_path(run: Run) -> None:
    """One call per file, with the path as it was matched."""
    Path("in").mkdir()
    Path("in/a.txt").write_text("four")
    Path("in/b.txt").write_text("sixsix")
    done = run("map", "jobs.py:size", "in/*.txt", "--ordered")
    assert [(r["input"], r["value"]) for r in records(done.stdout)] == [
        ("in/a.txt", 4),
        ("in/b.txt", 6),
    ]


def test_files_that_came_later_are_run_by_the_same_command(run: Run) -> None:
    """A glob that matches more than before runs what is new, under numbers of its own."""
    Path("in").mkdir()
    for name, text in (("b.txt", "22"), ("d.txt", "4444")):
        Path("in", name).write_text(text)
    command = ("map", "jobs.py:size", "in/*.txt", "-o", "out.jsonl", "--ordered")
    assert run(*command).returncode == 0
    for name, text in (("a.txt", "1"), ("c.txt", "333")):
        Path("in", name).write_text(text)
    assert run(*command).returncode == 0
    assert [(r["row"], r["input"], r["value"]) for r in records(Path("out.jsonl").read_text())] == [
        (1, "in/b.txt", 2),
        (2, "in/d.txt", 4),
        (3, "in/a.txt", 1),
        (4, "in/c.txt", 3),
    ]


def test_output_among_the_files_is_no_input(run: Run) -> None:
    """A glob that matches the output, too, does not feed results back."""
    Path("in").mkdir()
    Path("in/a.txt").write_text("four")
    Path("in/out.jsonl.journal").touch()  # as there is one where workers are elsewhere
    command = ("map", "jobs.py:size", "in/*", "-o", "in/out.jsonl")
    assert [run(*command).returncode, run(*command).returncode] == [0, 0]
    assert values(Path("in/out.jsonl").read_text()) == {1: 4}


def test_stream_is_run_as_it_arrives(start: Start) -> None:
    """The first row's result can be read before the second row is written."""
    process = start("map", "jobs.py:double", "-", "--quiet")
    assert process.stdin is not None
    assert process.stdout is not None
    for x in (1, 2):
        process.stdin.write(json.dumps({"x": x}) + "\n")
        process.stdin.flush()
        assert values(process.stdout.readline()) == {x: 2 * x}
    out, err = process.communicate()
    assert (out, err, process.returncode) == ("", "", 0)


def test_malformed_row_of_a_stream_ends_the_run_after_the_rows_before(run: Run) -> None:
    """A stream cannot be checked in advance: what came before is in the output."""
    done = run("map", "jobs.py:double", "-", "--quiet", stdin='{"x": 1}\n{"x": }\n{"x": 3}\n')
    assert done.returncode == 2
    assert values(done.stdout) == {1: 2}
    assert done.stderr == (
        "Error: standard input, row 2 (line 2): not JSON: Expecting value at column 7\n"
    )


def test_csv_can_come_from_standard_input(run: Run) -> None:
    """--input-format says what a stream is."""
    done = run("map", "jobs.py:double", "-", "--input-format", "csv", stdin="x\n4\n")
    assert values(done.stdout) == {1: 8}


def test_what_a_function_prints_stays_off_standard_output(run: Run) -> None:
    """Prints are shown on standard error, so that results can be piped."""
    done = run("map", "jobs.py:chatty", "three.csv")
    assert values(done.stdout) == {1: 1, 2: 2, 3: 3}
    assert "hello from 2" in done.stderr


def test_reader_that_stops_early_ends_the_run_quietly(start: Start) -> None:
    """``| head -1`` leaves neither a traceback nor workers that go on."""
    Path("many.csv").write_text("x\n" + "".join(f"{n}\n" for n in range(5000)))
    process = start("map", "jobs.py:double", "many.csv", "--quiet")
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == ""


def test_row_whose_worker_dies_fails_alone(run: Run) -> None:
    """A crash is that row's error."""
    done = run("map", "jobs.py:die", "three.csv", "--retries", "0", "--workers", "1")
    assert done.returncode == 1
    found = {record["row"]: record for record in records(done.stdout)}
    assert (found[1]["value"], found[3]["value"]) == (1, 3)
    error = found[2]["error"]
    assert isinstance(error, dict)
    assert error["type"] == "cloudexec.WorkerLostError"


def test_row_that_runs_too_long_fails_alone(run: Run) -> None:
    """--timeout bounds each call."""
    done = run("map", "jobs.py:hang", "three.csv", "--timeout", "0.5")
    assert done.returncode == 1
    found = {record["row"]: record for record in records(done.stdout)}
    assert (found[1]["value"], found[3]["value"]) == (1, 3)
    error = found[2]["error"]
    assert isinstance(error, dict)
    assert error["type"] == "cloudexec.TaskTimeoutError"


def test_exception_that_cannot_travel_still_says_what_happened(run: Run) -> None:
    """An error class that does not unpickle is recorded with its remote traceback."""
    done = run("map", "jobs.py:odd", "three.csv")
    assert done.returncode == 1
    assert "code 1" in done.stdout


def test_fail_fast_starts_no_more_rows(run: Run) -> None:
    """The first failure ends the run; the same command goes on later."""
    Path("rows.csv").write_text("x\n-1\n" + "".join(f"{n}\n" for n in range(5000)))
    command = ("map", "jobs.py:double", "rows.csv", "-o", "out.jsonl", "--workers", "1")
    done = run(*command, "--fail-fast")
    assert done.returncode == 1
    assert "Stopping: 1 row failed." in done.stderr
    first = len(records(Path("out.jsonl").read_text()))
    assert first < 5001
    assert run(*command).returncode == 1
    assert len(records(Path("out.jsonl").read_text())) == 5001
    assert calls(-1) == 1


def test_failed_rows_are_run_again_on_request_only(run: Run) -> None:
    """A failure counts as done until --retry-failed."""
    Path("flaky.py").write_text(
        "import pathlib\n"
        "from jobs import note\n"
        "def work(x):\n"
        "    note(x)\n"
        "    if x == 2 and not pathlib.Path('mended').exists():\n"
        "        raise KeyError(x)\n"
        "    return x\n"
    )
    command = ("map", "flaky.py:work", "three.csv", "-o", "out.jsonl")
    assert run(*command).returncode == 1
    again = run(*command)
    assert again.returncode == 1
    assert "All 3 rows are in out.jsonl already." in again.stderr
    Path("mended").touch()
    assert run(*command, "--retry-failed", "--ordered").returncode == 0
    assert values(Path("out.jsonl").read_text()) == {1: 1, 2: 2, 3: 3}
    assert list(values(Path("out.jsonl").read_text())) == [1, 2, 3]
    assert [calls(x) for x in (1, 2, 3)] == [1, 2, 1]


def test_rows_added_to_the_input_are_run_by_the_same_command(run: Run) -> None:
    """An input that grew is the same input."""
    command = ("map", "jobs.py:double", "three.csv", "-o", "out.jsonl")
    run(*command)
    with open("three.csv", "a") as stream:
        stream.write("4\n")
    done = run(*command)
    assert done.returncode == 0
    assert "Resuming: 3 of 4 rows are in out.jsonl already." in done.stderr
    assert values(Path("out.jsonl").read_text()) == {1: 2, 2: 4, 3: 6, 4: 8}
    assert [calls(x) for x in (1, 2, 3, 4)] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "x\n1\n7\n3\n",
            "Error: out.jsonl was made from a different input: its row 2 is not row 2 of "
            "three.csv: choose another --output, or --overwrite it",
        ),
        (
            "x\n1\n2\n",
            "Error: out.jsonl has a result for row 3, but three.csv ends with row 2: "
            "choose another --output, or --overwrite it",
        ),
    ],
)
def test_output_of_another_input_is_refused_until_overwritten(
    run: Run, content: str, message: str
) -> None:
    """Results of two inputs never mix."""
    command = ("map", "jobs.py:double", "three.csv", "-o", "out.jsonl", "--quiet")
    run(*command)
    before = Path("out.jsonl").read_text()
    Path("three.csv").write_text(content)
    done = run(*command)
    assert (done.returncode, done.stderr.strip()) == (2, message)
    assert Path("out.jsonl").read_text() == before
    assert run(*command, "--overwrite").returncode == 0
    assert len(records(Path("out.jsonl").read_text())) == content.count("\n") - 1


def test_dry_run_checks_and_runs_nothing(run: Run) -> None:
    """It says what would be run, and makes no file."""
    done = run("map", "jobs.py:double", "three.csv", "-o", "out.jsonl", "--dry-run")
    assert done.returncode == 0
    assert "3 rows of CSV (x: int)" in done.stdout
    assert "row 1: double(x=1)" in done.stdout
    assert not Path("out.jsonl").exists()
    assert not Path("calls").exists()


def test_quiet_run_shows_nothing(run: Run) -> None:
    """--quiet leaves standard error empty even where a row failed."""
    Path("rows.csv").write_text("x\n-1\n")
    done = run("map", "jobs.py:double", "rows.csv", "-o", "out.jsonl", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_progress_is_shown_on_a_terminal(folder: Path, environment: dict[str, str]) -> None:
    """A bar counts the rows while standard error is a terminal."""
    terminal, stderr = os.openpty()
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "cloudexec.cli",
            "map",
            "jobs.py:double",
            "three.csv",
            "-o",
            "out.csv",
        ],
        cwd=folder,
        env={**environment, "TERM": "xterm"},
        stderr=stderr,
    )
    os.close(stderr)
    shown = b""
    try:
        while chunk := os.read(terminal, 4096):
            shown += chunk
    except OSError:  # Linux says so when the other side is closed
        pass
    os.close(terminal)
    assert process.wait(timeout=60) == 0
    assert b"starting workers" in shown
    assert b"0/3" in shown
    assert b"Results are in out.csv." in shown


def test_input_without_rows_is_no_error(run: Run) -> None:
    """A header alone gives an empty result."""
    Path("none.csv").write_text("x\n")
    done = run("map", "jobs.py:double", "none.csv", "-o", "out.csv")
    assert (done.returncode, done.stderr) == (0, "none.csv has no rows.\n")
    assert Path("out.csv").read_text().startswith("row,input.x,value,error.type")


def test_malformed_row_is_named_before_any_call(run: Run) -> None:
    """Row 7 of the CSV is reported with its line."""
    Path("rows.csv").write_text("x\n" + "1\n" * 6 + "1,2\n" + "1\n" * 3)
    assert refused(run("map", "jobs.py:double", "rows.csv")) == (
        "Error: rows.csv, row 7 (line 8): 2 cells, but the header has 1 column"
    )


def test_missing_column_is_named_before_any_call(run: Run) -> None:
    """A column that the function needs is named."""
    Path("rows.csv").write_text("y\n1\n")
    assert refused(run("map", "jobs.py:double", "rows.csv")) == (
        "Error: rows.csv has no column 'x', which double(x) needs (columns there: y)"
    )


def test_unknown_function_is_named_before_any_call(run: Run) -> None:
    """A name that the file lacks is named, with the one that was meant."""
    assert refused(run("map", "jobs.py:dubble", "three.csv")) == (
        "Error: jobs.py has no function 'dubble'; did you mean 'double'?"
    )


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_unreadable_file_is_named_before_any_call(run: Run) -> None:
    """A file without permission is named."""
    Path("three.csv").chmod(0)
    assert refused(run("map", "jobs.py:double", "three.csv")) == (
        "Error: three.csv cannot be read: Permission denied"
    )


def test_file_that_cannot_be_decompressed_is_named_before_any_call(run: Run) -> None:
    """A .gz file that holds something else is named."""
    Path("rows.csv.gz").write_text("x\n1\n")
    assert refused(run("map", "jobs.py:double", "rows.csv.gz")) == (
        "Error: rows.csv.gz cannot be read: Not a gzipped file (b'x\\n')"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("absent.csv",), "Error: there is no file absent.csv"),
        (("*.png",), "Error: no file matches '*.png'"),
        ((".",), "Error: . is a folder: name its files with a glob, './*'"),
        (
            ("three.csv", "jobs.py"),
            "Error: INPUT is one argument, but 2 were given (three.csv, jobs.py): "
            "put quotes around a glob",
        ),
        (
            ("jobs.py",),
            "Error: cannot tell the format of jobs.py: say --input-format csv, jsonl, "
            "or files to pass it as a path",
        ),
        (
            ("three.csv", "-o", "absent/out.jsonl"),
            "Error: the folder of absent/out.jsonl does not exist",
        ),
        (
            ("three.csv", "-o", "three.csv"),
            "Error: INPUT and --output are the same file, three.csv",
        ),
        (
            ("three.csv", "-o", "jobs.py"),
            "Error: jobs.py exists and is not this job's output: line 1 is no result of "
            "cloudexec map; choose another --output, or --overwrite it",
        ),
        (
            ("three.csv", "--type", "y=int"),
            "Error: --type names the column 'y', but three.csv has: x",
        ),
        (
            ("three.csv", "--type", "x=number"),
            "Error: --type x=number must be COLUMN=TYPE, with TYPE one of "
            "str, int, float, bool, json, path",
        ),
        (
            ("three.csv", "--retry-failed"),
            "Error: --retry-failed is for a file of results: name it with --output",
        ),
    ],
)
def test_bad_input_is_named_before_any_call(
    run: Run, arguments: tuple[str, ...], message: str
) -> None:
    """Each mistake gets one clear line."""
    assert refused(run("map", "jobs.py:double", *arguments)) == message


def test_help_loads_neither_grpc_nor_rich(run: Run, environment: dict[str, str]) -> None:
    """``--help`` is quick, and documents the exit codes."""
    done = run("map", "--help")
    assert done.returncode == 0
    assert "Exit codes:" in done.stdout
    code = (
        "import sys, cloudexec.cli\n"
        "sys.argv = ['cloudexec', 'map', '--help']\n"
        "try: cloudexec.cli.main()\n"
        "except SystemExit: pass\n"
        "print('heavy:', sorted({'grpc', 'rich', 'cloudpickle'} & set(sys.modules)))\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert printed.stdout.endswith("heavy: []\n")
