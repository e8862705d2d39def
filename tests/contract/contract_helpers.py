"""Helpers of the contract tests: pipes to tasks, client programs, and checks for processes left."""

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
"""Seconds after which a test stops waiting and fails."""


class Signals:
    """Two named pipes: tasks report on one how far they are, and wait for a byte on the other.

    Attributes:
        told: Path of the pipe that tasks write to.
        gate: Path of the pipe at which tasks wait.
    """

    def __init__(self, directory: Path) -> None:
        self.told = str(directory / "told")
        self.gate = str(directory / "gate")
        self._buffer = b""
        self._ends = []
        for path in (self.told, self.gate):
            os.mkfifo(path)
            # Opened for reading and writing, so that opening does not wait for the other side.
            self._ends.append(os.open(path, os.O_RDWR | os.O_NONBLOCK))

    def wait(self, count: int = 1) -> list[str]:
        """Wait for ``count`` words of tasks, and return them."""
        deadline = time.monotonic() + PATIENCE
        while self._buffer.count(b"\n") < count:
            ready, _, _ = select.select(self._ends[:1], [], [], deadline - time.monotonic())
            assert ready, f"waited {PATIENCE} s for {count} words, got {self._buffer!r}"
            self._buffer += os.read(self._ends[0], 65536)
        *words, rest = self._buffer.split(b"\n", count)
        self._buffer = rest
        return [word.decode() for word in words]

    def release(self, count: int = 1) -> None:
        """Let ``count`` tasks pass the gate, now or when they reach it."""
        os.write(self._ends[1], b"." * count)

    def close(self) -> None:
        for descriptor in self._ends:
            os.close(descriptor)


def until(condition: Callable[[], object]) -> None:
    """Wait for a condition of the client, which learns of a task's progress a moment later."""
    deadline = time.monotonic() + PATIENCE
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not so after {PATIENCE} s"
        pause.wait(0.005)


def settle() -> None:
    """Sleep until messages to a worker have arrived; the worker does not confirm them."""
    threading.Event().wait(0.3)


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """Return all descendants of a process, except those of multiprocessing itself."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "multiprocessing" not in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass  # it has ended
    return found


def supervisors() -> list[psutil.Process]:
    """Return the processes of workers that this process has started."""
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
    """A Python script that uses an executor, in a separate process."""

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
        """Remember the processes that the script has started so far."""
        self.seen = descendants(self.pid)

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def end(self, timeout: float = PATIENCE) -> tuple[int, str, str]:
        """Wait for the end of the script and of the processes that it started.

        Returns:
            The script's exit code, standard output and standard error.
        """
        try:
            out, err = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self._process.send_signal(6)  # makes faulthandler print where the script hangs
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
