"""What the fake AWS's API takes, refuses, shows and records."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from fake_helpers import Account, eventually

from cloudexec import ConfigError
from cloudexec.testing import FakeAWS, JobRecord


def refused(account: Account, code: str = "ClientException") -> Any:
    return pytest.raises(ClientError, match=code)


# Limits.


def test_definitions_keep_all_that_was_registered(account: Account) -> None:
    """Revisions count up; a name means the latest ACTIVE one; a deregistered one cannot be run."""
    parameters: dict[str, Any] = {
        "jobDefinitionName": "mine",
        "type": "container",
        "platformCapabilities": ["FARGATE"],
        "retryStrategy": {"attempts": 2},
        "timeout": {"attemptDurationSeconds": 60},
        "propagateTags": True,
        "tags": {"a": "b"},
        "containerProperties": {
            "image": "worker:1",
            "executionRoleArn": account.setup.execution_role,
            "resourceRequirements": [
                {"type": "VCPU", "value": "1"},
                {"type": "MEMORY", "value": "2048"},
            ],
            "ephemeralStorage": {"sizeInGiB": 30},
        },
    }
    first = account.batch.register_job_definition(**parameters)
    second = account.batch.register_job_definition(**parameters)
    assert (first["revision"], second["revision"]) == (1, 2)
    found = account.batch.describe_job_definitions(jobDefinitionName="mine", status="ACTIVE")
    assert [entry["revision"] for entry in found["jobDefinitions"]] == [2, 1]
    shown = found["jobDefinitions"][0]
    for name in ("retryStrategy", "timeout", "propagateTags", "tags", "platformCapabilities"):
        assert shown[name] == parameters[name]
    assert shown["containerProperties"]["ephemeralStorage"] == {"sizeInGiB": 30}
    account.batch.deregister_job_definition(jobDefinition="mine:2")
    assert account.detail(account.submit(jobDefinition="mine"))["jobDefinition"].endswith(":1")
    with refused(account):
        account.submit(jobDefinition="mine:2")


def test_more_tags_than_a_task_takes_fail_the_job(account: Account) -> None:
    """Each request has as many as it may; together they are too many, if they are propagated."""
    definition = account.define("exit 0", tags={f"d{n}": "" for n in range(30)})
    tags = {f"j{n}": "" for n in range(30)}
    kept = account.submit(jobDefinition=definition, tags=tags)
    lost = account.submit(jobDefinition=definition, tags=tags, propagateTags=True)
    assert account.ended(kept).status == "SUCCEEDED"
    assert account.ended(lost).status == "FAILED"
    assert "50" in (account.ended(lost).status_reason or "")


def test_teardown_has_an_order(account: Account) -> None:
    """A queue must be DISABLED before it goes, an environment free of queues and DISABLED."""
    batch, queue = account.batch, account.setup.queue
    environment = account.setup.compute_environments[0]
    job_id = account.submit("echo up; exec sleep 60")
    account.prints(job_id, "up")
    with refused(account):
        batch.delete_job_queue(jobQueue=queue)
    with refused(account):
        batch.delete_compute_environment(computeEnvironment=environment)
    batch.update_job_queue(jobQueue=queue, state="DISABLED")
    with refused(account):
        account.submit("exit 0")
    batch.update_compute_environment(computeEnvironment=environment, state="DISABLED")
    with refused(account):
        batch.delete_compute_environment(computeEnvironment=environment)
    batch.delete_job_queue(jobQueue=queue)
    assert account.ended(job_id).status == "FAILED"
    assert batch.describe_job_queues()["jobQueues"] == []
    batch.delete_compute_environment(computeEnvironment=environment)
    assert batch.describe_compute_environments()["computeEnvironments"] == []


def test_queue_refuses_a_mix_of_ec2_and_fargate(aws: FakeAWS) -> None:
    with pytest.raises(Exception, match="cannot share"):
        aws.set_up(kinds=("FARGATE", "EC2"))


# Listing.


def test_list_jobs_shows_running_jobs_unless_told_otherwise(account: Account) -> None:
    running = account.submit("echo up; exec sleep 60")
    done = account.submit("exit 0")
    account.prints(running, "up")
    account.ended(done)

    def listed(**parameters: Any) -> set[str]:
        found = account.batch.list_jobs(jobQueue=account.setup.queue, **parameters)
        return {job["jobId"] for job in found["jobSummaryList"]}

    assert listed() == {running}
    assert listed(jobStatus="SUCCEEDED") == {done}
    assert listed(filters=[{"name": "JOB_NAME", "values": ["JO*"]}]) == {running, done}
    assert listed(filters=[{"name": "AFTER_CREATED_AT", "values": ["0"]}]) == {running, done}
    assert listed(filters=[{"name": "BEFORE_CREATED_AT", "values": ["0"]}]) == set()
    assert listed(filters=[{"name": "JOB_DEFINITION", "values": ["definition-1"]}]) == {running}
    with refused(account):
        account.batch.list_jobs(jobQueue=account.setup.queue, arrayJobId=done)
    with refused(account):
        account.batch.list_jobs()


def test_filtered_lists_come_in_pages_of_a_hundred(account: Account) -> None:
    account.aws.faults.no_capacity()
    definition = account.define("exit 0")
    for _ in range(120):
        account.submit(jobDefinition=definition)
    pages = list(
        account.batch.get_paginator("list_jobs").paginate(
            jobQueue=account.setup.queue, filters=[{"name": "JOB_NAME", "values": ["job"]}]
        )
    )
    assert [len(page["jobSummaryList"]) for page in pages] == [100, 20]


def test_describe_jobs_takes_a_hundred_ids_and_skips_unknown_ones(account: Account) -> None:
    assert account.batch.describe_jobs(jobs=["unknown"])["jobs"] == []
    with refused(account):
        account.batch.describe_jobs(jobs=["x"] * 101)


# What requests look like.


def test_requests_are_recorded_as_they_were_made(account: Account) -> None:
    account.aws.clear_requests()
    account.s3.create_bucket(Bucket="mine")
    account.s3.put_object(Bucket="mine", Key="a/b", Body=b"x", ContentType="text/plain")
    account.ec2.describe_subnets(Filters=[{"Name": "vpc-id", "Values": ["vpc-1"]}])
    account.iam.list_roles()
    account.sts.get_caller_identity()
    account.batch.list_tags_for_resource(resourceArn=account.setup.queue)
    account.resourcegroupstaggingapi.get_resources()
    seen = {request.operation: request for request in account.aws.requests}
    assert [request.service for request in account.aws.requests] == [
        "s3",
        "s3",
        "ec2",
        "iam",
        "sts",
        "batch",
        "resourcegroupstaggingapi",
    ]
    assert seen["PutObject"].parameters["Key"] == "a/b"
    assert seen["DescribeSubnets"].parameters == {
        "Filters": [{"Name": "vpc-id", "Values": ["vpc-1"]}]
    }
    assert seen["ListTagsForResource"].parameters == {"resourceArn": account.setup.queue}
    assert all(request.status == 200 for request in account.aws.requests)


def test_aiobotocore_works(account: Account) -> None:
    pytest.importorskip("aiobotocore")
    from aiobotocore.session import get_session

    async def run() -> JobRecord:
        session = get_session()
        async with session.create_client("batch") as batch:
            answer = await batch.submit_job(
                jobName="job",
                jobQueue=account.setup.queue,
                jobDefinition=account.define("echo hello"),
            )
        async with session.create_client("s3") as s3:
            await s3.create_bucket(Bucket="mine")
            await s3.put_object(Bucket="mine", Key="k", Body=b"abc")
            found = await s3.get_object(Bucket="mine", Key="k")
            assert await found["Body"].read() == b"abc"
        return account.ended(answer["jobId"])

    assert asyncio.run(run()).status == "SUCCEEDED"


def test_jobs_can_call_the_same_aws() -> None:
    with FakeAWS(step=0.005, aws_in_jobs=True) as aws:
        account = Account(aws)
        script = 'python -c \'import boto3; boto3.client("s3").create_bucket(Bucket="mine")\''
        assert account.ended(account.submit(script)).status == "SUCCEEDED"
        assert account.s3.list_buckets()["Buckets"][0]["Name"] == "mine"
        account.close()


def test_tags_of_a_job_can_be_listed(account: Account) -> None:
    job_id = account.submit("exit 0", tags={"a": "b"})
    arn = account.detail(job_id)["jobArn"]
    assert account.batch.list_tags_for_resource(resourceArn=arn)["tags"] == {"a": "b"}


def test_fargate_prices_can_be_asked_for(account: Account) -> None:
    found = account.pricing.get_products(
        ServiceCode="AmazonECS",
        Filters=[
            {"Type": "TERM_MATCH", "Field": "regionCode", "Value": "us-east-1"},
            {"Type": "CONTAINS", "Field": "usagetype", "Value": "Fargate-vCPU"},
        ],
    )["PriceList"]
    product = json.loads(found[0])
    assert product["product"]["attributes"]["usagetype"] == "USE1-Fargate-vCPU-Hours:perCPU"
    term = next(iter(product["terms"]["OnDemand"].values()))
    price = next(iter(term["priceDimensions"].values()))["pricePerUnit"]["USD"]
    assert float(price) == 0.04048


# Secrets.


def test_secrets_of_the_definition_reach_the_job(account: Account) -> None:
    """Whole, one JSON key, from Secrets Manager and Parameter Store; Describe shows no value."""
    arn = account.secretsmanager.create_secret(Name="key", SecretString='{"a": "alpha"}')["ARN"]
    account.ssm.put_parameter(Name="/my/key", Value="beta", Type="SecureString")
    definition = account.define(
        'echo "$WHOLE|$PART|$SSM|$BY_ARN"',
        secrets=[
            {"name": "WHOLE", "valueFrom": arn},
            {"name": "PART", "valueFrom": f"{arn}:a:AWSCURRENT:"},
            {"name": "SSM", "valueFrom": "/my/key"},
            {"name": "BY_ARN", "valueFrom": "arn:aws:ssm:us-east-1:123456789012:parameter/my/key"},
        ],
    )
    job_id = account.submit(jobDefinition=definition)
    account.ended(job_id)
    assert account.aws.logs(job_id) == ['{"a": "alpha"}|alpha|beta|beta']
    assert "alpha" not in str(account.detail(job_id))


@pytest.mark.parametrize(
    "value",
    [
        "arn:aws:secretsmanager:us-east-1:123456789012:secret:none-AbCdEf",
        "/no/parameter",
    ],
)
def test_secret_that_cannot_be_read_keeps_the_job_from_starting(
    account: Account, value: str
) -> None:
    definition = account.define("exit 0", secrets=[{"name": "KEY", "valueFrom": value}])
    job = account.ended(account.submit(jobDefinition=definition))
    assert (job.status_reason or "").startswith("ResourceInitializationError: unable to pull")
    assert job.exit_code is None


def test_variable_with_the_name_of_a_secret_keeps_the_job_from_starting(account: Account) -> None:
    """The definition has no such variable; the submission adds one."""
    definition = account.define("exit 0", secrets=[{"name": "KEY", "valueFrom": "/my/key"}])
    overrides = {"environment": [{"name": "KEY", "value": "1"}]}
    job = account.ended(account.submit(jobDefinition=definition, containerOverrides=overrides))
    assert job.status == "FAILED"
    assert "unique and not shared" in (job.status_reason or "")


# The fake itself.


def test_only_one_can_be_entered(aws: FakeAWS) -> None:
    with pytest.raises(RuntimeError, match="entered already"), FakeAWS():
        pass


def test_container_mode_needs_an_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """``auto`` then runs processes; after a refusal the next one can be entered."""
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(ConfigError, match="no container engine answers"):
        FakeAWS(mode="container").__enter__()
    with FakeAWS(mode="auto") as aws:
        assert aws.mode == "process"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mode": "docker"}, "process, container, auto"),
        ({"grace": -1}, "grace"),
        ({"calls_per_second": 0}, "calls_per_second"),
        ({"max_running": 0}, "max_running"),
        ({"speed": "fast"}, "speed"),
        ({"region": "mars-1"}, "'mars-1'"),
        ({"region": "us-mars-1"}, "'us-mars-1'"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        FakeAWS(**settings).__enter__()


def test_a_region_that_aws_does_not_have_is_refused(aws: FakeAWS) -> None:
    """Not with an error of the fake's own, as if it had failed."""
    client = boto3.client("batch", region_name="us-mars-1")
    with pytest.raises(ClientError, match="no AWS region 'us-mars-1'") as caught:
        client.describe_job_queues()
    assert caught.value.response["Error"]["Code"] == "UnknownRegion"
    client.close()


