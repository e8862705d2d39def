"""Answers calls to Amazon ECS about tasks on Fargate and their definitions.

The engine of AWS Batch's jobs runs the tasks, too, each as a job without a queue. moto keeps
clusters and task definitions.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from cloudexec.testing._aws.backends import ecs_backend
from cloudexec.testing._aws.ecs_limits import check_run_task, check_task_definition, size_of_task
from cloudexec.testing._aws.engine import Engine
from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.jobs import Job, JobSpec
from cloudexec.testing._aws.limits import ClientError
from cloudexec.testing._aws.logs import DEFAULT_GROUP
from cloudexec.testing._aws.tasks import Tasks
from cloudexec.testing._aws.token_bucket import TokenBucket
from cloudexec.testing._aws.wire import Call

__all__ = ["Ecs"]

_RUN_TASK_PER_SECOND = 20.0
"""Calls of RunTask that are accepted per second, and at once after a pause. "AWS Fargate throttling
quotas", Amazon ECS Developer Guide."""
_DESCRIBED = 100
NO_CAPACITY = (
    "Capacity is unavailable at this time. Please try again later or in a different availability "
    "zone"
)
"""AWS re:Post, "How do I troubleshoot an Amazon ECS RunTask API for a Fargate task that fails with
a "Capacity is unavailable" error?"."""
NO_QUOTA = "You've reached the limit on the number of vCPUs you can run concurrently"
"""Words that users quote. AWS does not document whether RunTask has them as failure or error."""

Handler = Callable[[str, Mapping[str, Any]], Mapping[str, Any] | None]


