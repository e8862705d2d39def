"""The CloudFormation template of a set-up, as data."""

from __future__ import annotations

import json
from typing import Any

from cloudexec._aws import template_ec2, template_lambda
from cloudexec._aws.names import (
    DEFINITION_PREFIX,
    OBJECTS_PREFIX,
    RELAY_PORT,
    TAG_REGION,
    TAG_STACK,
    log_group_of,
)
from cloudexec._aws.template_lambda import OUTPUT as LAMBDA_OUTPUT
from cloudexec._aws.template_lambda import PARAMETER as LAMBDA_PARAMETER
from cloudexec._aws.template_lambda import function_role, repository_policy
from cloudexec._aws.template_tasks import task_statements

__all__ = ["DATA_PREFIX", "LOG_RETENTION_DAYS", "TEMPLATE_VERSION", "template", "template_text"]

TEMPLATE_VERSION = "7"
"""Raised when the template changes. ``cloudexec doctor`` compares it with the stack's output."""
DATA_PREFIX = "data/"
"""Prefix of the objects that tasks may read and write."""
LOG_RETENTION_DAYS = (1, 3, 5, 7, 14, 30, 60, 90, 120, 150, 180, 365, 400, 545, 731, 1096, 1827)
"""Values that CloudWatch Logs allows. CloudWatch Logs API Reference, "PutRetentionPolicy"."""

_RELAY_VCPUS = 4
"""Most vCPUs of all relays together. Each relay has a quarter of one."""
_STACK = {"Ref": "AWS::StackName"}
_NOTHING = {"Ref": "AWS::NoValue"}
_BOUNDARY = {
    "PermissionsBoundary": {"Fn::If": ["Bounded", {"Ref": "PermissionsBoundary"}, _NOTHING]}
}

Json = dict[str, Any]

_DATA: Json = {
    "Effect": "Allow",
    "Action": ["s3:GetObject", "s3:PutObject", "s3:AbortMultipartUpload"],
    "Resource": {"Fn::Sub": "${Bucket.Arn}/" + DATA_PREFIX + "*"},
}
"""What every role of tasks may do."""


def template() -> Json:
    """Return the template: parameters, resources and outputs.

    Two stacks in one account and region never share the name of a resource: a name begins with the
    stack's, or CloudFormation chooses it, so that a replacement can exist together with the old
    resource. The environments have no service role, so AWS Batch uses its service-linked role,
    creates it when needed, and can update the environments in place.
    """
    return {
        "AWSTemplateFormatVersion": "2010-09-09",
        "Description": f"cloudexec: workers on AWS (template version {TEMPLATE_VERSION})",
        "Metadata": {
            "AWS::CloudFormation::Interface": {
                "ParameterGroups": [
                    {
                        "Label": {"default": "Network"},
                        "Parameters": ["VpcId", "SubnetIds", "AssignPublicIp"],
                    },
                    {
                        "Label": {"default": "Permissions"},
                        "Parameters": ["PermissionsBoundary"],
                    },
                    {
                        "Label": {"default": "Capacity"},
                        "Parameters": [
                            "MaxVcpus",
                            "Ec2",
                            "Fargate",
                            template_ec2.PARAMETER,
                            "Lambda",
                        ],
                    },
                    {
                        "Label": {"default": "Retention"},
                        "Parameters": ["LogRetentionDays", "BucketExpireDays"],
                    },
                ]
            }
        },
        "Parameters": _parameters(),
        "Conditions": {
            "Ec2": {"Fn::Equals": [{"Ref": "Ec2"}, "true"]},
            "Fargate": {"Fn::Equals": [{"Ref": "Fargate"}, "true"]},
            "Lambda": {"Fn::Equals": [{"Ref": "Lambda"}, "true"]},
            template_ec2.PARAMETER: {"Fn::Equals": [{"Ref": template_ec2.PARAMETER}, "true"]},
            "Bounded": {"Fn::Not": [{"Fn::Equals": [{"Ref": "PermissionsBoundary"}, ""]}]},
        },
        "Resources": {
            **_network(),
            **_storage(),
            **_roles(),
            **_run_role(),
            **_fargate(),
            **_relays(),
            **_ec2(),
            **_cluster(),
            **function_role(_BOUNDARY, _tags(anywhere=True), _DATA),
            **template_ec2.resources(
                boundary=_BOUNDARY,
                trust=_trust("ec2.amazonaws.com"),
                start_policy=_start_policy(),
                tags=_tags(anywhere=True),
            ),
        },
        "Outputs": _outputs(),
    }


