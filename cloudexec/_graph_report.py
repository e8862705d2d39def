"""What became of a graph's calls, counted by stage."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from cloudexec._future import BatchFuture

__all__ = ["Call", "StageReport", "Tally", "report"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StageReport:
    """What became of the calls of one stage when a graph was run."""

    stage: str
    tasks: int
    """Calls that ended: with a result, or without."""
    failed: int
    """Of these, those without."""
    resumed: int
    """Calls that were not run, because an earlier run had their results."""
    seconds: float
    """That its calls ran in slots, those of the last attempt of each."""
    cost_usd: float
    """Its share of what the executor's workers cost meanwhile, idle ones included: by these
    seconds, and by the processors that its calls asked for."""


class Tally:
    """Counts the calls of one stage; touched by the loop thread alone while they run."""

    __slots__ = ("failed", "resumed", "seconds", "tasks", "weight")

    def __init__(self, weight: float) -> None:
        self.tasks = self.failed = self.resumed = 0
        self.seconds = 0.0
        self.weight = weight

    def __call__(self, future: BatchFuture[Any], succeeded: bool) -> None:
        self.tasks += 1
        self.seconds += future._run_time or 0.0
        if succeeded:
            future._has_result = True
        else:
            self.failed += 1


class Call:
    """Holds what one call takes its values from until it has succeeded.

    So the results of finished calls live for as long as one that is not finished needs them, and
    no longer; those of calls that fail are put aside, for another run of the graph.
    """

    __slots__ = ("_aside", "_inputs", "_tally")

    def __init__(
        self,
        tally: Callable[[BatchFuture[Any], bool], None],
        inputs: tuple[BatchFuture[Any], ...],
        aside: list[BatchFuture[Any]],
    ) -> None:
        self._tally = tally
        self._inputs = inputs
        self._aside = aside

    def __call__(self, future: BatchFuture[Any], succeeded: bool) -> None:
        self._tally(future, succeeded)
        if not succeeded:
            self._aside.extend(self._inputs)


def report(tallies: Iterable[tuple[str, Tally]], spent_usd: float) -> tuple[StageReport, ...]:
    """Sum up what the calls of each stage came to, given the name of each stage that counts."""
    by_name: dict[str, list[Tally]] = {}  # several stages may share one
    for stage, tally in tallies:
        by_name.setdefault(stage, []).append(tally)
    work = {
        name: sum(tally.seconds * tally.weight for tally in each) for name, each in by_name.items()
    }
    total = sum(work.values()) or 1.0
    return tuple(
        StageReport(
            stage=name,
            tasks=sum(tally.tasks for tally in each),
            failed=sum(tally.failed for tally in each),
            resumed=sum(tally.resumed for tally in each),
            seconds=sum(tally.seconds for tally in each),
            cost_usd=max(0.0, spent_usd) * work[name] / total,
        )
        for name, each in by_name.items()
    )


StageReport.__module__ = "cloudexec"
