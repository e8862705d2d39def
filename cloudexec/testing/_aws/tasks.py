"""Describes the tasks of Amazon ECS behind jobs on Fargate, and their network interfaces."""

from __future__ import annotations

import sys
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from cloudexec.testing._aws.engine import Engine
from cloudexec.testing._aws.jobs import Job
from cloudexec.testing._aws.limits import ClientError
from cloudexec.testing._aws.wire import Call, Response

__all__ = ["Tasks"]

_PLACED = ("STARTING", "RUNNING")


class Tasks:
    """Answers calls about the tasks of jobs.

    A process has no network of its own. So that two tasks can listen at the same port, each task
    has a loopback address of its own, if the system has several. It is both the private and the
    public address.

    Args:
        engine: The engine that runs the jobs.
        are_processes: Whether tasks are processes of this machine, and not containers.
    """

    def __init__(self, engine: Engine, *, are_processes: bool) -> None:
        self._engine = engine
        self._are_processes = are_processes

    def networks(self, job: Job) -> list[dict[str, Any]]:
        """Return the networks of a task for its metadata."""
        if not self._are_processes:
            return []  # the address of a container is not known yet when it gets its metadata
        return [{"NetworkMode": "awsvpc", "IPv4Addresses": [self.address(job)]}]

    def address(self, job: Job) -> str:
        """Return the address of a running task."""
        own = job.running.address if job.running is not None else ""
        if own or not sys.platform.startswith("linux"):
            return own or "127.0.0.1"
        number = bytes.fromhex((job.task_id or "0" * 6)[:6])
        return f"127.{number[0] | 128}.{number[1]}.{1 + number[2] % 254}"

    def attachments(self, job: Job) -> list[dict[str, Any]] | None:
        """Return the network interfaces of a task; ``None``: it has none yet."""
        return _attachments(job, self.address(job)) if job.status in _PLACED else None

    def describe(self, call: Call) -> Mapping[str, Any] | None:
        """Answer DescribeTasks; ``None``: the tasks are not of AWS Batch."""
        given = call.parameters
        cluster = given.get("cluster", "").rpartition("/")[2]
        if call.operation != "DescribeTasks" or not cluster.startswith("AWSBatch-"):
            return None
        with self._engine.lock:
            wanted = given["tasks"]
            found = {
                job.task_arn: _detail(job, self.address(job))
                for job in self._jobs()
                if job.task_arn in wanted and not job.spec.cluster
            }
        return {
            "tasks": [found[arn] for arn in wanted if arn in found],
            "failures": [{"arn": arn, "reason": "MISSING"} for arn in wanted if arn not in found],
        }

    def interfaces(self, call: Call) -> Response | None:
        """Answer DescribeNetworkInterfaces for tasks; ``None``: some interfaces are not theirs."""
        wanted = call.parameters.get("NetworkInterfaceIds") or ()
        if call.operation != "DescribeNetworkInterfaces" or not wanted:
            return None
        with self._engine.lock:
            found = {
                _interface(job): (job, self.address(job))
                for job in self._jobs()
                if _interface(job) in wanted
            }
        for each in wanted:
            if each not in found:
                raise ClientError(
                    f"The networkInterface ID '{each}' does not exist",
                    "InvalidNetworkInterfaceID.NotFound",
                )
        items = "".join(_item(each, *found[each]) for each in wanted)
        body = (
            '<DescribeNetworkInterfacesResponse xmlns="http://ec2.amazonaws.com/doc/2016-11-15/">'
            f"<requestId>{uuid.uuid4()}</requestId>"
            f"<networkInterfaceSet>{items}</networkInterfaceSet>"
            "</DescribeNetworkInterfacesResponse>"
        )
        return Response(status=200, body=body.encode(), headers={"Content-Type": "text/xml"})

    def _jobs(self) -> Iterator[Job]:
        for job in self._engine.jobs.values():
            if job.task_id and job.status in _PLACED and job.spec.fargate:
                yield job


def _interface(job: Job) -> str:
    return f"eni-{(job.task_id or '')[:17]}"


def _attachments(job: Job, address: str) -> list[dict[str, Any]]:
    details = {"networkInterfaceId": _interface(job), "privateIPv4Address": address}
    return [
        {
            "id": str(uuid.UUID(job.task_id)),
            "type": "ElasticNetworkInterface",
            "status": "ATTACHED",
            "details": [{"name": name, "value": value} for name, value in details.items()],
        }
    ]


def _detail(job: Job, address: str) -> dict[str, Any]:
    arn = job.task_arn or ""
    return {
        "taskArn": arn,
        "clusterArn": arn.rpartition("/")[0].replace(":task/", ":cluster/"),
        "lastStatus": "RUNNING" if job.status == "RUNNING" else "PENDING",
        "launchType": "FARGATE",
        "attachments": _attachments(job, address),
    }


def _item(interface: str, job: Job, address: str) -> str:
    network = job.spec.container.get("networkConfiguration") or {}
    association = f"<association><publicIp>{address}</publicIp></association>"
    return (
        f"<item><networkInterfaceId>{interface}</networkInterfaceId>"
        f"<privateIpAddress>{address}</privateIpAddress>"
        f"{association if network.get('assignPublicIp') == 'ENABLED' else ''}</item>"
    )