def template_text() -> str:
    """Return the template as JSON text, short enough to be passed to CloudFormation as it is.

    That takes 51,200 bytes. AWS CloudFormation User Guide, "CloudFormation quotas".
    """
    return json.dumps(template(), indent=1) + "\n"


def _parameters() -> Json:
    return {
        "VpcId": {
            "Type": "AWS::EC2::VPC::Id",
            "Description": "VPC in which workers run.",
        },
        "SubnetIds": {
            "Type": "List<AWS::EC2::Subnet::Id>",
            "Description": "Subnets of that VPC in which workers run, 16 at most.",
        },
        "AssignPublicIp": {
            "Type": "String",
            "AllowedValues": ["ENABLED", "DISABLED"],
            "Default": "ENABLED",
            "Description": (
                "ENABLED in public subnets; DISABLED in private ones, which need a NAT gateway or "
                "VPC endpoints."
            ),
        },
        "PermissionsBoundary": {
            "Type": "String",
            "Default": "",
            "AllowedPattern": r"|arn:aws[a-z-]*:iam::(\d{12}|aws):policy/[\w+=,.@/-]+",
            "Description": "ARN of the policy that bounds the roles; empty for none.",
        },
        "MaxVcpus": {
            "Type": "Number",
            "MinValue": 1,
            "Default": 256,
            "Description": "Largest number of vCPUs at once, in each compute environment.",
        },
        "Ec2": {
            "Type": "String",
            "AllowedValues": ["true", "false"],
            "Default": "false",
            "Description": "Whether there are queues for EC2 instances too.",
        },
        "Fargate": {
            "Type": "String",
            "AllowedValues": ["true", "false"],
            "Default": "false",
            "Description": "Whether there is a cluster for tasks on Fargate without AWS Batch too.",
        },
        "Lambda": LAMBDA_PARAMETER,
        **template_ec2.PARAMETERS,
        "LogRetentionDays": {
            "Type": "Number",
            "AllowedValues": list(LOG_RETENTION_DAYS),
            "Default": 30,
            "Description": "Days for which what workers print is kept.",
        },
        "BucketExpireDays": {
            "Type": "Number",
            "MinValue": 1,
            "Default": 7,
            "Description": "Days after which objects in the bucket are deleted.",
        },
    }


def _network() -> Json:
    group = {"Fn::GetAtt": ["SecurityGroup", "GroupId"]}
    return {
        "SecurityGroup": {
            "Type": "AWS::EC2::SecurityGroup",
            "Properties": {
                "GroupDescription": {
                    "Fn::Sub": "Workers of ${AWS::StackName} and the machines they dial back to"
                },
                "VpcId": {"Ref": "VpcId"},
                "Tags": _tags(),
            },
        },
        # The rule is a resource of its own, because a group cannot refer to itself.
        "SecurityGroupIngress": {
            "Type": "AWS::EC2::SecurityGroupIngress",
            "Properties": {
                "Description": "Whoever is in the group reaches whoever is in it",
                "GroupId": group,
                "SourceSecurityGroupId": group,
                "IpProtocol": "tcp",
                "FromPort": 0,
                "ToPort": 65535,
            },
        },
    }


