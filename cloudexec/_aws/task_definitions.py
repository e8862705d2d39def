"""Registers each content once as a task definition of Amazon ECS, and finds it by its family."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, NamedTuple

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.names import DEFINITION_PREFIX, TAG_STACK
from cloudexec._errors import AwsError

__all__ = [
    "TaskDefinition",
    "delete_task_definitions",
    "ensure_task_definition",
    "task_definitions",
]

_DELETED_AT_ONCE = 10
"""Most definitions in one call. Amazon ECS API Reference, "DeleteTaskDefinitions"."""


class TaskDefinition(NamedTuple):
    """One revision of a task definition."""

    arn: str
    is_active: bool
    """Whether it is registered. A deregistered one stays listed until it is deleted."""


async def ensure_task_definition(clients: AwsClients, request: Mapping[str, Any]) -> str:
    """Return the ARN, with revision, of the definition with this content. Register it if needed.

    Args:
        clients: Calls to AWS.
        request: From ``task_definition_request``.

    Raises:
        AwsError: If AWS refuses.
    """
    try:
        found = await clients.call(
            "ecs", "describe_task_definition", taskDefinition=request["family"]
        )
        if found["taskDefinition"].get("status", "ACTIVE") == "ACTIVE":
            return str(found["taskDefinition"]["taskDefinitionArn"])
    except AwsError as exc:
        # Amazon ECS has no more precise code for a family without an active definition.
        if exc.code != "ClientException":
            raise
    registered = await clients.call("ecs", "register_task_definition", **request)
    return str(registered["taskDefinition"]["taskDefinitionArn"])


async def task_definitions(
    clients: AwsClients, stack: str, roles: Sequence[str] = ()
) -> AsyncIterator[TaskDefinition]:
    """Yield cloudexec's definitions of a stack, found by their tag or by the stack's roles.

    Args:
        clients: Calls to AWS.
        stack: Name of the stack.
        roles: Names of the stack's roles.

    Raises:
        AwsError: If AWS refuses.
    """
    families = clients.pages(
        "ecs",
        "list_task_definition_families",
        "families",
        familyPrefix=DEFINITION_PREFIX,
        status="ALL",
    )
    async for family in families:
        for status in ("ACTIVE", "INACTIVE"):
            listed = clients.pages(
                "ecs",
                "list_task_definitions",
                "taskDefinitionArns",
                familyPrefix=family,
                status=status,
            )
            async for arn in listed:
                answer = await clients.call(
                    "ecs", "describe_task_definition", taskDefinition=arn, include=["TAGS"]
                )
                tags = {each["key"]: each["value"] for each in answer.get("tags", ())}
                found = answer["taskDefinition"]
                used = {
                    found.get(key, "").rpartition("/")[2]
                    for key in ("taskRoleArn", "executionRoleArn")
                }
                if tags.get(TAG_STACK) == stack or used & set(roles):
                    yield TaskDefinition(str(arn), is_active=status == "ACTIVE")


async def delete_task_definitions(
    clients: AwsClients, definitions: Sequence[TaskDefinition]
) -> dict[str, str]:
    """Deregister and delete definitions. If only deregistered, they stay listed for ever.

    Returns:
        By ARN: why the definition could not be deleted.

    Raises:
        AwsError: If AWS refuses.
    """
    failures: dict[str, str] = {}
    for each in definitions:
        if each.is_active:
            await clients.call("ecs", "deregister_task_definition", taskDefinition=each.arn)
    for at in range(0, len(definitions), _DELETED_AT_ONCE):
        some = [each.arn for each in definitions[at : at + _DELETED_AT_ONCE]]
        answer = await clients.call("ecs", "delete_task_definitions", taskDefinitions=some)
        for failed in answer.get("failures", ()):
            said = [failed[key] for key in ("reason", "detail") if failed.get(key)]
            failures[str(failed.get("arn", ""))] = ": ".join(said) or "AWS gives no reason"
    return failures
