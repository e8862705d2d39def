"""What a template says of tasks of Amazon ECS that are started without AWS Batch, as data."""

from __future__ import annotations

from typing import Any

from cloudexec._aws.names import DEFINITION_PREFIX, TAG_STACK

__all__ = ["task_statements"]

Json = dict[str, Any]


def task_statements() -> list[Json]:
    """Return what the role of runs may do in the stack's cluster, as statements of a policy.

    A run on Fargate that is taken back starts its next attempt itself, and for that it must hand on
    its own role. The role's name is not known here: a policy that names the role that it is part of
    would be a circle.

    References:
        Service Authorization Reference, "Actions, resources, and condition keys for Amazon ECS".
    """

    def arn(service: str, name: str, region: str = "${AWS::Region}") -> Json:
        return {"Fn::Sub": f"arn:${{AWS::Partition}}:{service}:{region}:${{AWS::AccountId}}:{name}"}

    def allow(resource: Any, *actions: str, **conditions: Json) -> Json:
        found: Json = {"Effect": "Allow", "Action": list(actions), "Resource": resource}
        return {**found, "Condition": conditions} if conditions else found

    of_stack = {f"aws:ResourceTag/{TAG_STACK}": {"Ref": "AWS::StackName"}}
    cluster = arn("ecs", "cluster/${AWS::StackName}")
    definitions = arn("ecs", f"task-definition/{DEFINITION_PREFIX}*:*")
    tasks = arn("ecs", "task/${AWS::StackName}/*")
    return [
        # A definition of another stack has roles of that stack.
        allow(
            definitions,
            "ecs:RunTask",
            ArnEquals={"ecs:cluster": cluster},
            StringEquals=of_stack,
        ),
        allow(tasks, "ecs:DescribeTasks", "ecs:StopTask"),
        allow([tasks, definitions], "ecs:TagResource", StringEqualsIfExists=of_stack),
        # There are no resources of these actions to name.
        allow("*", "ecs:DescribeTaskDefinition", "ecs:ListTasks", "ecs:RegisterTaskDefinition"),
        allow(
            arn("iam", "role/${AWS::StackName}-RunRole-*", region=""),
            "iam:PassRole",
            StringEquals={"iam:PassedToService": ["ecs-tasks.amazonaws.com"]},
        ),
    ]
