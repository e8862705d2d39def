"""Remembers when tasks were submitted and sent, and the unusual events of single tasks."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Sequence
from typing import Any

from cloudexec._server.engine import Moment
from cloudexec._story import StoryEvent

__all__ = ["MOST_NOTES", "Marks", "Notes"]

_MOST_MARKS = 1 << 15
"""Number of marks that are kept. When it is reached, every other mark is dropped."""
MOST_NOTES = 64
"""Number of unusual events that are kept for one task: half of them the first, half the last."""


class Marks:
    """The times at which consecutive numbers were given out, in bounded memory.

    A mark stands for a batch of numbers. One thread adds marks; other threads may read them.
    """

    def __init__(self) -> None:
        self._columns = array("q"), array("d"), array("d")
        self._batches = 0
        self._stride = 1  # batches to a mark

    def add(self, last: int, moment: Moment) -> None:
        """Note that all numbers up to ``last`` which had no mark yet were given out now."""
        numbers, times, walls = self._columns
        if numbers and last <= numbers[-1]:
            return
        self._batches += 1
        if self._batches % self._stride:
            # The later time stands for both batches, so that no number seems to be given too early.
            times[-1], walls[-1], numbers[-1] = moment[0], moment[1], last
            return
        times.append(moment[0])
        walls.append(moment[1])
        numbers.append(last)  # appended last, because readers go by this column
        if len(numbers) >= _MOST_MARKS:
            self._columns = numbers[1::2], times[1::2], walls[1::2]
            self._stride *= 2

    def find(self, number: int) -> tuple[float, float] | None:
        """Return when a number was given out, on both clocks; ``None`` if it was not yet."""
        numbers, times, walls = self._columns
        at = bisect.bisect_left(numbers, number)
        return (times[at], walls[at]) if at < len(numbers) else None


class Notes:
    """The unusual events of one task, in order.

    Attributes:
        name: The task's name.
        entries: Both clocks' times and the event; tasks may share one event object.
        left_out: Number of events in the middle that were dropped.
    """

    __slots__ = ("entries", "left_out", "name")

    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: list[tuple[float, float, StoryEvent]] = []
        self.left_out = 0

    def add(self, when: Sequence[Any], event: StoryEvent) -> None:
        self.entries.append((when[0], when[1], event))
        if len(self.entries) > MOST_NOTES:
            del self.entries[MOST_NOTES // 2]
            self.left_out += 1
