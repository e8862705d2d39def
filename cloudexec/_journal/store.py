"""The interface of what a journal is kept in: a file or a bucket."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cloudexec._records import Payload

if TYPE_CHECKING:
    from cloudexec._journal.packing import Stored

__all__ = ["Found", "Record", "Store"]


class Record(NamedTuple):
    """One result that is to be written into a journal."""

    key: bytes
    """The key of the call."""
    function: bytes
    """Digest of the function's name and of the program's code."""
    name: str
    """The function's module and qualified name."""
    seconds: float
    """Seconds that the call ran."""
    payload: Payload


class Found(NamedTuple):
    """One result that was found in a journal, and the seconds that its call ran."""

    seconds: float
    payload: bytes | Stored


class Store(Protocol):
    """Stores results and, if ``keeps_state``, the state that an executor needs in its next run.

    Any thread may call ``find``. The other methods are never called by two threads at once.
    """

    name: str
    """The journal's name in messages."""
    holds_back: bool
    """Whether a result is given to its future only after ``write`` has returned. This is so where
    writing takes a moment only."""
    keeps_state: bool
    """Whether ``put_state`` is supported, because the store is private to this user."""
    interval: float
    """Seconds that should pass between two calls of ``write``."""
    earlier: int
    """Number of results of earlier runs."""
    versions: dict[str, dict[bytes, int]]
    """Numbers of results of earlier runs, by the function's name and by ``Record.function``."""
    programs: dict[bytes, bytes]
    """Manifests of the programs of earlier runs, by digest, as ``put_program`` was given them."""

    def find(self, key: bytes) -> Found | None:
        """Return a verified result of an earlier run, or ``None``; damage is logged."""

    def write(self, records: Sequence[Record]) -> None:
        """Write results. They survive the end of this process once this returns.

        Raises:
            JournalError: If some or all of the results could not be written.
        """

    def sync(self) -> None:
        """Make everything that was written survive a loss of power; cheap if nothing is new.

        Raises:
            JournalError: If that is not possible.
        """

    def get_state(self, name: str) -> bytes | None:
        """Return the value that this run or an earlier one put under a name last."""

    def put_state(self, name: str, value: bytes | None) -> None:
        """Store a value under a name; it survives a loss of power once this returns.

        A value may hold secrets, as the file is readable by this user only.

        Args:
            name: The name.
            value: The value; ``None`` removes the one that is there.

        Raises:
            JournalError: If that is not possible, or ``keeps_state`` is false.
        """

    def put_program(self, digest: bytes, value: bytes) -> None:
        """Store the manifest of a program under its digest.

        Raises:
            JournalError: If that is not possible.
        """

    def close(self) -> None:
        """Sync, and release the journal for other programs."""
