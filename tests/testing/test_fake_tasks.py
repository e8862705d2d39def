"""Tasks that Amazon ECS is asked for directly: their states, limits, failures and ends."""

from __future__ import annotations

import json
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import ClientError
from fake_helpers import eventually

from cloudexec.testing import FakeAWS, Setup

NO_CAPACITY = (
    "Capacity is unavailable at this time. Please try again later or in a different availability "
    "zone"
)


class Tasks:
    """A cluster, and ways to run tasks in it."""

    def __init__(self, aws: FakeAWS) -> None:
        self.aws = aws
        self.setup: Setup = aws.set_up()
        self.ecs: Any = boto3.client("ecs")
        self._numbers = iter(range(1000))

    def define(self, script: str, **given: Any) -> str:
        """Register a definition that runs a shell script; return its ARN."""
        container = {"name": "main", "image": "worker:1", "command": ["sh", "-c", script]}
        container["logConfiguration"] = {
            "logDriver": "awslogs",
            "options": {
                "awslogs-group": "/tasks",
                "awslogs-stream-prefix": "t",
                "awslogs-create-group": "true",
                "awslogs-region": "us-east-1",
            },
        }
        container.update(given.pop("container", {}))
        request: dict[str, Any] = {
            "family": f"family-{next(self._numbers)}",
            "requiresCompatibilities": ["FARGATE"],
            "networkMode": "awsvpc",
            "cpu": "256",
            "memory": "512",
            "executionRoleArn": self.setup.execution_role,
            "containerDefinitions": [container],
            **given,
        }
        return str(
            self.ecs.register_task_definition(**request)["taskDefinition"]["taskDefinitionArn"]
        )

    def run(self, script: str = "true", **given: Any) -> dict[str, Any]:
        """Run a task; return the whole answer."""
        definition = given.pop("taskDefinition", None) or self.define(script)
        request: dict[str, Any] = {
            "cluster": self.setup.cluster,
            "taskDefinition": definition,
            "networkConfiguration": {
                "awsvpcConfiguration": {
                    "subnets": list(self.setup.subnets),
                    "securityGroups": [self.setup.security_group],
                    "assignPublicIp": "ENABLED",
                }
            },
            **given,
        }
        if "capacityProviderStrategy" not in given:
            request.setdefault("launchType", "FARGATE")
        return dict(self.ecs.run_task(**request))

    def one(self, script: str = "true", **given: Any) -> str:
        answer = self.run(script, **given)
        assert answer["failures"] == []
        return str(answer["tasks"][0]["taskArn"])

    def spot(self, script: str) -> str:
        strategy = [{"capacityProvider": "FARGATE_SPOT", "weight": 1}]
        return self.one(script, capacityProviderStrategy=strategy)

    def describe(self, *arns: str) -> dict[str, Any]:
        answer = self.ecs.describe_tasks(
            cluster=self.setup.cluster, tasks=list(arns), include=["TAGS"]
        )
        return dict(answer)

    def reaches(self, arn: str, status: str) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            found: dict[str, Any] = self.describe(arn)["tasks"][0]
            return found if found["lastStatus"] == status else None

        found: dict[str, Any] = eventually(look)
        return found

    def list(self, **filters: Any) -> list[str]:
        return list(self.ecs.list_tasks(cluster=self.setup.cluster, **filters)["taskArns"])


@pytest.fixture
def tasks(aws: FakeAWS) -> Tasks:
    return Tasks(aws)


def id_of(arn: str) -> str:
    return arn.rpartition("/")[2]


def refused(call: Any, **given: Any) -> str:
    with pytest.raises(ClientError) as info:
        call(**given)
    return f"{info.value.response['Error']['Code']}: {info.value.response['Error']['Message']}"


