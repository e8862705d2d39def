"""Decides whether an IAM policy allows a call, as far as executors make such calls.

The actions and resources that a call needs are those of the Service Authorization Reference. AWS
documents two points in different ways, which are therefore options: the service that AWS Batch
passes roles to, and whether SubmitJob needs the job among its resources.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cloudexec.testing._aws.backends import ACCOUNT, ecs_backend
from cloudexec.testing._aws.instance_permissions import of_ec2
from cloudexec.testing._aws.wire import Call

__all__ = ["Permissions"]

_PREFIXES = {
    "service-quotas": "servicequotas",
    "resourcegroupstaggingapi": "tag",
}
"""By botocore's name of a service: IAM's name, if it differs."""
_S3 = {
    "HeadObject": "GetObject",
    "HeadBucket": "ListBucket",
    "ListObjectsV2": "ListBucket",
    "ListMultipartUploads": "ListBucketMultipartUploads",
    "CopyObject": "PutObject",
    "CreateMultipartUpload": "PutObject",
    "UploadPart": "PutObject",
    "UploadPartCopy": "PutObject",
    "CompleteMultipartUpload": "PutObject",
    "DeleteObjects": "DeleteObject",
}
"""Operations of S3 whose action has another name. "Required permissions for Amazon S3 API
operations", Amazon S3 User Guide."""
_BATCH = {"TerminateJobs": "TerminateJob", "CancelJobs": "CancelJob"}
"""AWS Batch API Reference, "TerminateJobs" and "CancelJobs"."""

_TASKS = "ecs-tasks.amazonaws.com"

