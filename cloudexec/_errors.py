"""The exceptions that cloudexec raises, as one tree.

CloudexecError
├── ConfigError (also ValueError)        your settings
├── LaunchError                          workers could not be started, or never dialed back
│   └── BudgetExceededError              ... or would cost more than max_cost_usd
├── PlatformError                        a platform refused a request, or could not be reached
│   └── AwsError                         ... and the platform is AWS
├── WorkerLostError (also BrokenProcessPool)
│                                        whatever ran the task died; its attempts are used up
├── TaskTimeoutError (also TimeoutError) the task ran past its own time limit
├── DependencyError                      a call that this one waits for failed: it was not run
├── StageError                           a stage of a graph failed
├── PayloadError (also PicklingError)    could not pickle or unpickle
│   └── PayloadTooLargeError             ... or too large
├── QueueFullError                       too much is submitted and not done
├── NestingError (also RuntimeError)     an executor must not start here
├── RefLostError (also BrokenProcessPool)
│                                        the worker that kept a result is gone
├── JournalError                         a journal cannot be opened, read or written
│   ├── JournalLockedError               ... because another program has it
│   └── JournalVersionError              ... because a newer version of cloudexec wrote it
├── ProtocolError                        the two sides disagree, e.g. on versions
└── BrokenBatchExecutor (also BrokenProcessPool)
    └── InitializerError                 the initializer raised in a worker

Branches follow what a caller can do next. Every class pickles: one positional message, all else
keyword-only with a default, because errors travel between processes.

What stands for a process that died is caught by ``except BrokenProcessPool``, too, which guards
programs that were written for a process pool. To import ``concurrent.futures.process`` takes
milliseconds, so these classes derive from its base class, ``BrokenExecutor``, until the
first exception of them is made: none can be caught earlier.
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
    """Base of everything that cloudexec raises on its own account.

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
    """Base of what ``except BrokenProcessPool`` catches."""

    def __new__(cls, *args: Any, **details: Any) -> Self:
        if BrokenExecutor in _LostProcessError.__bases__:
            from concurrent.futures.process import BrokenProcessPool

            _LostProcessError.__bases__ = (CloudexecError, BrokenProcessPool)
        return super().__new__(cls, *args, **details)


class ConfigError(CloudexecError, ValueError):
    """A setting is out of its range; the message names the setting, its value and the range."""


class LaunchError(CloudexecError):
    """Workers could not be started, or started and never dialed back in time.

    Attributes:
        reason: The platform's own words, such as the last lines a worker printed.
    """

    def __init__(self, message: str = "", *, reason: str = "") -> None:
        super().__init__(message, reason=reason)
        self.reason = reason


class BudgetExceededError(LaunchError):
    """Going on would cost more than ``max_cost_usd``.

    Attributes:
        cost_usd: What has been spent, as estimated.
        max_cost_usd: The ceiling.
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
    """What runs the workers of a launcher refused a request, or could not be reached.

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
        """Whether it is worth while to make the same request again."""
        return self.transient


class AwsError(PlatformError):
    """AWS refused a request, or could not be reached.

    Attributes:
        code: AWS's own error code, such as ``"AccessDeniedException"``; ``"Unreachable"`` and
            ``"NoCredentials"`` are ours.
        operation: Which call, as IAM names it: ``"batch:SubmitJob"``.
        transient: Whether the same call may succeed a little later.
        expired: Whether fresh credentials are needed.
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
        """Whether it is worth while to make the same call again: credentials are renewed, too."""
        return self.transient or self.expired


class WorkerLostError(_LostProcessError):
    """The process that ran the task died, as often as the task's attempts allow.

    Caught by ``except BrokenProcessPool``, as in programs written for a process pool, although this
    executor is not broken: all other tasks go on, and more can be submitted.

    Attributes:
        worker_id: The worker of the last attempt, or ``None``.
        attempts: How many attempts were lost.
        exit_code: Exit code of the slot's process in the last attempt, or ``None``.
        signal: Number of the signal that ended it, or ``None``.
        peak_memory_bytes: Largest resident size of that process, or ``None``.
        out_of_memory: Whether the kernel killed it for want of memory.
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
    """The task ran longer than its own ``timeout``; its slot was killed and replaced.

    Attributes:
        worker_id: The worker that ran it.
        seconds: How long it had run.
        output: The last lines that it printed.
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

    What failed in the first place is the ``__cause__``, however many calls lie between.

    Attributes:
        dependency: Where among the call's arguments the future stands: ``"argument 0"``,
            ``"argument 1, item 7"``, ``"keyword 'scale'"``.
        stage: The name of the stage that failed, where that is one of a graph.
    """

    def __init__(self, message: str = "", *, dependency: str = "", stage: str = "") -> None:
        super().__init__(message)
        self.dependency = dependency
        self.stage = stage


