"""Starts of runs: interrupted ones, and those that have the name of an earlier one."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest
from run_helpers import account

from cloudexec import Run, run_script
from cloudexec._aws.profile import Profile
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(180)

Command = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def aws(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeAWS]:
    """An account that was set up."""
    with (
        pytest.MonkeyPatch.context() as patch,
        account(tmp_path_factory.mktemp("profiles"), patch, grace=1.0) as fake,
    ):
        yield fake


@pytest.fixture(autouse=True)
def _nothing_is_left(aws: FakeAWS) -> Iterator[None]:
    aws.clear_requests()
    yield
    aws.faults.clear()
    assert not {(each.operation, each.message) for each in aws.requests if each.status == 403}
    assert not [each for each in aws.requests if each.problems]
    eventually(lambda: all(each.status in ("SUCCEEDED", "FAILED") for each in aws.jobs()))


def eventually(probe: Callable[[], object], *, seconds: float = 60.0) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not probe():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        threading.Event().wait(0.05)


def objects(name: str) -> list[str]:
    """Return what the bucket has of a run."""
    bucket, prefix = Profile.load("default").bucket, f"cloudexec/runs/{name}/"
    listed = boto3.client("s3").list_objects_v2(Bucket=bucket, Prefix=prefix)
    return [each["Key"].removeprefix(prefix) for each in listed.get("Contents", ())]


def row(run: Command, name: str) -> dict[str, object]:
    """Return what ``cloudexec runs`` says of a run."""
    (found,) = (each for each in json.loads(run("runs", "--json").stdout) if each["name"] == name)
    return dict(found)


@pytest.mark.parametrize("resumes", [False, True])
def test_ctrl_c_while_a_machine_is_asked_for_leaves_none(
    aws: FakeAWS,
    start: Start,
    run_here: Command,
    monkeypatch: pytest.MonkeyPatch,
    resumes: bool,
) -> None:
    """Though AWS's answer comes later; a run that was to go on can still do so."""
    name = f"interrupted-{resumes}".lower()
    if resumes:
        assert run_here("run", "--name", name, "--", "true").returncode == 0
    answer, asked = aws.faults.wait_before, threading.Event()

    def noted(operation: str) -> None:
        if operation == "SubmitJob":
            asked.set()
        answer(operation)

    monkeypatch.setattr(aws.faults, "wait_before", noted)
    aws.faults.slow_response("SubmitJob", 3.0)
    client = start("run", "--name", name, "--resume", "--env", "A=b", "--", "sleep", "600")
    assert asked.wait(60)
    client.send_signal(signal.SIGINT)
    _, errors = client.communicate(timeout=60)
    assert client.returncode == 130
    assert f"run {name}: its start was interrupted, and no machine is left running" in errors
    assert aws.jobs()[-1].name.startswith(f"cloudexec-run-{name}-r")
    eventually(lambda: aws.jobs()[-1].status == "FAILED")
    assert aws.jobs()[-1].status_reason == "stopped by its user before it began"
    assert "variables.json" not in objects(name)
    if not resumes:
        assert objects(name) == []
        return
    assert row(run_here, name)["state"] == "stopped"
    aws.faults.clear()
    assert run_here("run", "--name", name, "--resume", "--", "true").returncode == 0


def test_a_start_that_failed_lets_the_run_go_on_another_time(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    assert run_here("run", "--name", "refused", "--", "true").returncode == 0
    aws.faults.deny("SubmitJob")
    again = ("run", "--name", "refused", "--resume", "--", "true")
    assert run_here(*again).returncode == 3
    found = row(run_here, "refused")
    assert found["state"] == "failed"
    assert str(found["reason"]).startswith("it could not be started: ")
    aws.faults.clear()
    aws.clear_requests()
    assert run_here(*again).returncode == 0


def test_a_run_that_goes_on_is_not_taken_for_the_earlier_one(
    aws: FakeAWS, run_here: Command, folder: Path
) -> None:
    """Though the lists of AWS Batch are late; nor are its time and its cost added."""
    words = ("--name", "again", "--resume", "--", "sh", "-c")
    assert run_here("run", *words, "exit 5").returncode == 5
    aws.faults.list_lag(600.0)
    assert run_here("run", *words, "exit 6").returncode == 6
    run = run_script(args=["sh", "-c", "exit 7"], name="again", resume=True)
    assert run.wait(timeout=100) == 7
    assert Run.find("again").info().exit_code == 7
    aws.faults.clear()
    info = Run.find("again").info()
    assert info.exit_code == 7
    started, stopped = aws.jobs()[-1].started_at, aws.jobs()[-1].stopped_at
    assert started is not None
    assert stopped is not None
    assert info.run_seconds == pytest.approx(stopped - started, abs=0.01)
