"""An account that is set up for Fargate without AWS Batch: from `up` to `down`."""

from __future__ import annotations

import asyncio
import socket
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from account_helpers import checks, eventually, remove, set_up
from click.testing import CliRunner

from cloudexec import AwsError, Batch, BatchExecutor, ConfigError, Fargate, LaunchError
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.monitor import Monitor
from cloudexec._aws.policy import policy
from cloudexec._aws.profile import Profile
from cloudexec._aws.setup import SetupOptions
from cloudexec._aws.steps import Event
from cloudexec._aws.teardown import take_stock
from cloudexec.cli.ps import ps_command
from cloudexec.cli.stop import stop_command
from cloudexec.testing import FakeAWS

ACCOUNT = "123456789012"


def ready() -> Fargate:
    return Fargate(image="registry.example/worker:1")


def test_up_adds_a_cluster_where_it_is_asked_to_and_keeps_it(aws: FakeAWS) -> None:
    assert set_up().cluster == ""
    profile = set_up("fargate")
    assert profile.cluster == f"arn:aws:ecs:{aws.region}:123456789012:cluster/cloudexec-default"
    assert set_up().cluster == profile.cluster
    assert Profile.load("default") == profile
    (found,) = boto3.client("ecs").describe_clusters(clusters=[profile.cluster], include=["TAGS"])[
        "clusters"
    ]
    assert found["capacityProviders"] == ["FARGATE", "FARGATE_SPOT"]
    assert {"key": "cloudexec:stack", "value": "cloudexec-default"} in found["tags"]
    assert set_up("batch").cluster == ""
    assert remove() == ()


def test_launchers_that_a_stack_cannot_be_for_are_refused() -> None:
    with pytest.raises(ConfigError, match="can be for batch, fargate, ec2, lambda, not for slurm"):
        SetupOptions(launchers=("fargate", "slurm"))


def test_an_empty_list_of_launchers_is_refused() -> None:
    """It would remove the cluster."""
    with pytest.raises(ConfigError, match=r"list of launchers is empty.*batch, fargate"):
        SetupOptions(launchers=())


def test_a_cluster_with_tasks_is_not_removed(aws: FakeAWS) -> None:
    profile = set_up("fargate")
    with BatchExecutor(1, launcher=ready()) as executor:
        executor.submit(pow, 2, 3).result(timeout=60)
        with pytest.raises(ConfigError, match=r"cloudexec-default has 1 task that .*stop"):
            set_up("batch")
        assert Profile.load("default").cluster == profile.cluster
    eventually(lambda: not boto3.client("ecs").list_tasks(cluster=profile.cluster)["taskArns"])
    assert set_up("batch").cluster == ""


