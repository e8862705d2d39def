"""Runs workers on AWS: launchers, profiles, and a monitor of all workers of an account.

``Batch`` launches workers in AWS Batch, ``Fargate`` on AWS Fargate without it, ``EC2`` on EC2
instances of their own, and ``Lambda`` in AWS Lambda. ``Profile`` has the settings of an account and
region that ``cloudexec up`` writes, and ``Packages`` says what workers have installed. ``Monitor``
lists executors, jobs, logs and costs, and stops jobs. The other names are the records that
``Monitor`` returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cloudexec._aws.profile import Profile
from cloudexec._environment.packages import Packages
from cloudexec._launchers.batch import Batch
from cloudexec._launchers.ec2 import EC2
from cloudexec._launchers.fargate import Fargate
from cloudexec._launchers.lambda_ import Lambda

if TYPE_CHECKING:
    from cloudexec._aws.monitor import Monitor
    from cloudexec._aws.records import (
        AttemptInfo,
        CostReport,
        ExecutorCost,
        ExecutorInfo,
        JobInfo,
        LogLine,
    )
    from cloudexec._runs.info import RunInfo

__all__ = [
    "EC2",
    "AttemptInfo",
    "Batch",
    "CostReport",
    "ExecutorCost",
    "ExecutorInfo",
    "Fargate",
    "JobInfo",
    "Lambda",
    "LogLine",
    "Monitor",
    "Packages",
    "Profile",
    "RunInfo",
]


def __getattr__(name: str) -> Any:
    # Names are imported at first use, because the AWS SDK takes long to import.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "Monitor":
        from cloudexec._aws.monitor import Monitor

        return Monitor
    if name == "RunInfo":
        from cloudexec._runs.info import RunInfo

        return RunInfo
    from cloudexec._aws import records

    return getattr(records, name)
