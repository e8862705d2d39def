"""What a journal is kept in: an interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from cloudexec._payload import Payload

if TYPE_CHECKING:
    from cloudexec._journal.packing import Stored

__all__ = ["Found", "Record", "Store"]


class Record(NamedTuple):
    """One result, on its way into a journal."""

    key: bytes
    """Names the call."""
    function: bytes
    """Digest of the function's name and of the program's code."""
    name: str
    """What the function is called, whatever its code is."""
    seconds: float
    """That the call ran."""
    payload: Payload


class Found(NamedTuple):
    """One result that was in a journal."""

    seconds: float
    payload: bytes | Stored


class Store(Protocol):
    """Keeps results and, where ``keeps_state``, what an executor wants to find again.

    ``find`` is called in any thread, all else in one at a time.
    """

    name: str
    """The journal, as messages call it."""
    holds_back: bool
    """Whether results are shown to nobody before ``write`` has returned: it takes a moment only."""
    keeps_state: bool
    """Whether there is a private place for ``put_state``."""
    interval: float
    """Seconds that should pass between two calls of ``write``."""
    earlier: int
    """Results of earlier runs."""
    versions: dict[str, dict[bytes, int]]
    """Of earlier runs: how many results of each version of each function, by name and digest."""
    programs: dict[bytes, bytes]
    """The programs of earlier runs, as ``put_program`` was given them."""

    def find(self, key: bytes) -> Found | None:
        """Return a result of an earlier run, whole and verified, or ``None``; damage is logged."""

    def write(self, records: Sequence[Record]) -> None:
        """Keep results so that they outlive this process from the moment this returns.

        Raises:
            JournalError: If that is not possible; none of them, or not all, have been kept.
        """

    def sync(self) -> None:
        """Have everything outlive the machine's power too. Cheap where there is nothing new.

        Raises:
            JournalError: If that is not possible.
        """

    def get_state(self, name: str) -> bytes | None:
        """Return what was last put under a name, in this run or an earlier one."""

    def put_state(self, name: str, value: bytes | None) -> None:
        """Keep bytes under a name, or nothing any more; they outlive power loss when this returns.

        Secrets are safe in there as far as this user's files are: the file is private.

        Raises:
            JournalError: If that is not possible, or ``keeps_state`` is false.
        """

    def put_program(self, digest: bytes, value: bytes) -> None:
        """Keep what a program consists of, under its digest.

        Raises:
            JournalError: If that is not possible.
        """

    def close(self) -> None:
        """Sync, and let the next one have the journal."""
