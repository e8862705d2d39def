"""The local launcher: starts the same worker as other launchers, as a subprocess of the client."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cloudexec import _plain_json
from cloudexec._config import WorkerCapacity, check_count, format_bytes
from cloudexec._descriptors import too_many_files
from cloudexec._errors import ConfigError, LaunchError
from cloudexec._launchers.base import Contact, LaunchEnd, Launcher, LaunchRequest
from cloudexec._launchers.copies import Copy, Template, why_not
from cloudexec._log import Log

if TYPE_CHECKING:
    import subprocess

__all__ = ["Local"]

_BOOT = (
    # The line is read without a buffer, as the second line, with the client's address, is read by
    # other code later. ``main`` lets garbage be collected again.
    "import gc,sys,json;gc.disable();b=json.loads(sys.stdin.buffer.raw.readline());"
    "sys.path[:]=b['sys_path'];"
    "from cloudexec.worker.__main__ import main;sys.exit(main(b))"
)
_TAIL_BYTES = 8192
_log = Log()


class Local(Launcher):
    """Runs workers as subprocesses on this machine. This is the default launcher.

    If a fork is safe, workers are copies of this process: they have the installed modules that it
    has imported, with their settings. A fork is safe on Linux if this process has one thread when
    the first task is submitted. Otherwise workers are fresh interpreters, which import the modules
    of the executor's ``preload``.

    Args:
        slots_per_worker: Number of tasks that one supervisor process runs at once; ``None`` for a
            single process that runs them all.

    Raises:
        ConfigError: If ``slots_per_worker`` is not a positive integer.
    """

    one_machine = True
    own_processes = True

    def __init__(self, *, slots_per_worker: int | None = None) -> None:
        if slots_per_worker is not None:
            check_count("slots_per_worker", slots_per_worker, least=1)
        self._slots_per_worker = slots_per_worker
        self._why_not = ""
        self._template: Template | None = None
        self._processes: dict[str, _Process] = {}
        self._begun: deque[subprocess.Popen[bytes] | Copy] = deque()
        self._preload: Sequence[str] | Callable[[], Sequence[str]] = ()
        self._hash_seed = str(int.from_bytes(os.urandom(4)))
        self._machine: WorkerCapacity | None = None

    def slots_per_worker(self, max_workers: int) -> int:
        """Return how many slots one worker has."""
        return min(self._slots_per_worker or max_workers, max_workers)

    def capacity(self, size: int) -> WorkerCapacity:
        """Return the resources of this machine, which all workers share."""
        if self._machine is None:
            from cloudexec._launchers.this_machine import this_machine

            self._machine = this_machine()
        return self._machine

    def size_for(self, cpus: float, memory: int, gpus: int) -> int:
        """Return 0, the only size, if this machine is large enough for a task.

        Raises:
            ConfigError: If it is not; the message names the largest possible value.
        """
        most = self.capacity(0)
        if gpus > most.gpus:
            has = f"{most.gpus} GPU{'s' * (most.gpus != 1)}" if most.gpus else "no NVIDIA GPU"
            raise ConfigError(
                f"gpus={gpus} is more than there is: this machine has {has}; "
                f"Batch(compute='ec2') launches workers with them"
            )
        if cpus > most.cpus + 1e-9:
            raise ConfigError(
                f"cpus={cpus:g} is more than there is: the most that a task can have on this "
                f"machine is cpus={most.cpus:g}"
            )
        if memory > most.memory > 0:
            raise ConfigError(
                f"memory={format_bytes(memory)!r} is more than there is: the most that a task can "
                f"have on this machine is {format_bytes(most.memory)}"
            )
        return 0

    def needs_network(self) -> bool:
        """Return ``False``, as local workers use a Unix socket if the system has these."""
        return False

    def begin(self, slots: int, preload: Sequence[str] | Callable[[], Sequence[str]]) -> None:
        """Start the first worker, which imports its modules while this process imports its own."""
        self._preload = preload
        if self._template is None:
            self._why_not = why_not() if callable(preload) else "preload= asks for one"
            if not self._why_not:
                # Both processes need these modules, so they are imported before the fork.
                import asyncio  # noqa: F401

                from cloudexec._proto import tasks_pb2  # noqa: F401

                with contextlib.suppress(OSError):
                    self._template = Template()
        if slots:
            with contextlib.suppress(LaunchError):  # the launch that follows says why
                self._begun.append(self._start(slots))

    def _start(self, slots: int) -> subprocess.Popen[bytes] | Copy:
        if self._template is not None:
            try:
                return _start_copy(self._template, slots, self._hash_seed)
            except OSError as exc:
                if self._template is not None and exc.errno != errno.EMFILE:
                    self._template.close()
                    self._template = None
        return _start(slots, self._modules_to_preload, self._hash_seed)

    def _modules_to_preload(self) -> Sequence[str]:
        if callable(self._preload):
            self._preload = self._preload()
        return self._preload

    def stand_down(self) -> None:
        """Kill the workers that were started but not launched."""
        while self._begun:
            try:
                popen = self._begun.popleft()
            except IndexError:
                return  # another thread has taken the last one
            popen.kill()
            popen.wait()
            for pipe in (popen.stdin, popen.stderr):
                assert pipe is not None
                pipe.close()
        template = self._template
        if template is not None and not self._processes:
            self._template = None
            template.close()

    async def close(self) -> None:
        """Kill the workers that were started but not launched, as all others have ended."""
        self.stand_down()

    def launch(
        self,
        contact: Contact,
        requests: Sequence[LaunchRequest],
        on_end: Callable[[str, LaunchEnd], None],
    ) -> None:
        """Start one supervisor process for each worker."""
        for request in requests:
            try:
                self._launch(contact, request.launch_id, request.slots, on_end)
            except LaunchError as exc:
                on_end(request.launch_id, LaunchEnd(str(exc)))

    def _launch(
        self,
        contact: Contact,
        launch_id: str,
        slots: int,
        on_end: Callable[[str, LaunchEnd], None],
    ) -> None:
        contact_line = {
            "target": contact.target,
            "executor_id": contact.executor_id,
            "identity": launch_id,
            "key": contact.key.hex(),
            "slots": slots,
            "certificate_sha256": contact.certificate_sha256,
            "relay": contact.relay,
        }
        try:
            popen = self._begun.popleft()
        except IndexError:
            popen = self._start(slots)
        what = "copy of this process"
        if not isinstance(popen, Copy):
            what = "fresh interpreter" + (self._why_not and f": {self._why_not}")
        _log.debug("launch %s: process %d, a %s", launch_id, popen.pid, what)
        _write(popen, contact_line)
        assert popen.stdin is not None
        with contextlib.suppress(OSError):
            popen.stdin.close()

        def ended(end: LaunchEnd) -> None:
            self._processes.pop(key, None)
            on_end(launch_id, end)

        key = f"{contact.executor_id}/{launch_id}"
        self._processes[key] = _Process(popen, ended)

    def terminate(self, launch_ids: Sequence[str]) -> None:
        """Kill workers. Their zygotes notice this, and kill the slots."""
        for key, process in self._processes.items():
            if key.rpartition("/")[2] in launch_ids:
                process.kill()

    def pid_of(self, executor_id: str, launch_id: str) -> int:
        """Return the pid of a worker; 0 if it has ended."""
        process = self._processes.get(f"{executor_id}/{launch_id}")
        return 0 if process is None else process.pid

    def clean_up(self, launch_id: str, slot_groups: list[int]) -> None:
        """Kill the processes that tasks have started, as the killed worker could not do so."""
        for group in slot_groups:
            try:
                os.killpg(group, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass

    def describe(self) -> str:
        """Describe in a few words the workers that this launcher starts."""
        return "subprocesses on this machine"

    def __repr__(self) -> str:
        return f"Local(slots_per_worker={self._slots_per_worker})"


def _start(
    slots: int, preload: Callable[[], Sequence[str]], hash_seed: str
) -> subprocess.Popen[bytes]:
    """Start a worker's process, which waits for the client's address once it is ready.

    Args:
        slots: Number of its slots.
        preload: Returns the names of the modules that it imports.
        hash_seed: ``PYTHONHASHSEED`` of all workers, so that sets have the same order in each.

    Raises:
        LaunchError: If it cannot be started.
    """
    import subprocess

    environment, unset = os.environ.copy(), []
    if environment.get("PYTHONHASHSEED", "random") == "random":
        environment["PYTHONHASHSEED"] = hash_seed
        unset = ["PYTHONHASHSEED"]
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    try:
        popen = subprocess.Popen(
            [sys.executable, *flags, "-c", _BOOT],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            bufsize=0,
            # Ctrl-C in the terminal must reach the client alone.
            start_new_session=True,
        )
    except OSError as exc:
        why = f"{exc}{too_many_files(exc)}"
        raise LaunchError(f"cannot start {sys.executable}: {why}", reason=why) from exc
    # The modules to preload are looked up only now, while the interpreter starts.
    _write(popen, {**_bootstrap(slots, preload()), "unset": unset})
    return popen


def _start_copy(template: Template, slots: int, hash_seed: str) -> Copy:
    """Start a worker whose slots are copies of this process.

    Raises:
        OSError: If the worker cannot be started.
    """
    bootstrap = _bootstrap(slots, ())
    if os.environ.get("PYTHONHASHSEED", "random") == "random":
        bootstrap["hash_seed"] = hash_seed
    return template.start(
        {"environ": dict(os.environ), "cwd": _directory(), "bootstrap": bootstrap}
    )


def _bootstrap(slots: int, preload: Sequence[str]) -> dict[str, Any]:
    here = _directory()
    return {
        "slots": slots,
        "preload": list(preload),
        "argv": sys.argv,
        "sys_path": [path or here for path in sys.path],
        "client_pid": os.getpid(),
    }


def _directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""  # the folder was removed


def _write(popen: subprocess.Popen[bytes] | Copy, line: dict[str, Any]) -> None:
    assert popen.stdin is not None
    data = memoryview(_plain_json.encode(line) + b"\n")
    with contextlib.suppress(OSError):  # the process has ended, and its end is reported elsewhere
        while data:
            data = data[popen.stdin.write(data) :]


class _Process:
    """Watches one subprocess from the event loop, and reports its end with its last output."""

    def __init__(
        self, popen: subprocess.Popen[bytes] | Copy, on_end: Callable[[LaunchEnd], None]
    ) -> None:
        assert popen.stderr is not None
        self._popen = popen
        self.pid = popen.pid
        self._on_end = on_end
        self._tail = b""
        # Imported here, so that an import of the package stays fast.
        import asyncio

        self._loop = asyncio.get_running_loop()
        self._stderr = popen.stderr
        os.set_blocking(self._stderr.fileno(), False)
        self._loop.add_reader(self._stderr.fileno(), self._on_stderr)
        self._pidfd = -1
        try:
            self._pidfd = os.pidfd_open(popen.pid)
        except (AttributeError, OSError):
            self._loop.call_later(0.02, self._poll)
        else:
            self._loop.add_reader(self._pidfd, self._poll)

    def _on_stderr(self) -> None:
        try:
            data = os.read(self._stderr.fileno(), 65536)
        except BlockingIOError:
            return
        if not data:
            self._loop.remove_reader(self._stderr.fileno())
        self._tail = (self._tail + data)[-_TAIL_BYTES:]

    def _poll(self) -> None:
        code = self._popen.poll()
        if code is None:
            if self._pidfd < 0:
                self._loop.call_later(0.02, self._poll)
            return
        if self._pidfd >= 0:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
        self._on_stderr()
        self._loop.remove_reader(self._stderr.fileno())
        self._stderr.close()
        how = f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
        words = self._tail.decode("utf-8", "replace").strip()
        reason = f"the worker process ended: {how}" + (f"\n{words}" if words else "")
        self._on_end(LaunchEnd(reason, killed=code < 0, fatal=code == 3))

    def kill(self) -> None:
        if self._popen.poll() is None:
            self._popen.send_signal(signal.SIGKILL)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


Local.__module__ = "cloudexec"
