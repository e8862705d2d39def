"""Emulates CloudFormation: stacks take time, report each resource, roll back and can get stuck.

moto's own CloudFormation works within the call, ignores unknown resources and never deletes those
of Batch. So stacks are this module's own, while their resources live in moto's back ends.
"""

from __future__ import annotations

import datetime
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from botocore.model import ListShape, MapShape, Shape, StructureShape

from cloudexec.testing._aws.backends import ACCOUNT
from cloudexec.testing._aws.limits import ClientError
from cloudexec.testing._aws.stacks import Stack, StackWork, now
from cloudexec.testing._aws.templates import (
    TemplateError,
    creation_order,
    parse_template,
    resolve_parameters,
)
from cloudexec.testing._aws.wire import Call, Response

__all__ = ["CloudFormation"]

TEMPLATE_MAX = 51_200
"""Bytes of TemplateBody. "AWS CloudFormation quotas", AWS CloudFormation User Guide."""


class CloudFormation:
    """Answers calls to CloudFormation.

    Args:
        work: Creates, changes and deletes stacks.
    """

    def __init__(self, work: StackWork) -> None:
        self._work = work
        self._stacks: dict[str, Stack] = {}
        self._operations: dict[str, Callable[[str, Mapping[str, Any]], dict[str, Any]]] = {
            "CreateStack": self._create,
            "UpdateStack": self._update,
            "DeleteStack": self._delete,
            "DescribeStacks": self._describe,
            "DescribeStackEvents": self._describe_events,
            "DescribeStackResources": self._describe_resources,
            "DescribeStackResource": self._describe_resource,
            "ListStackResources": self._list_resources,
            "ListStacks": self._list,
            "GetTemplate": self._get_template,
            "ValidateTemplate": self._validate,
            "UpdateTerminationProtection": self._protect,
        }

    def answer(self, call: Call) -> Response:
        """Answer one call."""
        operation = self._operations.get(call.operation)
        if operation is None:
            raise ClientError(f"FakeAWS has no {call.operation}", "ValidationError")
        try:
            result = operation(call.region, call.parameters)
        except TemplateError as exc:
            raise ClientError(str(exc), "ValidationError") from exc
        return _xml(call, result)

    def close(self) -> None:
        """Wait until all operations on stacks have stopped."""
        self._work.close()

    # Calls that change stacks.

    def _create(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        name = parameters["StackName"]
        if self._find(region, name, deleted=False) is not None:
            raise ClientError(f"Stack [{name}] already exists", "AlreadyExistsException")
        body = _body(parameters)
        template = parse_template(body)
        creation_order(template["Resources"])
        _check_capabilities(template, parameters.get("Capabilities", []))
        given = {
            entry["ParameterKey"]: entry.get("ParameterValue", "")
            for entry in parameters.get("Parameters", [])
        }
        on_failure = parameters.get("OnFailure", "ROLLBACK")
        if parameters.get("DisableRollback"):
            on_failure = "DO_NOTHING"
        stack = Stack(
            id=f"arn:aws:cloudformation:{region}:{ACCOUNT}:stack/{name}/{uuid.uuid4()}",
            name=name,
            region=region,
            body=body,
            template=template,
            parameters=resolve_parameters(template, given),
            tags={entry["Key"]: entry["Value"] for entry in parameters.get("Tags", [])},
            capabilities=list(parameters.get("Capabilities", [])),
            created=now(),
            on_failure=on_failure,
            protected=bool(parameters.get("EnableTerminationProtection")),
        )
        self._stacks[stack.id] = stack
        stack.event("CREATE_IN_PROGRESS", "User Initiated")
        self._work.create(stack)
        return {"StackId": stack.id}

    def _update(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        stack = self._required(region, parameters["StackName"])
        if not stack.status.endswith("_COMPLETE") or stack.status == "ROLLBACK_COMPLETE":
            raise ClientError(
                f"Stack:{stack.id} is in {stack.status} state and can not be updated.",
                "ValidationError",
            )
        body = stack.body if parameters.get("UsePreviousTemplate") else _body(parameters)
        template = parse_template(body)
        creation_order(template["Resources"])
        _check_capabilities(template, parameters.get("Capabilities", []))
        given = {}
        for entry in parameters.get("Parameters", []):
            key = entry["ParameterKey"]
            if entry.get("UsePreviousValue"):
                if key not in stack.parameters:
                    raise TemplateError(f"Invalid input for parameter key {key}. No previous value")
                given[key] = stack.parameters[key]
            else:
                given[key] = entry.get("ParameterValue", "")
        values = resolve_parameters(template, given)
        tags = stack.tags
        if "Tags" in parameters:
            tags = {entry["Key"]: entry["Value"] for entry in parameters["Tags"]}
        if (template, values, tags) == (stack.template, stack.parameters, stack.tags):
            raise ClientError("No updates are to be performed.", "ValidationError")
        before = (stack.body, stack.template, stack.parameters, stack.tags)
        stack.body, stack.template, stack.parameters, stack.tags = body, template, values, tags
        stack.updated = now()
        stack.event("UPDATE_IN_PROGRESS", "User Initiated")
        self._work.update(stack, before)
        return {"StackId": stack.id}

    def _delete(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        stack = self._find(region, parameters["StackName"], deleted=True)
        if stack is None or stack.status in ("DELETE_COMPLETE", "DELETE_IN_PROGRESS"):
            return {}
        if stack.protected:
            raise ClientError(
                f"Stack [{stack.name}] cannot be deleted while TerminationProtection is enabled",
                "ValidationError",
            )
        retained = parameters.get("RetainResources", [])
        if retained and stack.status != "DELETE_FAILED":
            raise ClientError(
                "Invalid operation on stack: RetainResources needs DELETE_FAILED.",
                "ValidationError",
            )
        stack.event("DELETE_IN_PROGRESS", "User Initiated")
        for name in retained:
            if name in stack.resources:
                stack.gone[name] = stack.resources.pop(name)
                stack.event("DELETE_SKIPPED", resource=stack.gone[name])
        self._work.delete(stack)
        return {}

    def _protect(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        stack = self._required(region, parameters["StackName"])
        stack.protected = parameters["EnableTerminationProtection"]
        return {"StackId": stack.id}

    # Calls that show stacks.

    def _find(self, region: str, name: str, *, deleted: bool) -> Stack | None:
        for stack in self._stacks.values():
            if stack.region != region:
                continue
            if stack.id == name and (deleted or stack.status != "DELETE_COMPLETE"):
                return stack
            if stack.name == name and stack.status != "DELETE_COMPLETE":
                return stack
        return None

    def _required(self, region: str, name: str) -> Stack:
        stack = self._find(region, name, deleted=True)
        if stack is None:
            raise ClientError(f"Stack with id {name} does not exist", "ValidationError")
        return stack

    def _describe(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        if parameters.get("StackName"):
            found = [self._required(region, parameters["StackName"])]
        else:
            found = [
                stack
                for stack in self._stacks.values()
                if stack.region == region and stack.status != "DELETE_COMPLETE"
            ]
        return {"Stacks": [self._shown(stack) for stack in reversed(found)]}

    def _shown(self, stack: Stack) -> dict[str, Any]:
        shown: dict[str, Any] = {
            "StackId": stack.id,
            "StackName": stack.name,
            "Description": stack.template.get("Description"),
            "Parameters": [
                {"ParameterKey": key, "ParameterValue": value}
                for key, value in stack.parameters.items()
            ],
            "CreationTime": stack.created,
            "LastUpdatedTime": stack.updated,
            "DeletionTime": stack.deleted,
            "StackStatus": stack.status,
            "StackStatusReason": stack.reason,
            "DisableRollback": stack.on_failure == "DO_NOTHING",
            "NotificationARNs": [],
            "Capabilities": stack.capabilities,
            "Tags": [{"Key": key, "Value": value} for key, value in stack.tags.items()],
            "EnableTerminationProtection": stack.protected,
            "DriftInformation": {"StackDriftStatus": "NOT_CHECKED"},
        }
        if stack.status in (
            "CREATE_COMPLETE",
            "UPDATE_COMPLETE",
            "UPDATE_COMPLETE_CLEANUP_IN_PROGRESS",
            "UPDATE_ROLLBACK_COMPLETE",
        ):
            evaluator = self._work.evaluator(stack)
            shown["Outputs"] = [
                {
                    "OutputKey": key,
                    "OutputValue": str(evaluator.value(entry["Value"])),
                    "Description": entry.get("Description"),
                }
                for key, entry in stack.template.get("Outputs", {}).items()
                if evaluator.exists(entry)
            ]
        return shown

    def _describe_events(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        stack = self._required(region, parameters["StackName"])
        start = int(parameters.get("NextToken") or 0)
        found = stack.events[::-1]
        page: dict[str, Any] = {"StackEvents": found[start : start + 100]}
        if start + 100 < len(found):
            page["NextToken"] = str(start + 100)
        return page

    def _resource_list(self, stack: Stack) -> list[dict[str, Any]]:
        return [
            {
                "StackName": stack.name,
                "StackId": stack.id,
                "LogicalResourceId": resource.logical_id,
                "PhysicalResourceId": resource.physical_id,
                "ResourceType": resource.type,
                "Timestamp": resource.at,
                "LastUpdatedTimestamp": resource.at,
                "ResourceStatus": resource.status,
                "ResourceStatusReason": resource.reason,
                "DriftInformation": {"StackResourceDriftStatus": "NOT_CHECKED"},
            }
            for resource in {**stack.gone, **stack.resources}.values()
        ]

    def _describe_resources(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        stack = self._required(region, parameters.get("StackName", ""))
        wanted = parameters.get("LogicalResourceId")
        return {
            "StackResources": [
                entry
                for entry in self._resource_list(stack)
                if wanted in (None, entry["LogicalResourceId"])
            ]
        }

    def _describe_resource(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        found = self._describe_resources(region, parameters)["StackResources"]
        if not found:
            raise ClientError(
                f"Resource {parameters['LogicalResourceId']} does not exist for stack "
                f"{parameters['StackName']}",
                "ValidationError",
            )
        return {"StackResourceDetail": found[0]}

    def _list_resources(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        stack = self._required(region, parameters["StackName"])
        return {"StackResourceSummaries": self._resource_list(stack)}

    def _list(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        wanted = parameters.get("StackStatusFilter")
        return {
            "StackSummaries": [
                self._shown(stack)
                for stack in self._stacks.values()
                if stack.region == region and (not wanted or stack.status in wanted)
            ]
        }

    def _get_template(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return {"TemplateBody": self._required(region, parameters["StackName"]).body}

    def _validate(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        template = parse_template(_body(parameters))
        creation_order(template["Resources"])
        return {
            "Description": template.get("Description"),
            "Capabilities": sorted(_capabilities(template)),
            "Parameters": [
                {
                    "ParameterKey": name,
                    "DefaultValue": str(about["Default"]) if "Default" in about else None,
                    "NoEcho": bool(about.get("NoEcho")),
                    "Description": about.get("Description"),
                }
                for name, about in template.get("Parameters", {}).items()
            ],
        }


def _body(parameters: Mapping[str, Any]) -> str:
    body = parameters.get("TemplateBody")
    if not body:
        raise ClientError("FakeAWS takes TemplateBody only.", "ValidationError")
    if len(body.encode()) > TEMPLATE_MAX:
        raise ClientError(
            "1 validation error detected: Value at 'templateBody' failed to satisfy constraint: "
            f"Member must have length less than or equal to {TEMPLATE_MAX}",
            "ValidationError",
        )
    return str(body)


def _capabilities(template: Mapping[str, Any]) -> set[str]:
    needed = set()
    for entry in template["Resources"].values():
        if entry["Type"].startswith("AWS::IAM::"):
            properties = entry.get("Properties", {})
            named = any(key in properties for key in ("RoleName", "InstanceProfileName"))
            needed.add("CAPABILITY_NAMED_IAM" if named else "CAPABILITY_IAM")
    return needed


def _check_capabilities(template: Mapping[str, Any], given: list[str]) -> None:
    missing = _capabilities(template) - set(given)
    if "CAPABILITY_NAMED_IAM" in given:
        missing.discard("CAPABILITY_IAM")
    if missing:
        raise ClientError(
            f"Requires capabilities : [{', '.join(sorted(missing))}]",
            "InsufficientCapabilitiesException",
        )


def _xml(call: Call, result: Mapping[str, Any]) -> Response:
    name = call.operation
    shape = call.model.output_shape
    inner = ""
    if shape is not None:
        inner = f"<{name}Result>{_node(shape, result)}</{name}Result>"
    body = (
        f'<{name}Response xmlns="http://cloudformation.amazonaws.com/doc/2010-05-15/">{inner}'
        f"<ResponseMetadata><RequestId>{uuid.uuid4()}</RequestId></ResponseMetadata>"
        f"</{name}Response>"
    )
    return Response(status=200, body=body.encode(), headers={"Content-Type": "text/xml"})


def _node(shape: Shape, value: Any) -> str:
    if isinstance(shape, StructureShape):
        return "".join(
            f"<{member}>{_node(inner, value[member])}</{member}>"
            for member, inner in shape.members.items()
            if value.get(member) is not None
        )
    if isinstance(shape, ListShape):
        return "".join(f"<member>{_node(shape.member, each)}</member>" for each in value)
    if isinstance(shape, MapShape):
        return "".join(
            f"<entry><key>{key}</key><value>{_node(shape.value, each)}</value></entry>"
            for key, each in value.items()
        )
    if isinstance(value, datetime.datetime):
        return value.strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
