"""Prints tables that fit the terminal: columns are left out or shortened so that no line wraps."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import click

_GAP = 2
_UNBOUNDED = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column, and what happens to it if the terminal is too narrow."""

    title: str
    right: bool = False
    """Whether it is aligned to the right, as numbers are."""
    leaves: int = 0
    """Columns with a higher value are left out earlier; one with 0 is never left out."""
    least: int = 0
    """Number of characters to which it may be shortened; 0 if it must not be shortened."""
    yields: bool = False
    """Whether it is shortened before any column is left out. Other columns are shortened only when
    no further one can be left out."""
    style: str = ""


def show(columns: Sequence[Column], rows: Iterable[Sequence[str]], *, err: bool = False) -> None:
    """Print a table, on standard error if ``err``.

    In a file or a pipe, and without the variable ``COLUMNS``, it is as wide as its content.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    stream = sys.stderr if err else sys.stdout
    is_unbounded = not stream.isatty() and not os.environ.get("COLUMNS", "").isdecimal()
    console = Console(
        file=stream, highlight=False, soft_wrap=False, width=_UNBOUNDED if is_unbounded else None
    )
    cells = [[_one_line(cell) for cell in row] for row in rows]
    # A column that is empty in all rows is left out, unless it must stay.
    kept = [i for i, each in enumerate(columns) if not each.leaves or any(row[i] for row in cells)]
    widths = {
        i: max([cell_len(columns[i].title), *(cell_len(row[i]) for row in cells)]) for i in kept
    }

    def excess() -> int:
        return sum(widths[i] for i in kept) + _GAP * (len(kept) - 1) - console.width

    def slack(i: int) -> int:
        return max(0, widths[i] - columns[i].least) if columns[i].least else 0

    def shorten(some: Iterable[int]) -> None:
        for i in sorted(some, key=slack, reverse=True):
            widths[i] -= max(0, min(slack(i), excess()))

    while excess() > sum(slack(i) for i in kept if columns[i].yields):
        leaving = max(kept, key=lambda i: columns[i].leaves)
        if not columns[leaving].leaves:
            break
        kept.remove(leaving)
    shorten(i for i in kept if columns[i].yields)
    shorten(kept)
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="bold")
    for i in kept:
        table.add_column(
            columns[i].title,
            justify="right" if columns[i].right else "left",
            no_wrap=True,
            overflow="ellipsis",
            max_width=widths[i],
        )
    for row in cells:
        table.add_row(*(Text(row[i], style=columns[i].style) for i in kept))
    # Printed by click: rich would end the program itself if the reading program has ended.
    with console.capture() as capture:
        console.print(table)
    for line in capture.get().splitlines():
        click.echo(line.rstrip(), err=err)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def duration(seconds: float) -> str:
    """Format a duration: ``45s``, ``12m``, ``3h05m`` or ``2d04h``."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    minutes = whole // 60
    if minutes < 60:
        return f"{minutes}m"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours}h{minutes:02}m"
    days, hours = divmod(hours, 24)
    return f"{days}d{hours:02}h"


def since(time: datetime | None) -> str:
    """Format the time since a moment; empty without one."""
    return "" if time is None else duration((datetime.now(UTC) - time).total_seconds())


def until(time: datetime | None) -> str:
    """Format the time until a moment; ``over`` if it has passed, empty without one."""
    if time is None:
        return ""
    seconds = (time - datetime.now(UTC)).total_seconds()
    return duration(seconds) if seconds > 0 else "over"


def memory(mib: float) -> str:
    """Format an amount of memory."""
    return f"{mib / 1024:,.4g} GiB" if mib >= 1024 else f"{mib:g} MiB"


def usd(amount: float, *, is_estimate: bool = False) -> str:
    """Format an amount of money; ``~`` marks an estimate."""
    from cloudexec._aws.prices import format_usd

    return ("~" if is_estimate and amount else "") + format_usd(amount)


_ORDER = ("RUNNING", "STARTING", "RUNNABLE", "PENDING", "SUBMITTED", "SUCCEEDED", "ENDED", "FAILED")


def workers(counts: dict[str, int]) -> str:
    """Format the numbers of workers by state."""
    return ", ".join(f"{counts[state]:,} {state.lower()}" for state in _ORDER if counts.get(state))
