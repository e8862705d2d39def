"""Makes the minimal IAM policy for people who run executors, from a table of the calls made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from cloudexec._aws import policy_lambda
from cloudexec._aws.names import DEFINITION_PREFIX, OBJECTS_PREFIX, TAG_STACK, partition_of
from cloudexec._aws.policy_ec2 import OF_INSTANCES, OPERATIONS, PASSED_TO, SIDS, place_of
from cloudexec._aws.profile import Profile
from cloudexec._errors import ConfigError

__all__ = [
    "CALLS",
    "LARGEST_MANAGED_POLICY",
    "Call",
    "Grant",
    "actions_for",
    "policy",
    "unknown_calls",
]

LARGEST_MANAGED_POLICY = 6_144
"""Characters without spaces. IAM User Guide, "IAM and AWS STS quotas"."""

Call: TypeAlias = tuple[str, str]
"""A service as botocore names it, and an operation: ``("batch", "SubmitJob")``."""

Resource: TypeAlias = Literal[
    "any",
    "bucket",
    "cluster",
    "definition",
    "function",
    "function_role",
    "image",
    "instance_parts",
    "instance_tags",
    "job",
    "log_group",
    "new_instance",
    "object",
    "own_instance",
    "own_task",
    "queue",
    "read_role",
    "role",
    "secret",
    "stack",
    "system_image",
    "task",
    "task_definition",
]


@dataclass(frozen=True, slots=True)
class Grant:
    """One permission that an operation needs."""

    action: str
    """Action as IAM names it: ``"batch:SubmitJob"``."""
    resource: Resource
    passed_to: tuple[str, ...] = ()
    """For ``iam:PassRole``: the services to which the role may be passed."""
    in_cluster: bool = False
    """Whether it is granted in the stack's cluster only."""


def _any(*actions: str) -> tuple[Grant, ...]:
    return tuple(Grant(action, "any") for action in actions)


_TAG_JOB = Grant("batch:TagResource", "job")
_TAG_DEFINITION = Grant("batch:TagResource", "definition")
_PASS_ROLE = Grant(
    "iam:PassRole",
    "role",
    # Some guides say that AWS Batch passes roles to the first service, others to the second.
    passed_to=("batch.amazonaws.com", "ecs-tasks.amazonaws.com"),
)
_PUSH = (
    # `docker push` sends requests to the registry with the token. They need these permissions.
    Grant("ecr:BatchCheckLayerAvailability", "image"),
    Grant("ecr:BatchGetImage", "image"),
    Grant("ecr:CompleteLayerUpload", "image"),
    Grant("ecr:GetDownloadUrlForLayer", "image"),
    Grant("ecr:InitiateLayerUpload", "image"),
    Grant("ecr:PutImage", "image"),
    Grant("ecr:UploadLayerPart", "image"),
)