Need = tuple[str, str, Mapping[str, str]]
"""An action, a resource (empty for any), and the keys of conditions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Permissions:
    """A policy, and the options of its evaluation."""

    policy: Mapping[str, Any]
    passed_to: str
    """Service that AWS Batch passes roles to."""
    submit_names_jobs: bool
    """Whether SubmitJob needs the job among its resources."""

    def refusal(self, call: Call) -> str | None:
        """Return AWS's message if the policy does not allow a call; ``None`` if it does."""
        for action, resource, keys in self._needs(call):
            if not self._allows(action, resource, keys):
                what = f" on resource: {resource}" if resource else ""
                return (
                    f"User: arn:aws:iam::{ACCOUNT}:user/tester is not authorized to perform: "
                    f"{action}{what} because no identity-based policy allows the {action} action"
                )
        return None

    def _needs(self, call: Call) -> Iterator[Need]:
        if call.service == "batch":
            yield from self._of_batch(call)
        elif call.service == "s3":
            action = _S3.get(call.operation, call.operation)
            key = "" if action.startswith("ListBucket") else call.parameters.get("Key", "")
            if call.operation == "DeleteObjects":
                for each in call.parameters["Delete"]["Objects"]:
                    resource = f"arn:aws:s3:::{call.parameters['Bucket']}/{each['Key']}"
                    yield f"s3:{action}", resource, {}
                return
            bucket = call.parameters.get("Bucket", "")
            resource = f"arn:aws:s3:::{bucket}" + (f"/{key}" if key else "")
            yield f"s3:{action}", resource, {}
        elif call.service == "ecs":
            yield from self._of_ecs(call)
        elif call.service == "ec2":
            yield from of_ec2(call)
        elif call.operation != "GetCallerIdentity":
            # "No permissions are required": AWS STS API Reference, "GetCallerIdentity".
            yield f"{_PREFIXES.get(call.service, call.service)}:{call.operation}", "", {}

    def _of_batch(self, call: Call) -> Iterator[Need]:
        given = call.parameters

        def arn(kind: str, name: str) -> str:
            if name.startswith("arn:"):
                return name
            return f"arn:aws:batch:{call.region}:{ACCOUNT}:{kind}/{name}"

        action = f"batch:{_BATCH.get(call.operation, call.operation)}"
        match call.operation:
            case "SubmitJob":
                yield action, arn("job-queue", given["jobQueue"]), {}
                yield action, arn("job-definition", given["jobDefinition"]), {}
                if self.submit_names_jobs:
                    yield action, arn("job", "new"), {}
                if given.get("tags"):
                    yield "batch:TagResource", arn("job", "new"), {}
            case "RegisterJobDefinition":
                definition = arn("job-definition", given["jobDefinitionName"])
                yield action, definition, {}
                if given.get("tags"):
                    yield "batch:TagResource", definition, {}
                container = given.get("containerProperties") or {}
                for name in ("jobRoleArn", "executionRoleArn"):
                    if role := container.get(name):
                        yield "iam:PassRole", role, {"iam:PassedToService": self.passed_to}
            case "DeregisterJobDefinition":
                yield action, arn("job-definition", given["jobDefinition"]), {}
            case "TerminateJob" | "CancelJob":
                yield action, arn("job", given["jobId"]), {}
            case "TerminateJobs" | "CancelJobs":
                for each in given["jobs"]:
                    yield action, arn("job", each), {}
            case _:
                yield action, "", {}

    def _of_ecs(self, call: Call) -> Iterator[Need]:
        given, action = call.parameters, f"ecs:{call.operation}"
        cluster = given.get("cluster", "default").rpartition("/")[2]
        place = f"arn:aws:ecs:{call.region}:{ACCOUNT}"
        keys = {"ecs:cluster": f"{place}:cluster/{cluster}"}
        new_task = f"{place}:task/{cluster}/new"

        def task(name: str) -> str:
            return name if name.startswith("arn:") else f"{place}:task/{cluster}/{name}"

        match call.operation:
            case "RunTask":
                definition = given["taskDefinition"]
                yield action, definition, keys
                if given.get("tags"):
                    yield "ecs:TagResource", new_task, {}
                family, _, revision = definition.rpartition("/")[2].partition(":")
                known = ecs_backend(call.region).task_definitions.get(family, {})
                found = known.get(int(revision or 0))
                for name in ("task_role_arn", "execution_role_arn"):
                    if role := getattr(found, name, None):
                        yield "iam:PassRole", role, {"iam:PassedToService": _TASKS}
            case "RegisterTaskDefinition":
                yield action, "", {}
                if given.get("tags"):
                    definition = f"{place}:task-definition/{given['family']}:1"
                    yield "ecs:TagResource", definition, {}
                for name in ("taskRoleArn", "executionRoleArn"):
                    if role := given.get(name):
                        yield "iam:PassRole", role, {"iam:PassedToService": _TASKS}
            case "StopTask":
                yield action, task(given["task"]), keys
            case "DescribeTasks":
                for each in given["tasks"]:
                    yield action, task(each), keys
            case "DescribeClusters":
                for each in given.get("clusters", ()):
                    is_arn = each.startswith("arn:")
                    yield action, each if is_arn else f"{place}:cluster/{each}", {}
            case _:
                yield action, "", keys

    def _allows(self, action: str, resource: str, keys: Mapping[str, str]) -> bool:
        return any(
            statement["Effect"] == "Allow"
            and any(_fits(pattern, action.lower()) for pattern in _lower(statement["Action"]))
            and (not resource or any(_fits(p, resource) for p in _several(statement["Resource"])))
            and _holds(statement.get("Condition", {}), keys)
            for statement in _several(self.policy["Statement"])
        )


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _lower(value: Any) -> Iterable[str]:
    return (str(each).lower() for each in _several(value))


def _fits(pattern: str, text: str) -> bool:
    expression = re.escape(pattern).replace(r"\*", ".*").replace(r"\?", ".")
    return re.fullmatch(expression, text) is not None


def _holds(condition: Mapping[str, Mapping[str, Any]], keys: Mapping[str, str]) -> bool:
    """Return whether a condition holds for the request. Tags of resources are not known here."""
    return all(
        any(_fits(pattern, keys[key]) for pattern in _several(wanted))
        for values in condition.values()
        for key, wanted in values.items()
        if key in keys
    )
