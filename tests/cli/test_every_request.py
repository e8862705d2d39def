"""Every command and every way to launch, judged: nothing is sent that AWS would refuse.

The emulation holds each request against botocore's model of the service, bounds and patterns
included, and against what AWS documents beyond the models. Here nothing starts: jobs wait.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cloudexec import EC2, Batch, BatchExecutor, Fargate, Lambda, LaunchError
from cloudexec._aws.profile import Profile
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(300)

Run = Callable[..., subprocess.CompletedProcess[str]]

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
MODES: dict[str, dict[str, Any]] = {
    "fargate": {},
    "fargate-spot": {"spot": True},
    "spot-preferred": {"spot": "prefer"},
    "ec2": {"compute": "ec2", "vcpus": 2},
    "ec2-spot": {"compute": "ec2", "spot": True},
    "arm64": {"arch": "arm64", "vcpus": 0.5, "memory": "1GiB"},
    "ladder": {"memory": ("2GiB", "4GiB")},
    "relay": {"relay": True},
    "by-hand": {
        "image": "registry.example/worker:1",
        "assign_public_ip": False,
        "ephemeral_gib": 100,
        "tags": {"team": "weather"},
        "environment": {"MODE": "x" * 500},
        "project": "p",
    },
}
FARGATE: dict[str, dict[str, Any]] = {
    "on-demand": {},
    "spot": {"spot": True},
    "spot-preferred": {"spot": "prefer"},
    "arm64": {"arch": "arm64", "vcpus": 0.5, "memory": "1GiB"},
    "by-hand": MODES["by-hand"],
}
FUNCTIONS: dict[str, dict[str, Any]] = {
    "usual": {},
    "arm64": {"arch": "arm64", "memory": ("512MiB", "10GiB"), "disk": "10GiB"},
    "reserved": {"reserved_concurrency": 5, "max_runtime": 30},
    "by-hand": {
        "vpc": True,
        "security_groups": ["sg-0123456789abcdef0"],
        "tags": {"team": "weather"},
        "environment": {"MODE": "x" * 500},
        "project": "p",
    },
}

INSTANCES: dict[str, dict[str, Any]] = {
    "on-demand": {},
    "spot": {"spot": True},
    "arm64": {"arch": "arm64", "vcpus": 1},
    "types": {"instance_types": ["c7i.large", "m7i.large"], "spot": "prefer"},
    "gpus": {"vcpus": 4, "gpus": 1},
    "by-hand": {
        "image": "registry.example/worker:1",
        "assign_public_ip": False,
        "ami": "ami-0123456789abcdef0",
        "disk_gib": 100,
        "tags": {"team": "weather"},
        "environment": {"MODE": "x" * 500},
        "project": "p",
    },
}


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAWS]:
    """AWS in which nothing starts, and no profiles."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path / "profiles"))
    monkeypatch.delenv("CLOUDEXEC_PROFILE", raising=False)
    with FakeAWS(calls_per_second=1000, stack_seconds=0.0) as fake:
        fake.faults.no_capacity()
        yield fake


