"""Fixtures of the journal's tests."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import cloudexec
from cloudexec import BatchExecutor

PATIENCE = 50.0

Program = Callable[..., "subprocess.Popen[str]"]
Open = Callable[..., BatchExecutor]


@pytest.fixture
def ran(tmp_path: Path) -> str:
    """The directory in which calls note that they have run."""
    directory = tmp_path / "calls"
    directory.mkdir()
    return str(directory)


@pytest.fixture
def executor(tmp_path: Path) -> Open:
    """A function that makes executors with the same journal, like a program that is run again."""

    def make(name: str = "journal", **settings: object) -> BatchExecutor:
        settings = {"max_workers": 1, "output": "off", "journal": tmp_path / name, **settings}
        return BatchExecutor(**settings)  # type: ignore[arg-type]

    return make


@pytest.fixture
def program() -> Iterator[Program]:
    """A function that starts scripts in new processes; at the end running scripts are killed."""
    started: list[subprocess.Popen[str]] = []
    path = os.pathsep.join([str(Path(cloudexec.__file__).parents[1]), str(Path(__file__).parent)])

    def start(script: str | Path, *args: object, **env: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(script), *map(str, args)],
            env={**os.environ, "PYTHONPATH": path, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Fail a test that leaves threads behind."""
    yield
    deadline = time.monotonic() + PATIENCE
    while left := [t.name for t in threading.enumerate() if t.name.startswith("cloudexec")]:
        assert time.monotonic() < deadline, left
        threading.Event().wait(0.01)
