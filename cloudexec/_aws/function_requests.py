"""Requests to AWS Lambda as data: what goes into them, and whether AWS will take them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cloudexec._aws.limits import WorkerSize, format_memory, parse_memory
from cloudexec._aws.names import DEFINITION_PREFIX, TAG_STACK
from cloudexec._aws.requests import check_environment
from cloudexec._errors import ConfigError

__all__ = [
    "EVENT_AGE",
    "LONGEST_SESSION",
    "MOST_MIB",
    "SHORTEST_SESSION",
    "VCPU_MIB",
    "FunctionSpec",
    "disk_size",
    "event_of",
    "function_memory",
    "function_name",
    "function_request",
    "function_size",
    "function_size_for",
]

VCPU_MIB = 1769
"""Memory with which a function has the equivalent of one vCPU. AWS Lambda Developer Guide,
"Configure Lambda function memory"."""
MOST_MIB = 10240
_LEAST_MIB = 128
"""AWS Lambda Developer Guide, "Lambda quotas"."""
_LEAST_WORKER_MIB = 512
"""What Python, gRPC and a slot take, and some room for a task."""
LONGEST_SESSION = 900
"""Seconds. AWS Lambda Developer Guide, "Lambda quotas"."""
SHORTEST_SESSION = 30
EVENT_AGE = 60
"""Seconds for which Lambda keeps an event that it cannot deliver: the least that there is. AWS
Lambda API Reference, "PutFunctionEventInvokeConfig"."""
_PAYLOAD_BYTES = 256 * 1024
"""Of an event, in the AWS Lambda Developer Guide, "Lambda quotas", of 2025; it is 1 MB since."""
_NAME_LARGEST = 64
_HASH_DIGITS = 16
_DISK_MIB = (512, 10240)
_HANDLER = "cloudexec.worker"


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionSpec:
    """What makes one function different from another."""

    image: str = ""
    """In a repository of the same region, pinned by digest: ``repository@sha256:...``. Empty: it is
    made of a .zip archive."""
    archive: str = ""
    """What differs whenever a file of the archive does."""
    runtime: str = ""
    """Of the archive, such as ``"python3.12"``."""
    wrapper: str = ""
    """Path of the program in the archive with which Lambda starts the runtime."""
    role: str
    """ARN of the role that the function has."""
    memory_mib: int
    arch: str = "x86_64"
    disk_mib: int = _DISK_MIB[0]
    """Of ``/tmp``."""
    session: int = LONGEST_SESSION
    """Seconds after which Lambda kills a worker."""
    subnets: tuple[str, ...] = ()
    """Where it is in a VPC; none: it has the internet instead."""
    security_groups: tuple[str, ...] = ()
    log_group: str = ""
    """Empty: one that Lambda makes for the function."""
    reserved: int | None = None
    """How many workers there may be at once, reserved for this function."""
    stack: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if bool(self.image) == bool(self.archive):
            raise ConfigError("a function needs an image or an archive")
        if not self.role:
            raise ConfigError(
                "Lambda(...) needs the ARN of a role that its functions have: give role=, or a "
                "profile of `cloudexec up --with lambda`"
            )


def function_name(spec: FunctionSpec) -> str:
    """Return the name of the function with this content: another content has another name."""
    content = {
        **({"image": spec.image} if spec.image else _archived(spec)),
        "role": spec.role,
        "memory": spec.memory_mib,
        "arch": spec.arch,
        "disk": spec.disk_mib,
        "session": spec.session,
        "subnets": sorted(spec.subnets),
        "groups": sorted(spec.security_groups),
        "log_group": spec.log_group,
        "reserved": spec.reserved,
        "tags": dict(spec.tags),
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    prefix = f"{spec.stack}-" if spec.stack.startswith(DEFINITION_PREFIX) else DEFINITION_PREFIX
    return prefix[: _NAME_LARGEST - _HASH_DIGITS] + digest[:_HASH_DIGITS]


def _archived(spec: FunctionSpec) -> dict[str, str]:
    return {"archive": spec.archive, "runtime": spec.runtime, "wrapper": spec.wrapper}


def function_request(spec: FunctionSpec, code: Mapping[str, Any]) -> dict[str, Any]:
    """Build the CreateFunction request.

    Nothing of a worker is in the environment of the function: who may describe functions can read
    it.

    Args:
        spec: The function.
        code: Where an archive is, as the request names it; nothing for an image.
    """
    request: dict[str, Any] = {
        "FunctionName": function_name(spec),
        "Description": "Runs workers of cloudexec",
        "PackageType": "Image" if spec.image else "Zip",
        "Code": {"ImageUri": spec.image} if spec.image else dict(code),
        "Role": spec.role,
        "Architectures": [spec.arch],
        "MemorySize": spec.memory_mib,
        "Timeout": spec.session,
        "EphemeralStorage": {"Size": spec.disk_mib},
        "Tags": {**spec.tags, **({TAG_STACK: spec.stack} if spec.stack else {})},
    }
    if not spec.image:
        request["Runtime"] = spec.runtime
        # A .zip archive must name a handler. The wrapper starts a worker in place of what calls it.
        request["Handler"] = _HANDLER
        request["Environment"] = {"Variables": {"AWS_LAMBDA_EXEC_WRAPPER": spec.wrapper}}
    if spec.subnets:
        request["VpcConfig"] = {
            "SubnetIds": list(spec.subnets),
            "SecurityGroupIds": list(spec.security_groups),
        }
    if spec.log_group:
        request["LoggingConfig"] = {"LogFormat": "Text", "LogGroup": spec.log_group}
    return request


def event_of(environment: Mapping[str, str], session: Mapping[str, str], start_by: float) -> bytes:
    """Build the event that makes an invocation of the function a certain worker.

    Args:
        environment: Variables of the worker. The event is the one place for the key among them: AWS
            shows it to nobody.
        session: What the log is to say of the worker.
        start_by: Until when it is of use to start it, Unix time.

    Raises:
        ConfigError: If Lambda would refuse it.
    """
    check_environment(environment)
    event = {"environment": dict(environment), "session": dict(session), "start_by": start_by}
    data = json.dumps(event).encode()
    if len(data) > _PAYLOAD_BYTES:
        largest = max(environment, key=lambda key: len(environment[key]))
        raise ConfigError(
            f"the environment of a worker has {len(data)} bytes as JSON; AWS Lambda takes "
            f"{_PAYLOAD_BYTES}. The longest value is {largest!r}: send it as an argument or "
            f"through initializer= instead"
        )
    return data


def function_memory(memory: str | int) -> int:
    """Return the MiB of a function's memory.

    Raises:
        ConfigError: If Lambda has no such functions, or a worker has too little room in it.
    """
    mib = parse_memory(memory)
    if mib < _LEAST_WORKER_MIB:
        raise ConfigError(
            f"a worker needs {format_memory(_LEAST_WORKER_MIB)} or more, not {format_memory(mib)}"
        )
    if mib > MOST_MIB:
        raise ConfigError(
            f"AWS Lambda has functions of {format_memory(MOST_MIB)} at most, not of "
            f"{format_memory(mib)}: Fargate(...) and Batch(...) have larger workers"
        )
    return mib


def function_size(memory_mib: int) -> WorkerSize:
    """Return the size of a worker: its memory decides its share of processors."""
    return WorkerSize(memory_mib=memory_mib, vcpus=round(memory_mib / VCPU_MIB, 2))


def function_size_for(cpus: float, memory_mib: int) -> WorkerSize:
    """Return the smallest size with so much.

    Raises:
        ConfigError: If Lambda has none.
    """
    needed = max(memory_mib, math.ceil(cpus * VCPU_MIB), _LEAST_WORKER_MIB)
    if needed > MOST_MIB:
        raise ConfigError(
            f"AWS Lambda has no worker for a task with cpus={cpus:g} and "
            f"memory={format_memory(memory_mib)!r}: the largest has {format_memory(MOST_MIB)} and "
            f"{MOST_MIB / VCPU_MIB:.1f} vCPU. Fargate(...) and Batch(...) have larger ones"
        )
    return function_size(needed)


def disk_size(disk: str | int) -> int:
    """Return the MiB of ``/tmp``.

    Raises:
        ConfigError: If Lambda offers no such.
    """
    mib = parse_memory(disk)
    least, most = _DISK_MIB
    if not least <= mib <= most:
        raise ConfigError(
            f"a function has {format_memory(least)} to {format_memory(most)} of /tmp, not "
            f"{format_memory(mib)}"
        )
    return mib
