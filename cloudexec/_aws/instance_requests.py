"""Requests to Amazon EC2 as data: what goes into them, and whether AWS will take them."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cloudexec._aws import limits
from cloudexec._aws.limits import WorkerSize
from cloudexec._aws.names import TAG_STACK, definition_name
from cloudexec._errors import ConfigError

__all__ = [
    "MOST_INSTANCES",
    "Fleet",
    "TemplateSpec",
    "fleet_request",
    "image_parameter",
    "requirements",
    "template_request",
]

MOST_INSTANCES = 100
"""Instances in one request. More may be asked for; Amazon EC2 API Reference, "RunInstances",
advises to divide large requests, such as five for 100 each instead of one for 500."""
_MIB_PER_VCPU = 8192
"""Of instances with much memory, but for a few types. Amazon EC2 Instance Types, "Memory
optimized"."""
_OVERRIDES = 300
"""Combinations of instance types and subnets in one fleet. Amazon EC2 User Guide, "EC2 Fleet
quotas"."""
_PARAMETERS = "/aws/service/ecs/optimized-ami/amazon-linux-2023"
"""Amazon ECS Developer Guide, "Retrieving Amazon ECS-optimized Linux AMI metadata"."""
_ROOT_DEVICE = "/dev/xvda"
"""Of these images. Amazon EC2 User Guide, "Device names for volumes on Amazon EC2 instances"."""


def image_parameter(arch: str, *, gpus: bool) -> str:
    """Return the public parameter that has the newest image of the system with Docker.

    Args:
        arch: ``"x86_64"`` or ``"arm64"``.
        gpus: Whether it must have drivers for GPUs.
    """
    kind = "/gpu" if gpus else "/arm64" if arch == "arm64" else ""
    return f"{_PARAMETERS}{kind}/recommended/image_id"


@dataclass(frozen=True, slots=True, kw_only=True)
class TemplateSpec:
    """What makes one launch template different from another.

    What instances run, and of which type they are, comes with each request, so that one template
    serves all executors of a stack with the same settings.
    """

    instance_profile: str
    """ARN."""
    ami: str
    """``ami-...`` or ``resolve:ssm:...``."""
    security_groups: Sequence[str]
    assign_public_ip: bool
    disk_gib: int
    stack: str = ""


def template_request(spec: TemplateSpec) -> dict[str, Any]:
    """Build the CreateLaunchTemplate request; its name is a hash of its content.

    References:
        Amazon EC2 API Reference, "RequestLaunchTemplateData".
    """
    data: dict[str, Any] = {
        "ImageId": spec.ami,
        "IamInstanceProfile": {"Arn": spec.instance_profile},
        # What shuts down costs nothing from then on.
        "InstanceInitiatedShutdownBehavior": "terminate",
        # One hop: the script of the instance reaches the service, and containers do not. So tasks
        # cannot have the credentials of the instance.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        "NetworkInterfaces": [
            {
                "DeviceIndex": 0,
                "AssociatePublicIpAddress": spec.assign_public_ip,
                "Groups": list(spec.security_groups),
                "DeleteOnTermination": True,
            }
        ],
        "BlockDeviceMappings": [
            {
                "DeviceName": _ROOT_DEVICE,
                "Ebs": {
                    "VolumeSize": spec.disk_gib,
                    "VolumeType": "gp3",
                    "DeleteOnTermination": True,
                },
            }
        ],
    }
    content = json.dumps([data, spec.stack], sort_keys=True)
    request: dict[str, Any] = {
        "LaunchTemplateName": definition_name(hashlib.sha256(content.encode()).hexdigest()),
        "LaunchTemplateData": data,
    }
    if spec.stack:
        tags = [{"Key": TAG_STACK, "Value": spec.stack}]
        request["TagSpecifications"] = [{"ResourceType": "launch-template", "Tags": tags}]
    return request


