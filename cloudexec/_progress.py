"""A progress bar over futures, drawn by rich."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cloudexec._future import BatchFuture

__all__ = ["ProgressBar"]


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
