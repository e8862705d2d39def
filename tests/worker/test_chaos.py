"""Random kills: whatever dies and when, every future has one outcome, and the right one."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import cloudpickle
import psutil
import pytest
from descendants import descendants

from cloudexec import BatchExecutor
from cloudexec._launchers.local import Local

# A slot that had to import pytest first would hardly get to its task from one kill to the next.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(sys.platform == "win32", reason="signals and process trees"),
]

PERIOD = 0.2
"""Seconds between two kills."""


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [child for child in process.children() if is_alive(child)]
    except psutil.NoSuchProcess:
        return []


class Chaos:
    """Kills a process of a worker of this one now and then; mostly slots.

    A whole worker only if a task has been done since the last one was killed: an executor whose
    workers are killed again and again before they do anything gives up, as it should, and on a
    busy machine many kills fall into the time in which a worker starts.

    Args:
        seed: For which ones.
        period: Seconds between two kills.
        done: Says how many tasks have been done.
    """

    def __init__(self, seed: int, period: float, done: Callable[[], int]) -> None:
        self._random = random.Random(seed)
        self._period = period
        self._done = done
        self._stopped = threading.Event()
        self.kills: Counter[str] = Counter()

    def _run(self) -> None:
        done_before = 0
        while not self._stopped.wait(self._period):
            draw = self._random.random()
            kind = "slot" if draw < 0.85 else "supervisor" if draw < 0.95 else "zygote"
            if kind != "slot":
                done = self._done()
                if done == done_before:
                    continue
                done_before = done
            below = set(descendants())
            supervisors = [child for child in children(psutil.Process()) if child in below]
            zygotes = [z for s in supervisors for z in children(s)]
            slots = [c for z in zygotes for c in children(z)]
            among = {"slot": slots, "zygote": zygotes, "supervisor": supervisors}[kind]
            if among:
                victim = self._random.choice(among)
                with_signal = self._random.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV))
                try:
                    os.kill(victim.pid, with_signal if kind == "slot" else signal.SIGKILL)
                except ProcessLookupError:
                    continue
                self.kills[kind] += 1

    @contextmanager
    def reigns(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join()


def work(n: int) -> int:
    """Short, and now and then long enough to be killed in the middle."""
    if n % 997 == 0:
        total = 0
        for k in range(200_000):
            total += k & 1
    return n * 3 + 1


def play(
    tasks: int, seed: int, period: float = PERIOD, slots_per_worker: int | None = None
) -> None:
    outcomes: Counter[int] = Counter()

    launcher = Local(slots_per_worker=slots_per_worker)
    # An unlucky task may stand in the way of many kills: that is not what is tested here.
    with BatchExecutor(2, retries=100, output="off", launcher=launcher) as executor:
        executor.submit(work, 1).result(60)
        chaos = Chaos(seed, period, lambda: executor.stats().tasks.succeeded)
        with chaos.reigns():
            futures = []
            for n in range(tasks):
                future = executor.submit(work, n)
                future.add_done_callback(lambda _, n=n: outcomes.update((n,)))  # type: ignore[misc]
                futures.append(future)
            wrong = [n for n, future in enumerate(futures) if future.result(200) != n * 3 + 1]
            # Long enough that chaos has had its share, whatever the speed of this machine.
            more = 0
            while sum(chaos.kills.values()) < 10:
                chunk = [executor.submit(work, n) for n in range(2000)]
                wrong += [n for n, f in enumerate(chunk) if f.result(200) != n * 3 + 1]
                more += len(chunk)
        stats = executor.stats()
        assert not wrong
        assert stats.tasks.succeeded == tasks + more + 1
        assert (stats.tasks.failed, stats.tasks.cancelled) == (0, 0)
        assert (stats.tasks.waiting, stats.tasks.sent, stats.tasks.running) == (0, 0, 0)
        last = executor.submit(work, 5)
        assert last.result(60) == 16
    # Leaving the executor waits for its callbacks too.
    assert outcomes == Counter(range(tasks))
    assert chaos.kills["slot"] > 0
    _, alive = psutil.wait_procs(descendants(), timeout=10)
    assert not alive


@pytest.mark.parametrize("seed", [1, 2])
def test_every_future_of_a_short_run_is_resolved_once_and_right(seed: int) -> None:
    """20,000 tasks and a kill every 100 ms: each future has its own result, once."""
    play(20_000, seed, period=0.1)


def test_every_future_is_resolved_once_and_right_with_a_worker_per_slot() -> None:
    """The same where each slot has a supervisor of its own."""
    play(20_000, 4, period=0.1, slots_per_worker=1)
