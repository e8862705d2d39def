"""An account that was set up, for tests of ``cloudexec run`` and its like."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.profile import Profile
from cloudexec._aws.setup import SetupOptions, up
from cloudexec._runs import inside
from cloudexec._runs import run as runs_followed
from cloudexec._runs.bucket import RunBucket
from cloudexec._runs.plan import RunPlan
from cloudexec.testing import FakeAWS

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
IMAGE = f"registry.example/worker@sha256:{'0' * 64}"


def row(run: Callable[..., subprocess.CompletedProcess[str]], name: str) -> dict[str, Any]:
    """Return what `cloudexec runs` says of the one run of a name."""
    rows: list[dict[str, Any]] = json.loads(run("runs", "--json").stdout)
    (found,) = (each for each in rows if each["name"] == name)
    return found


async def _set_up(options: SetupOptions) -> Profile:
    async with AwsClients() as clients:
        return await up(clients, options, lambda event: None, interval=0.01)


@contextmanager
def account(
    profiles: Path,
    patch: pytest.MonkeyPatch,
    *,
    ec2: bool = False,
    fargate: bool = False,
    functions: bool = False,
    instances: bool = False,
    **options: Any,
) -> Iterator[FakeAWS]:
    """An AWS whose jobs are given the address and the credentials of their role."""
    patch.setenv("CLOUDEXEC_CONFIG_DIR", str(profiles))
    patch.delenv("CLOUDEXEC_PROFILE", raising=False)
    patch.setattr(runs_followed, "_POLL", 0.1)  # commands in this process look more often
    settings: dict[str, Any] = {"calls_per_second": 1000, "stack_seconds": 0.0, "grace": 5.0}
    given = {"ec2": instances, "fargate": fargate, "lambda": functions}
    launchers = tuple(name for name, is_wanted in given.items() if is_wanted) or None
    with FakeAWS(aws_in_jobs=True, **(settings | options)) as aws:
        profile = asyncio.run(_set_up(SetupOptions(ec2=ec2, launchers=launchers)))
        # AWS Lambda takes images from Amazon ECR only.
        image = f"{profile.repository}@{IMAGE.partition('@')[2]}" if functions else IMAGE
        profile.with_image(PYTHON, "linux/amd64", image).save()
        yield aws


def eventually(probe: Callable[[], object], *, seconds: float = 60.0) -> None:
    """Wait until something is true."""
    deadline = time.monotonic() + seconds
    while not probe():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        threading.Event().wait(0.05)


def asked(
    aws: FakeAWS,
    patch: pytest.MonkeyPatch,
    operation: str,
    until: threading.Event | None = None,
) -> threading.Event:
    """Return an event that is set when AWS is asked for something, before it answers.

    With ``until``, the first answer waits for that event.
    """
    answer, found = aws.faults.wait_before, threading.Event()

    def noted(name: str) -> None:
        if name == operation:
            is_first = not found.is_set()
            found.set()
            if until is not None and is_first:
                until.wait(60)
        answer(name)

    patch.setattr(aws.faults, "wait_before", noted)
    return found


def left_nothing(aws: FakeAWS, *, within: float = 0.0) -> None:
    """Check that every request was allowed and right, and that no job is active after a time."""
    aws.faults.clear()
    assert not {(each.operation, each.message) for each in aws.requests if each.status == 403}
    assert not [each for each in aws.requests if each.problems]
    eventually(
        lambda: (
            all(each.status in ("SUCCEEDED", "FAILED") for each in aws.jobs())
            and all(each.state in ("shutting-down", "terminated") for each in aws.instances())
        ),
        seconds=within,
    )


def create(plan: RunPlan, objects: Mapping[str, bytes] = MappingProxyType({})) -> None:
    """Write into the bucket what is to be run, and further objects of the run."""
    profile = Profile.load("default")

    async def write() -> None:
        async with AwsClients() as clients:
            bucket = RunBucket(clients, profile.bucket, plan.name)
            assert await bucket.create(plan)
            for name, body in objects.items():
                await clients.call(
                    "s3", "put_object", Bucket=profile.bucket, Key=bucket.prefix + name, Body=body
                )

    asyncio.run(write())


def start_machine(plan: RunPlan, folder: Path) -> subprocess.Popen[str]:
    """Start what a machine runs, without a job."""
    where = place_of(plan)
    return subprocess.Popen(
        [sys.executable, "-m", "cloudexec.worker"],
        cwd=folder,
        env={**os.environ, "CLOUDEXEC_RUN_AT": where, "CLOUDEXEC_RUN_REGION": "us-east-1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def machine_here(
    plan: RunPlan, objects: Mapping[str, bytes] = MappingProxyType({}), *, start_id: str = ""
) -> int:
    """Write what is to be run, and do in this process what a machine does; return its exit code.

    What it prints is captured with ``capfd``.
    """
    create(plan, objects)
    return asyncio.run(inside._run(place_of(plan), plan.region, start_id or plan.start_id))


def place_of(plan: RunPlan) -> str:
    """Return where a run is, as its machine is told it."""
    return f"s3://{Profile.load('default').bucket}/cloudexec/runs/{plan.name}/"
