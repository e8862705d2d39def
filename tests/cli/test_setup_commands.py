"""``cloudexec up``, ``down``, ``template``, ``policy`` and ``doctor`` on a fake AWS."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest

from cloudexec._aws.profile import Profile
from cloudexec._aws.template import template
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(90)

Run = Callable[..., subprocess.CompletedProcess[str]]

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAWS]:
    """AWS, and no profiles. Asked for before ``run``, whose commands then find it."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path / "profiles"))
    monkeypatch.delenv("CLOUDEXEC_PROFILE", raising=False)
    with FakeAWS(grace=0.5, calls_per_second=1000, stack_seconds=0.1) as fake:
        yield fake


@pytest.fixture
def run(run_here: Run) -> Run:
    """Run the command in this process; those that are started, and not run, have their own."""
    return run_here


def test_template_is_printed(run: Run) -> None:
    done = run("template")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == template()


def test_policy_is_printed(run: Run) -> None:
    done = run("policy", "--partition", "aws-cn")
    assert done.returncode == 0
    assert json.loads(done.stdout)["Version"] == "2012-10-17"
    assert "arn:aws:" not in done.stdout


def test_policy_without_a_profile_asks_for_the_partition(run: Run) -> None:
    """A policy for another one allows nothing, and nobody would be told."""
    done = run("policy")
    assert (done.returncode, done.stdout) == (2, "")
    assert "say --partition aws" in done.stderr
    done = run("policy", "--partition", "china")
    assert done.returncode == 2
    assert "'china'" in done.stderr


def test_policy_of_a_profile_that_is_not_there(aws: FakeAWS, run: Run) -> None:
    done = run("policy", "--profile", "absent")
    assert done.returncode == 2
    assert "there is no profile 'absent'" in done.stderr


SWEEP = """
import os, time
from cloudexec import BatchExecutor

def simulate(seed):
    time.sleep(0.001)
    return os.environ.get("AWS_BATCH_JOB_ID", "here")

if __name__ == "__main__":
    with BatchExecutor(max_workers=12) as executor:
        places = list(executor.map(simulate, range(10_000)))
    print(len(places), "here" in places)
"""


def test_from_up_to_down(aws: FakeAWS, run: Run, folder: Path, environment: dict[str, str]) -> None:
    """Set up, check, run an unmodified script on 12 workers, look at them, remove it all."""
    done = run("up", "--max-vcpus", "12", "--project", "sweeps", "--log-days", "3")
    assert done.returncode == 0, done.stderr
    for line in ("Credentials: account", "FargateQueue (Batch::JobQueue) CREATE_COMPLETE"):
        assert line in done.stderr
    assert "Next: `cloudexec doctor`." in done.stderr
    profile = Profile.load("default")
    assert profile.project == "sweeps"
    client: Any = botocore.session.get_session().create_client("logs")
    (group,) = client.describe_log_groups(logGroupNamePrefix=profile.log_group)["logGroups"]
    assert group["retentionInDays"] == 3

    done = run("up")
    assert done.returncode == 0, done.stderr
    assert "nothing to change" in done.stderr

    done = run("policy", "--profile", "default")
    assert profile.key_secret in done.stdout

    done = run("doctor", "--dry")
    assert done.returncode == 0, done.stdout
    (image_line,) = [line for line in done.stdout.splitlines() if " image: " in line]
    assert image_line.startswith("ok")

    image = f"registry.example/w@sha256:{'0' * 64}"
    done = run("image", "use", image)
    assert (done.returncode, done.stdout) == (0, f"{image}\n"), done.stderr
    assert Profile.load("default") == profile.with_image(PYTHON, "linux/amd64", image)
    done = run("doctor", "--dry", "--json")
    assert done.returncode == 0, done.stdout
    document = json.loads(done.stdout)
    assert document["ok"]
    assert {each["name"] for each in document["checks"]} >= {"stack", "queues", "probe worker"}
    assert not aws.jobs()

    script = folder / "sweep.py"
    script.write_text(SWEEP)
    with subprocess.Popen(
        [sys.executable, str(script)],
        env={**environment, "CLOUDEXEC_PROFILE": "default"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        shown: list[dict[str, Any]] = []
        while process.poll() is None and not shown:
            shown = json.loads(run("ps", "--json").stdout)
        output, errors = process.communicate(timeout=60)
    assert output == "10000 False\n", errors
    assert re.fullmatch(r"cloudexec: 10000 tasks on .*12 workers in .*\n", errors)
    (executor,) = shown
    assert sum(executor["workers"].values()) == 12
    (submitted,) = (r.parameters for r in aws.requests if r.operation == "SubmitJob")
    assert submitted["arrayProperties"] == {"size": 12}
    assert "enrolled as worker-1\n" in run("logs", f"{executor['id']}/worker-1").stdout
    (ended,) = json.loads(run("jobs", "--json").stdout)
    assert ended["state"] in ("SUCCEEDED", "FAILED")
    assert ended["cost_usd"] > 0

    done = run("down")
    assert done.returncode == 2
    assert "its queues, roles, logs" in done.stderr
    assert "add --yes" in done.stderr

    done = run("down", "--yes")
    assert done.returncode == 0, done.stderr
    assert "Nothing of cloudexec-default is left." in done.stderr
    assert Profile.names() == []

    done = run("down")
    assert done.returncode == 0, done.stderr
    assert "there is no stack cloudexec-default" in done.stderr


def test_doctor_starts_a_probe_worker(aws: FakeAWS, run: Run) -> None:
    assert run("up").returncode == 0
    profile = Profile.load("default")
    profile.with_image(PYTHON, "linux/amd64", f"registry.example/w@sha256:{'0' * 64}").save()
    done = run("doctor", "--timeout", "30")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "probe worker: dialed back and ran a task" in done.stdout


def test_first_failure_of_the_stack_is_shown(aws: FakeAWS, run: Run) -> None:
    aws.faults.resource_fails("Bucket", "too many buckets")
    done = run("up")
    assert done.returncode == 3
    assert "Bucket (AWS::S3::Bucket): too many buckets" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [("up", "--name", "Bad_Name"), ("down", "--name", "9")])
def test_wrong_names_are_refused(aws: FakeAWS, run: Run, arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "lower-case letters" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--name", "local"), "CLOUDEXEC_PROFILE=local means this machine"),
        (("--region", "mars-1"), "there is no AWS region 'mars-1'"),
    ],
)
def test_wrong_options_of_up_are_refused_before_anything_is_made(
    aws: FakeAWS, run: Run, arguments: tuple[str, ...], words: str
) -> None:
    done = run("up", *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert not aws.requests


def test_refusal_of_aws_is_one_line(aws: FakeAWS, run: Run) -> None:
    aws.faults.expire_credentials()
    for command in ("up", "down"):
        done = run(command, "--yes")
        assert done.returncode == 3
        assert "credentials have expired" in done.stderr
        assert "Traceback" not in done.stderr


def test_what_is_left_makes_down_fail(aws: FakeAWS, run: Run) -> None:
    """Something else in the account carries the stack's tag."""
    client: Any = botocore.session.get_session().create_client("ec2")
    tag = {"Key": "cloudexec:stack", "Value": "cloudexec-default"}
    group = client.create_security_group(
        GroupName="by-hand",
        Description="by hand",
        TagSpecifications=[{"ResourceType": "security-group", "Tags": [tag]}],
    )
    done = run("down", "--yes")
    assert done.returncode == 1, done.stderr
    assert f"not known to be deleted:\n  security group: {group['GroupId']}" in done.stderr


def test_interrupted_up_says_how_to_continue(
    aws: FakeAWS, start: Callable[..., subprocess.Popen[str]], run: Run
) -> None:
    process = start("up")
    assert process.stderr is not None
    for line in process.stderr:
        if "Creating the stack" in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(timeout=30) == 130
    assert "Run the same command again to continue" in rest
    assert run("up").returncode == 0


def asking(command: str, environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], int]:
    """Start a command on a terminal; return it when it has asked, and the terminal."""
    terminal, inside = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "cloudexec.cli", command],
        env=environment,
        stdin=inside,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.close(inside)
    assert process.stderr is not None
    shown = b""
    while not shown.endswith((b"[Y/n]:", b"[y/N]:")):
        byte = os.read(process.stderr.fileno(), 1)
        assert byte, shown
        shown += byte
    return process, terminal


