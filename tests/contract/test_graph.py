"""Stages and graphs of calls, on local workers."""

from __future__ import annotations

import dataclasses
import functools
import operator
import shutil
import threading
import time
from collections import namedtuple
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import contract_stages as stages
import pytest
from contract_helpers import PATIENCE, Signals, until

from cloudexec import (
    BatchExecutor,
    BrokenBatchExecutor,
    CloudexecError,
    ConfigError,
    Graph,
    Node,
    StageError,
    TaskTimeoutError,
    run,
    stage,
)

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("nothing_left")]


@pytest.fixture
def executor() -> Iterator[BatchExecutor]:
    with BatchExecutor(2) as made:
        yield made


Point = namedtuple("Point", "x y")


@dataclasses.dataclass(frozen=True)
class Pair:
    left: Any
    right: Any


def test_a_graph_runs_each_node_once(executor: BatchExecutor, tmp_path: Path) -> None:
    log = tmp_path / "log"
    shared = stages.value(2, log=str(log))
    product = stages.total([shared, shared, stages.total(shared, 3)])
    assert product.run(executor) == 9
    assert log.read_text() == "ran\n"
    assert run(product, executor.with_options(retries=0)) == 9


def test_no_nodes_at_all_are_a_graph_too(executor: BatchExecutor) -> None:
    """Programs that collect nodes in a list may find none."""
    assert run([], executor, progress=True) == []
    assert run({}, executor) == {}
    assert run(nodes=[], executor=executor) == []
    # Without an executor, that would be the path of a program.
    with pytest.raises(TypeError, match="no node of a graph in str 'text'"):
        run("text", executor)
    assert len(Graph([])) == 0


def test_a_generator_is_refused_where_it_is_written() -> None:
    with pytest.raises(TypeError, match="make it a list"):
        stages.total(stages.value(n) for n in range(3))
    with pytest.raises(TypeError, match="make it a list"):
        Graph(stages.value(n) for n in range(3))


@pytest.mark.alone
def test_long_lists_of_plain_values_cost_a_call_little() -> None:
    """They are looked through, as nodes may be in them, but not one by one."""
    values = [float(n) for n in range(200_000)]
    took = []
    for _ in range(5):
        began = time.process_time()
        node = stages.total(values)
        took.append(time.process_time() - began)
        assert node._args[0] is values
    one_by_one = time.process_time()
    for value in values:
        type(value)
    assert min(took) < 3 * (time.process_time() - one_by_one)


def test_values_come_back_in_the_shape_that_was_asked_for(executor: BatchExecutor) -> None:
    one, two = stages.value(1), stages.value("two")
    wanted = {"a": [one, (two, one)], "b": Pair(two, None), "c": Point(one, 5), "d": {one}}
    assert run(wanted, executor) == {
        "a": [1, ("two", 1)],
        "b": Pair("two", None),
        "c": Point(1, 5),
        "d": {1},
    }


def test_nodes_are_found_inside_arguments(executor: BatchExecutor) -> None:
    node = stages.value(1)
    nested = [node, {"key": (node, {node})}, Pair(node, [2]), Point(node, 0), frozenset([node])]
    assert stages.value(nested).run(executor) == [
        1,
        {"key": (1, {1})},
        Pair(1, [2]),
        Point(1, 0),
        frozenset([1]),
    ]


def test_futures_may_stand_beside_nodes(executor: BatchExecutor) -> None:
    future = executor.submit(int, 4)
    assert stages.total([future, stages.value(1)]).run(executor) == 5


def test_a_function_of_a_script_can_be_a_stage(executor: BatchExecutor) -> None:
    """By value, with its closure, as with ``submit()``; and the plain function stays at hand."""
    scale = 3

    @stage(name="scaled")
    def scaled(x: int) -> int:
        return scale * x

    assert scaled(scaled(2)).run(executor) == 18
    assert scaled.function(2) == 6
    assert (scaled.name, scaled.__name__) == ("scaled", "scaled")
    assert stages.Stages.length(stages.value("four")).run(executor) == 4
    assert stage(operator.neg)(stages.value(1)).run(executor) == -1


