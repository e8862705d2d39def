"""Machines of Amazon EC2: started with a script, found by their tags, ended.

What runs on them, and who asks for them, is of no matter here.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import botocore.exceptions

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.instance_requests import Fleet, fleet_request
from cloudexec._errors import AwsError, ConfigError

__all__ = [
    "ALIVE",
    "FleetAnswer",
    "end_instances",
    "ensure_template",
    "find_instances",
    "start_instances",
    "tags_of",
]

ALIVE = ("pending", "running", "stopping", "stopped")
"""States of an instance that may still cost something, or could be started again."""
_ENDED_AT_ONCE = 100
_PAGE = 1000
"""Amazon EC2 API Reference, "DescribeInstances"."""
_EXISTS = "InvalidLaunchTemplateName.AlreadyExistsException"
_UNKNOWN = re.compile(r"i-[0-9a-f]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetAnswer:
    """What a request for instances has led to."""

    instances: tuple[str, ...]
    """Ids of the instances that were started."""
    errors: tuple[tuple[str, str], ...]
    """Codes and words of what prevented others."""


async def ensure_template(clients: AwsClients, request: Mapping[str, Any]) -> str:
    """Return the name of the launch template with this content; make it if there is none.

    Args:
        clients: Where.
        request: From ``template_request``.

    Raises:
        AwsError: If AWS refuses.
    """
    name = str(request["LaunchTemplateName"])
    try:
        await clients.call("ec2", "create_launch_template", **request)
    except AwsError as exc:
        if exc.code != _EXISTS:
            raise
    return name


async def start_instances(clients: AwsClients, fleet: Fleet) -> FleetAnswer:
    """Ask for instances, as many as there is room for. The same request starts nothing twice.

    Raises:
        AwsError: If AWS refuses; ``uncertain``: some may have been started.
        ConfigError: If AWS would refuse it, or this AWS SDK cannot ask for it.
    """
    client = await clients.client("ec2")
    shape = client.meta.service_model.shape_for("FleetLaunchTemplateSpecificationRequest")
    if "LaunchTemplateSpecificationUserData" not in shape.members:
        raise ConfigError(
            "this AWS SDK is too old to start instances with a script of their own: "
            "`pip install -U aiobotocore botocore`"
        )
    answer = await clients.call("ec2", "create_fleet", **fleet_request(fleet))
    return FleetAnswer(
        instances=tuple(
            str(instance)
            for each in answer.get("Instances", ())
            for instance in each.get("InstanceIds", ())
        ),
        errors=tuple(
            dict.fromkeys(
                (str(each.get("ErrorCode", "")), str(each.get("ErrorMessage", "")))
                for each in answer.get("Errors", ())
            )
        ),
    )


async def find_instances(
    clients: AwsClients, tags: Mapping[str, Sequence[str]], *, states: Sequence[str] = ()
) -> AsyncIterator[Mapping[str, Any]]:
    """Yield the instances that have these tags. Those that have ended are listed for an hour.

    Args:
        clients: Where.
        tags: By tag: the values that it may have.
        states: Only those in one of these states; empty: in any.

    Raises:
        AwsError: If AWS refuses.
    """
    filters = [{"Name": f"tag:{key}", "Values": list(values)} for key, values in tags.items()]
    if states:
        filters.append({"Name": "instance-state-name", "Values": list(states)})
    pages = clients.pages(
        "ec2", "describe_instances", "Reservations", Filters=filters, MaxResults=_PAGE
    )
    async for reservation in pages:
        for instance in reservation["Instances"]:
            yield instance


async def end_instances(
    clients: AwsClients, instances: Iterable[str], *, at_once: bool = True
) -> None:
    """Terminate instances. Those that are gone already are passed over.

    Args:
        clients: Where.
        instances: Their ids.
        at_once: Whether the operating system gets no time to shut down, where the SDK knows that.

    Raises:
        AwsError: If AWS refuses.
    """
    ids = sorted(set(instances))
    await asyncio.gather(
        *(
            _end(clients, ids[at : at + _ENDED_AT_ONCE], at_once)
            for at in range(0, len(ids), _ENDED_AT_ONCE)
        )
    )


async def _end(clients: AwsClients, ids: list[str], at_once: bool) -> None:
    client = await clients.client("ec2")
    shape = client.meta.service_model.operation_model("TerminateInstances").input_shape
    options: dict[str, Any] = (
        {"SkipOsShutdown": True} if at_once and "SkipOsShutdown" in shape.members else {}
    )
    while ids:
        try:
            await clients.call("ec2", "terminate_instances", InstanceIds=ids, **options)
        except AwsError as exc:
            # One that is not known makes the call fail for all of them.
            unknown = set(_UNKNOWN.findall(_message(exc))) & set(ids)
            if exc.code != "InvalidInstanceID.NotFound" or not unknown:
                raise
            ids = [each for each in ids if each not in unknown]
        else:
            return


def _message(exc: AwsError) -> str:
    cause = exc.__cause__
    if isinstance(cause, botocore.exceptions.ClientError):
        return str(cause.response.get("Error", {}).get("Message", ""))
    return exc.message


def tags_of(instance: Mapping[str, Any]) -> dict[str, str]:
    """Return the tags of an instance."""
    return {str(each["Key"]): str(each.get("Value", "")) for each in instance.get("Tags", ())}
