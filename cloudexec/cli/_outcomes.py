"""Turns a finished call into a record of the output."""

from __future__ import annotations

from cloudexec._describing import cause_of, is_a, name_of, text_of
from cloudexec._errors import RemoteTraceback
from cloudexec.cli._records import Record, RowError
from cloudexec.cli._row_run import Outcome


def to_record(outcome: Outcome) -> Record:
    """Turn a finished call into the record that is written to the output.

    Args:
        outcome: The row and its future, which is done and was not cancelled.

    Returns:
        The record.
    """
    future = outcome.future
    error = future.exception()
    seconds = future.run_time
    return Record(
        row=outcome.row.number,
        input=outcome.row.shown,
        value=future.result() if error is None else None,
        error=None if error is None else _row_error(error),
        seconds=None if seconds is None else round(seconds, 6),
        worker=future.worker_id,
        attempts=future.attempts,
    )


def launch_failure(outcome: Outcome) -> str | None:
    """Return why a call never began because no worker could run it; ``None`` if it began.

    Such a row is not recorded, and runs when the command is repeated.
    """
    from cloudexec import BrokenBatchExecutor, LaunchError, ProtocolError

    error = outcome.future.exception()
    # A function may itself use cloudexec and raise such an error. It then is the row's outcome.
    if outcome.future.worker_id is None and is_a(
        error, (LaunchError, BrokenBatchExecutor, ProtocolError)
    ):
        return str(error)
    return None


def _row_error(error: BaseException) -> RowError:
    cls = type(error)
    name = name_of(cls).removeprefix("builtins.")
    remote = cause_of(error)
    text = remote.traceback.rstrip() if type(remote) is RemoteTraceback else None
    return RowError(name, text_of(error), text)
