"""Stacks: made, changed and deleted with all that belongs to them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from botocore.exceptions import ClientError
from fake_helpers import Account, eventually

TEMPLATE: dict[str, Any] = {
    "Parameters": {
        "MaxVcpus": {"Type": "Number", "Default": 4, "MinValue": 1},
        "Spot": {"Type": "String", "Default": "false", "AllowedValues": ["true", "false"]},
        "SubnetIds": {"Type": "List<AWS::EC2::Subnet::Id>"},
        "VpcId": {"Type": "AWS::EC2::VPC::Id"},
    },
    "Conditions": {"Spot": {"Fn::Equals": [{"Ref": "Spot"}, "true"]}},
    "Resources": {
        "Queue": {
            "Type": "AWS::Batch::JobQueue",
            "Properties": {
                "JobQueueName": {"Fn::Sub": "${AWS::StackName}-queue"},
                "Priority": 1,
                "ComputeEnvironmentOrder": [
                    {"Order": 1, "ComputeEnvironment": {"Ref": "Environment"}}
                ],
                "Tags": {"owner": "me"},
            },
        },
        "Environment": {
            "Type": "AWS::Batch::ComputeEnvironment",
            "Properties": {
                "Type": "MANAGED",
                "ComputeResources": {
                    "Type": "FARGATE",
                    "MaxvCpus": {"Ref": "MaxVcpus"},
                    "Subnets": {"Ref": "SubnetIds"},
                    "SecurityGroupIds": [{"Fn::GetAtt": ["Group", "GroupId"]}],
                },
            },
        },
        "SpotEnvironment": {
            "Type": "AWS::Batch::ComputeEnvironment",
            "Condition": "Spot",
            "Properties": {
                "Type": "MANAGED",
                "ComputeResources": {
                    "Type": "FARGATE_SPOT",
                    "MaxvCpus": {"Ref": "MaxVcpus"},
                    "Subnets": {"Ref": "SubnetIds"},
                    "SecurityGroupIds": [{"Fn::GetAtt": ["Group", "GroupId"]}],
                },
            },
        },
        "Group": {
            "Type": "AWS::EC2::SecurityGroup",
            "Properties": {"GroupDescription": "mine", "VpcId": {"Ref": "VpcId"}},
        },
        "Bucket": {"Type": "AWS::S3::Bucket"},
        "Repository": {
            "Type": "AWS::ECR::Repository",
            "Properties": {"RepositoryName": {"Ref": "AWS::StackName"}},
        },
        "Secret": {
            "Type": "AWS::SecretsManager::Secret",
            "Properties": {
                "GenerateSecretString": {
                    "PasswordLength": 64,
                    "ExcludePunctuation": True,
                    "ExcludeUppercase": True,
                    "ExcludeCharacters": "ghijklmnopqrstuvwxyz",
                }
            },
        },
        "Logs": {
            "Type": "AWS::Logs::LogGroup",
            "Properties": {"LogGroupName": "/mine", "RetentionInDays": 7},
        },
        "Role": {
            "Type": "AWS::IAM::Role",
            "Properties": {"AssumeRolePolicyDocument": {"Statement": []}},
        },
    },
    "Outputs": {
        "Queue": {"Value": {"Ref": "Queue"}},
        "Secret": {"Value": {"Ref": "Secret"}},
        "Bucket": {"Value": {"Ref": "Bucket"}},
        "Role": {"Value": {"Fn::GetAtt": ["Role", "Arn"]}},
        "Subnets": {"Value": {"Fn::Join": [",", {"Ref": "SubnetIds"}]}},
        "Spot": {"Condition": "Spot", "Value": {"Ref": "SpotEnvironment"}},
    },
}


def create(account: Account, **parameters: Any) -> str:
    vpc = account.ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
    given = {"VpcId": vpc, "SubnetIds": ",".join(account.setup.subnets)}
    return str(
        account.cloudformation.create_stack(
            **{
                "StackName": "mine",
                "TemplateBody": json.dumps(TEMPLATE),
                "Parameters": [
                    {"ParameterKey": key, "ParameterValue": value} for key, value in given.items()
                ],
                "Capabilities": ["CAPABILITY_IAM"],
                "Tags": [{"Key": "team", "Value": "us"}],
                **parameters,
            }
        )["StackId"]
    )


def settled(account: Account, stack: str) -> dict[str, Any]:
    def done() -> Any:
        found = account.cloudformation.describe_stacks(StackName=stack)["Stacks"][0]
        return None if found["StackStatus"].endswith("IN_PROGRESS") else found

    found: dict[str, Any] = eventually(done)
    return found


def outputs(stack: dict[str, Any]) -> dict[str, str]:
    return {entry["OutputKey"]: entry["OutputValue"] for entry in stack.get("Outputs", [])}


def events(account: Account, stack: str) -> list[tuple[str, str]]:
    """Oldest first."""
    found = account.cloudformation.describe_stack_events(StackName=stack)["StackEvents"]
    return [(entry["LogicalResourceId"], entry["ResourceStatus"]) for entry in reversed(found)]


def test_stack_takes_its_time_and_reports_each_resource(account: Account) -> None:
    stack = create(account)
    assert account.cloudformation.describe_stacks(StackName="mine")["Stacks"][0]["StackStatus"] == (
        "CREATE_IN_PROGRESS"
    )
    found = settled(account, stack)
    assert found["StackStatus"] == "CREATE_COMPLETE"
    seen = events(account, stack)
    assert seen[0] == ("mine", "CREATE_IN_PROGRESS")
    assert seen[-1] == ("mine", "CREATE_COMPLETE")
    order = [name for name, status in seen if status == "CREATE_COMPLETE"]
    assert order.index("Group") < order.index("Environment") < order.index("Queue")
    assert "SpotEnvironment" not in order


def test_resources_of_a_stack_are_real(account: Account) -> None:
    """The queue runs jobs, the secret has a value of the wanted letters, tags are there."""
    found = outputs(settled(account, create(account)))
    job_id = account.submit("exit 0", jobQueue=found["Queue"])
    assert account.ended(job_id).queue == "mine-queue"
    secret = account.secretsmanager.get_secret_value(SecretId=found["Secret"])
    assert secret["ARN"] == found["Secret"]
    assert len(bytes.fromhex(secret["SecretString"])) == 32
    queue = account.batch.describe_job_queues(jobQueues=[found["Queue"]])["jobQueues"][0]
    assert queue["tags"] == {"team": "us", "owner": "me"}
    assert (
        account.logs.describe_log_groups(logGroupNamePrefix="/mine")["logGroups"][0][
            "retentionInDays"
        ]
        == 7
    )
    tags = account.s3.get_bucket_tagging(Bucket=found["Bucket"])["TagSet"]
    assert {"Key": "team", "Value": "us"} in tags
    assert found["Subnets"].split(",") == list(account.setup.subnets)


def test_stack_can_be_updated(account: Account) -> None:
    """Parameters change resources in place, conditions add some; nothing to do is said so."""
    stack = create(account)
    settled(account, stack)
    kept = [{"ParameterKey": name, "UsePreviousValue": True} for name in ("VpcId", "SubnetIds")]

    def update(**values: str) -> dict[str, Any]:
        account.cloudformation.update_stack(
            StackName="mine",
            UsePreviousTemplate=True,
            Capabilities=["CAPABILITY_IAM"],
            Parameters=[
                *kept,
                *({"ParameterKey": key, "ParameterValue": value} for key, value in values.items()),
            ],
        )
        return settled(account, stack)

    changed = update(MaxVcpus="9", Spot="true")
    assert changed["StackStatus"] == "UPDATE_COMPLETE"
    assert outputs(changed)["Spot"]
    environments = account.batch.describe_compute_environments()["computeEnvironments"]
    sizes = {
        environment["computeResources"]["type"]: environment["computeResources"]["maxvCpus"]
        for environment in environments
        if environment["computeEnvironmentName"].startswith("mine")
    }
    assert sizes == {"FARGATE": 9, "FARGATE_SPOT": 9}
    with pytest.raises(ClientError, match="No updates are to be performed"):
        update(MaxVcpus="9", Spot="true")
    assert "Spot" not in outputs(update(MaxVcpus="9"))
    environments = account.batch.describe_compute_environments()["computeEnvironments"]
    assert len(environments) == 2


def test_failed_resource_rolls_the_stack_back(account: Account) -> None:
    account.aws.faults.resource_fails("Environment", "no such subnet")
    stack = create(account)
    found = settled(account, stack)
    assert found["StackStatus"] == "ROLLBACK_COMPLETE"
    shown = account.cloudformation.describe_stack_events(StackName=stack)["StackEvents"]
    failed = [entry for entry in shown if entry["ResourceStatus"] == "CREATE_FAILED"]
    assert [entry["ResourceStatusReason"] for entry in failed] == ["no such subnet"]
    assert account.s3.list_buckets()["Buckets"] == []
    with pytest.raises(ClientError, match="ROLLBACK_COMPLETE state and can not be updated"):
        account.cloudformation.update_stack(
            StackName="mine", UsePreviousTemplate=True, Capabilities=["CAPABILITY_IAM"]
        )


def test_failed_update_is_rolled_back(account: Account) -> None:
    stack = create(account)
    settled(account, stack)
    account.aws.faults.resource_fails("SpotEnvironment", "not today")
    kept = [{"ParameterKey": name, "UsePreviousValue": True} for name in ("VpcId", "SubnetIds")]
    account.cloudformation.update_stack(
        StackName="mine",
        UsePreviousTemplate=True,
        Capabilities=["CAPABILITY_IAM"],
        Parameters=[*kept, {"ParameterKey": "Spot", "ParameterValue": "true"}],
    )
    found = settled(account, stack)
    assert found["StackStatus"] == "UPDATE_ROLLBACK_COMPLETE"
    assert "Spot" not in outputs(found)


def test_deleted_stack_leaves_nothing(account: Account) -> None:
    """Jobs are terminated, and everything goes, the last made first."""
    stack = create(account)
    found = outputs(settled(account, stack))
    job_id = account.submit("echo up; exec sleep 60", jobQueue=found["Queue"])
    account.prints(job_id, "up")
    account.cloudformation.delete_stack(StackName="mine")
    assert settled(account, stack)["StackStatus"] == "DELETE_COMPLETE"
    assert account.aws.job(job_id).status == "FAILED"
    gone = [name for name, status in events(account, stack) if status == "DELETE_COMPLETE"]
    assert gone.index("Queue") < gone.index("Environment") < gone.index("Group")
    assert len(account.batch.describe_job_queues()["jobQueues"]) == 1
    assert len(account.batch.describe_compute_environments()["computeEnvironments"]) == 1
    assert account.s3.list_buckets()["Buckets"] == []
    assert account.secretsmanager.list_secrets()["SecretList"] == []
    assert account.ecr.describe_repositories()["repositories"] == []
    groups = account.logs.describe_log_groups(logGroupNamePrefix="/mine")["logGroups"]
    assert groups == []
    roles = [role["RoleName"] for role in account.iam.list_roles()["Roles"]]
    assert not [role for role in roles if role.startswith("mine")]
    with pytest.raises(ClientError, match="does not exist"):
        account.cloudformation.describe_stacks(StackName="mine")


def test_bucket_that_is_not_empty_keeps_the_stack_from_being_deleted(account: Account) -> None:
    stack = create(account)
    bucket = outputs(settled(account, stack))["Bucket"]
    account.s3.put_object(Bucket=bucket, Key="k", Body=b"x")
    account.cloudformation.delete_stack(StackName="mine")
    found = settled(account, stack)
    assert found["StackStatus"] == "DELETE_FAILED"
    assert found["StackStatusReason"].startswith(
        "The following resource(s) failed to delete: [Bucket]"
    )
    account.s3.delete_object(Bucket=bucket, Key="k")
    account.cloudformation.delete_stack(StackName="mine")
    assert settled(account, stack)["StackStatus"] == "DELETE_COMPLETE"


def test_repository_with_images_keeps_the_stack_from_being_deleted(account: Account) -> None:
    stack = create(account)
    settled(account, stack)
    kind = "application/vnd.docker.distribution.manifest.v2+json"
    manifest = {
        "schemaVersion": 2,
        "mediaType": kind,
        "config": {"digest": "sha256:0", "size": 1},
        "layers": [],
    }
    account.ecr.put_image(
        repositoryName="mine", imageManifest=json.dumps(manifest), imageTag="latest"
    )
    account.cloudformation.delete_stack(StackName="mine")
    assert settled(account, stack)["StackStatus"] == "DELETE_FAILED"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"Capabilities": []}, "Requires capabilities"),
        ({"Parameters": []}, "must have values"),
        ({"TemplateBody": "{}"}, "At least one Resources member"),
        ({"TemplateBody": json.dumps(TEMPLATE) + " " * 52_000}, "51200"),
    ],
)
def test_stack_that_aws_refuses(account: Account, parameters: Any, message: str) -> None:
    with pytest.raises(ClientError, match=message):
        create(account, **parameters)


def test_same_name_twice_is_refused(account: Account) -> None:
    settled(account, create(account))
    with pytest.raises(ClientError, match="AlreadyExistsException"):
        create(account)
