"""Uses of the public types that must pass the type checker; this code never runs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor, as_completed

from cloudexec import (
    BatchExecutor,
    BatchFuture,
    ExecutorStats,
    Graph,
    Local,
    Node,
    OptionsView,
    Run,
    Stage,
    TaskStory,
    run,
    stage,
)


def area(width: float, height: float = 1.0) -> float:
    return width * height


def use() -> None:
    with BatchExecutor(4, launcher=Local(slots_per_worker=2), retries=0) as executor:
        base: Executor = executor
        future: BatchFuture[float] = executor.submit(area, 2.0, height=3.0)
        value: float = future.result(timeout=1)
        results: Iterator[float] = executor.map(area, [1.0, 2.0], chunksize=1, buffersize=2)
        view: OptionsView = executor.with_options(timeout=1.5).with_options(retries=1)
        text: BatchFuture[str] = view.submit(str, value)
        for done in as_completed([text]):
            done.result().upper()
        stats: ExecutorStats = executor.stats()
        waiting: int = stats.tasks.waiting
        cancelled: bool = future.cancel(running=True)
        executor.submit(area, "wide")  # type: ignore[arg-type]
        executor.submit(area, 1.0, depth=2.0)  # type: ignore[call-arg]
    print(base, list(results), waiting, cancelled)


def use_named_launcher() -> None:
    BatchExecutor(2, launcher="local").shutdown()
    BatchExecutor(2, launcher=3)  # type: ignore[arg-type]


def use_needs(executor: BatchExecutor) -> None:
    view = executor.with_options(cpus=2, memory="4GiB", gpus=0, priority=1, name="fit")
    view = view.with_options(retry_on=ConnectionError, env={"A": "1"}).with_options(
        retry_on=lambda exc: "again" in str(exc), memory=2**30
    )
    view.with_options(retry_on=(OSError, KeyError), retries=5)
    result: float = view.submit(area, 1.0).result()
    placed: float = view.put(1.0).get()
    story: TaskStory = view.explain(view.submit(area, 1.0))
    lost: list[tuple[str, int | None]] = [(each.reason, each.exit_code) for each in story.lost]
    print(story, lost, placed)
    executor.explain("future")  # type: ignore[arg-type]
    BatchExecutor(max_pending_bytes="1GiB", max_pending_tasks=10, when_full="raise")
    executor.with_options(cpus="2")  # type: ignore[arg-type]
    executor.with_options(env={"A": 1})  # type: ignore[dict-item]
    sizes: list[str] = [each.size for each in executor.stats().sizes]
    print(result, sizes)


@stage(cpus=2, memory="4GiB", retry_on=OSError)
def load(path: str) -> list[int]:
    return [len(path)]


@stage
def read(path: str) -> list[int]:
    return [len(path)]


@stage(name="sum", timeout=5.0, retries=0)
def total(values: list[int]) -> int:
    return sum(values)


def use_graph(executor: BatchExecutor) -> None:
    plain: Stage[[str], list[int]] = read
    values: Node[list[int]] = read("path")
    node: Node[int] = total(values)
    number: int = node.run(executor, progress=True)
    again: int = run(node, executor.with_options(retries=1))
    program: Run = run("train.py", ["--steps", "3"], cpus=4)
    graph = Graph({"sum": node, "all": [values]})
    everything = graph.run(executor, return_exceptions=True)
    direct: list[int] = read.function("path")
    names: list[str] = [each.stage.name for each in graph.nodes]
    stage(read, timeout=1.0)  # type: ignore[call-overload]
    spent: float = sum(each.cost_usd for each in graph.report)
    loaded: Node[list[int]] = load("path")
    print(
        spent, loaded, plain, number, again, everything, direct, names, graph.to_dot(by_stage=True)
    )
    print(program.wait())
