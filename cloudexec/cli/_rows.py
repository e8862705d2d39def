"""What an input yields: numbered rows, each to become one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

Arguments = tuple[tuple[object, ...], dict[str, object]]


@dataclass(frozen=True, slots=True)
class Row:
    """One row or file of the input."""

    number: int
    """Its number, from 1: what messages and the output call it."""
    shown: object
    """The input as the output records it: a row's values by name, or a file's path."""
    passed: Mapping[str, object] | object
    """What the call is made from: values by name, or a file's path in the type it is passed as."""


class Source(Protocol):
    """An input that has been checked as far as it can be before the first call."""

    @property
    def name(self) -> str:
        """The input as messages call it."""

    @property
    def total(self) -> int | None:
        """How many rows it has; None for a stream."""

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The names that rows have, or None when a row is a single value or names vary."""

    def bind(self, row: Row) -> Arguments:
        """Turn a row into a call's arguments."""

    def describe(self) -> str:
        """Say what was found in it, for ``--dry-run``."""

    def rows(self) -> Iterator[Row]:
        """Read the rows in order, each time anew unless it is a stream.

        Raises:
            CommandError: If a row is malformed.
        """
