"""Base classes for a launcher of workers on another platform.

Derive a frozen dataclass from ``PlatformLauncher``, whose fields are the settings, and a class from
``Platform``, whose five methods make requests to the platform. The executor does all else: it
decides when to launch, repeats failed requests, explains why workers do not start, computes costs,
and ends workers. ``cloudexec.testing.check_launcher`` tests whether a launcher behaves as the
executor expects.
"""

from cloudexec._config import WorkerCapacity
from cloudexec._errors import PlatformError
from cloudexec._launchers.fallback import Fallback
from cloudexec._launchers.platform import (
    ExecutorInfo,
    Inspection,
    JobRequest,
    JobStatus,
    Phase,
    Platform,
    Reason,
    Site,
    Submitted,
    Target,
    WaitingJob,
    WorkerEnd,
    WorkerStatus,
)
from cloudexec._launchers.platform_launcher import PlatformLauncher
from cloudexec._pricing import WorkerPrice

__all__ = [
    "ExecutorInfo",
    "Fallback",
    "Inspection",
    "JobRequest",
    "JobStatus",
    "Phase",
    "Platform",
    "PlatformError",
    "PlatformLauncher",
    "Reason",
    "Site",
    "Submitted",
    "Target",
    "WaitingJob",
    "WorkerCapacity",
    "WorkerEnd",
    "WorkerPrice",
    "WorkerStatus",
]
