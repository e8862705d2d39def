"""What people need who run workers on EC2 instances: rows for the policy's table."""

from __future__ import annotations

from collections.abc import Mapping

from cloudexec._aws.names import TAG_STACK
from cloudexec._aws.profile import Profile

__all__ = ["OF_INSTANCES", "OPERATIONS", "PASSED_TO", "SIDS", "place_of"]

PASSED_TO = "ec2.amazonaws.com"
OPERATIONS: Mapping[str, tuple[tuple[str, str], ...]] = {
    "CreateFleet": (
        ("ec2:CreateFleet", "instance_parts"),
        # Such a fleet runs instances on behalf of its caller.
        ("ec2:RunInstances", "instance_parts"),
        ("ec2:CreateFleet", "new_instance"),
        ("ec2:RunInstances", "new_instance"),
        ("ec2:CreateTags", "instance_tags"),
        ("iam:PassRole", "role"),
        ("ssm:GetParameters", "system_image"),
    ),
    "CreateLaunchTemplate": (
        ("ec2:CreateLaunchTemplate", "instance_parts"),
        ("ec2:CreateTags", "instance_tags"),
    ),
    "DescribeInstances": (("ec2:DescribeInstances", "any"),),
    "DescribeInstanceTypes": (("ec2:DescribeInstanceTypes", "any"),),
    "DescribeSpotPriceHistory": (("ec2:DescribeSpotPriceHistory", "any"),),
    "TerminateInstances": (("ec2:TerminateInstances", "own_instance"),),
}
"""By operation of Amazon EC2: actions, and what they are allowed on. Service Authorization
Reference, "Actions, resources, and condition keys for Amazon EC2"; Amazon EC2 User Guide, "EC2
Fleet prerequisites"."""
OF_INSTANCES = frozenset(("ec2", operation) for operation in OPERATIONS) - {
    ("ec2", "DescribeInstances")
}
"""Calls that are made only where there is a role for instances."""
SIDS = {
    "instance_parts": "InstanceParts",
    "instance_tags": "InstanceTags",
    "new_instance": "NewInstances",
    "own_instance": "OwnInstances",
    "system_image": "SystemImages",
}


def place_of(
    resource: str, profile: Profile | None, place: tuple[str, str, str]
) -> tuple[list[str], dict[str, dict[str, object]]]:
    """Return ARNs of a resource, or patterns of such, and a condition.

    Args:
        resource: A key of ``SIDS``.
        profile: Names the stack; ``None``: any of cloudexec's.
        place: Partition, region and account.
    """
    partition, region, _ = place
    stack = (profile.stack if profile is not None else "") or "cloudexec-*"
    test = "StringLike" if "*" in stack else "StringEquals"

    def arn(kind: str) -> str:
        # Wherever they are, instances need the tag and the role, and a policy has 6,144 characters
        # at most.
        return f"arn:{partition}:ec2:*:*:{kind}/*"

    match resource:
        case "instance_parts":
            kinds = ("fleet", "launch-template", "network-interface", "security-group", "subnet")
            return [*map(arn, kinds), arn("image")], {}
        case "new_instance":
            # None without the tag, by which they can be ended.
            return [arn("instance"), arn("volume")], {test: {f"aws:RequestTag/{TAG_STACK}": stack}}
        case "instance_tags":
            # Only while it is being made.
            made_by = ["CreateFleet", "CreateLaunchTemplate", "RunInstances"]
            return [arn("*")], {"StringEquals": {"ec2:CreateAction": made_by}}
        case "own_instance":
            return [arn("instance")], {test: {f"aws:ResourceTag/{TAG_STACK}": stack}}
        case "system_image":
            return [f"arn:{partition}:ssm:{region}::parameter/aws/service/*"], {}
        case _:
            raise ValueError(resource)
