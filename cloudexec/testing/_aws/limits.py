"""Refuses well-formed Batch requests that AWS would refuse, by limits that moto does not know.

If no source is named, the limit is in the description of the parameter in the AWS Batch API
Reference, which botocore's model contains, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

__all__ = [
    "ClientError",
    "check_compute_environment",
    "check_compute_resources",
    "check_definition",
    "check_resources",
    "check_submit",
    "check_tags",
    "is_fargate_size",
    "tags_of_task",
]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
SUBMIT_MAX = 30 * 1024
DEFINITION_MAX = 24 * 1024

_FARGATE: dict[float, range | tuple[int, ...]] = {
    0.25: (512, 1024, 2048),
    0.5: range(1024, 4096 + 1, 1024),
    1: range(2048, 8192 + 1, 1024),
    2: range(4096, 16384 + 1, 1024),
    4: range(8192, 30720 + 1, 1024),
    8: range(16384, 61440 + 1, 4096),
    16: range(32768, 122880 + 1, 8192),
    32: (61440, 122880, 249856),
}
"""By vCPUs: the possible MiB of memory. "ResourceRequirement", AWS Batch API Reference."""

_EC2_ONLY = (
    "minvCpus",
    "desiredvCpus",
    "instanceTypes",
    "imageId",
    "instanceRole",
    "ec2KeyPair",
    "launchTemplate",
    "ec2Configuration",
    "placementGroup",
    "bidPercentage",
    "spotIamFleetRole",
    "allocationStrategy",
    "scalingPolicy",
    "tags",
)


_FARGATE_LOG_DRIVERS = ("awslogs", "splunk")
"""AWS Batch API Reference, "LogConfiguration"."""
_FARGATE_PLATFORMS = ("LATEST", "1.4.0")
"""The versions for Linux; 1.3.0 is retired. "Fargate platform versions for Amazon ECS", Amazon ECS
Developer Guide."""
_NOT_ON_FARGATE = ("ulimits", "instanceType", "privileged", "vcpus", "memory")
"""AWS Batch API Reference, "ContainerProperties"."""
_NOT_ON_FARGATE_LINUX = ("devices", "sharedMemorySize", "tmpfs", "maxSwap", "swappiness")
"""AWS Batch API Reference, "LinuxParameters"."""
_ONLY_FARGATE = ("networkConfiguration", "fargatePlatformConfiguration")
"""AWS Batch API Reference, "ContainerProperties"."""
_ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/[\w+=,.@/-]+")
"""AWS Identity and Access Management User Guide, "IAM identifiers"."""
_SECRET = re.compile(
    r"arn:aws[a-z-]*:(secretsmanager:[a-z0-9-]+:\d{12}:secret|ssm:[a-z0-9-]+:\d{12}:parameter).+"
)
"""AWS Batch API Reference, "Secret": a full ARN, or the name of a parameter."""


class ClientError(Exception):
    """AWS's refusal of a call."""

    def __init__(
        self,
        message: str,
        code: str = "ClientException",
        status: int = 400,
        members: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.status = status
        self.members = dict(members or {})
        """Further members of the error's shape."""


def is_fargate_size(vcpus: float, memory_mib: int) -> bool:
    """Return whether Fargate has tasks of that size."""
    return memory_mib in _FARGATE.get(vcpus, ())


def check_tags(tags: Mapping[str, str] | None) -> None:
    """Refuse more tags than a resource may have, and names that are reserved for AWS."""
    if tags is None:
        return
    if len(tags) > 50:
        raise ClientError(f"Number of tags {len(tags)} exceeds the maximum of 50")
    for key, value in tags.items():
        if key.lower().startswith("aws:"):
            raise ClientError("aws: prefixed tag key names are not allowed for external use.")
        if not 1 <= len(key) <= 128 or len(value) > 256:
            raise ClientError(f"Tag {key!r} is longer than 128 or its value longer than 256")
        # "Tag naming limits and requirements", AWS General Reference.
        if re.search(r"[^\w +\-=.:/@]", key + value):
            raise ClientError(f"Tag {key!r} or its value {value!r} has a character not allowed")


def tags_of_task(definition: Mapping[str, str], job: Mapping[str, str], *, propagate: bool) -> int:
    """Return how many tags a job's task would have. With more than 50, the job fails.

    References:
        AWS Batch API Reference, "SubmitJob", propagateTags.
    """
    return len({*definition, *job}) if propagate else 0


def check_environment(entries: Iterable[Mapping[str, str]], name: str = "name") -> None:
    """Refuse variables that Batch sets itself."""
    for entry in entries:
        if entry.get(name, "").startswith("AWS_BATCH"):
            raise ClientError(
                "Error executing request, Exception : Environment variables cannot start with "
                f'"AWS_BATCH": {entry[name]}'
            )


def check_resources(requirements: Iterable[Mapping[str, str]], *, fargate: bool) -> None:
    """Refuse sizes that the platform does not have."""
    sizes = {entry["type"]: entry["value"] for entry in requirements}
    try:
        vcpus, memory = float(sizes.get("VCPU", "")), int(sizes.get("MEMORY", ""))
    except ValueError:
        raise ClientError(
            "Error executing request, Exception : Resource requirements MEMORY and VCPU are "
            "required and must be numbers."
        ) from None
    if "GPU" in sizes and fargate:
        raise ClientError("Error executing request, Exception : Fargate does not support GPU.")
    if fargate and not is_fargate_size(vcpus, memory):
        raise ClientError(
            f"Error executing request, Exception : Fargate resource requirements ({vcpus:.2f} "
            f"vCPU, {memory} MiB) not valid."
        )
    if not fargate and (vcpus < 1 or vcpus != int(vcpus) or memory < 4):
        raise ClientError(
            "Error executing request, Exception : EC2 jobs need whole vCPUs, at least one, and "
            "at least 4 MiB."
        )


def check_timeout(timeout: Mapping[str, Any] | None) -> None:
    """Refuse attempt timeouts below a minute."""
    if timeout is not None and timeout.get("attemptDurationSeconds", 60) < 60:
        raise ClientError(
            "Error executing request, Exception : attemptDurationSeconds must be at least 60 "
            "seconds."
        )


def check_retry(retry: Mapping[str, Any] | None) -> None:
    """Refuse retry strategies that AWS does not accept."""
    if retry is None:
        return
    rules = retry.get("evaluateOnExit", [])
    if not 1 <= retry.get("attempts", 1) <= 10:
        raise ClientError("Error executing request, Exception : attempts must be 1 to 10.")
    if rules and "attempts" not in retry:
        raise ClientError(
            "Error executing request, Exception : evaluateOnExit needs attempts to be given."
        )
    if len(rules) > 5:
        raise ClientError(
            "Error executing request, Exception : evaluateOnExit takes 5 rules at most."
        )
    for rule in rules:
        if rule.get("action", "").upper() not in ("RETRY", "EXIT"):
            raise ClientError("Error executing request, Exception : action is RETRY or EXIT.")
        for name in ("onStatusReason", "onReason", "onExitCode"):
            pattern = rule.get(name)
            if pattern is None:
                continue
            allowed = r"[0-9]*\*?" if name == "onExitCode" else r"[A-Za-z0-9.:\s]*\*?"
            if len(pattern) > 512 or not re.fullmatch(allowed, pattern):
                raise ClientError(
                    f"Error executing request, Exception : {name} {pattern!r} is not a pattern of "
                    "letters, digits, periods, colons and spaces with a star at its end."
                )


def check_definition(parameters: Mapping[str, Any]) -> None:
    """Refuse a RegisterJobDefinition that AWS would refuse."""
    if len(json.dumps(parameters, separators=(",", ":"))) > DEFINITION_MAX:
        raise ClientError(
            "Error executing request, Exception : Job definition size exceeds 24 KiB."
        )
    name = parameters["jobDefinitionName"]
    if not NAME.fullmatch(name):
        raise ClientError(f"Job definition name {name!r} does not fit the pattern.")
    check_tags(parameters.get("tags"))
    check_timeout(parameters.get("timeout"))
    check_retry(parameters.get("retryStrategy"))
    container = parameters.get("containerProperties")
    if container is None:
        return
    capabilities = parameters.get("platformCapabilities") or ["EC2"]
    if len(capabilities) > 1:
        raise ClientError(
            "Error executing request, Exception : A job definition has one platform capability, "
            f"not {', '.join(capabilities)}."
        )
    fargate = capabilities == ["FARGATE"]
    if len(container.get("image", "")) > 255 or not container.get("image"):
        raise ClientError("Error executing request, Exception : Container properties need image.")
    check_environment(container.get("environment", []))
    check_resources(container.get("resourceRequirements", []), fargate=fargate)
    for name in ("executionRoleArn", "jobRoleArn"):
        if container.get(name) and not _ROLE.fullmatch(container[name]):
            raise ClientError(
                f"Error executing request, Exception : {name} {container[name]!r} is not the ARN "
                "of a role."
            )
    _check_secrets(container)
    if fargate:
        _check_fargate(container)
        return
    for forbidden in _ONLY_FARGATE:
        if container.get(forbidden):
            raise ClientError(
                f"Error executing request, Exception : {forbidden} is only applicable to Fargate "
                "jobs."
            )


def _check_secrets(container: Mapping[str, Any]) -> None:
    variables = {entry.get("name") for entry in container.get("environment", [])}
    for secret in container.get("secrets", []):
        check_environment([secret])
        name, source = secret["name"], secret["valueFrom"]
        if source.startswith("arn:") and not _SECRET.fullmatch(source):
            raise ClientError(
                f"Error executing request, Exception : The secret {name} has the malformed ARN "
                f"{source!r}."
            )
        if name in variables:
            # Users quote these words of Amazon ECS for RegisterTaskDefinition.
            raise ClientError(
                "The secret name must be unique and not shared with any new or existing "
                f"environment variables set on the container, such as '{name}'."
            )
        variables.add(name)


def _check_fargate(container: Mapping[str, Any]) -> None:
    if not container.get("executionRoleArn"):
        raise ClientError(
            "Error executing request, Exception : Fargate requires that 'executionRoleArn' is "
            "specified."
        )
    linux = container.get("linuxParameters") or {}
    given = [
        *(name for name in _NOT_ON_FARGATE if container.get(name)),
        *(f"linuxParameters.{name}" for name in _NOT_ON_FARGATE_LINUX if name in linux),
        # "Volume": a task on Fargate cannot use a directory of the host.
        *("volumes.host" for volume in container.get("volumes", []) if volume.get("host")),
    ]
    if given:
        raise ClientError(
            f"Error executing request, Exception : {given[0]} is not applicable to Fargate jobs."
        )
    driver = (container.get("logConfiguration") or {}).get("logDriver", "awslogs")
    if driver not in _FARGATE_LOG_DRIVERS:
        raise ClientError(
            f"Error executing request, Exception : Log driver {driver} is not supported on Fargate."
        )
    platform = container.get("fargatePlatformConfiguration") or {}
    version = platform.get("platformVersion", "LATEST")
    if version not in _FARGATE_PLATFORMS:
        raise ClientError(
            f"Error executing request, Exception : There is no Fargate platform version {version}."
        )
    runtime = container.get("runtimePlatform") or {}
    if runtime.get("cpuArchitecture", "X86_64") not in ("X86_64", "ARM64"):
        raise ClientError(
            "Error executing request, Exception : cpuArchitecture is X86_64 or ARM64."
        )
    if not 21 <= container.get("ephemeralStorage", {}).get("sizeInGiB", 21) <= 200:
        raise ClientError("Error executing request, Exception : ephemeralStorage is 21 to 200 GiB.")


def check_submit(parameters: Mapping[str, Any], length: int) -> None:
    """Refuse a SubmitJob that AWS would refuse, as far as the request alone shows.

    Args:
        parameters: The call's parameters.
        length: Bytes of the request's body.
    """
    if length > SUBMIT_MAX:
        raise ClientError(
            "Error executing request, Exception : SubmitJob request size exceeds 30 KiB."
        )
    if not NAME.fullmatch(parameters["jobName"]):
        raise ClientError(
            "Job name should match valid pattern: first character alphanumeric, then letters, "
            "digits, hyphens and underscores, 128 at most."
        )
    array = parameters.get("arrayProperties") or {}
    if "size" in array and not 2 <= array["size"] <= 10_000:
        raise ClientError("Array job size must be between 2 and 10000.")
    if not 0 <= parameters.get("schedulingPriorityOverride", 0) <= 9999:
        raise ClientError("schedulingPriorityOverride is 0 to 9999.")
    if len(parameters.get("dependsOn", [])) > 20:
        raise ClientError("A job can depend upon 20 jobs at most.")
    check_tags(parameters.get("tags"))
    check_timeout(parameters.get("timeout"))
    check_retry(parameters.get("retryStrategy"))
    overrides = parameters.get("containerOverrides") or {}
    check_environment(overrides.get("environment", []))
    if any(word == "" for word in overrides.get("command", [])):
        raise ClientError(
            "Error executing request, Exception : Command must not contain an empty string."
        )


def check_compute_environment(parameters: Mapping[str, Any]) -> None:
    """Refuse a CreateComputeEnvironment that AWS would refuse, as far as the request shows."""
    name = parameters["computeEnvironmentName"]
    if not NAME.fullmatch(name):
        raise ClientError(f"Compute environment name {name!r} does not fit the pattern.")
    check_tags(parameters.get("tags"))
    if parameters.get("state", "ENABLED") != "ENABLED":
        raise ClientError("A compute environment must be created in the ENABLED state.")
    if parameters.get("type") != "MANAGED":
        return
    resources = parameters.get("computeResources")
    if not resources:
        raise ClientError("computeResources must be specified for a MANAGED environment.")
    check_compute_resources(resources["type"], resources)
    kind = resources["type"]
    if not resources.get("subnets"):
        raise ClientError("Error executing request, Exception : Subnets are required.")
    if kind.startswith("FARGATE"):
        if not resources.get("securityGroupIds"):
            raise ClientError("Error executing request, Exception : Security groups are required.")
        return
    if kind not in ("EC2", "SPOT"):
        raise ClientError(f"FakeAWS has no compute environments of type {kind}.")
    if not resources.get("instanceRole"):
        raise ClientError("Error executing request, Exception : Instance role is required.")
    if not resources.get("instanceTypes"):
        raise ClientError("Error executing request, Exception : Instance types are required.")
    if (
        kind == "SPOT"
        and resources.get("allocationStrategy", "BEST_FIT") == "BEST_FIT"
        and not resources.get("spotIamFleetRole")
    ):
        raise ClientError("Error executing request, Exception : spotIamFleetRole is required.")


def check_compute_resources(kind: str, resources: Mapping[str, Any]) -> None:
    """Refuse resources that a new or changed compute environment of that type cannot have.

    References:
        AWS Batch API Reference, "ComputeResource" and "ComputeResourceUpdate".
    """
    if not kind.startswith("FARGATE"):
        return
    if len(resources.get("subnets", ())) > 16:
        raise ClientError("Error executing request, Exception : 16 subnets at most.")
    given = [field for field in _EC2_ONLY if field in resources]
    if given:
        raise ClientError(
            "Error executing request, Exception : "
            f"{', '.join(given)} not applicable to {kind} compute environments."
        )
