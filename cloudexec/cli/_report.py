"""Shows a run on standard error: progress, failures and a summary."""

from __future__ import annotations

import logging
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cloudexec.cli._records import Record

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

_FAILURES_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Earlier:
    """The rows that the output had before the run began."""

    rows: int
    """Number of rows."""
    failed: int
    """Number of those rows that had failed."""


class Report:
    """Progress while the run goes on, and a summary when it ends."""

    def __init__(
        self,
        *,
        label: str,
        output: str,
        total: int | None,
        earlier: Earlier,
        is_quiet: bool,
        shows_progress: bool,
    ) -> None:
        """Create the report of a run.

        Args:
            label: The function, as the user named it.
            output: The output's name.
            total: Number of rows of the input; ``None`` for a stream.
            earlier: The rows that the output had before the run.
            is_quiet: Whether to show errors only.
            shows_progress: Whether a progress bar may be drawn.
        """
        from rich.console import Console

        self._console: Console = Console(stderr=True, highlight=False)
        self._label = label
        self._output = output
        self._total = total
        self._earlier = earlier
        self._is_quiet = is_quiet
        self._shows_progress = shows_progress and not is_quiet and self._console.is_terminal
        self._progress: Progress | None = None
        self._bar: TaskID | None = None
        self._started_at = time.monotonic()
        self.succeeded = 0
        self.failed = 0
        self._errors: Counter[str] = Counter()

    @property
    def written(self) -> int:
        """Number of rows that this run has finished."""
        return self.succeeded + self.failed

    def say(self, message: str) -> None:
        """Show a line, above the progress bar if there is one."""
        if not self._is_quiet:
            self._console.print(message, markup=False, soft_wrap=True)

    def start(self) -> None:
        """Begin to show progress."""
        self._started_at = time.monotonic()
        if not self._shows_progress:
            return
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            SpinnerColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[failures]}", style="red"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._bar = self._progress.add_task(
            "starting workers", total=self._total, completed=self._earlier.rows, failures=""
        )
        self._progress.start()

    def add(self, record: Record) -> None:
        """Count a finished row, and show it if it failed."""
        if record.error is None:
            self.succeeded += 1
        else:
            self.failed += 1
            self._errors[record.error.type] += 1
            self._show_failure(record.row, f"{record.error.type}: {record.error.message}")
        if self._progress is not None and self._bar is not None:
            self._progress.update(
                self._bar,
                description=self._label,
                completed=self._earlier.rows + self.written,
                failures=f"{self.failed} failed" if self.failed else "",
            )

    def _show_failure(self, row: int, what: str) -> None:
        if self.failed <= _FAILURES_SHOWN:
            lines = what.splitlines() or [""]
            more = " ..." if len(lines) > 1 or len(lines[0]) > 200 else ""
            self.say(f"row {row} failed: {lines[0][:200]}{more}")
        elif self.failed == _FAILURES_SHOWN + 1:
            self.say(f"more rows failed: see {self._output}")

    def stop(self) -> None:
        """Remove the progress bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def summarise(self) -> None:
        """Show how many rows succeeded and failed, as a table."""
        if self._is_quiet:
            return
        from rich.table import Table

        seconds = time.monotonic() - self._started_at
        table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column(style="bold")
        table.add_column(justify="right")
        table.add_column(overflow="fold")
        earlier = self._earlier
        if earlier.rows:
            noted = f"{_count(earlier.failed, 'of them')} failed" if earlier.failed else ""
            table.add_row("done before", f"{earlier.rows:,}", noted)
        table.add_row("succeeded", f"{self.succeeded:,}", "")
        kinds = ", ".join(f"{name} {count:,}" for name, count in self._errors.most_common(4))
        table.add_row("failed", f"{self.failed:,}", kinds, style="red" if self.failed else None)
        not_run = None if self._total is None else self._total - earlier.rows - self.written
        if not_run:
            table.add_row("not run", f"{not_run:,}", "")
        rate = f"{self.written / seconds:,.1f} rows/s" if self.written else ""
        table.add_row("time", _duration(seconds), rate)
        self._console.print(table)


class ReportHandler(logging.Handler):
    """Shows the output of workers, and warnings, above the progress bar."""

    def __init__(self, report: Report) -> None:
        """Create a handler for a report, which shows the lines."""
        super().__init__()
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        """Show one log record."""
        worker = getattr(record, "worker", None)
        if worker is not None and isinstance(record.args, tuple) and record.args:
            # A line that a task printed. The task's number is left out: a user would take it for
            # the number of a row.
            self._report.say(f"{worker}: {record.args[-1]}")
        else:
            self._report.say(self.format(record))


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
