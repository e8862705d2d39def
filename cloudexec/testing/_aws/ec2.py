"""Answers the calls of Amazon EC2 about fleets of instances that run.

moto keeps launch templates, subnets and what else there is.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import json
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from cloudexec.testing._aws.backends import ACCOUNT
from cloudexec.testing._aws.ec2_xml import ec2_response
from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.instance_types import TYPES, InstanceType, fitting
from cloudexec.testing._aws.instances import Instance, Instances, Order
from cloudexec.testing._aws.limits import ClientError
from cloudexec.testing._aws.token_bucket import TokenBucket
from cloudexec.testing._aws.wire import Call, Response

__all__ = ["Ec2"]

_USER_DATA = 16 * 1024
_IMAGES = {
    f"/aws/service/ecs/optimized-ami/amazon-linux-2023{kind}/recommended/image_id": arch
    for kind, arch in (("", "x86_64"), ("/arm64", "arm64"), ("/gpu", "x86_64"))
}
"""Public parameters, and the architecture of the image that each of them names."""
_RATES: Mapping[str, tuple[float, float]] = {
    "CreateFleet": (5.0, 2.0),
    "TerminateInstances": (50.0, 5.0),
    "CreateLaunchTemplate": (50.0, 5.0),
    "DescribeInstances": (100.0, 20.0),
    "DescribeInstanceTypes": (100.0, 20.0),
    "DescribeSpotPriceHistory": (100.0, 20.0),
}
"""Calls at once and per second. Amazon EC2 Developer Guide, "Request throttling for the Amazon EC2
API"; that of CreateFleet is that of RunInstances, which such a fleet makes."""
_RESOURCES = {"CreateFleet": (1000.0, 2.0), "TerminateInstances": (1000.0, 20.0)}
"""Instances at once and per second, in such calls. The same page, "Resource rate limiting"."""

Handler = Callable[[Call], Response | None]


