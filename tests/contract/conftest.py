"""Fixtures of the contract tests."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from contract_helpers import Client, Signals, assert_gone, descendants, until


@pytest.fixture
def signals(tmp_path: Path) -> Iterator[Signals]:
    both = Signals(tmp_path)
    yield both
    both.close()


@pytest.fixture
def client() -> Iterator[Callable[..., Client]]:
    started: list[Client] = []

    def start(script: str, *args: str) -> Client:
        started.append(Client(script, *args))
        return started[-1]

    yield start
    for each in started:
        each.close()


@pytest.fixture
def nothing_left(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Fail a test that leaves a process, a thread or a socket's directory behind."""
    tmp_path_factory.getbasetemp()  # made now, so that it is not inside the directory made below
    directory = tempfile.mkdtemp(dir="/tmp")
    monkeypatch.setattr(tempfile, "tempdir", directory)
    monkeypatch.setenv("TMPDIR", directory)
    yield
    gc.collect()
    assert_gone(descendants())
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith("cloudexec")])
    left = [name for name in os.listdir(directory) if name.startswith("cloudexec-")]
    shutil.rmtree(directory)
    assert not left
