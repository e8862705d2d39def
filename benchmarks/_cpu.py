"""Measures the CPU time of a program and of all processes that it has started."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import Any

_PR_SET_CHILD_SUBREAPER = 36


def run(
    command: list[str], **options: Any
) -> tuple[subprocess.CompletedProcess[str], float, float]:
    """Run a program to its end, and wait for the processes that it leaves behind.

    Args:
        command: The program and its arguments.
        **options: Arguments of ``subprocess.run()``. ``timeout`` is handled here, because
            ``subprocess.run()`` checks for the end only every 50 ms if it has a timeout.

    Returns:
        The finished process, its seconds from start to end, and the seconds of CPU time (user and
        system) of all processes. Processes that are left behind count on Linux only, as other
        systems cannot adopt them.
    """
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    begin, before = time.perf_counter(), os.times()
    timeout, check = options.pop("timeout", None), options.pop("check", False)
    with subprocess.Popen(command, **options) as program:
        timer = threading.Timer(timeout, program.kill) if timeout is not None else None
        if timer is not None:
            timer.start()
        code = program.wait()
        seconds = time.perf_counter() - begin
    if timer is not None:
        timer.cancel()
        if seconds >= timeout:
            raise subprocess.TimeoutExpired(command, timeout)
    done = subprocess.CompletedProcess[str](command, code)
    if check:
        done.check_returncode()
    try:
        while os.waitpid(-1, 0):
            pass
    except ChildProcessError:
        pass  # no process is left
    after = os.times()
    took = after.children_user + after.children_system
    return done, seconds, took - before.children_user - before.children_system
