"""The zygote: a process that forks slots in milliseconds, and reports how each one ended.

It is forked from the supervisor before that starts a thread, so that forking from it is safe. It
imports the modules that slots need, so that slots start quickly and share this memory. Supervisor
and zygote exchange messages of a fixed size over a socket pair.

When a slot ends, the processes that its tasks have started are killed: its whole process group.
Processes that have left the group, as daemons do, become children of the zygote (on Linux). The
zygote recognises them by the mark of their slot. The mark is a resource limit, because nothing else
that is harmless survives both fork and exec: the soft ``RLIMIT_LOCKS``, which Linux has not
enforced since 2.4.25 (getrlimit(2)).
"""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections.abc import Container, Mapping
from typing import Any

from cloudexec import _plain_json

__all__ = [
    "MESSAGE",
    "ORPHAN_GRACE",
    "adopt_orphans",
    "end_with_parent",
    "kill_children",
    "run_again",
    "run_zygote",
]

MESSAGE = struct.Struct("<BxxxiiqI")
"""A message: kind, pid, wait status, peak resident bytes, number of the slot."""

FORK, KILL, STARTED, EXITED = 1, 2, 3, 4

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_RLIMIT_LOCKS = 10
_MARK_SHIFT = 40
ORPHAN_GRACE = 1.0
"""Seconds that a process which has left its group may outlive its slot. A worker that a task has
started needs this time to clean up after it notices that its client is gone."""
_KEPT_BYTES = 16 * 1024 * 1024
"""Bytes of freed memory that a slot keeps."""
_CLEARING = 2.0
"""Seconds that killed processes may take to end."""
_AGAIN = (
    "import sys,json;t=json.loads(sys.argv[1]);sys.path[:]=t['bootstrap']['sys_path'];"
    "from cloudexec.worker.zygote import run_again;run_again(t)"
)


def _prctl(option: int, value: int) -> None:
    """Set an attribute of this process. It does nothing on systems other than Linux."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def end_with_parent(parent_pid: int, signum: int = signal.SIGKILL) -> None:
    """Let the system send this process a signal when its parent ends.

    If the parent has ended already, this process ends at once.

    Args:
        parent_pid: The parent's process id.
        signum: The signal.
    """
    _prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent_pid:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of descendants whose parents end. It does nothing on other than Linux."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _own_children() -> list[int]:
    """Return the child processes of this process; empty if the system does not tell."""
    found: list[int] = []
    try:
        for thread in os.listdir("/proc/self/task"):
            with open(f"/proc/self/task/{thread}/children") as file:
                found += map(int, file.read().split())
    except (OSError, ValueError):
        pass
    return found


def kill_children(*, grace: float = 0.0) -> None:
    """Kill and reap all children, and all processes that become children because of that.

    It returns at most two seconds after ``grace``, because a process may hang in the kernel.

    Args:
        grace: Seconds in which the children may end by themselves.
    """
    began = time.monotonic()
    while _own_children() and (passed := time.monotonic() - began) < grace + _CLEARING:
        if passed >= grace:
            for pid in _own_children():
                _kill_slot(pid)
        while True:
            try:
                if not os.waitpid(-1, os.WNOHANG)[0]:
                    break
            except ChildProcessError:
                return
        time.sleep(0.002)


def _mark(zygote_pid: int, number: int) -> int:
    return zygote_pid << _MARK_SHIFT | number


class _Orphans:
    """Processes that tasks left behind outside their slot's group, and when each is killed."""

    def __init__(self) -> None:
        self._due: dict[int, float] = {}

    def look(self, children: dict[int, int]) -> float | None:
        """Kill processes whose slot has been gone for ``ORPHAN_GRACE`` seconds.

        Args:
            children: By process id: the numbers of living slots.

        Returns:
            Seconds until the next look; ``None`` if none is needed before a child ends.
        """
        now = time.monotonic()
        living = {_mark(os.getpid(), number) for number in children.values()}
        due: dict[int, float] = {}
        for pid in _own_children():
            if pid not in children and _outlived_slot(pid, living):
                due[pid] = self._due.get(pid, now + ORPHAN_GRACE)
                if due[pid] <= now:
                    _kill_slot(pid)
        self._due = due
        waits = [at - now for at in due.values() if at > now]
        return min(waits) if waits else None


