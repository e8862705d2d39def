"""Fixtures that run the command, each in a new process and an empty folder."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cloudexec.cli

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., subprocess.Popen[str]]

_COMMAND = (sys.executable, "-m", "cloudexec.cli")


@pytest.fixture
def environment() -> dict[str, str]:
    """Environment in which a process finds the package under test."""
    package = Path(cloudexec.cli.__file__).parents[2]
    others = os.environ.get("PYTHONPATH")
    path = f"{package}{os.pathsep}{others}" if others else str(package)
    return {**os.environ, "PYTHONPATH": path, "COLUMNS": "200"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(folder: Path, environment: dict[str, str]) -> Run:
    """Run the command to its end and return what it printed."""

    def run_command(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*_COMMAND, *args],
            cwd=folder,
            env=environment,
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run_command


@pytest.fixture
def run_here(folder: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in this process, which saves the second that importing the AWS SDK takes."""

    def run_command(
        *args: str, stdin: str = "", together: bool = False
    ) -> subprocess.CompletedProcess[str]:
        output = io.StringIO()
        errors = output if together else io.StringIO()
        with monkeypatch.context() as patch:
            for name in os.environ.keys() - environment.keys():
                patch.delenv(name)
            for name, value in environment.items():
                patch.setenv(name, value)
            patch.setattr(sys, "argv", ["cloudexec", *args])
            patch.setattr(sys, "stdin", io.StringIO(stdin))
            patch.setattr(sys, "stdout", output)
            patch.setattr(sys, "stderr", errors)
            with pytest.raises(SystemExit) as ended:
                cloudexec.cli.main()
        return subprocess.CompletedProcess(
            args, ended.value.code, output.getvalue(), errors.getvalue()
        )

    return run_command


@pytest.fixture
def start(folder: Path, environment: dict[str, str]) -> Iterator[Start]:
    """Start the command with pipes on all its streams; at the end running commands are killed."""
    processes: list[subprocess.Popen[str]] = []

    def start_command(*args: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*_COMMAND, *args],
            cwd=folder,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        return process

    yield start_command
    for process in processes:
        process.kill()
        process.communicate()
