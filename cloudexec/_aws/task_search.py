"""Finds cloudexec's tasks of Amazon ECS, and describes them as AWS Batch describes jobs.

So the code that lists, prices and stops jobs works for both. A task is a job with one worker: its
id is the last part of the task's ARN, its name is ``startedBy``, and its queue is the cluster.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

from cloudexec._aws.names import JOB_PREFIX, TAG_EXECUTOR
from cloudexec._aws.paced_calls import PacedCalls
from cloudexec._aws.task_requests import CONTAINER, DESCRIBE_TASKS, LOG_PREFIX
from cloudexec._errors import AwsError

__all__ = ["TaskSearch", "is_task_id"]

_TASK_ID = re.compile(r"[0-9a-f]{32}")
_BATCH_CLUSTERS = "AWSBatch-"
"""Prefix of the clusters that AWS Batch creates for itself."""
_NO_CLUSTER = "ClusterNotFoundException"
_STARTING = ("PROVISIONING", "PENDING", "ACTIVATING")
_STOPPED = ("STOPPED", "DELETED")


def is_task_id(name: str) -> bool:
    """Return whether a job's id is that of a task."""
    return _TASK_ID.fullmatch(name) is not None


class TaskSearch:
    """Finds tasks.

    Args:
        calls: Calls to AWS.
        clusters: ARNs or names; ``None``: all clusters of the region that AWS lets us look at,
            except those of AWS Batch.
        public_ip: Whether tasks have public addresses, which Amazon ECS does not report.
        may_be_denied: Whether a given cluster is passed over if AWS does not let us look at it, or
            if it does not exist any more.
    """

    def __init__(
        self,
        calls: PacedCalls,
        clusters: Sequence[str] | None,
        *,
        public_ip: bool,
        may_be_denied: bool = False,
    ) -> None:
        self._calls = calls
        self._given = clusters
        self._public_ip = public_ip
        self._may_be_denied = may_be_denied or clusters is None
        self._definitions: dict[str, Mapping[str, Any]] = {}

    async def jobs(self, name: str = "") -> list[Mapping[str, Any]]:
        """Return all tasks that Amazon ECS remembers. It forgets stopped ones after an hour or so.

        Args:
            name: Only tasks with this ``startedBy``; empty: those of all executors.
        """
        found: list[Mapping[str, Any]] = []
        for cluster in await self._clusters():
            with self._where_allowed():
                arns: list[str] = []
                for status in ("RUNNING", "STOPPED"):
                    listed = self._calls.pages(
                        "ecs", "list_tasks", "taskArns", cluster=cluster, desiredStatus=status
                    )
                    arns += [str(each) async for each in listed]
                found += await self._describe(cluster, arns)
        return [
            each
            for each in found
            if each["jobName"] == name or (not name and each["jobName"].startswith(JOB_PREFIX))
        ]

    async def describe(self, ids: Sequence[str]) -> list[Mapping[str, Any]]:
        """Return the tasks with these ids, if they exist."""
        if not ids:
            return []
        found: list[Mapping[str, Any]] = []
        for cluster in await self._clusters():
            with self._where_allowed():
                found += await self._describe(cluster, ids)
        return found

    @contextlib.contextmanager
    def _where_allowed(self) -> Iterator[None]:
        """Skip a cluster that AWS forbids to look at, unless it was given by name.

        A region may have clusters of other people, and our policy only covers cloudexec's own.
        """
        try:
            yield
        except AwsError as exc:
            is_other = "Denied" not in exc.code and exc.code != _NO_CLUSTER
            if not self._may_be_denied or is_other:
                raise

    async def _clusters(self) -> list[str]:
        if self._given is not None:
            return list(self._given)
        try:
            pages = self._calls.pages("ecs", "list_clusters", "clusterArns")
            found = [str(each) async for each in pages]
        except AwsError as exc:
            if "Denied" not in exc.code:
                raise
            return []  # a user without this permission has no tasks either
        return [each for each in found if _BATCH_CLUSTERS not in each]

    async def _describe(self, cluster: str, tasks: Sequence[str]) -> list[Mapping[str, Any]]:
        pages = [tasks[at : at + DESCRIBE_TASKS] for at in range(0, len(tasks), DESCRIBE_TASKS)]
        try:
            answers = await asyncio.gather(
                *(
                    self._calls.call(
                        "ecs",
                        "describe_tasks",
                        cluster=cluster,
                        tasks=list(page),
                        include=["TAGS"],
                    )
                    for page in pages
                )
            )
        except AwsError as exc:
            if exc.code != _NO_CLUSTER:
                raise
            return []
        found = [each for answer in answers for each in answer["tasks"]]
        ours = [each for each in found if TAG_EXECUTOR in _tags(each)]
        return [self._job(each, await self._definition(each)) for each in ours]

    async def _definition(self, task: Mapping[str, Any]) -> Mapping[str, Any]:
        arn = str(task["taskDefinitionArn"])
        if arn not in self._definitions:
            try:
                answer = await self._calls.call(
                    "ecs", "describe_task_definition", taskDefinition=arn
                )
                self._definitions[arn] = answer["taskDefinition"]
            except AwsError as exc:
                if exc.code != "ClientException" and "Denied" not in exc.code:
                    raise
                self._definitions[arn] = {}  # it was deleted, so its contents are not known
        return self._definitions[arn]

    def _job(self, task: Mapping[str, Any], definition: Mapping[str, Any]) -> Mapping[str, Any]:
        """Describe a task as DescribeJobs describes a job."""
        arn = str(task["taskArn"])
        task_id = arn.rpartition("/")[2]
        own: Mapping[str, Any] = next(iter(task.get("containers", ())), {})
        defined: Mapping[str, Any] = next(iter(definition.get("containerDefinitions", ())), {})
        has_begun = task.get("pullStartedAt") or task.get("startedAt")
        container = {
            "image": own.get("image", ""),
            "exitCode": own.get("exitCode"),
            "reason": own.get("reason"),
            "taskArn": arn,
            "resourceRequirements": [
                {"type": "VCPU", "value": f"{int(task['cpu']) / 1024:g}"},
                {"type": "MEMORY", "value": str(task["memory"])},
            ],
            "runtimePlatform": definition.get("runtimePlatform") or {},
            "ephemeralStorage": definition.get("ephemeralStorage") or {},
            "logConfiguration": defined.get("logConfiguration") or {},
            "networkConfiguration": {
                "assignPublicIp": "ENABLED" if self._public_ip else "DISABLED"
            },
            "logStreamName": f"{LOG_PREFIX}/{CONTAINER}/{task_id}" if has_begun else None,
        }
        job = {
            "jobId": task_id,
            "jobName": task.get("startedBy", ""),
            "jobQueue": task["clusterArn"],
            "jobDefinition": task["taskDefinitionArn"],
            "status": _status(task, own),
            "statusReason": task.get("stoppedReason"),
            "stopCode": task.get("stopCode"),
            "createdAt": _ms(task["createdAt"]),
            "startedAt": _ms(has_begun),
            "stoppedAt": _ms(task.get("stoppedAt")),
            "container": {key: value for key, value in container.items() if value is not None},
            "platformCapabilities": ["FARGATE"],
            "spot": task.get("capacityProviderName") == "FARGATE_SPOT",
            "tags": _tags(task),
        }
        return {key: value for key, value in job.items() if value is not None}


def _tags(task: Mapping[str, Any]) -> dict[str, str]:
    return {str(each["key"]): str(each.get("value", "")) for each in task.get("tags", ())}


def _status(task: Mapping[str, Any], container: Mapping[str, Any]) -> str:
    """Return the state that a job of AWS Batch would have."""
    status = task["lastStatus"]
    if status in _STARTING:
        return "STARTING"
    if status not in _STOPPED:
        return "RUNNING"
    ended_by_itself = task.get("stopCode") == "EssentialContainerExited"
    return "SUCCEEDED" if ended_by_itself and container.get("exitCode") == 0 else "FAILED"


def _ms(at: datetime | None) -> int | None:
    return None if at is None else int(at.timestamp() * 1000)
