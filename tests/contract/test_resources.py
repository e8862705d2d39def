"""Tasks with needs, variables, names and second chances, on real workers of this machine."""

from __future__ import annotations

import logging
import operator
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, wait
from pathlib import Path
from typing import Any

import contract_stages as stages
import contract_tasks as tasks
import pytest
from contract_helpers import PATIENCE, Signals, until

from cloudexec import (
    BatchExecutor,
    ConfigError,
    Graph,
    Local,
    PayloadError,
    StageError,
    TaskTimeoutError,
    WorkerCapacity,
    WorkerLostError,
    stage,
)
from cloudexec.testing import ManualLauncher

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("nothing_left")]


class Machine(Local):
    """This machine as if it had so much."""

    def __init__(self, cpus: float = 4, gpus: int = 0, **settings: Any) -> None:
        super().__init__(**settings)
        self._has = WorkerCapacity(cpus=cpus, memory=16 * 2**30, gpus=gpus)

    def capacity(self, size: int) -> WorkerCapacity:
        return self._has


@pytest.fixture
def executor() -> Iterator[BatchExecutor]:
    with BatchExecutor(4, launcher=Machine()) as made:
        yield made


# What is refused, and where.


@pytest.mark.parametrize(
    "wrong",
    [
        {"cpus": 0},
        {"cpus": -1},
        {"cpus": float("nan")},
        {"cpus": float("inf")},
        {"cpus": True},
        {"cpus": "2"},
        {"memory": 0},
        {"memory": -5},
        {"memory": "much"},
        {"memory": True},
        {"memory": 1.5},
        {"memory": 2**70},
        {"gpus": -1},
        {"gpus": 1.0},
        {"priority": 1.5},
        {"priority": True},
        {"name": ""},
        {"name": "two\nlines"},
        {"name": 3},
        {"env": {"A": 1}},
        {"env": {"A=B": "1"}},
        {"env": {"": "1"}},
        {"env": {"A": "nul\0"}},
        {"env": "A=1"},
        {"retry_on": 3},
        {"retry_on": (int,)},
        {"retry_on": ["ValueError"]},
        {"retries": -1},
        {"timeout": 0},
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_and_named(wrong: dict[str, Any]) -> None:
    (option,) = wrong
    with pytest.raises(ConfigError, match=option):
        BatchExecutor(1).with_options(**wrong)


@pytest.mark.parametrize(
    ("wanted", "most"),
    [
        ({"cpus": 5}, "cpus=4"),
        ({"cpus": 1e300}, "cpus=4"),
        ({"memory": "17GiB"}, "16 GiB"),
        ({"gpus": 1}, "no NVIDIA GPU"),
    ],
)
def test_more_than_there_is_is_refused_with_the_most_there_is(
    wanted: dict[str, Any], most: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(most)):
        BatchExecutor(2, launcher=Machine()).with_options(**wanted)


def test_this_machine_gives_no_more_than_it_has() -> None:
    executor = BatchExecutor(2)
    cpus = len(os.sched_getaffinity(0))
    with pytest.raises(ConfigError, match="most that a task can have on this machine"):
        executor.with_options(cpus=cpus + 1)
    with pytest.raises(ConfigError, match="GiB"):
        executor.with_options(memory="1000TiB")


def test_a_launcher_that_knows_no_sizes_refuses_needs_and_nothing_else() -> None:
    executor = BatchExecutor(2, launcher=ManualLauncher())
    for needs in ({"cpus": 1}, {"memory": "1GiB"}, {"gpus": 1}):
        with pytest.raises(ConfigError, match="does not say what they have"):
            executor.with_options(**needs)
    executor.with_options(priority=3, env={"A": "1"}, name="x", gpus=0)


# Room.


def test_tasks_that_need_the_whole_machine_run_one_after_another(
    signals: Signals, executor: BatchExecutor
) -> None:
    large = executor.with_options(cpus=4)
    futures = [large.submit(tasks.hold, signals.told, signals.gate, str(n)) for n in range(3)]
    for number in range(3):
        assert signals.wait() == [str(number)]
        assert executor.stats().tasks.running == 1
        signals.release()
        futures[number].result(PATIENCE)


def test_small_tasks_run_beside_large_ones_where_there_is_room(
    signals: Signals, executor: BatchExecutor
) -> None:
    large = executor.with_options(cpus=3).submit(tasks.hold, signals.told, signals.gate)
    small = [executor.submit(tasks.hold, signals.told, signals.gate) for _ in range(2)]
    signals.wait(2)
    assert executor.stats().tasks.waiting == 1
    signals.release(3)
    wait([large, *small], PATIENCE)


def test_workers_of_one_machine_share_it(signals: Signals) -> None:
    """However many supervisors there are."""
    launcher = Machine(slots_per_worker=1)
    with BatchExecutor(4, min_workers=4, launcher=launcher) as executor:
        large = executor.with_options(cpus=3)
        first = large.submit(tasks.hold, signals.told, signals.gate)
        small = executor.submit(tasks.hold, signals.told, signals.gate)
        signals.wait(2)
        second = large.submit(tasks.hold, signals.told, signals.gate)
        until(lambda: executor.stats().workers.slots == 4)
        assert executor.stats().tasks.waiting == 1
        signals.release(3)
        wait([first, second, small], PATIENCE)


def test_tenths_of_a_processor_are_packed(signals: Signals) -> None:
    with BatchExecutor(12, launcher=Machine(cpus=1)) as executor:
        tenth = executor.with_options(cpus=0.1, memory="10MiB")
        futures = [tenth.submit(tasks.hold, signals.told, signals.gate) for _ in range(12)]
        signals.wait(10)
        assert executor.stats().tasks.running == 10
        signals.release(12)
        wait(futures, PATIENCE)


def test_a_large_task_that_waits_can_be_cancelled(
    signals: Signals, executor: BatchExecutor
) -> None:
    running = executor.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    large = executor.with_options(cpus=4).submit(tasks.double, 1)
    behind = executor.submit(tasks.double, 2)
    assert large.cancel()
    assert behind.result(PATIENCE) == 4
    signals.release()
    running.result(PATIENCE)


def test_shutdown_finishes_large_tasks_that_wait(signals: Signals) -> None:
    executor = BatchExecutor(4, launcher=Machine())
    large = executor.with_options(cpus=4)
    futures = [large.submit(tasks.double, n) for n in range(5)]
    executor.shutdown()
    assert [future.result(0) for future in futures] == [0, 2, 4, 6, 8]


def test_shutdown_cancels_large_tasks_that_wait_if_told_to(signals: Signals) -> None:
    executor = BatchExecutor(4, launcher=Machine())
    large = executor.with_options(cpus=4)
    running = large.submit(tasks.hold, signals.told, signals.gate)
    waiting = large.submit(tasks.double, 1)
    signals.wait()
    executor.shutdown(wait=False, cancel_futures=True)
    with pytest.raises(CancelledError):
        waiting.result(PATIENCE)
    signals.release()
    running.result(PATIENCE)
    executor.shutdown()


def test_a_view_maps_and_composes(executor: BatchExecutor) -> None:
    view = executor.with_options(cpus=2).with_options(memory="1GiB", priority=1)
    assert list(view.map(tasks.double, range(20))) == list(range(0, 40, 2))
    assert list(view.map(tasks.double, range(20), chunksize=7)) == list(range(0, 40, 2))
    assert view.submit(operator.add, view.submit(tasks.double, 2), 1).result(PATIENCE) == 5
    plain = view.with_options(cpus=None, memory=None)
    assert plain._requirements is not None  # its priority is left


def test_a_view_puts_says_what_it_is_and_stays_here(executor: BatchExecutor) -> None:
    view = executor.with_options(cpus=2, name="fit")
    assert view.submit(tasks.double, view.put(4)).result(PATIENCE) == 8
    assert repr(view).startswith("<OptionsView cpus=2 name='fit' of <BatchExecutor max_workers=4")
    assert "secret" not in repr(view.with_options(env={"TOKEN": "secret"}))
    for each in (view, executor):
        error = executor.submit(str, each).exception(PATIENCE)
        assert isinstance(error, PayloadError)
        assert "an executor cannot be sent" in str(error)


def test_a_worker_lost_with_a_large_task_is_replaced(executor: BatchExecutor) -> None:
    large = executor.with_options(cpus=4, retries=1)
    with pytest.raises(WorkerLostError):
        large.submit(os._exit, 1).result(PATIENCE)
    assert large.submit(tasks.double, 2).result(PATIENCE) == 4


def test_large_tasks_and_replaced_workers(signals: Signals) -> None:
    with BatchExecutor(4, launcher=Machine(), max_tasks_per_worker=2) as executor:
        large = executor.with_options(cpus=4)
        assert list(large.map(tasks.double, range(6))) == [0, 2, 4, 6, 8, 10]


def test_higher_priorities_overtake(signals: Signals, tmp_path: Path) -> None:
    with BatchExecutor(1) as executor:
        gate = executor.submit(tasks.hold, signals.told, signals.gate)
        signals.wait()
        log = str(tmp_path / "log")
        for priority in (0, -1, 5, 0, 2):
            executor.with_options(priority=priority).submit(tasks.append, log, str(priority))
        signals.release()
        gate.result(PATIENCE)
    assert Path(log).read_text().split() == ["5", "2", "0", "0", "-1"]


# Memory.


def test_a_task_that_takes_more_memory_than_it_asked_for_fails_alone(
    signals: Signals, executor: BatchExecutor
) -> None:
    """At once, whatever its retries; and the next one is not the worse for it."""
    limited = executor.with_options(memory="100MiB", name="greedy", retries=3)
    future = limited.submit(tasks.take_memory, 400, signals.told, signals.gate)
    error = future.exception(PATIENCE)
    assert isinstance(error, WorkerLostError)
    assert error.out_of_memory
    assert (error.attempts, future.attempts) == (1, 1)
    assert error.peak_memory_bytes > 100 * 2**20
    assert re.search(r"task \d+ \(greedy\) took more memory .* of 100 MiB", str(error))
    assert limited.submit(tasks.take_memory, 50).result(PATIENCE) == 50 * 2**20
    assert executor.submit(tasks.take_memory, 200).result(PATIENCE) == 200 * 2**20


def test_what_a_task_forked_counts_too(signals: Signals, executor: BatchExecutor) -> None:
    limited = executor.with_options(memory="100MiB")
    future = limited.submit(tasks.take_memory_in_a_child, 400, signals.told, signals.gate)
    error = future.exception(PATIENCE)
    assert isinstance(error, WorkerLostError)
    assert error.out_of_memory


def test_memory_that_is_only_reserved_does_not_count(executor: BatchExecutor) -> None:
    limited = executor.with_options(memory="50MiB")
    assert limited.submit(tasks.map_much_memory, 4).result(PATIENCE) == 4 * 2**30


def test_what_earlier_tasks_left_in_a_process_is_not_counted() -> None:
    with BatchExecutor(1) as executor:
        executor.submit(exec, "import builtins; builtins.kept = bytearray(b'x') * 150_000_000")
        limited = executor.with_options(memory="100MiB")
        assert limited.submit(tasks.take_memory, 50).result(PATIENCE) == 50 * 2**20


# Variables.


def test_variables_are_there_for_one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """And as they were before for the next one, whatever the task did, or raised."""
    monkeypatch.setenv("CONTRACT_OLD", "old")
    with BatchExecutor(1) as executor:
        view = executor.with_options(env={"CONTRACT_OLD": "new", "CONTRACT_NEW": "1"})
        names = ("CONTRACT_OLD", "CONTRACT_NEW", "CONTRACT_MORE")
        more = view.with_options(env={"CONTRACT_MORE": "ümläut"})
        assert more.submit(tasks.variables, *names).result(PATIENCE) == dict(
            zip(names, ("new", "1", "ümläut"), strict=True)
        )
        with pytest.raises(ValueError, match="new"):
            view.submit(tasks.variables, *names, raises=True).result(PATIENCE)
        found = executor.submit(tasks.variables, "X", *names).result(PATIENCE)
        assert found == {"X": None, "CONTRACT_OLD": "old", "CONTRACT_NEW": None} | {
            "CONTRACT_MORE": None
        }


def test_variables_are_there_while_arguments_are_unpickled() -> None:
    """So that a library that is imported then finds them."""

    class Reads:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.getenv, ("CONTRACT_NEW",)

    with BatchExecutor(1) as executor:
        view = executor.with_options(env={"CONTRACT_NEW": "there"})
        assert view.submit(str, Reads()).result(PATIENCE) == "there"
        assert executor.submit(str, Reads()).result(PATIENCE) == "None"


def test_variables_of_many_tasks_do_not_mix() -> None:
    with BatchExecutor(2) as executor:
        views = [executor.with_options(env={"CONTRACT_NEW": str(n)}) for n in range(5)]
        futures = [views[n % 5].submit(os.getenv, "CONTRACT_NEW") for n in range(100)]
        others = [executor.submit(os.getenv, "CONTRACT_NEW") for _ in range(100)]
        assert [f.result(PATIENCE) for f in futures] == [str(n % 5) for n in range(100)]
        assert {f.result(PATIENCE) for f in others} == {None}


def test_each_task_sees_the_gpus_that_are_its_own(signals: Signals) -> None:
    with BatchExecutor(4, launcher=Machine(gpus=2)) as executor:
        one = executor.with_options(gpus=1)
        holding = one.submit(tasks.hold, signals.told, signals.gate)
        signals.wait()
        assert one.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result(PATIENCE) == "1"
        both = executor.with_options(gpus=2).submit(os.getenv, "CUDA_VISIBLE_DEVICES")
        signals.release()
        assert both.result(PATIENCE) == "0,1"
        pids = [one.submit(os.getpid).result(PATIENCE) for _ in range(3)]
        assert len({*pids, holding.result(PATIENCE)}) == 4  # what CUDA keeps goes with its process
        with pytest.raises(ConfigError, match="2 GPUs"):
            executor.with_options(gpus=3)


# Second chances.


def test_what_a_task_raises_is_not_retried_by_default(
    executor: BatchExecutor, tmp_path: Path
) -> None:
    future = executor.submit(tasks.fail_at_first, str(tmp_path / "log"), 1)
    assert isinstance(future.exception(PATIENCE), ConnectionError)
    assert future.attempts == 1


@pytest.mark.parametrize(
    "retry_on",
    [ConnectionError, (KeyError, OSError), lambda exc: "call" in str(exc), [ConnectionError]],
)
def test_what_retry_on_names_is_run_again(
    executor: BatchExecutor, tmp_path: Path, retry_on: Any
) -> None:
    view = executor.with_options(retry_on=retry_on, retries=3)
    future = view.submit(tasks.fail_at_first, str(tmp_path / "log"), 2)
    assert future.result(PATIENCE) == 3
    assert future.attempts == 3
    assert executor.stats().retried_errors == 2


@pytest.mark.parametrize("retries", [0, 1])
def test_the_last_exception_is_the_outcome(
    executor: BatchExecutor, tmp_path: Path, retries: int
) -> None:
    view = executor.with_options(retry_on=ConnectionError, retries=retries)
    future = view.submit(tasks.fail_at_first, str(tmp_path / "log"), 9)
    assert str(future.exception(PATIENCE)) == f"call {retries + 1}"
    assert future.attempts == retries + 1


def test_other_exceptions_are_not_retried(executor: BatchExecutor, tmp_path: Path) -> None:
    view = executor.with_options(retry_on=KeyError, retries=3)
    future = view.submit(tasks.fail_at_first, str(tmp_path / "log"), 9)
    assert str(future.exception(PATIENCE)) == "call 1"


def _interrupts(exc: BaseException) -> bool:
    raise KeyboardInterrupt


def _breaks(exc: BaseException) -> bool:
    raise RuntimeError("retry_on is broken")


@pytest.mark.parametrize("retry_on", [_interrupts, _breaks])
def test_a_broken_retry_on_is_logged_and_the_exception_is_the_outcome(
    executor: BatchExecutor, tmp_path: Path, retry_on: Any, caplog: pytest.LogCaptureFixture
) -> None:
    view = executor.with_options(retry_on=retry_on, retries=3)
    for _ in range(2):
        future = view.submit(tasks.fail_at_first, str(tmp_path / "log"), 9)
        assert isinstance(future.exception(PATIENCE), ConnectionError)
    assert "retry_on failed" in caplog.text


def test_retry_on_is_called_in_no_thread_that_matters(
    executor: BatchExecutor, tmp_path: Path
) -> None:
    """It may block, and even use the executor."""
    names = []

    def ask(exc: BaseException) -> bool:
        names.append(threading.current_thread().name)
        return executor.submit(tasks.double, 1).result(PATIENCE) == 2

    view = executor.with_options(retry_on=ask, retries=1)
    assert view.submit(tasks.fail_at_first, str(tmp_path / "log"), 1).result(PATIENCE) == 2
    assert names == ["cloudexec-retries"]


def test_a_timeout_counts_as_raised(signals: Signals, executor: BatchExecutor) -> None:
    view = executor.with_options(timeout=0.3, retries=1, retry_on=TaskTimeoutError)
    future = view.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    signals.wait()
    signals.release()
    assert isinstance(future.result(PATIENCE), int)
    assert future.attempts == 2


def test_a_resting_task_ends_with_the_executor(tmp_path: Path) -> None:
    executor = BatchExecutor(1)
    view = executor.with_options(retry_on=ConnectionError, retries=50)
    future = view.submit(tasks.fail_at_first, str(tmp_path / "log"), 100)
    until(lambda: executor.stats().tasks.resting)
    executor.shutdown(cancel_futures=True)
    assert future.done()


def test_those_who_wait_for_a_task_wait_for_its_retries(
    executor: BatchExecutor, tmp_path: Path
) -> None:
    view = executor.with_options(retry_on=ConnectionError, retries=3)
    first = view.submit(tasks.fail_at_first, str(tmp_path / "log"), 2)
    assert executor.submit(tasks.double, first).result(PATIENCE) == 6


# Names.


def test_names_stand_where_numbers_do(caplog: pytest.LogCaptureFixture, signals: Signals) -> None:
    caplog.set_level(logging.INFO, "cloudexec.output")
    with BatchExecutor(1, output="logging") as executor:
        executor.with_options(name="say hello").submit(print, "hello").result(PATIENCE)
        slow = executor.with_options(name="slow", timeout=0.2)
        with pytest.raises(TaskTimeoutError, match=r"task \d+ \(slow\) ran past"):
            slow.submit(tasks.hold, signals.told, signals.gate).result(PATIENCE)
    (record,) = [each for each in caplog.records if each.name == "cloudexec.output"]
    assert re.fullmatch(r"worker-1 task \d+ \(say hello\): hello", record.getMessage())


def test_sizes_are_named_in_stats(signals: Signals, executor: BatchExecutor) -> None:
    large = executor.with_options(cpus=4)
    running = large.submit(tasks.hold, signals.told, signals.gate)
    signals.wait()
    waiting = large.submit(tasks.double, 1)
    until(lambda: executor.stats().tasks.waiting)
    (size,) = executor.stats().sizes
    assert size.size == "4 CPUs with 16 GiB"
    assert (size.connected, size.slots, size.running, size.waiting) == (1, 4, 1, 1)
    signals.release()
    wait([running, waiting], PATIENCE)


# Stages.


def test_a_stage_has_needs(signals: Signals, executor: BatchExecutor) -> None:
    wide = stage(name="wide", cpus=4, memory="1GiB", env={"CONTRACT_NEW": "x"})(
        stages.wait_at_gate.function
    )
    nodes = [wide(signals.told, signals.gate, word) for word in ("one", "two")]
    running: Future[Any] = Future()

    def run() -> None:
        running.set_result(Graph(nodes).run(executor))

    thread = threading.Thread(target=run)
    thread.start()
    signals.wait()
    assert executor.stats().tasks.running == 1
    signals.release(2)
    assert running.result(PATIENCE) == ["one", "two"]
    thread.join()


def test_a_stage_with_needs_that_nobody_has_is_refused_before_anything_runs(
    executor: BatchExecutor, tmp_path: Path
) -> None:
    log = str(tmp_path / "log")
    huge = stage(name="huge", cpus=64)(operator.neg)
    with pytest.raises(ConfigError, match="stage 'huge': cpus=64 is more than there is"):
        huge(stages.value(1, log=log)).run(executor)
    assert not os.path.exists(log)
    with pytest.raises(ConfigError, match="stage 'wrong': cpus must be"):
        stage(name="wrong", cpus=-1)


def test_a_stage_is_retried(executor: BatchExecutor, tmp_path: Path) -> None:
    flaky = stage(retry_on=ConnectionError, retries=3)(tasks.fail_at_first)
    assert flaky(str(tmp_path / "log"), 2).run(executor) == 3


def test_a_graph_that_failed_runs_on_from_there(executor: BatchExecutor, tmp_path: Path) -> None:
    """What finished is not run again, nor what it alone depended on."""
    logs = [str(tmp_path / name) for name in ("first", "second", "flaky")]
    first = stages.value(1, log=logs[0])
    second = stages.value(first, log=logs[1])
    flaky = stage(name="flaky")(lambda _, *args: tasks.fail_at_first(*args))(second, logs[2], 1)
    last = stages.total([second, stages.value(flaky)])
    graph = Graph({"last": last, "second": second})
    with pytest.raises(StageError, match="flaky"):
        graph.run(executor)
    until(lambda: not executor._driver.machine.open_tasks)  # type: ignore[union-attr]
    assert graph.run(executor) == {"last": 3, "second": 1}
    assert [len(Path(log).read_text().split()) for log in logs] == [1, 1, 2]
    report = {each.stage: each for each in graph.report}
    assert (report["value"].resumed, report["value"].tasks) == (2, 1)
    assert graph.run(executor) == {"last": 4, "second": 1}, "what succeeded is begun anew"


def test_exceptions_that_were_returned_are_made_up_for(
    executor: BatchExecutor, tmp_path: Path
) -> None:
    log, other = str(tmp_path / "log"), str(tmp_path / "other")
    graph = Graph([stage(tasks.fail_at_first)(log, 1), stages.value(1, log=other)])
    error, one = graph.run(executor, return_exceptions=True)
    assert isinstance(error, StageError)
    assert graph.run(executor) == [2, one]
    assert Path(other).read_text() == "ran\n"


def test_a_report_says_what_each_stage_took(
    executor: BatchExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    graph = Graph(stages.total([stages.value(n) for n in range(10)]))
    graph.run(executor, progress=True)
    value, total = graph.report
    assert (value.stage, value.tasks, value.failed, value.resumed) == ("value", 10, 0, 0)
    assert (total.stage, total.tasks) == ("sum", 1)
    assert value.seconds >= 0
    assert value.cost_usd == 0
    assert "0.0 s" in capsys.readouterr().err


def test_an_interrupted_graph_runs_on(tmp_path: Path, client: Callable[..., Any]) -> None:
    """Ctrl-C in mid-run: what was done is not done again."""
    script = """
import contract_stages as stages, contract_tasks as tasks, os, signal, sys, threading
from cloudexec import BatchExecutor, Graph
log, told, gate = sys.argv[1:]
first = stages.value(1, log=log)
graph = Graph(stages.total([first, stages.total(first, 1), stages.wait_at_gate(told, gate, 5)]))
def interrupt():
    while True:
        with open(told) as pipe:
            if pipe.readline():
                os.kill(os.getpid(), signal.SIGINT)
                return
with BatchExecutor(2) as executor:
    executor.submit(int).result()
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        graph.run(executor)
        raise SystemExit("it was not interrupted")
    except KeyboardInterrupt:
        pass
    thread.join()
    with open(gate, "r+b", buffering=0) as pipe:
        pipe.write(b"..")
        print(graph.run(executor), open(log).read().count("ran"))
"""
    pipes = Signals(tmp_path)
    try:
        code, out, err = client(script, str(tmp_path / "log"), pipes.told, pipes.gate).end()
    finally:
        pipes.close()
    assert (code, out.strip()) == (0, "8 1"), err
