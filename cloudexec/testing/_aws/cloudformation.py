"""CloudFormation: stacks that take their time, report each resource, roll back and can get stuck.

moto's own makes and deletes everything within the call, drops what it does not know and leaves
Batch's resources standing; here resources are moto's (and ours), stacks are this module's.
"""

from __future__ import annotations

import datetime
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from botocore.model import ListShape, MapShape, Shape, StructureShape

from cloudexec.testing._aws.backends import ACCOUNT
from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.limits import ClientError
from cloudexec.testing._aws.stack_resources import Resource, ResourceError, StackResources
from cloudexec.testing._aws.templates import (
    Evaluator,
    TemplateError,
    creation_order,
    parse_template,
    resolve_parameters,
)
from cloudexec.testing._aws.wire import Call, Response

__all__ = ["CloudFormation"]

TEMPLATE_MAX = 51_200
"""Bytes of TemplateBody. "AWS CloudFormation quotas", AWS CloudFormation User Guide."""


@dataclass(slots=True, kw_only=True, eq=False)
class Stack:
    """One stack. Every field belongs to the gateway's lock over moto."""

    id: str
    name: str
    region: str
    body: str
    template: dict[str, Any]
    parameters: dict[str, str]
    tags: dict[str, str]
    capabilities: list[str]
    created: datetime.datetime
    status: str = "CREATE_IN_PROGRESS"
    reason: str | None = None
    updated: datetime.datetime | None = None
    deleted: datetime.datetime | None = None
    on_failure: str = "ROLLBACK"
    protected: bool = False
    resources: dict[str, Resource] = field(default_factory=dict)
    """Those that exist, in the order of creation."""
    gone: dict[str, Resource] = field(default_factory=dict)
    """Those that have been deleted."""
    events: list[dict[str, Any]] = field(default_factory=list)

    def event(
        self, status: str, reason: str | None = None, resource: Resource | None = None
    ) -> None:
        """Note what has happened to the stack or one of its resources."""
        entry: dict[str, Any] = {
            "StackId": self.id,
            "EventId": str(uuid.uuid4()),
            "StackName": self.name,
            "LogicalResourceId": resource.logical_id if resource else self.name,
            "PhysicalResourceId": (resource.physical_id if resource else self.id) or "",
            "ResourceType": resource.type if resource else "AWS::CloudFormation::Stack",
            "Timestamp": _now(),
            "ResourceStatus": status,
        }
        if reason is not None:
            entry["ResourceStatusReason"] = reason
        self.events.append(entry)
        if resource is None:
            self.status, self.reason = status, reason
        else:
            resource.status, resource.reason, resource.at = status, reason, _now()


