"""Does a real program get faster or slower by changing the class of its executor?

Each program of ``programs/`` is run with each executor in turn, with two workers, and its whole
process is timed. The ratio is the time with the other executor over the time with cloudexec, so
cloudexec is faster if it is more than 1. A second ratio is that of the CPU time, user and system,
of all processes. On a busy machine it is the better indicator, though it is not the goal.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile

import _cpu
import _report

_DIRECTORY = pathlib.Path(__file__).parent / "programs"
_OURS = "cloudexec"
_OTHERS = ("fork", "spawn", "forkserver", "loky")
_TIMEOUT = 300.0
_HANGS = {("queries", "fork")}
"""Runs that are left out because they would hang: the locks of polars' threads break by a fork."""
_LONG = 5.0
"""Programs that take more seconds with ``fork`` may take at most a tenth longer with cloudexec."""


def _missing(program: pathlib.Path) -> list[str]:
    """Return the libraries that a program imports and that are not installed."""
    names = re.findall(r"^(?:import|from) (\w+)", program.read_text(), re.MULTILINE)
    return [name for name in names if name != "_pool" and importlib.util.find_spec(name) is None]


def _run(program: pathlib.Path, executor: str) -> tuple[float, float, str]:
    """Run a program; return its seconds, its seconds of CPU time, and its output.

    Raises:
        RuntimeError: If the program fails.
    """
    command = [sys.executable, str(program), executor]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # The output goes to files, as reading a pipe would wait until the last process has closed it.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        try:
            done, seconds, cpu = _cpu.run(
                command, env=environ, stdout=out, stderr=err, timeout=_TIMEOUT, check=False
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {_TIMEOUT:g} s") from None
        out.seek(0)
        err.seek(0)
        if done.returncode:
            raise RuntimeError(err.read().strip()[-500:])
        return seconds, cpu, out.read()


def _round(
    program: pathlib.Path, executors: list[str], times: dict[str, list[tuple[float, float]]]
) -> None:
    printed: dict[str, str] = {}
    for executor in list(executors):
        if (program.stem, executor) in _HANGS:
            executors.remove(executor)
            continue
        try:
            seconds, cpu, printed[executor] = _run(program, executor)
        except RuntimeError as exc:
            print(f"  {program.stem}, {executor}: {exc}", file=sys.stderr, flush=True)
            executors.remove(executor)
            times.pop(executor, None)
            continue
        times.setdefault(executor, []).append((seconds, cpu))
    if len(set(printed.values())) > 1:
        print(f"  {program.stem}: results differ: {printed}", file=sys.stderr, flush=True)


def main(options: argparse.Namespace, report: _report.Report) -> None:
    others = [name for name in _OTHERS if name != "loky" or importlib.util.find_spec(name)]
    if "loky" not in others:
        report.missing("programs", "loky")
    programs = sorted(_DIRECTORY.glob("[a-z]*.py"))
    if options.only:
        programs = [program for program in programs if program.stem in options.only]
    medians: dict[str, dict[str, tuple[float, float]]] = {}
    for program in programs:
        if absent := _missing(program):
            report.missing(program.stem, "", f"skipped: no {', '.join(absent)}")
            continue
        executors = [_OURS, *others]
        times: dict[str, list[tuple[float, float]]] = {}
        for _ in range(options.rounds):
            _round(program, executors, times)
        if _OURS not in times:
            report.missing(program.stem, "", "failed")
            continue
        medians[program.stem] = {
            name: (statistics.median(s for s, _ in some), statistics.median(c for _, c in some))
            for name, some in times.items()
        }
        ours = medians[program.stem][_OURS]
        for name in others:
            if name not in medians[program.stem]:
                why = "it would hang" if (program.stem, name) in _HANGS else "failed"
                report.missing(program.stem, name, why)
                continue
            theirs = medians[program.stem][name]
            least = 1.0 if name in ("spawn", "forkserver") else None
            if name == "fork" and theirs[0] > _LONG:
                least = 0.9
            report.compare(program.stem, ours[0], name, theirs[0], "s", faster=True, at_least=least)
            report.compare(f"{program.stem}, CPU", ours[1], name, theirs[1], "s", faster=True)
    _sum_up(medians, others, report)
    if options.markdown:
        _table(medians, others)


def _ratios(
    medians: dict[str, dict[str, tuple[float, float]]], other: str, index: int
) -> list[float]:
    return [each[other][index] / each[_OURS][index] for each in medians.values() if other in each]


def _sum_up(
    medians: dict[str, dict[str, tuple[float, float]]], others: list[str], report: _report.Report
) -> None:
    for other in others:
        for index, what in enumerate(("", ", CPU")):
            ratios = _ratios(medians, other, index)
            if not ratios:
                continue
            goal = 1.2 if other in ("spawn", "forkserver") and not index else None
            middle, least = statistics.median(ratios), min(ratios)
            report.number(f"median of {len(ratios)}{what}", middle, "x", at_least=goal, peer=other)
            report.number(f"worst{what}", least, "x", peer=other)


def _table(medians: dict[str, dict[str, tuple[float, float]]], others: list[str]) -> None:
    print(f"\n| program | cloudexec | {' | '.join(others)} |")
    print(f"| --- | ---: |{' ---: |' * len(others)}")
    for name, each in medians.items():
        cells = [
            f"{each[other][0] / each[_OURS][0]:.2f}" if other in each else "-" for other in others
        ]
        print(f"| {name} | {each[_OURS][0]:.2f} s | {' | '.join(cells)} |")
    for what, summary in (("median", statistics.median), ("worst", min)):
        found = [_ratios(medians, other, 0) for other in others]
        cells = [f"{summary(ratios):.2f}" if ratios else "-" for ratios in found]
        print(f"| {what} | | {' | '.join(cells)} |")


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", metavar="PROGRAM", help="these of programs/ alone")
    parser.add_argument("--markdown", action="store_true", help="also print a table of ratios")


def measure(contender: str) -> dict[str, float]:
    raise NotImplementedError("each program is a process of its own")


if __name__ == "__main__":
    _report.run(__doc__, main, measure, add_options=_options)
