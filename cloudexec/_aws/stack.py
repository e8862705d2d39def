"""A set-up's CloudFormation stack: how it stands, and what happens to it until it rests."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.steps import Report, ResourceChanged
from cloudexec._errors import AwsError

__all__ = ["STANDING", "Stack", "event_ids", "find_stack", "follow", "stack_failure"]

STANDING = ("CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE", "IMPORT_COMPLETE")
"""States of a stack whose resources can be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A CloudFormation stack as it is now."""

    id: str
    """Its ARN, by which it can be found for a while even when it is deleted."""
    name: str
    status: str
    reason: str
    outputs: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_moving(self) -> bool:
        """Whether an operation goes on."""
        return self.status.endswith("_IN_PROGRESS") and self.status != "REVIEW_IN_PROGRESS"


async def find_stack(clients: AwsClients, name: str) -> Stack | None:
    """Look a stack up.

    Args:
        clients: Where to look.
        name: Its name or ARN.

    Returns:
        The stack, or ``None`` if there is none.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    try:
        answer = await clients.call("cloudformation", "describe_stacks", StackName=name)
    except AwsError as exc:
        if exc.code == "ValidationError" and "does not exist" in exc.message:
            return None
        raise
    found = answer["Stacks"][0]
    return Stack(
        id=found["StackId"],
        name=found["StackName"],
        status=found["StackStatus"],
        reason=found.get("StackStatusReason", ""),
        outputs={each["OutputKey"]: each["OutputValue"] for each in found.get("Outputs", ())},
        parameters={
            each["ParameterKey"]: each.get("ParameterValue", "")
            for each in found.get("Parameters", ())
        },
        tags={each["Key"]: each["Value"] for each in found.get("Tags", ())},
    )


async def follow(
    clients: AwsClients, stack: Stack, seen: set[str], report: Report, interval: float
) -> tuple[Stack | None, list[ResourceChanged]]:
    """Report what happens until the stack rests; return it, and what failed, first things first.

    Args:
        clients: Where it is.
        stack: Is looked up by its id, which stays when it is deleted.
        seen: Ids of events that are known.
        report: Told of each new event of a resource.
        interval: Seconds between two looks.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    failures: list[ResourceChanged] = []
    while True:
        # The state before the events: all of what led to it is then among them.
        now = await find_stack(clients, stack.id)
        if now is not None:
            for event in await _new_events(clients, now, seen):
                if event.resource == stack.name:
                    continue
                report(event)
                if event.status.endswith("_FAILED") and "cancelled" not in event.reason.lower():
                    failures.append(event)
        if now is None or not now.is_moving:
            return now, failures
        await asyncio.sleep(interval)


async def _new_events(clients: AwsClients, stack: Stack, seen: set[str]) -> list[ResourceChanged]:
    events: list[ResourceChanged] = []
    # The newest come first, so the known ones end the search.
    async for each in clients.pages(
        "cloudformation", "describe_stack_events", "StackEvents", StackName=stack.id
    ):
        if each["EventId"] in seen:
            break
        seen.add(each["EventId"])
        events.append(
            ResourceChanged(
                resource=each.get("LogicalResourceId", ""),
                kind=each.get("ResourceType", ""),
                status=each.get("ResourceStatus", ""),
                reason=each.get("ResourceStatusReason", ""),
            )
        )
    return events[::-1]


async def event_ids(clients: AwsClients, stack: Stack) -> set[str]:
    """Return the ids of what has happened to the stack so far, for ``follow``."""
    seen: set[str] = set()
    await _new_events(clients, stack, seen)
    return seen


def stack_failure(stack: Stack, failures: Sequence[ResourceChanged]) -> AwsError:
    """Return the error that names the first failure, from which the others follow."""
    if failures:
        first = failures[0]
        why = f"{first.resource} ({first.kind}): {first.reason or 'no reason given'}"
    else:
        why = stack.reason or "no reason given"
    return AwsError(
        f"the stack {stack.name} failed ({stack.status}): {why}; once that is mended, run "
        f"`cloudexec up` again",
        code=stack.status,
        operation="cloudformation",
    )