def test_a_graph_has_no_cycles_whatever_is_done_to_its_arguments(executor: BatchExecutor) -> None:
    """What holds nodes is copied, and a node is not changed."""
    first = stages.value(1)
    items = [first]
    second = stages.total(items)
    items.append(second)
    assert second.run(executor) == 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        second.dependencies = (second,)  # type: ignore[misc]
    empty: list[Any] = []
    third = stages.value(empty)
    empty.append(third)
    with pytest.raises(StageError, match="has not been run"):
        third.run(executor)


def test_a_node_elsewhere_is_refused_with_what_to_do(executor: BatchExecutor) -> None:
    error = executor.submit(str, stages.value(1)).exception(PATIENCE)
    assert error is not None
    assert "pass it to a stage" in str(error)


def test_independent_nodes_run_at_once(signals: Signals, executor: BatchExecutor) -> None:
    nodes = [stages.wait_at_gate(signals.told, signals.gate, str(i)) for i in range(2)]
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(run, nodes, executor)
        signals.wait(2)
        signals.release(2)
        assert running.result(PATIENCE) == ["0", "1"]


def test_a_failure_names_the_stage_and_chains_the_cause(executor: BatchExecutor) -> None:
    """At the node asked for, or far from it."""
    failing = stages.divide(1, 0)
    for node in (failing, stages.total([stages.value(failing), 1])):
        with pytest.raises(StageError, match="stage 'divide' failed: ZeroDivisionError") as info:
            node.run(executor)
        assert info.value.stage == "divide"
        assert isinstance(info.value.__cause__, ZeroDivisionError)


def test_a_failure_cancels_the_rest(signals: Signals, executor: BatchExecutor) -> None:
    held = stages.wait_at_gate(signals.told, signals.gate)
    behind = stages.value(held)
    with pytest.raises(StageError):
        run([behind, stages.divide(1, 0)], executor)
    until(lambda: executor.stats().tasks.held == 0)
    signals.release()


def test_exceptions_may_be_returned_beside_values(executor: BatchExecutor) -> None:
    failing = stages.divide(1, 0)
    nodes = [stages.divide(1, 2), stages.total(failing, 1), {"key": failing}]
    half, error, other = run(nodes, executor, return_exceptions=True)
    assert half == 0.5
    assert isinstance(error, StageError)
    assert isinstance(other["key"], StageError)
    assert error.stage == other["key"].stage == "divide"


@pytest.mark.parametrize("far", [False, True])
def test_a_graph_goes_on_with_another_executor(far: bool, tmp_path: Path) -> None:
    """What the first one had is taken over, or made again where it has gone with its workers."""
    marker = tmp_path / "marker"
    log = str(tmp_path / "log")
    parts = [stages.repeated(n, 300_000, log) for n in range(3)]
    graph = Graph(stages.total_if(str(marker), parts))
    options: dict[str, Any] = {"listen": "127.0.0.1:0"} if far else {}
    with BatchExecutor(1, **options) as executor:
        with pytest.raises(StageError, match="not yet"):
            graph.run(executor)
    marker.touch()
    with BatchExecutor(1, **options) as executor:
        # Its own data, so that numbers of what is held are not the same by chance.
        assert executor.submit(len, bytes(300_000)).result(PATIENCE) == 300_000
        assert graph.run(executor) == 3 * 300_000
    assert Path(log).read_text().count("ran") == (6 if far else 3)


def test_calls_that_cannot_be_pickled_are_reported(executor: BatchExecutor) -> None:
    """As failed, and those behind them too."""
    graph = Graph(stages.total(stages.value(threading.Lock())))
    with pytest.raises(StageError, match=r"argument 0 of value\(\) cannot be sent"):
        graph.run(executor)
    assert {each.stage: (each.tasks, each.failed) for each in graph.report} == {
        "value": (1, 1),
        "sum": (1, 1),
    }


def test_stages_of_one_name_are_reported_together(executor: BatchExecutor) -> None:
    """Each with what its own calls asked for."""
    name = "both"
    one, other = (stage(name=name, retries=n)(stages.value.function) for n in (1, 2))
    graph = Graph([one(1), other(other(2))])
    assert graph.run(executor) == [1, 2]
    (report,) = graph.report
    assert (report.stage, report.tasks, report.failed) == (name, 3, 0)


