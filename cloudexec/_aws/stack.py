"""Looks up a set-up's CloudFormation stack, and reports its events until its operation ends."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.steps import Report, ResourceChanged
from cloudexec._errors import AwsError

__all__ = ["STANDING", "Stack", "event_ids", "find_stack", "follow", "stack_failure"]

STANDING = ("CREATE_COMPLETE", "UPDATE_COMPLETE", "UPDATE_ROLLBACK_COMPLETE", "IMPORT_COMPLETE")
"""States of a stack in which its resources can be used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A CloudFormation stack at one moment."""

    id: str
    """ARN, which finds the stack for some time even after its deletion."""
    name: str
    status: str
    reason: str
    outputs: Mapping[str, str] = field(default_factory=dict)
    parameters: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_moving(self) -> bool:
        """Whether an operation on the stack is under way."""
        return self.status.endswith("_IN_PROGRESS") and self.status != "REVIEW_IN_PROGRESS"


async def find_stack(clients: AwsClients, name: str) -> Stack | None:
    """Look up a stack.

    Args:
        clients: Calls to AWS.
        name: Name or ARN of the stack.

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
    """Report events until the operation ends; return the stack, and the failures in their order.

    Args:
        clients: Calls to AWS.
        stack: It is looked up by its id, which stays valid after its deletion.
        seen: Ids of events that were reported before.
        report: Called with each new event of a resource.
        interval: Seconds between two looks.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    failures: list[ResourceChanged] = []
    while True:
        # The state is read before the events, so that all events that led to it are reported.
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
    # AWS sends the newest events first, so the search ends at the first known one.
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
    """Return the ids of the stack's events so far, for ``follow``."""
    seen: set[str] = set()
    await _new_events(clients, stack, seen)
    return seen


def stack_failure(stack: Stack, failures: Sequence[ResourceChanged]) -> AwsError:
    """Return the error for the first failure, which causes the others."""
    if failures:
        first = failures[0]
        why = f"{first.resource} ({first.kind}): {first.reason or 'no reason given'}"
    else:
        why = stack.reason or "no reason given"
    return AwsError(
        f"the stack {stack.name} failed ({stack.status}): {why}; once that is repaired, run "
        f"`cloudexec up` again",
        code=stack.status,
        operation="cloudformation",
    )
