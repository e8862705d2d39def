"""Ends processes that user code has forked inside a thread or process of cloudexec.

User code such as a callback may fork. The child has one thread, which would go on as a thread of
the executor when the callback returns. The rule of this module is that no code of the executor runs
in the child: the child ends where the user's code ends.
"""

from __future__ import annotations

import atexit
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import NoReturn

__all__ = [
    "OwnThread",
    "count_threads",
    "count_threads_after_fork",
    "end_child",
    "end_if_forked",
    "forget_exit_functions",
    "run_exit_functions",
    "templates",
]

_PROBE_SECONDS = 1.0
"""Seconds within which a forked process that does nothing must end."""
templates: set[int] = set()
"""Process ids of this process's forks from which workers are forked; they use no object of the
program."""


class OwnThread(threading.Thread):
    """A daemon thread of cloudexec that also runs user code.

    Args:
        target: The function that the thread runs.
        name: The thread's name.
    """

    def __init__(self, target: Callable[[], object], name: str) -> None:
        super().__init__(target=target, name=name, daemon=True)
        self.process = os.getpid()


def end_if_forked(exc: BaseException | None = None) -> None:
    """End this process if the user code that has just ended forked it.

    It may be called in any thread. In a thread that the user has started it does nothing.

    Args:
        exc: The exception of the user code, or ``None`` if it returned.
    """
    thread = threading.current_thread()
    if isinstance(thread, OwnThread) and thread.process != os.getpid():
        end_child(exc)


def end_child(exc: BaseException | None) -> NoReturn:
    """End a forked child with the exit code that its code asks for, such as by ``sys.exit()``.

    Args:
        exc: The exception of the user code, or ``None`` if it returned.
    """
    code = 0
    try:
        if exc is not None and issubclass(type(exc), SystemExit):
            code = _exit_code(exc)
            # Wait for the threads, as any Python program does at its end.
            for thread in threading.enumerate():
                if not thread.daemon and thread is not threading.current_thread():
                    thread.join()
            run_exit_functions(lambda: _flush_and_exit(code))
        elif exc is not None:
            code = 1
            sys.excepthook(type(exc), exc, exc.__traceback__)
    except BaseException:
        pass  # neither this exception nor a handler of the program may keep the child from ending
    _flush_and_exit(code)


def _flush_and_exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            pass  # the stream is closed, or was replaced by another object
    os._exit(code)


def _exit_code(exc: BaseException) -> int:
    value = getattr(exc, "code", None)
    if value is None:
        return 0
    if isinstance(value, int):
        return value & 0xFF
    print(value, file=sys.stderr)
    return 1


def count_threads() -> int:
    """Return the number of threads of this process, including those that Python does not know."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


def count_threads_after_fork() -> int:
    """Fork a process that ends at once, and return the number of this process's threads after that.

    Some libraries, such as the OpenBLAS of numpy, end their threads before each fork.

    Returns:
        The number of threads. It is at least 2 if the fork fails, or if the forked process does not
        end because it waits for a lock that another thread holds.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about a fork with threads
            pid = os.fork()
    except OSError:
        return max(2, count_threads())
    if not pid:
        os._exit(0)
    ends = time.monotonic() + _PROBE_SECONDS
    try:
        while not os.waitpid(pid, os.WNOHANG)[0]:
            if time.monotonic() > ends:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return max(2, count_threads())
            time.sleep(0.0002)
    except ChildProcessError:
        pass  # it has ended; the program ignores SIGCHLD, or waits for all its children
    return count_threads()


def run_exit_functions(rest: Callable[[], NoReturn]) -> NoReturn:
    """Call the functions that were registered with ``atexit`` in this process.

    Args:
        rest: Called afterwards; it ends the process.
    """
    global _rest
    _rest = rest
    atexit._run_exitfuncs()
    rest()


def forget_exit_functions() -> None:
    """Keep the functions that are registered now from being called, as they belong to the parent.

    The functions are not unregistered, because freeing them would run finalizers. Instead one more
    function is registered. It is called first, and ends the process before the others are called.
    """
    atexit.register(lambda: _rest())


def _exit_at_once() -> NoReturn:
    os._exit(0)


_rest: Callable[[], NoReturn] = _exit_at_once
