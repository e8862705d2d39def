"""What AWS Lambda writes to the log of invocations that are workers, read.

Lambda has no list of invocations. But a worker writes a line about itself when it begins, and
Lambda writes one when the invocation has ended: how long it took, what of it is billed, and how it
ended.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from cloudexec._errors import AwsError

__all__ = ["Invocation", "Report", "default_log_group", "read_invocations", "read_report"]

_SESSION = "cloudexec session "
"""As ``cloudexec.worker.function`` writes it."""
_REPORT = re.compile(
    r"REPORT RequestId: (?P<request>\S+)\s+Duration: [\d.]+ ms\s+Billed Duration: (?P<billed>\d+) "
    r"ms\s+Memory Size: (?P<memory>\d+) MB\s+Max Memory Used: (?P<used>\d+) MB(?P<rest>.*)",
    re.S,
)
"""AWS Lambda Developer Guide, "Viewing CloudWatch logs for Lambda functions"."""
_STATUS = re.compile(r"Status: (\w+)")
_PATTERNS = ('"REPORT RequestId"', '"cloudexec session"')
"""Reports first: what a worker says of itself is written before the report of its end. So no
invocation seems to have ended without an exit code because it ended between the two requests."""
_MISSING = ("ResourceNotFoundException",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """How an invocation ended, by Lambda's own words."""

    request: str
    billed_ms: int
    memory_mib: int
    used_mib: int
    status: str = ""
    """``"timeout"`` or ``"error"``; empty: it returned."""

    @property
    def out_of_memory(self) -> bool:
        """Whether it was killed for want of memory, which Lambda does not say otherwise."""
        return self.status == "error" and self.used_mib >= self.memory_mib


@dataclass(slots=True, kw_only=True)
class Invocation:
    """One delivery of an event. Lambda may deliver it twice, to two environments.

    Attributes:
        request: Its id.
        stream: The log stream of its environment, which is that of earlier and later ones, too.
        began_ms: When its worker began, Unix time; 0: it has none, or did not get so far.
        ended_ms: When Lambda reported its end, Unix time; 0: it runs.
        line: What its worker has said about itself.
        exit_code: Of its worker; ``None``: it runs, or was killed together with its environment.
        report: How it ended.
    """

    request: str
    stream: str = ""
    began_ms: int = 0
    ended_ms: int = 0
    line: Mapping[str, str] = field(default_factory=dict)
    exit_code: int | None = None
    report: Report | None = None

    @property
    def billed_ms(self) -> int:
        """Milliseconds that are billed; 0: that is not known yet."""
        return 0 if self.report is None else self.report.billed_ms


def default_log_group(function: str) -> str:
    """Return where a function logs that was told nothing."""
    return f"/aws/lambda/{function}"


def read_report(message: str) -> Report | None:
    """Read a line of the log; ``None``: it is no report."""
    found = _REPORT.match(message)
    if found is None:
        return None
    status = _STATUS.search(found["rest"])
    return Report(
        request=found["request"],
        billed_ms=int(found["billed"]),
        memory_mib=int(found["memory"]),
        used_mib=int(found["used"]),
        status=status[1] if status is not None and status[1] != "success" else "",
    )


async def read_invocations(
    call: Callable[..., Awaitable[Any]], group: str, since_ms: int
) -> list[Invocation]:
    """Return the invocations of which the log says something.

    Args:
        call: Makes a call to AWS: service, operation, parameters.
        group: The log group.
        since_ms: From when on, Unix time.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    found: dict[tuple[str, str], Invocation] = {}
    for pattern in _PATTERNS:
        async for event in _events(call, group, since_ms, pattern):
            message, stream = str(event["message"]), str(event["logStreamName"])
            report, line = read_report(message), _session(message)
            request = report.request if report is not None else line.get("request", "")
            if not request:
                continue
            each = found.setdefault((request, stream), Invocation(request=request, stream=stream))
            if report is not None:
                each.report, each.ended_ms = report, int(event["timestamp"])
            else:
                if line.get("exit_code", "").isdecimal():
                    each.exit_code = int(line["exit_code"])
                else:
                    each.line, each.began_ms = line, int(event["timestamp"])
    return list(found.values())


async def _events(
    call: Callable[..., Awaitable[Any]], group: str, since_ms: int, pattern: str
) -> AsyncIterator[Mapping[str, Any]]:
    token: dict[str, Any] = {}
    while True:
        try:
            page = await call(
                "logs",
                "filter_log_events",
                logGroupName=group,
                startTime=since_ms,
                filterPattern=pattern,
                **token,
            )
        except AwsError as exc:
            if exc.code not in _MISSING:
                raise
            return  # nothing has been written there yet
        for event in page.get("events", ()):
            yield event
        if not page.get("nextToken"):
            return
        token = {"nextToken": page["nextToken"]}


def _session(message: str) -> Mapping[str, str]:
    """Read what a worker says about itself; anybody may write to the log, so it may be anything."""
    if not message.startswith(_SESSION):
        return {}
    try:
        line = json.loads(message[len(_SESSION) :])
    except ValueError:
        return {}
    if not isinstance(line, dict):
        return {}
    return {str(key): str(value) for key, value in line.items()}