def _storage() -> Json:
    expire = {"Ref": "BucketExpireDays"}
    return {
        "LogGroup": {
            "Type": "AWS::Logs::LogGroup",
            "DeletionPolicy": "Delete",
            "UpdateReplacePolicy": "Delete",
            "Properties": {
                "LogGroupName": {"Fn::Sub": log_group_of("${AWS::StackName}")},
                "RetentionInDays": {"Ref": "LogRetentionDays"},
                "Tags": _tags(),
            },
        },
        "Bucket": {
            "Type": "AWS::S3::Bucket",
            "DeletionPolicy": "Delete",
            "UpdateReplacePolicy": "Delete",
            "Properties": {
                "BucketEncryption": {
                    "ServerSideEncryptionConfiguration": [
                        {"ServerSideEncryptionByDefault": {"SSEAlgorithm": "AES256"}}
                    ]
                },
                "PublicAccessBlockConfiguration": {
                    "BlockPublicAcls": True,
                    "BlockPublicPolicy": True,
                    "IgnorePublicAcls": True,
                    "RestrictPublicBuckets": True,
                },
                "OwnershipControls": {"Rules": [{"ObjectOwnership": "BucketOwnerEnforced"}]},
                "LifecycleConfiguration": {
                    "Rules": [
                        {
                            "Id": "expire",
                            "Status": "Enabled",
                            "ExpirationInDays": expire,
                            "AbortIncompleteMultipartUpload": {"DaysAfterInitiation": 1},
                        }
                    ]
                },
                "Tags": _tags(anywhere=True),
            },
        },
        "Repository": {
            "Type": "AWS::ECR::Repository",
            "DeletionPolicy": "Delete",
            "UpdateReplacePolicy": "Delete",
            "Properties": {
                "RepositoryName": _STACK,
                "ImageScanningConfiguration": {"ScanOnPush": True},
                **repository_policy(),
                # There is no lifecycle policy, because profiles on any machine may refer to an
                # image by its digest, and the stack does not know them.
                "Tags": _tags(),
            },
        },
        "KeySecret": {
            "Type": "AWS::SecretsManager::Secret",
            "DeletionPolicy": "Delete",
            "UpdateReplacePolicy": "Delete",
            "Properties": {
                "Description": {"Fn::Sub": "Key by which workers of ${AWS::StackName} are let in"},
                # Only the digits 0-9 and the letters a-f remain: 64 hexadecimal digits.
                "GenerateSecretString": {
                    "PasswordLength": 64,
                    "ExcludePunctuation": True,
                    "ExcludeUppercase": True,
                    "ExcludeCharacters": "ghijklmnopqrstuvwxyz",
                },
                "Tags": _tags(),
            },
        },
    }


def _roles() -> Json:
    return {
        "JobRole": {
            "Type": "AWS::IAM::Role",
            "Properties": {
                **_BOUNDARY,
                "Description": "What tasks may do",
                "AssumeRolePolicyDocument": _trust_tasks(),
                "Policies": [_policy("data", _DATA)],
                "Tags": _tags(anywhere=True),
            },
        },
        "ExecutionRole": {
            "Type": "AWS::IAM::Role",
            "Properties": {
                **_BOUNDARY,
                "Description": "Starts workers: pulls the image, reads the key, writes the log",
                "AssumeRolePolicyDocument": _trust_tasks(),
                "Policies": [_start_policy()],
                "Tags": _tags(anywhere=True),
            },
        },
    }


def _start_policy() -> Json:
    """Return what starting a worker needs."""
    return _policy(
        "start",
        {
            # AWS does not restrict this action to resources.
            "Effect": "Allow",
            "Action": "ecr:GetAuthorizationToken",
            "Resource": "*",
        },
        {
            "Effect": "Allow",
            "Action": [
                "ecr:BatchCheckLayerAvailability",
                "ecr:BatchGetImage",
                "ecr:GetDownloadUrlForLayer",
            ],
            "Resource": {"Fn::GetAtt": ["Repository", "Arn"]},
        },
        {
            "Effect": "Allow",
            "Action": ["logs:CreateLogStream", "logs:PutLogEvents"],
            "Resource": {"Fn::GetAtt": ["LogGroup", "Arn"]},
        },
        {
            "Effect": "Allow",
            "Action": "secretsmanager:GetSecretValue",
            "Resource": {"Ref": "KeySecret"},
        },
    )


