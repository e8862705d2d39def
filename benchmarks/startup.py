"""How long until a program that uses it gets going: the import, and the first result?

The import is the time of a fresh interpreter that does nothing else, less that of one that does
nothing. The first result counts from before the import to the result of a no-op, with one worker.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time

import _calls
import _fresh
import _peers
import _report
from _peers import LOKY, OURS, POOL, SPAWN

_IMPORTS = {
    OURS: "from cloudexec import BatchExecutor",
    POOL: "from concurrent.futures import ProcessPoolExecutor",
    LOKY: "from loky import get_reusable_executor",
}


def measure(contender: str) -> _fresh.Figures:
    begin = time.perf_counter()
    with _peers.opened(contender, 1) as peer:
        peer.collect([peer.submit(_calls.noop)])
        first = time.perf_counter()
    return {"first": first - begin, "all": time.perf_counter() - begin}


def _interpreter(code: str) -> float:
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return time.perf_counter() - begin


def main(options: argparse.Namespace, report: _report.Report) -> None:
    names = [name for name in _IMPORTS if _peers.is_installed(name)]
    for name in names:
        _interpreter(_IMPORTS[name])  # its bytecode is compiled and cached
    bare: list[float] = []
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(5 if options.quick else 25):
        bare.append(_interpreter("pass"))
        for name in names:
            times[name].append(_interpreter(_IMPORTS[name]))
    # The best of many: whatever else runs only ever adds.
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

    what = "first result from a cold start"
    figures = _peers.rounds(
        [OURS, SPAWN, POOL, LOKY], options.rounds, report, what, lambda name: {}
    )
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


if __name__ == "__main__":
    _report.run(__doc__, main, measure)
