"""Requests to AWS Batch as data: what goes into them, and whether AWS will take them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cloudexec._aws import limits
from cloudexec._aws.limits import WorkerSize
from cloudexec._aws.names import TAG_STACK, definition_name
from cloudexec._errors import ConfigError

__all__ = [
    "FAILED_STARTS",
    "RECLAIM_REASONS",
    "DefinitionSpec",
    "check_environment",
    "check_tags",
    "definition_request",
    "log_configuration",
    "submit_request",
    "tag_value",
]

RECLAIM_REASONS = ("Your Spot Task was interrupted", "Host EC2")
"""How the reason begins when AWS takes a machine back. AWS Batch User Guide, "Best practices";
Amazon ECS Developer Guide, "Fargate capacity providers"."""
FAILED_STARTS = ("CannotPullContainer", "ResourceInitializationError", "Task failed to start")
"""How the reason begins when a container could not be started. On Fargate, the first two are
reported to be the status reason; on EC2, the container's reason beside the third."""
_ATTEMPTS = 3
_JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OVERRIDE_MARGIN = 1024
"""Characters that AWS Batch's own variables may take of those that Amazon ECS allows."""
_TAG_UNSAFE = re.compile(r"[^\w +\-=.:/@]")
_TAG_KEY_LARGEST = 128
_TAG_VALUE_LARGEST = 256
_OWN_TAGS = 6
"""Tags that a job may have from us."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DefinitionSpec:
    """What makes one job definition different from another.

    Size and settings of a worker are given when it is submitted, so that one definition serves all
    executors with the same image and roles.
    """

    image: str
    """Best pinned by digest: ``repository@sha256:...``."""
    compute: str = "fargate"
    """``"fargate"`` or ``"ec2"``."""
    arch: str = "x86_64"
    """``"x86_64"`` or ``"arm64"``."""
    execution_role: str = ""
    job_role: str = ""
    key_secret: str = ""
    """ARN of the secret that holds the stack's key."""
    log_group: str = ""
    region: str = ""
    """Of the log group."""
    assign_public_ip: bool = True
    ephemeral_gib: int | None = None
    """Disk of a Fargate worker; ``None``: the 20 GiB that all have."""
    stack: str = ""
    user: str = ""
    """Who runs it in the container; empty: whoever the image says."""
    size: WorkerSize = field(default_factory=lambda: WorkerSize(memory_mib=2048, vcpus=1))
    """What a worker gets unless the submission says otherwise."""


def definition_request(spec: DefinitionSpec) -> dict[str, Any]:
    """Build the RegisterJobDefinition request; its name is a hash of its content.

    Raises:
        ConfigError: If AWS would refuse it.
    """
    if not spec.image or len(spec.image) > 255:
        raise ConfigError(f"an image is named by 1 to 255 characters, not {spec.image!r}")
    container: dict[str, Any] = {
        "image": spec.image,
        "resourceRequirements": _requirements(spec.size),
        # One process in the container takes in what others leave behind, and passes signals on.
        "linuxParameters": {"initProcessEnabled": True},
    }
    if spec.user:
        container["user"] = spec.user
    if spec.job_role:
        container["jobRoleArn"] = spec.job_role
    if spec.execution_role:
        container["executionRoleArn"] = spec.execution_role
    if spec.key_secret:
        container["secrets"] = [{"name": "CLOUDEXEC_KEY", "valueFrom": spec.key_secret}]
    if spec.log_group:
        container["logConfiguration"] = log_configuration(spec, "worker")
    if spec.compute == "fargate":
        if not spec.execution_role:
            raise ConfigError(
                "Fargate needs execution_role=, the ARN of a role that may pull the image and "
                "write logs; `cloudexec up` makes one"
            )
        container["networkConfiguration"] = {
            "assignPublicIp": "ENABLED" if spec.assign_public_ip else "DISABLED"
        }
        container["fargatePlatformConfiguration"] = {"platformVersion": "LATEST"}
        container["runtimePlatform"] = {
            "operatingSystemFamily": "LINUX",
            "cpuArchitecture": spec.arch.upper(),
        }
        if spec.ephemeral_gib is not None:
            container["ephemeralStorage"] = {"sizeInGiB": spec.ephemeral_gib}
    request: dict[str, Any] = {
        "type": "container",
        "containerProperties": container,
        "platformCapabilities": [spec.compute.upper()],
        "propagateTags": True,
    }
    if spec.stack:
        # Tags may be absent, not empty. AWS Batch API Reference, "RegisterJobDefinition".
        request["tags"] = {TAG_STACK: spec.stack}
    text = json.dumps(request, sort_keys=True)
    if len(text) > limits.DEFINITION_BYTES:
        raise ConfigError(
            f"the job definition has {len(text)} bytes; AWS Batch takes {limits.DEFINITION_BYTES}"
        )
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"jobDefinitionName": definition_name(digest), **request}


