"""How much client memory does a pending task take?

The only worker is busy; the tasks wait. The growth of the client's resident memory over their
number, futures and the list that holds them included. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time

import _calls
import _fresh
import _memory
import _peers
import _report
from _peers import OURS, POOL

_TASK_BYTES = 1536


def measure(contender: str, tasks: int, payload: int) -> _fresh.Figures:
    with tempfile.TemporaryDirectory() as directory, _peers.opened(contender, 1) as peer:
        release, occupied = os.path.join(directory, "release"), os.path.join(directory, "occupied")
        blocker = peer.submit(_calls.wait_for_file, release, occupied)
        while not os.path.exists(occupied):
            time.sleep(0.001)
        handles = [peer.submit(_calls.noop, os.urandom(payload)) for _ in range(100)]
        gc.collect()
        before = _memory.resident()
        handles += [peer.submit(_calls.noop, os.urandom(payload)) for _ in range(tasks)]
        # Both contenders have a thread of theirs that sorts in what was submitted.
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


if __name__ == "__main__":
    _report.run(__doc__, main, measure)
