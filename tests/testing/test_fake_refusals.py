"""What the fake AWS refuses: what the service models say, and what AWS documents beyond them.

Nothing here starts a job, so all tests share one account.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError
from fake_helpers import Account

from cloudexec.testing import FakeAWS


@pytest.fixture(scope="module")
def account() -> Iterator[Account]:
    with FakeAWS(calls_per_second=1000.0) as aws:
        account = Account(aws)
        yield account
        account.close()


def refused(account: Account, code: str = "ClientException") -> Any:
    return pytest.raises(ClientError, match=code)


@pytest.mark.parametrize(
    "parameters",
    [
        {"arrayProperties": {"size": 1}},
        {"arrayProperties": {"size": 10_001}},
        {"jobName": "-job"},
        {"jobName": "a.b"},
        {"jobName": "x" * 129},
        {"timeout": {"attemptDurationSeconds": 59}},
        {"retryStrategy": {"attempts": 11}},
        {"retryStrategy": {"evaluateOnExit": [{"onReason": "*", "action": "EXIT"}]}},
        {
            "retryStrategy": {
                "attempts": 2,
                "evaluateOnExit": [{"onReason": "a-b", "action": "EXIT"}],
            }
        },
        {"tags": {f"key-{n}": "x" for n in range(51)}},
        {"tags": {"aws:mine": "x"}},
        {"containerOverrides": {"environment": [{"name": "AWS_BATCH_X", "value": "1"}]}},
        {"containerOverrides": {"command": ["a", ""]}},
        {"containerOverrides": {"environment": [{"name": "A", "value": "x" * 31_000}]}},
        {"containerOverrides": {"resourceRequirements": [{"type": "MEMORY", "value": "777"}]}},
        {"jobQueue": "nowhere"},
        {"jobDefinition": "nothing"},
        {"dependsOn": [{"jobId": "nobody"}]},
        {"shareIdentifier": "mine"},
    ],
    ids=lambda parameters: next(iter(parameters)),
)
def test_submit_job_refuses_what_aws_refuses(account: Account, parameters: Any) -> None:
    definition = account.define("exit 0")
    with refused(account):
        account.batch.submit_job(
            **{
                "jobName": "job",
                "jobQueue": account.setup.queue,
                "jobDefinition": definition,
                **parameters,
            }
        )
    assert account.aws.requests[-1].error == "ClientException"
    assert account.aws.jobs() == []


@pytest.mark.parametrize(
    "container",
    [
        {"resourceRequirements": [{"type": "VCPU", "value": "1"}]},
        {
            "resourceRequirements": [
                {"type": "VCPU", "value": "0.25"},
                {"type": "MEMORY", "value": "777"},
            ]
        },
        {"environment": [{"name": "AWS_BATCH_X", "value": "1"}]},
        {"executionRoleArn": ""},
        {"privileged": True},
        {"ephemeralStorage": {"sizeInGiB": 20}},
        {"command": ["x" * 25_000]},
        {"image": "x" * 256},
        {"vcpus": 1, "memory": 2048},
        {"logConfiguration": {"logDriver": "json-file"}},
        {"linuxParameters": {"devices": [{"hostPath": "/dev/fuse"}]}},
        {"linuxParameters": {"sharedMemorySize": 64}},
        {"linuxParameters": {"tmpfs": [{"containerPath": "/t", "size": 64}]}},
        {"linuxParameters": {"maxSwap": 0}},
        {"volumes": [{"name": "v", "host": {"sourcePath": "/data"}}]},
        {"ulimits": [{"name": "nofile", "softLimit": 1, "hardLimit": 1}]},
        {"fargatePlatformConfiguration": {"platformVersion": "1.3.0"}},
        {"fargatePlatformConfiguration": {"platformVersion": "latest"}},
        {"runtimePlatform": {"cpuArchitecture": "arm64"}},
        {"executionRoleArn": "execution"},
        {"jobRoleArn": "arn:aws:iam::1234:role/job"},
        {"secrets": [{"name": "KEY", "valueFrom": "arn:aws:secretsmanager:key"}]},
        {
            "environment": [{"name": "KEY", "value": "1"}],
            "secrets": [{"name": "KEY", "valueFrom": "/key"}],
        },
        {"secrets": [{"name": "AWS_BATCH_KEY", "valueFrom": "/key"}]},
    ],
    ids=lambda container: "-".join(container),
)
def test_job_definition_refuses_what_aws_refuses(account: Account, container: Any) -> None:
    with refused(account):
        account.define(**container)


def test_job_definition_is_for_one_platform(account: Account) -> None:
    with refused(account):
        account.define("exit 0", capabilities=["EC2", "FARGATE"])


def test_empty_tags_are_refused(account: Account) -> None:
    """They may be absent: the map has at least one member."""
    definition = account.define("exit 0")
    with refused(account):
        account.submit(jobDefinition=definition, tags={})
    assert account.aws.requests[-1].problems


@pytest.mark.parametrize(
    ("service", "operation", "parameters", "words"),
    [
        ("ec2", "describe_subnets", {"MaxResults": 1001}, "1000 is the most"),
        ("ecr", "create_repository", {"repositoryName": "Upper"}, "does not fit the pattern"),
        ("iam", "get_role", {"RoleName": "x" * 65}, "64 is the most"),
        ("secretsmanager", "create_secret", {"Name": "x" * 513}, "512 is the most"),
        ("s3", "delete_objects", {"Delete": {"Objects": [{"Key": ""}]}}, "at least 1"),
    ],
)
def test_request_outside_the_bounds_of_the_model_is_refused(
    account: Account, service: str, operation: str, parameters: Any, words: str
) -> None:
    """Clients check the least of a range and nothing else: patterns and maxima are AWS's."""
    from botocore.config import Config

    client = boto3.client(service, config=Config(parameter_validation=False))
    bucket = {"Bucket": "mine"} if service == "s3" else {}
    with pytest.raises(ClientError, match=words):
        getattr(client, operation)(**bucket, **parameters)
    assert account.aws.requests[-1].problems
    client.close()


