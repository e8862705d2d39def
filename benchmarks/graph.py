"""How fast do tasks that depend on other tasks run, and does a task cost more in a large graph?

Two workers run tasks that do almost nothing. There are three kinds of graphs. In a chain each task
waits for the one before. In a fan one task is before all others and one after them. In layers half
of the tasks are leaves, each task of the next layer takes two of these, then groups of four are
merged, and at last all. cloudexec runs them as stages of a graph, and by submit() with futures
among the arguments. Dask runs its own graphs, which are faster than its submit(). Ray uses
references.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from typing import Any

import _calls
import _fresh
import _peers
import _report
from _peers import DASK, OURS, RAY

_SIZES = {"chain": 2_000, "fan": 10_000, "layers": 10_000}
_LARGE = 100_000
_SUBMIT, _STAGES = "submit", "stages"

Call = Callable[..., Any]
"""Adds a call of ``_calls.total`` to a graph, with values or other calls as arguments."""


def _chain(call: Call, tasks: int) -> Any:
    last = call(0)
    for _ in range(tasks - 1):
        last = call(last, 1)
    return last


def _fan(call: Call, tasks: int) -> Any:
    first = call(1)
    return call(*[call(first, i) for i in range(tasks - 2)])


def _layers(call: Call, tasks: int) -> Any:
    leaves = [call(i) for i in range(tasks // 2)]
    pairs = [call(leaves[i], leaves[7 * i % len(leaves)]) for i in range(tasks * 2 // 5)]
    merged = [call(*pairs[i : i + 4]) for i in range(0, len(pairs), 4)]
    return call(*merged)


_SHAPES: dict[str, Callable[[Call, int], Any]] = {
    "chain": _chain,
    "fan": _fan,
    "layers": _layers,
}


def measure(contender: str, shape: str, tasks: int, way: str) -> _fresh.Figures:
    build = _SHAPES[shape]
    with _peers.opened(contender, 2) as peer:
        peer.collect([peer.submit(_calls.total, i) for i in range(500)])
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        cpu = time.process_time()
        begin = time.perf_counter()
        if contender == DASK:
            _run_dask(peer, build, tasks)
        elif contender == OURS and way == _STAGES:
            _run_stages(peer, build, tasks)
        else:
            peer.collect([build(lambda *args: peer.submit(_calls.total, *args), tasks)])
        seconds = time.perf_counter() - begin
        cpu = time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "rate": tasks / seconds,
        "cpu": cpu / tasks * 1e6,
        "memory": (peak - before) * 1024 / tasks,
    }


def _run_stages(peer: Any, build: Callable[[Call, int], Any], tasks: int) -> None:
    from cloudexec import run, stage

    run(build(stage(_calls.total), tasks), peer._executor)


def _run_dask(peer: Any, build: Callable[[Call, int], Any], tasks: int) -> None:
    graph: dict[str, Any] = {}

    def call(*args: Any) -> str:
        key = f"call-{len(graph)}"
        graph[key] = (_calls.total, *args)
        return key

    peer._client.get(graph, build(call, tasks))


def main(options: argparse.Namespace, report: _report.Report) -> None:
    divisor = 10 if options.quick else 1
    for shape, size in _SIZES.items():
        _compare(options, report, shape, size // divisor)
    _growth(options, report, _SIZES["layers"] // divisor, _LARGE // divisor)


def _compare(options: argparse.Namespace, report: _report.Report, shape: str, tasks: int) -> None:
    what = f"{shape} of {tasks:,} tasks"

    def arguments(way: str) -> Callable[[str], dict[str, object]]:
        return lambda name: {"shape": shape, "tasks": tasks, "way": way}

    figures = _peers.rounds([OURS, DASK, RAY], options.rounds, report, what, arguments(_STAGES))
    submitted = _peers.rounds([OURS], options.rounds, report, what, arguments(_SUBMIT))[OURS]
    for way, ours in ((_STAGES, figures.pop(OURS)), (_SUBMIT, submitted)):
        for name, theirs in figures.items():
            report.compare(
                f"{what}, {way}",
                _report.median(ours, "rate"),
                name,
                _report.median(theirs, "rate"),
                "tasks/s",
                at_least=3.0 if name == DASK else None,
            )


def _growth(options: argparse.Namespace, report: _report.Report, small: int, large: int) -> None:
    """Report the client's cost per task of the layers, in a small and in a large graph."""
    figures: dict[int, list[_fresh.Figures]] = {small: [], large: []}
    for _ in range(options.rounds):
        for tasks, found in figures.items():
            found.append(_fresh.measure(OURS, shape="layers", tasks=tasks, way=_STAGES))
    for tasks, found in figures.items():
        report.number(f"layers of {tasks:,} tasks", _report.median(found, "rate"), "tasks/s")
    report.number(
        f"memory per task, layers of {large:,}", _report.median(figures[large], "memory"), "B"
    )
    beside = f"cloudexec, {small:,} tasks"
    cost = {tasks: _report.median(found, "cpu") for tasks, found in figures.items()}
    what = f"client CPU per task, layers of {large:,}"
    report.compare(what, cost[large], beside, cost[small], "us", at_most=1.3)


if __name__ == "__main__":
    _report.run(__doc__, main, measure)
