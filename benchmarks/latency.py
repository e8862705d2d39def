"""How long does one no-op take, from submit() to its result, when no other task runs?"""

from __future__ import annotations

import argparse
import time

import _calls
import _fresh
import _peers
import _report
from _peers import DASK, LOKY, OURS, PARSL, POOL, RAY

_TRIPS = {OURS: 5_000, POOL: 5_000, LOKY: 3_000, DASK: 500, RAY: 1_000, PARSL: 500}
_BUDGETS = {POOL: 3.0, DASK: 1.0, RAY: 1.0, PARSL: 1.0}


def measure(contender: str, trips: int) -> _fresh.Figures:
    times = []
    with _peers.opened(contender, 2) as peer:
        for _ in range(100):
            peer.collect([peer.submit(_calls.noop)])
        for _ in range(trips):
            begin = time.perf_counter()
            peer.collect([peer.submit(_calls.noop)])
            times.append(time.perf_counter() - begin)
    times.sort()
    return {"p50": times[len(times) // 2] * 1e6, "p99": times[len(times) * 99 // 100] * 1e6}


def main(options: argparse.Namespace, report: _report.Report) -> None:
    def arguments(name: str) -> dict[str, object]:
        return {"trips": _TRIPS[name] // (10 if options.quick else 1)}

    figures = _peers.rounds(_TRIPS, options.rounds, report, "round trip", arguments)
    ours = figures.pop(OURS)
    for quantile in ("p50", "p99"):
        for name, theirs in figures.items():
            report.compare(
                f"round trip, {quantile}",
                _report.median(ours, quantile),
                name,
                _report.median(theirs, quantile),
                "us",
                at_most=_BUDGETS.get(name) if quantile == "p50" else None,
            )


if __name__ == "__main__":
    _report.run(__doc__, main, measure)