def _launch(aws: FakeAWS, batch: Batch | Fargate | EC2 | Lambda, workers: int) -> None:
    """Ask for workers until the request has come in."""
    operations = {Batch: "SubmitJob", Fargate: "RunTask", EC2: "CreateFleet", Lambda: "Invoke"}
    operation = operations[type(batch)]
    before = sum(each.operation == operation for each in aws.requests)
    if batch.may_start_relay:
        # Which comes before the executor has started.
        with pytest.raises(LaunchError, match=r"the relay, job .*, is RUNNABLE after 1 s"):
            BatchExecutor(workers, launcher=batch, min_workers=workers, launch_timeout=1.0)
        return
    executor = BatchExecutor(workers, launcher=batch, min_workers=workers)
    try:
        executor.submit(pow, 2, 3)
        deadline = time.monotonic() + 30
        while sum(each.operation == operation for each in aws.requests) == before:
            assert time.monotonic() < deadline, f"{batch}: nothing was submitted"
            time.sleep(0.01)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def test_nothing_is_sent_that_aws_would_refuse(
    aws: FakeAWS, run_here: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an empty account through every command and way to launch to an empty account."""
    run = run_here
    called: dict[str, set[str]] = {}

    def command(*words: str, code: int = 0) -> str:
        first = len(aws.requests)
        done = run(*words)
        assert done.returncode == code, f"{words}: {done.stdout}{done.stderr}"
        name = " ".join(words[:2]) if words[0] in ("image", "definitions") else words[0]
        calls = {each.operation for each in aws.requests[first:]}
        called[name] = called.get(name, set()) | calls
        return done.stdout

    command("up", "--ec2", "--project", "p", "--tag", "team=weather", "--max-vcpus", "64")
    command("up", "--ec2", "--log-days", "7", "--bucket-days", "2", "--public-ip")
    command("up", "--with", "batch,fargate,ec2,lambda")
    profile = Profile.load("default")
    for platform in ("linux/amd64", "linux/arm64"):
        image = f"registry.example/worker@sha256:{'0' * 64}"
        command("image", "use", image, "--platform", platform)
    command("image", "show")
    command("doctor", "--dry")
    command("policy", "--profile", "default")
    command("template")
    monkeypatch.setenv("CLOUDEXEC_PROFILE", "default")
    for workers, mode in enumerate(MODES, 1):
        _launch(aws, Batch(**MODES[mode]), workers)
    for workers, mode in enumerate(FARGATE, 1):
        _launch(aws, Fargate(**FARGATE[mode]), workers)
    aws.faults.functions.deliver_late(3600.0)
    for workers, mode in enumerate(FUNCTIONS, 1):
        image = f"{profile.repository}@sha256:{'0' * 64}"
        _launch(aws, Lambda(image=image, **FUNCTIONS[mode]), workers)
    for workers, mode in enumerate(INSTANCES, 1):
        _launch(aws, EC2(**INSTANCES[mode]), workers)
    # A task and an instance, for the commands to see, and to stop.
    aws.faults.clear()
    aws.faults.slow_start(600.0)
    _launch(aws, Fargate(), 1)
    _launch(aws, EC2(), 1)
    aws.faults.no_capacity()
    other = ("--image", "registry.example/worker:2")
    registered = command("definitions", "register", "--profile", "default", *other)
    name = registered.strip().rpartition("/")[2]
    command("definitions", "list")
    command("definitions", "describe", name)
    command("definitions", "deregister", name, "--yes")
    sent = ("run", "--detach", "--name", "judged", "--env", "A=b", "--files", "sent", "--outputs")
    (folder / "sent").write_bytes(b"x")
    command(*sent, "out", "--max-cost", "1", "--", "true")
    command("runs")
    command("fetch", "judged")
    command("logs", "judged", code=3)
    command("attach", "absent", code=2)
    job = next(each for each in aws.jobs() if each.parent is None)
    command("ps", "--all")
    command("jobs", "--workers")
    command("jobs", "--active", "--executor", job.tags["cloudexec:executor"])
    command("logs", job.job_id, code=3)
    command("cost", "--refresh")
    command("stop", "--all", "--yes")
    command("fetch", "judged", "--delete")
    command("down", code=2)
    command("down", "--yes")

    assert Profile.names() == []
    wrong = [each for each in aws.requests if each.problems]
    assert not wrong
    refused = {(each.operation, each.error) for each in aws.requests if each.error}
    assert refused <= {
        ("DescribeStacks", "ValidationError"),  # how CloudFormation says that there is none
        ("UpdateStack", "ValidationError"),  # likewise that nothing is to change
        ("GetLogEvents", "ResourceNotFoundException"),
        ("DescribeTaskDefinition", "ClientException"),  # how Amazon ECS says that there is none
        # How AWS Lambda says that there is no such function.
        ("GetFunctionConfiguration", "ResourceNotFoundException"),
        ("CreateLaunchTemplate", "InvalidLaunchTemplateName.AlreadyExistsException"),
        ("GetObject", "NoSuchKey"),  # how S3 says that a run has no result yet
    }
    silent = {name for name, calls in called.items() if not calls}
    assert silent <= {"policy", "template", "image use", "image show"}
    definitions = [
        each.parameters for each in aws.requests if each.operation == "RegisterJobDefinition"
    ]
    submitted = {
        each.parameters["jobQueue"] for each in aws.requests if each.operation == "SubmitJob"
    }
    assert submitted == set(profile.queues.values())
    assert {each["platformCapabilities"][0] for each in definitions} == {"FARGATE", "EC2"}
    assert json.dumps(definitions).count("ARM64") >= 1
    assert {"RunTask", "StopTask", "DeregisterTaskDefinition", "DeleteTaskDefinitions"} <= {
        each.operation for each in aws.requests
    }
    assert {"CreateFunction", "Invoke", "PutFunctionConcurrency", "DeleteFunction"} <= {
        each.operation for each in aws.requests
    }