CALLS: Mapping[Call, tuple[Grant, ...]] = {
    # Running and stopping. Actions that describe and list do not accept resources: AWS Batch User
    # Guide, "Supported resource-level permissions".
    ("batch", "SubmitJob"): (
        Grant("batch:SubmitJob", "queue"),
        Grant("batch:SubmitJob", "definition"),
        # Service Authorization Reference, "Actions, resources, and condition keys for AWS Batch".
        Grant("batch:SubmitJob", "job"),
        _TAG_JOB,
    ),
    ("batch", "RegisterJobDefinition"): (
        Grant("batch:RegisterJobDefinition", "definition"),
        _TAG_DEFINITION,
        _PASS_ROLE,
    ),
    ("batch", "DeregisterJobDefinition"): (Grant("batch:DeregisterJobDefinition", "definition"),),
    ("batch", "TerminateJob"): (Grant("batch:TerminateJob", "job"),),
    ("batch", "TerminateJobs"): (Grant("batch:TerminateJob", "job"),),
    # Monitoring.
    ("batch", "DescribeComputeEnvironments"): _any("batch:DescribeComputeEnvironments"),
    ("batch", "DescribeJobDefinitions"): _any("batch:DescribeJobDefinitions"),
    ("batch", "DescribeJobQueues"): _any("batch:DescribeJobQueues"),
    ("batch", "DescribeJobs"): _any("batch:DescribeJobs"),
    ("batch", "GetJobQueueSnapshot"): _any("batch:GetJobQueueSnapshot"),
    ("batch", "ListJobs"): _any("batch:ListJobs"),
    ("logs", "DescribeLogGroups"): _any("logs:DescribeLogGroups"),
    ("logs", "FilterLogEvents"): (Grant("logs:FilterLogEvents", "log_group"),),
    ("logs", "GetLogEvents"): (Grant("logs:GetLogEvents", "log_group"),),
    ("pricing", "GetProducts"): _any("pricing:GetProducts"),
    ("service-quotas", "ListServiceQuotas"): _any("servicequotas:ListServiceQuotas"),
    ("cloudformation", "DescribeStacks"): (Grant("cloudformation:DescribeStacks", "stack"),),
    ("ec2", "DescribeAvailabilityZones"): _any("ec2:DescribeAvailabilityZones"),
    ("ec2", "DescribeNetworkInterfaces"): _any("ec2:DescribeNetworkInterfaces"),
    ("ec2", "DescribeRouteTables"): _any("ec2:DescribeRouteTables"),
    ("ec2", "DescribeSubnets"): _any("ec2:DescribeSubnets"),
    ("ec2", "DescribeVpcEndpoints"): _any("ec2:DescribeVpcEndpoints"),
    # Tasks on Fargate without AWS Batch, and the address of a relay. Service Authorization
    # Reference, "Actions, resources, and condition keys for Amazon ECS".
    ("ecs", "DescribeTasks"): (Grant("ecs:DescribeTasks", "task"),),
    ("ecs", "DescribeClusters"): (Grant("ecs:DescribeClusters", "cluster"),),
    ("ecs", "DescribeTaskDefinition"): _any("ecs:DescribeTaskDefinition"),
    ("ecs", "ListClusters"): _any("ecs:ListClusters"),
    ("ecs", "ListTasks"): _any("ecs:ListTasks"),
    ("ecs", "RegisterTaskDefinition"): (
        *_any("ecs:RegisterTaskDefinition"),
        Grant("ecs:TagResource", "task_definition"),
        _PASS_ROLE,
    ),
    ("ecs", "RunTask"): (
        Grant("ecs:RunTask", "task_definition", in_cluster=True),
        Grant("ecs:TagResource", "own_task"),
        _PASS_ROLE,
    ),
    ("ecs", "StopTask"): (Grant("ecs:StopTask", "own_task"),),
    **{
        ("ec2", operation): tuple(
            Grant(action, kind, (PASSED_TO,) if kind == "role" else ())  # type: ignore[arg-type]
            for action, kind in grants
        )
        for operation, grants in OPERATIONS.items()
    },
    ("iam", "GetRole"): (Grant("iam:GetRole", "read_role"),),
    # Letting workers connect.
    ("secretsmanager", "GetSecretValue"): (Grant("secretsmanager:GetSecretValue", "secret"),),
    # Objects in the bucket. Workers use URLs that the user has signed with these permissions.
    ("s3", "HeadBucket"): (Grant("s3:ListBucket", "bucket"),),
    ("s3", "ListObjectsV2"): (Grant("s3:ListBucket", "bucket"),),
    ("s3", "ListMultipartUploads"): (Grant("s3:ListBucketMultipartUploads", "bucket"),),
    ("s3", "PutObject"): (Grant("s3:PutObject", "object"),),
    ("s3", "CreateMultipartUpload"): (Grant("s3:PutObject", "object"),),
    ("s3", "UploadPart"): (Grant("s3:PutObject", "object"),),
    ("s3", "CompleteMultipartUpload"): (Grant("s3:PutObject", "object"),),
    ("s3", "AbortMultipartUpload"): (Grant("s3:AbortMultipartUpload", "object"),),
    ("s3", "GetObject"): (Grant("s3:GetObject", "object"),),
    ("s3", "HeadObject"): (Grant("s3:GetObject", "object"),),
    ("s3", "DeleteObjects"): (Grant("s3:DeleteObject", "object"),),
    # Images.
    ("ecr", "DescribeImages"): (Grant("ecr:DescribeImages", "image"),),
    ("ecr", "GetAuthorizationToken"): (*_any("ecr:GetAuthorizationToken"), *_PUSH),
    # This action needs no permission.
    ("sts", "GetCallerIdentity"): (),
    **{
        ("lambda", operation): tuple(
            Grant(action, kind, (policy_lambda.PASSED_TO,) if kind == "function_role" else ())  # type: ignore[arg-type]
            for action, kind in grants
        )
        for operation, grants in policy_lambda.OPERATIONS.items()
    },
}
"""Operation -> permissions that it needs. A test compares the table with the calls made."""
_OF_CLUSTERS = frozenset(
    ("ecs", each)
    for each in (
        "DescribeClusters",
        "DescribeTaskDefinition",
        "ListTasks",
        "RegisterTaskDefinition",
        "RunTask",
        "StopTask",
    )
)
"""Calls that are only made if there is a cluster."""


