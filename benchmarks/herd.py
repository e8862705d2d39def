"""How long do 10,000 workers take to reconnect if all connections were cut while the client slept?

The client is stopped for a minute in the middle of its work, like a laptop whose lid is closed, and
all connections are cut in that time. Its simulated workers, in other processes, all connect again
at once, get no answer, and try again. Each task must have exactly one result, and the right one.
The benchmark runs on Linux only.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

import _calls
import _crowd
import _fresh
import _report
from _peers import OURS


def measure(contender: str, workers: int, tasks: int, seconds: float) -> _fresh.Figures:
    from cloudexec import BatchExecutor
    from cloudexec.testing import ManualLauncher

    _crowd.allow_files(workers)
    launcher = ManualLauncher(slots_per_worker=1, needs_network=True)
    executor = BatchExecutor(
        workers,
        min_workers=workers,
        launcher=launcher,
        output="off",
        launch_timeout=900,
        orphan_timeout=seconds + 300,
        reconnect_grace=300,
    )
    crowd = _crowd.Crowd(launcher.wait(workers, timeout=60))
    crowd.wait()
    while executor.stats().workers.slots < workers:
        time.sleep(0.1)

    outcomes: Counter[int] = Counter()
    wrong = 0
    futures = []
    for number in range(tasks):
        future = executor.submit(_calls.noop, number)
        future.add_done_callback(lambda _, n=number: outcomes.update((n,)))  # type: ignore[misc]
        futures.append(future)
        if number == tasks // 2:
            # In the middle of submitting, so that messages are sent in both directions.
            crowd.tell_all(do="cut", after=1.0)
            woken_at = crowd.ask_one(do="stop the client", seconds=seconds)["woken_at"]
    cpu = time.process_time()
    said = crowd.wait()
    cpu = time.process_time() - cpu
    for number, future in enumerate(futures):
        wrong += future.result(300) != number
    done = time.monotonic() - woken_at
    stats = executor.stats()
    executor.shutdown(wait=False)
    ended = crowd.end()
    launcher.end_all()
    executor.shutdown()
    back = sorted(at - woken_at for each in said for at in each["back_at"])
    assert stats.workers.lost == 0, f"{stats.workers.lost} workers were given up"
    return {
        "cut": sum(each["cut"] for each in said),
        "missing": sum(each["missing"] for each in said),
        "half": back[len(back) // 2],
        "back": back[-1],
        "cpu": cpu / workers * 1e6,
        "done": done,
        "lost": tasks - len(outcomes),
        "doubled": sum(count - 1 for count in outcomes.values()),
        "wrong": wrong,
        "again": sum(each["answered"] for each in ended) - tasks,
        "refused": stats.refused,
    }


def main(options: argparse.Namespace, report: _report.Report) -> None:
    workers = options.workers or (300 if options.quick else 10_000)
    tasks = options.tasks or (10_000 if options.quick else 200_000)
    seconds = options.seconds or (12.0 if options.quick else 65.0)
    rounds = [
        _fresh.measure(OURS, workers=workers, tasks=tasks, seconds=seconds)
        for _ in range(options.rounds)
    ]

    def figure(name: str) -> float:
        return _report.median(rounds, name)

    what = f"of {workers:,} workers cut off while the client was stopped for {seconds:g} s"
    at_most = 120.0 if workers == 10_000 else None
    report.number(f"connections cut, {what}", figure("cut"), "")
    report.number(f"half {what} are back after", figure("half"), "s")
    report.number(f"all {what} are back after", figure("back"), "s", at_most=at_most)
    report.number(f"not back, {what}", figure("missing"), "", at_most=0)
    report.number(f"client CPU per worker meanwhile, {what}", figure("cpu"), "us")
    report.number(f"peers turned away meanwhile, {what}", figure("refused"), "")
    report.number(f"all {tasks:,} tasks are done after", figure("done"), "s")
    for name in ("lost", "doubled", "wrong"):
        report.number(f"results {name}, of {tasks:,}", figure(name), "", at_most=0)
    report.number(f"tasks run again, of {tasks:,}", figure("again"), "", at_most=0)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, help="how many (10,000; 300 if quick)")
    parser.add_argument("--tasks", type=int, help="how many (200,000; 10,000 if quick)")
    parser.add_argument("--seconds", type=float, help="of the client's sleep (65; 12 if quick)")


if __name__ == "__main__":
    _report.run(__doc__, main, measure, add_options=add_options)
