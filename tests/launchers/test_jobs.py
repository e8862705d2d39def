"""What AWS says of jobs, read."""

from __future__ import annotations

import time

import pytest

from cloudexec._launchers.batch.reading import run_of
from cloudexec._launchers.ledger import ended_at


def milliseconds(ago: float) -> int:
    return int((time.time() - ago) * 1000)


def test_an_attempt_has_ended_when_aws_says() -> None:
    """However much later that is heard of: nothing is paid for after it."""
    ended = ended_at(run_of({"stoppedAt": milliseconds(3600)}))
    assert ended == pytest.approx(time.monotonic() - 3600, abs=5)


def test_no_attempt_has_ended_in_the_future() -> None:
    """The clocks of AWS and of this machine differ."""
    ended = ended_at(run_of({"stoppedAt": milliseconds(-600)}))
    assert ended == pytest.approx(time.monotonic(), abs=5)


def test_an_attempt_of_which_aws_says_nothing() -> None:
    assert ended_at(run_of({"startedAt": milliseconds(60)})) is None
