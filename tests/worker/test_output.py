"""What tasks print appears in the client as it happens, in order, and on futures that failed."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cloudexec
from cloudexec import BatchExecutor, RemoteTraceback

pytestmark = pytest.mark.timeout(60)

PACKAGE = str(Path(cloudexec.__file__).parents[1])
HEAD = "import os, subprocess, sys\nfrom cloudexec import BatchExecutor\n"


def client(tmp_path: Path, body: str, *args: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start a program that uses an executor; its streams are pipes unless told otherwise."""
    script = tmp_path / "client.py"
    script.write_text(HEAD + body)
    environment = {**os.environ, "PYTHONPATH": PACKAGE, **options.pop("env", {})}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([sys.executable, str(script), *args], env=environment, **streams)


def outputs(tmp_path: Path, body: str, **options: Any) -> tuple[bytes, bytes]:
    process = client(tmp_path, body, **options)
    out, err = process.communicate(timeout=50)
    assert process.returncode == 0, err
    return out, err


WAITING = """
def task(gate):
    print("to stdout", flush=True)
    print("to stderr", file=sys.stderr, flush=True)
    os.write(1, b"from C\\n")
    subprocess.run(["echo", "from a child"])
    subprocess.run(["sh", "-c", "echo from a child to stderr >&2"])
    print("no end of line", end="", flush=True)
    open(gate).read()

with BatchExecutor(1) as executor:
    executor.submit(task, sys.argv[1]).result()
"""


def test_output_appears_while_the_task_runs(tmp_path: Path) -> None:
    """Everything a task, C code and its children print is here before the task ends."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    process = client(tmp_path, WAITING, str(gate))
    assert process.stdout is not None
    assert process.stderr is not None
    expected = b"to stdout\nfrom C\nfrom a child\nno end of line"
    out = b""
    while len(out) < len(expected):
        out += os.read(process.stdout.fileno(), 1000)
    assert sorted(out.split(b"\n")) == sorted(expected.split(b"\n"))
    wanted = b"to stderr\nfrom a child to stderr\n"
    err = b""
    while len(err) < len(wanted):
        err += os.read(process.stderr.fileno(), 1000)
    assert sorted(err.split()) == sorted(wanted.split())
    assert process.poll() is None
    gate.write_text("")
    assert process.communicate(timeout=20) == (b"", b"")
    assert process.returncode == 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_lines_are_prefixed_on_a_terminal(tmp_path: Path) -> None:
    """On a terminal each whole line names worker and task, ends of lines without newline too."""
    import pty

    ours, theirs = pty.openpty()
    body = (
        "def task():\n    print('one\\ntw', end='', flush=True)\n    print('o\\nrest', end='')\n"
        "with BatchExecutor(1) as executor:\n    executor.submit(task).result()\n"
    )
    process = client(tmp_path, body, stdout=theirs)
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 4096):
            shown += data
    except OSError:
        pass  # Linux says so when the other side has closed
    os.close(ours)
    process.communicate(timeout=20)
    assert process.returncode == 0
    prefix = "[worker-1 task 1] "
    assert shown.decode().split() == f"{prefix}one {prefix}two {prefix}rest".split()


def test_unicode_is_not_cut(tmp_path: Path) -> None:
    """Characters of several bytes survive, wherever the transport cuts the text."""
    text = "x" + "é" * 100_000 + "😀" * 50_000
    body = (
        "def task():\n    print('x' + 'é' * 100_000 + '😀' * 50_000)\n"
        "with BatchExecutor(1) as executor:\n    executor.submit(task).result()\n"
    )
    out, err = outputs(tmp_path, body)
    assert out.decode() == text + "\n"
    assert err == b""


def test_bytes_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    """Invalid bytes appear somehow, and what stands around them as it is."""
    body = (
        "def task():\n    os.write(1, b'before \\xff\\xfe after\\n')\n"
        "    sys.stdout.buffer.write(b'again \\x80 end\\n')\n"
        "with BatchExecutor(1) as executor:\n    executor.submit(task).result()\n"
    )
    out, err = outputs(tmp_path, body)
    assert err == b""
    for part in (b"before ", b" after\n", b"again ", b" end\n"):
        assert part in out


def test_client_whose_encoding_lacks_a_character_shows_the_rest(tmp_path: Path) -> None:
    """Where stdout is ASCII, what it cannot show is replaced and nothing is dropped."""
    body = (
        "def task():\n    print('caf\\u00e9 is open')\n"
        "with BatchExecutor(1) as executor:\n    executor.submit(task).result()\n"
    )
    out, _ = outputs(tmp_path, body, env={"PYTHONIOENCODING": "ascii"})
    assert b"is open\n" in out
    assert b"caf" in out


def test_output_of_a_task_is_in_order(tmp_path: Path) -> None:
    """10,000 lines of one task arrive as they were printed."""
    body = (
        "def task():\n    for n in range(10_000):\n        print(n)\n"
        "with BatchExecutor(2) as executor:\n    executor.submit(task).result()\n"
    )
    out, _ = outputs(tmp_path, body)
    assert out.split() == [b"%d" % n for n in range(10_000)]


def test_output_is_shown_before_the_result_is_there(tmp_path: Path) -> None:
    """What a task printed stands before what the client prints once it has the result."""
    body = (
        "with BatchExecutor(1) as executor:\n    for n in range(300):\n"
        "        executor.submit(print, f'task {n}').result()\n"
        "        print(f'client {n}', flush=True)\n"
    )
    out, _ = outputs(tmp_path, body)
    lines = out.decode().splitlines()
    assert lines == [f"{who} {n}" for n in range(300) for who in ("task", "client")]


def shout(mode: str) -> None:
    print("to stdout")
    print("to stderr", file=sys.stderr)
    os.write(1, b"from C\n")
    if mode == "raise":
        raise ValueError("no")


@pytest.mark.parametrize("output", ["inherit", "logging", "off"])
def test_failed_future_carries_output(output: str) -> None:
    """What a failed task printed is on the future and on the exception's cause, in every mode."""
    with BatchExecutor(1, output=output) as executor:
        future = executor.submit(shout, "raise")
        error = future.exception(30)
        assert isinstance(error, ValueError)
        assert isinstance(error.__cause__, RemoteTraceback)
        for text in ("to stdout", "to stderr"):
            assert text in future.output
            assert text in error.__cause__.output
            assert text in str(error.__cause__)
        fine = executor.submit(shout, "return")
        fine.result(30)
        assert fine.output == ""


