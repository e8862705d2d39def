"""Where a pool of slots reports what came of its tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cloudexec._objects.places import Place
from cloudexec.worker.child import Child
from cloudexec.worker.tasks import Failure

__all__ = ["Answers", "ResultBlob"]


@dataclass(slots=True)
class ResultBlob:
    """A part of a result, in a file that is open here.

    Attributes:
        fd: Of the file.
        place: Where in it.
        owner: The slot that wants to know when it has been taken; ``None``: the file is ours.
    """

    fd: int
    place: Place
    owner: Child | None = None


class Answers(Protocol):
    """Where the pool's answers go: the session, or a test."""

    def result(self, lease: int, payload: bytes, seconds: float) -> None:
        """A task returned."""

    def delivered(self, lease: int, seconds: float) -> None:
        """A task returned something large that has reached the client already."""

    def failure(self, failure: Failure) -> None:
        """An attempt failed."""

    def returned(self, lease: int) -> None:
        """A task is handed back unstarted."""

    def output(self, lease: int, number: int, stream: int, data: bytes) -> bool:
        """A task printed; False asks to hold the slot's answers until ``resume_output``."""

    def ready(self) -> None:
        """The first slot is ready; ``announced`` is to be called when the client was told."""

    def groups_changed(self) -> None:
        """Slots came or went."""

    def initializer_failed(self, payload: bytes) -> None:
        """The initializer raised, or killed its slot time and again."""

    def composed(
        self, lease: int, seconds: float, head: bytes, blobs: Sequence[ResultBlob], *, keep: bool
    ) -> None:
        """A task returned something large, which is in files; it is to be kept here, or sent."""

    def wake(self) -> None:
        """There is something to send."""