def test_fargate_environment_refuses_what_is_for_ec2(account: Account) -> None:
    for extra in ({"minvCpus": 0}, {"instanceTypes": ["optimal"]}, {"tags": {"a": "b"}}):
        with refused(account):
            account.batch.create_compute_environment(
                computeEnvironmentName="mine",
                type="MANAGED",
                computeResources={
                    "type": "FARGATE",
                    "maxvCpus": 4,
                    "subnets": list(account.setup.subnets),
                    "securityGroupIds": [account.setup.security_group],
                    **extra,
                },
            )


def test_fargate_environment_cannot_be_changed_into_one_of_instances(account: Account) -> None:
    for change in ({"instanceTypes": ["optimal"]}, {"minvCpus": 1}, {"subnets": ["s"] * 17}):
        with refused(account):
            account.batch.update_compute_environment(
                computeEnvironment=account.setup.compute_environments[0], computeResources=change
            )


@pytest.mark.parametrize("tags", [{"a#b": "c"}, {"a": "c\n"}, {"aws:a": "b"}, {"a": "b" * 257}])
def test_tags_that_aws_refuses(account: Account, tags: dict[str, str]) -> None:
    with pytest.raises(ClientError, match=r"[Tt]ag"):
        account.submit("exit 0", tags=tags)


@pytest.mark.parametrize(
    ("operation", "parameters"),
    [
        ("describe_jobs", {"jobs": ["x"], "unknown": 1}),
        ("describe_jobs", {"jobs": "x"}),
        ("describe_jobs", {}),
        ("list_jobs", {"jobQueue": "x", "jobStatus": "DONE"}),
    ],
    ids=["unknown-member", "wrong-type", "missing-member", "no-such-value"],
)
def test_request_that_the_service_model_does_not_know_is_refused(
    account: Account, operation: str, parameters: Any
) -> None:
    """Also where a client does not check what it sends."""
    from botocore.config import Config

    client = boto3.client("batch", config=Config(parameter_validation=False))
    client.meta.events.register(
        "before-call.batch",
        lambda params, **_: params.update(body=json.dumps(parameters).encode()),
    )
    with pytest.raises(ClientError, match="ClientException"):
        getattr(client, operation)(**{"jobs": ["x"]} if operation == "describe_jobs" else {})
    client.close()
