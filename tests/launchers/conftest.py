"""An emulated AWS with one queue, and launchers for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import botocore.retries.standard
import pytest

from cloudexec import EC2, Batch, Fargate
from cloudexec._aws.profile import Profile
from cloudexec.testing import FakeAWS


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


def write_profile(aws: Any) -> None:
    """Make what `up --with ec2` makes, as far as instances need it, and write a profile of it."""
    made = aws.set_up("instances")
    iam = boto3.client("iam", region_name=aws.region)
    iam.create_instance_profile(InstanceProfileName="instances")
    iam.add_role_to_instance_profile(InstanceProfileName="instances", RoleName="instances-instance")
    profile = iam.get_instance_profile(InstanceProfileName="instances")["InstanceProfile"]
    secret = boto3.client("secretsmanager", region_name=aws.region).create_secret(
        Name="key", SecretString="0f" * 32
    )
    boto3.client("logs", region_name=aws.region).create_log_group(logGroupName="/instances")
    Profile(
        name="instances",
        region=aws.region,
        queues={"fargate": made.queue},
        execution_role=made.execution_role,
        job_role=made.job_role,
        key_secret=secret["ARN"],
        log_group="/instances",
        subnets=made.subnets,
        security_group=made.security_group,
        instance_profile=profile["Arn"],
        instance_role=profile["Roles"][0]["Arn"],
    ).save()


@pytest.fixture
def launcher(
    aws: Any, launcher_factory: Callable[[Any], Callable[..., Batch]]
) -> Callable[..., Batch]:
    """A function that makes launchers for the emulated AWS."""
    return launcher_factory(aws)
