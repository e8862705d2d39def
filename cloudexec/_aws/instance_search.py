"""Finding cloudexec's EC2 instances, told as AWS Batch tells of jobs.

What lists, prices and stops jobs has one form to read then. An instance that was asked for without
AWS Batch is a job of one worker: its id is that of the instance, and its name what it was asked
for.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from cloudexec._aws.instance_script import container_stream
from cloudexec._aws.machines import tags_of
from cloudexec._aws.names import TAG_JOB, TAG_STACK, log_group_of
from cloudexec._aws.paced_calls import PacedCalls
from cloudexec._aws.prices import PriceTable
from cloudexec._errors import AwsError

__all__ = ["BY_ITSELF", "BY_USER", "RECLAIMED", "InstanceSearch", "is_instance_id"]

_INSTANCE_ID = re.compile(r"i-(?:[0-9a-f]{8}|[0-9a-f]{17})")
_STATUSES = {"pending": "STARTING", "running": "RUNNING"}
_AT = re.compile(r"\((\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) (?:GMT|UTC)\)")
BY_ITSELF, BY_USER, RECLAIMED = "EssentialContainerExited", "UserInitiated", "SpotInterruption"
"""How an instance ended, in the words that Amazon ECS has for tasks."""
_STOP_CODES = {
    "Client.InstanceInitiatedShutdown": BY_ITSELF,
    "Client.UserInitiatedShutdown": BY_USER,
    "Server.SpotInstanceShutdown": RECLAIMED,
    "Server.SpotInstanceTermination": RECLAIMED,
}
"""By code of StateReason. Amazon EC2 API Reference, "StateReason"."""
_FILTER_VALUES = 200
"""Amazon EC2 API Reference, "Filter": 200 values in a request."""


def is_instance_id(name: str) -> bool:
    """Whether a job's id is that of an instance."""
    return _INSTANCE_ID.fullmatch(name) is not None


