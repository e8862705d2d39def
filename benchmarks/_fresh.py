"""Runs each measurement in a fresh process, so that no contender is affected by another one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

Figures = dict[str, float]

_TIMEOUT = 900.0
"""Seconds for one measurement; the slowest takes about a minute."""


def measure(
    contender: str, *, pin: bool = False, prefix: Sequence[str] = (), **arguments: Any
) -> Figures:
    """Run the calling script's ``measure(contender, **arguments)`` in a fresh interpreter.

    Args:
        contender: Name of the library to measure.
        pin: Whether to confine the interpreter and all its child processes to one core.
        prefix: Command and arguments that start the interpreter; empty to start it directly.
        **arguments: Passed to ``measure`` as JSON.

    Raises:
        RuntimeError: If the interpreter fails; the message has the end of its output.
    """
    script = sys.modules["__main__"].__file__
    assert script is not None
    request = json.dumps({"contender": contender, **arguments})
    # The answer comes in a file and not through a pipe, as ``prefix`` may not pass on descriptors.
    reading, path = tempfile.mkstemp(prefix="benchmark-")
    command = [*prefix, sys.executable, script, "--measure", request, path]
    core = min(os.sched_getaffinity(0)) if pin else None
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=None if core is None else lambda: os.sched_setaffinity(0, {core}),
        text=True,
        errors="replace",
    )
    try:
        words, _ = process.communicate(timeout=_TIMEOUT)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise
    finally:
        with os.fdopen(reading) as answers:
            answer = answers.readline() if process.returncode == 0 else ""
        os.unlink(path)
    if not answer:
        lines = "\n".join(words.strip().splitlines()[-15:])
        raise RuntimeError(f"{contender} failed with exit code {process.returncode}:\n{lines}")
    figures: Figures = json.loads(answer)
    return figures


def answer_if_asked(measure: Callable[..., Figures]) -> None:
    """If this is the fresh interpreter, measure, write the figures, and exit."""
    if len(sys.argv) != 4 or sys.argv[1] != "--measure":
        return
    figures = measure(**json.loads(sys.argv[2]))
    with open(sys.argv[3], "w") as answers:
        answers.write(json.dumps(figures) + "\n")
    sys.exit(0)
