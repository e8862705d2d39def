"""When things happened to tasks: by number for all of them, one by one for the unusual."""

from __future__ import annotations

import bisect
from array import array
from collections.abc import Sequence
from typing import Any

from cloudexec._server.engine import Moment
from cloudexec._story import StoryEvent

__all__ = ["MOST_NOTES", "Marks", "Notes"]

_MOST_MARKS = 1 << 15
"""Times of batches that are kept; beyond, every other one is forgotten, and so on."""
MOST_NOTES = 64
"""Unusual events that are kept of one task: the first ones, and the last."""


class Marks:
    """When numbers that count up were given out, batch by batch, in bounded memory.

    One thread adds; others may look.
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
            # The later of two neighbours stands for both: nothing is said to have been too early.
            times[-1], walls[-1], numbers[-1] = moment[0], moment[1], last
            return
        times.append(moment[0])
        walls.append(moment[1])
        numbers.append(last)  # last: whoever looks meanwhile goes by this one
        if len(numbers) >= _MOST_MARKS:
            self._columns = numbers[1::2], times[1::2], walls[1::2]
            self._stride *= 2

    def find(self, number: int) -> tuple[float, float] | None:
        """Say when a number was given out, on both clocks; ``None``: it was not yet."""
        numbers, times, walls = self._columns
        at = bisect.bisect_left(numbers, number)
        return (times[at], walls[at]) if at < len(numbers) else None


class Notes:
    """The unusual events of one task, in order.

    Attributes:
        name: What people call the task.
        entries: When, and what; events that many tasks share are one object.
        left_out: Events in the middle that were forgotten.
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
