"""The records of an output: a row's input and the outcome of its call, and how they are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RowError:
    """The exception of a row's call."""

    type: str
    """The exception's class, with its module unless it is a builtin."""
    message: str
    """``str()`` of the exception."""
    traceback: str | None
    """The traceback on the worker; ``None`` if the call did not run there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The outcome of one row."""

    row: int
    """The row's number, from 1."""
    input: object
    """The row's values by name, or the file's path."""
    value: object
    """The value that the call returned; ``None`` if it raised."""
    error: RowError | None
    """The exception that the call raised; ``None`` if it returned."""
    seconds: float | None
    """Seconds that the call ran on the worker."""
    worker: str | None
    """The worker that ran the call."""
    attempts: int | None
    """How often the call was started; more than once if a worker was lost."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """The part of a record in an existing output that resuming needs."""

    row: int
    """The row's number."""
    key: int
    """A digest of the row's input."""
    has_failed: bool
    """Whether the row's call raised."""
    function: str
    """The function that was called."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A complete piece of an existing output."""

    raw: bytes
    """Its bytes, with the line end unless the file ends without one."""
    recorded: Recorded | None
    """The record; None for a header."""


class ForeignOutputError(Exception):
    """An existing file was not written by this command; the message says what it contains."""


class Format(Protocol):
    """The format of an output: how records are written and read back."""

    def header(self) -> bytes:
        """Return the bytes before the first record; they may be empty."""

    def encode(self, record: Record) -> bytes:
        """Return a record as bytes, with its line end."""

    def widen(self, record: Record) -> bool:
        """Add the columns that a record needs; return whether a written header is outdated now."""

    def widened(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """Yield an existing output again, with the present header."""

    def key(self, shown: object) -> int:
        """Digest a row's input; ``entries`` computes the same digest for recorded rows."""

    def entries(self, lines: Iterable[bytes]) -> Iterator[Entry]:
        """Read an existing output up to a record that is incomplete because of a crash.

        Raises:
            ForeignOutputError: If the lines were not written by this command.
        """