def test_workers_past_their_time_limit_are_named(aws: FakeAWS) -> None:
    """Amazon ECS has no time limit: a task whose image has no timer runs on."""
    profile = set_up("fargate")
    ecs = boto3.client("ecs")
    ecs.register_task_definition(**definition("cloudexec-0123"))
    aws.faults.slow_start(600)
    for seconds in (-60, 3600):
        expires = datetime.now(UTC) + timedelta(seconds=seconds)
        tags = {
            "cloudexec:executor": f"e{abs(seconds)}",
            "cloudexec:expires": expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        ecs.run_task(
            cluster=profile.cluster,
            taskDefinition="cloudexec-0123",
            launchType="FARGATE",
            startedBy=f"cloudexec-e{abs(seconds)}-1",
            networkConfiguration={"awsvpcConfiguration": {"subnets": list(profile.subnets)}},
            tags=[{"key": key, "value": value} for key, value in tags.items()],
        )
    late, other = aws.jobs()
    found = checks()["cluster"]
    assert (found.outcome, found.found) == (
        "warning",
        f"cloudexec-default has 1 worker past the time limit: {late.job_id}",
    )
    shown = CliRunner().invoke(ps_command, [])
    assert shown.exit_code == 0
    assert "Workers of e60 run past their time limit: `cloudexec stop --expired`" in shown.stderr
    assert "e3600" in shown.stdout
    assert "Workers of e3600" not in shown.stderr
    stopped = CliRunner().invoke(stop_command, ["--expired", "--yes"])
    assert stopped.stdout == "stopped cloudexec-e60-1\n"
    assert [each.job_id for each in aws.jobs() if each.status != "FAILED"] == [other.job_id]


def definition(family: str) -> dict[str, Any]:
    """A task definition of the stack."""
    return {
        "family": family,
        "requiresCompatibilities": ["FARGATE"],
        "networkMode": "awsvpc",
        "cpu": "1024",
        "memory": "2048",
        "executionRoleArn": f"arn:aws:iam::{ACCOUNT}:role/execution",
        "containerDefinitions": [{"name": "worker", "image": "example.com/worker:1"}],
        "tags": [{"key": "cloudexec:stack", "value": "cloudexec-default"}],
    }


def test_a_profile_without_a_cluster_says_how_to_get_one(aws: FakeAWS) -> None:
    set_up()
    with pytest.raises((ConfigError, LaunchError), match=r"`cloudexec up --with fargate` adds one"):
        with BatchExecutor(1, launcher=ready()) as executor:
            executor.submit(pow, 2, 3).result(timeout=60)


def test_all_that_is_needed_is_in_the_published_policy(aws: FakeAWS) -> None:
    """For its own cluster and no other; the key of workers comes from the stack's secret."""
    profile = set_up("fargate")
    aws.faults.allow_only(policy(profile))
    with BatchExecutor(2, launcher=ready()) as executor:
        assert list(executor.map(pow, [2, 3], [2, 2])) == [4, 9]
    (request, *_) = [r.parameters for r in aws.requests if r.operation == "RunTask"]
    variables = request["overrides"]["containerOverrides"][0]["environment"]
    assert "CLOUDEXEC_KEY" not in {each["name"] for each in variables}
    aws.faults.clear()
    boto3.client("ecs").create_cluster(clusterName="other")
    aws.faults.allow_only(policy(profile))
    launcher = Fargate(image="registry.example/worker:1", cluster="other", profile="default")
    with BatchExecutor(1, launcher=launcher) as executor:
        with pytest.raises(LaunchError, match="not authorized to perform: ecs:RunTask"):
            executor.submit(pow, 2, 3).result(timeout=60)


def _may_listen() -> bool:
    """Whether a process of this user may have port 443 at an address of its own."""
    try:
        socket.create_server(("127.200.0.1", 443)).close()
    except OSError:
        return False
    return True


@pytest.mark.skipif(not _may_listen(), reason="port 443 of 127.200.0.1 cannot be had")
def test_workers_come_through_a_relay(aws: FakeAWS) -> None:
    """Which is a job of AWS Batch, in the stack's queue for relays."""
    profile = set_up("fargate")
    aws.faults.allow_only(policy(profile))
    launcher = Fargate(image="registry.example/worker:1", relay=True)
    with BatchExecutor(2, launcher=launcher) as executor:
        assert list(executor.map(pow, [2, 3], [2, 2])) == [4, 9]
        assert "a relay at" in executor.cost().note
    eventually(lambda: not any(job.status in ("STARTING", "RUNNING") for job in aws.jobs()))
    assert {job.queue for job in aws.jobs()} == {"cloudexec-default-relay", "cloudexec-default"}


def test_without_a_cluster_the_policy_has_nothing_of_fargate(aws: FakeAWS) -> None:
    profile = set_up()
    actions = {
        action
        for statement in policy(profile)["Statement"]
        for action in statement["Action"]
        if action.startswith("ecs:")
    }
    assert actions == {"ecs:DescribeTasks", "ecs:ListClusters"}


def test_a_cluster_that_may_not_be_looked_at_is_passed_over(aws: FakeAWS) -> None:
    """That of other people, in a region of which no profile says where to look."""
    profile = set_up("fargate")
    boto3.client("ecs").create_cluster(clusterName="other")
    other = Fargate(image="registry.example/worker:1", cluster="other", profile="default")
    with BatchExecutor(1, launcher=other) as executor:
        executor.submit(pow, 2, 3).result(timeout=60)
        aws.faults.allow_only(policy(partition="aws"))
        with Monitor(region=aws.region) as everywhere:
            assert everywhere.executors() == []
            assert everywhere.jobs() == []
        aws.faults.clear()
        with Monitor(region=aws.region) as everywhere:
            assert len(everywhere.executors()) == 1
    replace(profile, cluster="other").save()
    aws.faults.allow_only(policy(profile))
    with Monitor("default") as monitor:
        with pytest.raises(AwsError, match="ecs:DescribeTasks"):
            monitor.executors()
    aws.faults.clear()
    profile.save()


def _allowed(document: dict[str, Any], action: str) -> list[str]:
    """Return the resources for which an action is allowed."""
    found = [each["Resource"] for each in document["Statement"] if action in each["Action"]]
    return [arn for each in found for arn in ([each] if isinstance(each, str) else each)]


@pytest.mark.parametrize("kind", ["no profile", "with a cluster", "without a cluster"])
def test_tasks_of_aws_batch_can_be_described_and_not_stopped(kind: str) -> None:
    """They are those of everybody in the account."""
    cluster = f"arn:aws:ecs:eu-central-1:{ACCOUNT}:cluster/mine"
    profile = Profile(
        name="default",
        region="eu-central-1",
        queues={"fargate": "by-name"},
        execution_role=f"arn:aws:iam::{ACCOUNT}:role/execution",
        cluster=cluster if kind == "with a cluster" else "",
    )
    document = policy(None if kind == "no profile" else profile, "aws")
    assert any("task/AWSBatch-" in arn for arn in _allowed(document, "ecs:DescribeTasks"))
    tasks = {
        "no profile": ["arn:aws:ecs:*:*:task/cloudexec-*/*"],
        "with a cluster": [f"arn:aws:ecs:eu-central-1:{ACCOUNT}:task/mine/*"],
        "without a cluster": [],
    }[kind]
    assert _allowed(document, "ecs:StopTask") == tasks
    tagged = [arn for arn in _allowed(document, "ecs:TagResource") if ":task/" in arn]
    assert tagged == tasks
    assert _allowed(document, "ecs:ListClusters") == ["*"]  # commands without --profile


def test_the_doctor_looks_at_the_cluster(aws: FakeAWS) -> None:
    set_up()
    assert "cluster" not in checks()
    set_up("fargate")
    assert checks()["cluster"].outcome == "ok"
    ecs = boto3.client("ecs")
    ecs.put_cluster_capacity_providers(
        cluster="cloudexec-default", capacityProviders=[], defaultCapacityProviderStrategy=[]
    )
    found = checks()["cluster"]
    assert found.outcome == "warning"
    assert "put-cluster-capacity-providers" in found.remedy
    mine = [{"capacityProvider": "mine", "weight": 1, "base": 0}]
    ecs.put_cluster_capacity_providers(
        cluster="cloudexec-default",
        capacityProviders=["mine"],
        defaultCapacityProviderStrategy=mine,
    )
    remedy = checks()["cluster"].remedy
    assert "--capacity-providers FARGATE FARGATE_SPOT mine --default" in remedy
    assert '"capacityProvider": "mine"' in remedy  # the call replaces what the cluster has
    ecs.delete_cluster(cluster="cloudexec-default")
    found = checks()["cluster"]
    assert (found.outcome, found.found) == (
        "failed",
        "the cluster cloudexec-default does not exist",
    )


def test_workers_are_seen_read_priced_and_stopped(aws: FakeAWS) -> None:
    """As those of AWS Batch are, beside them."""
    set_up("fargate")
    other = Batch(image="registry.example/worker:1")
    with (
        BatchExecutor(1, launcher=other) as of_batch,
        BatchExecutor(2, launcher=ready(), min_workers=2) as executor,
        Monitor("default") as monitor,
    ):
        once = executor.with_options(retries=0)
        futures = [once.submit(time.sleep, 60) for _ in range(2)]
        of_batch.submit(pow, 2, 3).result()
        eventually(lambda: executor.stats().tasks.running == 2)
        found = {each.id: each for each in monitor.executors()}
        assert len(found) == 2
        (own,) = [each for each in found.values() if each.queues == ("cloudexec-default",)]
        assert own.workers == {"RUNNING": 2}
        assert own.vcpus == 2.0
        jobs = monitor.jobs(executor=own.id)
        assert {each.first_worker for each in jobs} == {1, 2}
        for each in jobs:
            assert (each.state, each.compute, each.spot) == ("RUNNING", "fargate", False)
            assert (each.vcpus, each.memory_mib, each.arch) == (1.0, 2048, "x86_64")
            assert each.log_group == "/cloudexec/cloudexec-default"
            assert each.per_hour_usd == pytest.approx(0.04048 + 2 * 0.004445 + 0.005)
        for name in (jobs[0].id, jobs[0].name, f"{own.id}/worker-2"):
            eventually(lambda: "enrolled as" in " ".join(_lines(monitor, name)))  # noqa: B023
        cost = monitor.cost(executor=own.id)
        assert cost.executors[0].runs == 2
        assert any("Amazon ECS remembers tasks" in each for each in cost.notes)
        with Monitor(region=aws.region) as everywhere:
            assert {each.id for each in everywhere.executors()} == set(found)
        executor.shutdown(wait=False, cancel_futures=True)
        assert set(monitor.stop(executor=own.id)) <= {each.id for each in jobs}
        eventually(lambda: not monitor.jobs(active=True, executor=own.id))
        (first, *_) = monitor.jobs(executor=own.id)
        assert first.workers in ({"ENDED": 1}, {"SUCCEEDED": 1})
        for future in futures:
            future.cancel()
    assert remove() == ()


def _lines(monitor: Monitor, name: str) -> list[str]:
    return [line.message for line in monitor.logs(name)]


ECS_OF_DOWN = (
    "DescribeClusters",
    "ListTaskDefinitionFamilies",
    "ListTaskDefinitions",
    "DescribeTaskDefinition",
)


def test_down_needs_no_rights_in_amazon_ecs_where_the_stack_has_nothing_there(
    aws: FakeAWS,
) -> None:
    set_up("batch")
    for operation in ECS_OF_DOWN:
        aws.faults.deny(f"ecs:{operation}")
    notes: list[Event] = []
    assert remove(notes.append) == ()
    assert any("could not be looked for" in str(each) for each in notes)
    aws.faults.clear()
    set_up("fargate")
    for operation in ECS_OF_DOWN:
        aws.faults.deny(f"ecs:{operation}")
    assert {each.kind for each in remove()} == {"cluster", "task definition"}
    aws.faults.clear()
    assert remove() == ()


def test_down_says_which_task_definitions_stay_and_deletes_them_the_next_time(
    aws: FakeAWS,
) -> None:
    """AWS answers 200, with failures; by then the definition is deregistered."""
    set_up("fargate")
    boto3.client("ecs").register_task_definition(**definition("cloudexec-0123"))
    aws.faults.ecs.definitions_stay = "it is in use"
    notes: list[Event] = []
    (left,) = remove(notes.append)
    assert left.kind == "task definition"
    assert left.id.endswith("task-definition/cloudexec-0123:1")
    assert any(f"{left.id} could not be deleted: it is in use" in str(each) for each in notes)
    aws.faults.clear()
    assert remove() == ()
    listed = boto3.client("ecs").list_task_definitions(status="INACTIVE")
    assert listed["taskDefinitionArns"] == []


def test_down_stops_tasks_and_leaves_no_definition(aws: FakeAWS) -> None:
    """Also tasks whose client was killed: CloudFormation deletes no cluster with tasks."""
    set_up("fargate")
    executor = BatchExecutor(1, launcher=ready(), retries=0)
    future = executor.submit(time.sleep, 120)
    eventually(lambda: executor.stats().tasks.running == 1)

    async def stock() -> tuple[int, int]:
        async with AwsClients() as clients:
            found = await take_stock(clients, "default")
            return found.jobs, found.definitions

    assert asyncio.run(stock()) == (1, 1)
    assert remove() == ()
    (job,) = aws.jobs()
    assert job.status_reason == "cloudexec down: the stack is deleted"
    ecs = boto3.client("ecs")
    for status in ("ACTIVE", "INACTIVE"):
        listed = ecs.list_task_definition_families(familyPrefix="cloudexec-", status=status)
        assert listed["families"] == []
    executor.kill_workers()
    executor.shutdown(wait=False, cancel_futures=True)
    assert future.exception(timeout=60) is not None
