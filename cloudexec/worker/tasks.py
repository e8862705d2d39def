"""A task on this worker, and what is known of an attempt that failed."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "KILLED",
    "OUTGREW",
    "PICKLE_FAILED",
    "RECLAIMED",
    "SLOT_LOST",
    "TIMED_OUT",
    "UNPICKLE_FAILED",
    "Failure",
    "Requirements",
    "WorkItem",
]

UNPICKLE_FAILED, PICKLE_FAILED = 2, 3
SLOT_LOST, TIMED_OUT, KILLED, RECLAIMED, OUTGREW = 4, 5, 6, 7, 8
"""``Failure.Kind`` of the wire, where the slot itself cannot say what happened."""


@dataclass(frozen=True, slots=True)
class Requirements:
    """What few tasks have.

    Attributes:
        env: Variables that it has while it runs.
        memory: Bytes that its processes may take; 0: no limit.
        last: Whether its slot ends with it.
    """

    env: dict[str, str]
    memory: int = 0
    last: bool = False


@dataclass(slots=True)
class WorkItem:
    """A task on this worker."""

    lease: int
    function: int
    payload: bytes
    number: int
    seconds: float
    timeout: float = 0.0
    blobs: tuple[int, ...] | None = None  # of a composed payload
    keep: bool = False
    spared: int = 0
    recalled: bool = False  # to be handed back rather than sent once more
    kill: int = 0  # a Failure kind: its slot is to be killed once it holds nothing else
    requirements: Requirements | None = None


@dataclass(slots=True)
class Failure:
    """An attempt without a result, and what is known about it."""

    lease: int
    kind: int
    payload: bytes = b""
    message: str = ""
    output: str = ""
    exit_code: int = 0
    peak_memory_bytes: int = 0
    seconds: float = 0.0
    out_of_memory: bool = False
