"""Functions of AWS Lambda without an image, from `up` to `down`: sent, made, run and removed."""

from __future__ import annotations

import asyncio
import io
import logging
import secrets
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from account_helpers import checks, eventually, remove, set_up
from archive_tasks import surroundings
from botocore.exceptions import ClientError

from cloudexec import AwsError, BatchExecutor, ConfigError, Lambda, LaunchError
from cloudexec._aws import function_code
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.function_code import archive_code
from cloudexec._aws.function_requests import FunctionSpec, function_name
from cloudexec._aws.functions import ensure_function
from cloudexec._aws.monitor import Monitor
from cloudexec._aws.policy import policy
from cloudexec._environment.archive import WRAPPER
from cloudexec.aws import Packages
from cloudexec.testing import FakeAWS
from cloudexec.testing._aws import function_archives

RUNTIME = f"python{sys.version_info.major}.{sys.version_info.minor}"


def zipped(**files: str) -> bytes:
    """Return an archive with a wrapper and other files."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in {"cloudexec-function": "#!/bin/bash\n", **files}.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o100755 << 16
            archive.writestr(info, content)
    return made.getvalue()


@pytest.fixture
def spec(aws: FakeAWS) -> FunctionSpec:
    """A function of an archive."""
    return FunctionSpec(
        archive="content",
        runtime=RUNTIME,
        wrapper=WRAPPER,
        role=aws.set_up("function").function_role,
        memory_mib=1769,
    )


async def ensure(spec: FunctionSpec, data: bytes, bucket: str = "") -> str:
    async with AwsClients() as clients:
        return await ensure_function(clients, spec, lambda: archive_code(clients, data, bucket))


def calls(aws: FakeAWS, operation: str) -> list[Any]:
    return [each for each in aws.requests if each.operation == operation]


def test_workers_run_from_an_archive_that_is_sent_once(
    aws: FakeAWS, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By way of the bucket if it is large, with what the policy allows, and without a registry. The
    packages are those of the archive, and neither those of this process nor the runtime's."""
    monkeypatch.setenv("CLOUDEXEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(function_code, "MOST_DIRECT", 1_000_000)
    caplog.set_level(logging.INFO, logger="cloudexec")
    profile = set_up("lambda")
    aws.faults.allow_only(policy(profile))
    launcher = Lambda(packages="none")
    for _ in range(2):
        with BatchExecutor(1, launcher=launcher) as executor, Monitor("default") as monitor:
            found = executor.submit(surroundings).result(timeout=90)
            (shown, *_) = eventually(monitor.jobs)
        places = {path.partition("/lib/python")[0] for path in found.values()}
        assert len(places) == 1, found
        assert Path(found["grpc compiled"]).suffix == ".pyc"
        assert not places & {sys.prefix, sys.base_prefix}
    assert shown.compute == "lambda"
    (made,) = calls(aws, "CreateFunction")
    given = made.parameters
    assert (given["PackageType"], given["Runtime"]) == ("Zip", RUNTIME)
    assert given["Code"]["S3Bucket"] == profile.bucket
    assert given["Environment"] == {"Variables": {"AWS_LAMBDA_EXEC_WRAPPER": WRAPPER}}
    (sent,) = calls(aws, "PutObject")
    assert sent.parameters["Key"] == given["Code"]["S3Key"]
    assert not calls(aws, "GetAuthorizationToken")
    told = [each.getMessage() for each in caplog.records]
    assert sum("making a function of AWS Lambda from a .zip archive" in each for each in told) == 1
    aws.faults.clear()
    eventually(lambda: all(each.status == "succeeded" for each in aws.invocations()))
    assert remove() == ()
    assert not boto3.client("lambda").list_functions()["Functions"]


def test_two_programs_make_the_same_function_at_once(aws: FakeAWS, spec: FunctionSpec) -> None:
    async def run() -> list[str]:
        return await asyncio.gather(*(ensure(spec, zipped()) for _ in range(3)))

    assert len(set(asyncio.run(run()))) == 1
    assert len(boto3.client("lambda").list_functions()["Functions"]) == 1


def test_an_archive_of_some_size_is_sent_with_the_request(aws: FakeAWS, spec: FunctionSpec) -> None:
    """In pieces, as the SDK warns otherwise that it keeps this process from all else."""
    data = zipped(table=secrets.token_hex(1_500_000))
    asyncio.run(ensure(spec, data))
    (made,) = boto3.client("lambda").list_functions()["Functions"]
    assert made["CodeSize"] == len(data) > 1_200_000


def test_each_content_has_a_function_of_its_own(aws: FakeAWS, spec: FunctionSpec) -> None:
    assert asyncio.run(ensure(spec, zipped())) == function_name(spec)
    assert function_name(replace(spec, archive="other")) != function_name(spec)
    (made,) = boto3.client("lambda").list_functions()["Functions"]
    assert (made["PackageType"], made["Runtime"]) == ("Zip", RUNTIME)
    assert made["Architectures"] == ["x86_64"]
    assert made["CodeSize"] == len(zipped())


def test_a_large_archive_is_in_the_bucket_once_for_several_functions(
    aws: FakeAWS, spec: FunctionSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for workers of several sizes."""
    monkeypatch.setattr(function_code, "MOST_DIRECT", 10)
    boto3.client("s3").create_bucket(Bucket="mine")
    for memory_mib in (1769, 3538):
        asyncio.run(ensure(replace(spec, memory_mib=memory_mib), zipped(), "mine"))
    assert len(calls(aws, "CreateFunction")) == 2
    (sent,) = calls(aws, "PutObject")
    # What somebody else has put there is not run.
    boto3.client("s3").put_object(Bucket="mine", Key=sent.parameters["Key"], Body=zipped(a="b"))
    made = asyncio.run(ensure(replace(spec, memory_mib=4096), zipped(), "mine"))
    found = boto3.client("lambda").get_function_configuration(FunctionName=made)
    assert found["CodeSize"] == len(zipped())


@pytest.mark.parametrize(
    ("message", "code", "said"),
    [
        ("Code storage limit exceeded.", "CodeStorageExceededException", "Service Quotas.*'image'"),
        (
            "Unzipped size must be smaller than 255174947 bytes",
            "InvalidParameterValueException",
            r"exclude=.*package='image'",
        ),
        (
            "The runtime parameter of python3.11 is no longer supported for creating or updating "
            "AWS Lambda functions.",
            "InvalidParameterValueException",
            "package='image' needs no runtime",
        ),
    ],
)
def test_a_refused_archive_says_what_to_do(
    aws: FakeAWS, spec: FunctionSpec, message: str, code: str, said: str
) -> None:
    aws.faults.functions.create_fails(message, code)
    with pytest.raises(AwsError, match=said):
        asyncio.run(ensure(spec, zipped()))


def test_a_full_account_is_refused_and_shown_by_doctor(aws: FakeAWS, spec: FunctionSpec) -> None:
    set_up("lambda")
    assert "0.0 of 80.5 GB for .zip archives" in checks()["AWS Lambda"].found
    aws.faults.functions.code_storage = len(zipped()) + 1
    asyncio.run(ensure(spec, zipped()))
    with pytest.raises(AwsError, match="Code storage limit exceeded"):
        asyncio.run(ensure(replace(spec, archive="two"), zipped()))
    full = checks()["AWS Lambda"]
    assert full.outcome == "warning"
    assert "Function and layer storage" in full.remedy


@pytest.mark.parametrize(
    ("code", "limits", "said"),
    [
        ({"ZipFile": b"no archive"}, {}, "Could not unzip"),
        ({"ZipFile": zipped()}, {"_DIRECT": 20}, "Zipped size must be smaller than 20 bytes"),
        ({"ZipFile": zipped(a="a" * 99)}, {"_UNZIPPED": 99}, "Unzipped size must be smaller"),
        ({"S3Bucket": "mine", "S3Key": "missing"}, {}, "NoSuchKey"),
        ({"S3Bucket": "far", "S3Key": "there"}, {}, "PermanentRedirect"),
    ],
)
def test_emulation_refuses_archives_that_lambda_refuses(
    aws: FakeAWS,
    spec: FunctionSpec,
    code: dict[str, Any],
    limits: dict[str, int],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in limits.items():
        monkeypatch.setattr(function_archives, name, value)
    boto3.client("s3").create_bucket(Bucket="mine")
    there = boto3.client("s3", region_name="eu-west-1")
    place = {"LocationConstraint": "eu-west-1"}
    there.create_bucket(Bucket="far", CreateBucketConfiguration=place)
    there.put_object(Bucket="far", Key="there", Body=zipped())
    with pytest.raises(ClientError, match=said):
        boto3.client("lambda").create_function(
            FunctionName="one",
            Role=spec.role,
            Runtime=RUNTIME,
            Handler="a.b",
            Code=code,
            Environment={"Variables": {"AWS_LAMBDA_EXEC_WRAPPER": WRAPPER}},
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"package": "tar"}, "package must be 'auto', 'zip' or 'image', not 'tar'"),
        ({"package": "zip", "image": "x"}, "package='zip' has no image, and image='x'"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Lambda(role="arn:aws:iam::123456789012:role/mine", **settings)  # type: ignore[arg-type]


def test_packages_that_do_not_fit_are_refused_before_anything_is_sent(aws: FakeAWS) -> None:
    """Where no image may take the place of the archive."""
    set_up("lambda")
    aws.clear_requests()
    launcher = Lambda(package="zip", packages=Packages(source="none", base="me/python:1"))
    with pytest.raises((ConfigError, LaunchError), match=r"(?s)need an image.*package='image'"):
        with BatchExecutor(1, launcher=launcher) as executor:
            executor.submit(pow, 2, 3).result(timeout=60)
    assert not calls(aws, "CreateFunction")
    assert not calls(aws, "PutObject")
