"""Searches for failures that happen once in a million times; ``python -m tests.soak`` runs them.

``python tests/soak/searches.py NAME --seed N --seconds N`` runs one search. If it finds a failure,
it ends with a failed assertion, a traceback and an exit code.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from itertools import repeat
from pathlib import Path
from typing import Any

_TESTS = Path(__file__).parents[1]
STUCK_AFTER = 120.0
"""Seconds that a round may take; it normally takes one or two."""
_LARGE_MIB = 8
_LARGE_AT_ONCE = 4
"""How many tasks with so much data are under way at the same time."""


def core(seed: int, seconds: float) -> str:
    """Run the core's machine in simulated histories with many faults."""
    sys.path.insert(0, str(_TESTS / "core"))
    from simulation import Simulation

    end = time.monotonic() + seconds
    played = 0
    while time.monotonic() < end:
        try:
            Simulation(seed + played).run()
        except Exception as exc:
            exc.add_note(f"CLOUDEXEC_SEED={seed + played} pytest tests/core/test_simulation.py")
            raise
        played += 1
    return f"{played:,} histories"


def turns(seed: int, seconds: float) -> str:
    """Run a supervisor and its slots line by line, in random orders."""
    sys.path.insert(0, str(_TESTS / "worker"))
    from stepping import Run, many_stops, search

    # Slots run in this process here. If they registered for forks, they would never be freed.
    os.register_at_fork = lambda **_: None
    end = time.monotonic() + seconds
    rng, played = random.Random(seed), 0
    while not played or time.monotonic() < end:
        slots, items, kill = rng.randint(1, 3), rng.randint(2, 14), rng.random() < 0.5
        steps = Run(items, slots=slots).go().steps
        wrong = search(items, many_stops(rng, 50, steps, kill=kill), slots=slots)
        assert not wrong, f"{slots} slots, {items} tasks: {wrong}"
        played += 50
    return f"{played:,} schedules"


def forks(seed: int, seconds: float) -> str:
    """Check that forked children of a program that uses executors work and end as usual."""
    sys.path.insert(0, str(_TESTS / "contract"))
    from fork_storm import storm

    end = time.monotonic() + seconds
    children = 0
    while not children or time.monotonic() < end:
        found = storm(10, 100)
        assert set(found) == {"ok"}, found
        children += 100
    return f"{children:,} children"


def chaos(seed: int, seconds: float) -> str:
    """Kill slots, their parents and workers while tasks run."""
    sys.path.insert(0, str(_TESTS / "worker"))
    import test_chaos

    end = time.monotonic() + seconds
    played = 0
    while not played or time.monotonic() < end:
        faulthandler.dump_traceback_later(4 * STUCK_AFTER, exit=True)
        draw = random.Random(seed + played)
        test_chaos.play(
            draw.choice([5_000, 20_000, 50_000]),
            seed + played,
            period=draw.choice([0.05, 0.1, 0.2]),
            slots_per_worker=draw.choice([None, 1, 2]),
        )
        played += 1
    faulthandler.cancel_dump_traceback_later()
    return f"{played} executors"


def _increment(number: int) -> int:
    return number + 1


def _map_again_and_again(seconds: float, tasks: int) -> str:
    """Map short tasks on one executor after another; check that no task is lost or hangs."""
    from cloudexec import BatchExecutor

    end = time.monotonic() + seconds
    rounds = 0
    while not rounds or time.monotonic() < end:
        faulthandler.dump_traceback_later(STUCK_AFTER, exit=True)
        with BatchExecutor(max_workers=2, output="off") as executor:
            results = list(executor.map(_increment, range(tasks)))
        assert results == list(range(1, tasks + 1)), f"round {rounds}: wrong results"
        rounds += 1
    faulthandler.cancel_dump_traceback_later()
    return f"{rounds} rounds of {tasks:,} tasks"


