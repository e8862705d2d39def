"""What the contract tests share: pipes to talk with tasks, clients, and a look at what is left."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

import cloudexec

__all__ = ["PATIENCE", "Client", "Signals", "assert_gone", "descendants", "settle", "until"]

PATIENCE = 50.0
"""Seconds after which what was to happen counts as never happening."""


class Signals:
    """Two named pipes: tasks say where they are on one, and wait on the other.

    Attributes:
        told: What tasks write to.
        gate: What tasks wait at.
    """

    def __init__(self, directory: Path) -> None:
        self.told = str(directory / "told")
        self.gate = str(directory / "gate")
        self._buffer = b""
        self._ends = []
        for path in (self.told, self.gate):
            os.mkfifo(path)
            # Open for both, so that neither side waits for the other to open it.
            self._ends.append(os.open(path, os.O_RDWR | os.O_NONBLOCK))

    def wait(self, count: int = 1) -> list[str]:
        """Return the next words of tasks, once there are so many."""
        deadline = time.monotonic() + PATIENCE
        while self._buffer.count(b"\n") < count:
            ready, _, _ = select.select(self._ends[:1], [], [], deadline - time.monotonic())
            assert ready, f"waited {PATIENCE} s for {count} words, got {self._buffer!r}"
            self._buffer += os.read(self._ends[0], 65536)
        *words, rest = self._buffer.split(b"\n", count)
        self._buffer = rest
        return [word.decode() for word in words]

    def release(self, count: int = 1) -> None:
        """Let so many tasks pass the gate, now or when they get there."""
        os.write(self._ends[1], b"." * count)

    def close(self) -> None:
        for descriptor in self._ends:
            os.close(descriptor)


def until(condition: Callable[[], object]) -> None:
    """Ask again and again; for what the client learns a moment after the task knows it."""
    deadline = time.monotonic() + PATIENCE
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not so after {PATIENCE} s"
        pause.wait(0.005)


def settle() -> None:
    """Let what was told to a worker arrive there; it tells nobody that it did."""
    threading.Event().wait(0.3)


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """Return all processes that come from this one, or another, but for multiprocessing's own."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "multiprocessing" not in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass  # it has ended
    return found


def supervisors() -> list[psutil.Process]:
    """Return the workers that this process has started, and no other children of it."""
    found = []
    for process in psutil.Process().children():
        try:
            if any("cloudexec" in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass  # it has ended meanwhile
    return found


def assert_gone(processes: list[psutil.Process], timeout: float = PATIENCE) -> None:
    _, alive = psutil.wait_procs(processes, timeout=timeout)
    assert not alive, [process.cmdline() for process in alive]


class Client:
    """A Python script in a process of its own that uses an executor."""

    def __init__(self, script: str, *args: str) -> None:
        root = Path(cloudexec.__file__).parents[1]
        path = os.pathsep.join([str(root), str(Path(__file__).parent)])
        self._process = subprocess.Popen(
            [sys.executable, "-X", "faulthandler", "-c", script, *args],
            env={**os.environ, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid
        self.seen: list[psutil.Process] = []

    def look(self) -> None:
        """Remember the processes that it has started so far."""
        self.seen = descendants(self.pid)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self, timeout: float = PATIENCE) -> tuple[int, str, str]:
        """Wait for it, and for what it started.

        Returns:
            Its exit code, and what it wrote to standard output and standard error.
        """
        try:
            out, err = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self._process.send_signal(6)  # faulthandler says where it is
            out, err = self._process.communicate(timeout=timeout)
            raise AssertionError(f"it did not end in {timeout} s\n{out}\n{err}") from None
        finally:
            self.close()
        assert_gone(self.seen)
        return self._process.returncode, out, err

    def close(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