def _run_role() -> Json:
    """Return the role of `cloudexec run`, with the permissions that an executor's client needs.

    It may pass on the roles of workers, so that workers have fewer permissions. It may pass on
    itself only to tasks in the stack's cluster and to instances, if there are any: see
    ``task_statements`` and ``template_ec2.run_statements``.
    """

    def arns(*names: str) -> list[Json]:
        place = "arn:${AWS::Partition}:batch:${AWS::Region}:${AWS::AccountId}:"
        return [{"Fn::Sub": place + name} for name in names]

    def allow(resource: Any, *actions: str) -> Json:
        return {"Effect": "Allow", "Action": list(actions), "Resource": resource}

    def of_stack(statement: Json, *, or_new: bool = False) -> Json:
        """Restrict a statement to the stack's tag; ``or_new`` also allows untagged resources."""
        test = "StringEqualsIfExists" if or_new else "StringEquals"
        tag = {f"aws:ResourceTag/{TAG_STACK}": {"Ref": "AWS::StackName"}}
        return {**statement, "Condition": {test: tag}}

    definitions = f"job-definition/{DEFINITION_PREFIX}*"
    # Queues are given by name: with references, this role would have to be deleted first.
    kinds = ("fargate", "fargate-spot", "ec2", "ec2-spot")
    queues = ["job-queue/${AWS::StackName}-" + kind for kind in kinds]
    pass_roles = allow(
        [{"Fn::GetAtt": ["ExecutionRole", "Arn"]}, {"Fn::GetAtt": ["JobRole", "Arn"]}],
        "iam:PassRole",
    )
    services = ["batch.amazonaws.com", "ecs-tasks.amazonaws.com"]
    pass_roles["Condition"] = {"StringEquals": {"iam:PassedToService": services}}
    return {
        "RunRole": {
            "Type": "AWS::IAM::Role",
            "Properties": {
                **_BOUNDARY,
                "Description": "What programs started with cloudexec run may do",
                "AssumeRolePolicyDocument": template_ec2.run_trust(
                    _trust_tasks(), _trust("ec2.amazonaws.com")
                ),
                "Policies": [
                    _policy(
                        "run",
                        allow(
                            [
                                {"Fn::Sub": "${Bucket.Arn}/" + prefix + "*"}
                                for prefix in (OBJECTS_PREFIX, DATA_PREFIX)
                            ],
                            "s3:AbortMultipartUpload",
                            "s3:DeleteObject",
                            "s3:GetObject",
                            "s3:PutObject",
                        ),
                        allow(
                            {"Fn::GetAtt": ["Bucket", "Arn"]},
                            "s3:ListBucket",
                            "s3:ListBucketMultipartUploads",
                        ),
                        # A submission passes on the definition's roles, so it must be of the stack.
                        of_stack(allow(arns(definitions), "batch:SubmitJob")),
                        allow(arns(*queues, "job/*"), "batch:SubmitJob"),
                        allow(arns(definitions), "batch:RegisterJobDefinition"),
                        of_stack(
                            allow(arns(definitions, "job/*"), "batch:TagResource"), or_new=True
                        ),
                        of_stack(allow(arns("job/*"), "batch:TerminateJob")),
                        allow(
                            # AWS does not restrict these actions to resources.
                            "*",
                            "batch:DescribeComputeEnvironments",
                            "batch:DescribeJobDefinitions",
                            "batch:DescribeJobQueues",
                            "batch:DescribeJobs",
                            "batch:GetJobQueueSnapshot",
                            "batch:ListJobs",
                            "servicequotas:ListServiceQuotas",
                        ),
                        allow({"Fn::GetAtt": ["LogGroup", "Arn"]}, "logs:GetLogEvents"),
                        allow({"Ref": "KeySecret"}, "secretsmanager:GetSecretValue"),
                        pass_roles,
                    ),
                    *(
                        {"Fn::If": [condition, _policy(name, *statements), _NOTHING]}
                        for condition, name, statements in (
                            ("Fargate", "tasks", task_statements()),
                            (template_ec2.PARAMETER, "instances", template_ec2.run_statements()),
                            ("Lambda", "functions", template_lambda.run_statements()),
                        )
                    ),
                ],
                "Tags": _tags(anywhere=True),
            },
        },
    }


def _fargate() -> Json:
    resources = {
        "MaxvCpus": {"Ref": "MaxVcpus"},
        "Subnets": {"Ref": "SubnetIds"},
        "SecurityGroupIds": [{"Fn::GetAtt": ["SecurityGroup", "GroupId"]}],
    }
    return {
        "FargateEnvironment": _environment({"Type": "FARGATE", **resources}),
        "FargateQueue": _queue("fargate", "FargateEnvironment"),
        "FargateSpotEnvironment": _environment({"Type": "FARGATE_SPOT", **resources}),
        "FargateSpotQueue": _queue("fargate-spot", "FargateSpotEnvironment"),
    }