def log_configuration(spec: DefinitionSpec, prefix: str) -> dict[str, Any]:
    """Return where a container writes its log.

    Args:
        spec: Names the log group.
        prefix: What names of log streams begin with.
    """
    options = {
        "awslogs-group": spec.log_group,
        "awslogs-stream-prefix": prefix,
        # AWS drops lines under load otherwise. Amazon ECS API Reference, "LogConfiguration".
        "mode": "blocking",
    }
    if spec.region:
        options["awslogs-region"] = spec.region
    return {"logDriver": "awslogs", "options": options}


def _requirements(size: WorkerSize) -> list[dict[str, str]]:
    needs = [
        {"type": "VCPU", "value": f"{size.vcpus:g}"},
        {"type": "MEMORY", "value": str(size.memory_mib)},
    ]
    if size.gpus:
        needs.append({"type": "GPU", "value": str(size.gpus)})
    return needs


def submit_request(
    *,
    name: str,
    queue: str,
    definition: str,
    workers: int,
    size: WorkerSize,
    environment: Mapping[str, str],
    tags: Mapping[str, str],
    attempt_seconds: int,
    compute: str,
    retry_reclaimed: bool,
    share_identifier: str = "",
    scheduling_priority: int = 0,
) -> dict[str, Any]:
    """Build one SubmitJob request.

    Args:
        name: Of the job.
        queue: Name or ARN.
        definition: ARN, with its revision.
        workers: 1 for a plain job, up to 10,000 for an array job.
        size: Of each worker.
        environment: Variables, the same for all.
        tags: Of the job, and of what runs it.
        attempt_seconds: After which AWS ends a worker, whatever became of us.
        compute: ``"fargate"`` or ``"ec2"``.
        retry_reclaimed: Whether AWS starts a worker again whose machine it took back; otherwise
            that is left to the executor, which may want it elsewhere.
        share_identifier: For a queue with a fair-share policy; empty: it has none.
        scheduling_priority: Within that share, 0 to 9999.

    Raises:
        ConfigError: If AWS would refuse it, now or later.

    References:
        AWS Batch API Reference, "SubmitJob"; AWS Batch User Guide, "Automated job retries".
    """
    if not _JOB_NAME.fullmatch(name):
        raise ConfigError(f"{name!r} cannot name a job")
    if not 1 <= workers <= limits.ARRAY_LARGEST:
        raise ConfigError(f"a job has 1 to {limits.ARRAY_LARGEST} workers, not {workers}")
    check_environment(environment)
    if len(tags) > limits.TAGS:
        raise ConfigError(f"a job has up to {limits.TAGS} tags, not {len(tags)}")
    overrides = {
        "environment": [{"name": key, "value": value} for key, value in environment.items()],
        "resourceRequirements": _requirements(size),
    }
    request: dict[str, Any] = {
        "jobName": name,
        "jobQueue": queue,
        "jobDefinition": definition,
        "containerOverrides": overrides,
        "retryStrategy": {
            "attempts": _ATTEMPTS,
            "evaluateOnExit": _retry_rules(compute, retry_reclaimed=retry_reclaimed),
        },
        "timeout": {"attemptDurationSeconds": max(attempt_seconds, limits.LEAST_ATTEMPT_SECONDS)},
        "propagateTags": True,
    }
    if tags:
        request["tags"] = dict(tags)
    if workers > 1:
        request["arrayProperties"] = {"size": workers}
    if share_identifier:
        request["shareIdentifier"] = share_identifier
        request["schedulingPriorityOverride"] = scheduling_priority
    characters = len(json.dumps(overrides))
    most = limits.OVERRIDE_CHARACTERS - _OVERRIDE_MARGIN
    if characters > most:
        largest = max(environment, key=lambda key: len(environment[key]))
        raise ConfigError(
            f"the environment of a worker has {characters} characters as JSON; AWS takes {most}, "
            f"and would let the job fail. The longest value is {largest!r}: send it as an argument "
            f"or through initializer= instead"
        )
    size_bytes = len(json.dumps(request).encode())
    if size_bytes > limits.SUBMIT_BYTES:
        raise ConfigError(
            f"the request has {size_bytes} bytes; AWS Batch takes {limits.SUBMIT_BYTES}"
        )
    return request


