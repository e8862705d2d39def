"""An account of the fake AWS with a queue in it, and ways to run jobs there."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import boto3

from cloudexec.testing import FakeAWS, JobRecord

PATIENCE = 45.0
"""Seconds after which a test stops waiting; less than a test's own timeout on a busy machine."""


def eventually(check: Callable[[], Any], timeout: float = PATIENCE) -> Any:
    """Call ``check`` until its result is true; return the result."""
    deadline = time.monotonic() + timeout
    while not (found := check()):
        assert time.monotonic() < deadline, f"not so within {timeout} seconds"
        time.sleep(0.01)
    return found


class Account:
    """The fake AWS with a queue, a definition and a client for each service."""

    def __init__(self, aws: FakeAWS, **set_up: Any) -> None:
        self.aws = aws
        self.setup = aws.set_up(**set_up)
        self.fargate = set_up.get("kinds", ("FARGATE",))[0].startswith("FARGATE")
        self._clients: dict[str, Any] = {}
        self._definitions = 0

    def __getattr__(self, service: str) -> Any:
        if service.startswith("_"):
            raise AttributeError(service)
        if service not in self._clients:
            self._clients[service] = boto3.client(service.replace("_", "-"))
        return self._clients[service]

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def define(
        self,
        script: str | None = None,
        *,
        tags: dict[str, str] | None = None,
        capabilities: list[str] | None = None,
        **container: Any,
    ) -> str:
        """Register a definition that runs a shell script; return its ARN."""
        self._definitions += 1
        platform = ["FARGATE" if self.fargate else "EC2"]
        extra: dict[str, Any] = {"tags": tags} if tags else {}
        properties: dict[str, Any] = {
            "image": "worker:1",
            "resourceRequirements": [
                {"type": "VCPU", "value": "1"},
                {"type": "MEMORY", "value": "2048"},
            ],
            **container,
        }
        if self.fargate:
            properties.setdefault("executionRoleArn", self.setup.execution_role)
        if script is not None:
            properties["command"] = ["sh", "-c", script]
        return str(
            self.batch.register_job_definition(
                jobDefinitionName=f"definition-{self._definitions}",
                type="container",
                platformCapabilities=capabilities or platform,
                containerProperties=properties,
                **extra,
            )["jobDefinitionArn"]
        )

    def submit(self, script: str | None = None, **parameters: Any) -> str:
        """Submit a job that runs a shell script; return its id."""
        definition = parameters.pop("jobDefinition", None)
        return str(
            self.batch.submit_job(
                **{
                    "jobName": "job",
                    "jobQueue": self.setup.queue,
                    "jobDefinition": definition or self.define(script),
                    **parameters,
                }
            )["jobId"]
        )

    def detail(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.batch.describe_jobs(jobs=[job_id])["jobs"][0]
        return found

    def reach(self, job_id: str, *statuses: str, timeout: float = PATIENCE) -> JobRecord:
        """Wait until a job has one of the states."""
        eventually(lambda: self.aws.job(job_id).status in statuses, timeout)
        return self.aws.job(job_id)

    def ended(self, job_id: str, timeout: float = PATIENCE) -> JobRecord:
        """Wait until a job has ended."""
        return self.reach(job_id, "SUCCEEDED", "FAILED", timeout=timeout)

    def prints(self, job_id: str, line: str) -> None:
        """Wait until a job has written a line; before that it may not handle signals yet."""
        eventually(lambda: line in self.aws.logs(job_id))
