"""Limits of what is submitted and not done, and of output that nobody reads."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import contract_tasks as tasks
import pytest
from contract_helpers import PATIENCE, Client, Signals, until

from cloudexec import (
    BatchExecutor,
    BrokenBatchExecutor,
    ConfigError,
    DependencyError,
    QueueFullError,
)
from cloudexec.testing import ManualLauncher

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("nothing_left")]


class Background:
    """Calls something in a thread, and keeps what came of it."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.outcome: Future[Any] = Future()
        self._call = call
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.outcome.set_result(self._call())
        except BaseException as exc:
            self.outcome.set_exception(exc)

    def blocks(self) -> bool:
        """Whether it has come to nothing for a while."""
        self._thread.join(0.3)
        return self._thread.is_alive()


def test_submit_waits_for_room(signals: Signals) -> None:
    """No more are pending than may be, and who waits goes on as soon as one is done."""
    with BatchExecutor(1, max_pending_tasks=2) as executor:
        held = [executor.submit(tasks.hold, signals.told, signals.gate) for _ in range(2)]
        third = Background(lambda: executor.submit(tasks.double, 2))
        signals.wait()
        assert third.blocks()
        assert executor.stats().pending_bytes > 0
        signals.release(2)
        assert third.outcome.result(PATIENCE).result(PATIENCE) == 4
        assert all(each.result(PATIENCE) for each in held)
    assert executor.stats().pending_bytes == 0


def test_bytes_are_counted_once_and_without_large_parts() -> None:
    """Each call's own arguments; what travels as a blob has a limit of its own."""
    with BatchExecutor(1, max_pending_bytes="10MiB") as executor:
        gate: Future[int] = Future()
        held = [executor.submit(tasks.echo, gate, b"x" * 50_000) for _ in range(20)]
        assert 1_000_000 <= executor.stats().pending_bytes < 1_050_000
        large = executor.submit(tasks.echo, gate, b"y" * 2**20)
        assert executor.stats().pending_bytes < 1_060_000
        for each in held[:10]:
            assert each.cancel()
        until(lambda: executor.stats().pending_bytes < 560_000)
        gate.set_result(1)
        assert large.result(PATIENCE)[0][0] == 1
        assert held[-1].result(PATIENCE)
        until(lambda: executor.stats().pending_bytes == 0)


def test_map_submits_as_there_is_room() -> None:
    """With far more inputs than may be pending, and with far larger ones."""
    most = 0
    with BatchExecutor(2, max_pending_tasks=50) as executor:
        watching = Background(lambda: list(executor.map(tasks.double, range(3000))))
        while not watching.outcome.done():
            counts = executor.stats().tasks
            most = max(most, counts.waiting + counts.sent + counts.running)
        assert watching.outcome.result() == [2 * n for n in range(3000)]
    assert 0 < most <= 50
    with BatchExecutor(2, max_pending_bytes=100_000) as executor:
        sizes = executor.map(len, (b"x" * n for n in range(0, 60_000, 1000)))
        assert list(sizes) == list(range(0, 60_000, 1000))
        # One that is larger than all that may be pending goes alone.
        assert executor.submit(len, b"x" * 60_000).result(PATIENCE) == 60_000
    with BatchExecutor(1, max_pending_bytes=10) as executor:
        assert list(executor.map(tasks.double, range(20))) == [2 * n for n in range(20)]


def test_a_full_queue_raises_if_asked_to(signals: Signals) -> None:
    """With the numbers, and what can be done; and it takes calls again when there is room."""
    with BatchExecutor(
        1, max_pending_tasks=2, max_pending_bytes="1MiB", when_full="raise"
    ) as executor:
        first = executor.submit(tasks.hold, signals.told, signals.gate)
        second = executor.submit(tasks.double, 1)
        with pytest.raises(QueueFullError, match=r"2 tasks \(max_pending_tasks=2\).*buffersize"):
            executor.submit(tasks.double, 2)
        with pytest.raises(QueueFullError) as caught:
            list(executor.map(tasks.double, range(5)))
        error = caught.value
        assert (error.pending_tasks, error.max_pending_tasks) == (2, 2)
        assert error.max_pending_bytes == 2**20
        assert 0 < error.pending_bytes < 1000
        signals.release()
        assert first.result(PATIENCE)
        assert second.result(PATIENCE) == 2
        assert executor.submit(tasks.double, 3).result(PATIENCE) == 6


def test_a_map_that_finds_no_room_takes_its_calls_back(signals: Signals) -> None:
    """Nobody could ever take their results."""
    with BatchExecutor(1, max_pending_tasks=5, when_full="raise") as executor:
        held = executor.submit(tasks.hold, signals.told, signals.gate)
        signals.wait()
        with pytest.raises(QueueFullError):
            executor.map(tasks.double, range(20))
        until(lambda: executor.stats().tasks.cancelled == 4)
        signals.release()
        assert held.result(PATIENCE)
        assert list(executor.map(tasks.double, range(4))) == [0, 2, 4, 6]


def test_waiting_ends_with_the_executor(signals: Signals) -> None:
    """With what ``submit()`` raises after a shutdown, or what it raises once it is broken."""
    executor = BatchExecutor(1, max_pending_tasks=1)
    executor.submit(tasks.hold, signals.told, signals.gate)
    waiting = Background(lambda: executor.submit(tasks.double, 1))
    signals.wait()
    assert waiting.blocks()
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="after shutdown"):
        waiting.outcome.result(PATIENCE)
    signals.release()
    executor.shutdown()
    executor = BatchExecutor(1, max_pending_tasks=1)
    executor.submit(tasks.hold, signals.told, signals.gate)
    waiting = Background(lambda: executor.submit(tasks.double, 1))
    signals.wait()
    assert waiting.blocks()
    executor.kill_workers()
    error = waiting.outcome.exception(PATIENCE)
    assert isinstance(error, (RuntimeError, BrokenBatchExecutor))


