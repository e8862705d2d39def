"""Refuses well-formed requests that Amazon ECS would refuse, by limits that moto does not know.

If no source is named, the limit is in the description of the parameter in the Amazon ECS API
Reference, which botocore's model contains, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cloudexec.testing._aws.limits import ClientError, is_fargate_size

__all__ = ["check_run_task", "check_task_definition", "size_of_task"]

OVERRIDES_MAX = 8192
COUNT_MAX = 10
VCPUS_MAX = 16.0
"""The largest size in the Amazon ECS API Reference; that of AWS Batch names 32."""

_TOKEN = re.compile(r"[!-~]{1,64}")
_STARTED_BY = re.compile(r"[A-Za-z0-9/_-]{1,128}")
_FAMILY = re.compile(r"[A-Za-z0-9_-]{1,255}")
_PROVIDERS = ("FARGATE", "FARGATE_SPOT")
_LOG_DRIVERS = ("awslogs", "splunk", "awsfirelens")


def _invalid(message: str) -> ClientError:
    return ClientError(message, "InvalidParameterException")


def check_tags(tags: Sequence[Mapping[str, str]]) -> None:
    """Refuse more tags than a resource may have, and names that are reserved for AWS."""
    if len(tags) > 50:
        raise _invalid("The number of tags cannot exceed 50.")
    for tag in tags:
        key, value = tag.get("key", ""), tag.get("value", "")
        if key.lower().startswith("aws:") or not 1 <= len(key) <= 128 or len(value) > 256:
            raise _invalid(f"The tag {key!r} is not allowed.")
        # "Tag naming limits and requirements", AWS General Reference.
        if re.search(r"[^\w +\-=.:/@]", key + value):
            raise _invalid(f"The tag {key!r} or its value {value!r} has a character not allowed.")


def check_task_definition(given: Mapping[str, Any]) -> None:
    """Refuse a task definition for Fargate that Amazon ECS would refuse."""
    if not _FAMILY.fullmatch(given["family"]):
        raise ClientError("Family contains invalid characters.")
    check_tags(given.get("tags", ()))
    if given.get("requiresCompatibilities") != ["FARGATE"]:
        raise ClientError("FakeAWS runs task definitions for Fargate only.")
    if given.get("networkMode") != "awsvpc":
        raise ClientError("Fargate only supports network mode 'awsvpc'.")
    if not given.get("executionRoleArn"):
        raise ClientError(
            "Fargate requires task definition to have execution role ARN to support ECR images."
        )
    size_of_task(given, {})
    containers = given["containerDefinitions"]
    if len(containers) != 1:
        raise ClientError("FakeAWS runs tasks of one container only.")
    for container in containers:
        if not container.get("name") or not container.get("image"):
            raise ClientError("Container.name and Container.image should not be null or empty.")
        if not 2 <= container.get("stopTimeout", 30) <= 120:
            raise ClientError("Container stopTimeout must be between 2 and 120 seconds.")
        if container.get("privileged"):
            raise ClientError("Fargate does not support privileged containers.")
        driver = (container.get("logConfiguration") or {}).get("logDriver", "awslogs")
        if driver not in _LOG_DRIVERS:
            raise ClientError(f"Fargate does not support the log driver {driver}.")
        _check_names(container.get("secrets", ()), container.get("environment", ()))
    if not 21 <= given.get("ephemeralStorage", {}).get("sizeInGiB", 21) <= 200:
        raise ClientError("Ephemeral storage must be between 21 and 200 GiB.")


def _check_names(
    secrets: Sequence[Mapping[str, str]], environment: Sequence[Mapping[str, str]]
) -> None:
    shared = {each["name"] for each in secrets} & {each["name"] for each in environment}
    if shared:
        raise ClientError(
            "The secret name must be unique and not shared with any new or existing environment "
            f"variables set on the container, such as '{min(shared)}'."
        )


def size_of_task(definition: Mapping[str, Any], overrides: Mapping[str, Any]) -> tuple[float, int]:
    """Return the vCPUs and MiB of a task, and refuse a size that Fargate does not have."""
    cpu = overrides.get("cpu") or definition.get("cpu")
    memory = overrides.get("memory") or definition.get("memory")
    try:
        vcpus, mib = int(str(cpu)) / 1024, int(str(memory))
    except (TypeError, ValueError):
        raise ClientError("Fargate requires that 'cpu' and 'memory' are defined.") from None
    if vcpus > VCPUS_MAX or not is_fargate_size(vcpus, mib):
        raise ClientError(
            f"No Fargate configuration exists for given values: {cpu} CPU, {mib} memory. See the "
            "Amazon ECS documentation for the valid values."
        )
    return vcpus, mib


def check_run_task(
    given: Mapping[str, Any], definition: Mapping[str, Any], providers: Sequence[str]
) -> str:
    """Refuse a RunTask that Amazon ECS would refuse; return the capacity provider.

    Args:
        given: The call's parameters.
        definition: The task definition.
        providers: The cluster's capacity providers.
    """
    if not 1 <= given.get("count", 1) <= COUNT_MAX:
        raise _invalid(f"Count must be between 1 and {COUNT_MAX}.")
    if "clientToken" in given and not _TOKEN.fullmatch(given["clientToken"]):
        raise _invalid("clientToken must be 1 to 64 characters from ! to ~.")
    if "startedBy" in given and not _STARTED_BY.fullmatch(given["startedBy"]):
        raise _invalid("startedBy must be up to 128 letters, digits, hyphens, / and _.")
    check_tags(given.get("tags", ()))
    overrides = given.get("overrides") or {}
    if len(json.dumps(overrides, separators=(",", ":"))) > OVERRIDES_MAX:
        raise _invalid(f"Container Overrides length must be at most {OVERRIDES_MAX}")
    size_of_task(definition, overrides)
    containers = {each["name"]: each for each in definition["containerDefinitions"]}
    for each in overrides.get("containerOverrides", ()):
        if each.get("name") not in containers:
            raise _invalid(
                f"Override for container named {each.get('name')} is not a container in the "
                "TaskDefinition."
            )
        container = containers[each["name"]]
        _check_names(container.get("secrets", ()), each.get("environment", ()))
    network = (given.get("networkConfiguration") or {}).get("awsvpcConfiguration")
    if not network or not network.get("subnets"):
        raise _invalid(
            "Network Configuration must be provided when networkMode 'awsvpc' is specified."
        )
    if len(network["subnets"]) > 16:
        raise _invalid("subnets can have at most 16 items.")
    if len(network.get("securityGroups", ())) > 5:
        raise _invalid("securityGroups can have at most 5 items.")
    _check_subnets(network["subnets"])
    return _provider(given, providers)


def _check_subnets(subnets: Sequence[str]) -> None:
    from moto.ec2.models import ec2_backends

    from cloudexec.testing._aws.backends import ACCOUNT

    known = {
        subnet.id
        for backend in ec2_backends[ACCOUNT].values()
        for zone in backend.subnets.values()
        for subnet in zone.values()
    }
    for each in subnets:
        if each not in known:
            raise _invalid(
                f"Error retrieving subnet information for [{each}]: The subnet ID '{each}' does "
                "not exist (ErrorCode: InvalidSubnetID.NotFound)"
            )


def _provider(given: Mapping[str, Any], providers: Sequence[str]) -> str:
    strategy = given.get("capacityProviderStrategy") or ()
    kind = given.get("launchType")
    if kind and strategy:
        raise _invalid(
            "Specifying both a launch type and capacity provider strategy is not supported. Remove "
            "one and try again."
        )
    if kind:
        if kind != "FARGATE":
            raise _invalid("FakeAWS runs tasks on Fargate only.")
        return str(kind)
    if not strategy:
        raise _invalid("No Container Instances were found in your cluster.")
    if len(strategy) > 1:
        raise _invalid("FakeAWS knows strategies with one capacity provider only.")
    name = str(strategy[0]["capacityProvider"])
    if name not in providers:
        raise _invalid(
            "The specified capacity provider strategy cannot contain a capacity provider that is "
            "not associated with the cluster. Associate the capacity provider with the cluster and "
            "try again."
        )
    if name not in _PROVIDERS:
        raise _invalid("FakeAWS runs tasks on Fargate only.")
    return name
