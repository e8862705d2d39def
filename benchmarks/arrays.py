"""How fast do NumPy arrays travel on one machine: many, one to many tasks, and a large one?

Two workers run on this machine. Memory is the largest increase of the memory of all processes
together, including files in memory. The benchmark runs on Linux only and needs NumPy.
"""

from __future__ import annotations

import argparse
import threading
import time
from typing import Any

import _calls
import _fresh
import _memory
import _peers
import _report
from _memory import MIB
from _peers import MPI, OURS, POOL, RAY

_MANY = {OURS: 1000, POOL: 1000, RAY: 1000, MPI: 1000}
_SHARED = {OURS: 200, POOL: 20, RAY: 200, MPI: 20}
"""Number of tasks that get the same array; smaller for libraries that send it with each task."""


class _Watch:
    """Measures the largest increase of the memory in use on this machine."""

    def __init__(self) -> None:
        self._before = _memory.available()
        self.most = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def _look(self) -> None:
        while not self._ended.wait(0.01):
            self.most = max(self.most, self._before - _memory.available())

    def close(self) -> float:
        self._ended.set()
        self._thread.join()
        return self.most / MIB


def measure(contender: str, kind: str, count: int, mib: int) -> _fresh.Figures:
    import numpy

    items = mib * MIB // 8
    with _peers.opened(contender, 2) as peer:
        peer.map(_calls.length, [b"x"] * 20)
        if kind == "many":
            arrays = [numpy.full(items, float(i)) for i in range(count)]
            watch = _Watch()
            begin = time.perf_counter()
            for i, result in enumerate(peer.map(_calls.double, arrays)):
                assert result[0] == 2 * i
        elif kind == "shared":
            array = numpy.ones(items)
            watch = _Watch()
            begin = time.perf_counter()
            for result in peer.map(_calls.first, [array] * count):
                assert result == 1.0
        else:
            peer.map(_calls.ones, [items] * 2)  # now each worker has made its array
            array = numpy.ones(items) if kind == "argument" else None
            call: tuple[Any, ...] = (
                (_calls.ones, items) if array is None else (_calls.add_up, array)
            )
            watch = _Watch()
            begin = time.perf_counter()
            for _ in range(count):
                if array is not None:
                    array[0] += 1.0  # makes the content new each time
                peer.collect([peer.submit(*call)])
        seconds = (time.perf_counter() - begin) / count
        return {"seconds": seconds, "memory": watch.close()}


def main(options: argparse.Namespace, report: _report.Report) -> None:
    scale = 10 if options.quick else 1
    cases = {
        "many": ("a 1 MiB array out and back", 1, _MANY, 3.7),
        "shared": ("a task with the same 64 MiB array as others", 64 // scale or 1, _SHARED, 10.0),
        "argument": ("an array of 256 MiB as argument", 256 // scale, None, 3.0),
        "result": ("an array of 256 MiB as result", 256 // scale, None, 3.0),
    }
    for kind, (what, mib, _, budget) in cases.items():

        def arguments(name: str, kind: str = kind, mib: int = mib) -> dict[str, object]:
            found = cases[kind][2]
            count = 3 if found is None else max(5, found[name] // scale)
            return {"kind": kind, "count": count, "mib": mib}

        names = [OURS, POOL, RAY, MPI] if kind in ("many", "shared") else [OURS, POOL, RAY]
        figures = _peers.rounds(names, options.rounds, report, what, arguments)
        ours = figures.pop(OURS)
        for name, theirs in figures.items():
            report.compare(
                what,
                _report.median(ours, "seconds") * 1e3,
                name,
                _report.median(theirs, "seconds") * 1e3,
                "ms",
                faster=True,
                at_least=budget if name == POOL else 1.0,
            )
            report.number(
                f"most memory in use, {what}",
                _report.median(ours, "memory"),
                "MiB",
                peer=name,
                theirs=_report.median(theirs, "memory"),
            )


if __name__ == "__main__":
    _report.run(__doc__, main, measure)
