"""The exceptions that cloudexec raises, as one tree.

CloudexecError
├── ConfigError (also ValueError)        a setting is wrong
├── LaunchError                          workers did not start, or did not connect to the client
│   └── BudgetExceededError              more workers would cost more than max_cost_usd
├── PlatformError                        a platform refused a request, or could not be reached
│   └── AwsError                         AWS did so
├── WorkerLostError (also BrokenProcessPool)
│                                        the process of the task died in each allowed attempt
├── TaskTimeoutError (also TimeoutError) the task ran longer than its own time limit
├── DependencyError                      a call was not run, as one that it waits for failed
├── StageError                           a stage of a graph failed
├── PayloadError (also PicklingError)    a value could not be pickled or unpickled
│   └── PayloadTooLargeError             a pickled value is too large
├── QueueFullError                       too many tasks are submitted and not done
├── NestingError (also RuntimeError)     an executor must not start here
├── RefLostError (also BrokenProcessPool)
│                                        the worker that kept a result was lost
├── JournalError                         a journal cannot be opened, read or written
│   ├── JournalLockedError               another program uses the journal
│   └── JournalVersionError              a newer version of cloudexec wrote the journal
├── ProtocolError                        client and worker disagree, for example on versions
└── BrokenBatchExecutor (also BrokenProcessPool)
    └── InitializerError                 the initializer raised in a worker

Errors are separate classes where a caller would react differently. Errors travel between
processes, so each class pickles: it takes one positional message, and all other arguments are
keyword-only with a default.

Errors that say that a process died are also caught by ``except BrokenProcessPool``, as programs
that were written for a process pool expect. Importing ``concurrent.futures.process`` takes
milliseconds, so these classes derive from the base class of ``BrokenProcessPool``,
``BrokenExecutor``, until the first of these exceptions is made. No exception can be caught earlier.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    from concurrent.futures.process import BrokenProcessPool as BrokenExecutor
else:
    from concurrent.futures import BrokenExecutor

__all__ = [
    "AwsError",
    "BrokenBatchExecutor",
    "BudgetExceededError",
    "CloudexecError",
    "ConfigError",
    "DependencyError",
    "InitializerError",
    "JournalError",
    "JournalLockedError",
    "JournalVersionError",
    "LaunchError",
    "NestingError",
    "PayloadError",
    "PayloadTooLargeError",
    "PlatformError",
    "ProtocolError",
    "QueueFullError",
    "RefLostError",
    "RemoteTraceback",
    "StageError",
    "TaskTimeoutError",
    "WorkerLostError",
]


class CloudexecError(Exception):
    """Base class of all exceptions that cloudexec itself raises.

    Attributes:
        message: What happened, why, and what to do about it.
    """

    def __init__(self, message: str = "", **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.__dict__.update(details)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, dict(self.__dict__)))

    def __str__(self) -> str:
        return self.message


def _rebuild(cls: type[CloudexecError], message: str, state: dict[str, Any]) -> CloudexecError:
    error = cls(message)
    error.__dict__.update(state)
    return error


class _LostProcessError(CloudexecError, BrokenExecutor):
    """Base class of the exceptions that ``except BrokenProcessPool`` catches."""

    def __new__(cls, *args: Any, **details: Any) -> Self:
        if BrokenExecutor in _LostProcessError.__bases__:
            try:
                from concurrent.futures.process import BrokenProcessPool
            except RuntimeError:
                # The program has ended, and waits for its tasks: the module cannot be imported any
                # more, so nothing can ask for the class either.
                return super().__new__(cls, *args, **details)
            _LostProcessError.__bases__ = (CloudexecError, BrokenProcessPool)
        return super().__new__(cls, *args, **details)


class ConfigError(CloudexecError, ValueError):
    """A setting is out of range; the message names the setting, its value and the range."""


class LaunchError(CloudexecError):
    """Workers could not be started, or did not connect to the client in time.

    Attributes:
        reason: The reason in the platform's own words, or the last lines that a worker printed.
    """

    def __init__(self, message: str = "", *, reason: str = "") -> None:
        super().__init__(message, reason=reason)
        self.reason = reason


class BudgetExceededError(LaunchError):
    """More work would cost more than ``max_cost_usd``.

    Attributes:
        cost_usd: Estimated cost so far, in USD.
        max_cost_usd: The limit, in USD.
    """

    def __init__(
        self,
        message: str = "",
        *,
        cost_usd: float | None = None,
        max_cost_usd: float | None = None,
    ) -> None:
        super().__init__(message)
        self.cost_usd = cost_usd
        self.max_cost_usd = max_cost_usd


class PlatformError(CloudexecError):
    """The platform that runs a launcher's workers refused a request, or could not be reached.

    Attributes:
        transient: Whether the same request may succeed a little later.
        uncertain: Whether the request may have been carried out although no answer came.
    """

    def __init__(
        self, message: str = "", *, transient: bool = False, uncertain: bool = False
    ) -> None:
        super().__init__(message)
        self.transient = transient
        self.uncertain = uncertain

    @property
    def may_pass(self) -> bool:
        """Whether the same request may succeed if it is made again."""
        return self.transient


class AwsError(PlatformError):
    """AWS refused a request, or could not be reached.

    Attributes:
        code: AWS's own error code, such as ``"AccessDeniedException"``. cloudexec adds the codes
            ``"Unreachable"`` and ``"NoCredentials"``.
        operation: The call, as IAM names it, such as ``"batch:SubmitJob"``.
        transient: Whether the same call may succeed a little later.
        expired: Whether the credentials have expired.
    """

    def __init__(
        self,
        message: str = "",
        *,
        code: str = "",
        operation: str = "",
        transient: bool = False,
        expired: bool = False,
    ) -> None:
        super().__init__(message, transient=transient)
        self.code = code
        self.operation = operation
        self.expired = expired

    @property
    def may_pass(self) -> bool:
        """Whether the same call may succeed if repeated; expired credentials are then renewed."""
        return self.transient or self.expired


class WorkerLostError(_LostProcessError):
    """The process that ran the task died in each attempt that the task is allowed.

    The class is caught by ``except BrokenProcessPool``, for programs written for a process pool.
    Unlike a process pool this executor still works: all other tasks go on, and more can be
    submitted.

    Attributes:
        worker_id: The worker of the last attempt, or ``None``.
        attempts: Number of lost attempts.
        exit_code: Exit code of the task's process in the last attempt, or ``None``.
        signal: Number of the signal that ended that process, or ``None``.
        peak_memory_bytes: Largest resident size of that process in bytes, or ``None``.
        out_of_memory: Whether that process was killed because memory ran out.
        output: The last lines that the task printed.
    """

    def __init__(
        self,
        message: str = "",
        *,
        worker_id: str | None = None,
        attempts: int = 0,
        exit_code: int | None = None,
        signal: int | None = None,
        peak_memory_bytes: int | None = None,
        out_of_memory: bool = False,
        output: str = "",
    ) -> None:
        super().__init__(message)
        self.worker_id = worker_id
        self.attempts = attempts
        self.exit_code = exit_code
        self.signal = signal
        self.peak_memory_bytes = peak_memory_bytes
        self.out_of_memory = out_of_memory
        self.output = output


class TaskTimeoutError(CloudexecError, TimeoutError):
    """The task ran longer than its own ``timeout``, so its process was killed and replaced.

    Attributes:
        worker_id: The worker that ran the task.
        seconds: Seconds that the task had run.
        output: The last lines that the task printed.
    """

    def __init__(
        self,
        message: str = "",
        *,
        worker_id: str | None = None,
        seconds: float | None = None,
        output: str = "",
    ) -> None:
        super().__init__(message)
        self.worker_id = worker_id
        self.seconds = seconds
        self.output = output


class DependencyError(CloudexecError):
    """A future among the arguments of a call failed, so the call was not run.

    The ``__cause__`` is the first failure, even if several calls that depend on one another failed.

    Attributes:
        dependency: Position of the future among the call's arguments, such as ``"argument 0"``,
            ``"argument 1, item 7"`` or ``"keyword 'scale'"``.
        stage: Name of the stage that failed, if the call belongs to a graph.
    """

    def __init__(self, message: str = "", *, dependency: str = "", stage: str = "") -> None:
        super().__init__(message)
        self.dependency = dependency
        self.stage = stage


class StageError(CloudexecError):
    """A stage of a graph failed; the ``__cause__`` is the exception that it raised.

    Attributes:
        stage: Name of the stage.
    """

    def __init__(self, message: str = "", *, stage: str = "") -> None:
        super().__init__(message)
        self.stage = stage


class PayloadError(CloudexecError, pickle.PicklingError):
    """A callable, argument, result or exception could not be pickled or unpickled.

    The ``__cause__`` is the original error, or the text of its traceback if a worker raised it.
    """


class PayloadTooLargeError(PayloadError):
    """A pickled callable, argument or result is larger than a limit.

    Attributes:
        size_bytes: Size in bytes.
        limit_bytes: The limit in bytes.
    """

    def __init__(
        self, message: str = "", *, size_bytes: int | None = None, limit_bytes: int | None = None
    ) -> None:
        super().__init__(message)
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class NestingError(CloudexecError, RuntimeError):
    """An executor was made during the import of a module for a task, or in too deeply nested tasks.

    The message names the module, or the number of nested executors.
    """


class QueueFullError(CloudexecError):
    """Too many tasks are submitted and not done, and ``when_full="raise"`` forbids to wait.

    Attributes:
        pending_tasks: Number of tasks that are submitted and not done.
        max_pending_tasks: Limit of ``pending_tasks``; ``None`` means no limit.
        pending_bytes: Bytes of the pickled arguments of these tasks, without large parts.
        max_pending_bytes: Limit of ``pending_bytes``; ``None`` means no limit.
        size_bytes: Bytes of the pickled arguments of the call that was refused.
    """

    def __init__(
        self,
        message: str = "",
        *,
        pending_tasks: int = 0,
        max_pending_tasks: int | None = None,
        pending_bytes: int = 0,
        max_pending_bytes: int | None = None,
        size_bytes: int = 0,
    ) -> None:
        super().__init__(message)
        self.pending_tasks = pending_tasks
        self.max_pending_tasks = max_pending_tasks
        self.pending_bytes = pending_bytes
        self.max_pending_bytes = max_pending_bytes
        self.size_bytes = size_bytes


class RefLostError(_LostProcessError):
    """The result that a ``Ref`` stands for was lost with the worker that kept it."""


class JournalError(CloudexecError):
    """A journal cannot be opened, read or written."""


class JournalLockedError(JournalError):
    """Another program uses the journal; the journal is free as soon as that program has ended.

    Attributes:
        pid: Process id of the other program, or ``None`` if it is not known.
        host: Name of the machine that the other program runs on.
    """

    def __init__(self, message: str = "", *, pid: int | None = None, host: str = "") -> None:
        super().__init__(message)
        self.pid = pid
        self.host = host


class JournalVersionError(JournalError):
    """A newer version of cloudexec wrote the journal, and this one cannot read it.

    Attributes:
        version: Version of the journal's format.
    """

    def __init__(self, message: str = "", *, version: int | None = None) -> None:
        super().__init__(message)
        self.version = version


class ProtocolError(CloudexecError):
    """A worker has other versions, does not prove its identity, or sends a malformed message."""


class BrokenBatchExecutor(_LostProcessError):
    """The executor can run no more tasks: its workers were terminated, or cannot work."""


class InitializerError(BrokenBatchExecutor):
    """The ``initializer`` raised in a worker; the ``__cause__`` is the exception that it raised."""


class RemoteTraceback(Exception):
    """Carries the text of a traceback from a worker, as the ``__cause__`` of a user's exception.

    It also carries the text of an exception that was raised in this process and cannot be formatted
    because its own methods raise.

    Attributes:
        traceback: Text of the traceback.
        output: The last lines that the task printed.
    """

    def __init__(self, traceback: str = "", output: str = "") -> None:
        super().__init__(traceback, output)
        self.traceback = traceback
        self.tb = traceback  # the name in concurrent.futures.process
        self.output = output

    def __str__(self) -> str:
        text = f'\n"""\n{self.traceback}"""'
        if self.output:
            text += f"\nlast output of the task:\n{self.output}"
        return text


for _name in __all__:
    globals()[_name].__module__ = "cloudexec"
