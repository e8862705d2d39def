"""CloudFormation's stacks, and the threads that create, change and delete them."""

from __future__ import annotations

import datetime
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cloudexec.testing._aws.backends import ACCOUNT
from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.limits import ClientError
from cloudexec.testing._aws.stack_resources import Resource, ResourceError, StackResources
from cloudexec.testing._aws.templates import Evaluator, TemplateError, creation_order

__all__ = ["Stack", "StackWork", "now"]


@dataclass(slots=True, kw_only=True, eq=False)
class Stack:
    """One stack. The gateway's lock over moto protects all fields."""

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
    """Existing resources, in the order of creation."""
    gone: dict[str, Resource] = field(default_factory=dict)
    """Deleted resources."""
    events: list[dict[str, Any]] = field(default_factory=list)

    def event(
        self, status: str, reason: str | None = None, resource: Resource | None = None
    ) -> None:
        """Record an event of the stack or of one of its resources."""
        entry: dict[str, Any] = {
            "StackId": self.id,
            "EventId": str(uuid.uuid4()),
            "StackName": self.name,
            "LogicalResourceId": resource.logical_id if resource else self.name,
            "PhysicalResourceId": (resource.physical_id if resource else self.id) or "",
            "ResourceType": resource.type if resource else "AWS::CloudFormation::Stack",
            "Timestamp": now(),
            "ResourceStatus": status,
        }
        if reason is not None:
            entry["ResourceStatusReason"] = reason
        self.events.append(entry)
        if resource is None:
            self.status, self.reason = status, reason
        else:
            resource.status, resource.reason, resource.at = status, reason, now()


class StackWork:
    """Changes stacks, each change in a thread of its own.

    Args:
        resources: Creates and deletes resources.
        faults: Knows which resources fail.
        lock: Held while moto's state is used.
        seconds: Duration of an operation on a stack.
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
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []

    def create(self, stack: Stack) -> None:
        """Create a stack's resources."""
        self._begin(lambda: self._carry_out_create(stack))

    def update(self, stack: Stack, before: tuple[Any, ...]) -> None:
        """Change a stack's resources to those of its new template."""
        self._begin(lambda: self._carry_out_update(stack, before))

    def delete(self, stack: Stack) -> None:
        """Delete a stack's resources."""
        self._begin(lambda: self._carry_out_delete(stack))

    def close(self) -> None:
        """Wait until all operations have stopped."""
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def evaluator(self, stack: Stack) -> Evaluator:
        """Return the evaluator of a stack's template."""

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

    def _begin(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, name="fake-aws-stack", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _pause(self, steps: int) -> bool:
        """Wait before the next of ``steps`` steps; return whether to go on."""
        return not self._closed.wait(self._seconds / max(steps, 1))

    def _carry_out_create(self, stack: Stack) -> None:
        evaluator = self.evaluator(stack)
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
        """Create missing resources; return the name of the first that fails."""
        wanted = stack.template["Resources"]
        names = [
            name
            for name in creation_order(wanted)
            if name not in stack.resources and evaluator.exists(wanted[name])
        ]
        for name in names:
            entry = wanted[name]
            resource = Resource(logical_id=name, type=entry["Type"], at=now())
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
        evaluator = self.evaluator(stack)
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
        evaluator = self.evaluator(stack)
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
                stack.deleted = now()
                stack.event("DELETE_COMPLETE")

    def _remove(self, stack: Stack, names: list[str]) -> list[str]:
        """Delete resources in the given order; return those that could not be deleted."""
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
                    except Exception as exc:  # any exception of moto is the resource's failure
                        stack.event("DELETE_FAILED", str(exc) or repr(exc), resource)
                        stuck.append(name)
                        break
                if self._closed.wait(0.02):
                    return stuck
        return stuck


def now() -> datetime.datetime:
    """Return the time in the form of CloudFormation's answers."""
    return datetime.datetime.now(datetime.UTC)
