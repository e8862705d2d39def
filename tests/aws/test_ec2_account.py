"""An account that is set up for EC2 instances without AWS Batch: from `up` to `down`."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from account_helpers import checks, eventually, ignore, remove, set_up
from click.testing import CliRunner

from cloudexec import EC2, BatchExecutor, ConfigError, LaunchError
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.monitor import Monitor
from cloudexec._aws.policy import policy
from cloudexec._aws.profile import Profile
from cloudexec._aws.teardown import down, take_stock
from cloudexec._aws.template import template
from cloudexec.cli.ps import ps_command
from cloudexec.testing import FakeAWS


def ready(**settings: Any) -> EC2:
    return EC2(**{"image": "registry.example/worker:1", "vcpus": 1, **settings})


def actions_of(document: dict[str, Any]) -> set[str]:
    return {
        action
        for statement in document["Statement"]
        for action in statement["Action"]
        if action.startswith("ec2:")
    }


def test_from_up_to_down_with_the_published_policy(aws: FakeAWS) -> None:
    """Workers are seen, read, priced and stopped as those of AWS Batch are, and leave nothing."""
    assert set_up().instance_profile == ""
    with pytest.raises((ConfigError, LaunchError), match="`cloudexec up --with ec2` adds it"):
        with BatchExecutor(1, launcher=ready()) as executor:
            executor.submit(pow, 2, 3).result(timeout=60)
    assert "ec2:CreateFleet" not in actions_of(policy(Profile.load("default")))
    assert "instances" not in checks()
    profile = set_up("ec2")
    assert set_up().instance_profile == profile.instance_profile
    assert checks()["instances"].outcome == "ok"
    aws.faults.allow_only(policy(profile))
    with (
        BatchExecutor(2, launcher=ready(), min_workers=2) as executor,
        Monitor("default") as monitor,
    ):
        once = executor.with_options(retries=0)
        futures = [once.submit(time.sleep, 5) for _ in range(2)]
        eventually(lambda: executor.stats().tasks.running == 2)
        jobs = monitor.jobs()
        assert {each.id for each in jobs} == {each.instance_id for each in aws.instances()}
        assert {each.first_worker for each in jobs} == {1, 2}
        assert {(each.compute, each.state, each.vcpus) for each in jobs} == {
            ("instance", "RUNNING", 1.0)
        }
        assert all(each.per_hour_usd > 0.03 and each.expires_at for each in jobs)
        (shown,) = monitor.executors()
        assert shown.workers == {"RUNNING": 2}
        assert monitor.cost().cost_usd > 0
        first = f"{shown.id}/worker-1"
        assert any("worker 1@i-" in line.message for line in monitor.logs(first))
        ended = monitor.stop(job=first)
        assert len(ended) == 1
        eventually(lambda: any(each.state == "terminated" for each in aws.instances()))
        aws.faults.clear()
        with pytest.raises(ConfigError, match=r"1 instance that .*leave ec2 in the list"):
            set_up("batch")
        aws.faults.allow_only(policy(profile))
        executor.shutdown(wait=True, cancel_futures=True)
        assert all(each.done() for each in futures)
    aws.faults.clear()
    eventually(lambda: all(each.state == "terminated" for each in aws.instances()))
    assert [r for r in aws.requests if r.error == "UnauthorizedOperation"] == []

    assert remove() == ()
    assert boto3.client("ec2").describe_launch_templates()["LaunchTemplates"] == []


def test_down_ends_instances_that_run_and_names_those_past_their_time(aws: FakeAWS) -> None:
    """Whoever started them, and wherever that client is."""
    set_up("ec2")
    aws.faults.ec2.scripts_hang = True
    executor = BatchExecutor(1, launcher=ready(), min_workers=1)
    executor.submit(pow, 2, 3)
    (instance,) = eventually(aws.instances)
    ec2 = boto3.client("ec2")
    past = datetime.now(UTC) - timedelta(seconds=60)
    aws._required_session().instances.all[instance.instance_id].order.tags[  # type: ignore[index]
        "cloudexec:expires"
    ] = past.strftime("%Y-%m-%dT%H:%M:%SZ")
    found = checks()["instances"]
    assert (found.outcome, found.found) == (
        "warning",
        f"1 instance past the time limit: {instance.instance_id}",
    )
    shown = CliRunner().invoke(ps_command, [])
    assert "run past their time limit: `cloudexec stop --expired` ends them" in shown.stderr

    async def take() -> int:
        async with AwsClients() as clients:
            jobs = (await take_stock(clients, "default")).jobs
            assert await down(clients, "default", ignore, interval=0.02) == ()
            return jobs

    assert asyncio.run(take()) == 1
    assert [each.state for each in aws.instances()] == ["terminated"]
    assert ec2.describe_launch_templates()["LaunchTemplates"] == []
    executor.shutdown(wait=True, cancel_futures=True)


def test_the_role_of_instances_may_start_workers_and_nothing_else() -> None:
    resources = template()["Resources"]
    (allowed,) = resources["WorkerRole"]["Properties"]["Policies"]
    assert allowed == resources["ExecutionRole"]["Properties"]["Policies"][0]
    assert "ManagedPolicyArns" not in resources["WorkerRole"]["Properties"]
    assert resources["WorkerRole"]["Condition"] == "Instances"


def test_only_instances_with_the_stack_s_tag_may_be_started_and_ended() -> None:
    profile = Profile(
        name="default",
        region="eu-central-1",
        stack="cloudexec-default",
        queues={"fargate": "by-name"},
        execution_role="arn:aws:iam::123456789012:role/execution",
        instance_profile="arn:aws:iam::123456789012:instance-profile/p",
        instance_role="arn:aws:iam::123456789012:role/instances",
        run_role="arn:aws:iam::123456789012:role/runs",
    )
    statements = {each["Sid"]: each for each in policy(profile)["Statement"]}
    assert statements["OwnInstances"]["Condition"] == {
        "StringEquals": {"aws:ResourceTag/cloudexec:stack": "cloudexec-default"}
    }
    assert statements["NewInstances"]["Condition"] == {
        "StringEquals": {"aws:RequestTag/cloudexec:stack": "cloudexec-default"}
    }
    assert not any("instance/" in arn for arn in statements["InstanceParts"]["Resource"])
    # The roles of workers and of runs; which service takes one on, its own policy says.
    passing = statements["PassRoles"]
    assert passing["Resource"] == sorted(
        [profile.execution_role, profile.instance_role, profile.run_role]
    )
    services = ["batch.amazonaws.com", "ec2.amazonaws.com", "ecs-tasks.amazonaws.com"]
    assert passing["Condition"] == {"StringEquals": {"iam:PassedToService": services}}
