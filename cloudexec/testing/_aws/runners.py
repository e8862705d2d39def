"""Runs the attempts of jobs: the interface of a runner, and the runner that uses processes."""

from __future__ import annotations

import fnmatch
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cloudexec.testing._aws.memory import MemoryWatcher, Tree

__all__ = ["Exit", "ProcessRunner", "Runner", "Running", "StartError", "StartRequest"]


class StartError(Exception):
    """A container could not be started; the text is the container's reason."""

    def __init__(self, reason: str, exit_code: int | None = None) -> None:
        super().__init__(reason)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True, kw_only=True)
class StartRequest:
    """One attempt to start."""

    name: str
    """A name that is unique among the attempts of one FakeAWS."""
    image: str
    command: tuple[str, ...]
    """The command; empty to run the image's entry point alone."""
    environment: Mapping[str, str]
    vcpus: float
    memory_mib: int
    user: str = ""
    """User in the container; empty: the image's default."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """The end of an attempt's main process."""

    code: int | None
    """The exit code as a container shows it: 128 + signal number if a signal ended it."""
    out_of_memory: bool


class Running(Protocol):
    """One attempt that runs. Every method may be called from any thread."""

    @property
    def pid(self) -> int | None:
        """The id of the main process on this machine, if it is a process here."""

    @property
    def address(self) -> str:
        """The attempt's own address; empty if it has this machine's."""

    def wait(self) -> Exit:
        """Block until the attempt has ended, and all its processes are gone."""

    def terminate(self) -> None:
        """Send SIGTERM to the main process."""

    def kill(self) -> None:
        """Kill all processes of the attempt."""

    def out_of_memory(self) -> None:
        """Kill all processes of the attempt, as the kernel does when memory runs out."""


class Runner(Protocol):
    """Starts attempts."""

    def start(self, request: StartRequest, output: Callable[[bytes], None]) -> Running:
        """Start one attempt.

        Args:
            request: The attempt to run.
            output: Called with stdout and stderr as they arrive, from one thread, in pieces of any
                size.

        Raises:
            StartError: If it cannot be started.
        """

    def close(self) -> None:
        """Free the runner's resources, after all attempts have ended."""


class ProcessRunner:
    """Runs every attempt as a subprocess, in a session of its own.

    Args:
        directory: The directory in which attempts get their home and temporary directories.
        python: The interpreter that stands for the worker image.
        images: By image name or shell pattern: the interpreter that stands for the image.
    """

    def __init__(self, directory: Path, *, python: str, images: Mapping[str, str]) -> None:
        self._directory = directory
        self._python = python
        self._images = dict(images)
        self._memory = MemoryWatcher()

    def start(self, request: StartRequest, output: Callable[[bytes], None]) -> Running:
        """Start one attempt."""
        interpreter = self._interpreter(request.image)
        home = self._directory / request.name
        home.mkdir()
        environment = {
            "PATH": os.pathsep.join(
                [os.path.dirname(interpreter), "/usr/local/bin", "/usr/bin", "/bin"]
            ),
            "HOME": str(home),
            "TMPDIR": str(home),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(Path(__file__).resolve().parents[3]),
            "HOSTNAME": request.name,
            **request.environment,
        }
        command = list(request.command) or [interpreter, "-m", "cloudexec.worker"]
        try:
            found = shutil.which(command[0], path=environment["PATH"]) or command[0]
            process = subprocess.Popen(
                [found, *command[1:]],
                cwd=home,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as exc:
            shutil.rmtree(home, ignore_errors=True)
            raise StartError(
                "CannotStartContainerError: Error response from daemon: failed to create task for "
                f'container: exec: "{command[0]}": {exc.strerror}',
                127,
            ) from exc
        running = _RunningProcess(process, home, output, self._memory)
        self._memory.watch(running.tree, request.memory_mib * 1024 * 1024)
        return running

    def close(self) -> None:
        """Stop watching the memory of processes."""
        self._memory.close()

    def _interpreter(self, image: str) -> str:
        for pattern, interpreter in self._images.items():
            if fnmatch.fnmatchcase(image, pattern):
                return interpreter
        return self._python


class _RunningProcess:
    def __init__(
        self,
        process: subprocess.Popen[bytes],
        home: Path,
        output: Callable[[bytes], None],
        memory: MemoryWatcher,
    ) -> None:
        self.tree = Tree(process.pid)
        self._process = process
        self._home = home
        self._output = output
        self._memory = memory
        self._starved = False
        self._reader = threading.Thread(
            target=self._read, name=f"fake-aws-output-{process.pid}", daemon=True
        )
        self._reader.start()

    @property
    def pid(self) -> int | None:
        return self._process.pid

    @property
    def address(self) -> str:
        return ""

    def wait(self) -> Exit:
        code = self._process.wait()
        # A container ends with its main process, so the processes that this one leaves are killed.
        self._memory.forget(self.tree)
        self.tree.kill()
        self._reader.join(timeout=5.0)
        shutil.rmtree(self._home, ignore_errors=True)
        starved = self._starved or self.tree.main_was_starved
        return Exit(code=128 - code if code < 0 else code, out_of_memory=starved and code == -9)

    def terminate(self) -> None:
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        self.tree.kill()
        self._signal(signal.SIGKILL)

    def out_of_memory(self) -> None:
        self._starved = True
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        try:
            self._process.send_signal(number)
        except ProcessLookupError:
            pass

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        with stream:
            while data := os.read(stream.fileno(), 65536):
                self._output(data)
