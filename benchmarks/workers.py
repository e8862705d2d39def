"""What do a thousand workers cost the client?

The workers are simulated in other processes. Each has its own connection, uses the real protocol
with the executor's real server, and answers at once. The benchmark runs on Linux only.
"""

from __future__ import annotations

import argparse
import gc
import time

import _calls
import _crowd
import _fresh
import _memory
import _report
from _memory import MIB
from _peers import OURS

_WATCHED = 12.0
"""Seconds for which idle workers are watched; long enough for their heartbeats every 10 s."""


def measure(contender: str, workers: int, tasks: int, tls: bool, watched: float) -> _fresh.Figures:
    from cloudexec import BatchExecutor
    from cloudexec.testing import ManualLauncher

    _crowd.allow_files(workers)
    launcher = ManualLauncher(slots_per_worker=1, needs_network=tls)
    executor = BatchExecutor(
        workers, min_workers=workers, launcher=launcher, output="off", launch_timeout=900
    )
    launches = launcher.wait(workers, timeout=60)
    gc.collect()
    before = _memory.resident()
    begin, cpu = time.perf_counter(), time.process_time()
    crowd = _crowd.Crowd(launches)
    crowd.wait()
    while executor.stats().workers.slots < workers:
        time.sleep(0.1)
    connecting, cpu_connecting = time.perf_counter() - begin, time.process_time() - cpu
    time.sleep(1.0)
    gc.collect()
    idle = _memory.resident() - before

    cpu = time.process_time()
    time.sleep(watched)
    cpu_idle = time.process_time() - cpu
    beating = _memory.resident() - before
    lost = executor.stats().workers.lost

    begin, cpu = time.perf_counter(), time.process_time()
    wrong = sum(
        result != number for number, result in enumerate(executor.map(_calls.noop, range(tasks)))
    )
    working, cpu_working = time.perf_counter() - begin, time.process_time() - cpu
    assert not wrong, f"{wrong} results are others' than those of their tasks"
    gc.collect()
    busy = _memory.resident() - before

    begin = time.perf_counter()
    executor.shutdown(wait=False)
    said = crowd.end()
    ending = time.perf_counter() - begin
    answered = sum(each["answered"] for each in said)
    assert answered == tasks, f"{answered} answers to {tasks} tasks"
    launcher.end_all()
    executor.shutdown()
    return {
        "connect": connecting,
        "connect_cpu": cpu_connecting,
        "idle": idle / MIB,
        "beating": beating / MIB,
        "lost": lost,
        "busy": busy / MIB,
        "cpu": cpu_idle / watched * 100,
        "tasks": working,
        "tasks_cpu": cpu_working,
        "end": ending,
    }


def main(options: argparse.Namespace, report: _report.Report) -> None:
    workers = options.workers or (100 if options.quick else 1_000)
    tasks = options.tasks or (10_000 if options.quick else 100_000)
    rounds = [
        _fresh.measure(OURS, workers=workers, tasks=tasks, tls=options.tls, watched=options.watch)
        for _ in range(options.rounds)
    ]

    def figure(name: str) -> float:
        return _report.median(rounds, name)

    what = f"{workers:,} workers" + (", TLS" if options.tls else "")
    # The budgets hold for 1,000 workers without TLS.
    at_most = 150.0 if workers == 1_000 and not options.tls else None
    in_time = 60.0 if workers == 10_000 else None
    report.number(f"client memory, {what} connected", figure("idle"), "MiB", at_most=at_most)
    report.number(f"the same {options.watch:g} s later", figure("beating"), "MiB")
    report.number(f"of {what}, taken for lost meanwhile", figure("lost"), "", at_most=0)
    report.number(f"client memory, {what} after {tasks:,} tasks", figure("busy"), "MiB")
    report.number(f"client memory per worker of {what}", figure("idle") * 1024 / workers, "KiB")
    report.number(f"connect {what}", figure("connect"), "s", at_most=in_time)
    report.number(
        f"client CPU per worker that connects, {what}", figure("connect_cpu") / workers * 1e6, "us"
    )
    report.number(f"client CPU while {what} idle", figure("cpu"), "% of a core")
    report.number(f"client CPU per idle worker of {what}", figure("cpu") * 1e4 / workers, "us/s")
    report.number(f"{tasks:,} no-ops on {what}", tasks / figure("tasks"), "tasks/s")
    report.number(
        f"client CPU per task, {tasks:,} no-ops on {what}", figure("tasks_cpu") / tasks * 1e6, "us"
    )
    report.number(f"let go of {what}", figure("end"), "s")


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workers", type=int, help="how many (1,000; 100 if quick)")
    add("--tasks", type=int, help="how many (100,000; 10,000 if quick)")
    add("--tls", action="store_true", help="as if they were elsewhere; else over a Unix socket")
    add("--watch", type=float, default=_WATCHED, help=f"seconds of heartbeats ({_WATCHED:g})")


if __name__ == "__main__":
    _report.run(__doc__, main, measure, add_options=add_options)
