"""What a stack has for EC2 instances without AWS Batch: roles, and nothing that costs.

Workers have one, and the machines of runs another one.
"""

from __future__ import annotations

from typing import Any

from cloudexec._aws.names import TAG_STACK

__all__ = ["OUTPUTS", "PARAMETER", "PARAMETERS", "resources", "run_statements", "run_trust"]

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
    "RunProfile": (
        PARAMETER,
        "Profile of instances that run programs",
        {"Fn::GetAtt": ["RunProfile", "Arn"]},
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
        "RunProfile": {
            "Condition": PARAMETER,
            "Type": "AWS::IAM::InstanceProfile",
            "DependsOn": ["SecurityGroupIngress"],
            "Properties": {"Roles": [{"Ref": "RunRole"}]},
        },
    }


def run_trust(trust_tasks: Json, trust_instances: Json) -> Json:
    """Return who takes the role of runs on: Amazon ECS, and instances where there are any.

    Args:
        trust_tasks: The document for Amazon ECS alone.
        trust_instances: The one for EC2 alone.
    """
    (tasks,), (instances,) = trust_tasks["Statement"], trust_instances["Statement"]
    either = {"Fn::If": [PARAMETER, instances, {"Ref": "AWS::NoValue"}]}
    return {**trust_tasks, "Statement": [tasks, either]}


def run_statements() -> list[Json]:
    """Return what the role of runs may do with instances, as statements of a policy.

    It starts workers, and the next attempt of a run whose machine is taken back. It is also what
    the script of such a machine has: that pulls the image and writes the log.

    References:
        Service Authorization Reference, "Actions, resources, and condition keys for Amazon EC2";
        Amazon EC2 User Guide, "EC2 Fleet prerequisites".
    """

    def allow(resource: Any, *actions: str, **conditions: Json) -> Json:
        found: Json = {"Effect": "Allow", "Action": list(actions), "Resource": resource}
        return {**found, "Condition": conditions} if conditions else found

    def arns(*kinds: str) -> list[Json]:
        # Of any account, as a subnet may be shared, and images of AWS are of none.
        place = "arn:${AWS::Partition}:ec2:${AWS::Region}:*:"
        return [{"Fn::Sub": f"{place}{kind}/*"} for kind in kinds]

    stack = {"Ref": "AWS::StackName"}
    system = {"Fn::Sub": "arn:${AWS::Partition}:ssm:${AWS::Region}::parameter/aws/service/*"}
    # The role's name is not known here: a policy that names the role that it is part of would be a
    # circle.
    own = {
        "Fn::Sub": "arn:${AWS::Partition}:iam::${AWS::AccountId}:role/${AWS::StackName}-RunRole-*"
    }
    parts = ("fleet", "image", "launch-template", "network-interface", "security-group", "subnet")
    making = ["CreateFleet", "CreateLaunchTemplate", "RunInstances"]
    return [
        allow(arns(*parts), "ec2:CreateFleet", "ec2:RunInstances"),
        allow(arns("launch-template"), "ec2:CreateLaunchTemplate"),
        # None without the tag, by which they can be ended.
        allow(
            arns("instance", "volume"),
            "ec2:CreateFleet",
            "ec2:RunInstances",
            StringEquals={f"aws:RequestTag/{TAG_STACK}": stack},
        ),
        allow(arns("*"), "ec2:CreateTags", StringEquals={"ec2:CreateAction": making}),
        allow(
            arns("instance"),
            "ec2:TerminateInstances",
            StringEquals={f"aws:ResourceTag/{TAG_STACK}": stack},
        ),
        # There are no resources of these actions to name.
        allow(
            "*",
            "ec2:DescribeInstanceTypes",
            "ec2:DescribeInstances",
            "ec2:DescribeSpotPriceHistory",
            "ecr:GetAuthorizationToken",
            "pricing:GetProducts",
        ),
        allow(system, "ssm:GetParameters"),
        allow(
            [{"Fn::GetAtt": ["WorkerRole", "Arn"]}, own],
            "iam:PassRole",
            StringEquals={"iam:PassedToService": ["ec2.amazonaws.com"]},
        ),
        allow(
            {"Fn::GetAtt": ["Repository", "Arn"]},
            "ecr:BatchCheckLayerAvailability",
            "ecr:BatchGetImage",
            "ecr:GetDownloadUrlForLayer",
        ),
        allow({"Fn::GetAtt": ["LogGroup", "Arn"]}, "logs:CreateLogStream", "logs:PutLogEvents"),
    ]
