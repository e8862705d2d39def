"""What is told of a run: a record for people and programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from cloudexec._aws.records import Record

__all__ = ["RunInfo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo(Record):
    """A run: a program on one machine in AWS."""

    name: str
    state: str
    """``"preparing"``: a client sends files. ``"not started"``: a client has died before it started
    a machine. ``"waiting"`` for a machine, ``"starting"``, ``"running"``. ``"succeeded"`` with exit
    code 0, ``"failed"``, or ``"stopped"`` by somebody. ``"unknown"``: AWS has forgotten it."""
    exit_code: int | None
    """Of the program; 128 + the signal's number if a signal ended it. 122: the program succeeded,
    and a file that it has written is not in the bucket. 125: the machine could not start the
    program, or the run was stopped before. ``None``: it has none, or has not ended."""
    reason: str
    """Why it waits, or how it ended; empty while there is nothing to say."""
    command: str
    user: str
    project: str
    on: str
    """Where its machine is: ``"batch"``, ``"ec2"`` or ``"fargate"``."""
    vcpus: float
    memory_mib: int
    gpus: int
    spot: bool
    outputs: Sequence[str]
    """Folders whose files come back, and files that do."""
    created_at: datetime
    started_at: datetime | None
    """Of the last attempt."""
    stopped_at: datetime | None
    attempts: int
    """Attempts of its machine that have ended."""
    workers: int
    """Jobs of executors in it that have not ended."""
    run_seconds: float
    """Of all attempts, up to now."""
    machine_usd: float
    """List price of its machine, up to now."""
    workers_usd: float
    """List price of the workers that executors in it have started, up to now."""
    is_estimate: bool
    """Whether the cost is less sure than a list price."""

    @property
    def is_active(self) -> bool:
        """Whether it has not ended."""
        return self.state in ("preparing", "waiting", "starting", "running")

    @property
    def cost_usd(self) -> float:
        """List price of its machine and workers, up to now."""
        return self.machine_usd + self.workers_usd


RunInfo.__module__ = "cloudexec.aws"
