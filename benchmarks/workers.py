"""What do a thousand workers cost the client?

Simulated ones: they live in other processes, each with a connection of its own, speak the real
protocol with the executor's real server, and answer at once. Linux only.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import subprocess
import sys
import time

import _calls
import _fresh
import _memory
import _report
from _memory import MIB
from _peers import OURS

_PER_PROCESS = 2_500
"""Simulated workers that share one process."""


def measure(contender: str, workers: int, tasks: int) -> _fresh.Figures:
    from cloudexec import BatchExecutor
    from cloudexec.testing import ManualLauncher

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard < workers + 200:
        raise RuntimeError(f"{workers} connections need more files than the limit of {hard}")
    launcher = ManualLauncher(slots_per_worker=1)
    executor = BatchExecutor(
        workers, min_workers=workers, launcher=launcher, output="off", launch_timeout=900
    )
    launches = launcher.wait(workers, timeout=60)
    gc.collect()
    before = _memory.resident()
    begin = time.perf_counter()
    simulators = []
    for first in range(0, workers, _PER_PROCESS):
        some = launches[first : first + _PER_PROCESS]
        simulators.append(_simulate(some[0].contact, [launch.launch_id for launch in some]))
    for simulator in simulators:
        _line(simulator)
    while executor.stats().workers.slots < workers:
        time.sleep(0.01)
    connecting = time.perf_counter() - begin
    time.sleep(1.0)
    gc.collect()
    idle = _memory.resident() - before

    # Long enough for the heartbeats, which come every 10 s from each.
    watched = 12.0
    cpu = time.process_time()
    time.sleep(watched)
    cpu = time.process_time() - cpu

    begin = time.perf_counter()
    done = sum(1 for _ in executor.map(_calls.noop, range(tasks)))
    working = time.perf_counter() - begin
    assert done == tasks
    gc.collect()
    busy = _memory.resident() - before

    executor.shutdown(wait=False)
    answered = [_line(simulator)["answered"] for simulator in simulators]
    assert sum(answered) == tasks, answered
    for simulator in simulators:
        simulator.wait()
    launcher.end_all()
    executor.shutdown()
    return {
        "connect": connecting,
        "idle": idle / MIB,
        "busy": busy / MIB,
        "cpu": cpu / watched * 100,
        "tasks": working,
    }


def _simulate(contact: object, identities: list[str]) -> subprocess.Popen[str]:
    from cloudexec._launchers.base import Contact

    assert isinstance(contact, Contact)
    simulator = subprocess.Popen(
        [sys.executable, os.path.join(os.path.dirname(__file__), "_simulator.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    request = {
        "target": contact.target,
        "executor_id": contact.executor_id,
        "key": contact.key.hex(),
        "identities": identities,
    }
    assert simulator.stdin is not None
    simulator.stdin.write(json.dumps(request) + "\n")
    simulator.stdin.close()
    return simulator


def _line(simulator: subprocess.Popen[str]) -> dict[str, float]:
    assert simulator.stdout is not None
    line = simulator.stdout.readline()
    if not line:
        raise RuntimeError(f"the simulated workers ended with exit code {simulator.wait()}")
    said: dict[str, float] = json.loads(line)
    return said


def main(options: argparse.Namespace, report: _report.Report) -> None:
    workers = options.workers or (100 if options.quick else 1_000)
    tasks = 10_000 if options.quick else 100_000
    rounds = [_fresh.measure(OURS, workers=workers, tasks=tasks) for _ in range(options.rounds)]
    what = f"{workers:,} workers"
    # The budget is for this many.
    at_most = 150.0 if workers == 1_000 else None
    report.number(
        f"client memory, {what} connected", _report.median(rounds, "idle"), "MiB", at_most=at_most
    )
    report.number(
        f"client memory, {what} after {tasks:,} tasks", _report.median(rounds, "busy"), "MiB"
    )
    report.number(
        f"client memory per worker of {what}",
        _report.median(rounds, "idle") * 1024 / workers,
        "KiB",
    )
    report.number(f"connect {what}", _report.median(rounds, "connect"), "s")
    report.number(f"client CPU while {what} idle", _report.median(rounds, "cpu"), "% of a core")
    report.number(f"{tasks:,} no-ops on {what}", tasks / _report.median(rounds, "tasks"), "tasks/s")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, help="how many (1,000; 100 if quick)")


if __name__ == "__main__":
    _report.run(__doc__, main, measure, add_options=add_options)
