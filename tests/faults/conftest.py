"""Fixtures of the tests of faults."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator

import pytest
from fault_helpers import descendants, until


@pytest.fixture
def nothing_left(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> Iterator[None]:
    """Fail a test that leaves a process, a thread or a socket's directory behind."""
    # A short path, as the path of a socket has at most about a hundred characters.
    directory = tempfile.mkdtemp(dir="/tmp")
    monkeypatch.setattr(tempfile, "tempdir", directory)
    monkeypatch.setenv("TMPDIR", directory)
    # An executor that several tests share may exist already.
    processes, threads = set(descendants()), set(threading.enumerate())
    yield
    until(lambda: not set(descendants()) - processes)
    until(
        lambda: (
            not [
                thread
                for thread in set(threading.enumerate()) - threads
                if thread.name.startswith("cloudexec")
            ]
        )
    )
    left = [name for name in os.listdir(directory) if name.startswith("cloudexec-")]
    shutil.rmtree(directory)
    assert not left


@pytest.fixture
def small_disk() -> Iterator[str]:
    """A directory with room for 4 MiB."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("only root mounts a small disk")
    directory = tempfile.mkdtemp(dir="/tmp")
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", directory]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        os.rmdir(directory)
        pytest.skip("mount is not permitted here")
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)
    os.rmdir(directory)