def _retry_rules(compute: str, *, retry_reclaimed: bool) -> list[dict[str, str]]:
    """Return which attempts AWS makes again; the first rule that fits counts, and five are allowed.

    A start that failed is tried again, whichever field has the reason. What ends by itself, or by
    running out of memory, is the executor's to deal with.
    """
    # Each of the two reasons for a reclaim belongs to one kind of compute environment.
    reclaimed = RECLAIM_REASONS[0 if compute == "fargate" else 1]
    return [
        {"onStatusReason": f"{reclaimed}*", "action": "RETRY" if retry_reclaimed else "EXIT"},
        *({"onStatusReason": f"{reason}*", "action": "RETRY"} for reason in FAILED_STARTS),
        {"onReason": "*", "action": "EXIT"},
    ]


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse variables that AWS Batch or a container cannot have.

    Raises:
        ConfigError: Naming the first of them.
    """
    for name, value in environment.items():
        if not _VARIABLE.fullmatch(name) or name.startswith("AWS_BATCH"):
            raise ConfigError(
                f"environment variables are letters, digits and '_' and do not begin with "
                f"AWS_BATCH, not {name!r}"
            )
        if "\0" in value:
            raise ConfigError(f"the environment variable {name} has a NUL character in its value")


def check_tags(tags: Mapping[str, str]) -> None:
    """Refuse tags of the user's own that AWS would refuse, or that are ours.

    Raises:
        ConfigError: Naming the first of them.

    References:
        AWS Batch API Reference, "TagResource"; AWS General Reference, "Tag naming limits".
    """
    if len(tags) > limits.TAGS - _OWN_TAGS:
        raise ConfigError(
            f"a job has up to {limits.TAGS} tags, {_OWN_TAGS} of which are cloudexec's: {len(tags)}"
            f" are too many"
        )
    for key, value in tags.items():
        if key.lower().startswith(("aws:", "cloudexec:")):
            raise ConfigError(f"tags that begin with aws: or cloudexec: are not yours: {key!r}")
        if not 1 <= len(key) <= _TAG_KEY_LARGEST or len(value) > _TAG_VALUE_LARGEST:
            raise ConfigError(
                f"a tag has 1 to {_TAG_KEY_LARGEST} characters and its value up to "
                f"{_TAG_VALUE_LARGEST}; {key[:40]!r} has {len(key)} and {len(value)}"
            )
        if found := _TAG_UNSAFE.search(key + value):
            raise ConfigError(
                f"tags and their values are letters, digits, spaces and + - = . _ : / @, so "
                f"{found[0]!r} cannot be in {key!r}: {value!r}"
            )


def tag_value(text: str) -> str:
    """Return a text as AWS allows it for the value of a tag."""
    return _TAG_UNSAFE.sub("_", text)[:_TAG_VALUE_LARGEST]