def lost(seed: int, seconds: float, *, copies: int = 3, tasks: int = 50_000) -> str:
    """Run several programs at once that map short tasks, so that each is paused at any point."""
    program = [sys.executable, __file__, "lost-one", f"--seconds={seconds}", f"--tasks={tasks}"]
    started = [subprocess.Popen([*program, f"--seed={seed + n}"]) for n in range(copies)]
    codes = [process.wait() for process in started]
    assert codes == [0] * copies, f"exit codes {codes}"
    return f"{copies} programs"


def _note_and_answer(ledger: str, number: int, size: int, how: str) -> bytes:
    """Write a line into the ledger for each run; then return, or end the slot."""
    descriptor = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, b"%d\n" % number)
    os.close(descriptor)
    if how == "exits":
        os._exit(9)
    if how == "raises":
        raise ValueError(number)
    return bytes(size)


def _runs(ledger: str) -> Counter[int]:
    if not os.path.exists(ledger):
        return Counter()
    return Counter(map(int, Path(ledger).read_text().split()))


def once(seed: int, seconds: float) -> str:
    """Check that with ``retries=0`` no task runs twice, and no cancelled task runs."""
    from cloudexec import BatchExecutor, WorkerLostError

    end = time.monotonic() + seconds
    played = tasks = 0
    while not played or time.monotonic() < end:
        faulthandler.dump_traceback_later(STUCK_AFTER, exit=True)
        draw = random.Random(seed + played)
        elsewhere = {"listen": "127.0.0.1:0"} if draw.random() < 0.5 else {}
        ways = draw.choice([["returns"], ["returns"] * 9 + ["exits"], ["returns"] * 3 + ["raises"]])
        sizes = draw.choice([[0], [100_000], [400_000], [0, 100_000, 400_000]])
        where = f"seed {seed + played}, {elsewhere}, {ways}, {sizes}"
        with (
            tempfile.TemporaryDirectory() as directory,
            BatchExecutor(2, retries=0, output="off", **elsewhere) as executor,
        ):
            ledger = os.path.join(directory, "ledger")
            cancelled: set[int] = set()
            results: set[int] = set()
            for first in range(0, 400, 40):
                numbers = range(first, first + 40)
                futures = {
                    number: executor.submit(
                        _note_and_answer, ledger, number, draw.choice(sizes), draw.choice(ways)
                    )
                    for number in numbers
                }
                if draw.random() < 0.7:
                    time.sleep(draw.choice([0, 0.001, 0.003, 0.005]))
                    chosen = draw.sample(list(numbers), draw.choice([1, 3, 20]))
                    cancelled.update(number for number in chosen if futures[number].cancel())
                for number, future in futures.items():
                    if number in cancelled:
                        continue
                    error = future.exception(60)
                    assert error is None or isinstance(error, (WorkerLostError, ValueError)), where
                    if not isinstance(error, WorkerLostError):
                        results.add(number)
            executor.shutdown()
            runs = _runs(ledger)
        assert not (twice := [number for number, count in runs.items() if count > 1]), (
            f"{where}: ran twice: {twice}"
        )
        assert not (ran := cancelled & set(runs)), f"{where}: cancelled, and ran: {ran}"
        assert not (never := results - set(runs)), f"{where}: has an outcome, never ran: {never}"
        played += 1
        tasks += 400
    faulthandler.cancel_dump_traceback_later()
    return f"{tasks:,} tasks"


def _note_and_extend(ledger: str, number: int, data: bytes) -> bytes:
    """Write a line into the ledger for each run; return the data with the number behind it."""
    descriptor = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, b"%d\n" % number)
    os.close(descriptor)
    return data + b"%d" % number


