"""Forked children of code that runs in a thread or process of ours: they end where it ends.

A callback, for instance, may fork. In the child there is one thread then, which would go on as that
of the executor's when the callback returns. Nothing of the executor is to run in the child.
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
"""That a process which is forked for nothing may take to end."""
templates: set[int] = set()
"""Forks of this process, of which workers are forked: they use nothing of the program's."""


class OwnThread(threading.Thread):
    """A daemon thread in which code of the user's runs, between other things.

    Args:
        target: What it does.
        name: Its name.
    """

    def __init__(self, target: Callable[[], object], name: str) -> None:
        super().__init__(target=target, name=name, daemon=True)
        self.process = os.getpid()


def end_if_forked(exc: BaseException | None = None) -> None:
    """End this process if it was forked by the code that has just come to its end.

    To be called in any thread; threads of the user's own go on.

    Args:
        exc: What the code has raised.
    """
    thread = threading.current_thread()
    if isinstance(thread, OwnThread) and thread.process != os.getpid():
        end_child(exc)


def end_child(exc: BaseException | None) -> NoReturn:
    """End a forked child as its code asks: with the exit code of its ``sys.exit()``, for instance.

    Args:
        exc: What the code has raised, if it has not returned.
    """
    code = 0
    try:
        if exc is not None and issubclass(type(exc), SystemExit):
            code = _exit_code(exc)
            # As at the end of any program.
            for thread in threading.enumerate():
                if not thread.daemon and thread is not threading.current_thread():
                    thread.join()
            run_exit_functions(lambda: _flush_and_exit(code))
        elif exc is not None:
            code = 1
            sys.excepthook(type(exc), exc, exc.__traceback__)
    except BaseException:
        pass  # neither what it says nor a handler of the program's keeps it from ending
    _flush_and_exit(code)


def _flush_and_exit(code: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            pass  # it is closed, or something else was put there
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
    """Return how many threads this process has, those included that Python does not know of."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return threading.active_count()


def count_threads_after_fork() -> int:
    """Fork a process that ends at once, and return how many threads this one has afterwards.

    Some libraries end their threads before each fork, as OpenBLAS does, which numpy uses.

    Returns:
        At least 2 if there can be no such process, or if it does not end: it waits for a lock that
        a thread has.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the threads that may be there
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
        pass  # it has ended: the program ignores SIGCHLD, or waits for all of its children
    return count_threads()


def run_exit_functions(rest: Callable[[], NoReturn]) -> NoReturn:
    """Call the functions that were registered with ``atexit`` in this process.

    Args:
        rest: Ends the process, afterwards.
    """
    global _rest
    _rest = rest
    atexit._run_exitfuncs()
    rest()


def forget_exit_functions() -> None:
    """Have the functions that are registered now never called: they are another process's.

    They are not let go of, as that would run finalizers. The last one registered is called first,
    and this process ends before their turn.
    """
    atexit.register(lambda: _rest())


def _exit_at_once() -> NoReturn:
    os._exit(0)


_rest: Callable[[], NoReturn] = _exit_at_once
