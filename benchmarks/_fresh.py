"""Measurements in fresh processes: what one contender imports or leaves behind touches no other."""

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
        contender: Whose turn it is.
        pin: Confine the interpreter and all that it starts to one core.
        prefix: What starts the interpreter, if it is not to be started plainly.
        **arguments: Passed on, as JSON.

    Raises:
        RuntimeError: If it fails; the message holds its last words.
    """
    script = sys.modules["__main__"].__file__
    assert script is not None
    request = json.dumps({"contender": contender, **arguments})
    # A file, not a pipe: what stands between may not hand down descriptors.
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
    """In the fresh interpreter: measure, hand over the figures, and end."""
    if len(sys.argv) != 4 or sys.argv[1] != "--measure":
        return
    figures = measure(**json.loads(sys.argv[2]))
    with open(sys.argv[3], "w") as answers:
        answers.write(json.dumps(figures) + "\n")
    sys.exit(0)
