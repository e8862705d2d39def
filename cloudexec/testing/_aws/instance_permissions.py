"""What calls about EC2 instances must be allowed. Service Authorization Reference, "Amazon EC2"."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cloudexec.testing._aws.backends import ACCOUNT
from cloudexec.testing._aws.wire import Call

__all__ = ["of_ec2"]

Need = tuple[str, str, Mapping[str, str]]


def of_ec2(call: Call) -> Iterator[Need]:
    """Yield actions, resources and keys of conditions."""
    given, action = call.parameters, f"ec2:{call.operation}"
    place = f"arn:aws:ec2:{call.region}:{ACCOUNT}"
    match call.operation:
        case "CreateFleet":
            name = given["LaunchTemplateConfigs"][0]["LaunchTemplateSpecification"]
            template = f"{place}:launch-template/{name.get('LaunchTemplateName', '')}"
            yield action, f"{place}:fleet/new", {}
            yield action, template, {}
            for kind in ("subnet", "security-group", "network-interface"):
                yield "ec2:RunInstances", f"{place}:{kind}/new", {}
            yield "ec2:RunInstances", f"arn:aws:ec2:{call.region}::image/ami-0", {}
            yield "ec2:RunInstances", template, {}
            for part in given.get("TagSpecifications", ()):
                kind = part["ResourceType"]
                keys = {f"aws:RequestTag/{each['Key']}": each["Value"] for each in part["Tags"]}
                yield "ec2:RunInstances", f"{place}:{kind}/new", keys
                yield "ec2:CreateTags", f"{place}:{kind}/new", {"ec2:CreateAction": "CreateFleet"}
            yield from _of_template(call.region, name.get("LaunchTemplateName", ""))
        case "CreateLaunchTemplate":
            template = f"{place}:launch-template/new"
            yield action, template, {}
            if given.get("TagSpecifications"):
                yield "ec2:CreateTags", template, {"ec2:CreateAction": "CreateLaunchTemplate"}
        case "TerminateInstances":
            for each in given["InstanceIds"]:
                yield action, f"{place}:instance/{each}", {}
        case _:
            yield action, "", {}


def _of_template(region: str, name: str) -> Iterator[Need]:
    """Yield what the template of a fleet needs: the role of the instances, and the image."""
    from moto.ec2.models import ec2_backends
    from moto.iam.models import iam_backends

    backend: Any = ec2_backends[ACCOUNT][region]
    found = next((each for each in backend.launch_templates.values() if each.name == name), None)
    if found is None:
        return
    data = found.get_version("1").data
    image = str(data.get("ImageId", ""))
    if image.startswith("resolve:ssm:"):
        parameter = image.removeprefix("resolve:ssm:")
        yield "ssm:GetParameters", f"arn:aws:ssm:{region}::parameter{parameter}", {}
    arn = (data.get("IamInstanceProfile") or {}).get("Arn")
    for profile in iam_backends[ACCOUNT]["aws"].instance_profiles.values():
        if profile.arn == arn:
            for role in profile.roles:
                yield "iam:PassRole", role.arn, {"iam:PassedToService": "ec2.amazonaws.com"}