def relay(seed: int, seconds: float, *, tasks: int = 100_000, mebibytes: int = 1024) -> str:
    """Kill the relay three times while tasks and data pass it; check that each ran once.

    A round has its full size, however few the seconds are.

    Args:
        seed: Of the moments at which the relay dies, and of how long it is away.
        seconds: After which no further round begins.
        tasks: Number of short tasks in each round.
        mebibytes: Data that passes the relay in each round, half of it on the way back.
    """
    sys.path.insert(0, str(_TESTS / "relay"))
    from relay_helpers import RelayLauncher, RelayProcess

    end = time.monotonic() + seconds
    rounds, took = 0, []
    while not rounds or time.monotonic() < end:
        faulthandler.dump_traceback_later(4 * STUCK_AFTER, exit=True)
        draw = random.Random(seed + rounds)
        began = time.monotonic()
        process = RelayProcess()
        workers = RelayLauncher(process.address, slots_per_worker=2)
        try:
            with tempfile.TemporaryDirectory() as directory:
                _die_three_times(draw, process, workers, f"{directory}/ledger", tasks, mebibytes)
        finally:
            process.kill()
            workers.close_workers()
        took.append(time.monotonic() - began)
        rounds += 1
    faulthandler.cancel_dump_traceback_later()
    return (
        f"{tasks:,} tasks and {mebibytes:,} MiB with three deaths, {rounds} times: "
        f"{', '.join(f'{each:.0f} s' for each in took)}"
    )


def _die_three_times(
    draw: random.Random, process: Any, workers: Any, ledger: str, tasks: int, mebibytes: int
) -> None:
    from cloudexec import BatchExecutor

    # Each goes to a worker and comes back.
    large = mebibytes // (2 * _LARGE_MIB)
    deaths = set(draw.sample(range(tasks // 10, tasks), 3))
    sends = set(range(0, tasks, max(1, tasks // large)))
    executor = BatchExecutor(4, launcher=workers, retries=0, output="off")
    results = executor.map(_note_and_extend, repeat(ledger), range(tasks), repeat(b""))
    pending: deque[tuple[bytes, Any]] = deque()
    number = tasks

    def check() -> None:
        data, future = pending.popleft()
        assert future.result(STUCK_AFTER) == data, "a large result is wrong"

    for at in range(tasks):
        if at in sends and number < tasks + large:
            data = draw.randbytes(_LARGE_MIB << 20)
            future = executor.submit(_note_and_extend, ledger, number, data)
            pending.append((data + b"%d" % number, future))
            number += 1
            if len(pending) > _LARGE_AT_ONCE:
                check()
        assert next(results) == b"%d" % at, f"the result of task {at} is wrong"
        if at in deaths:
            process.kill()
            time.sleep(draw.choice([0.0, 0.5, 3.0]))
            process._start(process.address)
    while pending:
        check()
    # One that is still away when the executor shuts down is given up, rightly.
    until = time.monotonic() + STUCK_AFTER
    while executor.stats().workers.cut:
        assert time.monotonic() < until, "a worker does not come back"
        time.sleep(0.05)
    stats = executor.stats()
    assert stats.lost_attempts == 0, f"{stats.lost_attempts} attempts are lost"
    assert stats.workers.lost == 0, f"{stats.workers.lost} workers are lost"
    executor.shutdown(wait=False)
    codes = [worker.wait(STUCK_AFTER) for worker in workers.workers.values()]
    assert codes == [0] * len(codes), f"exit codes of workers: {codes}"
    workers.end_all()
    executor.shutdown()
    runs = _runs(ledger)
    assert number == tasks + large, f"{number - tasks} of {large} large tasks were sent"
    assert set(runs) == set(range(number)), "tasks have results and never ran"
    twice = [each for each, count in runs.items() if count > 1]
    assert not twice, f"ran twice: {twice}"


_SEARCHES: Mapping[str, Callable[[int, float], str]] = {
    "core": core,
    "turns": turns,
    "forks": forks,
    "chaos": chaos,
    "lost": lost,
    "once": once,
    "relay": relay,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("search", choices=[*_SEARCHES, "lost-one"])
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--tasks", type=int, default=50_000)
    options = parser.parse_args()
    if options.search == "lost-one":
        print(_map_again_and_again(options.seconds, options.tasks))
    else:
        print(_SEARCHES[options.search](options.seed, options.seconds))


if __name__ == "__main__":
    main()
