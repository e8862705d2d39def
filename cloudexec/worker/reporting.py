"""The interface to which the slots report the outcomes of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from cloudexec._objects.places import Place
from cloudexec._record_class import record
from cloudexec.worker.child import Child
from cloudexec.worker.tasks import Failure

__all__ = ["Answers", "ResultBlob"]


@record(frozen=False)
class ResultBlob:
    """A part of a result, in a file that is open here.

    Attributes:
        fd: The file's descriptor.
        place: The place in the file.
        owner: The slot that is told when the part has been taken; ``None`` if the file belongs to
            the supervisor.
    """

    fd: int
    place: Place
    owner: Child | None = None


class Answers(Protocol):
    """Takes the answers of the pool: the outbox, or a test."""

    def result(self, lease: int, payload: bytes, seconds: float) -> None:
        """Take the result of a task."""

    def delivered(self, lease: int, seconds: float) -> None:
        """Take the message that a large result has been delivered to the client already."""

    def failure(self, failure: Failure) -> None:
        """Take the failure of an attempt."""

    def returned(self, lease: int) -> None:
        """Hand a task that has not begun back to the client."""

    def output(self, lease: int, number: int, stream: int, data: bytes) -> bool:
        """Take the output of a task; return false to pause the slot until ``resume_output``."""

    def ready(self) -> None:
        """Note that the first slot is ready; call ``announced`` once the client was told."""

    def groups_changed(self) -> None:
        """Note that the process groups of the slots have changed."""

    def initializer_failed(self, payload: bytes) -> None:
        """Note that the initializer raised, or killed its slot repeatedly."""

    def composed(
        self, lease: int, seconds: float, head: bytes, blobs: Sequence[ResultBlob], *, keep: bool
    ) -> None:
        """Take a large result, which is in files, to be kept here or sent."""

    def wake(self) -> None:
        """Note that there is something to send."""
