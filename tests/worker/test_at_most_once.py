"""Side effects are what counts: each task leaves a line for each time that it runs."""

from __future__ import annotations

import gc
import os
import random
import sys
from collections import Counter
from pathlib import Path

import cloudpickle
import numpy as np
import pytest

from cloudexec import BatchExecutor, WorkerLostError

# By value: a slot that has to import pytest first takes its time.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

MODES = ["here", "wire"]


def start(mode: str, slots: int, **options: object) -> BatchExecutor:
    if mode == "wire":
        options["listen"] = "127.0.0.1:0"
    return BatchExecutor(slots, output="off", **options)  # type: ignore[arg-type]


def leave(ledger: str, number: int, size: int, end: bool = False) -> np.ndarray:
    """Leave a line, and return an array of so many bytes, or end the process."""
    fd = os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, b"%d\n" % number)
    os.close(fd)
    if end:
        os._exit(9)
    return np.zeros(size // 8)


def lines(ledger: str) -> Counter[int]:
    return Counter(map(int, Path(ledger).read_text().split()))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [80, 100_000, 400_000])
def test_a_slot_that_dies_takes_no_finished_task_with_it(
    mode: str, size: int, tmp_path: Path
) -> None:
    """Without retries: those before it have their results, those behind it run, each once."""
    ledger = str(tmp_path / "ledger")
    with start(mode, 2, retries=0) as executor:
        for future in [executor.submit(leave, ledger, -1, 8) for _ in range(100)]:
            future.result(60)  # now they are known to be short: many are sent at once
        ends = {number for number in range(66) if number % 11 == 10}
        futures = [executor.submit(leave, ledger, n, size, n in ends) for n in range(66)]
        failed = {n for n, future in enumerate(futures) if future.exception(60) is not None}
    counts = lines(ledger)
    assert {n: counts[n] for n in range(66) if counts[n] != 1} == {}
    assert failed == ends
    assert all(isinstance(futures[n].exception(), WorkerLostError) for n in ends)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [80, 400_000])
def test_cancel_is_true_only_of_what_never_runs(mode: str, size: int, tmp_path: Path) -> None:
    """Also of tasks whose large results are on their way, and while others are called back."""
    ledger = str(tmp_path / "ledger")
    rng = random.Random(size)
    cancelled: set[int] = set()
    rounds, each = 12, 40
    with start(mode, 2, retries=0) as executor:
        for first in range(0, rounds * each, each):
            futures = {n: executor.submit(leave, ledger, n, size) for n in range(first, first + 40)}
            futures[rng.choice([*futures])].result(60)  # some have run by now
            for n in rng.sample([*futures], 3):
                if futures[n].cancel():
                    cancelled.add(n)
            for n, future in futures.items():
                if n not in cancelled:
                    future.result(60)
    counts = lines(ledger)
    assert [n for n in cancelled if counts[n]] == []
    assert {n: counts[n] for n in range(rounds * each) if counts[n] + (n in cancelled) != 1} == {}


def lose_the_next_batch() -> None:
    """Have this slot overlook the next tasks that it is sent."""
    from cloudexec.worker.frames import Kind
    from cloudexec.worker.slot import Slot

    (slot,) = [each for each in gc.get_objects() if type(each) is Slot]
    read = slot._next_frame

    def overlook() -> tuple[int, int, bytes]:
        frame = read()
        if frame[0] == Kind.BATCH:
            del slot._next_frame  # type: ignore[method-assign]
            return Kind.FORGET, 0, b""
        return frame

    slot._next_frame = overlook  # type: ignore[method-assign]


def test_a_task_that_its_slot_has_lost_is_noticed() -> None:
    """A slot that waits for tasks and is believed to hold some does not wait for ever."""
    with BatchExecutor(1, output="off") as executor:
        executor.submit(lose_the_next_batch).result(60)
        assert executor.submit(abs, -1).result(60) == 1
        assert executor.stats().lost_attempts == 1
        once = executor.with_options(retries=0)
        executor.submit(lose_the_next_batch).result(60)
        error = once.submit(abs, -2).exception(60)
        assert isinstance(error, WorkerLostError)
        assert "has lost it" in str(error)
        assert executor.submit(abs, -3).result(60) == 3


@pytest.mark.parametrize("mode", MODES)
def test_shutdown_cancels_only_what_has_not_run(mode: str, tmp_path: Path) -> None:
    """Whatever was sent ahead, and begun just then, is finished and not said to be cancelled."""
    for turn in range(12):
        ledger = tmp_path / f"ledger{turn}"
        executor = start(mode, 2)
        futures = [executor.submit(leave, str(ledger), n, 8) for n in range(300)]
        futures[25 * turn].result(60)
        executor.shutdown(cancel_futures=True)
        assert all(future.done() for future in futures)
        counts = lines(str(ledger))
        ran = {n for n, future in enumerate(futures) if not future.cancelled()}
        assert counts == Counter(ran)
