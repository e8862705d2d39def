"""The policy of whoever runs executors: enough for what is called, and nothing beyond."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore import xform_name
from click.testing import CliRunner

import cloudexec
from cloudexec import ConfigError
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.doctor import examine
from cloudexec._aws.policy import CALLS, Call, actions_for, policy, unknown_calls
from cloudexec._aws.profile import Profile
from cloudexec._aws.setup import SetupOptions, up
from cloudexec.cli._probe import probe
from cloudexec.cli.policy import policy_command
from cloudexec.testing import FakeAWS

ACCOUNT = "123456789012"
PROFILE = Profile(
    name="default",
    region="eu-central-1",
    stack="cloudexec-default",
    queues={
        "fargate": f"arn:aws:batch:eu-central-1:{ACCOUNT}:job-queue/cloudexec-default-fargate",
        "ec2": "by-name",
    },
    job_role=f"arn:aws:iam::{ACCOUNT}:role/job",
    execution_role=f"arn:aws:iam::{ACCOUNT}:role/execution",
    run_role=f"arn:aws:iam::{ACCOUNT}:role/run",
    key_secret=f"arn:aws:secretsmanager:eu-central-1:{ACCOUNT}:secret:KeySecret-abc",
    log_group="/cloudexec/cloudexec-default",
    bucket="cloudexec-default-bucket-abc",
    repository=f"{ACCOUNT}.dkr.ecr.eu-central-1.amazonaws.com/cloudexec-default",
)


def check_calls(calls: Iterable[Call]) -> None:
    """Fail if the policy lacks a call that was made.

    For tests of the whole path: ``check_calls((r.service, r.operation) for r in aws.requests)``.
    """
    missing = unknown_calls(calls)
    assert not missing, f"cloudexec._aws.policy.CALLS lacks {sorted(missing)}"


def _statements(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["Sid"]: each for each in document["Statement"]}


def test_every_call_in_the_table_exists() -> None:
    """As botocore's models name them."""
    session = botocore.session.get_session()
    for service, operation in CALLS:
        assert operation in session.get_service_model(service).operation_names


def test_every_call_in_the_table_is_made_somewhere() -> None:
    """What nobody calls any more need not be allowed."""
    package = Path(cloudexec.__file__).parent
    sources = "".join(
        path.read_text(encoding="utf-8")
        for path in package.rglob("*.py")
        if "testing" not in path.parts
    )
    unused = {each for each in CALLS if f'"{xform_name(each[1])}"' not in sources}
    assert not unused


def test_a_call_that_is_not_in_the_table_is_found() -> None:
    calls = {("batch", "SubmitJob"), ("batch", "DeleteJobQueue")}
    assert unknown_calls(calls) == {("batch", "DeleteJobQueue")}
    with pytest.raises(ValueError, match="batch:DeleteJobQueue"):
        actions_for(calls, PROFILE)
    with pytest.raises(AssertionError, match="DeleteJobQueue"):
        check_calls(calls)
    check_calls([("batch", "SubmitJob"), ("sts", "GetCallerIdentity")])


@pytest.mark.timeout(60)
def test_whatever_a_run_calls_is_in_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A set-up is checked, and a worker of it runs a task, by a user with that policy alone."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path))

    async def set_up() -> Profile:
        async with AwsClients() as clients:
            return await up(clients, SetupOptions(), lambda event: None, interval=0.01)

    with FakeAWS(grace=0.5, calls_per_second=1000, stack_seconds=0.0) as aws:
        profile = asyncio.run(set_up())
        python = f"{sys.version_info.major}.{sys.version_info.minor}"
        image = f"registry.example/worker@sha256:{'0' * 64}"
        profile.with_image(python, "linux/amd64", image).save()
        aws.clear_requests()
        aws.faults.allow_only(policy(profile))
        checks = asyncio.run(examine("default", lambda check: None))
        assert probe("default", checks, timeout=30).outcome == "ok"
        calls = {(each.service, each.operation) for each in aws.requests}
        assert not [each for each in aws.requests if each.status == 403]
    assert ("batch", "SubmitJob") in calls
    check_calls(calls)


