"""Answers the calls of AWS Batch about compute environments, queues and job definitions.

They are stored in moto's back end as moto's objects. Their attribute ``extra`` keeps all parameters
of the request, because moto keeps only some.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from cloudexec.testing._aws.backends import ACCOUNT, batch_backend
from cloudexec.testing._aws.engine import Engine
from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.limits import (
    NAME,
    ClientError,
    check_compute_environment,
    check_compute_resources,
    check_definition,
    check_tags,
)

__all__ = ["BatchResources"]

QUOTA = 50
"""Largest number of compute environments, and of queues. "AWS Batch service quotas", AWS Batch User
Guide."""

Handler = Callable[[str, Mapping[str, Any]], dict[str, Any]]

_NO_CONTAINER = {"image": "none", "vcpus": 1, "memory": 4}
"""Container that moto demands of a definition with ``ecsProperties``."""


class BatchResources:
    """Answers calls about compute environments, queues and definitions.

    Args:
        engine: Runs the jobs, which keep environments and queues from being deleted.
        faults: Knows which environments are INVALID.
    """

    def __init__(self, engine: Engine, faults: Faults) -> None:
        self._engine = engine
        self._faults = faults
        self.handlers: dict[str, Handler] = {
            "CreateComputeEnvironment": self.create_environment,
            "DescribeComputeEnvironments": self._describe_environments,
            "UpdateComputeEnvironment": self._update_environment,
            "DeleteComputeEnvironment": self.delete_environment,
            "CreateJobQueue": self.create_queue,
            "DescribeJobQueues": self._describe_queues,
            "UpdateJobQueue": self.update_queue,
            "DeleteJobQueue": self.delete_queue,
            "RegisterJobDefinition": self._register,
            "DeregisterJobDefinition": self._deregister,
            "DescribeJobDefinitions": self._describe_definitions,
        }

    # Compute environments.

    def create_environment(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Answer CreateComputeEnvironment."""
        from moto.batch.models import ComputeEnvironment

        check_compute_environment(parameters)
        backend = batch_backend(region)
        name = parameters["computeEnvironmentName"]
        if backend.get_compute_environment_by_name(name) is not None:
            raise ClientError(f"Object already exists: {name}")
        if len(backend._compute_environments) >= QUOTA:
            raise ClientError(f"Compute environment limit of {QUOTA} reached.")
        resources = dict(parameters.get("computeResources") or {})
        role = parameters.get("serviceRole") or (
            f"arn:aws:iam::{ACCOUNT}:role/aws-service-role/batch.amazonaws.com/"
            "AWSServiceRoleForBatch"
        )
        _check_network(backend, resources)
        if parameters.get("serviceRole"):
            _check_role(backend, role)
        if not resources["type"].startswith("FARGATE"):
            _check_profile(backend, resources["instanceRole"])
            resources.setdefault("minvCpus", 0)
            resources.setdefault("desiredvCpus", resources["minvCpus"])
        environment = ComputeEnvironment(  # type: ignore[abstract]  # moto's own, made so by moto too
            name,
            parameters["type"],
            "ENABLED",
            resources,
            role,
            account_id=ACCOUNT,
            region_name=region,
        )
        environment.extra = {"uuid": f"{name}-{int(time.time())}"}  # type: ignore[attr-defined]
        cluster = f"AWSBatch-{name}"
        environment.set_ecs(f"arn:aws:ecs:{region}:{ACCOUNT}:cluster/{cluster}", cluster)
        backend._compute_environments[environment.arn] = environment
        if parameters.get("tags"):
            backend.tag_resource(environment.arn, parameters["tags"])
        return {"computeEnvironmentName": name, "computeEnvironmentArn": environment.arn}

    def _describe_environments(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        backend = batch_backend(region)
        wanted = parameters.get("computeEnvironments")
        found = [
            self._environment(backend, environment)
            for environment in list(backend._compute_environments.values())
            if not wanted or environment.arn in wanted or environment.name in wanted
        ]
        return _page("computeEnvironments", found, parameters, 100)

    def _environment(self, backend: Any, environment: Any) -> dict[str, Any]:
        broken = self._faults.role_is_broken(environment.arn, environment.name)
        return {
            "computeEnvironmentName": environment.name,
            "computeEnvironmentArn": environment.arn,
            "ecsClusterArn": environment.ecs_arn,
            "tags": backend.list_tags_for_resource(environment.arn),
            "type": environment.env_type,
            "state": environment.state,
            "status": "INVALID" if broken else "VALID",
            "statusReason": (
                "CLIENT_ERROR - Not authorized to perform sts:AssumeRole (Service: AWSSecurity"
                "TokenService; Status Code: 403; Error Code: AccessDenied)"
                if broken
                else "ComputeEnvironment Healthy"
            ),
            "computeResources": environment.compute_resources,
            "serviceRole": environment.service_role,
            "containerOrchestrationType": "ECS",
            "uuid": environment.extra["uuid"],
        }

    def _update_environment(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        environment = self._required_environment(region, parameters["computeEnvironment"])
        if parameters.get("state"):
            environment.state = parameters["state"]
        resources = parameters.get("computeResources") or {}
        check_compute_resources(environment.compute_resources["type"], resources)
        environment.compute_resources = {**environment.compute_resources, **resources}
        if parameters.get("serviceRole"):
            _check_role(batch_backend(region), parameters["serviceRole"])
            environment.service_role = parameters["serviceRole"]
        self._engine.poke()
        return {
            "computeEnvironmentName": environment.name,
            "computeEnvironmentArn": environment.arn,
        }

    def delete_environment(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Answer DeleteComputeEnvironment."""
        backend = batch_backend(region)
        environment = self._required_environment(region, parameters["computeEnvironment"])
        if environment.state != "DISABLED":
            raise ClientError("Cannot delete, compute environment is not in DISABLED state")
        for queue in list(backend._job_queues.values()):
            for entry in queue.env_order_json:
                if entry["computeEnvironment"] in (environment.arn, environment.name):
                    raise ClientError("Cannot delete, found existing JobQueue relationship")
        if self._engine.in_environment(environment.arn):
            raise ClientError("Cannot delete, compute environment has active jobs")
        del backend._compute_environments[environment.arn]
        return {}

    def _required_environment(self, region: str, identifier: str) -> Any:
        environment = batch_backend(region).get_compute_environment(identifier)
        if environment is None:
            raise ClientError(f"{identifier} does not exist")
        return environment

    # Queues.

    def create_queue(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Answer CreateJobQueue."""
        from moto.batch.models import JobQueue

        backend = batch_backend(region)
        name = parameters["jobQueueName"]
        if not NAME.fullmatch(name):
            raise ClientError(f"Job queue name {name!r} does not fit the pattern.")
        check_tags(parameters.get("tags"))
        if backend.get_job_queue_by_name(name) is not None:
            raise ClientError(f"Object already exists: {name}")
        if len(backend._job_queues) >= QUOTA:
            raise ClientError(f"Job queue limit of {QUOTA} reached.")
        order = self._order(region, parameters["computeEnvironmentOrder"])
        limits = parameters.get("jobStateTimeLimitActions", [])
        _check_limits(limits)
        queue = JobQueue(  # type: ignore[abstract]  # moto's own, made so by moto too
            name,
            parameters["priority"],
            parameters.get("state", "ENABLED"),
            [self._required_environment(region, entry["computeEnvironment"]) for entry in order],
            order,
            schedule_policy=parameters.get("schedulingPolicyArn"),
            backend=backend,
            tags=parameters.get("tags"),
        )
        queue.extra = {"jobStateTimeLimitActions": limits}  # type: ignore[attr-defined]
        if "jobQueueType" in parameters:
            queue.extra["jobQueueType"] = parameters["jobQueueType"]  # type: ignore[attr-defined]
        backend._job_queues[queue.arn] = queue
        return {"jobQueueName": name, "jobQueueArn": queue.arn}

    def _order(self, region: str, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if not 1 <= len(entries) <= 3:
            raise ClientError("A job queue takes 1 to 3 compute environments.")
        found = []
        for entry in sorted(entries, key=lambda entry: int(entry["order"])):
            environment = self._required_environment(region, entry["computeEnvironment"])
            if self._faults.role_is_broken(environment.arn, environment.name):
                raise ClientError(f"{environment.arn} is not VALID")
            found.append((entry, environment))
        if len({"FARGATE" in found[1].compute_resources["type"] for found in found}) > 1:
            raise ClientError("Compute environments of EC2 and Fargate cannot share a job queue.")
        return [
            {"order": int(entry["order"]), "computeEnvironment": environment.arn}
            for entry, environment in found
        ]

    def _describe_queues(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        backend = batch_backend(region)
        wanted = parameters.get("jobQueues")
        found = []
        for queue in list(backend._job_queues.values()):
            if wanted and queue.arn not in wanted and queue.name not in wanted:
                continue
            shown = {
                "jobQueueName": queue.name,
                "jobQueueArn": queue.arn,
                "state": queue.state,
                "status": "VALID",
                "statusReason": "JobQueue Healthy",
                "priority": int(queue.priority),
                "computeEnvironmentOrder": queue.env_order_json,
                "tags": backend.list_tags_for_resource(queue.arn),
                **queue.extra,
            }
            if queue.schedule_policy:
                shown["schedulingPolicyArn"] = queue.schedule_policy
            found.append(shown)
        return _page("jobQueues", found, parameters, 100)

    def update_queue(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Answer UpdateJobQueue."""
        queue = self._required_queue(region, parameters["jobQueue"])
        if "computeEnvironmentOrder" in parameters:
            order = self._order(region, parameters["computeEnvironmentOrder"])
            queue.env_order_json = order
            queue.environments = [
                self._required_environment(region, entry["computeEnvironment"]) for entry in order
            ]
        if "jobStateTimeLimitActions" in parameters:
            _check_limits(parameters["jobStateTimeLimitActions"])
            queue.extra["jobStateTimeLimitActions"] = parameters["jobStateTimeLimitActions"]
        queue.state = parameters.get("state", queue.state)
        queue.priority = parameters.get("priority", queue.priority)
        self._engine.poke()
        return {"jobQueueName": queue.name, "jobQueueArn": queue.arn}

    def delete_queue(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Answer DeleteJobQueue."""
        queue = self._required_queue(region, parameters["jobQueue"])
        if queue.state != "DISABLED":
            raise ClientError("Cannot delete, job queue is not in DISABLED state")
        self._engine.delete_queue(queue.arn)
        batch_backend(region)._job_queues.pop(queue.arn, None)
        return {}

    def _required_queue(self, region: str, identifier: str) -> Any:
        queue = batch_backend(region).get_job_queue(identifier)
        if queue is None:
            raise ClientError(f"{identifier} does not exist")
        return queue

    # Definitions.

    def _register(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        from moto.batch.models import JobDefinition

        check_definition(parameters)
        kinds = {"containerProperties", "ecsProperties"} & parameters.keys()
        if parameters["type"] != "container" or len(kinds) != 1:
            raise ClientError("FakeAWS has definitions with containerProperties or ecsProperties.")
        backend = batch_backend(region)
        name = parameters["jobDefinitionName"]
        revision = max(
            (known.revision for known in backend._job_definitions.values() if known.name == name),
            default=0,
        )
        definition = JobDefinition(  # type: ignore[abstract]  # moto's own, made so by moto too
            name,
            parameters.get("parameters"),
            "container",
            {**parameters.get("containerProperties", _NO_CONTAINER)},
            node_properties=None,
            eks_properties=None,
            tags=parameters.get("tags") or {},
            retry_strategy=parameters.get("retryStrategy") or {},
            timeout=parameters.get("timeout") or {},
            backend=backend,
            platform_capabilities=parameters.get("platformCapabilities") or ["EC2"],
            propagate_tags=bool(parameters.get("propagateTags")),
            revision=revision,
        )
        definition.extra = dict(parameters)  # type: ignore[attr-defined]
        backend._job_definitions[definition.arn] = definition
        return {
            "jobDefinitionName": name,
            "jobDefinitionArn": definition.arn,
            "revision": definition.revision,
        }

    def _deregister(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        definition = find_definition(region, parameters["jobDefinition"], exact=True)
        if definition is not None:
            definition.deregister()
        return {}

    def _describe_definitions(self, region: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        backend = batch_backend(region)
        name, wanted = parameters.get("jobDefinitionName"), parameters.get("jobDefinitions")
        status = parameters.get("status")
        found = []
        for definition in list(backend._job_definitions.values()):
            own = (definition.arn, f"{definition.name}:{definition.revision}")
            if name is not None and definition.name != name:
                continue
            if wanted and not set(own).intersection(wanted):
                continue
            if status is not None and definition.status != status:
                continue
            extra = {
                key: value
                for key, value in getattr(definition, "extra", definition.describe()).items()
                if key != "tags"
            }
            container = extra.get("containerProperties") or {}
            if container:
                extra["containerProperties"] = {
                    **{
                        key: []
                        for key in (
                            "command",
                            "volumes",
                            "environment",
                            "mountPoints",
                            "ulimits",
                            "resourceRequirements",
                            "secrets",
                        )
                    },
                    **container,
                }
            found.append(
                {
                    **extra,
                    "jobDefinitionArn": definition.arn,
                    "revision": definition.revision,
                    "status": definition.status,
                    "tags": backend.list_tags_for_resource(definition.arn),
                    "containerOrchestrationType": "ECS",
                }
            )
        found.sort(key=lambda entry: (entry["jobDefinitionName"], -entry["revision"]))
        return _page("jobDefinitions", found, parameters, 100)


def find_definition(region: str, identifier: str, *, exact: bool = False) -> Any:
    """Return a definition by ARN, by ``name:revision``, or by name (the latest ACTIVE revision)."""
    definitions = batch_backend(region)._job_definitions
    bare = identifier.rpartition("job-definition/")[2] if "/" in identifier else identifier
    name, _, revision = bare.partition(":")
    fitting = [
        definition
        for definition in list(definitions.values())
        if definition.name == name
        and (str(definition.revision) == revision if revision else definition.status == "ACTIVE")
    ]
    if exact and not revision:
        return None
    return max(fitting, key=lambda definition: definition.revision, default=None)


def _page(
    name: str, found: list[dict[str, Any]], parameters: Mapping[str, Any], largest: int
) -> dict[str, Any]:
    size = min(parameters.get("maxResults") or largest, largest)
    try:
        start = int(parameters.get("nextToken") or 0)
    except ValueError:
        raise ClientError("nextToken is invalid") from None
    page: dict[str, Any] = {name: found[start : start + size]}
    if start + size < len(found):
        page["nextToken"] = str(start + size)
    return page


def _check_limits(limits: list[dict[str, Any]]) -> None:
    for limit in limits:
        if not 600 <= limit["maxTimeSeconds"] <= 86_400:
            raise ClientError("maxTimeSeconds must be 600 to 86400.")


def _check_network(backend: Any, resources: Mapping[str, Any]) -> None:
    ec2 = backend.ec2_backend
    for group in resources.get("securityGroupIds", ()):
        if ec2.get_security_group_from_id(group) is None:
            raise ClientError(
                f"Error executing request, Exception : The security group '{group}' does not exist"
            )
    for subnet in resources["subnets"]:
        if not any(subnet in zone for zone in ec2.subnets.values()):
            raise ClientError(
                f"Error executing request, Exception : The subnet ID '{subnet}' does not exist"
            )


def _check_role(backend: Any, arn: str) -> None:
    if not any(role.arn == arn for role in backend.iam_backend.roles.values()):
        raise ClientError(f"Role not found: {arn}")


def _check_profile(backend: Any, identifier: str) -> None:
    for profile in backend.iam_backend.instance_profiles.values():
        if identifier in (profile.arn, profile.name):
            return
    raise ClientError(f"Instance profile not found: {identifier}")
