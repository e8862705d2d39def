"""Task definitions of Amazon ECS: registered once for each content, found again by family."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.names import DEFINITION_PREFIX, TAG_STACK
from cloudexec._errors import AwsError

__all__ = ["delete_task_definitions", "ensure_task_definition", "task_definitions"]

_DELETED_AT_ONCE = 10
"""Amazon ECS API Reference, "DeleteTaskDefinitions"."""


async def ensure_task_definition(clients: AwsClients, request: Mapping[str, Any]) -> str:
    """Return the ARN, with revision, of the definition with this content; register it if needed.

    Args:
        clients: Where.
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
        # That there is none, or no active one, is told in no other way.
        if exc.code != "ClientException":
            raise
    registered = await clients.call("ecs", "register_task_definition", **request)
    return str(registered["taskDefinition"]["taskDefinitionArn"])


async def task_definitions(
    clients: AwsClients, stack: str, roles: Sequence[str] = ()
) -> AsyncIterator[str]:
    """Yield ARNs of our active definitions of a stack: by their tag, or by the stack's roles.

    Args:
        clients: Where.
        stack: Its name.
        roles: Names of its roles.

    Raises:
        AwsError: If AWS refuses.
    """
    families = clients.pages(
        "ecs",
        "list_task_definition_families",
        "families",
        familyPrefix=DEFINITION_PREFIX,
        status="ACTIVE",
    )
    async for family in families:
        listed = clients.pages(
            "ecs", "list_task_definitions", "taskDefinitionArns", familyPrefix=family
        )
        async for arn in listed:
            answer = await clients.call(
                "ecs", "describe_task_definition", taskDefinition=arn, include=["TAGS"]
            )
            tags = {each["key"]: each["value"] for each in answer.get("tags", ())}
            found = answer["taskDefinition"]
            used = {
                found.get(key, "").rpartition("/")[2] for key in ("taskRoleArn", "executionRoleArn")
            }
            if tags.get(TAG_STACK) == stack or used & set(roles):
                yield str(arn)


async def delete_task_definitions(clients: AwsClients, arns: Sequence[str]) -> None:
    """Deregister definitions, and delete them: what is only deregistered stays listed for ever.

    Raises:
        AwsError: If AWS refuses.
    """
    for arn in arns:
        await clients.call("ecs", "deregister_task_definition", taskDefinition=arn)
    for at in range(0, len(arns), _DELETED_AT_ONCE):
        some = list(arns[at : at + _DELETED_AT_ONCE])
        await clients.call("ecs", "delete_task_definitions", taskDefinitions=some)
