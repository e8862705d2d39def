"""An emulated AWS with one queue, and launchers for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import botocore.retries.standard
import pytest
from launcher_helpers import write_profile

from cloudexec import EC2, Batch, Fargate, Lambda
from cloudexec.testing import FakeAWS

IMAGE = f"123456789012.dkr.ecr.us-east-1.amazonaws.com/worker@sha256:{'0' * 64}"
"""Pinned by its digest, in Amazon ECR, where AWS Lambda takes its images from."""


@pytest.fixture
def aws() -> Iterator[Any]:
    """An emulated AWS whose containers have two seconds between SIGTERM and SIGKILL."""
    with FakeAWS(grace=2.0, calls_per_second=1000) as fake:
        yield fake


@pytest.fixture(autouse=True)
def impatient_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    """The AWS SDK pauses less before it makes a call again: 1.1 s in all at most, not 31 s."""
    monkeypatch.setattr(botocore.retries.standard.ExponentialBackoff, "_BASE", 0.1)


@pytest.fixture
def launcher_factory() -> Callable[[Any], Callable[..., Batch]]:
    """A function that takes an emulated AWS, and returns a function that makes its launchers."""

    def of(aws: Any) -> Callable[..., Batch]:
        def make(
            *, max_vcpus: int = 16, kinds: tuple[str, ...] | None = None, **settings: Any
        ) -> Batch:
            spot = bool(settings.get("spot", False))
            options: dict[str, Any] = {"spot": spot} if kinds is None else {"kinds": kinds}
            made = aws.set_up("queue", max_vcpus=max_vcpus, **options)
            return Batch(
                queue=made.queue,
                job_role=made.job_role,
                execution_role=made.execution_role,
                region=aws.region,
                **{"image": "example.com/worker:1", **settings},
            )

        return make

    return of


@pytest.fixture
def fargate(aws: Any) -> Callable[..., Fargate]:
    """A function that makes launchers for a cluster of the emulated AWS."""
    made = aws.set_up("cluster")

    def make(**settings: Any) -> Fargate:
        given: dict[str, Any] = {
            "cluster": made.cluster,
            "subnets": made.subnets,
            "security_groups": [made.security_group],
            "job_role": made.job_role,
            "execution_role": made.execution_role,
            "region": aws.region,
            "image": "example.com/worker:1",
            **settings,
        }
        return Fargate(**given)

    return make


@pytest.fixture
def ec2(aws: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., EC2]:
    """A function that makes launchers for an account with a role for instances."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path / "profiles"))
    write_profile(aws)

    def make(**settings: Any) -> EC2:
        return EC2(**{"image": "example.com/worker:1", "profile": "instances", **settings})

    return make


@pytest.fixture
def function(aws: Any) -> Callable[..., Lambda]:
    """A function that makes launchers for functions of the emulated AWS Lambda."""
    made = aws.set_up("function")

    def make(**settings: Any) -> Lambda:
        given: dict[str, Any] = {
            "role": made.function_role,
            "region": aws.region,
            "image": IMAGE,
            "memory": 1769,
            **settings,
        }
        return Lambda(**given)

    return make


@pytest.fixture
def launcher(
    aws: Any, launcher_factory: Callable[[Any], Callable[..., Batch]]
) -> Callable[..., Batch]:
    """A function that makes launchers for the emulated AWS."""
    return launcher_factory(aws)
