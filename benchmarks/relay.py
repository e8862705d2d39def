"""What does a relay between client and workers cost: tasks a second, round trips, bandwidth?

All processes run on this machine: the client with its tunnel, the relay, and two workers that
connect over TLS as workers on other machines do. The comparison is with the same workers connected
to the client directly.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import _calls
import _fresh
import _peers
import _report
from _memory import MIB
from _peers import WIRE

_RELAY = "cloudexec (relay)"
_KEY = bytes(range(32))


@contextlib.contextmanager
def _relay() -> Iterator[str]:
    with subprocess.Popen(
        [sys.executable, "-m", "cloudexec._relay", "--listen", "127.0.0.1:0"],
        env={**os.environ, "CLOUDEXEC_KEY": _KEY.hex()},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None
        found = re.search(r"listening on (\S+)", process.stdout.readline())
        assert found is not None
        try:
            yield found[1]
        finally:
            process.kill()


@contextlib.contextmanager
def _executor(contender: str) -> Iterator[Any]:
    from cloudexec import BatchExecutor, Local
    from cloudexec._launchers.base import Network

    with contextlib.ExitStack() as stack:
        relay = stack.enter_context(_relay()) if contender == _RELAY else ""

        class _Launcher(Local):
            async def start(self, *_: object) -> Network:
                return Network("127.0.0.1:0", "", _KEY, relay)

        launcher = _Launcher(slots_per_worker=1)
        yield stack.enter_context(BatchExecutor(2, launcher=launcher, listen="127.0.0.1:0"))


def measure(contender: str, what: str, amount: int) -> _fresh.Figures:
    with _executor(contender) as executor:
        for _ in range(100):
            executor.submit(_calls.noop).result()
        if what == "tasks":
            begin = time.perf_counter()
            for future in [executor.submit(_calls.noop) for _ in range(amount)]:
                future.result()
            return {"per second": amount / (time.perf_counter() - begin)}
        if what == "trips":
            times = []
            for _ in range(amount):
                begin = time.perf_counter()
                executor.submit(_calls.noop).result()
                times.append(time.perf_counter() - begin)
            times.sort()
            return {"p50": times[amount // 2] * 1e6, "p99": times[amount * 99 // 100] * 1e6}
        size = amount * MIB
        seconds = []
        for turn in range(3):
            begin = time.perf_counter()
            if what == "argument":
                executor.submit(_calls.length, bytes([turn + 1]) * size).result()
            else:
                executor.submit(_calls.blob, size).result()
            seconds.append(time.perf_counter() - begin)
        return {"MiB/s": amount / min(seconds)}


def main(options: argparse.Namespace, report: _report.Report) -> None:
    part = 10 if options.quick else 1
    for what, amount, figure, unit, least in (
        ("tasks", 100_000 // part, "per second", "tasks/s", 0.9),
        ("argument", 256 // part, "MiB/s", "MiB/s", 0.75),
        ("result", 256 // part, "MiB/s", "MiB/s", 0.75),
    ):

        def arguments(_: str, what: str = what, amount: int = amount) -> dict[str, object]:
            return {"what": what, "amount": amount}

        found = _peers.rounds([_RELAY, WIRE], options.rounds, report, what, arguments)
        ours, theirs = (_report.median(found[name], figure) for name in (_RELAY, WIRE))
        report.compare(f"{what} through a relay", ours, "direct", theirs, unit, at_least=least)
    trips = {"what": "trips", "amount": 3_000 // part}
    found = _peers.rounds([_RELAY, WIRE], options.rounds, report, "trips", lambda _: trips)
    for quantile in ("p50", "p99"):
        ours, theirs = (_report.median(found[name], quantile) for name in (_RELAY, WIRE))
        report.compare(f"round trip through a relay, {quantile}", ours, "direct", theirs, "us")


if __name__ == "__main__":
    _report.run(__doc__, main, measure)