def policy(profile: Profile | None = None, partition: str = "") -> dict[str, Any]:
    """Return the policy for every call in the table.

    Args:
        profile: Name the resources of this set-up; ``None``: name patterns for all set-ups.
        partition: Partition of the patterns, such as ``"aws-cn"``. It is needed without a profile,
            as an ARN in another partition than the caller's matches nothing.

    Raises:
        ConfigError: If neither is given.
    """
    calls = set(CALLS)
    if profile is not None:
        # Commands without --profile list the clusters and functions of the region even so.
        calls -= set() if profile.cluster else _OF_CLUSTERS
        calls -= set() if profile.function_role else policy_lambda.OF_FUNCTIONS
        calls -= set() if profile.instance_profile else OF_INSTANCES
    return actions_for(calls, profile, partition)


def unknown_calls(calls: Iterable[Call]) -> set[Call]:
    """Return the calls that are missing in the table."""
    return set(calls) - CALLS.keys()


def actions_for(
    calls: Iterable[Call], profile: Profile | None = None, partition: str = ""
) -> dict[str, Any]:
    """Return the policy that allows exactly these calls.

    Args:
        calls: Such as the calls recorded in a run.
        profile: As for ``policy``.
        partition: As for ``policy``.

    Raises:
        ConfigError: If neither is given.
        ValueError: If a call is missing in the table.
    """
    calls = set(calls)
    place = _place(profile, partition)
    if unknown := unknown_calls(calls):
        names = ", ".join(sorted(f"{service}:{operation}" for service, operation in unknown))
        raise ValueError(f"not in the table of calls: {names}")
    grants = {grant for call in calls for grant in CALLS[call]}
    statements: list[dict[str, Any]] = []
    kinds = {(each.resource, bool(each.passed_to), each.in_cluster) for each in grants}
    for resource, is_passed, in_cluster in sorted(kinds):
        of_kind = [
            each
            for each in grants
            if (each.resource, bool(each.passed_to), each.in_cluster)
            == (resource, is_passed, in_cluster)
        ]
        actions = sorted({each.action for each in of_kind})
        arns, condition = _resources(resource, profile, place)
        if is_passed:
            # A service takes on only a role whose own policy names it, so that one statement for
            # all of them allows no more than one for each, and is shorter.
            services = sorted({service for each in of_kind for service in each.passed_to})
            condition = {"StringEquals": {"iam:PassedToService": services}}
            if PASSED_TO in services and profile is not None and profile.instance_role:
                arns = sorted([*arns, profile.instance_role])
        if in_cluster:
            (cluster,), _ = _resources("cluster", profile, place)
            condition = {"ArnLike": {"ecs:cluster": cluster}}
        statement: dict[str, Any] = {
            "Sid": ("Pass" if is_passed else "Run" if in_cluster else "") + _SIDS[resource],
            "Effect": "Allow",
            "Action": actions,
            "Resource": arns if len(arns) > 1 else arns[0],
        }
        if condition:
            statement["Condition"] = condition
        statements.append(statement)
    return {"Version": "2012-10-17", "Statement": statements}


_SIDS: dict[Resource, str] = {
    "any": "WhatHasNoResources",
    "bucket": "Bucket",
    "cluster": "Cluster",
    "definition": "JobDefinitions",
    "function": "Functions",
    "function_role": "FunctionRole",
    "image": "Images",
    "job": "Jobs",
    "log_group": "Logs",
    "object": "Objects",
    "own_task": "OwnTasks",
    "queue": "Queues",
    "read_role": "Roles",
    "role": "Roles",
    "secret": "Key",
    "stack": "Stack",
    "task": "Tasks",
    "task_definition": "TaskDefinitions",
    **SIDS,  # type: ignore[dict-item]
}


def _short(arns: Iterable[str]) -> list[str]:
    """Return ARNs in order, with one pattern for those that begin with another one of them."""
    found: list[str] = []
    for each in sorted(arns):
        base = found[-1].removesuffix("*") if found else each
        if found and each.startswith(f"{base}-"):
            found[-1] = f"{base}*"
        else:
            found.append(each)
    return found


