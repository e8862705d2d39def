"""Reads compute environments, queues, definitions and secrets from moto's back ends."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from cloudexec.testing._aws.backends import ACCOUNT, batch_backend
from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.jobs import Job, JobSpec
from cloudexec.testing._aws.platform import EnvironmentView, QueueView
from cloudexec.testing._aws.roles import RoleKeys
from cloudexec.testing._aws.runners import StartError

__all__ = ["MotoPlatform"]

_GPU_FAMILY = re.compile(r"(?:g[3-9]|p[2-9])\w*(?:\.|$)")
"""Instance types with GPUs, which ``"optimal"`` and the like do not stand for: those are families
c, m and r. AWS Batch API Reference, "ComputeResource"."""


class MotoPlatform:
    """Answers the engine's questions from moto's state.

    Args:
        faults: Knows which compute environments are INVALID.
        metadata_url: Prefix of the addresses of task metadata.
        job_environment: Variables that every job gets in addition to those of AWS.
        role_keys: Makes the credentials of jobs' roles; ``None``: jobs get no credentials.
    """

    def __init__(
        self,
        faults: Faults,
        *,
        metadata_url: str,
        job_environment: Mapping[str, str],
        role_keys: RoleKeys | None = None,
    ) -> None:
        self._faults = faults
        self._metadata_url = metadata_url
        self._job_environment = dict(job_environment)
        self._role_keys = role_keys

    def queue(self, arn: str) -> QueueView | None:
        """Return the queue; ``None`` if it was deleted."""
        region = arn.split(":")[3]
        backend = batch_backend(region)
        queue = backend.get_job_queue(arn)
        if queue is None:
            return None
        order = sorted(queue.env_order_json, key=lambda entry: int(entry["order"]))
        environments = [
            environment
            for entry in order
            if (environment := backend.get_compute_environment(entry["computeEnvironment"]))
        ]
        return QueueView(
            arn=queue.arn,
            name=queue.name,
            priority=int(queue.priority),
            environments=tuple(
                EnvironmentView(
                    arn=environment.arn,
                    name=environment.name,
                    kind=environment.compute_resources["type"],
                    max_vcpus=float(environment.compute_resources["maxvCpus"]),
                    enabled=environment.state == "ENABLED",
                    has_gpus=any(
                        _GPU_FAMILY.match(each)
                        for each in environment.compute_resources.get("instanceTypes") or ()
                    ),
                )
                for environment in environments
            ),
            time_limits=tuple(
                (entry["reason"], float(entry["maxTimeSeconds"]))
                for entry in getattr(queue, "extra", {}).get("jobStateTimeLimitActions", ())
            ),
        )

    def task_environment(self, job: Job) -> Mapping[str, str]:
        """Return the variables that Batch and the task's agent set."""
        found = {
            **self._job_environment,
            "ECS_CONTAINER_METADATA_URI_V4": f"{self._metadata_url}/v4/{job.task_id}",
        }
        role = job.spec.container.get("jobRoleArn", "")
        if self._role_keys is not None and role:
            found["AWS_ACCESS_KEY_ID"] = self._role_keys.key_of(role)
        if job.spec.cluster:
            return found
        found |= {
            "AWS_BATCH_JOB_ID": job.job_id,
            "AWS_BATCH_JOB_ATTEMPT": str(len(job.attempts) + 1),
            "AWS_BATCH_CE_NAME": job.environment_name or "",
            "AWS_BATCH_JQ_NAME": job.spec.queue_name,
        }
        if job.parent is not None:
            found["AWS_BATCH_JOB_ARRAY_INDEX"] = str(job.index)
            found["AWS_BATCH_JOB_ARRAY_SIZE"] = str(len(job.parent.children))
        return found

    def secrets(self, spec: JobSpec) -> Mapping[str, str]:
        """Return the values of the definition's secrets."""
        if spec.execution_role is not None:
            _check_role(spec.execution_role)
        return {name: _secret(value, spec.region) for name, value in spec.secrets.items()}


def _check_role(arn: str) -> None:
    from moto.iam.models import iam_backends

    roles = list(iam_backends[ACCOUNT]["aws"].roles.values())
    if not any(role.arn == arn for role in roles):
        raise StartError(
            f"ECS was unable to assume the role '{arn}' that was provided for this task. Please "
            "verify that the role being passed has the proper trust relationship and permissions "
            "and that your IAM user has permissions to pass this role."
        )


def _secret(value_from: str, region: str) -> str:
    if ":secretsmanager:" in value_from:
        return _from_secrets_manager(value_from)
    return _from_parameter_store(value_from, region)


def _from_secrets_manager(value_from: str) -> str:
    from moto.secretsmanager.models import secretsmanager_backends

    parts = value_from.split(":")
    arn = ":".join(parts[:7])
    key, stage, version = (*parts[7:], "", "", "")[:3]
    backend: Any = secretsmanager_backends[ACCOUNT][parts[3]]
    try:
        # Depending on moto's version, the back end returns a dict or its JSON text.
        found = backend.get_secret_value(arn, version or None, stage or None)
        value = json.loads(found) if isinstance(found, str) else found
        text = str(value["SecretString"])
        return str(json.loads(text)[key]) if key else text
    except Exception as exc:
        raise StartError(
            "ResourceInitializationError: unable to pull secrets or registry auth: execution "
            "resource retrieval failed: unable to retrieve secret from asm: service call has been "
            f"retried 1 time(s): failed to fetch secret {value_from} from secrets manager: "
            f"{_cause(exc)}"
        ) from exc


def _from_parameter_store(value_from: str, region: str) -> str:
    from moto.ssm.models import ssm_backends

    name = value_from
    if value_from.startswith("arn:"):
        region = value_from.split(":")[3]
        name = value_from.split(":parameter", 1)[1]
        if name.count("/") == 1:
            name = name[1:]
    found = ssm_backends[ACCOUNT][region].get_parameter(name)
    if found is None:
        raise StartError(
            "ResourceInitializationError: unable to pull secrets or registry auth: execution "
            "resource retrieval failed: unable to retrieve secrets from ssm: service call has been "
            f"retried 1 time(s): invalid parameters: {name}"
        )
    return str(found.response_object(decrypt=True)["Value"])


def _cause(exc: Exception) -> str:
    if isinstance(exc, KeyError):
        return f"retrieved secret did not contain json key {exc.args[0]}"
    kind = getattr(exc, "error_type", None) or type(exc).__name__
    return f"{kind}: {getattr(exc, 'message', None) or exc}"