def test_without_its_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """And another one can be entered afterwards."""
    monkeypatch.setitem(sys.modules, "cloudexec.testing._aws.session", None)
    with pytest.raises(ImportError, match=r"cloudexec\[testing\]"):
        FakeAWS().__enter__()
    monkeypatch.undo()
    with FakeAWS() as aws:
        assert aws.jobs() == []


def test_state_is_empty_on_entering_and_environment_is_restored(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import os

    monkeypatch.setenv("AWS_REGION", "mars-north-1")
    monkeypatch.setenv("AWS_PROFILE", "mine")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    for _ in range(2):
        with FakeAWS(region="eu-central-1") as aws:
            account = Account(aws)
            assert os.environ["AWS_REGION"] == "eu-central-1"
            assert "AWS_PROFILE" not in os.environ
            assert account.batch.describe_job_queues()["jobQueues"][0]["jobQueueName"] == "test"
            assert account.ended(account.submit("exit 0")).status == "SUCCEEDED"
            account.close()
    assert os.environ["AWS_REGION"] == "mars-north-1"
    assert os.environ["AWS_PROFILE"] == "mine"
    assert "AWS_ENDPOINT_URL" not in os.environ


def test_plugin_gives_the_fixture(fake_aws: FakeAWS) -> None:
    assert fake_aws.jobs() == []


def test_package_is_imported_without_moto() -> None:
    """``cloudexec.testing`` itself needs none of what the fake AWS needs."""
    script = (
        "import sys, cloudexec.testing; "
        "assert not {'moto', 'boto3', 'botocore', 'psutil', 'werkzeug'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_image_can_stand_for_another_interpreter(tmp_path: Any) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho other $2\n")
    python.chmod(0o755)
    with FakeAWS(step=0.005, images={"old:*": str(python)}) as aws:
        account = Account(aws)
        job_id = account.submit(jobDefinition=account.define(image="old:1"))
        account.ended(job_id)
        eventually(lambda: aws.logs(job_id))
        account.close()
        assert aws.logs(job_id) == ["other cloudexec.worker"]