def _resources(
    resource: Resource, profile: Profile | None, place: tuple[str, str, str]
) -> tuple[list[str], dict[str, dict[str, Any]]]:
    """Return ARNs, or patterns of ARNs, and a condition."""
    partition, region, account = place

    def arn(service: str, name: str) -> str:
        where = "" if service == "iam" else region
        return f"arn:{partition}:{service}:{where}:{account}:{name}"

    match resource:
        case "queue":
            queues = sorted(profile.queues.values()) if profile else ["cloudexec-*"]
            return _short(
                each if each.startswith("arn:") else arn("batch", f"job-queue/{each}")
                for each in queues
            ), {}
        case "definition":
            return [arn("batch", f"job-definition/{DEFINITION_PREFIX}*")], {}
        case "job":
            # Jobs are not told apart by tag, as children of an array may lack their parent's tags.
            return [arn("batch", "job/*")], {}
        case "log_group":
            group = profile.log_group or "/aws/batch/job" if profile else "/cloudexec/cloudexec-*"
            return [arn("logs", f"log-group:{group}"), arn("logs", f"log-group:{group}:*")], {}
        case "bucket" | "object":
            # A bucket of another account may match, but it lets in only users that it names.
            bucket = (profile.bucket if profile else "") or "cloudexec-*"
            keys = f"/{OBJECTS_PREFIX}*" if resource == "object" else ""
            return [f"arn:{partition}:s3:::{bucket}{keys}"], {}
        case "image":
            repository = profile.repository.partition("/")[2] if profile else "cloudexec-*"
            return [arn("ecr", f"repository/{repository or '*'}")], {}
        case "read_role" if profile and profile.stack:
            return [arn("iam", f"role/{profile.stack}-*")], {}
        case "role" | "read_role":
            roles = [profile.execution_role, profile.job_role, profile.run_role] if profile else []
            return sorted(filter(None, roles)) or [arn("iam", "role/cloudexec-*")], {}
        case "function":
            stack = (profile.stack if profile else "") or "cloudexec"
            return [arn("lambda", f"function:{stack}-*")], {}
        case "function_role":
            found = profile.function_role if profile else ""
            return [found or arn("iam", "role/cloudexec-*")], {}
        case "secret":
            if profile and profile.key_secret:
                return [profile.key_secret], {}
            # CloudFormation chooses the secret's name, so the policy uses its tag.
            return [arn("secretsmanager", "secret:*")], {
                "StringLike": {f"aws:ResourceTag/{TAG_STACK}": "cloudexec-*"}
            }
        case "stack":
            stack = profile.stack or "cloudexec-*" if profile else "cloudexec-*"
            return [arn("cloudformation", f"stack/{stack}/*")], {}
        case "cluster":
            cluster = (profile.cluster if profile else "") or "cloudexec-*"
            is_arn = cluster.startswith("arn:")
            return [cluster if is_arn else arn("ecs", f"cluster/{cluster}")], {}
        case "task":
            # AWS Batch names its own clusters after its compute environments.
            tasks = [arn("ecs", "task/AWSBatch-*")]
            if profile is None or profile.cluster:
                tasks += _resources("own_task", profile, place)[0]
            return tasks, {}
        case "own_task":
            # All users of AWS Batch share its clusters, and may not stop each other's tasks.
            cluster = (profile.cluster if profile else "") or "cloudexec-*"
            return [arn("ecs", f"task/{cluster.rpartition('/')[2]}/*")], {}
        case "task_definition":
            return [arn("ecs", f"task-definition/{DEFINITION_PREFIX}*:*")], {}
        case "any":
            return ["*"], {}
        case _:
            return place_of(resource, profile, place)


def _place(profile: Profile | None, partition: str) -> tuple[str, str, str]:
    """Return partition, region and account, or patterns for those that are not known."""
    if profile is None:
        if not partition:
            raise ConfigError(
                "without a profile, the partition is needed: 'aws', 'aws-cn' or 'aws-us-gov'"
            )
        return partition, "*", "*"
    for arn in (*profile.queues.values(), profile.execution_role, profile.key_secret):
        found = re.match(r"arn:([^:]+):[^:]+:[^:]*:(\d+):", arn)
        if found:
            return found[1], profile.region, found[2]
    return partition or partition_of(profile.region), profile.region, "*"
