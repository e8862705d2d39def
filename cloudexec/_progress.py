"""Progress bars over futures, drawn by rich."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from cloudexec._errors import DependencyError
from cloudexec._future import BatchFuture

if TYPE_CHECKING:
    from cloudexec._graph_report import StageReport

__all__ = ["ProgressBar", "StageBars"]


class ProgressBar:
    """Counts futures as they finish, on standard error.

    Args:
        total: How many there will be; ``None``: not known.
    """

    def __init__(self, total: int | None) -> None:
        self._lock = threading.Lock()
        self._failed = 0
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._bar = self._progress.add_task("tasks", total=total)
        self._progress.start()

    def watch(self, futures: Iterable[BatchFuture[Any]]) -> None:
        """Count these when they are done."""
        for future in futures:
            future.add_done_callback(self._on_done)

    def _on_done(self, future: Any) -> None:
        failed = future.cancelled() or future.exception() is not None
        with self._lock:
            if failed:
                self._failed += 1
                self._progress.update(self._bar, description=f"tasks ({self._failed} failed)")
            self._progress.advance(self._bar)

    def close(self) -> None:
        """Draw it for the last time."""
        self._progress.stop()


class StageBars:
    """Counts the calls of a graph as they finish: one bar for each stage, on standard error.

    Args:
        totals: Calls of each stage, by name.
        done: Of these, how many need not be run.
    """

    def __init__(self, totals: Mapping[str, int], done: Mapping[str, int]) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[spent]}"),
            console=Console(stderr=True),
        )
        self._bars = {
            name: self._progress.add_task(
                escape(name), total=total, completed=done.get(name, 0), spent=""
            )
            for name, total in totals.items()
        }
        self._progress.start()

    def watch(self, stage: str, future: BatchFuture[Any]) -> None:
        """Count a call when it is done."""
        future.add_done_callback(partial(self._on_done, self._bars[stage]))

    def _on_done(self, bar: TaskID, future: BatchFuture[Any]) -> None:
        # Not asked for its exception: that would unpickle what only other calls need. What never
        # ran has one that was made here.
        if not future.cancelled() and not isinstance(future._exception, DependencyError):
            self._progress.advance(bar)

    def close(self, report: Iterable[StageReport], *, complete: bool) -> None:
        """Draw them for the last time.

        Args:
            report: What each stage took.
            complete: All calls are done: the last ones may not have been counted yet.
        """
        for stage in report:
            spent = f"{stage.seconds:.1f} s"
            if stage.cost_usd:
                spent += f", about ${stage.cost_usd:.4f}"
            self._progress.update(self._bars[stage.stage], spent=spent)
        if complete:
            for bar in self._progress.tasks:
                self._progress.update(bar.id, completed=bar.total)
        self._progress.stop()