class CloudFormation:
    """Carries out CloudFormation calls.

    Args:
        resources: Makes and deletes resources.
        faults: Which resources fail.
        lock: Held while moto's state is touched.
        seconds: How long an operation on a stack takes.
    """

    def __init__(
        self,
        resources: StackResources,
        faults: Faults,
        lock: threading.RLock,
        seconds: float,
    ) -> None:
        self._resources = resources
        self._faults = faults
        self._lock = lock
        self._seconds = seconds
        self._stacks: dict[str, Stack] = {}
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
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
        """Wait for what is under way to stop."""
        self._closed.set()
        for thread in self._threads:
            thread.join()

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
            created=_now(),
            on_failure=on_failure,
            protected=bool(parameters.get("EnableTerminationProtection")),
        )
        self._stacks[stack.id] = stack
        stack.event("CREATE_IN_PROGRESS", "User Initiated")
        self._begin(lambda: self._carry_out_create(stack))
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
        stack.updated = _now()
        stack.event("UPDATE_IN_PROGRESS", "User Initiated")
        self._begin(lambda: self._carry_out_update(stack, before))
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
        self._begin(lambda: self._carry_out_delete(stack))
        return {}

    def _protect(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        stack = self._required(region, parameters["StackName"])
        stack.protected = parameters["EnableTerminationProtection"]
        return {"StackId": stack.id}

    # What the threads do.

    def _begin(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="fake-aws-stack", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _pause(self, steps: int) -> bool:
        """Let time pass before the next of so many steps; whether to go on."""
        return not self._closed.wait(self._seconds / max(steps, 1))

    def _carry_out_create(self, stack: Stack) -> None:
        evaluator = self._evaluator(stack)
        failed = self._make_missing(stack, evaluator, "CREATE")
        if self._closed.is_set():
            return
        with self._lock:
            if failed is None:
                stack.event("CREATE_COMPLETE")
                return
            reason = f"The following resource(s) failed to create: [{failed}]. "
            if stack.on_failure == "DO_NOTHING":
                stack.event("CREATE_FAILED", reason)
                return
            if stack.on_failure == "DELETE":
                stack.event("DELETE_IN_PROGRESS", reason + "Delete requested by user.")
            else:
                stack.event("ROLLBACK_IN_PROGRESS", reason + "Rollback requested by user.")
        if stack.on_failure == "DELETE":
            self._carry_out_delete(stack)
            return
        stuck = self._remove(stack, list(reversed(stack.resources)))
        with self._lock:
            stack.event("ROLLBACK_FAILED" if stuck else "ROLLBACK_COMPLETE")

    def _make_missing(self, stack: Stack, evaluator: Evaluator, verb: str) -> str | None:
        """Create what does not exist yet; the name of the first that fails."""
        wanted = stack.template["Resources"]
        names = [
            name
            for name in creation_order(wanted)
            if name not in stack.resources and evaluator.exists(wanted[name])
        ]
        for name in names:
            entry = wanted[name]
            resource = Resource(logical_id=name, type=entry["Type"], at=_now())
            with self._lock:
                stack.event("CREATE_IN_PROGRESS", resource=resource)
            if not self._pause(len(names)):
                return None
            with self._lock:
                try:
                    failure = self._faults.resource_failure(name)
                    if failure is not None:
                        raise ResourceError(failure)
                    resource.policy = entry.get("DeletionPolicy", "Delete")
                    resource.properties = evaluator.value(entry.get("Properties", {}))
                    self._resources.create(stack.region, stack.name, stack.tags, resource)
                except (ResourceError, TemplateError, ClientError) as exc:
                    stack.event("CREATE_FAILED", str(exc), resource)
                    return name
                stack.resources[name] = resource
                stack.event("CREATE_COMPLETE", resource=resource)
        return None

    def _carry_out_update(self, stack: Stack, before: tuple[Any, ...]) -> None:
        evaluator = self._evaluator(stack)
        failed = self._make_missing(stack, evaluator, "UPDATE")
        wanted = stack.template["Resources"]
        for name in list(stack.resources):
            if failed is not None or self._closed.is_set():
                break
            if name not in wanted or not evaluator.exists(wanted[name]):
                continue
            resource = stack.resources[name]
            with self._lock:
                try:
                    properties = evaluator.value(wanted[name].get("Properties", {}))
                    if properties == resource.properties:
                        continue
                    stack.event("UPDATE_IN_PROGRESS", resource=resource)
                    failure = self._faults.resource_failure(name)
                    if failure is not None:
                        raise ResourceError(failure)
                    self._resources.update(stack.region, resource, properties)
                    resource.properties = properties
                except (ResourceError, TemplateError, ClientError) as exc:
                    stack.event("UPDATE_FAILED", str(exc), resource)
                    failed = name
                else:
                    stack.event("UPDATE_COMPLETE", resource=resource)
        if self._closed.is_set():
            return
        if failed is not None:
            self._undo_update(stack, before, failed)
            return
        with self._lock:
            stack.event("UPDATE_COMPLETE_CLEANUP_IN_PROGRESS")
        surplus = [
            name
            for name in reversed(stack.resources)
            if name not in wanted or not evaluator.exists(wanted[name])
        ]
        self._remove(stack, surplus)
        with self._lock:
            stack.event("UPDATE_COMPLETE")

    def _undo_update(self, stack: Stack, before: tuple[Any, ...], failed: str) -> None:
        with self._lock:
            stack.event(
                "UPDATE_ROLLBACK_IN_PROGRESS",
                f"The following resource(s) failed to update: [{failed}]. ",
            )
            stack.body, stack.template, stack.parameters, stack.tags = before
        evaluator = self._evaluator(stack)
        wanted = stack.template["Resources"]
        self._remove(
            stack,
            [
                name
                for name in reversed(stack.resources)
                if name not in wanted or not evaluator.exists(wanted[name])
            ],
        )
        with self._lock:
            for name, resource in stack.resources.items():
                properties = evaluator.value(wanted[name].get("Properties", {}))
                if properties != resource.properties:
                    self._resources.update(stack.region, resource, properties)
                    resource.properties = properties
            stack.event("UPDATE_ROLLBACK_COMPLETE")

    def _carry_out_delete(self, stack: Stack) -> None:
        stuck = self._remove(stack, list(reversed(stack.resources)))
        if self._closed.is_set():
            return
        with self._lock:
            if stuck:
                stack.event(
                    "DELETE_FAILED",
                    f"The following resource(s) failed to delete: [{', '.join(stuck)}]. ",
                )
            else:
                stack.deleted = _now()
                stack.event("DELETE_COMPLETE")

    def _remove(self, stack: Stack, names: list[str]) -> list[str]:
        """Delete resources in the given order; those that could not be."""
        stuck: list[str] = []
        for name in names:
            resource = stack.resources[name]
            if resource.policy == "Retain":
                with self._lock:
                    stack.gone[name] = stack.resources.pop(name)
                    stack.event("DELETE_SKIPPED", resource=resource)
                continue
            with self._lock:
                stack.event("DELETE_IN_PROGRESS", resource=resource)
            if not self._pause(len(names)):
                return stuck
            deadline = time.monotonic() + 60.0
            while True:
                with self._lock:
                    try:
                        self._resources.prepare_deletion(stack.region, resource)
                        waits = self._resources.must_wait(resource)
                        if not waits or time.monotonic() > deadline:
                            self._resources.delete(stack.region, resource)
                            stack.gone[name] = stack.resources.pop(name)
                            stack.event("DELETE_COMPLETE", resource=resource)
                            break
                    except Exception as exc:  # whatever moto raises is the resource's failure
                        stack.event("DELETE_FAILED", str(exc) or repr(exc), resource)
                        stuck.append(name)
                        break
                if self._closed.wait(0.02):
                    return stuck
        return stuck

    def _evaluator(self, stack: Stack) -> Evaluator:
        def reference(name: str) -> Any:
            if name in stack.resources:
                return stack.resources[name].physical_id
            raise TemplateError(f"Template format error: Unresolved resource dependencies [{name}]")

        def attribute(name: str, attribute: str) -> Any:
            if name not in stack.resources:
                raise TemplateError(
                    "Template error: instance of Fn::GetAtt references undefined resource " + name
                )
            return self._resources.attribute(stack.resources[name], attribute)

        pseudo = {
            "AWS::AccountId": ACCOUNT,
            "AWS::Region": stack.region,
            "AWS::StackId": stack.id,
            "AWS::StackName": stack.name,
            "AWS::URLSuffix": "amazonaws.com",
            "AWS::Partition": "aws",
        }
        return Evaluator(stack.template, stack.parameters, pseudo, reference, attribute)

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
            evaluator = self._evaluator(stack)
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


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


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
