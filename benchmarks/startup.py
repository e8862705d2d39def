"""How long does a program wait for the import of cloudexec, and for the first result?

The import is the time of a fresh interpreter that does nothing else, less that of an interpreter
that does nothing. The first result is the time from before the import to the result of a no-op,
with one worker and with two. The whole program is a process with only that no-op, from its start to
its end, and its CPU time is that of all its processes. The last table shows when each step up to
cloudexec's first result was done, and how long after the step before it. Steps of the worker and of
the client run at the same time.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time

import _calls
import _cpu
import _fresh
import _peers
import _report
import _steps
from _peers import FORKSERVER, LOKY, OURS, POOL, SPAWN

_ALL = [OURS, POOL, SPAWN, FORKSERVER, LOKY]

_IMPORTS = {
    OURS: "from cloudexec import BatchExecutor",
    POOL: "from concurrent.futures import ProcessPoolExecutor",
    LOKY: "from loky import get_reusable_executor",
}


def measure(contender: str, workers: int, steps: bool = False) -> _fresh.Figures:
    begin = time.perf_counter()
    if steps:
        from cloudexec import BatchExecutor  # noqa: F401

        _steps.note("client: cloudexec imported")
        _steps.watch_client()
    with _peers.opened(contender, workers) as peer:
        peer.collect([peer.submit(_calls.noop)])
        first = time.perf_counter()
    figures = {"first": first - begin, "all": time.perf_counter() - begin}
    if steps:
        figures |= {step: at - begin for step, at in _steps.read().items()}
    return figures


def _whole(contender: str, workers: int) -> tuple[float, float]:
    """Run a program with one no-op; return its seconds and its seconds of CPU time."""
    here = os.path.dirname(os.path.abspath(__file__))
    code = (
        f"import sys; sys.path.insert(0, {here!r}); import _calls, _peers\n"
        f"if __name__ == '__main__':\n"
        f"    with _peers.opened({contender!r}, {workers}) as peer:\n"
        f"        peer.collect([peer.submit(_calls.noop)])\n"
    )
    with tempfile.TemporaryDirectory() as directory:
        path = os.path.join(directory, "program.py")
        with open(path, "w") as file:
            file.write(code)
        _, seconds, cpu = _cpu.run([sys.executable, path], check=True)
    return seconds, cpu


def _interpreter(code: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begin


def main(options: argparse.Namespace, report: _report.Report) -> None:
    names = [name for name in _IMPORTS if _peers.is_installed(name)]
    for name in names:
        _interpreter(_IMPORTS[name])  # compiles and caches the bytecode
    bare: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(5 if options.quick else 25):
        bare.append(_interpreter("pass"))
        for name in names:
            times[name].append(_interpreter(_IMPORTS[name]))
    # The smallest of many times, as other processes can only add to a time.
    imports = {name: (min(times[name]) - min(bare)) * 1000 for name in names}
    for name in names[1:]:
        report.number(
            "import",
            imports[OURS],
            "ms",
            at_most=60.0 if name == POOL else None,
            peer=name,
            theirs=imports[name],
        )
    if LOKY not in names:
        report.missing("import", LOKY)

    for workers in (1, 2):
        of = f"{workers} worker{'s' * (workers != 1)}"
        what = f"first result from a cold start, {of}"
        given = {"workers": workers}
        figures = _peers.rounds(_ALL, options.rounds, report, what, lambda name: given)  # noqa: B023
        ours = figures.pop(OURS)
        for name, theirs in figures.items():
            report.number(
                what,
                _report.median(ours, "first"),
                "s",
                at_most=1.5 if name == SPAWN else None,
                peer=name,
                theirs=_report.median(theirs, "first"),
            )
            report.number(
                "the same and shut down",
                _report.median(ours, "all"),
                "s",
                peer=name,
                theirs=_report.median(theirs, "all"),
            )

    installed = [name for name in _ALL if _peers.is_installed(name)]
    wholes: dict[str, list[tuple[float, float]]] = {name: [] for name in installed}
    for _ in range(options.rounds):
        for name in installed:
            wholes[name].append(_whole(name, 2))
    for index, unit in enumerate(("whole program, 2 workers", "CPU time of it")):
        medians = {
            name: statistics.median(figure[index] for figure in some)
            for name, some in wholes.items()
        }
        for name in installed[1:]:
            report.number(unit, medians[OURS], "s", peer=name, theirs=medians[name])

    for workers in (1, 2):
        with tempfile.TemporaryDirectory() as directory:
            os.environ[_steps.FILE] = os.path.join(directory, "steps")
            steps = _fresh.measure(OURS, workers=workers, steps=True)
            del os.environ[_steps.FILE]
        del steps["all"]
        steps["client: first result"] = steps.pop("first")
        report.say(f"{workers} worker{'s' * (workers != 1)}; ms since the start, and since")
        report.say("the step before of the same process:")
        last: dict[str, float] = {}
        for step, at in sorted(steps.items(), key=lambda each: each[1]):
            process = step.partition(":")[0]
            took = at - last.get(process, max(last.values(), default=0.0))
            last[process] = at
            report.say(f"{at * 1000:8.1f} {took * 1000:8.1f}  {step}")


if __name__ == "__main__":
    _report.run(__doc__, main, measure)
