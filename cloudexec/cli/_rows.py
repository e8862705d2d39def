"""The rows of an input, each of which becomes one call, and the interface of an input."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

Arguments = tuple[tuple[object, ...], dict[str, object]]


@dataclass(frozen=True, slots=True)
class Row:
    """One row or file of the input."""

    number: int
    """The row's number, from 1, in messages and in the output."""
    shown: object
    """The input as the output records it: a row's values by name, or a file's path."""
    passed: Mapping[str, object] | object
    """The input as it is passed: values by name, or a file's path as ``str`` or ``Path``."""


class Source(Protocol):
    """An input that has been checked as far as it can be before the first call."""

    @property
    def name(self) -> str:
        """The input's name in messages."""

    @property
    def total(self) -> int | None:
        """Number of rows; ``None`` for a stream."""

    @property
    def columns(self) -> tuple[str, ...] | None:
        """The names that rows have; ``None`` if a row is a single value, or names vary."""

    def bind(self, row: Row) -> Arguments:
        """Turn a row into a call's arguments."""

    def describe(self) -> str:
        """Say, in words, what the input contains, for ``--dry-run``."""

    def rows(self) -> Iterator[Row]:
        """Read the rows in order; each call begins at the start, except with a stream.

        Raises:
            CommandError: If a row is malformed.
        """
