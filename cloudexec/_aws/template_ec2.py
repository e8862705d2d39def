"""What a stack has for workers on EC2 instances of their own: a role, and nothing that costs."""

from __future__ import annotations

from typing import Any

__all__ = ["OUTPUTS", "PARAMETER", "PARAMETERS", "resources"]

Json = dict[str, Any]

PARAMETER = "Instances"
"""Name of the parameter, and of the condition. ``Ec2`` is about queues of AWS Batch."""
PARAMETERS: Json = {
    PARAMETER: {
        "Type": "String",
        "AllowedValues": ["true", "false"],
        "Default": "false",
        "Description": "Whether there is a role for EC2 instances without AWS Batch too.",
    }
}
OUTPUTS: dict[str, tuple[str, str, Json]] = {
    "WorkerProfile": (
        PARAMETER,
        "Profile of instances without AWS Batch",
        {"Fn::GetAtt": ["WorkerProfile", "Arn"]},
    ),
    "WorkerRole": (
        PARAMETER,
        "Role of instances without AWS Batch",
        {"Fn::GetAtt": ["WorkerRole", "Arn"]},
    ),
}
"""By name: condition, description and value."""


def resources(
    *, boundary: Json, trust: Json, start_policy: Json, tags: list[Json]
) -> dict[str, Json]:
    """Return the resources.

    Args:
        boundary: Property of roles.
        trust: Who takes the role on.
        start_policy: What starting a worker needs, as the execution role has it: to pull the image,
            read the key and write the log. Tasks cannot reach the credentials of this role.
        tags: Of roles.
    """
    return {
        "WorkerRole": {
            "Condition": PARAMETER,
            "Type": "AWS::IAM::Role",
            "Properties": {
                **boundary,
                "Description": "Starts workers on instances: pulls the image, reads the key, logs",
                "AssumeRolePolicyDocument": trust,
                "Policies": [start_policy],
                "Tags": tags,
            },
        },
        "WorkerProfile": {
            "Condition": PARAMETER,
            "Type": "AWS::IAM::InstanceProfile",
            # An instance that still runs is in the group, whose rule goes after this.
            "DependsOn": ["SecurityGroupIngress"],
            "Properties": {"Roles": [{"Ref": "WorkerRole"}]},
        },
    }