def requirements(size: WorkerSize) -> dict[str, Any]:
    """Return what an instance must have for a worker, where no types are named.

    It may have up to twice the vCPUs, or twice those that come with so much memory: most types have
    8 GiB for each of them at the most. Amazon EC2 leaves out burstable types and those without an
    operating system's hypervisor by default, and those that cost much more than the cheapest.

    References:
        Amazon EC2 API Reference, "InstanceRequirementsRequest".
    """
    most = 2 * max(1, int(size.vcpus), math.ceil(size.memory_mib / _MIB_PER_VCPU))
    wanted: dict[str, Any] = {
        "VCpuCount": {"Min": int(size.vcpus), "Max": most},
        "MemoryMiB": {
            "Min": size.memory_mib,
            "Max": max(2 * size.memory_mib, most * _MIB_PER_VCPU),
        },
    }
    if size.gpus:
        wanted["AcceleratorCount"] = {"Min": size.gpus, "Max": size.gpus}
        wanted["AcceleratorTypes"] = ["gpu"]
        wanted["AcceleratorManufacturers"] = ["nvidia"]
        # GPUs come with processors and memory of their own.
        del wanted["VCpuCount"]["Max"], wanted["MemoryMiB"]["Max"]
    else:
        wanted["AcceleratorCount"] = {"Max": 0}
        wanted["InstanceGenerations"] = ["current"]
    return wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """Instances to be asked for, which are alike."""

    name: str
    """Of what they are for, among all of the account."""
    attempt: int
    """Which request for it this is. One that is made again is the same as before, and Amazon EC2
    then starts nothing twice."""
    template: str
    """Name of the launch template."""
    count: int
    size: WorkerSize
    instance_types: Sequence[str] = ()
    """Empty: any type that has what ``size`` says."""
    subnets: Sequence[str]
    spot: bool
    script: str
    tags: Mapping[str, str]


def fleet_request(fleet: Fleet) -> dict[str, Any]:
    """Build the CreateFleet request.

    Raises:
        ConfigError: If AWS would refuse it.

    References:
        Amazon EC2 API Reference, "CreateFleet"; Amazon EC2 User Guide, "Use an EC2 Fleet of type
        instant".
    """
    if len(fleet.tags) > limits.TAGS:
        raise ConfigError(f"an instance has up to {limits.TAGS} tags, not {len(fleet.tags)}")
    if not fleet.subnets:
        raise ConfigError("an instance needs a subnet: give subnets=, or a profile that names some")
    kinds: list[dict[str, Any]] = [{"InstanceType": each} for each in fleet.instance_types]
    kinds = kinds or [{"InstanceRequirements": requirements(fleet.size)}]
    overrides = [{**kind, "SubnetId": subnet} for subnet in fleet.subnets for kind in kinds]
    if len(overrides) > _OVERRIDES:
        raise ConfigError(
            f"{len(fleet.instance_types)} instance types in {len(fleet.subnets)} subnets are "
            f"{len(overrides)} combinations, and Amazon EC2 takes {_OVERRIDES}: name fewer"
        )
    tags = [{"Key": key, "Value": value} for key, value in fleet.tags.items()]
    token = hashlib.sha256(f"{fleet.name} {fleet.attempt}".encode()).hexdigest()[:32]
    capacity = "spot" if fleet.spot else "on-demand"
    request: dict[str, Any] = {
        "Type": "instant",
        "ClientToken": token,
        "LaunchTemplateConfigs": [
            {
                "LaunchTemplateSpecification": {
                    "LaunchTemplateName": fleet.template,
                    "Version": "1",
                    "LaunchTemplateSpecificationUserData": base64.b64encode(
                        fleet.script.encode()
                    ).decode(),
                },
                "Overrides": overrides,
            }
        ],
        "TargetCapacitySpecification": {
            "TotalTargetCapacity": fleet.count,
            "DefaultTargetCapacityType": capacity,
        },
        "TagSpecifications": [
            {"ResourceType": kind, "Tags": tags}
            for kind in ("instance", "volume", "network-interface")
        ],
    }
    if fleet.spot:
        request["SpotOptions"] = {
            "AllocationStrategy": "price-capacity-optimized",
            "InstanceInterruptionBehavior": "terminate",
        }
    else:
        request["OnDemandOptions"] = {"AllocationStrategy": "lowest-price"}
    return request
