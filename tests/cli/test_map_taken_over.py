"""A command that is killed while its workers are elsewhere: run again, it takes them over."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudexec._enrolment import python_version
from cloudexec.aws import Profile
from cloudexec.testing import FakeAWS

Run = Callable[..., subprocess.CompletedProcess[str]]
Start = Callable[..., "subprocess.Popen[str]"]

FUNCTION = """
import os, random, time, uuid
from pathlib import Path

def roll(name, folder):
    here = Path(folder)
    (here / f"begun-{name}-{uuid.uuid4()}").touch()
    while not (here / "open").exists():
        time.sleep(0.01)
    return random.SystemRandom().random()
"""


@pytest.fixture
def aws(
    folder: Path, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """An emulated AWS with a profile for it."""
    settings = {"CLOUDEXEC_CONFIG_DIR": str(folder / "config"), "CLOUDEXEC_PROFILE": "team"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    with FakeAWS(grace=2.0, calls_per_second=1000) as fake:
        made = fake.set_up("queue", max_vcpus=8)
        Profile(
            name="team",
            region=fake.region,
            queues={"fargate": made.queue},
            job_role=made.job_role,
            execution_role=made.execution_role,
            images={f"{python_version()}-linux/amd64": "example.com/worker:1"},
        ).save()
        environment.update(settings)
        environment.update(fake.environment)
        yield fake


def begun(calls: Path) -> list[str]:
    return sorted(path.name.split("-")[1] for path in calls.glob("begun-*"))


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 100
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.02)


@pytest.mark.timeout(120)
def test_rows_that_were_running_are_not_run_again(
    aws: Any, folder: Path, run: Run, start: Start
) -> None:
    """Nor those that were done and had not reached the output; equal rows are told apart."""
    calls = folder / "calls"
    calls.mkdir()
    (folder / "roll.py").write_text(FUNCTION)
    rows = [{"name": name, "folder": str(calls)} for name in ("a", "a", "b", "c", "c", "d")]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("map", "roll.py:roll", "rows.jsonl", "-o", "out.jsonl", "--workers", "3")
    first = start(*command)
    wait(lambda: len(begun(calls)) == 3)
    first.send_signal(signal.SIGKILL)
    first.wait()
    (calls / "open").touch()
    second = run(*command, "--resume")
    assert second.returncode == 0, second.stderr
    assert begun(calls) == ["a", "a", "b", "c", "c", "d"]
    written = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert sorted(record["row"] for record in written) == [1, 2, 3, 4, 5, 6]
    assert len({record["value"] for record in written}) == 6
    assert not list(folder.glob("out.jsonl.journal*"))
    assert len({job.job_id for job in aws.jobs() if job.parent is None}) == 1
