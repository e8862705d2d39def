"""The zygote: forks slots in milliseconds, and tells how each one ended.

It is forked from the supervisor before that starts a thread, so that forking from it is safe, and
imports what every slot needs, so that a slot starts with that in place. Supervisor and zygote talk
over a socket pair in messages of one fixed size.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
from typing import Any

__all__ = ["MESSAGE", "run_zygote", "set_death_signal"]

MESSAGE = struct.Struct("<BxxxiiqI")
"""Kind, pid, wait status, peak resident bytes, number of the slot."""

FORK, KILL, STARTED, EXITED = 1, 2, 3, 4

_PR_SET_PDEATHSIG = 1


def set_death_signal() -> None:
    """Have the kernel kill this process when its parent dies (Linux; elsewhere nothing)."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


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


def run_zygote(connection: socket.socket, supervisor_pid: int) -> None:
    """Serve the supervisor until it is gone; then kill every slot and leave. Never returns."""
    set_death_signal()
    if os.getppid() != supervisor_pid:
        os._exit(1)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    os.set_blocking(wake_read, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)

    # Every slot needs these: imported here, they cost a slot nothing.
    from cloudexec.worker import slot  # noqa: F401

    children: dict[int, int] = {}
    sources: list[Any] = [connection, wake_read]
    try:
        while True:
            ready, _, _ = select.select(sources, [], [])
            if wake_read in ready:
                try:
                    os.read(wake_read, 4096)
                except BlockingIOError:
                    pass
                _reap(connection, children)
            if connection in ready:
                message, fds = _receive(connection)
                if message is None:
                    break
                kind, pid, _, _, number = message
                if kind == FORK:
                    own = [connection.fileno(), wake_read, wake_write]
                    pid = _fork_slot(fds, own, number)
                    for fd in fds:
                        os.close(fd)
                    children[pid] = number
                    _send(connection, STARTED, pid, 0, 0, number)
                elif kind == KILL and pid in children:
                    _kill_slot(pid)
    except (ConnectionError, BrokenPipeError):
        pass  # the supervisor is gone
    finally:
        for pid in children:
            _kill_slot(pid)
        os._exit(0)


def _reap(connection: socket.socket, children: dict[int, int]) -> None:
    while children:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        number = children.pop(pid, None)
        if number is None:
            continue
        # What the task started and left behind goes with its slot.
        _kill_group(pid)
        unit = 1 if sys.platform == "darwin" else 1024
        _send(connection, EXITED, pid, status, usage.ru_maxrss * unit, number)


def _kill_slot(pid: int) -> None:
    _kill_group(pid)
    try:
        os.kill(pid, signal.SIGKILL)  # it may not have made its group yet
    except ProcessLookupError:
        pass


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _fork_slot(fds: list[int], inherited: list[int], number: int) -> int:
    zygote_pid = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        set_death_signal()
        if os.getppid() != zygote_pid:
            os._exit(1)
        signal.set_wakeup_fd(-1)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(signum, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for fd in inherited:
            os.close(fd)
        code = _run_slot(*fds)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _run_slot(tasks_fd: int, results_fd: int, page_fd: int, out_fd: int, err_fd: int) -> int:
    from cloudexec.worker.slot import Slot

    for fd in (tasks_fd, results_fd, page_fd, out_fd, err_fd):
        os.set_inheritable(fd, False)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(out_fd, 1)
    os.dup2(err_fd, 2)
    for fd in (null, out_fd, err_fd):
        os.close(fd)
    _prefer_for_oom()
    slot = Slot(tasks_fd, results_fd, page_fd)
    try:
        slot.run()
    except EOFError:
        return 0  # the supervisor is gone
    import atexit

    atexit._run_exitfuncs()
    return 0


def _prefer_for_oom() -> None:
    """Let the kernel, when memory runs out, take a task before the supervisor."""
    try:
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
    except OSError:
        pass