class Ec2:
    """Answers calls about instances.

    Args:
        instances: All of them.
        faults: Says what is broken or full.
        max_running: Largest number of instances at a time, whatever AWS's capacity is.
    """

    def __init__(self, instances: Instances, faults: Faults, *, max_running: int) -> None:
        self._instances = instances
        self._faults = faults
        self._max_running = max_running
        self._calls = {name: TokenBucket(rate, burst) for name, (burst, rate) in _RATES.items()}
        self._resources = {
            name: TokenBucket(rate, burst) for name, (burst, rate) in _RESOURCES.items()
        }
        self._tokens: dict[str, tuple[str, dict[str, Any]]] = {}
        self._handlers: dict[str, Handler] = {
            "CreateFleet": self._create_fleet,
            "CreateLaunchTemplate": self._create_template,
            "DescribeInstances": self._describe,
            "DescribeInstanceTypes": self._describe_types,
            "DescribeSpotPriceHistory": self._spot_prices,
            "GetInstanceTypesFromInstanceRequirements": self._types_of,
            "TerminateInstances": self._terminate,
        }

    def answer(self, call: Call) -> Response | None:
        """Answer a call; ``None`` leaves it to moto."""
        handler = self._handlers.get(call.operation)
        if handler is None:
            return None
        bucket = self._calls.get(call.operation)
        if bucket is not None and not bucket.take():
            raise _too_many()
        return handler(call)

    def _take(self, operation: str, count: int) -> None:
        bucket = self._resources[operation]
        if not all(bucket.take() for _ in range(count)):
            raise _too_many()

    # Starting.

    @staticmethod
    def _create_template(call: Call) -> None:
        data = call.parameters["LaunchTemplateData"]
        image = str(data.get("ImageId", ""))
        if image.startswith("resolve:ssm:") and image.removeprefix("resolve:ssm:") not in _IMAGES:
            raise ClientError(f"The parameter {image} does not exist.", "InvalidParameterValue")

    def _create_fleet(self, call: Call) -> Response:
        given = call.parameters
        if given.get("Type") != "instant":
            raise ClientError("FakeAWS runs fleets of type instant.", "InvalidParameterValue")
        token, wanted = given.get("ClientToken"), json.dumps(given, sort_keys=True)
        known = self._tokens.get(str(token))
        if token is not None and known is not None:
            # "Ensuring idempotency in Amazon EC2 API requests", Amazon EC2 Developer Guide.
            if known[0] != wanted:
                raise ClientError(
                    "The client token was used with other parameters.",
                    "IdempotentParameterMismatch",
                )
            repeated = known[1]
            if self._faults.ec2.answers_once:
                repeated = {**repeated, "Instances": [], "Errors": []}
            return ec2_response(call, repeated)
        answer = self._start(call)
        if token is not None:
            self._tokens[str(token)] = (wanted, answer)
        return ec2_response(call, answer)

    def _start(self, call: Call) -> dict[str, Any]:
        given = call.parameters
        target = given["TargetCapacitySpecification"]
        count = int(target["TotalTargetCapacity"])
        spot = target.get("DefaultTargetCapacityType") == "spot"
        (config,) = given["LaunchTemplateConfigs"]
        specification = config["LaunchTemplateSpecification"]
        template = _template(call.region, specification)
        script = _script(specification)
        tags = {
            each["Key"]: each["Value"]
            for part in given.get("TagSpecifications", ())
            if part["ResourceType"] == "instance"
            for each in part["Tags"]
        }
        if len(tags) > 50:
            raise ClientError("More than 50 tags specified", "TagLimitExceeded")
        fleet: dict[str, Any] = {"FleetId": f"fleet-{call.region}", "Instances": [], "Errors": []}
        code, message = self._faults.ec2.failure()
        pools = list(_pools(call.region, config.get("Overrides") or [{}], template))
        if code:
            fleet["Errors"] = [_error(code, message, spot, pool) for pool in pools[:1]]
            return fleet
        self._take("CreateFleet", count)
        role = _role_of(template)
        if role is None:
            message = "Value (WorkerProfile) for parameter iamInstanceProfile.name is invalid."
            fleet["Errors"] = [_error("InvalidParameterValue", message, spot, pools[0])]
            return fleet
        network = (template.get("NetworkInterfaces") or [{}])[0]
        metadata = template.get("MetadataOptions") or {}
        for kind, subnet, zone in pools:
            while len(fleet["Instances"]) < count:
                refusal = self._refusal(kind, zone, spot)
                stops = bool(refusal) and self._faults.ec2.ends_without_capacity
                if refusal and not stops:
                    fleet["Errors"].append(_error(*refusal, spot, (kind, subnet, zone)))
                    break
                order = Order(
                    region=call.region,
                    kind=kind,
                    subnet=subnet,
                    zone=zone,
                    spot=spot,
                    tags=tags,
                    script=script,
                    role=role,
                    template=str(specification.get("LaunchTemplateName", "")),
                    public_ip=bool(network.get("AssociatePublicIpAddress")),
                    hop_limit=int(metadata.get("HttpPutResponseHopLimit", 1)),
                )
                made = self._instances.launch(order, self._faults.start_delay(), fails=stops)
                if self._faults.ec2.room is not None:
                    self._faults.ec2.room = max(0, self._faults.ec2.room - 1)
                fleet["Instances"].append(
                    {
                        "InstanceIds": [made.id],
                        "InstanceType": kind.name,
                        "Lifecycle": "spot" if spot else "on-demand",
                        "SubnetId": subnet,
                        "AvailabilityZone": zone,
                    }
                )
        if len(fleet["Instances"]) == count:
            fleet["Errors"] = []
        return fleet

    def _refusal(self, kind: InstanceType, zone: str, spot: bool) -> tuple[str, str] | None:
        """Return code and message if no such instance can be started now."""
        faults = self._faults
        quota = faults.quota("ec2_spot" if spot else "ec2")
        if quota is not None and self._instances.running_vcpus(spot=spot) + kind.vcpus > quota:
            if spot:
                return "MaxSpotInstanceCountExceeded", "Max spot instance count exceeded"
            return (
                "VcpuLimitExceeded",
                f"You have requested more vCPU capacity than your current vCPU limit of {quota:g} "
                f"allows for the instance bucket that the specified instance type belongs to.",
            )
        full = kind.name in faults.ec2.full_types or faults.ec2.room == 0
        alive = len(self._instances.alive())
        if full or alive >= self._max_running or not faults.has_capacity("SPOT" if spot else "EC2"):
            return (
                "InsufficientInstanceCapacity",
                f"We currently do not have sufficient {kind.name} capacity in the Availability "
                f"Zone you requested ({zone}). Our system will be working on provisioning "
                f"additional capacity.",
            )
        return None

    # Looking.

    def _describe(self, call: Call) -> Response | None:
        given = call.parameters
        if not self._instances.all:
            return None
        ids = given.get("InstanceIds") or ()
        if ids and not self._instances.all.keys() & set(ids):
            return None  # of moto's
        since = self._faults.listed_since()
        with self._instances.lock:
            for each in ids:
                found = self._instances.all.get(each)
                if found is None or found.launched_at > since or found.is_forgotten:
                    raise _no_instance(each)
            listed = [
                each
                for each in self._instances.all.values()
                if each.launched_at <= since
                and not each.is_forgotten
                and (not ids or each.id in ids)
                and all(_fits(each, wanted) for wanted in given.get("Filters") or ())
                and not self._faults.ec2.is_missing()
            ]
            shown = [_detail(each) for each in listed]
        size, start = int(given.get("MaxResults") or 1000), int(given.get("NextToken") or 0)
        if not 5 <= size <= 1000:
            raise ClientError("MaxResults is 5 to 1000.", "InvalidParameterValue")
        page: dict[str, Any] = {
            "Reservations": [
                {"ReservationId": f"r-{each['InstanceId'][2:]}", "Instances": [each]}
                for each in shown[start : start + size]
            ]
        }
        if start + size < len(shown):
            page["NextToken"] = str(start + size)
        return ec2_response(call, page)

    @staticmethod
    def _describe_types(call: Call) -> Response:
        names = call.parameters.get("InstanceTypes") or list(TYPES)
        for wanted in call.parameters.get("Filters") or ():
            if wanted["Name"] != "instance-type":
                raise ClientError(
                    f"The filter '{wanted['Name']}' is invalid", "InvalidParameterValue"
                )
            names = [each for each in names if each in wanted["Values"]]
        if unknown := [each for each in names if each not in TYPES]:
            raise ClientError(
                f"The following supplied instance types do not exist: [{', '.join(unknown)}]",
                "InvalidInstanceType",
            )
        found = [
            {
                "InstanceType": each.name,
                "VCpuInfo": {"DefaultVCpus": each.vcpus},
                "MemoryInfo": {"SizeInMiB": each.memory_mib},
                "GpuInfo": {"Gpus": [{"Manufacturer": "NVIDIA", "Count": each.gpus}]}
                if each.gpus
                else None,
                "ProcessorInfo": {"SupportedArchitectures": [each.arch]},
            }
            for each in (TYPES[name] for name in names)
        ]
        return ec2_response(call, {"InstanceTypes": found})

    @staticmethod
    def _types_of(call: Call) -> Response:
        given = call.parameters
        found = [
            {"InstanceType": each.name}
            for arch in given["ArchitectureTypes"]
            for each in fitting(given["InstanceRequirements"], arch)
        ]
        return ec2_response(call, {"InstanceTypes": found})

    @staticmethod
    def _spot_prices(call: Call) -> Response:
        given = call.parameters
        zone = given.get("AvailabilityZone") or f"{call.region}a"
        found = [
            {
                "InstanceType": name,
                "AvailabilityZone": zone,
                "ProductDescription": "Linux/UNIX",
                "SpotPrice": f"{TYPES[name].spot:.6f}",
                "Timestamp": datetime.now(UTC),
            }
            for name in given.get("InstanceTypes") or TYPES
            if name in TYPES
        ]
        return ec2_response(call, {"SpotPriceHistory": found})

    # The end.

    def _terminate(self, call: Call) -> Response | None:
        ids = call.parameters["InstanceIds"]
        if not self._instances.all.keys() & set(ids):
            return None
        if len(ids) > 1000:
            raise ClientError("1000 instances are the most.", "InvalidParameterValue")
        for each in ids:
            if each not in self._instances.all or self._instances.all[each].is_forgotten:
                raise _no_instance(each)
        self._take("TerminateInstances", len(ids))
        found = [self._instances.all[each] for each in ids]
        before = {each.id: each.state for each in found}
        self._instances.terminate(found, at_once=bool(call.parameters.get("SkipOsShutdown")))
        changes = [
            {
                "InstanceId": each.id,
                "PreviousState": {"Name": before[each.id]},
                "CurrentState": {"Name": each.state},
            }
            for each in found
        ]
        return ec2_response(call, {"TerminatingInstances": changes})


