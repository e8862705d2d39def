"""Finished calls as records."""

from __future__ import annotations

import pytest

from cloudexec import BrokenBatchExecutor, LaunchError, WorkerLostError
from cloudexec._future import BatchFuture
from cloudexec.cli._outcomes import launch_failure, to_record
from cloudexec.cli._row_run import Outcome
from cloudexec.cli._rows import Row


class Mute(Exception):
    """Fails to say what it is, or anything else that is asked."""

    kind: type[BaseException] = RuntimeError

    def __str__(self) -> str:
        raise self.kind("no")

    @property
    def __class__(self) -> type:
        raise self.kind("no")


class MuteForGood(Mute):
    """Would end the command."""

    kind = SystemExit


def failed(error: BaseException, *, worker: str | None = None) -> Outcome:
    future: BatchFuture[object] = BatchFuture()
    future._worker_id = worker
    future.set_exception(error)
    return Outcome(Row(1, {}, {}), future)


@pytest.mark.parametrize("error", [LaunchError("no room"), BrokenBatchExecutor("no room")])
def test_row_that_no_worker_could_take_has_no_outcome(error: Exception) -> None:
    """It is left for the next run instead of being recorded as failed."""
    assert launch_failure(failed(error)) == "no room"


@pytest.mark.parametrize(
    "outcome",
    [
        failed(WorkerLostError("gone"), worker="w1"),
        failed(WorkerLostError("gone")),
        failed(LaunchError("raised by the function itself"), worker="w1"),
        failed(ValueError("bad")),
    ],
)
def test_row_that_a_worker_took_has_its_own_error(outcome: Outcome) -> None:
    """What happened to a call is recorded, whichever class it has."""
    assert launch_failure(outcome) is None


@pytest.mark.parametrize("kind", [Mute, MuteForGood])
def test_error_that_cannot_be_shown_is_recorded(kind: type[Mute]) -> None:
    """Whatever an exception does, its row has a record."""
    mute = kind()
    assert launch_failure(failed(mute)) is None
    error = to_record(failed(mute)).error
    assert error is not None
    assert error.type.endswith(kind.__name__)
    assert error.message == f"<str() raised {kind.kind.__name__}>"