@pytest.mark.parametrize("command", ["up", "down"])
def test_interrupt_ends_the_question(
    aws: FakeAWS, run: Run, environment: dict[str, str], command: str
) -> None:
    """On a terminal, where Ctrl-C comes while an answer is waited for."""
    if command == "down":
        assert run("up").returncode == 0
    process, terminal = asking(command, environment)
    # It has asked, but may not wait for the answer yet.
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=30)
    os.close(terminal)
    assert process.returncode == 130
    assert rest.decode().split() == ["Interrupted."]
    assert not any(each.operation == "DeleteStack" for each in aws.requests)
    assert ("default" in Profile.names()) == (command == "down")


@pytest.mark.parametrize("command", ["up", "down"])
def test_no_is_an_answer_and_no_mistake(
    aws: FakeAWS, run: Run, environment: dict[str, str], command: str
) -> None:
    if command == "down":
        assert run("up").returncode == 0
    process, terminal = asking(command, environment)
    os.write(terminal, b"n\n")
    _, rest = process.communicate(timeout=30)
    os.close(terminal)
    assert process.returncode == 1
    assert rest.decode().strip() in ("Nothing was changed.", "Nothing was deleted.")
    assert not any(each.operation == "DeleteStack" for each in aws.requests)
    assert ("default" in Profile.names()) == (command == "down")


def test_doctor_ends_when_its_reader_is_gone(
    aws: FakeAWS, start: Callable[..., subprocess.Popen[str]], run: Run
) -> None:
    assert run("up").returncode == 0
    process = start("doctor", "--dry")
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=30) == 141


def test_what_is_no_image_is_not_noted(aws: FakeAWS, run: Run) -> None:
    Profile(name="default", region=aws.region).save()
    done = run("image", "use", "a b")
    assert done.returncode == 2
    assert "without blanks" in done.stderr
    assert not Profile.load("default").images


def test_image_in_the_repository_is_noted_by_its_digest(aws: FakeAWS, run: Run) -> None:
    client: Any = botocore.session.get_session().create_client("ecr")
    uri = client.create_repository(repositoryName="ours")["repository"]["repositoryUri"]
    digest = client.put_image(
        repositoryName="ours",
        imageManifest='{"schemaVersion": 2}',
        imageManifestMediaType="application/vnd.oci.image.manifest.v1+json",
        imageTag="v1",
    )["image"]["imageId"]["imageDigest"]
    Profile(name="default", region=aws.region).save()
    done = run("image", "use", f"{uri}:v1", "--platform", "linux/arm64")
    assert done.stdout == f"{uri}@{digest}\n", done.stderr
    assert Profile.load("default").images == {f"{PYTHON}-linux/arm64": f"{uri}@{digest}"}
    done = run("image", "use", f"{uri}:v2")
    assert done.returncode == 3
    assert "ImageNotFoundException" in done.stderr