def _relays() -> Json:
    """Return the resources of relays, in a group of their own, as nobody may dial workers."""
    return {
        "RelaySecurityGroup": {
            "Type": "AWS::EC2::SecurityGroup",
            "Properties": {
                "GroupDescription": {
                    "Fn::Sub": "Relays of ${AWS::StackName}, which clients and workers dial"
                },
                "VpcId": {"Ref": "VpcId"},
                "SecurityGroupIngress": [
                    {
                        "Description": "Clients and workers have any address, and prove themselves",
                        "CidrIp": "0.0.0.0/0",
                        "IpProtocol": "tcp",
                        "FromPort": RELAY_PORT,
                        "ToPort": RELAY_PORT,
                    }
                ],
                "Tags": _tags(),
            },
        },
        "RelayEnvironment": _environment(
            {
                "Type": "FARGATE",
                "MaxvCpus": _RELAY_VCPUS,
                "Subnets": {"Ref": "SubnetIds"},
                "SecurityGroupIds": [{"Fn::GetAtt": ["RelaySecurityGroup", "GroupId"]}],
            }
        ),
        "RelayQueue": _queue("relay", "RelayEnvironment"),
    }


def _ec2() -> Json:
    resources = {
        "MinvCpus": 0,
        "MaxvCpus": {"Ref": "MaxVcpus"},
        # "optimal" stands for families without GPUs. AWS Batch API Reference, "ComputeResource".
        "InstanceTypes": ["optimal", "g4dn"],
        "InstanceRole": {"Fn::GetAtt": ["InstanceProfile", "Arn"]},
        "Subnets": {"Ref": "SubnetIds"},
        "SecurityGroupIds": [{"Fn::GetAtt": ["SecurityGroup", "GroupId"]}],
        "Tags": {TAG_STACK: _STACK, "Name": _STACK},
    }
    conditional: Json = {
        "InstanceRole": {
            "Type": "AWS::IAM::Role",
            "Properties": {
                **_BOUNDARY,
                "Description": "Lets instances join the cluster of their compute environment",
                "AssumeRolePolicyDocument": _trust("ec2.amazonaws.com"),
                "ManagedPolicyArns": [
                    {
                        "Fn::Sub": "arn:${AWS::Partition}:iam::aws:policy/service-role/"
                        "AmazonEC2ContainerServiceforEC2Role"
                    }
                ],
                "Tags": _tags(anywhere=True),
            },
        },
        "InstanceProfile": {
            "Type": "AWS::IAM::InstanceProfile",
            "Properties": {"Roles": [{"Ref": "InstanceRole"}]},
        },
        "Ec2Environment": _environment(
            {"Type": "EC2", "AllocationStrategy": "BEST_FIT_PROGRESSIVE", **resources}
        ),
        "Ec2Queue": _queue("ec2", "Ec2Environment"),
        "Ec2SpotEnvironment": _environment(
            {"Type": "SPOT", "AllocationStrategy": "SPOT_PRICE_CAPACITY_OPTIMIZED", **resources}
        ),
        "Ec2SpotQueue": _queue("ec2-spot", "Ec2SpotEnvironment"),
    }
    return {name: {"Condition": "Ec2", **each} for name, each in conditional.items()}


def _cluster() -> Json:
    """Return the cluster for tasks without a queue, with the same network and roles."""
    return {
        "Cluster": {
            "Condition": "Fargate",
            "Type": "AWS::ECS::Cluster",
            # The cluster is deleted before these, as it may still run a worker.
            "DependsOn": ["ExecutionRole", "JobRole", "SecurityGroupIngress"],
            "Properties": {
                "ClusterName": _STACK,
                "CapacityProviders": ["FARGATE", "FARGATE_SPOT"],
                "Tags": _tags(),
            },
        },
    }