def test_a_task_runs_to_its_end(tasks: Tasks) -> None:
    arn = tasks.one("echo hello; exit 3", startedBy="me", tags=[{"key": "a", "value": "b"}])
    task = tasks.reaches(arn, "STOPPED")
    assert task["stopCode"] == "EssentialContainerExited"
    assert task["stoppedReason"] == "Essential container in task exited"
    assert task["containers"][0]["exitCode"] == 3
    assert task["createdAt"] <= task["pullStartedAt"] <= task["startedAt"] <= task["stoppedAt"]
    assert task["tags"] == [{"key": "a", "value": "b"}]
    assert (task["cpu"], task["memory"], task["launchType"]) == ("256", "512", "FARGATE")
    assert tasks.aws.logs(id_of(arn)) == ["hello"]
    assert tasks.aws.job(id_of(arn)).queue == "test"


def test_a_task_knows_itself_by_the_metadata_endpoint(tasks: Tasks) -> None:
    script = (
        "python -c 'import os, urllib.request as u;"
        'print(u.urlopen(os.environ["ECS_CONTAINER_METADATA_URI_V4"] + "/task").read().decode())\''
        "; env"
    )
    arn = tasks.one(script)
    tasks.reaches(arn, "STOPPED")
    first, *rest = tasks.aws.logs(id_of(arn))
    assert json.loads(first)["TaskARN"] == arn
    assert not [line for line in rest if line.startswith("AWS_BATCH")]


def test_overrides_change_size_command_and_variables(tasks: Tasks) -> None:
    definition = tasks.define("exit 1", container={"environment": [{"name": "A", "value": "1"}]})
    arn = tasks.one(
        taskDefinition=definition,
        overrides={
            "cpu": "1024",
            "memory": "2048",
            "containerOverrides": [
                {
                    "name": "main",
                    "command": ["sh", "-c", "echo $A $B"],
                    "environment": [{"name": "B", "value": "2"}],
                }
            ],
        },
    )
    tasks.reaches(arn, "STOPPED")
    assert tasks.aws.logs(id_of(arn)) == ["1 2"]
    assert tasks.aws.job(id_of(arn)).memory_mib == 2048


def test_a_stopped_task_says_who_stopped_it(tasks: Tasks) -> None:
    arn = tasks.one("sleep 60")
    tasks.reaches(arn, "RUNNING")
    tasks.ecs.stop_task(cluster=tasks.setup.cluster, task=arn, reason="enough")
    task = tasks.reaches(arn, "STOPPED")
    assert (task["stopCode"], task["stoppedReason"]) == ("UserInitiated", "enough")
    assert task["containers"][0]["exitCode"] == 143


def test_sigkill_follows_after_the_stop_timeout(aws: FakeAWS, tasks: Tasks) -> None:
    """Which is twice as long as the usual one here."""
    definition = tasks.define(
        "trap '' TERM; echo up; while :; do sleep 0.1; done", container={"stopTimeout": 60}
    )
    arn = tasks.one(taskDefinition=definition)
    eventually(lambda: aws.logs(id_of(arn)))
    tasks.ecs.stop_task(cluster=tasks.setup.cluster, task=arn)
    task = tasks.reaches(arn, "STOPPED")
    assert task["containers"][0]["exitCode"] == 137
    stop = next(each for each in aws.requests if each.operation == "StopTask")
    assert task["stoppedAt"].timestamp() - stop.at >= 2 * aws.grace - 0.1


@pytest.mark.parametrize("code", ["SpotInterruption", "TerminationNotice"])
def test_spot_tasks_are_reclaimed_with_a_notice(aws: FakeAWS, tasks: Tasks, code: Any) -> None:
    aws.faults.ecs.spot_stop_code = code
    arn = tasks.spot("trap 'echo told; exit 0' TERM; echo up; while :; do sleep 0.05; done")
    eventually(lambda: aws.logs(id_of(arn)))
    assert aws.faults.reclaim_fraction(1.0) == [id_of(arn)]
    task = tasks.reaches(arn, "STOPPED")
    assert task["stopCode"] == code
    assert task["stoppedReason"] == "Your Spot Task was interrupted."
    assert task["capacityProviderName"] == "FARGATE_SPOT"
    assert aws.logs(id_of(arn)) == ["up", "told"]


