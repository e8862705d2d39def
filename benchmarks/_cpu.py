"""The CPU time of a program and of all processes that it has started, whoever waits for them."""

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
    """Run a program to its end, and wait for what it leaves behind.

    Args:
        command: The program and its arguments.
        **options: As ``subprocess.run()`` takes them; it looks for the end only every 50 ms, so
            that its ``timeout`` is counted here.

    Returns:
        How it ended, its seconds from start to end, and those of CPU time of all processes, user
        and system. Where processes that are left behind cannot be adopted, which is everywhere but
        on Linux, they do not count.
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
        pass  # there are no more
    after = os.times()
    took = after.children_user + after.children_system
    return done, seconds, took - before.children_user - before.children_system
