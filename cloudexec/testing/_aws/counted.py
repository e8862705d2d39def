"""Counts down faults that happen a limited number of times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["take"]


def take(entries: list[list[object]], fits: Callable[[Any], bool]) -> Any:
    """Use up one count of an entry that fits, and drop the entry when its count is used up.

    Returns:
        The entry's first part; ``None`` if no entry fits.
    """
    for entry in entries:
        if fits(entry[0]):
            if isinstance(entry[1], int):
                if entry[1] <= 0:
                    continue
                entry[1] -= 1
                if entry[1] == 0:
                    entries.remove(entry)
            return entry[0]
    return None
