"""The parts of AWS that the engine uses, and the data on queues and environments that it needs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from cloudexec.testing._aws.jobs import Job, JobSpec

__all__ = ["EnvironmentView", "Platform", "QueueView"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentView:
    """A compute environment, with the data that scheduling needs."""

    arn: str
    name: str
    kind: str
    max_vcpus: float
    enabled: bool
    has_gpus: bool = False
    """Whether some of its instance types have GPUs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueView:
    """A job queue, with the data that scheduling needs."""

    arn: str
    name: str
    priority: int
    environments: tuple[EnvironmentView, ...]
    time_limits: tuple[tuple[str, float], ...]
    """Reason for waiting at the head of the queue, and AWS seconds until the job is cancelled."""


class Platform(Protocol):
    """The parts of AWS that the engine uses; see ``resources.MotoPlatform``."""

    def queue(self, arn: str) -> QueueView | None:
        """Return the queue; ``None`` if it was deleted."""

    def task_environment(self, job: Job) -> Mapping[str, str]:
        """Return the variables that the task's agent sets."""

    def secrets(self, spec: JobSpec) -> Mapping[str, str]:
        """Return the values of the definition's secrets.

        Raises:
            StartError: If one cannot be read; the text is the job's status reason.
        """