def _too_many() -> ClientError:
    return ClientError("Request limit exceeded.", "RequestLimitExceeded", status=503)


def _no_instance(name: str) -> ClientError:
    return ClientError(f"The instance ID '{name}' does not exist", "InvalidInstanceID.NotFound")


def _error(
    code: str, message: str, spot: bool, pool: tuple[InstanceType, str, str]
) -> dict[str, Any]:
    kind, subnet, _ = pool
    overrides = {"InstanceType": kind.name, "SubnetId": subnet}
    return {
        "LaunchTemplateAndOverrides": {"Overrides": overrides},
        "Lifecycle": "spot" if spot else "on-demand",
        "ErrorCode": code,
        "ErrorMessage": message,
    }


def _template(region: str, specification: Mapping[str, Any]) -> Mapping[str, Any]:
    from moto.ec2.models import ec2_backends

    backend: Any = ec2_backends[ACCOUNT][region]
    name = specification.get("LaunchTemplateName", "")
    found = next((t for t in backend.launch_templates.values() if t.name == name), None)
    if found is None:
        raise ClientError(
            f"The specified launch template, with template name {name}, does not exist.",
            "InvalidLaunchTemplateName.NotFoundException",
        )
    data: Mapping[str, Any] = found.get_version(specification["Version"]).data
    return data


