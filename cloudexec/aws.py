"""AWS: the launcher, profiles, and what sees and stops the workers of an account.

``Batch`` launches workers; ``Profile`` says where; ``Monitor`` lists executors, jobs, logs and
costs, and stops what runs; the other names are the records that it returns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cloudexec._aws.profile import Profile
from cloudexec._launchers.batch import Batch

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

__all__ = [
    "AttemptInfo",
    "Batch",
    "CostReport",
    "ExecutorCost",
    "ExecutorInfo",
    "JobInfo",
    "LogLine",
    "Monitor",
    "Profile",
]


def __getattr__(name: str) -> Any:
    # The SDK is loaded by those that use it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "Monitor":
        from cloudexec._aws.monitor import Monitor

        return Monitor
    from cloudexec._aws import records

    return getattr(records, name)