def _outlived_slot(pid: int, living: Container[int]) -> bool:
    """Say whether a process was started by a slot of this zygote that has ended."""
    try:
        mark = resource.prlimit(pid, _RLIMIT_LOCKS)[0]
    except (AttributeError, OSError, ValueError):
        return False  # the process has ended or is another user's, or the system is not Linux
    return mark >> _MARK_SHIFT == os.getpid() and mark not in living


def _send(connection: socket.socket, *values: int) -> None:
    connection.sendall(MESSAGE.pack(*values))


def _receive(connection: socket.socket) -> tuple[tuple[int, ...] | None, list[int]]:
    data, fds, _, _ = socket.recv_fds(connection, MESSAGE.size, 8)
    while data and len(data) < MESSAGE.size:
        more = connection.recv(MESSAGE.size - len(data))
        if not more:
            return None, fds
        data += more
    return (MESSAGE.unpack(data) if data else None), fds


def run_zygote(
    connection: socket.socket,
    supervisor_pid: int,
    files: int | None = None,
    bootstrap: Mapping[str, Any] | None = None,
) -> None:
    """Serve the supervisor until it is gone, then kill all slots and exit. Never returns.

    Args:
        connection: The socket to the supervisor.
        supervisor_pid: The supervisor's process id.
        files: Number of files that slots may have open; ``None`` for as many as this process.
        bootstrap: What the worker was told at its start, such as modules that tasks will import.
    """
    # The zygote must not be killed together with the supervisor, as processes of tasks would
    # outlive both. It notices the end of the connection; SIGCONT wakes it if it was stopped.
    end_with_parent(supervisor_pid, signal.SIGCONT)
    adopt_orphans()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    os.set_blocking(wake_read, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)

    # Every slot needs this module. It is imported here, so that importing costs the slots nothing.
    from cloudexec.worker import main_module  # noqa: F401

    if bootstrap is not None and ("own_modules" in bootstrap or bootstrap.get("preload")):
        from cloudexec.worker.preload import can_import_again, preload

        refused = preload(bootstrap["preload"], bootstrap["argv"])
        if refused or not can_import_again(bootstrap.get("own_modules", ())):
            _start_over(connection, supervisor_pid, files, bootstrap, refused)

    _let_freed_memory_be_kept()
    children: dict[int, int] = {}
    orphans = _Orphans()
    next_look: float | None = None
    sources: list[Any] = [connection, wake_read]
    try:
        while True:
            ready, _, _ = select.select(sources, [], [], next_look)
            if wake_read in ready:
                try:
                    os.read(wake_read, 4096)
                except BlockingIOError:
                    pass
                _reap(connection, children)
            if wake_read in ready or next_look is not None:
                next_look = orphans.look(children)
            if connection in ready:
                message, fds = _receive(connection)
                if message is None:
                    break
                kind, pid, _, _, number = message
                if kind == FORK:
                    own = [connection.fileno(), wake_read, wake_write]
                    pid = _fork_slot(fds, own, number, files)
                    for fd in fds:
                        os.close(fd)
                    children[pid] = number
                    _send(connection, STARTED, pid, 0, 0, number)
                elif kind == KILL and pid in children:
                    _kill_slot(pid)
    except (ConnectionError, BrokenPipeError):
        pass  # the supervisor has ended
    finally:
        for pid in children:
            _kill_slot(pid)
        kill_children(grace=ORPHAN_GRACE)
        os._exit(0)


