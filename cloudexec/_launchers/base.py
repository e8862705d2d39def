"""The protocol between the executor and whatever starts its workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Contact", "LaunchEnd", "Launcher"]


@dataclass(frozen=True, slots=True)
class LaunchEnd:
    """How a launched worker's process ended.

    Attributes:
        reason: For people: exit code or signal, and the last lines it printed.
        killed: Whether it was killed from outside.
        fatal: Whether trying again cannot help.
    """

    reason: str
    killed: bool = False
    fatal: bool = False


@dataclass(frozen=True, slots=True)
class Contact:
    """What a worker must know to dial back.

    Attributes:
        target: A gRPC target: ``unix:/path`` or ``host:port``.
        executor_id: Which executor.
        key: Shared secret of the enrolment.
        certificate_sha256: Fingerprint to pin, in hex; empty for a Unix socket.
    """

    target: str
    executor_id: str
    key: bytes
    certificate_sha256: str = ""

    def __repr__(self) -> str:
        return f"Contact(target={self.target!r}, executor_id={self.executor_id!r})"


class Launcher(Protocol):
    """Starts and stops workers. All methods are called on the executor's loop thread."""

    def slots_per_worker(self, max_workers: int) -> int:
        """Say how many slots one worker has, of ``max_workers`` in all."""

    def needs_network(self) -> bool:
        """Say whether workers are elsewhere, so that a Unix socket will not do."""

    def launch(
        self, contact: Contact, launch_id: str, slots: int, on_end: Callable[[LaunchEnd], None]
    ) -> None:
        """Start one worker; ``on_end`` is called once, when its process has ended.

        Raises:
            LaunchError: If it cannot be started at all.
        """

    def terminate(self, launch_id: str) -> None:
        """Stop a worker's process at once; nothing happens if it has ended."""

    def clean_up(self, slot_groups: list[int]) -> None:
        """End what is left of a worker's process groups, if they are on this machine."""

    def describe(self) -> str:
        """Say in a few words what this launches."""
