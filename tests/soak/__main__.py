"""Searches for rare failures with random seeds, for use before a release or after a large change.

    python -m tests.soak --minutes 60
    python -m tests.soak --only once --seed 1234 --seconds 30     # what failed, once more

Each run of a search is a process with its own seed, and prints one line. The searches run in turn
until the time is over. ``--restless`` and ``--busy`` are options of the test suite: threads switch
very often, and other processes compute at the same time. The seed does not determine how threads
and processes alternate, so a failure that depends on this does not occur each time with the same
seed.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_COMMAND = "python -m tests.soak"
_HERE = Path(__file__).parent

Command = Callable[[int, float], list[str]]


def _program(path: str, *more: str) -> Command:
    """Return a function that makes the command of a program with a seed and a duration."""

    def command(seed: int, seconds: float) -> list[str]:
        return [sys.executable, str(_ROOT / path), *more, f"--seed={seed}", f"--seconds={seconds}"]

    return command


def _faults(seed: int, seconds: float) -> list[str]:
    options = [f"--seed={seed}", f"--minutes={seconds / 60}", "--period=0.15", "--grace=2"]
    return [sys.executable, str(_ROOT / "benchmarks" / "soak.py"), *options]


def _tests(path: str, *more: str) -> Command:
    """Return a function that makes the command of tests, which take no seed and no duration."""

    def command(seed: int, seconds: float) -> list[str]:
        options = ["-q", "-x", "--suite=off", "-p", "no:cacheprovider", *more]
        return [sys.executable, "-m", "pytest", *options, str(_ROOT / path)]

    return command


def _fuzz(seed: int, seconds: float) -> list[str]:
    return [*_tests("tests/server/test_fuzz.py")(seed, seconds), f"--hypothesis-seed={seed}"]


SEARCHES: Mapping[str, Command] = {
    "core": _program("tests/soak/searches.py", "core"),
    "turns": _program("tests/soak/searches.py", "turns"),
    "forks": _program("tests/soak/searches.py", "forks"),
    "chaos": _program("tests/soak/searches.py", "chaos"),
    "lost": _program("tests/soak/searches.py", "lost"),
    "once": _program("tests/soak/searches.py", "once"),
    "relay": _program("tests/soak/searches.py", "relay"),
    "faults": _faults,
    "fuzz": _fuzz,
    "crashes": _tests("tests/faults/test_crash_matrix.py"),
    "kills": _tests("tests/faults/test_kills.py"),
    "herd": _tests("tests/soak/test_herd.py"),
}
"""The searches by name, each with the function that makes its command."""

PATIENCE = 600.0
"""Seconds after the end of its time after which a search counts as hanging."""


def _run(command: Sequence[str], seed: int, seconds: float) -> tuple[str, str]:
    """Return what is wrong, or an empty string, and the output."""
    env = {**os.environ, "CLOUDEXEC_FUZZ": str(seed), "PYTHONPATH": str(_ROOT)}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command,
            env=env,
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        wrong = ""
        try:
            if process.wait(seconds + PATIENCE):
                wrong = f"exit code {process.returncode}"
        except subprocess.TimeoutExpired:
            wrong = f"no end within {seconds + PATIENCE:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        return wrong, output.read()


def main(arguments: Sequence[str] | None = None) -> int:
    """Search until the time is over; return the exit code."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        _COMMAND,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--minutes", type=float, default=30.0, help="start searches for this many minutes (30)")
    add(
        "--only",
        nargs="+",
        choices=list(SEARCHES),
        help="run only these searches",
        metavar="SEARCH",
    )
    add("--seed", type=int, help="use this seed, and run each search once")
    add(
        "--seconds",
        type=float,
        help="how long one run lasts (a share of the minutes, 60 at most)",
    )
    add("--busy", action="store_true", help="keep processes computing beside the searches")
    add("--restless", action="store_true", help="have threads take turns all the time")
    options = parser.parse_args(arguments)
    if not 0 < options.minutes < math.inf:
        parser.error("--minutes must be a number greater than 0")
    if options.seconds is not None and not 0 < options.seconds < math.inf:
        parser.error("--seconds must be a number greater than 0")
    names = options.only or list(SEARCHES)
    seconds = options.seconds or min(60.0, options.minutes * 60 / len(names))
    begun = time.monotonic()
    runs, failed = 0, []
    with contextlib.ExitStack() as stack:
        sys.path.insert(0, str(_HERE.parent))
        import load_plugin

        if options.busy:
            stack.enter_context(load_plugin.busy())
        if options.restless:
            stack.enter_context(load_plugin.restless())
        end = time.monotonic() + options.minutes * 60
        while not runs or time.monotonic() < end:
            for name in names:
                seed = options.seed if options.seed is not None else secrets.randbelow(1 << 31)
                began = time.monotonic()
                wrong, output = _run(SEARCHES[name](seed, seconds), seed, seconds)
                took = time.monotonic() - began
                runs += 1
                word = "FAIL" if wrong else "ok"
                print(f"{word:4}  {name:8}  seed {seed:<10}  {took:5.0f} s  {wrong}".rstrip())
                if wrong:
                    again = f"{_COMMAND} --only {name} --seed {seed} --seconds {seconds:g}"
                    failed.append(again)
                    print(f"{output}\nOnce more: {again}")
                sys.stdout.flush()
                if time.monotonic() >= end and options.seed is None:
                    break
            if options.seed is not None:
                break
    minutes = (time.monotonic() - begun) / 60
    for again in failed:
        print(f"FAILED: {again}")
    ran = f"{_counted(runs, 'run')} of {_counted(len(names), 'search', 'searches')}"
    print(f"soak: {ran} in {minutes:.1f} min, {len(failed)} failed")
    return 1 if failed else 0


def _counted(number: int, what: str, many: str = "") -> str:
    return f"{number} {what}" if number == 1 else f"{number} {many or what + 's'}"


if __name__ == "__main__":
    sys.exit(main())
