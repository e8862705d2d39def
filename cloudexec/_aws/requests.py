"""Builds requests to AWS Batch as data, and checks that AWS will accept them."""

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
"""Beginnings of the reason when AWS takes a machine back. AWS Batch User Guide, "Best practices";
Amazon ECS Developer Guide, "Fargate capacity providers"."""
FAILED_STARTS = ("CannotPullContainer", "ResourceInitializationError", "Task failed to start")
"""Beginnings of the reason when a container could not start. On Fargate, users report the first two
as the status reason; on EC2, as the container's reason, with the third as the status reason."""
_ATTEMPTS = 3
_JOB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OVERRIDE_MARGIN = 1024
"""Characters of ``OVERRIDE_CHARACTERS`` that are left to AWS Batch's own variables."""
_TAG_UNSAFE = re.compile(r"[^\w +\-=.:/@]")
_TAG_KEY_LARGEST = 128
_TAG_VALUE_LARGEST = 256
_OWN_TAGS = 6
"""Most tags that cloudexec gives to a job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DefinitionSpec:
    """The contents of a job definition.

    Submissions set the size and the settings of workers, so that one definition serves all
    executors with the same image and roles.
    """

    image: str
    """URI of the image, best with its digest: ``repository@sha256:...``."""
    compute: str = "fargate"
    """``"fargate"`` or ``"ec2"``."""
    arch: str = "x86_64"
    """``"x86_64"`` or ``"arm64"``."""
    execution_role: str = ""
    job_role: str = ""
    key_secret: str = ""
    """ARN of the secret with the stack's key."""
    log_group: str = ""
    region: str = ""
    """Region of the log group."""
    assign_public_ip: bool = True
    ephemeral_gib: int | None = None
    """Disk of a Fargate worker in GiB; ``None``: the default of 20."""
    stack: str = ""
    user: str = ""
    """User in the container; empty: the image's default."""
    size: WorkerSize = field(default_factory=lambda: WorkerSize(memory_mib=2048, vcpus=1))
    """Size of a worker, unless the submission gives another."""


def definition_request(spec: DefinitionSpec) -> dict[str, Any]:
    """Build the RegisterJobDefinition request, whose name is a hash of its content.

    Raises:
        ConfigError: If AWS would refuse it.
    """
    if not spec.image or len(spec.image) > 255:
        raise ConfigError(f"an image is named by 1 to 255 characters, not {spec.image!r}")
    container: dict[str, Any] = {
        "image": spec.image,
        "resourceRequirements": _requirements(spec.size),
        # An init process in the container reaps orphaned processes, and passes signals on.
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
        # AWS accepts a request without tags, but not with empty ones. AWS Batch API Reference,
        # "RegisterJobDefinition".
        request["tags"] = {TAG_STACK: spec.stack}
    text = json.dumps(request, sort_keys=True)
    if len(text) > limits.DEFINITION_BYTES:
        raise ConfigError(
            f"the job definition has {len(text)} bytes; AWS Batch takes {limits.DEFINITION_BYTES}"
        )
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"jobDefinitionName": definition_name(digest), **request}


def log_configuration(spec: DefinitionSpec, prefix: str) -> dict[str, Any]:
    """Return the log settings of a container.

    Args:
        spec: Names the log group.
        prefix: Prefix of the log streams' names.
    """
    options = {
        "awslogs-group": spec.log_group,
        "awslogs-stream-prefix": prefix,
        # Otherwise AWS drops lines under load. Amazon ECS API Reference, "LogConfiguration".
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
        name: Name of the job.
        queue: Name or ARN.
        definition: ARN, with its revision.
        workers: 1 for a plain job, up to 10,000 for an array job.
        size: Size of each worker.
        environment: Variables, the same for all workers.
        tags: Tags of the job and of the task that runs it.
        attempt_seconds: Time limit after which AWS ends a worker, even if the client has died.
        compute: ``"fargate"`` or ``"ec2"``.
        retry_reclaimed: Whether AWS restarts a worker whose machine it took back. Otherwise the
            executor does, perhaps on another kind of capacity.
        share_identifier: For a queue with a fair-share policy; empty: it has none.
        scheduling_priority: Priority within that share, 0 to 9999.

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
            f"and the job would fail. The longest value is {largest!r}: send it as an argument "
            f"or through initializer= instead"
        )
    size_bytes = len(json.dumps(request).encode())
    if size_bytes > limits.SUBMIT_BYTES:
        raise ConfigError(
            f"the request has {size_bytes} bytes; AWS Batch takes {limits.SUBMIT_BYTES}"
        )
    return request


def _retry_rules(compute: str, *, retry_reclaimed: bool) -> list[dict[str, str]]:
    """Return the rules that say which attempts AWS retries. The first rule that matches counts.

    AWS allows five rules. It retries a failed start, whichever field has the reason. The executor
    handles workers that end by themselves or run out of memory.
    """
    # Each of the two reasons for a reclaim belongs to one kind of compute environment.
    reclaimed = RECLAIM_REASONS[0 if compute == "fargate" else 1]
    return [
        {"onStatusReason": f"{reclaimed}*", "action": "RETRY" if retry_reclaimed else "EXIT"},
        *({"onStatusReason": f"{reason}*", "action": "RETRY"} for reason in FAILED_STARTS),
        {"onReason": "*", "action": "EXIT"},
    ]


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse variables that AWS Batch or a container does not allow.

    Raises:
        ConfigError: If there is one. The message names the first.
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
    """Refuse tags of the user that AWS would refuse, or that are reserved for cloudexec.

    Raises:
        ConfigError: If there is one. The message names the first.

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
            raise ConfigError(f"tags that begin with aws: or cloudexec: are reserved: {key!r}")
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
    """Return a text with only the characters that AWS allows in the value of a tag."""
    return _TAG_UNSAFE.sub("_", text)[:_TAG_VALUE_LARGEST]