class StageError(CloudexecError):
    """A stage of a graph failed; what it raised is the ``__cause__``.

    Attributes:
        stage: Its name.
    """

    def __init__(self, message: str = "", *, stage: str = "") -> None:
        super().__init__(message)
        self.stage = stage


class PayloadError(CloudexecError, pickle.PicklingError):
    """A callable, argument, result or exception could not be pickled or unpickled.

    The original error is the ``__cause__``; where it arose in a worker, its traceback is text.
    """


class PayloadTooLargeError(PayloadError):
    """A payload does not fit where it must go.

    Attributes:
        size_bytes: Its size.
        limit_bytes: The limit.
    """

    def __init__(
        self, message: str = "", *, size_bytes: int | None = None, limit_bytes: int | None = None
    ) -> None:
        super().__init__(message)
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes


class NestingError(CloudexecError, RuntimeError):
    """An executor was to start while a module is imported for a task, or too deep in other tasks.

    The message names the module, or says how deep.
    """


class QueueFullError(CloudexecError):
    """Too much is submitted and not done, and ``when_full="raise"`` says not to wait.

    Attributes:
        pending_tasks: Tasks that are submitted and not done.
        max_pending_tasks: How many may be; ``None``: any number.
        pending_bytes: Bytes of their pickled arguments, without large parts.
        max_pending_bytes: How many may be; ``None``: any number.
        size_bytes: Those of the call that there was no room for.
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
    """What a ``Ref`` stands for is gone, with the worker that kept it."""


class JournalError(CloudexecError):
    """A journal cannot be opened, or what is in it cannot be read."""


class JournalLockedError(JournalError):
    """Another program has the journal; it is free as soon as that one ends, however it does.

    Attributes:
        pid: Its process, or ``None`` if that is not known.
        host: Its machine.
    """

    def __init__(self, message: str = "", *, pid: int | None = None, host: str = "") -> None:
        super().__init__(message)
        self.pid = pid
        self.host = host


class JournalVersionError(JournalError):
    """A newer version of cloudexec wrote the journal, and this one cannot read it.

    Attributes:
        version: Of the journal's format.
    """

    def __init__(self, message: str = "", *, version: int | None = None) -> None:
        super().__init__(message)
        self.version = version


class ProtocolError(CloudexecError):
    """Client and worker disagree: versions, an unproven identity, or a malformed message."""


class BrokenBatchExecutor(_LostProcessError):
    """The executor can run nothing any more: its workers were terminated, or cannot work."""


class InitializerError(BrokenBatchExecutor):
    """The ``initializer`` raised in a worker; what it raised is the ``__cause__``."""


class RemoteTraceback(Exception):
    """Carries the text of a traceback from a worker, as the ``__cause__`` of a user's exception.

    Also that of an exception raised here which cannot be formatted, as its own methods raise.

    Attributes:
        traceback: The traceback's text.
        output: The last lines that the task printed.
    """

    def __init__(self, traceback: str = "", output: str = "") -> None:
        super().__init__(traceback, output)
        self.traceback = traceback
        self.tb = traceback  # as concurrent.futures.process has it
        self.output = output

    def __str__(self) -> str:
        text = f'\n"""\n{self.traceback}"""'
        if self.output:
            text += f"\nlast output of the task:\n{self.output}"
        return text


for _name in __all__:
    globals()[_name].__module__ = "cloudexec"