class InstanceSearch:
    """Finds instances.

    Args:
        calls: How AWS is asked.
        log_group: Where workers log; empty: in the log group of their stack.
        is_used: Whether there may be any: where not, nothing is asked.
        public_ip: Whether they have public addresses, of which those that have ended tell nothing.
    """

    def __init__(
        self, calls: PacedCalls, *, log_group: str, is_used: bool, public_ip: bool = True
    ) -> None:
        self._calls = calls
        self._log_group = log_group
        self._is_used = is_used
        self._public_ip = public_ip

    async def jobs(self, name: str = "") -> list[Mapping[str, Any]]:
        """Return all instances that Amazon EC2 remembers, those that ended for about an hour.

        Args:
            name: Only those of a job of this name; empty: of any.
        """
        if not self._is_used:
            return []
        wanted = {"Name": "tag-key", "Values": [TAG_JOB]}
        if name:
            wanted = {"Name": f"tag:{TAG_JOB}", "Values": [name]}
        try:
            return await self._found([wanted])
        except AwsError as exc:
            # Who may not look at Amazon EC2 has no instances there.
            if "Unauthorized" not in exc.code and "Denied" not in exc.code:
                raise
            return []

    async def describe(self, ids: Sequence[str]) -> list[Mapping[str, Any]]:
        """Return the instances with these ids that there are."""
        if not ids:
            return []
        # By a filter, as an id that is not known would be an error for all of them.
        found = await self._with("instance-id", ids)
        found = [each for each in found if each["tags"].get(TAG_JOB)]
        jobs = sorted({each["tags"][TAG_JOB] for each in found if _is_numbered(each)})
        # What an instance is called depends on the others of its job.
        found = [each for each in found if not _is_numbered(each)]
        found += await self._with(f"tag:{TAG_JOB}", jobs)
        return [each for each in found if each["jobId"] in ids]

    async def _with(self, name: str, values: Sequence[str]) -> list[Mapping[str, Any]]:
        """Return the instances for which a filter has one of these values."""
        found: list[Mapping[str, Any]] = []
        for at in range(0, len(values), _FILTER_VALUES):
            page = list(values[at : at + _FILTER_VALUES])
            found += await self._found([{"Name": name, "Values": page}])
        return found

    async def stop(self, instance: str) -> None:
        """End an instance."""
        try:
            await self._calls.call("ec2", "terminate_instances", InstanceIds=[instance])
        except AwsError as exc:
            if exc.code != "InvalidInstanceID.NotFound":
                raise

    async def _found(self, filters: list[dict[str, Any]]) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        token: dict[str, Any] = {}
        # In this order they were given to the workers of their job.
        numbers: Counter[str] = Counter()
        while True:
            page = await self._calls.call("ec2", "describe_instances", Filters=filters, **token)
            for reservation in page.get("Reservations", ()):
                found += reservation["Instances"]
            if not page.get("NextToken"):
                break
            token = {"NextToken": page["NextToken"]}
        jobs = []
        for each in sorted(found, key=lambda instance: str(instance["InstanceId"])):
            of = tags_of(each).get(TAG_JOB, "")
            jobs.append(self._job(each, numbers[of]))
            numbers[of] += 1
        return jobs

    def _job(self, instance: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        """Tell of an instance as DescribeJobs tells of a job.

        Args:
            instance: As DescribeInstances has it.
            index: Which of its job it is.
        """
        tags = tags_of(instance)
        name = str(instance["InstanceId"])
        launched: datetime = instance["LaunchTime"]
        reason = instance.get("StateReason") or {}
        state = instance["State"]["Name"]
        has_ended = state not in _STATUSES
        has_address = self._public_ip if has_ended else bool(instance.get("PublicIpAddress"))
        stop_code = _STOP_CODES.get(str(reason.get("Code")))
        status = _STATUSES.get(state)
        if status is None:
            status = "SUCCEEDED" if stop_code == BY_ITSELF else "FAILED"
        job = {
            "jobId": name,
            "jobName": _name_of(tags.get(TAG_JOB, ""), index),
            "jobQueue": "",
            "jobDefinition": "",
            "status": status,
            "statusReason": reason.get("Message"),
            "stopCode": stop_code,
            "createdAt": _ms(launched),
            "startedAt": None if status == "STARTING" else _ms(launched),
            "stoppedAt": _ended_at(instance),
            "container": {
                "resourceRequirements": _size_of(instance),
                "runtimePlatform": {
                    "cpuArchitecture": "ARM64"
                    if instance.get("Architecture") == "arm64"
                    else "X86_64"
                },
                "logConfiguration": {
                    "logDriver": "awslogs",
                    "options": {
                        "awslogs-group": self._log_group or log_group_of(tags.get(TAG_STACK, ""))
                    },
                },
                "logStreamName": container_stream(name),
                "networkConfiguration": {
                    "assignPublicIp": "ENABLED" if has_address else "DISABLED"
                },
            },
            "platformCapabilities": ["EC2"],
            "compute": "instance",
            "instanceType": instance["InstanceType"],
            "instanceState": state,
            "zone": instance.get("Placement", {}).get("AvailabilityZone", ""),
            "spot": instance.get("InstanceLifecycle") == "spot",
            "tags": tags,
        }
        return {key: value for key, value in job.items() if value is not None}


def _is_numbered(job: Mapping[str, Any]) -> bool:
    """Whether a job is one of several that are numbered; that of a run is not."""
    return str(job["tags"][TAG_JOB]).rpartition("-")[2].isdecimal()


def _name_of(job: str, index: int) -> str:
    """Return the name of the job of one worker: they are numbered from that of the first one."""
    before, dash, number = job.rpartition("-")
    return f"{before}{dash}{int(number) + index}" if number.isdecimal() else job


def _size_of(instance: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return what an instance has, as far as that is known, as a job of AWS Batch asks for it."""
    options = instance.get("CpuOptions") or {}
    vcpus = options.get("CoreCount", 0) * options.get("ThreadsPerCore", 1)
    known = PriceTable.built_in().instances.get(str(instance["InstanceType"]))
    if known is None:
        return [{"type": "VCPU", "value": str(vcpus)}] if vcpus else []
    return [
        {"type": "VCPU", "value": str(known.vcpus)},
        {"type": "MEMORY", "value": str(int(known.memory_gib * 1024))},
    ]


def _ms(at: datetime) -> int:
    return int(at.timestamp() * 1000)


def _ended_at(instance: Mapping[str, Any]) -> int | None:
    if instance["State"]["Name"] in _STATUSES:
        return None
    found = _AT.search(str(instance.get("StateTransitionReason", "")))
    if found is None:
        return _ms(instance["LaunchTime"])
    return _ms(datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S").replace(tzinfo=UTC))
