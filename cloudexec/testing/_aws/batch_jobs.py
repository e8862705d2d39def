"""Answers the calls of AWS Batch about jobs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from cloudexec.testing._aws.backends import batch_backend
from cloudexec.testing._aws.batch_resources import find_definition
from cloudexec.testing._aws.engine import Engine
from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.jobs import Job, JobSpec, RetryRule, substituted
from cloudexec.testing._aws.limits import (
    ClientError,
    check_resources,
    check_submit,
    tags_of_task,
)
from cloudexec.testing._aws.logs import DEFAULT_GROUP

__all__ = ["BatchJobs"]

Handler = Callable[[str, Mapping[str, Any]], dict[str, Any]]


class BatchJobs:
    """Answers calls about jobs.

    Args:
        engine: Runs the jobs.
        faults: Has the delay of lists.
    """

    def __init__(self, engine: Engine, faults: Faults) -> None:
        self._engine = engine
        self._faults = faults
        self.handlers: dict[str, Handler] = {
            "DescribeJobs": self._describe,
            "ListJobs": self._list,
            "CancelJob": self._cancel,
            "TerminateJob": self._terminate,
            "CancelJobs": self._cancel_many,
            "TerminateJobs": self._terminate_many,
            "GetJobQueueSnapshot": self._snapshot,
        }

    def submit(self, region: str, parameters: Mapping[str, Any], length: int) -> dict[str, Any]:
        """Answer SubmitJob.

        Args:
            region: The call's region.
            parameters: The call's parameters.
            length: Bytes of the request's body.
        """
        check_submit(parameters, length)
        queue = batch_backend(region).get_job_queue(parameters["jobQueue"])
        if queue is None:
            raise ClientError(f"Job Queue: {parameters['jobQueue']} does not exist")
        if queue.state != "ENABLED":
            raise ClientError(
                f"Error executing request, Exception : JobQueue {queue.name} is DISABLED."
            )
        if bool(parameters.get("shareIdentifier")) != bool(queue.schedule_policy):
            raise ClientError(
                "Error executing request, Exception : shareIdentifier is required for a fair share "
                "queue, and for no other."
            )
        definition = find_definition(region, parameters["jobDefinition"])
        if definition is None or definition.status != "ACTIVE":
            raise ClientError(
                f"JobDefinition {parameters['jobDefinition']} not found or not ACTIVE"
            )
        spec = _spec(region, parameters, queue, definition)
        size = (parameters.get("arrayProperties") or {}).get("size")
        depends_on = [dict(entry) for entry in parameters.get("dependsOn", [])]
        for entry in depends_on:
            if "jobId" in entry and entry["jobId"] not in self._engine.jobs:
                raise ClientError(f"Job {entry['jobId']} does not exist")
        job = self._engine.submit(spec, size, depends_on)
        return {"jobArn": job.arn, "jobName": spec.name, "jobId": job.job_id}

    def tags(self, arn: str) -> dict[str, Any]:
        """Answer ListTagsForResource for a job."""
        job = self._find(arn)
        if job is None:
            raise ClientError(f"{arn} does not exist")
        return {"tags": dict(job.spec.tags)}

    def _describe(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        wanted = parameters["jobs"]
        if not 1 <= len(wanted) <= 100:
            raise ClientError("Number of jobs must be between 1 and 100.")
        with self._engine.lock:
            found = [self._find(identifier) for identifier in dict.fromkeys(wanted)]
            return {"jobs": [job.detail() for job in found if job is not None]}

    def _find(self, identifier: str) -> Job | None:
        return self._engine.jobs.get(identifier.rpartition(":job/")[2] or identifier)

    def _list(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        sources = [
            name for name in ("jobQueue", "arrayJobId", "multiNodeJobId") if parameters.get(name)
        ]
        if len(sources) != 1:
            raise ClientError("Exactly one of jobQueue, arrayJobId, multiNodeJobId is required.")
        filters = parameters.get("filters") or []
        status = parameters.get("jobStatus", "RUNNING")
        with self._engine.lock:
            jobs = self._listed(region, parameters, sources[0])
            if not filters:
                chosen: Iterable[Job] = (job for job in jobs if job.status == status)
            else:
                if len(filters) > 1 or sources[0] != "jobQueue":
                    raise ClientError("One filter at a time, and only with jobQueue.")
                by_share = filters[0]["name"] == "SHARE_IDENTIFIER"
                fits = _filter(filters[0]["name"], filters[0].get("values") or [])
                chosen = (
                    job
                    for job in jobs
                    if fits(job)
                    and (not by_share or "jobStatus" not in parameters or job.status == status)
                )
            # The newest jobs come first, as in AWS; children are sorted by index.
            found = list(chosen)
            if sources[0] == "jobQueue":
                found.reverse()
            largest = 100 if filters else 1000
            size = min(parameters.get("maxResults") or largest, largest)
            start = _token(parameters.get("nextToken"))
            page: dict[str, Any] = {
                "jobSummaryList": [job.summary() for job in found[start : start + size]]
            }
            if start + size < len(found):
                page["nextToken"] = str(start + size)
            return page

    def _listed(self, region: str, parameters: Mapping[str, Any], source: str) -> list[Job]:
        if source == "arrayJobId":
            parent = self._find(parameters["arrayJobId"])
            if parent is None:
                raise ClientError(f"Job {parameters['arrayJobId']} does not exist")
            return parent.children
        if source == "multiNodeJobId":
            return []
        queue = batch_backend(region).get_job_queue(parameters["jobQueue"])
        if queue is None:
            raise ClientError(f"Job Queue: {parameters['jobQueue']} does not exist")
        since = self._faults.listed_since()
        return [
            job
            for job in self._engine.jobs.values()
            if job.parent is None and job.spec.queue_arn == queue.arn and job.created_at <= since
        ]

    def _cancel(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        job = self._find(parameters["jobId"])
        _check_reason(parameters["reason"])
        if job is None:
            raise ClientError(f"Job {parameters['jobId']} does not exist")
        self._engine.cancel(job, parameters["reason"])
        return {}

    def _terminate(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        job = self._find(parameters["jobId"])
        _check_reason(parameters["reason"])
        if job is None:
            raise ClientError(f"Job {parameters['jobId']} does not exist")
        self._engine.terminate(job, parameters["reason"])
        return {}

    def _cancel_many(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return self._many(parameters, self._engine.cancel)

    def _terminate_many(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        return self._many(parameters, self._engine.terminate)

    def _many(
        self, parameters: Mapping[str, Any], stop: Callable[[Job, str], None]
    ) -> dict[str, Any]:
        wanted = parameters["jobs"]
        _check_reason(parameters["reason"])
        if not 1 <= len(wanted) <= 50:
            raise ClientError("Number of jobs must be between 1 and 50.")
        for identifier in wanted:
            job = self._find(identifier)
            # An unknown id counts as successful: "TerminateJobs", AWS Batch API Reference.
            if job is not None:
                stop(job, parameters["reason"])
        return {"successful": list(wanted), "errors": []}

    def _snapshot(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        queue = batch_backend(region).get_job_queue(parameters["jobQueue"])
        if queue is None:
            raise ClientError(f"Job Queue: {parameters['jobQueue']} does not exist")
        now = int(time.time() * 1000)
        with self._engine.lock:
            used = sum(
                self._engine.used(entry["computeEnvironment"]) for entry in queue.env_order_json
            )
            jobs = [
                {
                    "jobArn": job.arn,
                    "earliestTimeAtPosition": int(
                        (job.head_since or job.runnable_at or time.time()) * 1000
                    ),
                }
                for job in self._engine.front(queue.arn)[:100]
            ]
        return {
            "frontOfQueue": {"jobs": jobs, "lastUpdatedAt": now},
            "queueUtilization": {
                "totalCapacityUsage": [{"capacityUnit": "VCPU", "quantity": used}],
                "lastUpdatedAt": now,
            },
        }


def _spec(region: str, parameters: Mapping[str, Any], queue: Any, definition: Any) -> JobSpec:
    if "containerProperties" not in definition.extra:
        raise ClientError("FakeAWS runs definitions with containerProperties only.")
    container = dict(definition.extra["containerProperties"])
    overrides = parameters.get("containerOverrides") or {}
    fargate = "FARGATE" in definition.platform_capabilities
    kinds = {
        environment.compute_resources["type"].startswith("FARGATE")
        for environment in queue.environments
    }
    if kinds != {fargate}:
        raise ClientError(
            "Error executing request, Exception : The job definition's platform capabilities do "
            f"not fit the compute environments of job queue {queue.name}."
        )
    sizes = {entry["type"]: entry for entry in container.get("resourceRequirements", [])}
    sizes.update({entry["type"]: entry for entry in overrides.get("resourceRequirements", [])})
    check_resources(sizes.values(), fargate=fargate)
    values = {**definition.extra.get("parameters", {}), **parameters.get("parameters", {})}
    command = overrides.get("command") or container.get("command") or []
    environment = {
        entry["name"]: entry.get("value", "")
        for entry in [*container.get("environment", []), *overrides.get("environment", [])]
    }
    options = (container.get("logConfiguration") or {}).get("options") or {}
    retry = parameters.get("retryStrategy") or definition.extra.get("retryStrategy") or {}
    timeout = parameters.get("timeout") or definition.extra.get("timeout") or {}
    tags = {**parameters.get("tags", {})}
    propagate = parameters.get("propagateTags", definition.extra.get("propagateTags"))
    handed_over = {
        "command": overrides.get("command", []),
        "environment": [
            *overrides.get("environment", []),
            # Variables that Batch itself adds, with typical lengths.
            {"name": "AWS_BATCH_JOB_ID", "value": "x" * 42},
            {"name": "AWS_BATCH_JOB_ATTEMPT", "value": "1"},
            {"name": "AWS_BATCH_JQ_NAME", "value": queue.name},
            {"name": "AWS_BATCH_CE_NAME", "value": "x" * 32},
        ],
        "resourceRequirements": overrides.get("resourceRequirements", []),
    }
    return JobSpec(
        name=parameters["jobName"],
        region=region,
        queue_arn=queue.arn,
        queue_name=queue.name,
        definition_arn=definition.arn,
        definition_name=definition.name,
        revision=definition.revision,
        image=container["image"],
        command=substituted(command, values),
        parameters=values,
        environment=environment,
        secrets={entry["name"]: entry["valueFrom"] for entry in container.get("secrets", [])},
        vcpus=float(sizes["VCPU"]["value"]),
        memory_mib=int(sizes["MEMORY"]["value"]),
        attempts=retry.get("attempts", 1),
        rules=tuple(
            RetryRule(
                action=rule["action"].upper(),
                on_status_reason=rule.get("onStatusReason"),
                on_reason=rule.get("onReason"),
                on_exit_code=rule.get("onExitCode"),
            )
            for rule in retry.get("evaluateOnExit", [])
        ),
        timeout=timeout.get("attemptDurationSeconds"),
        execution_role=container.get("executionRoleArn"),
        log_group=options.get("awslogs-group", DEFAULT_GROUP),
        log_prefix=options.get("awslogs-stream-prefix", definition.name),
        log_create=options.get("awslogs-create-group") == "true",
        overrides_length=len(json.dumps(handed_over, separators=(",", ":"))),
        container={
            **{key: [] for key in ("volumes", "mountPoints", "ulimits", "secrets")},
            **{key: value for key, value in container.items() if key not in ("image", "command")},
            "image": container["image"],
            "command": list(command),
            "environment": [{"name": name, "value": value} for name, value in environment.items()],
            "resourceRequirements": list(sizes.values()),
            "networkInterfaces": [],
        },
        tags=tags,
        extra={
            "retryStrategy": {"attempts": 1, "evaluateOnExit": [], **retry},
            "timeout": timeout or None,
            "shareIdentifier": parameters.get("shareIdentifier"),
            "schedulingPriority": parameters.get("schedulingPriorityOverride"),
            "propagateTags": propagate,
        },
        tags_of_task=tags_of_task(
            definition.extra.get("tags") or {}, tags, propagate=bool(propagate)
        ),
        fargate=fargate,
    )


def _filter(name: str, values: list[str]) -> Callable[[Job], bool]:
    if name == "JOB_NAME":
        return lambda job: any(_name_fits(value, job.spec.name) for value in values)
    if name == "JOB_DEFINITION":
        # A name without a revision fits every revision.
        return lambda job: any(
            value in (job.spec.definition_arn, job.spec.definition_name)
            or value == f"{job.spec.definition_name}:{job.spec.revision}"
            or _name_fits(value, job.spec.definition_name)
            for value in values
        )
    if name in ("BEFORE_CREATED_AT", "AFTER_CREATED_AT"):
        try:
            limit = int(values[0]) / 1000
        except (ValueError, IndexError):
            raise ClientError(f"{name} takes one time in milliseconds.") from None
        if name == "BEFORE_CREATED_AT":
            return lambda job: job.created_at < limit
        return lambda job: job.created_at > limit
    if name == "SHARE_IDENTIFIER":
        return lambda job: job.spec.extra.get("shareIdentifier") in values
    raise ClientError(f"Filter {name!r} is not supported.")


def _name_fits(pattern: str, name: str) -> bool:
    pattern, name = pattern.lower(), name.lower()
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def _token(text: str | None) -> int:
    try:
        return int(text or 0)
    except ValueError:
        raise ClientError("nextToken is invalid") from None


def _check_reason(reason: str) -> None:
    if len(reason) > 1024:
        raise ClientError("reason is longer than 1024 characters.")