def _script(specification: Mapping[str, Any]) -> str:
    try:
        script = base64.b64decode(specification.get("LaunchTemplateSpecificationUserData", ""))
    except binascii.Error as exc:
        raise ClientError(
            "Invalid BASE64 encoding of user data.", "InvalidUserData.Malformed"
        ) from exc
    if len(script) > _USER_DATA:
        raise ClientError(f"User data is limited to {_USER_DATA} bytes", "InvalidParameterValue")
    return script.decode()


def _role_of(template: Mapping[str, Any]) -> str | None:
    """Return the role of the template's instance profile; ``None``: there is no such profile."""
    from moto.iam.models import iam_backends

    arn = (template.get("IamInstanceProfile") or {}).get("Arn", "")
    if not arn:
        return ""
    profiles = iam_backends[ACCOUNT]["aws"].instance_profiles.values()
    found = next((each for each in profiles if each.arn == arn), None)
    if found is None:
        return None
    return next((str(role.arn) for role in found.roles), "")


def _pools(
    region: str, overrides: list[Mapping[str, Any]], template: Mapping[str, Any]
) -> Iterator[tuple[InstanceType, str, str]]:
    """Return types and places in which instances are tried, the cheapest first."""
    from moto.ec2.models import ec2_backends

    backend: Any = ec2_backends[ACCOUNT][region]
    subnets = {each.id: each for zone in backend.subnets.values() for each in zone.values()}
    image = str(template.get("ImageId", "")).removeprefix("resolve:ssm:")
    arch = _IMAGES.get(image, "x86_64")
    found: dict[tuple[str, str], tuple[InstanceType, str, str]] = {}
    for each in overrides:
        subnet = subnets.get(each.get("SubnetId", ""))
        if subnet is None:
            raise ClientError(
                f"The subnet ID '{each.get('SubnetId')}' does not exist", "InvalidSubnetID.NotFound"
            )
        if "InstanceRequirements" in each:
            kinds = fitting(each["InstanceRequirements"], arch)
        elif each["InstanceType"] in TYPES:
            kinds = [TYPES[each["InstanceType"]]]
        else:
            raise ClientError(
                f"Invalid value '{each['InstanceType']}' for InstanceType.", "InvalidParameterValue"
            )
        for kind in kinds:
            found[kind.name, subnet.id] = (kind, subnet.id, subnet.availability_zone)
    if not found:
        raise ClientError(
            "No instance types satisfy the provided instance requirements.",
            "InvalidFleetConfig",
        )
    yield from sorted(found.values(), key=lambda pool: (pool[0].per_hour, pool[2]))


def _fits(instance: Instance, wanted: Mapping[str, Any]) -> bool:
    name, values = wanted["Name"], wanted.get("Values") or ()
    tags = instance.order.tags
    if name.startswith("tag:"):
        return name[4:] in tags and any(fnmatch.fnmatchcase(tags[name[4:]], v) for v in values)
    if name == "tag-key":
        return any(each in tags for each in values)
    if name == "instance-id":
        return instance.id in values
    if name == "instance-state-name":
        return instance.state in values
    if name == "vpc-id":
        return True
    raise ClientError(f"The filter '{name}' is invalid", "InvalidParameterValue")


def _detail(instance: Instance) -> dict[str, Any]:
    """Return an instance as DescribeInstances shows it."""
    order = instance.order
    code, message = instance.state_reason
    found: dict[str, Any] = {
        "InstanceId": instance.id,
        "InstanceType": order.kind.name,
        "Architecture": order.kind.arch,
        "LaunchTime": datetime.fromtimestamp(instance.launched_at, UTC),
        "State": {"Name": instance.state},
        "StateTransitionReason": instance.transition,
        "StateReason": {"Code": code, "Message": message} if code else None,
        "Placement": {"AvailabilityZone": order.zone},
        "SubnetId": order.subnet,
        "CpuOptions": {"CoreCount": order.kind.vcpus, "ThreadsPerCore": 1},
        "PrivateIpAddress": None if instance.ended else instance.address,
        "PublicIpAddress": instance.address if order.public_ip and not instance.ended else None,
        "InstanceLifecycle": "spot" if order.spot else None,
        "Tags": [{"Key": key, "Value": value} for key, value in order.tags.items()],
    }
    return found
