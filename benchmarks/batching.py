"""Does chunksize need tuning, and does a long task delay the short tasks behind it?

cloudexec sends short tasks in batches without being told, so map(chunksize=1) is compared with
ProcessPoolExecutor and the best of several chunksizes. Then a mix of many no-ops and a few long
sleeps is run, and no-ops behind one long task of the same function, which cannot be recognised in
advance. All runs have two workers.
"""

from __future__ import annotations

import argparse
import random
import time

import _calls
import _fresh
import _peers
import _report
from _peers import OURS, POOL

_WORKERS = 2
_CHUNKSIZES = (1, 8, 64, 512, 4096)
_LONG = 0.2
"""Seconds that a long task of the mix sleeps."""
_STRAGGLER = 1.0
"""Seconds that the straggler sleeps."""


def measure(contender: str, what: str, tasks: int, chunksize: int = 1) -> _fresh.Figures:
    with _peers.opened(contender, _WORKERS) as peer:
        peer.map(_calls.sleep, [0.0] * 1000)  # the executor learns that the function is short
        if what == "mix":
            return _mix(peer, tasks, chunksize)
        if what == "straggler":
            return _straggler(peer, tasks, chunksize)
        fn, item = (_calls.noop, None) if what == "no-op" else (_calls.spin, 100e-6)
        peer.map(fn, [item] * 500)
        begin = time.perf_counter()
        peer.map(fn, [item] * tasks, chunksize)
        return {"rate": tasks / (time.perf_counter() - begin)}


def _mix(peer: _peers.Contender, tasks: int, chunksize: int) -> _fresh.Figures:
    """Run tasks of which one in 500 is long, at random positions."""
    long_tasks = tasks // 500
    items = [_LONG] * long_tasks + [0.0] * (tasks - long_tasks)
    random.Random(7).shuffle(items)
    begin = time.perf_counter()
    peer.map(_calls.sleep, items, chunksize)
    return {"seconds": time.perf_counter() - begin, "ideal": long_tasks * _LONG / _WORKERS}


def _straggler(peer: _peers.Contender, tasks: int, chunksize: int) -> _fresh.Figures:
    """Run tasks of which the first is long, and measure when the others are done."""
    begin = time.monotonic()
    ends = sorted(peer.map(_calls.sleep, [_STRAGGLER] + [0.0] * tasks, chunksize))
    return {
        "p50": (ends[tasks // 2] - begin) * 1000,
        # ends[-1] is the straggler itself.
        "last": (ends[-2] - begin) * 1000,
    }


def main(options: argparse.Namespace, report: _report.Report) -> None:
    divisor = 10 if options.quick else 1
    for what, tasks in (("no-op", 100_000 // divisor), ("100 us", 20_000 // divisor)):
        _chunksizes(options, report, what, tasks)

    _makespan(options, report, 10_000 // (2 if options.quick else 1))
    _behind_straggler(options, report, 2_000)


def _rounds(
    options: argparse.Namespace, report: _report.Report, what: str, tasks: int, chunksize: int
) -> tuple[list[_fresh.Figures], list[_fresh.Figures]]:
    """Measure cloudexec with chunksize=1 and the process pool with ``chunksize``, in turn."""

    def arguments(name: str) -> dict[str, object]:
        return {"what": what, "tasks": tasks, "chunksize": 1 if name == OURS else chunksize}

    figures = _peers.rounds([OURS, POOL], options.rounds, report, what, arguments)
    return figures[OURS], figures[POOL]


def _makespan(options: argparse.Namespace, report: _report.Report, tasks: int) -> None:
    title = f"makespan of {tasks:,} no-ops with {tasks // 500} of {_LONG} s among them"
    for chunksize in (1, 64):
        ours, theirs = _rounds(options, report, "mix", tasks, chunksize)
        seconds = _report.median(ours, "seconds")
        if chunksize == 1:
            ideal = _report.median(ours, "ideal")
            report.compare(title, seconds, "ideal, at no cost per task", ideal, "s")
        pool = f"{POOL}, chunksize={chunksize}"
        report.compare(title, seconds, pool, _report.median(theirs, "seconds"), "s", faster=True)


def _behind_straggler(options: argparse.Namespace, report: _report.Report, tasks: int) -> None:
    title = f"{tasks:,} no-ops behind a straggler of {_STRAGGLER:g} s"
    for chunksize in (1, 64):
        ours, theirs = _rounds(options, report, "straggler", tasks, chunksize)
        for figure, name in (("p50", "half of them done"), ("last", "all of them done")):
            report.number(
                f"{title}, {name}",
                _report.median(ours, figure),
                "ms",
                # All others must be done in half the straggler's time.
                at_most=_STRAGGLER * 500 if figure == "last" and chunksize == 1 else None,
                peer=f"{POOL}, chunksize={chunksize}",
                theirs=_report.median(theirs, figure),
            )


def _chunksizes(options: argparse.Namespace, report: _report.Report, what: str, tasks: int) -> None:
    ours: list[_fresh.Figures] = []
    theirs: dict[int, list[_fresh.Figures]] = {size: [] for size in _CHUNKSIZES}
    for _ in range(options.rounds):
        ours.append(_fresh.measure(OURS, what=what, tasks=tasks))
        for size in _CHUNKSIZES:
            theirs[size].append(_fresh.measure(POOL, what=what, tasks=tasks, chunksize=size))
    rates = {size: _report.median(theirs[size], "rate") for size in _CHUNKSIZES}
    best = max(rates, key=lambda size: rates[size])
    title = f"map of {tasks:,} tasks ({what})"
    rate = _report.median(ours, "rate")
    for size in sorted({1, best}):
        name = f"{POOL}, chunksize={size}" + (" (its best)" if size == best else "")
        report.compare(title, rate, name, rates[size], "tasks/s")


if __name__ == "__main__":
    _report.run(__doc__, main, measure)