def test_policy_of_a_few_calls_allows_no_more() -> None:
    document = actions_for([("batch", "SubmitJob"), ("batch", "DescribeJobs")], PROFILE)
    allowed = {
        action: each["Resource"] for each in document["Statement"] for action in each["Action"]
    }
    assert set(allowed) == {"batch:SubmitJob", "batch:TagResource", "batch:DescribeJobs"}
    assert allowed["batch:DescribeJobs"] == "*"


@pytest.mark.parametrize("partition", ["aws-cn", "aws-us-gov"])
def test_patterns_are_of_one_partition(partition: str) -> None:
    """ARNs of another one name nothing in the account, so it has to be given."""
    for statement in policy(partition=partition)["Statement"]:
        for arn in [statement["Resource"]] if isinstance(statement["Resource"], str) else []:
            assert arn == "*" or arn.startswith(f"arn:{partition}:")
    with pytest.raises(ConfigError, match="the partition is needed"):
        policy()


def test_partition_of_a_profile_without_arns_is_its_regions() -> None:
    profile = Profile(name="p", region="cn-north-1", queues={"fargate": "by-name"})
    queues = _statements(policy(profile))["Queues"]["Resource"]
    assert queues == "arn:aws-cn:batch:cn-north-1:*:job-queue/by-name"


def test_a_job_is_submitted_on_jobs_too() -> None:
    """The Service Authorization Reference marks the resource type as required."""
    allowed = [
        each["Resource"]
        for each in policy(PROFILE)["Statement"]
        if "batch:SubmitJob" in each["Action"]
    ]
    assert f"arn:aws:batch:eu-central-1:{ACCOUNT}:job/*" in allowed


def test_with_a_profile_the_resources_are_that_stacks() -> None:
    statements = _statements(policy(PROFILE))
    here = f"eu-central-1:{ACCOUNT}"
    assert statements["Queues"]["Resource"] == [
        f"arn:aws:batch:{here}:job-queue/by-name",
        f"arn:aws:batch:{here}:job-queue/cloudexec-default-fargate",
    ]
    definitions = f"arn:aws:batch:{here}:job-definition/cloudexec-*"
    assert statements["JobDefinitions"]["Resource"] == definitions
    assert statements["Images"]["Resource"] == f"arn:aws:ecr:{here}:repository/cloudexec-default"
    assert statements["Key"]["Resource"] == PROFILE.key_secret
    assert statements["Stack"]["Resource"] == (
        f"arn:aws:cloudformation:{here}:stack/cloudexec-default/*"
    )
    group = f"arn:aws:logs:{here}:log-group:/cloudexec/cloudexec-default"
    assert statements["Logs"]["Resource"] == [group, f"{group}:*"]


def test_roles_can_be_passed_to_tasks_and_to_batch_only() -> None:
    """Which of the two AWS Batch passes them to is published both ways."""
    statement = _statements(policy(PROFILE))["PassRoles"]
    assert statement["Action"] == ["iam:PassRole"]
    assert statement["Resource"] == [PROFILE.execution_role, PROFILE.job_role, PROFILE.run_role]
    assert statement["Condition"] == {
        "StringEquals": {"iam:PassedToService": ["batch.amazonaws.com", "ecs-tasks.amazonaws.com"]}
    }


@pytest.mark.parametrize("profile", [None, PROFILE], ids=["patterns", "profile"])
def test_only_what_reads_or_logs_in_is_allowed_on_everything(profile: Profile | None) -> None:
    for statement in policy(profile, "aws")["Statement"]:
        if statement["Resource"] == "*":
            for action in statement["Action"]:
                verb = action.partition(":")[2]
                # What a definition may do is bounded by the roles that may be passed to it.
                is_bounded = action == "ecs:RegisterTaskDefinition"
                assert is_bounded or verb.startswith(("Describe", "Get", "List")), action


