"""Does throughput fall as the queue grows?

Two workers are kept busy until all tasks are submitted, so that all tasks are pending at once. Then
the workers run them. The result is tasks per second from the first submit() to the last result.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

import _calls
import _fresh
import _peers
import _report
from _peers import OURS, POOL

_WORKERS = 2


def measure(contender: str, pending: int) -> _fresh.Figures:
    with _peers.opened(contender, _WORKERS) as peer:
        peer.collect([peer.submit(_calls.noop) for _ in range(500)])
        # A small queue takes only a moment, so several are run for a stable number.
        times = [_once(peer, pending) for _ in range(max(1, min(9, 200_000 // pending)))]
    submitting = statistics.median(submitting for submitting, _ in times)
    draining = statistics.median(draining for _, draining in times)
    return {
        "rate": pending / (submitting + draining),
        "submit": pending / submitting,
        "drain": pending / draining,
    }


def _once(peer: _peers.Contender, pending: int) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as directory:
        release = os.path.join(directory, "release")
        occupied = [os.path.join(directory, str(number)) for number in range(_WORKERS)]
        blockers = [peer.submit(_calls.wait_for_file, release, path) for path in occupied]
        while not all(map(os.path.exists, occupied)):
            time.sleep(0.001)
        begin = time.perf_counter()
        handles = [peer.submit(_calls.noop) for _ in range(pending)]
        submitted = time.perf_counter()
        with open(release, "w"):
            pass
        peer.collect(handles)
        end = time.perf_counter()
        peer.collect(blockers)
    return submitted - begin, end - submitted


def main(options: argparse.Namespace, report: _report.Report) -> None:
    sizes = [1_000, 10_000, 30_000] if options.quick else [10_000, 100_000, 1_000_000]
    ours: dict[int, list[_fresh.Figures]] = {size: [] for size in sizes}
    # The sizes are measured in turn, as contenders are.
    for _ in range(options.rounds):
        for size in sizes:
            ours[size].append(_fresh.measure(OURS, pending=size))
    theirs = {size: [_fresh.measure(POOL, pending=size)] for size in sizes[:2]}
    for size in sizes:
        what = f"{size:,} pending"
        rate = _report.median(ours[size], "rate")
        if size in theirs:
            report.compare(what, rate, POOL, _report.median(theirs[size], "rate"), "tasks/s")
        else:
            report.number(what, rate, "tasks/s")
        submitting = _report.median(ours[size], "submit")
        draining = _report.median(ours[size], "drain")
        report.say(f"submitted at {submitting:,.0f} tasks/s, drained at {draining:,.0f} tasks/s")
    least, most = sizes[0], sizes[-1]
    report.compare(
        f"{most:,} against {least:,} pending",
        _report.median(ours[most], "rate"),
        f"cloudexec, {least:,} pending",
        _report.median(ours[least], "rate"),
        "tasks/s",
        at_least=None if options.quick else 0.9,
    )


if __name__ == "__main__":
    _report.run(__doc__, main, measure)
