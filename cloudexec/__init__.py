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
    JournalError,
    JournalLockedError,
    JournalVersionError,
    LaunchError,
    NestingError,
    PayloadError,
    PayloadTooLargeError,
    PlatformError,
    ProtocolError,
    QueueFullError,
    RefLostError,
    RemoteTraceback,
    StageError,
    TaskTimeoutError,
    WorkerLostError,
)

# All other names are imported at first use, so that importing the package costs little more than
# importing a process pool does. Workers import the package too, and need no executor.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from cloudexec._executor import BatchExecutor, OptionsView
    from cloudexec._future import BatchFuture
    from cloudexec._graph import Graph, Node, Stage, stage
    from cloudexec._graph_report import StageReport
    from cloudexec._launchers.base import Cost, LauncherCounts, LaunchTimes, WorkerCapacity
    from cloudexec._launchers.batch import Batch
    from cloudexec._launchers.ec2 import EC2
    from cloudexec._launchers.fallback import Fallback
    from cloudexec._launchers.fargate import Fargate
    from cloudexec._launchers.lambda_ import Lambda
    from cloudexec._launchers.local import Local
    from cloudexec._objects.options import ObjectOptions
    from cloudexec._objects.ref import Ref
    from cloudexec._run import run
    from cloudexec._runs.run import Run, run_script
    from cloudexec._stats import ExecutorStats, SizeCounts, TaskCounts, WorkerCounts
    from cloudexec._story import StoryEvent, TaskStory

    __version__: str

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
    "EC2",
    "ExecutorStats",
    "Fallback",
    "Fargate",
    "Graph",
    "InitializerError",
    "JournalError",
    "JournalLockedError",
    "JournalVersionError",
    "Lambda",
    "LaunchError",
    "LaunchTimes",
    "LauncherCounts",
    "Local",
    "NestingError",
    "Node",
    "ObjectOptions",
    "OptionsView",
    "PayloadError",
    "PayloadTooLargeError",
    "PlatformError",
    "ProtocolError",
    "QueueFullError",
    "Ref",
    "RefLostError",
    "RemoteTraceback",
    "Run",
    "SizeCounts",
    "Stage",
    "StageError",
    "StageReport",
    "StoryEvent",
    "TaskCounts",
    "TaskStory",
    "TaskTimeoutError",
    "WorkerCapacity",
    "WorkerCounts",
    "WorkerLostError",
    "run",
    "run_script",
    "stage",
]

_LATER = {
    "_executor": ("BatchExecutor", "OptionsView"),
    "_future": ("BatchFuture",),
    "_graph": ("Graph", "Node", "Stage", "stage"),
    "_graph_report": ("StageReport",),
    "_launchers.base": ("Cost", "LaunchTimes", "LauncherCounts", "WorkerCapacity"),
    "_launchers.batch": ("Batch",),
    "_launchers.fallback": ("Fallback",),
    "_launchers.ec2": ("EC2",),
    "_launchers.fargate": ("Fargate",),
    "_launchers.lambda_": ("Lambda",),
    "_launchers.local": ("Local",),
    "_objects.options": ("ObjectOptions",),
    "_objects.ref": ("Ref",),
    "_run": ("run",),
    "_runs.run": ("Run", "run_script"),
    "_stats": ("ExecutorStats", "SizeCounts", "TaskCounts", "WorkerCounts"),
    "_story": ("StoryEvent", "TaskStory"),
}


def __getattr__(name: str) -> object:
    for module, names in _LATER.items():
        if name in names:
            from importlib import import_module

            found = import_module(f"cloudexec.{module}")
            globals().update({each: getattr(found, each) for each in names})
            return globals()[name]
    if name == "__version__":
        from importlib.metadata import version

        return globals().setdefault(name, version("cloudexec"))
    raise AttributeError(f"module 'cloudexec' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