_ROLE = f"arn:aws:iam::{ACCOUNT}:role/cloudexec-default-"
_PROFILE = f"arn:aws:iam::{ACCOUNT}:instance-profile/cloudexec-default-"
_QUEUE = f"arn:aws:batch:eu-central-1:{ACCOUNT}:job-queue/cloudexec-default-"
LARGEST = dataclasses.replace(
    PROFILE,
    queues={
        kind: f"{_QUEUE}{kind.replace('_', '-')}"
        for kind in ("fargate", "fargate_spot", "fargate_relay", "ec2", "ec2_spot")
    },
    execution_role=f"{_ROLE}ExecutionRole-AbCdEfGhIjKl",
    job_role=f"{_ROLE}JobRole-AbCdEfGhIjKl",
    run_role=f"{_ROLE}RunRole-AbCdEfGhIjKl",
    function_role=f"{_ROLE}FunctionRole-AbCdEfGhIjKl",
    instance_profile=f"{_PROFILE}WorkerProfile-AbCdEfGhIjKl",
    instance_role=f"{_ROLE}WorkerRole-AbCdEfGhIjKl",
    run_profile=f"{_PROFILE}RunProfile-AbCdEfGhIjKl",
    cluster=f"arn:aws:ecs:eu-central-1:{ACCOUNT}:cluster/cloudexec-default",
)
"""A profile for all launchers, as ``cloudexec up --ec2 --with batch,fargate,lambda,ec2`` makes."""


def test_a_policy_that_is_too_long_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long names make it longer than IAM takes as one managed policy."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path))
    name = "stack-of-" + "a-very-long-name-" * 5
    fields = dataclasses.asdict(LARGEST)
    fields["queues"] = {kind: arn.replace("default", name) for kind, arn in LARGEST.queues.items()}
    for key, value in fields.items():
        if isinstance(value, str):
            fields[key] = value.replace("cloudexec-default", f"cloudexec-{name}")
    Profile(**{**fields, "name": "long"}).save()
    result = CliRunner().invoke(policy_command, ["--profile", "long"])
    assert result.exit_code == 0
    assert "IAM takes managed policies of 6,144" in result.stderr
    assert json.loads(result.stdout)["Version"] == "2012-10-17"


def test_queues_of_a_stack_are_named_by_short_patterns() -> None:
    queues = _statements(policy(LARGEST))["Queues"]["Resource"]
    assert queues == [f"{_QUEUE}ec2*", f"{_QUEUE}fargate*"]


@pytest.mark.parametrize(
    "profile", [None, PROFILE, LARGEST], ids=["patterns", "profile", "all launchers"]
)
def test_policy_is_well_formed(profile: Profile | None) -> None:
    """It fits into a managed policy: 6,144 characters without spaces. IAM User Guide, "IAM and
    AWS STS quotas"."""
    document = policy(profile, "aws")
    assert document["Version"] == "2012-10-17"
    sids = [each["Sid"] for each in document["Statement"]]
    assert len(set(sids)) == len(sids)
    assert all(sid.isalnum() for sid in sids)
    assert len(json.dumps(document, separators=(",", ":"))) < 6144
    for each in document["Statement"]:
        arns = each["Resource"] if isinstance(each["Resource"], list) else [each["Resource"]]
        assert all(arn == "*" or arn.count(":") >= 5 for arn in arns)
        for action in each["Action"]:
            assert "*" not in action


def test_without_a_profile_the_key_is_told_by_its_tag() -> None:
    statement = _statements(policy(partition="aws"))["Key"]
    assert statement["Condition"] == {
        "StringLike": {"aws:ResourceTag/cloudexec:stack": "cloudexec-*"}
    }


def test_nobody_is_let_delete_or_create_what_costs() -> None:
    """But for objects that executors make, instances with the stack's tag, and functions."""
    actions = {action for each in policy(partition="aws")["Statement"] for action in each["Action"]}
    found = {each for each in actions if each.partition(":")[2].startswith(("Delete", "Create"))}
    instances = {"ec2:CreateFleet", "ec2:CreateLaunchTemplate", "ec2:CreateTags"}
    functions = {  # which cost nothing by themselves
        "lambda:CreateFunction",
        "lambda:DeleteFunction",
        "lambda:DeleteFunctionConcurrency",
    }
    assert found - instances - functions == {"s3:DeleteObject"}


def test_objects_are_those_of_executors_only() -> None:
    """Not what tasks keep in the same bucket, and nothing in another."""
    statements = _statements(policy(PROFILE))
    bucket = f"arn:aws:s3:::{PROFILE.bucket}"
    assert statements["Objects"]["Resource"] == f"{bucket}/cloudexec/*"
    assert statements["Bucket"]["Resource"] == bucket
    assert (
        _statements(policy(partition="aws"))["Objects"]["Resource"]
        == "arn:aws:s3:::cloudexec-*/cloudexec/*"
    )
