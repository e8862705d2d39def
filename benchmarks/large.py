"""How much time and memory does it take to send a large bytes object as an argument or result?

There is one worker. Memory is the peak of a process beyond its memory before the object existed,
and on the worker's side the sum of this over all its processes. The budget on each side is the
object itself and two chunks of 1 MiB. The benchmark runs on Linux only.
"""

from __future__ import annotations

import argparse
import os
import time

import _calls
import _fresh
import _memory
import _peers
import _report
from _memory import MIB
from _peers import OURS, POOL

_TRANSFERS = 3


def measure(contender: str, direction: str, mib: int) -> _fresh.Figures:
    size = mib * MIB

    def transfer(data: bytes | None, size: int) -> None:
        call = (_calls.blob, size) if data is None else (_calls.length, data)
        peer.collect([peer.submit(*call)])

    with _peers.opened(contender, 1) as peer:
        # A smaller object first, so that all code is loaded and all buffers exist.
        transfer(b"x" * (MIB // 2) if direction == "argument" else None, MIB // 2)
        # Then a tiny result, so that no process keeps the smaller object.
        peer.collect([peer.submit(_calls.blob, 0)])
        time.sleep(0.2)
        before = {pid: _memory.resident(pid) for pid in (os.getpid(), *_memory.descendants())}
        for pid in before:
            _memory.reset_peak(pid)
        data = b"x" * size if direction == "argument" else None
        transfer(data, size)
        added = {pid: _memory.peak(pid) - before[pid] for pid in before}
        client = added.pop(os.getpid())
        times = []
        for _ in range(_TRANSFERS):
            begin = time.perf_counter()
            transfer(data, size)
            times.append(time.perf_counter() - begin)
    return {
        "seconds": min(times),
        "client": (client - size) / MIB,
        "worker": (sum(added.values()) - size) / MIB,
    }


def main(options: argparse.Namespace, report: _report.Report) -> None:
    mib = 64 if options.quick else 256
    for direction in ("argument", "result"):

        def arguments(name: str, direction: str = direction) -> dict[str, object]:
            return {"direction": direction, "mib": mib}

        what = f"{direction} of {mib} MiB"
        figures = _peers.rounds([OURS, POOL], options.rounds, report, what, arguments)
        ours, theirs = figures[OURS], figures[POOL]
        report.compare(
            what,
            _report.median(ours, "seconds"),
            POOL,
            _report.median(theirs, "seconds"),
            "s",
            faster=True,
            at_least=3.0,
        )
        for side in ("client", "worker"):
            report.number(
                f"peak memory beyond the object, {side}, {what}",
                _report.median(ours, side),
                "MiB",
                at_most=2.0,
                peer=POOL,
                theirs=_report.median(theirs, side),
            )


if __name__ == "__main__":
    _report.run(__doc__, main, measure)