class Ecs:
    """Answers calls about tasks and their definitions.

    Args:
        engine: Runs the tasks.
        faults: The faults that a test has requested.
        tasks: Describes the tasks of AWS Batch's jobs, and knows tasks' addresses.
    """

    def __init__(self, engine: Engine, faults: Faults, tasks: Tasks) -> None:
        self._engine = engine
        self._faults = faults
        self._tasks = tasks
        self._calls = TokenBucket(_RUN_TASK_PER_SECOND)
        self._tokens: dict[str, tuple[str, list[Job]]] = {}
        self._handlers: dict[str, Handler] = {
            "RunTask": self._run,
            "DescribeTasks": self._describe,
            "ListTasks": self._list,
            "StopTask": self._stop,
            "RegisterTaskDefinition": self._register,
            "DescribeTaskDefinition": self._describe_definition,
            "DeleteTaskDefinitions": self._delete_definitions,
            "ListTaskDefinitionFamilies": self._families,
            "DeleteCluster": self._delete_cluster,
        }

    def answer(self, call: Call) -> Mapping[str, Any] | None:
        """Answer a call; ``None`` leaves it to moto."""
        found = self._tasks.describe(call)
        if found is not None:
            return found
        handler = self._handlers.get(call.operation)
        return None if handler is None else handler(call.region, call.parameters)

    # Definitions.

    @staticmethod
    def _register(_: str, given: Mapping[str, Any]) -> None:
        check_task_definition(given)

    @staticmethod
    def _describe_definition(region: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        found = dict(_definition(region, given["taskDefinition"]))
        tags = found.pop("tags")
        answer: dict[str, Any] = {"taskDefinition": _without_none(found)}
        if "TAGS" in given.get("include", ()):
            answer["tags"] = [{"key": key, "value": value} for key, value in tags.items()]
        return answer

    def _delete_definitions(self, _: str, given: Mapping[str, Any]) -> Mapping[str, Any] | None:
        if not (reason := self._faults.ecs.definitions_stay):
            return None
        failures = [{"arn": arn, "reason": reason} for arn in given["taskDefinitions"]]
        return {"taskDefinitions": [], "failures": failures}

    @staticmethod
    def _families(region: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        wanted = given.get("status", "ACTIVE")
        families = [
            family
            for family, revisions in ecs_backend(region).task_definitions.items()
            if family.startswith(given.get("familyPrefix", ""))
            and (wanted == "ALL" or any(each.status == wanted for each in revisions.values()))
        ]
        return {"families": sorted(families)}

    def _delete_cluster(self, region: str, given: Mapping[str, Any]) -> None:
        cluster = _cluster(region, given["cluster"])
        if self._engine.active(cluster.arn):
            raise ClientError(
                "The Cluster cannot be deleted while Tasks are active.",
                "ClusterContainsTasksException",
            )

    # Tasks.

    def _run(self, region: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self._calls.take():
            raise ClientError("Rate exceeded", "ThrottlingException")
        cluster = _cluster(region, given.get("cluster", "default"))
        definition = _definition(region, given["taskDefinition"], running=True)
        provider = check_run_task(given, definition, cluster.capacity_providers or ())
        token = given.get("clientToken")
        with self._engine.lock:
            if token is not None:
                known = self._tokens.get(f"{cluster.arn} {token}")
                wanted = json.dumps(given, sort_keys=True)
                if known is not None:
                    return self._again(known, wanted, given)
            jobs, failures = self._start(region, given, cluster, definition, provider)
            if token is not None and jobs:
                self._tokens[f"{cluster.arn} {token}"] = (wanted, jobs)
        return {"tasks": [self._detail(job, given) for job in jobs], "failures": failures}

    def _again(
        self, known: tuple[str, list[Job]], wanted: str, given: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Answer a call whose client token was used before.

        AWS documents that another request with the token is a conflict. For the same request, AWS
        does not document the answer, so a test can choose it.
        """
        before, jobs = known
        if before == wanted and not self._faults.ecs.tokens_conflict:
            return {"tasks": [self._detail(job, given) for job in jobs], "failures": []}
        raise ClientError(
            "The RunTask request could not be processed due to conflicts. The provided clientToken "
            "is already in use with a different RunTask request. The resourceIds are the existing "
            "task ARNs which are already associated with the clientToken.",
            "ConflictException",
            members={"resourceIds": [job.task_arn for job in jobs]},
        )

    def _start(
        self,
        region: str,
        given: Mapping[str, Any],
        cluster: Any,
        definition: Mapping[str, Any],
        provider: str,
    ) -> tuple[list[Job], list[dict[str, Any]]]:
        jobs: list[Job] = []
        failures: list[dict[str, Any]] = []
        spec = _spec(region, given, cluster, definition, provider)
        names = (cluster.arn, cluster.name, provider)
        for _ in range(given.get("count", 1)):
            largest = self._faults.ecs.largest_mib
            fits = largest is None or spec.memory_mib <= largest
            has_capacity = fits and self._faults.has_capacity(*names)
            stops = not has_capacity and self._faults.ecs.tasks_stop_without_capacity
            reason, code = self._faults.ecs.failure()
            if code and not jobs:
                raise ClientError(reason, code)
            if reason:
                failures.append({"arn": None, "reason": reason, "detail": ""})
            elif not has_capacity and not stops:
                failures.append({"arn": None, "reason": NO_CAPACITY})
            elif refusal := self._engine.refuses_task(spec, provider):
                if refusal == "rate":
                    if jobs:
                        failures.append({"arn": None, "reason": "Rate exceeded"})
                        continue
                    raise ClientError("Rate exceeded", "ThrottlingException")
                reason = NO_QUOTA if refusal == "quota" else NO_CAPACITY
                if refusal == "quota" and self._faults.ecs.quota_is_an_error and not jobs:
                    raise ClientError(f"{reason}.")
                failures.append({"arn": None, "reason": reason})
            else:
                jobs.append(self._engine.run_task(spec, NO_CAPACITY if stops else ""))
        return jobs, failures

    def _describe(self, region: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        cluster = _cluster(region, given.get("cluster", "default"))
        wanted = given["tasks"]
        if not 1 <= len(wanted) <= _DESCRIBED:
            raise ClientError(
                f"Tasks must be 1 to {_DESCRIBED} items.", "InvalidParameterException"
            )
        since = self._faults.listed_since()
        tasks, failures = [], []
        with self._engine.lock:
            for each in wanted:
                job = self._engine.jobs.get(each.rpartition("/")[2])
                is_here = job is not None and job.spec.queue_arn == cluster.arn
                is_told = is_here and not self._faults.ecs.is_missing()
                if job is not None and is_told and job.created_at <= since:
                    tasks.append(self._detail(job, given))
                else:
                    arn = each if each.startswith("arn:") else _task_arn(cluster, each)
                    failures.append({"arn": arn, "reason": "MISSING"})
        return {"tasks": tasks, "failures": failures}

    def _list(self, region: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        cluster = _cluster(region, given.get("cluster", "default"))
        filters = ("desiredStatus", "family", "launchType", "serviceName", "containerInstance")
        if given.get("startedBy") and any(given.get(each) for each in filters):
            raise ClientError(
                "When startedBy is given, it must be the only filter.",
                "InvalidParameterException",
            )
        size = given.get("maxResults", 100)
        if not 1 <= size <= 100:
            raise ClientError("maxResults is 1 to 100.", "InvalidParameterException")
        start = int(given.get("nextToken") or 0)
        with self._engine.lock:
            found = [str(job.task_arn) for job in self._listed(cluster.arn, given)]
        page: dict[str, Any] = {"taskArns": found[start : start + size]}
        if start + size < len(found):
            page["nextToken"] = str(start + size)
        return page

    def _listed(self, cluster: str, given: Mapping[str, Any]) -> Iterator[Job]:
        since = self._faults.listed_since()
        desired = given.get("desiredStatus", "RUNNING")
        for job in self._engine.jobs.values():
            if job.spec.queue_arn != cluster or job.created_at > since:
                continue
            extra = job.spec.extra
            if (
                _desired(job) == desired
                and given.get("startedBy") in (None, extra["startedBy"])
                and given.get("family") in (None, job.spec.definition_name)
                and given.get("launchType") in (None, "FARGATE")
            ):
                yield job

    def _stop(self, region: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
        cluster = _cluster(region, given.get("cluster", "default"))
        job = self._engine.jobs.get(given["task"].rpartition("/")[2])
        if job is None or job.spec.queue_arn != cluster.arn:
            raise ClientError("The referenced task was not found.", "InvalidParameterException")
        self._engine.terminate(job, given.get("reason") or "Task stopped by user")
        return {"task": self._detail(job, given)}

    def metadata(self, task_id: str) -> Mapping[str, Any] | None:
        """Return the metadata endpoint's answer about a task; ``None``: the task is not known."""
        with self._engine.lock:
            job = self._engine.jobs.get(task_id)
            if job is None or job.status not in ("STARTING", "RUNNING"):
                return None
            spec = job.spec
            limits = {"CPU": spec.vcpus, "Memory": spec.memory_mib}
            found = {
                "Cluster": spec.queue_arn,
                "TaskARN": job.task_arn,
                "Family": spec.definition_name,
                "Revision": str(spec.revision),
                "DesiredStatus": _desired(job),
                "KnownStatus": "RUNNING",
                "Limits": limits,
                "AvailabilityZone": f"{spec.region}a",
                "LaunchType": "FARGATE",
                "Containers": [
                    {
                        "DockerId": task_id,
                        "Name": spec.container_name,
                        "Image": spec.image,
                        "ContainerARN": f"{job.task_arn}/{spec.container_name}",
                        "Networks": self._tasks.networks(job),
                        "Limits": limits,
                    }
                ],
            }
            if job.pull is not None:
                for name, at in zip(("PullStartedAt", "PullStoppedAt"), job.pull, strict=True):
                    found[name] = f"{datetime.fromtimestamp(at, UTC):%Y-%m-%dT%H:%M:%S.%f}000Z"
            return found

    def _detail(self, job: Job, given: Mapping[str, Any]) -> dict[str, Any]:
        """Describe a task as DescribeTasks does."""
        spec = job.spec
        container: dict[str, Any] = {
            "name": spec.container_name,
            "image": spec.image,
            "taskArn": job.task_arn,
            "lastStatus": "STOPPED" if job.ended else _status(job),
            "exitCode": job.exit_code,
            "reason": job.reason,
        }
        found: dict[str, Any] = {
            "taskArn": job.task_arn,
            "clusterArn": spec.queue_arn,
            "taskDefinitionArn": spec.definition_arn,
            "availabilityZone": f"{spec.region}a",
            "launchType": "FARGATE",
            "capacityProviderName": spec.extra["capacityProviderName"],
            "cpu": f"{spec.vcpus * 1024:g}",
            "memory": str(spec.memory_mib),
            "platformVersion": "1.4.0",
            "group": spec.extra["group"],
            "startedBy": spec.extra["startedBy"],
            "overrides": spec.extra["overrides"],
            "desiredStatus": _desired(job),
            "lastStatus": "STOPPED" if job.ended else _status(job),
            "createdAt": job.created_at,
            "startedAt": job.started_at,
            "stoppedAt": job.stopped_at,
            "executionStoppedAt": job.stopped_at if job.started_at else None,
            "stopCode": self._stop_code(job),
            "stoppedReason": job.status_reason if job.ended else job.stop_reason,
            "containers": [_without_none(container)],
            "attachments": self._tasks.attachments(job),
        }
        if job.pull is not None:
            found["pullStartedAt"], found["pullStoppedAt"] = job.pull
        if job.stopped_at and time.time() < job.stopped_at + self._faults.ecs.deprovisioning:
            found |= {"lastStatus": "DEPROVISIONING", "stoppedAt": None}
        if "TAGS" in given.get("include", ()):
            found["tags"] = [{"key": key, "value": value} for key, value in spec.tags.items()]
        return _without_none(found)

    def _stop_code(self, job: Job) -> str | None:
        if not job.ended and job.stop_kind is None:
            return None
        if job.stop_kind == "terminate":
            return "UserInitiated"
        if job.stop_kind == "reclaim":
            # The guide's sample event and users' reports differ. Amazon ECS Developer Guide,
            # "Amazon ECS clusters for Fargate".
            return self._faults.ecs.spot_stop_code
        if job.stop_kind == "instance":
            return "InfrastructureHealth"
        return "EssentialContainerExited" if job.started_at else "TaskFailedToStart"


def _without_none(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if value is not None}


def _desired(job: Job) -> str:
    return "STOPPED" if job.ended or job.stop_kind is not None else "RUNNING"


def _status(job: Job) -> str:
    """Return the state of a task that has not ended. "Task lifecycle", Developer Guide."""
    if job.stop_kind is not None:
        return "DEACTIVATING"
    if job.status == "RUNNING":
        return "RUNNING"
    return "PENDING" if job.launching else "PROVISIONING"


def _cluster(region: str, name: str) -> Any:
    found = ecs_backend(region).clusters.get(name.rpartition("/")[2])
    if found is None or found.status != "ACTIVE":
        raise ClientError("Cluster not found.", "ClusterNotFoundException")
    return found


def _task_arn(cluster: Any, task_id: str) -> str:
    return f"{cluster.arn.replace(':cluster/', ':task/')}/{task_id}"


def _definition(region: str, name: str, *, running: bool = False) -> Mapping[str, Any]:
    """Return a task definition; without a revision, the latest ACTIVE one."""
    family, _, revision = name.rpartition("/")[2].partition(":")
    revisions = ecs_backend(region).task_definitions.get(family, {})
    if revision:
        found = revisions.get(int(revision))
    else:
        active = [each for each in revisions.values() if each.status == "ACTIVE"]
        found = max(active, key=lambda each: each.revision, default=None)
    if found is None:
        words = "TaskDefinition not found." if running else "Unable to describe task definition."
        raise ClientError(words)
    if running and found.status != "ACTIVE":
        raise ClientError("TaskDefinition is inactive")
    return {
        "taskDefinitionArn": found.arn,
        "family": found.family,
        "revision": found.revision,
        "containerDefinitions": found.container_definitions,
        "status": found.status,
        "networkMode": found.network_mode,
        "requiresCompatibilities": found.requires_compatibilities,
        "runtimePlatform": found.runtime_platform,
        "ephemeralStorage": found.ephemeral_storage,
        "cpu": found.cpu,
        "memory": found.memory,
        "executionRoleArn": getattr(found, "execution_role_arn", None),
        "taskRoleArn": getattr(found, "task_role_arn", None),
        "tags": {each["key"]: each["value"] for each in found.tags or ()},
    }


def _spec(
    region: str,
    given: Mapping[str, Any],
    cluster: Any,
    definition: Mapping[str, Any],
    provider: str,
) -> JobSpec:
    overrides = given.get("overrides") or {}
    container = definition["containerDefinitions"][0]
    own: Mapping[str, Any] = next(iter(overrides.get("containerOverrides", ())), {})
    vcpus, memory_mib = size_of_task(definition, overrides)
    environment = {
        each["name"]: each.get("value", "")
        for each in [*container.get("environment", ()), *own.get("environment", ())]
    }
    options = (container.get("logConfiguration") or {}).get("options") or {}
    tags = {each["key"]: each.get("value", "") for each in given.get("tags", ())}
    if given.get("propagateTags") == "TASK_DEFINITION":
        tags = {**definition["tags"], **tags}
    network = given["networkConfiguration"]["awsvpcConfiguration"]
    started_by = given.get("startedBy")
    return JobSpec(
        name=started_by or definition["family"],
        region=region,
        queue_arn=cluster.arn,
        queue_name=cluster.name,
        definition_arn=definition["taskDefinitionArn"],
        definition_name=definition["family"],
        revision=int(definition["revision"]),
        image=container["image"],
        command=tuple(own.get("command") or container.get("command") or ()),
        parameters={},
        environment=environment,
        secrets={each["name"]: each["valueFrom"] for each in container.get("secrets", ())},
        vcpus=vcpus,
        memory_mib=memory_mib,
        attempts=1,
        rules=(),
        timeout=None,
        execution_role=overrides.get("executionRoleArn") or definition["executionRoleArn"],
        log_group=options.get("awslogs-group", DEFAULT_GROUP),
        log_prefix=options.get("awslogs-stream-prefix", ""),
        log_create=options.get("awslogs-create-group") == "true",
        overrides_length=0,  # RunTask has checked it
        tags_of_task=len(tags),
        container={
            "networkConfiguration": {"assignPublicIp": network.get("assignPublicIp")},
            "jobRoleArn": overrides.get("taskRoleArn") or definition["taskRoleArn"] or "",
        },
        tags=tags,
        extra={
            "startedBy": started_by,
            "group": given.get("group") or f"family:{definition['family']}",
            "overrides": overrides,
            # AWS does not document the provider of a task that was started with a launch type.
            "capacityProviderName": provider if given.get("capacityProviderStrategy") else None,
            "retryStrategy": {},
        },
        fargate=True,
        cluster=cluster.name,
        container_name=container["name"],
        stop_timeout=float(container.get("stopTimeout", 30)),
        provider=provider,
    )
