"""A task on this worker, and the failure of an attempt."""

from __future__ import annotations

from cloudexec._record_class import record

__all__ = [
    "KILLED",
    "OUTGREW",
    "PICKLE_FAILED",
    "RECLAIMED",
    "SESSION_OVER",
    "SLOT_LOST",
    "TIMED_OUT",
    "UNPICKLE_FAILED",
    "Failure",
    "Requirements",
    "WorkItem",
]

UNPICKLE_FAILED, PICKLE_FAILED = 2, 3
SLOT_LOST, TIMED_OUT, KILLED, RECLAIMED, OUTGREW = 4, 5, 6, 7, 8
"""Kinds of ``Failure`` on the wire that the supervisor reports, as the slot itself cannot."""
SESSION_OVER = (
    "a worker on AWS Lambda has {session:.0f} s for its tasks, and Lambda allows 15 minutes at "
    "most: divide the task, or run it with Fargate(...), Batch(...) or another launcher"
)
"""The message of ``TIMED_OUT`` if not the task's own time is over, but that of every worker."""


@record
class Requirements:
    """What few tasks have.

    Attributes:
        env: Environment variables that are set while the task runs.
        memory: Bytes of memory that its processes may take; 0 for no limit.
        last: Whether its slot ends after it.
    """

    env: dict[str, str]
    memory: int = 0
    last: bool = False


@record(frozen=False)
class WorkItem:
    """A task on this worker."""

    lease: int
    function: int
    payload: bytes
    number: int
    seconds: float
    timeout: float = 0.0
    blobs: tuple[int, ...] | None = None  # the blobs of a composed payload
    keep: bool = False
    spared: int = 0
    recalled: bool = False  # to be handed back rather than sent once more
    kill: int = 0  # a Failure kind: its slot is to be killed once it holds nothing else
    requirements: Requirements | None = None


@record(frozen=False)
class Failure:
    """An attempt without a result, and its cause as far as it is known."""

    lease: int
    kind: int
    payload: bytes = b""
    message: str = ""
    output: str = ""
    exit_code: int = 0
    peak_memory_bytes: int = 0
    seconds: float = 0.0
    out_of_memory: bool = False