def test_only_the_last_lines_are_kept() -> None:
    """A long output is kept to its end, with the last line whole."""

    def fail() -> None:
        for n in range(100_000):
            print("line", n)
        raise ValueError("no")

    with BatchExecutor(1, output="off") as executor:
        future = executor.submit(fail)
        future.exception(30)
    assert future.output.endswith("line 99999\n")
    assert 1000 < len(future.output) < 100_000


def test_output_does_not_stick_to_the_next_task() -> None:
    """A task that fails carries its own lines only."""

    def fail(n: int) -> None:
        print("this is", n)
        raise ValueError(n)

    with BatchExecutor(1, output="off") as executor:
        futures = [executor.submit(fail, n) for n in range(200)]
        for n, future in enumerate(futures):
            future.exception(30)
            assert future.output == f"this is {n}\n"


def test_switched_off_output_is_not_shown(capfd: pytest.CaptureFixture[str]) -> None:
    """output="off" shows nothing."""
    with BatchExecutor(1, output="off") as executor:
        executor.submit(shout, "return").result(30)
    assert capfd.readouterr() == ("", "")


def test_output_goes_to_logging(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """output="logging" logs each line to cloudexec.output, stderr as warnings."""
    caplog.set_level(logging.INFO, logger="cloudexec.output")
    with BatchExecutor(1, output="logging") as executor:
        executor.submit(shout, "return").result(30)
    records = [r for r in caplog.records if r.name == "cloudexec.output"]
    found = {(r.levelno, r.getMessage().rpartition(": ")[2]) for r in records}
    assert found == {
        (logging.INFO, "to stdout"),
        (logging.INFO, "from C"),
        (logging.WARNING, "to stderr"),
    }
    assert {(r.worker, r.task) for r in records} == {("worker-1", 1)}  # type: ignore[attr-defined]
    assert capfd.readouterr() == ("", "")


def test_client_that_closed_its_stdout_still_gets_results(tmp_path: Path) -> None:
    """Output that cannot be shown is dropped; results arrive."""
    body = (
        "sys.stdout.close()\n"
        "with BatchExecutor(1) as executor:\n"
        "    assert executor.submit(print, 'x' * 100_000).result() is None\n"
        "    assert executor.submit(abs, -1).result() == 1\n"
        "sys.stdout = None\n"
    )
    _, err = outputs(tmp_path, body)
    assert err == b""