def test_out_of_memory_and_failed_starts_are_told(aws: FakeAWS, tasks: Tasks) -> None:
    arn = tasks.one("sleep 60")
    tasks.reaches(arn, "RUNNING")
    aws.faults.out_of_memory(id_of(arn))
    task = tasks.reaches(arn, "STOPPED")
    assert task["containers"][0]["reason"].startswith("OutOfMemoryError")
    aws.faults.image_pull_fails()
    task = tasks.reaches(tasks.one(), "STOPPED")
    assert task["stopCode"] == "TaskFailedToStart"
    assert task["stoppedReason"].startswith("CannotPullContainerError")
    assert "startedAt" not in task


def test_ten_tasks_are_started_at_once(tasks: Tasks) -> None:
    answer = tasks.run("sleep 30", count=10)
    assert len({each["taskArn"] for each in answer["tasks"]}) == 10
    definition = tasks.define("true")
    with pytest.raises(ClientError, match="Count must be between 1 and 10"):
        tasks.run(taskDefinition=definition, count=11)


def test_a_client_token_starts_a_task_once(aws: FakeAWS, tasks: Tasks) -> None:
    definition = tasks.define("sleep 30")
    given = {"taskDefinition": definition, "clientToken": "once"}
    arn = tasks.one(**given)
    assert tasks.one(**given) == arn
    with pytest.raises(ClientError) as info:
        tasks.run(**given, startedBy="another")
    assert info.value.response["Error"]["Code"] == "ConflictException"
    assert info.value.response["resourceIds"] == [arn]
    aws.faults.ecs.tokens_conflict = True
    with pytest.raises(ClientError) as info:
        tasks.run(**given)
    assert info.value.response["resourceIds"] == [arn]
    assert len(aws.jobs()) == 1


def test_without_capacity_run_task_has_failures(aws: FakeAWS, tasks: Tasks) -> None:
    aws.faults.no_capacity("FARGATE_SPOT")
    strategy = [{"capacityProvider": "FARGATE_SPOT", "weight": 1}]
    answer = tasks.run(capacityProviderStrategy=strategy, count=2)
    assert answer["tasks"] == []
    assert [each["reason"] for each in answer["failures"]] == [NO_CAPACITY] * 2
    tasks.one()
    aws.faults.ecs.run_task_fails("RESOURCE:ENI", 1)
    answer = tasks.run(count=2)
    assert len(answer["tasks"]) == len(answer["failures"]) == 1


def test_without_capacity_tasks_may_stop_instead(aws: FakeAWS, tasks: Tasks) -> None:
    aws.faults.no_capacity("FARGATE_SPOT")
    aws.faults.ecs.tasks_stop_without_capacity = True
    task = tasks.reaches(tasks.spot("true"), "STOPPED")
    assert (task["stopCode"], task["stoppedReason"]) == ("TaskFailedToStart", NO_CAPACITY)


def test_the_quota_is_one_of_the_failures_or_an_error(aws: FakeAWS, tasks: Tasks) -> None:
    aws.faults.vcpu_quota(0.5)
    answer = tasks.run("sleep 30", count=3)
    assert len(answer["tasks"]) == 2
    assert "limit on the number of vCPUs" in answer["failures"][0]["reason"]
    aws.faults.ecs.quota_is_an_error = True
    definition = tasks.define("true")
    with pytest.raises(ClientError, match=r"ClientException.*limit on the number of vCPUs"):
        tasks.run(taskDefinition=definition)


def test_launches_and_calls_have_rates() -> None:
    with FakeAWS(launch_rate=(2, 0.5)) as aws:
        tasks = Tasks(aws)
        definition = tasks.define("true")
        answer = tasks.run(taskDefinition=definition, count=3)
        assert len(answer["tasks"]) == 2
        assert answer["failures"][0]["reason"] == "Rate exceeded"
        tasks.ecs = boto3.client("ecs", config=Config(retries={"max_attempts": 0}))
        said = set()
        for _ in range(60):
            try:
                tasks.run(taskDefinition=definition)
            except ClientError as exc:
                said.add(exc.response["Error"]["Code"])
        assert said == {"ThrottlingException"}


