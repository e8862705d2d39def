"""The CloudFormation template: correct by AWS's own schemas, least privilege, no shared names."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cloudexec._aws.template import TEMPLATE_VERSION, template, template_text

RESOURCES: dict[str, Any] = template()["Resources"]
NOTHING = {"Ref": "AWS::NoValue"}
UNTAGGED = {
    "AWS::EC2::SecurityGroupIngress",  # has no tags in CloudFormation
    "AWS::IAM::InstanceProfile",  # likewise
}


def _of_type(kind: str) -> dict[str, Any]:
    return {name: each for name, each in RESOURCES.items() if each["Type"] == kind}


def _statements(role: str) -> list[dict[str, Any]]:
    policies = [
        each for each in RESOURCES[role]["Properties"]["Policies"] if "PolicyDocument" in each
    ]
    return [each for one in policies for each in one["PolicyDocument"]["Statement"]]


def _conditional(condition: str) -> list[dict[str, Any]]:
    """Return what the role of runs may do only if the stack has resources for a launcher."""
    choices = [
        each["Fn::If"]
        for each in RESOURCES["RunRole"]["Properties"]["Policies"]
        if "Fn::If" in each
    ]
    (policy,) = (yes for name, yes, no in choices if name == condition and no == NOTHING)
    found: list[dict[str, Any]] = policy["PolicyDocument"]["Statement"]
    return found


def test_cfn_lint_finds_nothing(tmp_path: Path) -> None:
    """cfn-lint knows the schema of every resource type."""
    path = tmp_path / "template.json"
    path.write_text(template_text(), encoding="utf-8")
    main = "from cfnlint.runner import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", main, "--regions", "us-east-1", "eu-central-1", "--", path],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("", 0), done.stderr


def test_text_is_the_template() -> None:
    assert json.loads(template_text()) == template()


def test_template_fits_into_a_request() -> None:
    """51,200 bytes at most. AWS CloudFormation User Guide, "CloudFormation quotas".

    Also as it is printed, for administrators who deploy it from a file.
    """
    assert len(json.dumps(template()).encode()) < 51_200
    assert len(template_text().encode()) < 51_200


def test_outputs_are_those_that_a_profile_is_made_of() -> None:
    outputs = template()["Outputs"]
    assert set(outputs) == {
        "AssignPublicIp",
        "Bucket",
        "Cluster",
        "Ec2Queue",
        "Ec2SpotQueue",
        "ExecutionRole",
        "FargateQueue",
        "FargateSpotQueue",
        "FunctionRole",
        "JobRole",
        "KeySecret",
        "LogGroup",
        "RelayQueue",
        "Repository",
        "RunProfile",
        "RunRole",
        "SecurityGroup",
        "Subnets",
        "Version",
        "Vpc",
        "WorkerProfile",
        "WorkerRole",
    }
    assert outputs["Version"]["Value"] == TEMPLATE_VERSION
    conditional = {name for name, each in outputs.items() if each.get("Condition") == "Ec2"}
    assert conditional == {"Ec2Queue", "Ec2SpotQueue"}


def test_everything_that_can_be_tagged_carries_the_stacks_tag() -> None:
    for name, each in RESOURCES.items():
        if each["Type"] in UNTAGGED:
            continue
        tags = each["Properties"]["Tags"]
        if isinstance(tags, list):
            tags = {tag["Key"]: tag["Value"] for tag in tags}
        assert tags["cloudexec:stack"] == {"Ref": "AWS::StackName"}, name


def test_every_name_has_the_stacks_name_in_it() -> None:
    """Two set-ups can stand in one account and region."""
    for name, each in RESOURCES.items():
        for key, value in each["Properties"].items():
            if key.endswith("Name"):
                assert "AWS::StackName" in json.dumps(value), f"{name}.{key}"


def test_fargate_environments_have_nothing_that_fargate_refuses() -> None:
    """AWS Batch API Reference, "ComputeResource"."""
    for name in ("FargateEnvironment", "FargateSpotEnvironment"):
        resources = RESOURCES[name]["Properties"]["ComputeResources"]
        assert set(resources) == {"Type", "MaxvCpus", "Subnets", "SecurityGroupIds"}
        assert "Condition" not in RESOURCES[name]


def test_ec2_environments_do_not_wait_for_one_type_of_instance() -> None:
    strategies = {
        each["Properties"]["ComputeResources"]["Type"]: each["Properties"]["ComputeResources"].get(
            "AllocationStrategy"
        )
        for each in _of_type("AWS::Batch::ComputeEnvironment").values()
    }
    assert strategies == {
        "FARGATE": None,
        "FARGATE_SPOT": None,
        "EC2": "BEST_FIT_PROGRESSIVE",
        "SPOT": "SPOT_PRICE_CAPACITY_OPTIMIZED",
    }


def test_ec2_resources_exist_only_on_request() -> None:
    conditional = {name for name, each in RESOURCES.items() if each.get("Condition") == "Ec2"}
    assert conditional == {
        "Ec2Environment",
        "Ec2Queue",
        "Ec2SpotEnvironment",
        "Ec2SpotQueue",
        "InstanceProfile",
        "InstanceRole",
    }


def test_only_this_account_can_have_ecs_take_on_the_roles() -> None:
    trusts = {
        name: RESOURCES[name]["Properties"]["AssumeRolePolicyDocument"]["Statement"]
        for name in ("JobRole", "ExecutionRole", "RunRole")
    }
    # The machine of a run may be an instance, which has no condition to name.
    either = trusts["RunRole"].pop()
    instances = {"Effect": "Allow", "Principal": {"Service": "ec2.amazonaws.com"}}
    instances["Action"] = "sts:AssumeRole"
    assert either == {"Fn::If": ["Instances", instances, {"Ref": "AWS::NoValue"}]}
    for (statement,) in trusts.values():
        assert statement["Principal"] == {"Service": "ecs-tasks.amazonaws.com"}
        assert statement["Condition"] == {
            "StringEquals": {"aws:SourceAccount": {"Ref": "AWS::AccountId"}}
        }


def test_tasks_may_use_only_their_part_of_the_bucket() -> None:
    (statement,) = _statements("JobRole")
    assert statement["Resource"] == {"Fn::Sub": "${Bucket.Arn}/data/*"}
    assert all(action.startswith("s3:") for action in statement["Action"])


def test_execution_role_has_no_wildcard_but_for_the_registry_token() -> None:
    for statement in _statements("ExecutionRole"):
        if statement["Resource"] == "*":
            assert statement["Action"] == "ecr:GetAuthorizationToken"
        assert "*" not in statement["Action"]


def test_programs_that_are_run_may_use_this_stack_and_hand_on_less_than_they_have() -> None:
    """They start workers, with the roles of workers, and cannot give others their own role."""
    statements = _statements("RunRole")
    for statement in statements:
        assert not [each for each in statement["Action"] if "*" in each]
        if statement["Resource"] == "*":
            verbs = {each.partition(":")[2] for each in statement["Action"]}
            assert all(each.startswith(("Describe", "Get", "List")) for each in verbs)
    (passing,) = (each for each in statements if each["Action"] == ["iam:PassRole"])
    assert passing["Resource"] == [
        {"Fn::GetAtt": ["ExecutionRole", "Arn"]},
        {"Fn::GetAtt": ["JobRole", "Arn"]},
    ]
    of_stack = {"aws:ResourceTag/cloudexec:stack": {"Ref": "AWS::StackName"}}
    definitions, submitting = (each for each in statements if "batch:SubmitJob" in each["Action"])
    # A definition of another stack has roles of that stack.
    assert definitions["Condition"] == {"StringEquals": of_stack}
    assert not [each for each in submitting["Resource"] if "job-definition" in each["Fn::Sub"]]
    (ending,) = (each for each in statements if "batch:TerminateJob" in each["Action"])
    assert ending["Condition"] == {"StringEquals": of_stack}
    (tagging,) = (each for each in statements if "batch:TagResource" in each["Action"])
    assert tagging["Condition"] == {"StringEqualsIfExists": of_stack}
    queues = [each["Fn::Sub"] for each in submitting["Resource"] if "job-queue" in each["Fn::Sub"]]
    assert [each.rpartition("/")[2] for each in queues] == [
        "${AWS::StackName}-fargate",
        "${AWS::StackName}-fargate-spot",
        "${AWS::StackName}-ec2",
        "${AWS::StackName}-ec2-spot",
    ]


def test_programs_that_are_run_hand_their_role_on_to_tasks_of_a_stack_with_a_cluster_only() -> None:
    """The next attempt of a run on Fargate has it, and no definition of another stack is run."""
    statements = {each["Action"][0]: each for each in _conditional("Fargate")}
    anywhere = [each["Action"] for each in statements.values() if each["Resource"] == "*"]
    assert anywhere == [
        ["ecs:DescribeTaskDefinition", "ecs:ListTasks", "ecs:RegisterTaskDefinition"]
    ]
    passing = statements["iam:PassRole"]
    assert passing["Resource"]["Fn::Sub"].endswith(":role/${AWS::StackName}-RunRole-*")
    assert passing["Condition"] == {
        "StringEquals": {"iam:PassedToService": ["ecs-tasks.amazonaws.com"]}
    }
    running = statements["ecs:RunTask"]["Condition"]
    assert running["ArnEquals"]["ecs:cluster"]["Fn::Sub"].endswith("cluster/${AWS::StackName}")
    assert running["StringEquals"] == {"aws:ResourceTag/cloudexec:stack": {"Ref": "AWS::StackName"}}


def test_programs_that_are_run_start_and_end_only_instances_with_the_stacks_tag() -> None:
    """They hand on the role of workers, and their own for the next attempt, to EC2 alone."""
    statements = _conditional("Instances")
    stack = {"Ref": "AWS::StackName"}
    for statement in statements:
        kinds = json.dumps(statement["Resource"])
        if "ec2:RunInstances" in statement["Action"] and "instance/" in kinds:
            condition = {"StringEquals": {"aws:RequestTag/cloudexec:stack": stack}}
            assert statement["Condition"] == condition
        if statement["Resource"] == "*":
            verbs = {each.partition(":")[2] for each in statement["Action"]}
            assert all(each.startswith(("Describe", "Get")) for each in verbs)
    by_action = {each["Action"][0]: each for each in statements}
    ending = {"StringEquals": {"aws:ResourceTag/cloudexec:stack": stack}}
    assert by_action["ec2:TerminateInstances"]["Condition"] == ending
    tagging = by_action["ec2:CreateTags"]["Condition"]["StringEquals"]["ec2:CreateAction"]
    assert tagging == ["CreateFleet", "CreateLaunchTemplate", "RunInstances"]
    passing = by_action["iam:PassRole"]
    workers, own = passing["Resource"]
    assert workers == {"Fn::GetAtt": ["WorkerRole", "Arn"]}
    assert own["Fn::Sub"].endswith(":role/${AWS::StackName}-RunRole-*")
    assert passing["Condition"] == {"StringEquals": {"iam:PassedToService": ["ec2.amazonaws.com"]}}


def test_programs_that_are_run_make_and_call_functions_of_the_stack_only() -> None:
    statements = _conditional("Lambda")
    for statement in statements:
        if statement["Resource"] == "*":
            assert statement["Action"] == ["lambda:GetAccountSettings", "lambda:ListFunctions"]
        elif statement["Action"][0].startswith("lambda:"):
            assert statement["Resource"]["Fn::Sub"].endswith(":function:${AWS::StackName}-*")
    (passing,) = (each for each in statements if each["Action"] == ["iam:PassRole"])
    assert passing["Resource"] == {"Fn::GetAtt": ["FunctionRole", "Arn"]}
    assert passing["Condition"] == {
        "StringEquals": {"iam:PassedToService": ["lambda.amazonaws.com"]}
    }


def test_the_policies_of_the_role_of_runs_fit_into_it() -> None:
    """10,240 characters without spaces, for a stack whose names are as long as they can be.

    IAM User Guide, "IAM and AWS STS quotas".
    """
    policies = RESOURCES["RunRole"]["Properties"]["Policies"]
    documents = [each["Fn::If"][1] if "Fn::If" in each else each for each in policies]
    text = "".join(json.dumps(each["PolicyDocument"], separators=(",", ":")) for each in documents)
    # Each name of a stack is longer than the reference to it, by 30 characters or less.
    assert len(text) + 30 * text.count("AWS::StackName") < 10_240


def test_security_group_lets_in_only_itself() -> None:
    assert "SecurityGroupIngress" not in RESOURCES["SecurityGroup"]["Properties"]
    (rule,) = _of_type("AWS::EC2::SecurityGroupIngress").values()
    properties = rule["Properties"]
    assert properties["SourceSecurityGroupId"] == properties["GroupId"]
    assert not {"CidrIp", "CidrIpv6", "SourcePrefixListId"} & properties.keys()


def test_key_is_64_hexadecimal_digits() -> None:
    generate = RESOURCES["KeySecret"]["Properties"]["GenerateSecretString"]
    letters = set("abcdefghijklmnopqrstuvwxyz") - set(generate["ExcludeCharacters"])
    assert letters == set("abcdef")
    assert generate["ExcludePunctuation"]
    assert generate["ExcludeUppercase"]
    assert generate["PasswordLength"] == 64


def test_bucket_is_private_encrypted_and_empties_itself() -> None:
    properties = RESOURCES["Bucket"]["Properties"]
    assert all(properties["PublicAccessBlockConfiguration"].values())
    assert len(properties["PublicAccessBlockConfiguration"]) == 4
    assert "BucketEncryption" in properties
    (rule,) = properties["LifecycleConfiguration"]["Rules"]
    assert rule["ExpirationInDays"] == {"Ref": "BucketExpireDays"}
    assert rule["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 1}


def test_no_image_that_a_profile_pins_is_ever_dropped() -> None:
    """Profiles are on anybody's machine, and pin a digest, with or without a tag."""
    properties = RESOURCES["Repository"]["Properties"]
    assert "LifecyclePolicy" not in properties
    assert properties["ImageScanningConfiguration"] == {"ScanOnPush": True}


def test_nothing_outlives_the_stack() -> None:
    for name, each in RESOURCES.items():
        assert each.get("DeletionPolicy", "Delete") == "Delete", name


@pytest.mark.parametrize("name", sorted(_of_type("AWS::Batch::ComputeEnvironment")))
def test_roles_and_rules_go_after_the_environments(name: str) -> None:
    """A worker may still run when the stack is being deleted."""
    assert {"ExecutionRole", "JobRole", "RunRole"} <= set(RESOURCES[name]["DependsOn"])
