"""Turns what a worker reports of a task into the future's result or exception.

The messages of exceptions for tasks that were lost, killed or timed out are worded here.
"""

from __future__ import annotations

import signal
from typing import Any

from cloudexec import _payload
from cloudexec._config import format_bytes
from cloudexec._core.events import Failure, FailureKind
from cloudexec._core.tasks import Task
from cloudexec._describing import cause_of, describe, if_not_found, is_interrupt, presentable
from cloudexec._errors import (
    CloudexecError,
    PayloadError,
    RemoteTraceback,
    TaskTimeoutError,
    WorkerLostError,
)
from cloudexec._future import BatchFuture
from cloudexec._story import signal_name

__all__ = ["LOSSES", "counted", "decode_exception", "decode_result", "error_of", "name_of"]

LOSSES = (FailureKind.SLOT_LOST, FailureKind.WORKER_LOST)
"""Kinds of failures that count as lost attempts."""


def decode_result(future: BatchFuture[Any]) -> None:
    data = future._result
    try:
        future._result = _payload._loads(data) if type(data) is bytes else data.load()
    except BaseException as exc:
        if is_interrupt(exc):
            raise
        future._result = None
        error = PayloadError(
            f"the result could not be unpickled in the client ({describe(exc)})"
            f"{if_not_found(exc, 'is the module of its class importable here?')}"
        )
        error.__cause__ = presentable(exc)
        future._exception = error


def decode_exception(future: BatchFuture[Any]) -> None:
    error = _payload.loads_exception(future._result)
    cause = cause_of(error)
    if isinstance(cause, RemoteTraceback):
        cause.output = future._output
    future._result = None
    future._exception = error


def error_of(worker: str, task: Task, failure: Failure, more_memory: str = "") -> CloudexecError:
    """Say what became of a task that has no exception of its own.

    Args:
        worker: Where it ran.
        task: The task.
        failure: What happened.
        more_memory: What gives a worker more memory, if that is known.
    """
    detail = failure.detail
    who = _who(task)
    if failure.kind is FailureKind.WORKER_LOST:
        alone = " and nothing else" if failure.suspects == 1 else ""
        lost = f"{worker}, which ran {who}{alone}, was lost"
        if failure.suspects > 1:
            lost = (
                f"{worker} was lost with {failure.suspects} tasks, any of which may have been the "
                f"cause; {who} may have begun, and with retries=0 it is not run again"
            )
        return WorkerLostError(
            f"{lost} ({counted(task.lost, 'attempt')}): {detail}",
            worker_id=worker,
            attempts=task.lost,
            out_of_memory=failure.out_of_memory,
        )
    if failure.kind is FailureKind.RECLAIMED:
        return WorkerLostError(
            f"{worker} was taken back by its platform while {who} ran, and with retries=0 it is "
            f"not run again",
            worker_id=worker,
            attempts=1,
            output=detail.output,
        )
    if failure.kind is FailureKind.TIMED_OUT and detail.message:
        return TaskTimeoutError(
            f"{who} ran for all the time that {worker} had, {detail.seconds:.3g} s, and was "
            f"killed: {detail.message[:300]}",
            worker_id=worker,
            seconds=detail.seconds,
            output=detail.output,
        )
    if failure.kind is FailureKind.TIMED_OUT:
        return TaskTimeoutError(
            f"{who} ran past its timeout{_timeout_of(task)} on {worker}; killed after "
            f"{detail.seconds:.3g} s. Give it more with with_options(timeout=...)",
            worker_id=worker,
            seconds=detail.seconds,
            output=detail.output,
        )
    if failure.kind is FailureKind.OUTGREW:
        return _outgrew(worker, task, detail)
    code = detail.exit_code
    peak = detail.peak_memory_bytes
    how = f"was killed by {signal_name(-code)}" if code < 0 else f"exited with code {code}"
    if detail.message:  # the worker itself ended the process, and says why
        how += f" ({detail.message[:200]})"
    if detail.out_of_memory:
        how += ", because the machine or container ran out of memory"
        if more_memory:
            how += f" ({more_memory})"
    message = (
        f"the process that ran {who} on {worker} {how} "
        f"({counted(task.lost, 'attempt')}; peak memory {peak / 2**20:.0f} MiB)"
    )
    if detail.output:
        message += f"\nits last output:\n{detail.output}"
    return WorkerLostError(
        message,
        worker_id=worker,
        attempts=task.lost,
        exit_code=code if code >= 0 else None,
        signal=-code if code < 0 else None,
        peak_memory_bytes=peak,
        out_of_memory=detail.out_of_memory,
        output=detail.output,
    )


def _timeout_of(task: Task) -> str:
    seconds = None if task.requirements is None else task.requirements.options.timeout
    return "" if seconds is None else f" of {seconds:g} s"


def _outgrew(worker: str, task: Task, detail: Any) -> WorkerLostError:
    limit = 0 if task.requirements is None else task.requirements.options.memory_bytes or 0
    taken = int(detail.message) if detail.message.isdecimal() else 0
    return WorkerLostError(
        f"{_who(task)} took more memory than it had asked for, and was killed on {worker}: "
        f"{format_bytes(taken)}, of {format_bytes(limit)} (memory={format_bytes(limit)!r}); give "
        f"with_options(memory=) more",
        worker_id=worker,
        attempts=task.lost + 1,
        signal=int(signal.SIGKILL),
        peak_memory_bytes=max(detail.peak_memory_bytes, taken),
        out_of_memory=True,
        output=detail.output,
    )


def name_of(task: Task) -> str:
    """Return a task's name, or the name of its stage in a graph; empty if it has neither."""
    name = "" if task.requirements is None else task.requirements.options.name
    return name or (task.handle._label if task.handle is not None else "")


def _who(task: Task) -> str:
    name = name_of(task)
    return f"task {task.number} ({name})" if name else "the task"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
