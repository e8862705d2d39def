"""Finding cloudexec's workers on AWS Lambda, told as AWS Batch tells of jobs.

What lists, prices and stops jobs has one form to read then. An invocation is a job of one worker:
its id is that of the invocation, with ``lambda-`` before it, and its queue the function.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cloudexec._aws.function_log import Invocation, default_log_group, read_invocations
from cloudexec._aws.function_requests import EVENT_AGE, LONGEST_SESSION, VCPU_MIB
from cloudexec._aws.names import DEFINITION_PREFIX, TAG_EXECUTOR
from cloudexec._aws.paced_calls import PacedCalls
from cloudexec._errors import AwsError

__all__ = ["DAY_MS", "FunctionSearch", "is_invocation_id"]

_ID = re.compile(r"lambda-[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
DAY_MS = 24 * 3600 * 1000
"""Of the log, in which workers are looked for."""
_REFUSED = 3
"""The exit code of a worker that the client refused: of an event that came twice, mostly."""
_OVER = LONGEST_SESSION + EVENT_AGE
"""Seconds after which an invocation has ended, whatever the log says: lines may be lost."""


def is_invocation_id(name: str) -> bool:
    """Whether a job's id is that of an invocation."""
    return _ID.fullmatch(name) is not None


class FunctionSearch:
    """Finds invocations that are workers.

    Args:
        calls: How AWS is asked.
        groups: Log groups of functions; ``None``: those of all functions of the region that are
            called like ours, as far as they may be looked at.
        may_be_denied: Whether given groups are passed over, too, if AWS does not let us look.
    """

    def __init__(
        self, calls: PacedCalls, groups: Sequence[str] | None, *, may_be_denied: bool = False
    ) -> None:
        self._calls = calls
        self._given = groups
        self._may_be_denied = may_be_denied or groups is None
        self._stopped: set[str] = set()

    async def jobs(self, name: str = "") -> list[Mapping[str, Any]]:
        """Return all workers of the last day.

        Args:
            name: Only the one of this name; empty: of any executor.
        """
        since = int(time.time() * 1000) - DAY_MS
        found: dict[str, Mapping[str, Any]] = {}
        for group in await self._groups():
            try:
                invocations = await read_invocations(self._calls.call, group, since)
            except AwsError as exc:
                if not self._may_be_denied or "Denied" not in exc.code:
                    raise
                continue
            for each in sorted(invocations, key=lambda each: each.billed_ms or DAY_MS):
                # Of an event that came twice, the one that was the worker: it ran for longer.
                if each.line.get(TAG_EXECUTOR) and each.exit_code != _REFUSED:
                    job = _job(each, group)
                    found[job["jobId"]] = job
        return [each for each in found.values() if not name or each["jobName"] == name]

    async def describe(self, ids: Sequence[str]) -> list[Mapping[str, Any]]:
        """Return the workers with these ids that there are."""
        return [each for each in await self.jobs() if each["jobId"] in ids] if ids else []

    async def _groups(self) -> list[str]:
        if self._given is not None:
            return list(self._given)
        try:
            found = await self._functions()
        except AwsError as exc:
            if "Denied" not in exc.code:
                raise
            return []  # who may not look at AWS Lambda has no workers there
        groups = {
            each.get("LoggingConfig", {}).get("LogGroup") or default_log_group(each["FunctionName"])
            for each in found
            if each["FunctionName"].startswith(DEFINITION_PREFIX)
        }
        return sorted(groups)

    async def _functions(self) -> list[Mapping[str, Any]]:
        found: list[Mapping[str, Any]] = []
        token: dict[str, Any] = {}
        while True:
            page = await self._calls.call("lambda", "list_functions", **token)
            found += page.get("Functions", ())
            if not page.get("NextMarker"):
                return found
            token = {"Marker": page["NextMarker"]}

    async def stop(self, function: str) -> None:
        """Let a function start no more workers; those that run end with their program, or alone.

        No request ends them. Calls about a function that is stopped already are not made again.

        Raises:
            AwsError: If AWS refuses.
        """
        if function in self._stopped:
            return
        self._stopped.add(function)
        await self._calls.call(
            "lambda",
            "put_function_concurrency",
            FunctionName=function,
            ReservedConcurrentExecutions=0,
        )


def _job(invocation: Invocation, group: str) -> Mapping[str, Any]:
    """Tell of an invocation as DescribeJobs tells of a job."""
    line, report = invocation.line, invocation.report
    memory = int(line.get("memory_mib") or 0)
    began, ended = invocation.began_ms, invocation.ended_ms
    if report is not None:
        began = ended - report.billed_ms
    is_over = report is not None or time.time() - began / 1000 > _OVER
    reason = ""
    if report is not None and report.status:
        reason = "it ran out of memory" if report.out_of_memory else f"Status: {report.status}"
    arch = "ARM64" if line.get("arch") == "arm64" else "X86_64"
    code = invocation.exit_code
    container = {
        "image": line.get("image", ""),
        "exitCode": code,
        "resourceRequirements": [
            {"type": "VCPU", "value": f"{memory / VCPU_MIB:.2f}"},
            {"type": "MEMORY", "value": str(memory)},
        ],
        "runtimePlatform": {"cpuArchitecture": arch},
        "ephemeralStorage": {"sizeInGiB": int(line.get("disk_mib") or 512) / 1024},
        "logConfiguration": {"options": {"awslogs-group": group}},
        "logStreamName": invocation.stream,
    }
    job = {
        "jobId": f"lambda-{invocation.request}",
        "jobName": line.get("name", ""),
        "jobQueue": line.get("function", ""),
        "jobDefinition": line.get("function", ""),
        "status": _status(invocation) if is_over else "RUNNING",
        "statusReason": reason or None,
        "createdAt": began,
        "startedAt": began,
        "stoppedAt": (ended or began + 1000 * LONGEST_SESSION) if is_over else None,
        "container": {key: value for key, value in container.items() if value is not None},
        "platformCapabilities": ["LAMBDA"],
        "compute": "lambda",
        "spot": False,
        "tags": {key: value for key, value in line.items() if key.startswith("cloudexec:")},
    }
    return {key: value for key, value in job.items() if value is not None}


def _status(invocation: Invocation) -> str:
    """Return the state that a job of AWS Batch would be in: a session that is over succeeded."""
    failed = invocation.report is not None and invocation.report.status
    return "FAILED" if failed or invocation.exit_code not in (0, 143) else "SUCCEEDED"
