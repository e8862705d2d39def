"""What AWS says of jobs, read."""

from __future__ import annotations

import time

import pytest

from cloudexec._launchers.jobs import ended_at


def milliseconds(ago: float) -> int:
    return int((time.time() - ago) * 1000)


def test_an_attempt_has_ended_when_aws_says() -> None:
    """However much later that is heard of: nothing is paid for after it."""
    attempts = [{"stoppedAt": milliseconds(9000)}, {"stoppedAt": milliseconds(3600)}]
    ended = ended_at({"stoppedAt": milliseconds(7)}, attempts)
    assert ended == pytest.approx(time.monotonic() - 3600, abs=5)
    ended = ended_at({"stoppedAt": milliseconds(60)}, [])
    assert ended == pytest.approx(time.monotonic() - 60, abs=5)


def test_no_attempt_has_ended_in_the_future() -> None:
    """The clocks of AWS and of this machine differ."""
    ended = ended_at({"stoppedAt": milliseconds(-600)}, [])
    assert ended == pytest.approx(time.monotonic(), abs=5)


def test_an_attempt_of_which_aws_says_nothing() -> None:
    assert ended_at({}, [{"startedAt": milliseconds(60)}]) is None