def test_options_of_a_stage_hold_for_its_calls(signals: Signals, executor: BatchExecutor) -> None:
    slow = stage(name="slow", timeout=0.2)(stages.wait_at_gate.function)
    with pytest.raises(StageError, match="stage 'slow' failed") as info:
        slow(signals.told, signals.gate).run(executor)
    assert isinstance(info.value.__cause__, TaskTimeoutError)


def test_wrong_options_are_refused_where_they_are_written() -> None:
    with pytest.raises(ConfigError, match="timeout"):
        stage(timeout=-1.0)
    with pytest.raises(ConfigError, match="retries"):
        stage(retries=-1)
    with pytest.raises(ConfigError, match="name must be one line"):
        stage(name="two\nlines")
    with pytest.raises(TypeError, match="made of a function"):
        stage(3)  # type: ignore[call-overload]


def test_what_is_no_graph_or_no_executor_of_ours_is_refused() -> None:
    with pytest.raises(TypeError, match="no node"):
        Graph([1, 2])
    with ThreadPoolExecutor(1) as threads, pytest.raises(TypeError, match="BatchExecutor"):
        stages.value(1).run(threads)  # type: ignore[arg-type]


def test_a_broken_executor_is_no_stages_fault(signals: Signals) -> None:
    executor = BatchExecutor(1)
    node = stages.value(stages.wait_at_gate(signals.told, signals.gate))
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(node.run, executor)
        signals.wait()
        executor.kill_workers()
        assert isinstance(running.exception(PATIENCE), BrokenBatchExecutor)


def test_shutting_down_cancels_a_graph_that_runs(signals: Signals) -> None:
    executor = BatchExecutor(1)
    node = stages.value(stages.wait_at_gate(signals.told, signals.gate))
    with ThreadPoolExecutor(1) as thread:
        running = thread.submit(node.run, executor)
        signals.wait()
        executor.shutdown(wait=False, cancel_futures=True)
        with pytest.raises(CancelledError):
            running.result(PATIENCE)
        signals.release()
    executor.shutdown()


def test_progress_has_a_bar_for_each_stage(
    executor: BatchExecutor, capsys: pytest.CaptureFixture[str]
) -> None:
    run([stages.total([stages.value(i), 1]) for i in range(5)], executor, progress=True)
    shown = capsys.readouterr().err
    assert "value" in shown
    assert "sum" in shown
    assert shown.count("5/5") >= 2


def test_a_graph_can_be_drawn() -> None:
    one = stages.value(1)
    quoted = stage(name='say "hi"')(str)(one)
    graph = Graph([stages.total([one, quoted]), stages.value(one)])
    assert len(graph) == 4
    dot = graph.to_dot()
    assert dot.startswith("digraph {")
    assert dot.count("label=") == 4
    assert dot.count("->") == 4
    assert r'label="say \"hi\""' in dot
    by_stage = graph.to_dot(by_stage=True)
    assert 'label="value (2)"' in by_stage
    assert by_stage.count("->") == 4


@pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz is not installed")
def test_graphviz_draws_it(tmp_path: Path) -> None:
    path = tmp_path / "graph.svg"
    svg = Graph(stages.total([stages.value(1)])).to_svg(path)
    assert "<svg" in svg
    assert path.read_text() == svg


def test_without_graphviz_drawing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CloudexecError, match="install Graphviz"):
        Graph(stages.value(1)).to_svg()


def test_many_nodes_run_and_none_recurses(executor: BatchExecutor) -> None:
    """Wide at first, merged by fives and in one; then a chain as deep, whose first link fails."""
    leaves = [stages.value(i) for i in range(16_000)]
    merged = [stages.total(leaves[i : i + 5]) for i in range(0, len(leaves), 5)]
    root = stages.total(merged)
    assert len(Graph(root)) == 19_201
    assert root.run(executor) == sum(range(16_000))
    del leaves, merged, root
    first: Node[Any] = stages.divide(1, 0)
    deep = functools.reduce(lambda node, _: stages.value(node), range(100_000), first)
    with pytest.raises(StageError, match="divide"):
        deep.run(executor)
    assert threading.active_count() < 20