def test_lists_are_filtered_and_may_lag(aws: FakeAWS, tasks: Tasks) -> None:
    mine = tasks.one("sleep 30", startedBy="me")
    other = tasks.one("sleep 30", startedBy="other")
    assert tasks.list() == [mine, other]
    assert tasks.list(startedBy="me") == [mine]
    assert "must be the only filter" in refused(
        tasks.ecs.list_tasks,
        cluster=tasks.setup.cluster,
        startedBy="me",
        desiredStatus="STOPPED",
    )
    tasks.ecs.stop_task(cluster=tasks.setup.cluster, task=mine)
    tasks.reaches(mine, "STOPPED")
    assert tasks.list() == [other]
    assert tasks.list(desiredStatus="STOPPED") == [mine]
    aws.faults.list_lag(60)
    assert tasks.list() == []
    assert tasks.describe(other)["failures"] == [{"arn": other, "reason": "MISSING"}]


def test_stopped_tasks_are_forgotten(aws: FakeAWS, tasks: Tasks) -> None:
    arn = tasks.one()
    tasks.reaches(arn, "STOPPED")
    aws.faults.forget_ended()
    assert tasks.describe(arn)["failures"][0]["reason"] == "MISSING"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"overrides": {"cpu": "256", "memory": "777"}}, "No Fargate configuration exists"),
        ({"overrides": {"cpu": "32768", "memory": "61440"}}, "No Fargate configuration exists"),
        ({"networkConfiguration": {}}, "Network Configuration must be provided"),
        ({"startedBy": "a:b"}, "startedBy must be"),
        ({"cluster": "nowhere"}, "ClusterNotFoundException"),
        ({"taskDefinition": "nothing:1"}, "TaskDefinition not found"),
        (
            {"capacityProviderStrategy": [{"capacityProvider": "SPOT", "weight": 1}]},
            "not associated with the cluster",
        ),
        (
            {"overrides": {"containerOverrides": [{"name": "main", "command": ["x" * 8200]}]}},
            "Container Overrides length must be at most 8192",
        ),
    ],
)
def test_what_amazon_ecs_refuses_is_refused(tasks: Tasks, given: Any, said: str) -> None:
    definition = tasks.define("true")
    with pytest.raises(ClientError, match=said):
        tasks.run(**{"taskDefinition": definition, **given})


def test_definitions_are_checked_and_the_newest_active_one_is_found(tasks: Tasks) -> None:
    with pytest.raises(ClientError, match="No Fargate configuration exists"):
        tasks.define("true", cpu="300")
    with pytest.raises(ClientError, match="stopTimeout must be between 2 and 120"):
        tasks.define("true", container={"stopTimeout": 121})
    arn = tasks.define("true", family="f")
    newer = tasks.define("true", family="f")
    found = tasks.ecs.describe_task_definition(taskDefinition="f")["taskDefinition"]
    assert found["taskDefinitionArn"] == newer
    tasks.ecs.deregister_task_definition(taskDefinition=newer)
    found = tasks.ecs.describe_task_definition(taskDefinition="f")["taskDefinition"]
    assert found["taskDefinitionArn"] == arn
    tasks.ecs.deregister_task_definition(taskDefinition=arn)
    assert "Unable to describe" in refused(tasks.ecs.describe_task_definition, taskDefinition="f")
    with pytest.raises(ClientError, match="inactive"):
        tasks.run(taskDefinition=arn)
    assert (
        tasks.ecs.list_task_definition_families(familyPrefix="f", status="ACTIVE")["families"] == []
    )


def test_a_cluster_with_tasks_is_not_deleted(tasks: Tasks) -> None:
    tasks.one("sleep 30")
    assert "ClusterContainsTasksException" in refused(
        tasks.ecs.delete_cluster, cluster=tasks.setup.cluster
    )
