"""How much client memory does a pending task take, and how much do libraries take in all processes?

In the first part the only worker is busy and the tasks wait. The result is the growth of the
client's resident memory divided by the number of tasks, including futures and the list of them. In
the second part a client has imported numpy, pandas and scikit-learn, and the tasks of two workers
have used them. The result is the memory of all processes together, with shared memory counted once.
The benchmark runs on Linux only.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import os
import tempfile
import time

import _calls
import _fresh
import _memory
import _peers
import _report
from _peers import OURS, POOL, SPAWN

_TASK_BYTES = 1536
_LIBRARIES = ("numpy", "pandas", "sklearn.ensemble")
_MOST_OF_FORK = 1.2
"""Largest allowed ratio to the memory of a process pool whose workers are forked from it."""


def _with_libraries(contender: str) -> _fresh.Figures:
    for name in _LIBRARIES:
        importlib.import_module(name)
    with _peers.opened(contender, 2) as peer:
        # Each task takes so long that no worker gets two of them.
        peer.collect([peer.submit(_calls.use, _LIBRARIES, 0.5) for _ in range(2)])
        total = sum(map(_memory.share, [os.getpid(), *_memory.descendants()]))
    return {"MiB": total / _memory.MIB}


def measure(contender: str, tasks: int = 0, payload: int = 0) -> _fresh.Figures:
    if not tasks:
        return _with_libraries(contender)
    with tempfile.TemporaryDirectory() as directory, _peers.opened(contender, 1) as peer:
        release, occupied = os.path.join(directory, "release"), os.path.join(directory, "occupied")
        blocker = peer.submit(_calls.wait_for_file, release, occupied)
        while not os.path.exists(occupied):
            time.sleep(0.001)
        handles = [peer.submit(_calls.noop, os.urandom(payload)) for _ in range(100)]
        gc.collect()
        before = _memory.resident()
        handles += [peer.submit(_calls.noop, os.urandom(payload)) for _ in range(tasks)]
        # In both contenders a thread still has to handle the submitted tasks.
        time.sleep(1.0)
        gc.collect()
        grown = _memory.resident() - before
        for handle in handles:
            handle.cancel()
        with open(release, "w"):
            pass
        peer.collect([blocker])
    return {"bytes": grown / tasks}


def main(options: argparse.Namespace, report: _report.Report) -> None:
    tasks = 20_000 if options.quick else 100_000
    for payload in (0, 1024):

        def arguments(name: str, payload: int = payload) -> dict[str, object]:
            return {"tasks": tasks, "payload": payload}

        what = f"per pending task with {payload} bytes as argument"
        figures = _peers.rounds([OURS, POOL], options.rounds, report, what, arguments)
        report.number(
            what,
            _report.median(figures[OURS], "bytes"),
            "bytes",
            at_most=_TASK_BYTES + payload,
            peer=POOL,
            theirs=_report.median(figures[POOL], "bytes"),
        )
    what = "client and two workers with numpy, pandas and scikit-learn"
    tops = [name.partition(".")[0] for name in _LIBRARIES]
    missing = [name for name in tops if importlib.util.find_spec(name) is None]
    if missing:
        report.missing(what, "", f"skipped: no {', '.join(missing)}")
        return
    figures = _peers.rounds([OURS, POOL, SPAWN], options.rounds, report, what, lambda _: {})
    least = _report.median(figures[POOL], "MiB")
    for name in (POOL, SPAWN):
        report.number(
            what,
            _report.median(figures[OURS], "MiB"),
            "MiB",
            at_most=_MOST_OF_FORK * least if name == POOL else None,
            peer=name,
            theirs=_report.median(figures[name], "MiB"),
        )


if __name__ == "__main__":
    _report.run(__doc__, main, measure)
