"""Run functions on many machines through the interface of ``concurrent.futures``.

``BatchExecutor`` is a drop-in for ``concurrent.futures.ProcessPoolExecutor``: the same worker runs
as subprocesses of this machine by default, and in containers elsewhere with a launcher.
"""

from cloudexec._errors import (
    AwsError,
    BrokenBatchExecutor,
    BudgetExceededError,
    CloudexecError,
    ConfigError,
    DependencyError,
    InitializerError,
    LaunchError,
    PayloadError,
    PayloadTooLargeError,
    ProtocolError,
    RemoteTraceback,
    StageError,
    TaskTimeoutError,
    WorkerLostError,
)
from cloudexec._executor import BatchExecutor, OptionsView
from cloudexec._future import BatchFuture
from cloudexec._graph import Graph, Node, Stage, run, stage
from cloudexec._launchers.base import Cost, LaunchTimes
from cloudexec._launchers.batch import Batch
from cloudexec._launchers.local import Local
from cloudexec._stats import ExecutorStats, TaskCounts, WorkerCounts

__all__ = [
    "AwsError",
    "Batch",
    "BatchExecutor",
    "BatchFuture",
    "BrokenBatchExecutor",
    "BudgetExceededError",
    "CloudexecError",
    "ConfigError",
    "Cost",
    "DependencyError",
    "ExecutorStats",
    "Graph",
    "InitializerError",
    "LaunchError",
    "LaunchTimes",
    "Local",
    "Node",
    "OptionsView",
    "PayloadError",
    "PayloadTooLargeError",
    "ProtocolError",
    "RemoteTraceback",
    "Stage",
    "StageError",
    "TaskCounts",
    "TaskTimeoutError",
    "WorkerCounts",
    "WorkerLostError",
    "run",
    "stage",
]
