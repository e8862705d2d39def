"""Starts workers as forked copies of this process, if that is safe: see ``worker/copied.py``."""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import time
from typing import Any

from cloudexec import _plain_json
from cloudexec._forked import count_threads, count_threads_after_fork, templates
from cloudexec.worker import copied

__all__ = ["Copy", "Template", "why_not"]

_MOST_MEMORY = 1 << 30
"""Largest memory of this process, in bytes, with which it is copied. A copy keeps the memory in use
that this process frees later."""
_ANSWER_SECONDS = 5.0
_LOOK, _LOOKS = 0.0005, 40
"""Seconds between two checks whether an earlier executor's thread has ended, and their number."""
_MOST_FILES = 200
"""Largest number of open files with which this process is copied. A copy has the same files open,
and needs further ones."""
_UNSAFE = {"gevent": "gevent", "eventlet": "eventlet", "mpi4py.MPI": "MPI"}
"""Modules with threads, or the like, that the operating system does not show; and their names."""


def why_not() -> str:
    """Return why a copy of this process would not be safe; empty if it is safe.

    A fork copies one thread. If another thread holds a lock, it is never released in the copy.
    """
    if not sys.platform.startswith("linux") or not hasattr(os, "pidfd_open"):
        return "this is not Linux"
    if threading.active_count() > 1 or threading.current_thread() is not threading.main_thread():
        return "it has threads"
    monitoring = getattr(sys, "monitoring", None)
    if (
        sys.gettrace() is not None
        or sys.getprofile() is not None
        or (monitoring is not None and any(map(monitoring.get_tool, range(6))))
    ):
        return "it is being traced"
    for name, what in _UNSAFE.items():
        if name in sys.modules:
            return f"it uses {what}"
    context: Any = sys.modules.get("multiprocessing.context")
    chosen = context and context._default_context.get_start_method(allow_none=True)
    if chosen in ("spawn", "forkserver"):
        return f"it has chosen {chosen!r} (multiprocessing.set_start_method)"
    if _own_memory() > _MOST_MEMORY:
        return "it has taken more than 1 GiB of memory"
    if len(os.listdir("/proc/self/fd")) > _MOST_FILES:
        return f"it has more than {_MOST_FILES} files open"
    if _has_own_extensions():
        return "it has imported a compiled module that is not installed"
    if _has_other_threads():
        return "a library that it uses has started threads"
    return ""


def _own_memory() -> int:
    try:
        with open("/proc/self/statm") as file:
            _, resident, shared = map(int, file.read().split()[:3])
    except (OSError, ValueError):
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")


def _has_own_extensions() -> bool:
    """Return whether the user's own modules are compiled, as a copy must import these anew."""
    from cloudexec._modules import own_modules

    files = (getattr(sys.modules.get(name), "__file__", None) for name in own_modules())
    return any(isinstance(file, str) and file.endswith(".so") for file in files)


def _has_other_threads() -> bool:
    """Return whether other threads would still run when this process forks.

    OpenBLAS, which numpy uses, ends its own threads before each fork.
    """
    ending = "cloudexec._server.portal" in sys.modules  # an earlier executor's thread may be ending
    for _ in range(_LOOKS if ending else 1):
        if count_threads() == 1:
            return False
        time.sleep(_LOOK)
    try:
        with open("/proc/self/maps") as file:
            if "openblas" not in file.read():
                return True
    except OSError:
        return True
    return count_threads_after_fork() > 1


class Template:
    """The process that forks workers, itself a fork of this process.

    Raises:
        OSError: If the process cannot be started.
    """

    def __init__(self) -> None:
        kind = socket.SOCK_SEQPACKET
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, kind)
        self._lock = threading.Lock()
        self._ended: dict[int, int] = {}
        client = os.getpid()
        try:
            self._pid = os.fork()
        except OSError:
            self._connection.close()
            theirs.close()
            raise
        if not self._pid:
            copied.serve_template(theirs, self._connection, client)
        templates.add(self._pid)
        theirs.close()
        self._connection.settimeout(_ANSWER_SECONDS)

    def start(self, told: dict[str, Any]) -> Copy:
        """Start a worker.

        Args:
            told: The worker's data for ``copied.serve_template``.

        Raises:
            OSError: If the worker cannot be started.
        """
        stdin_read, stdin_write = os.pipe()
        stderr_read, stderr_write = os.pipe()
        try:
            with self._lock:
                data = _plain_json.encode(told)
                socket.send_fds(self._connection, [data], [stdin_read, stderr_write])
                while (message := self._receive())[0] != copied.BEGUN:
                    pass
            return Copy(self, message[1], stdin_write, stderr_read)
        except BaseException:
            os.close(stdin_write)
            os.close(stderr_read)
            raise
        finally:
            os.close(stdin_read)
            os.close(stderr_write)

    def _receive(self) -> tuple[int, int, int]:
        data = self._connection.recv(copied.MESSAGE.size)
        if not data:
            raise ConnectionError("the process that forks workers has ended")
        kind, pid, status = copied.MESSAGE.unpack(data)
        if kind == copied.ENDED:
            self._ended[pid] = status
        return kind, pid, status

    def status_of(self, pid: int) -> int:
        """Wait until a worker's process has ended, and return its wait status."""
        with self._lock:
            try:
                while pid not in self._ended:
                    self._receive()
            except OSError:
                return signal.SIGKILL  # the template has ended, so the real status is lost
            return self._ended.pop(pid)

    def close(self) -> None:
        """End the template process. Its workers go on."""
        self._connection.close()
        try:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        except OSError:
            pass  # user code has waited for the process already, or ignores SIGCHLD
        templates.discard(self._pid)


class Copy:
    """A worker's process, with the attributes and methods of ``subprocess.Popen`` that we use."""

    def __init__(self, template: Template, pid: int, stdin: int, stderr: int) -> None:
        self.pid = pid
        self.stdin = os.fdopen(stdin, "wb", buffering=0)
        self.stderr = os.fdopen(stderr, "rb", buffering=0)
        self.returncode: int | None = None
        self._template = template
        self._pidfd = -1
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            pass  # the process has ended
        self._poll = select.poll()
        if self._pidfd >= 0:
            self._poll.register(self._pidfd, select.POLLIN)

    def poll(self) -> int | None:
        """Return the exit code, negative if a signal ended the process; ``None`` if it runs."""
        if self.returncode is None and (self._pidfd < 0 or self._poll.poll(0)):
            status = self._template.status_of(self.pid)
            self.returncode = os.waitstatus_to_exitcode(status)
            if self._pidfd >= 0:
                os.close(self._pidfd)
        return self.returncode

    def send_signal(self, signum: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.returncode is None and self._pidfd >= 0:
            try:
                signal.pidfd_send_signal(self._pidfd, signum)
            except ProcessLookupError:
                pass

    def kill(self) -> None:
        """Kill the process."""
        self.send_signal(signal.SIGKILL)

    def wait(self) -> int:
        """Wait until the process has ended, and return its exit code."""
        while (code := self.poll()) is None:
            self._poll.poll()
        return code
