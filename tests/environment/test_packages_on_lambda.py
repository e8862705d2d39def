"""``Lambda`` makes an image of the packages where an archive of them does not do."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from environment_helpers import Client, make_wheel, worker_wheels

from cloudexec import BatchExecutor, Lambda, LaunchError
from cloudexec._aws.image_contents import worker_pins
from cloudexec._environment import archive, assembly
from cloudexec.aws import Profile
from cloudexec.testing import FakeAWS


@pytest.fixture
def aws(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An emulated AWS, whose ECR is the registry, with a profile that has no image."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("CLOUDEXEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/engine.sock")
    monkeypatch.setattr(assembly, "default_base", lambda python: f"{address}/python:amd64")
    with FakeAWS(grace=2.0, calls_per_second=1000, registry=address) as fake:
        ecr = boto3.client("ecr")
        made = ecr.create_repository(repositoryName=f"on-lambda/{tmp_path.name}")
        may_read = {"Effect": "Allow", "Principal": {"Service": "lambda.amazonaws.com"}}
        ecr.set_repository_policy(
            repositoryName=made["repository"]["repositoryName"],
            policyText=json.dumps({"Statement": [{**may_read, "Action": ["ecr:BatchGetImage"]}]}),
        )
        Profile(
            name="team",
            region=fake.region,
            function_role=fake.set_up("function").function_role,
            repository=made["repository"]["repositoryUri"],
        ).save()
        yield fake


@pytest.fixture(autouse=True)
def here(client: Client, monkeypatch: pytest.MonkeyPatch) -> Client:
    """An environment that stands for the one of this process."""
    worker_wheels(client.wheels)
    monkeypatch.setattr(assembly, "take_inventory", client.inventory)
    monkeypatch.setattr(archive, "take_inventory", client.inventory)
    monkeypatch.setenv("UV_FIND_LINKS", str(client.wheels))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    make_wheel(client.wheels, "thing", "7.1")
    # The init alone is fetched, and for images only.
    client.install("thing", *(each.partition("==")[0] for each in worker_pins()[:-1]))
    return client


def made_of(aws: Any) -> list[str]:
    """Return what CreateFunction was asked to make functions of."""
    found = [each for each in aws.requests if each.operation == "CreateFunction"]
    return [each.parameters["PackageType"] for each in found]


def test_an_image_is_made_where_there_is_no_room_for_an_archive(
    aws: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """What was chosen, and why, is told."""
    aws.faults.functions.code_storage = 1000
    caplog.set_level(logging.INFO, logger="cloudexec")
    with BatchExecutor(1, launcher=Lambda(profile="team")) as executor:
        assert executor.submit(len, "abc").result(timeout=60) == 3
    assert made_of(aws) == ["Zip", "Image"]
    told = " ".join(each.getMessage() for each in caplog.records)
    assert "workers on AWS Lambda need an image: " in told
    assert "Code storage limit exceeded" in told


def test_no_image_is_made_where_an_archive_is_demanded(aws: Any) -> None:
    aws.faults.functions.create_fails("Code storage limit.", "CodeStorageExceededException")
    with BatchExecutor(1, launcher=Lambda(profile="team", package="zip")) as executor:
        with pytest.raises(LaunchError, match=r"Code storage limit.*Service Quotas"):
            executor.submit(len, "abc").result(timeout=60)
    assert set(made_of(aws)) == {"Zip"}


def test_an_image_is_made_of_packages_that_do_not_fit_into_an_archive(
    aws: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "MOST_UNPACKED", 1_000_000)
    caplog.set_level(logging.INFO, logger="cloudexec")
    with BatchExecutor(1, launcher=Lambda(profile="team")) as executor:
        assert executor.submit(len, "abc").result(timeout=60) == 3
    assert made_of(aws) == ["Image"]
    told = " ".join(each.getMessage() for each in caplog.records)
    assert "workers on AWS Lambda need an image: the packages have" in told
