"""One line of the output: what a row was called with and what became of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class RowError:
    """What a row's call raised."""

    type: str
    """The exception's class, with its module unless it is a builtin."""
    message: str
    """``str()`` of the exception."""
    traceback: str | None
    """The traceback on the worker, when the call got that far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """The outcome of one row."""

    row: int
    """The row's number, from 1."""
    input: object
    """The row's values by name, or the file's path."""
    value: object
    """What the call returned; None if it raised."""
    error: RowError | None
    """What the call raised, or None."""
    seconds: float | None
    """How long the call ran on the worker."""
    worker: str | None
    """The worker that ran it."""
    attempts: int | None
    """How often it was started; more than 1 when a worker was lost."""


@dataclass(frozen=True, slots=True)
class Recorded:
    """What matters of a record that stands in an existing output."""

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
    """An existing file was not written by this command; the message says what is there."""


class Format(Protocol):
    """How records are written and found again."""

    def header(self) -> bytes:
        """Return what stands before the first record, if anything."""

    def encode(self, record: Record) -> bytes:
        """Write a record with its line end."""

    def widen(self, record: Record) -> bool:
        """Make room for what a record holds; return whether the header changed by it."""

    def widened(self, lines: Iterable[bytes]) -> Iterator[bytes]:
        """Write an existing output anew, with the header as it is now."""

    def key(self, shown: object) -> int:
        """Digest a row's input, as ``entries`` does for recorded ones."""

    def entries(self, lines: Iterable[bytes]) -> Iterator[Entry]:
        """Read an existing output up to a record that was torn by a crash.

        Raises:
            ForeignOutputError: If the lines were not written by this command.
        """