def _outputs() -> Json:
    def attribute(resource: str, name: str) -> Json:
        return {"Fn::GetAtt": [resource, name]}

    def reference(name: str) -> Json:
        return {"Ref": name}

    always: dict[str, tuple[str, Any]] = {
        "FargateQueue": ("Queue of Fargate workers", reference("FargateQueue")),
        "FargateSpotQueue": ("Queue of Fargate Spot workers", reference("FargateSpotQueue")),
        "RelayQueue": ("Queue of relays", reference("RelayQueue")),
        "JobRole": ("Role of tasks", attribute("JobRole", "Arn")),
        "RunRole": ("Role of cloudexec run", attribute("RunRole", "Arn")),
        "ExecutionRole": ("Role that starts workers", attribute("ExecutionRole", "Arn")),
        "KeySecret": ("Secret by which workers are let in", reference("KeySecret")),
        "LogGroup": ("Where workers' output goes", reference("LogGroup")),
        "Bucket": ("Bucket for data of tasks", reference("Bucket")),
        "Repository": ("Repository of worker images", attribute("Repository", "RepositoryUri")),
        "SecurityGroup": ("Group of workers and clients", attribute("SecurityGroup", "GroupId")),
        "Subnets": ("Where workers run", {"Fn::Join": [",", {"Ref": "SubnetIds"}]}),
        "Vpc": ("Where workers run", reference("VpcId")),
        "AssignPublicIp": ("Whether workers have public addresses", reference("AssignPublicIp")),
        "Version": ("Version of this template", TEMPLATE_VERSION),
    }
    conditional: dict[str, tuple[str, str, Any]] = {
        "Ec2Queue": ("Ec2", "Queue of EC2 workers", reference("Ec2Queue")),
        "Ec2SpotQueue": ("Ec2", "Queue of EC2 Spot workers", reference("Ec2SpotQueue")),
        "Cluster": ("Fargate", "Cluster of tasks on Fargate", attribute("Cluster", "Arn")),
        "FunctionRole": LAMBDA_OUTPUT,
        **template_ec2.OUTPUTS,
    }
    return {
        **{key: {"Description": text, "Value": value} for key, (text, value) in always.items()},
        **{
            key: {"Condition": condition, "Description": text, "Value": value}
            for key, (condition, text, value) in conditional.items()
        },
    }


def _environment(resources: Json) -> Json:
    return {
        "Type": "AWS::Batch::ComputeEnvironment",
        # The environment is deleted before these, as it may still run a worker.
        "DependsOn": ["ExecutionRole", "JobRole", "RunRole", "SecurityGroupIngress"],
        "Properties": {
            "Type": "MANAGED",
            "State": "ENABLED",
            "ReplaceComputeEnvironment": False,
            "ComputeResources": resources,
            "Tags": {TAG_STACK: _STACK},
        },
    }


def _queue(suffix: str, environment: str) -> Json:
    return {
        "Type": "AWS::Batch::JobQueue",
        "Properties": {
            "JobQueueName": {"Fn::Sub": "${AWS::StackName}-" + suffix},
            "State": "ENABLED",
            "Priority": 1,
            "ComputeEnvironmentOrder": [{"Order": 1, "ComputeEnvironment": {"Ref": environment}}],
            "Tags": {TAG_STACK: _STACK},
        },
    }


def _trust_tasks() -> Json:
    # ECS can use the role only on behalf of this account, which prevents the confused deputy.
    return _trust("ecs-tasks.amazonaws.com", account_only=True)


def _trust(service: str, *, account_only: bool = False) -> Json:
    statement: Json = {
        "Effect": "Allow",
        "Principal": {"Service": service},
        "Action": "sts:AssumeRole",
    }
    if account_only:
        account = {"Ref": "AWS::AccountId"}
        statement["Condition"] = {"StringEquals": {"aws:SourceAccount": account}}
    return {"Version": "2012-10-17", "Statement": [statement]}


def _policy(name: str, *statements: Json) -> Json:
    return {
        "PolicyName": name,
        "PolicyDocument": {"Version": "2012-10-17", "Statement": list(statements)},
    }


def _tags(*, anywhere: bool = False) -> list[Json]:
    """Return the tags of a resource. ``anywhere`` is for global resources."""
    tags: list[Json] = [{"Key": TAG_STACK, "Value": _STACK}]
    if anywhere:
        tags.append({"Key": TAG_REGION, "Value": {"Ref": "AWS::Region"}})
    return tags