def _let_freed_memory_be_kept() -> None:
    """Let slots use memory again that tasks have freed, up to 16 MiB, without asking the system.

    At first, glibc's malloc() gives free memory back as soon as it has 128 KiB of it. Each array of
    such a size then takes fresh pages, which is up to half of the time of some calculations. It
    adapts when a block is freed that was larger: free memory of twice the size of that block is
    kept then. The block that is freed here is never written to, so that it takes no memory.

    References:
        mallopt(3), "M_MMAP_THRESHOLD" and "M_TRIM_THRESHOLD", about dynamic adjustment.
    """
    bytes(_KEPT_BYTES // 2)


def _start_over(
    connection: socket.socket,
    supervisor_pid: int,
    files: int | None,
    bootstrap: Mapping[str, Any],
    refused: str,
) -> None:
    """Replace this process by a zygote that is no copy of the client, or lacks a certain module.

    Args:
        refused: The module that has started threads, which would not survive a fork.
    """
    import subprocess

    names = [name for name in bootstrap["preload"] if name != refused]
    left = {name: value for name, value in bootstrap.items() if name != "own_modules"}
    told = {
        "fd": connection.fileno(),
        "supervisor_pid": supervisor_pid,
        "files": files,
        "bootstrap": {**left, "preload": names, "sys_path": sys.path},
    }
    os.set_inheritable(connection.fileno(), True)
    if "hash_seed" in bootstrap:
        # A copy has the client's hash seed. All fresh zygotes must have the same seed, too.
        os.environ["PYTHONHASHSEED"] = bootstrap["hash_seed"]
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    os.execv(sys.executable, [sys.executable, *flags, "-c", _AGAIN, _plain_json.encode(told)])


def run_again(told: Mapping[str, Any]) -> None:
    """Continue as a zygote after this process has replaced itself. Never returns."""
    if "hash_seed" in told["bootstrap"]:
        os.environ.pop("PYTHONHASHSEED", None)
    from cloudexec.worker import slot  # noqa: F401

    connection = socket.socket(fileno=told["fd"])
    connection.set_inheritable(False)
    run_zygote(connection, told["supervisor_pid"], told["files"], told["bootstrap"])


def _reap(connection: socket.socket, children: dict[int, int]) -> None:
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        number = children.pop(pid, None)
        if number is None:
            continue  # the process is no slot, but was left behind by a task
        # Kill the processes that the slot's tasks have started.
        _kill_group(pid)
        unit = 1 if sys.platform == "darwin" else 1024
        _send(connection, EXITED, pid, status, usage.ru_maxrss * unit, number)


def _kill_slot(pid: int) -> None:
    _kill_group(pid)
    try:
        os.kill(pid, signal.SIGKILL)  # the slot may not have made its process group yet
    except ProcessLookupError:
        pass


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _fork_slot(fds: list[int], inherited: list[int], number: int, files: int | None) -> int:
    zygote_pid = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        end_with_parent(zygote_pid)
        _set_mark(_mark(zygote_pid, number))
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for fd in inherited:
            os.close(fd)
        if files is not None:
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (files, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
            )
        code = _run_slot(*fds)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _set_mark(mark: int) -> None:
    if not sys.platform.startswith("linux"):
        return
    try:
        hard = resource.getrlimit(_RLIMIT_LOCKS)[1]
        resource.setrlimit(_RLIMIT_LOCKS, (mark, hard))
    except (OSError, ValueError):
        pass  # a lower hard limit is set: processes that leave their group end with the zygote


def _run_slot(tasks_fd: int, results_fd: int, page_fd: int, out_fd: int, err_fd: int) -> int:
    from cloudexec.worker.process import leave
    from cloudexec.worker.reach import out_of_reach
    from cloudexec.worker.slot import Slot

    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(out_fd, 1)
    os.dup2(err_fd, 2)
    for fd in (null, out_fd, err_fd):
        os.close(fd)
    _prefer_for_oom()
    if "cloudexec.worker.preload" in sys.modules:
        from cloudexec.worker.preload import seed_generators

        seed_generators()
    slot = Slot(out_of_reach(tasks_fd), out_of_reach(results_fd), page_fd)
    try:
        slot.run()
    except EOFError:
        return 0  # the supervisor has ended
    leave()


def _prefer_for_oom() -> None:
    """Let the kernel kill a slot rather than the supervisor when memory runs out."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
    except OSError:
        pass