_INTERRUPTED = """
import sys
import contract_tasks as tasks
from cloudexec import BatchExecutor
with BatchExecutor(1, max_pending_tasks=1) as executor:
    future = executor.submit(tasks.hold, sys.argv[1], sys.argv[2])
    try:
        executor.submit(tasks.double, 1)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
    tasks.tell(sys.argv[1], "caught")
    assert future.result()
"""


def test_waiting_can_be_interrupted(signals: Signals, client: Callable[..., Client]) -> None:
    """Ctrl-C is raised where the program waits; nothing was submitted, and it can go on."""
    process = client(_INTERRUPTED, signals.told, signals.gate)
    signals.wait()
    time.sleep(0.3)  # it is about to wait: there is nothing to see of that from outside
    process.signal(signal.SIGINT)
    assert signals.wait() == ["caught"]
    signals.release()
    code, out, err = process.end()
    assert (code, out) == (0, "interrupted\n"), err


@pytest.mark.parametrize("when_full", ["block", "raise"])
def test_callbacks_do_not_wait(when_full: str) -> None:
    """A done-callback that submits would hold up what it waits for: it passes, or is told."""
    outcomes: list[Any] = []
    with BatchExecutor(1, max_pending_tasks=1, when_full=when_full) as executor:
        gate: Future[int] = Future()
        done = threading.Event()

        def submit_more(_: Future[int]) -> None:
            for n in range(3):
                try:
                    outcomes.append(executor.submit(tasks.echo, gate, n))
                except QueueFullError as exc:
                    outcomes.append(exc)
            done.set()

        executor.submit(tasks.double, 1).add_done_callback(submit_more)
        assert done.wait(PATIENCE)
        gate.set_result(7)
        if when_full == "block":
            assert [f.result(PATIENCE)[0] for f in outcomes] == [(7, 0), (7, 1), (7, 2)]
        else:
            assert outcomes[0].result(PATIENCE)[0] == (7, 0)
            assert all(isinstance(each, QueueFullError) for each in outcomes[1:])


def test_who_holds_up_what_is_pending_passes() -> None:
    """Where all that is pending waits for a future of the program's own, so may the program."""
    with BatchExecutor(1, max_pending_tasks=2) as executor:
        gate: Future[int] = Future()
        futures = [executor.submit(tasks.double, gate) for _ in range(4)]
        gate.set_result(1)
        assert [each.result(PATIENCE) for each in futures] == [2] * 4


def test_failed_calls_make_room() -> None:
    """Whatever their end: raised, lost, not pickled, not run because of another."""
    with BatchExecutor(1, max_pending_tasks=2, retries=0) as executor:
        for _ in range(3):
            raised = executor.submit(tasks.divide, 1, 0)
            dependent = executor.submit(tasks.double, raised)
            lost = executor.submit(tasks.leave, 3)
            unsent = executor.submit(tasks.echo, threading.Lock())
            assert isinstance(dependent.exception(PATIENCE), DependencyError)
            assert lost.exception(PATIENCE)
            assert unsent.exception(PATIENCE)
    assert executor.stats().pending_bytes == 0


def test_a_cancelled_call_lets_go_of_its_arguments() -> None:
    """Although its future is kept: whoever cancels thousands wants the memory."""
    with BatchExecutor(1, launcher=ManualLauncher()) as executor:
        future = executor.submit(len, b"x" * 10_000)
        until(lambda: executor.stats().tasks.waiting)
        task = future._task
        assert len(task.payload) > 10_000
        assert future.cancel()
        until(lambda: task.payload is None)


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="max_pending_tasks must be 1 or more, not 0"):
        BatchExecutor(1, max_pending_tasks=0)
    with pytest.raises(ConfigError, match="max_pending_bytes must be like '2GiB'"):
        BatchExecutor(1, max_pending_bytes="lots")
    with pytest.raises(ConfigError, match="when_full must be 'block' or 'raise', not 'wait'"):
        BatchExecutor(1, when_full="wait")


def chatter(mib: int) -> None:
    line = "x" * 1023
    for _ in range(mib * 1024):
        print(line)


def test_output_that_is_not_read_holds_up_who_prints() -> None:
    """Not the memory of anybody: a task that prints more than is shown waits, and goes on."""
    shown, stuck, count = threading.Event(), threading.Event(), 0

    class Slow(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            nonlocal count
            stuck.set()
            shown.wait(PATIENCE)
            count += 1

    handler, logger = Slow(), logging.getLogger("cloudexec.output")
    logger.addHandler(handler)
    level, logger.propagate = logger.level, False
    logger.setLevel(logging.INFO)  # which forgets what logging remembers of the level
    try:
        with BatchExecutor(1, output="logging") as executor:
            future = executor.submit(chatter, 20)
            assert stuck.wait(PATIENCE)
            before = -1
            while before != (before := executor.stats().bytes_received):
                threading.Event().wait(0.3)
            assert before < 4 * 2**20
            assert future.running()
            shown.set()
            future.result(PATIENCE)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = True
    assert count == 20 * 1024
