"""What a launcher for another platform is written with: settings, and five requests to it.

Derive a frozen dataclass from ``PlatformLauncher``, whose fields are the settings, and a class from
``Platform``. The executor does the rest: it decides when to launch, tries again, tells why workers
do not come, counts what they cost, and ends them. ``cloudexec.testing.check_launcher`` runs a
launcher through what the executor expects of it.
"""

from cloudexec._config import WorkerCapacity
from cloudexec._errors import PlatformError
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
