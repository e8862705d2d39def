"""The command line and output of a benchmark: numbers, ratios, and whether they are in budget."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import _fresh


@dataclass(frozen=True)
class Row:
    """One line of the table, with each field as it is printed."""

    what: str
    ours: str
    peer: str = ""
    theirs: str = ""
    ratio: str = ""
    budget: str = ""
    verdict: str = ""


class Report:
    """Prints each row at once, and keeps all rows."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def say(self, text: str) -> None:
        """Print a remark that is not part of the table."""
        print(f"  {text}", flush=True)

    def compare(
        self,
        what: str,
        ours: float,
        peer: str,
        theirs: float,
        unit: str,
        *,
        faster: bool = False,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Report cloudexec's number and that of another library.

        Args:
            what: What was measured.
            ours: The number of cloudexec.
            peer: Name of the other library.
            theirs: The number of the other library.
            unit: Unit of both numbers.
            faster: Whether the numbers are times. The ratio is then theirs over ours, and otherwise
                ours over theirs.
            at_least: Least ratio allowed; ``None`` if there is no such budget.
            at_most: Largest ratio allowed; ``None`` if there is no such budget.
        """
        ratio = theirs / ours if faster else ours / theirs
        budget, verdict = _judge(ratio, at_least, at_most, "x")
        numbers = (_number(ours, unit), peer, _number(theirs, unit))
        self._add(Row(what, *numbers, f"{ratio:.2f}x", budget, verdict))

    def number(
        self,
        what: str,
        value: float,
        unit: str,
        *,
        at_least: float | None = None,
        at_most: float | None = None,
        peer: str = "",
        theirs: float | None = None,
    ) -> None:
        """Report a number of cloudexec with a budget for the number itself, and maybe a peer's."""
        budget, verdict = _judge(value, at_least, at_most, f" {unit}")
        beside = "" if theirs is None else _number(theirs, unit)
        ratio = f"{value / theirs:.2f}x" if theirs else ""
        self._add(Row(what, _number(value, unit), peer, beside, ratio, budget, verdict))

    def missing(self, what: str, peer: str, why: str = "not installed") -> None:
        """Report that another library has no number."""
        self._add(Row(what, "", peer, why))

    def _add(self, row: Row) -> None:
        self.rows.append(row)
        parts = [row.what, row.ours]
        if row.peer:
            parts.append(f"{row.peer} {row.theirs}")
        if row.ratio:
            parts.append(row.ratio)
        if row.budget:
            parts.append(f"{row.budget} {row.verdict}")
        print("  " + " | ".join(part for part in parts if part), flush=True)


def _judge(
    value: float, at_least: float | None, at_most: float | None, unit: str
) -> tuple[str, str]:
    if at_least is not None:
        return f">= {at_least:g}{unit}", "PASS" if value >= at_least else "MISS"
    if at_most is not None:
        return f"<= {at_most:g}{unit}", "PASS" if value <= at_most else "MISS"
    return "", ""


def _number(value: float, unit: str) -> str:
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    return f"{value:,.{digits}f} {unit}"


def median(figures: Iterable[_fresh.Figures], name: str) -> float:
    """Return the median of one figure over the rounds."""
    return statistics.median(figure[name] for figure in figures)


def run(
    question: str | None,
    main: Callable[[argparse.Namespace, Report], None],
    measure: Callable[..., _fresh.Figures],
    *,
    add_options: Callable[[argparse.ArgumentParser], None] | None = None,
) -> None:
    """Run a benchmark from the command line.

    Args:
        question: The question that the benchmark answers: its module's docstring.
        main: Takes the options and a report, measures, and fills the report.
        measure: Measures one contender; ``_fresh.measure()`` calls it in fresh processes.
        add_options: Adds the options that only this benchmark has.
    """
    _fresh.answer_if_asked(measure)
    question = question or ""
    parser = argparse.ArgumentParser(
        description=question, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: a smoke test")
    parser.add_argument("--rounds", type=int, help="rounds per contender (3; 1 if quick)")
    parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
    if add_options is not None:
        add_options(parser)
    options = parser.parse_args()
    options.rounds = options.rounds or (1 if options.quick else 3)
    report = Report()
    print(question.strip().splitlines()[0], flush=True)
    main(options, report)
    if options.json:
        with open(options.json, "w") as file:
            json.dump([asdict(row) for row in report.rows], file)
    sys.exit(0)
