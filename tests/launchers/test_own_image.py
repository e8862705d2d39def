"""Who has an image, and a machine that workers reach, gets neither a relay nor a new image."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click.testing
import pytest

from cloudexec import BatchExecutor
from cloudexec.aws import Profile
from cloudexec.cli import _group
from cloudexec.testing import FakeAWS

IMAGE = f"registry.example/w@sha256:{'0' * 64}"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


def command(*words: str) -> str:
    """Run a command; return what it prints."""
    done = click.testing.CliRunner().invoke(_group, [*words], standalone_mode=False)
    assert not done.return_value, done.output
    return done.output


@pytest.mark.timeout(120)
@pytest.mark.parametrize("is_old", [False, True])
def test_a_script_makes_the_same_calls_as_before_there_were_relays_and_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_old: bool
) -> None:
    """With a profile of an earlier release, and after another `cloudexec up`."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path / "profiles"))
    monkeypatch.setenv("CLOUDEXEC_PROFILE", "default")
    monkeypatch.delenv("CLOUDEXEC_RELAY", raising=False)
    with FakeAWS(grace=0.5, calls_per_second=1000, stack_seconds=0.0) as aws:
        command("up", "--yes")
        command("image", "use", IMAGE)
        path = Profile.path("default")
        if is_old:
            noted = json.loads(path.read_text())
            del noted["relay"], noted["queues"]["fargate_relay"]
            path.write_text(json.dumps(noted))
        else:
            assert "relay" not in command("up", "--yes").replace("fargate_relay", "").lower()
            assert Profile.load("default").image(PYTHON, "linux/amd64") == IMAGE
        said = command("doctor", "--dry")
        assert "ok      address: workers are told to dial" in said
        assert f"linux/amd64: {IMAGE}" in said
        aws.clear_requests()
        with BatchExecutor(max_workers=2) as executor:
            assert list(executor.map(abs, range(-3, 0))) == [3, 2, 1]
        # No registry, no bucket, no look at tasks or networks.
        assert {each.service for each in aws.requests} - {"logs"} == {"batch", "secretsmanager"}
        (definition,) = [
            each.parameters["containerProperties"]
            for each in aws.requests
            if each.operation == "RegisterJobDefinition"
        ]
        assert definition["image"] == IMAGE
        assert "user" not in definition
        assert {job.queue for job in aws.jobs()} == {"cloudexec-default-fargate"}
        assert not [job for job in aws.jobs() if job.environment.get("CLOUDEXEC_RELAY")]
