"""Builds requests to Amazon ECS as data, and checks that AWS will accept them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloudexec._aws import limits
from cloudexec._aws.limits import WorkerSize
from cloudexec._aws.names import TAG_STACK, definition_name
from cloudexec._aws.requests import DefinitionSpec, check_environment, log_configuration
from cloudexec._errors import ConfigError

__all__ = [
    "CONTAINER",
    "DESCRIBE_TASKS",
    "LOG_PREFIX",
    "STOP_TIMEOUT",
    "Placement",
    "run_task_request",
    "task_definition_request",
]

CONTAINER = "worker"
"""Name of a task's container."""
LOG_PREFIX = "task"
"""First part of a log stream's name. The names of the container and the task follow."""
DESCRIBE_TASKS = 100
"""Most tasks in one DescribeTasks call. Amazon ECS API Reference."""
STOP_TIMEOUT = 120
"""Seconds from SIGTERM to SIGKILL, the largest allowed value. With less, workers on Fargate Spot
would not have the two minutes of their notice. Amazon ECS Developer Guide, "Amazon ECS clusters for
Fargate"."""
_SUBNETS_MOST = 16
_GROUPS_MOST = 5
"""Most security groups of a task. Amazon ECS API Reference, "AwsVpcConfiguration"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The cluster and the network of tasks."""

    cluster: str
    """ARN or name."""
    subnets: Sequence[str]
    security_groups: Sequence[str]
    assign_public_ip: bool

    def __post_init__(self) -> None:
        if not 1 <= len(self.subnets) <= _SUBNETS_MOST:
            raise ConfigError(
                f"a task on Fargate needs 1 to {_SUBNETS_MOST} subnets, not {len(self.subnets)}: "
                f"give subnets=, or a profile of `cloudexec up --with fargate`"
            )
        if len(self.security_groups) > _GROUPS_MOST:
            raise ConfigError(
                f"a task on Fargate has {_GROUPS_MOST} security groups at most, not "
                f"{len(self.security_groups)}: give fewer in security_groups="
            )


def task_definition_request(spec: DefinitionSpec) -> dict[str, Any]:
    """Build the RegisterTaskDefinition request. The family's name is a hash of its content.

    Raises:
        ConfigError: If AWS would refuse it.
    """
    if not spec.image:
        raise ConfigError("a task definition needs an image")
    if not spec.execution_role:
        raise ConfigError(
            "Fargate needs execution_role=, the ARN of a role that may pull the image and write "
            "logs; `cloudexec up` makes one"
        )
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": spec.image,
        "essential": True,
        "stopTimeout": STOP_TIMEOUT,
        # An init process in the container reaps orphaned processes, and passes signals on. If
        # the worker were the first process, a signal that it does not handle would not end it.
        "linuxParameters": {"initProcessEnabled": True},
    }
    if spec.key_secret:
        container["secrets"] = [{"name": "CLOUDEXEC_KEY", "valueFrom": spec.key_secret}]
    if spec.log_group:
        container["logConfiguration"] = log_configuration(spec, LOG_PREFIX)
    request: dict[str, Any] = {
        "requiresCompatibilities": ["FARGATE"],
        "networkMode": "awsvpc",
        **_size(spec.size),
        "executionRoleArn": spec.execution_role,
        "runtimePlatform": {
            "operatingSystemFamily": "LINUX",
            "cpuArchitecture": spec.arch.upper(),
        },
        "containerDefinitions": [container],
    }
    if spec.job_role:
        request["taskRoleArn"] = spec.job_role
    if spec.ephemeral_gib is not None:
        request["ephemeralStorage"] = {"sizeInGiB": spec.ephemeral_gib}
    if spec.stack:
        request["tags"] = [{"key": TAG_STACK, "value": spec.stack}]
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    return {"family": definition_name(digest), **request}


def _size(size: WorkerSize) -> dict[str, str]:
    return {"cpu": f"{size.vcpus * 1024:g}", "memory": str(size.memory_mib)}


def run_task_request(
    *,
    name: str,
    attempt: int,
    definition: str,
    placement: Placement,
    size: WorkerSize,
    spot: bool,
    environment: Mapping[str, str],
    tags: Mapping[str, str],
) -> dict[str, Any]:
    """Build the RunTask request for one worker.

    Args:
        name: Name of the worker, unique in the account: letters, digits and hyphens, 128 at most.
        attempt: Number of the request for this worker. If the same request is sent again with the
            same number, Amazon ECS starts no second task.
        definition: ARN, with its revision.
        placement: Where the task runs.
        size: Size of the worker.
        spot: Whether the worker runs on Fargate Spot.
        environment: Variables of the worker.
        tags: Tags of the task.

    Raises:
        ConfigError: If AWS would refuse it.

    References:
        Amazon ECS API Reference, "RunTask".
    """
    check_environment(environment)
    if len(tags) > limits.TAGS:
        raise ConfigError(f"a task has up to {limits.TAGS} tags, not {len(tags)}")
    overrides = {
        **_size(size),
        "containerOverrides": [
            {
                "name": CONTAINER,
                "environment": [
                    {"name": key, "value": value} for key, value in environment.items()
                ],
            }
        ],
    }
    characters = len(json.dumps(overrides))
    if characters > limits.OVERRIDE_CHARACTERS:
        largest = max(environment, key=lambda key: len(environment[key]))
        raise ConfigError(
            f"the environment of a worker has {characters} characters as JSON; Amazon ECS takes "
            f"{limits.OVERRIDE_CHARACTERS}. The longest value is {largest!r}: send it as an "
            f"argument or through initializer= instead"
        )
    request: dict[str, Any] = {
        "cluster": placement.cluster,
        "taskDefinition": definition,
        "count": 1,
        "clientToken": hashlib.sha256(f"{name} {attempt}".encode()).hexdigest()[:32],
        "startedBy": name,
        "networkConfiguration": {
            "awsvpcConfiguration": {
                "subnets": list(placement.subnets),
                "securityGroups": list(placement.security_groups),
                "assignPublicIp": "ENABLED" if placement.assign_public_ip else "DISABLED",
            }
        },
        "overrides": overrides,
        "tags": [{"key": key, "value": value} for key, value in tags.items()],
    }
    if spot:
        request["capacityProviderStrategy"] = [{"capacityProvider": "FARGATE_SPOT", "weight": 1}]
    else:
        # Unlike FARGATE_SPOT, this does not require the capacity provider in the cluster.
        request["launchType"] = "FARGATE"
    return request
