"""What the engine asks of the rest of AWS, and how scheduling sees queues and environments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from cloudexec.testing._aws.jobs import Job, JobSpec

__all__ = ["EnvironmentView", "Platform", "QueueView"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentView:
    """A compute environment as scheduling sees it."""

    arn: str
    name: str
    kind: str
    max_vcpus: float
    enabled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueView:
    """A job queue as scheduling sees it."""

    arn: str
    name: str
    priority: int
    environments: tuple[EnvironmentView, ...]
    time_limits: tuple[tuple[str, float], ...]
    """Reason and AWS seconds at the head of the queue, after which a job is cancelled."""


class Platform(Protocol):
    """What the engine asks of the rest of AWS; see ``resources.MotoPlatform``."""

    def queue(self, arn: str) -> QueueView | None:
        """The queue, ``None`` where it has been deleted."""

    def task_environment(self, job: Job) -> Mapping[str, str]:
        """Variables that the task's agent sets."""

    def secrets(self, spec: JobSpec) -> Mapping[str, str]:
        """The values of the definition's secrets.

        Raises:
            StartError: If one cannot be read; the text is the job's status reason.
        """
