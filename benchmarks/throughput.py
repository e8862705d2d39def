"""How many no-op tasks per second, and how much client CPU does each cost?

With two workers, a loop of submit() is measured, and then map(chunksize=1), for functions of the
script and for one of a module. With --pin everything runs on one core, where waking another process
costs a tenth of the time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import _calls
import _fresh
import _peers
import _report
from _peers import DASK, LOKY, OURS, PARSL, POOL, RAY

_TASKS = {OURS: 50_000, POOL: 50_000, LOKY: 20_000, DASK: 3_000, RAY: 5_000, PARSL: 3_000}
"""Number of tasks, which is smaller for slow libraries, as tasks per second are compared."""
_FACTOR = 0.5


def noop(value=None):  # type: ignore[no-untyped-def]  # what annotations cost is the next one's
    """Do nothing; as a function of __main__ it is pickled by value."""


def annotated(value: object = None) -> None:
    """Do nothing; a function of __main__ whose annotations are pickled, too."""


def _scaled(value):  # type: ignore[no-untyped-def]
    return value and value * _FACTOR


def calling(value=None):  # type: ignore[no-untyped-def]
    """Call another function; that function and a constant are sent, too."""
    _scaled(value)


_FUNCTIONS: dict[str, Callable[..., None]] = {
    "function of a script": noop,
    "annotated function of a script": annotated,
    "function of a script that calls another": calling,
    "function of a module": _calls.noop,
}


def measure(contender: str, tasks: int, way: str, where: str) -> _fresh.Figures:
    fn = _FUNCTIONS[where]
    with _peers.opened(contender, 2) as peer:
        peer.collect([peer.submit(fn) for _ in range(500)])
        cpu = time.process_time()
        begin = time.perf_counter()
        if way == "submit":
            peer.collect([peer.submit(fn) for _ in range(tasks)])
        else:
            peer.map(fn, range(tasks))
        seconds = time.perf_counter() - begin
        cpu = time.process_time() - cpu
    return {"rate": tasks / seconds, "cpu": cpu / tasks * 1e6}


def main(options: argparse.Namespace, report: _report.Report) -> None:
    at_least = 3.0 if options.pin else 5.0
    cores = ", one core" if options.pin else ""
    for way in ("submit", "map"):
        for where in _FUNCTIONS:
            what = f"{way}, {where}{cores}"
            # The slow libraries are measured in one combination only.
            all_of_them = way == "submit" and where == "function of a module"
            names = [OURS, POOL, LOKY, DASK, RAY, PARSL] if all_of_them else [OURS, POOL]

            def arguments(name: str, way: str = way, where: str = where) -> dict[str, object]:
                tasks = _TASKS[name] // (10 if options.quick else 1)
                return {"tasks": tasks, "way": way, "where": where}

            figures = _peers.rounds(names, options.rounds, report, what, arguments, pin=options.pin)
            ours = figures.pop(OURS)
            for name, theirs in figures.items():
                report.compare(
                    what,
                    _report.median(ours, "rate"),
                    name,
                    _report.median(theirs, "rate"),
                    "tasks/s",
                    at_least=at_least if name == POOL else None,
                )
            report.number(
                f"client CPU per task, {what}",
                _report.median(ours, "cpu"),
                "us",
                at_most=20.0,
                peer=POOL,
                theirs=_report.median(figures[POOL], "cpu"),
            )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--pin", action="store_true", help="everything on one core")


if __name__ == "__main__":
    _report.run(__doc__, main, measure, add_options=add_options)
