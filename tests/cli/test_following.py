"""Ctrl-C while a run is followed."""

from __future__ import annotations

import subprocess
import sys


def test_ctrl_c_at_any_line_of_a_pause_is_noted() -> None:
    """A handler that waited for a lock of the code that it interrupts would wait for ever."""
    program = """
import signal, sys
from cloudexec.cli._following import Follower

def pause_until(last):
    follower = Follower(None, "run", print)
    follower._phase = "running"
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        if event == "line" and frame.f_code.co_name != "note":
            lines += 1
            if lines == last:
                signal.raise_signal(signal.SIGINT)
        return trace

    with follower._asking_on_interrupt():
        sys.settrace(trace)
        follower._pause(0.001)
        sys.settrace(None)
        if lines < last:
            return False
    assert follower._interrupted, last
    return True

last = 1
while pause_until(last):
    last += 1
print(last)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    assert int(done.stdout) > 3
