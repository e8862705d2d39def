"""Progress bars that count finished futures, drawn by the package rich."""

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
    """Shows on standard error how many futures are done.

    Args:
        total: Number of futures that there will be; ``None`` if it is not known.
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
        """Count these futures when they are done."""
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
        """Draw the bar for the last time."""
        self._progress.stop()


class StageBars:
    """Shows on standard error how many calls of a graph are done, with one bar for each stage.

    Args:
        totals: Number of calls of each stage, by its name.
        done: Number of these calls that need not be run.
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
        # ``future.exception()`` would unpickle a result that only other calls need. A call that
        # never ran has a DependencyError, which was made here and needs no unpickling.
        if not future.cancelled() and not isinstance(future._exception, DependencyError):
            self._progress.advance(bar)

    def close(self, report: Iterable[StageReport], *, complete: bool) -> None:
        """Draw the bars for the last time.

        Args:
            report: The times of each stage.
            complete: Whether all calls are done. The last ones may not have been counted yet, and
                are then counted here.
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
