"""One benchmark's command line and what it prints: numbers, ratios, and the verdict on each."""

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
    """One line of the table; every field as it is printed."""

    what: str
    ours: str
    peer: str = ""
    theirs: str = ""
    ratio: str = ""
    budget: str = ""
    verdict: str = ""


class Report:
    """Prints rows as they come and keeps them."""

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
        """Report our number beside a peer's.

        Args:
            what: What was measured.
            ours: Our number.
            peer: Whose the other one is.
            theirs: The peer's number.
            unit: Of both.
            faster: The numbers are times and the ratio says how many times faster we are;
                otherwise it is our number over theirs.
            at_least: The budget, where a larger ratio is better; ``None``: none.
            at_most: The budget, where a smaller ratio is better; ``None``: none.
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
        """Report a number of ours that is judged by itself; a peer's may stand beside it."""
        budget, verdict = _judge(value, at_least, at_most, f" {unit}")
        beside = "" if theirs is None else _number(theirs, unit)
        ratio = f"{value / theirs:.2f}x" if theirs else ""
        self._add(Row(what, _number(value, unit), peer, beside, ratio, budget, verdict))

    def missing(self, what: str, peer: str, why: str = "not installed") -> None:
        """Say that a peer has no number."""
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
        question: What it answers: the script's docstring.
        main: Given the options and a report, measures and reports.
        measure: Measures one contender; called in fresh processes by ``_fresh.measure()``.
        add_options: Adds what only this benchmark takes.
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
