"""What runs in an account on cloudexec's behalf: to look at it, read its logs, stop it, price it.

Everything is found in AWS itself, by the tags and names that every job of ours carries, so that it
is seen from any machine, and after the client that started it has died. AWS Batch forgets jobs
some time after they ended, 7 days at the least, and this with them.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import re
import threading
import weakref
from collections import Counter
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, TypeVar

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.limits import DESCRIBE_JOBS
from cloudexec._aws.names import (
    JOB_PREFIX,
    TAG_EXECUTOR,
    TAG_EXPIRES,
    TAG_PROJECT,
    TAG_USER,
)
from cloudexec._aws.prices import PriceTable, WorkerPrice
from cloudexec._aws.prices import refresh as refresh_prices
from cloudexec._aws.profile import Profile
from cloudexec._errors import AwsError, ConfigError

__all__ = [
    "ACTIVE",
    "ENDED",
    "AsyncMonitor",
    "AttemptInfo",
    "CostReport",
    "ExecutorCost",
    "ExecutorInfo",
    "JobInfo",
    "LogLine",
    "Monitor",
]

ACTIVE = ("SUBMITTED", "PENDING", "RUNNABLE", "STARTING", "RUNNING")
"""States of a job that has not ended, in their order. AWS Batch User Guide, "Job states"."""
ENDED = ("SUCCEEDED", "FAILED")

_T = TypeVar("_T")
_CALL_INTERVAL = 0.04
"""Seconds between calls: AWS Batch takes about 50 a second of a whole account, and an executor
that is being watched needs its own."""
_CALLS_AT_ONCE = 10
_CHILD_CALLS = 200
"""Calls that one answer spends on children of arrays; what is left is estimated."""
_ARRAY_LOGS = 100
"""Workers of an array whose logs are read one after the other."""
_TAIL_LARGEST = 10_000
"""Events in one page. Amazon CloudWatch Logs API Reference, "GetLogEvents"."""
_LOG_POLL = 1.0
_LOG_SETTLE = 2
"""Looks at a log that must find nothing new after the job ended: lines arrive a little late."""
_BATCH_LOG_GROUP = "/aws/batch/job"
"""Where AWS Batch writes unless told otherwise. AWS Batch User Guide, "Job states"."""
_REASON_LARGEST = 1024
"""AWS Batch API Reference, "TerminateJob"."""

_JOB_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?::\d+)?")
_WORKER = re.compile(r"(?:(?P<executor>[^/]+)/)?worker-(?P<number>\d+)")
_LAUNCH = re.compile(r"-(\d+)$")
_FAILED_STARTS = ("CannotPullContainerError", "ResourceInitializationError")
_MISSING_LOG = "ResourceNotFoundException"


def _plain(value: Any) -> Any:
    """Return what JSON can say: ISO 8601 for times, objects for records."""
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, _Record):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(each) for each in value]
    return value


class _Record:
    """What can be written as JSON."""

    __slots__ = ()

    def to_dict(self) -> dict[str, Any]:
        """Return all fields; times as ISO 8601 in UTC, durations as seconds, money as USD."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}  # type: ignore[arg-type]  # subclasses are dataclasses


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptInfo(_Record):
    """One attempt of AWS Batch to run a job. (A task's attempts are another matter.)"""

    number: int
    """From 1."""
    started_at: datetime | None = None
    stopped_at: datetime | None = None
    exit_code: int | None = None
    reason: str = ""
    log_stream: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobInfo(_Record):
    """A job: one worker, or as many as its array has."""

    id: str
    """``PARENT:INDEX`` for one worker of an array."""
    name: str
    state: str
    """As AWS Batch says. An array is ``PENDING`` while its workers run: see ``workers``."""
    executor: str
    user: str
    project: str
    queue: str
    definition: str
    """Name and revision."""
    size: int
    """Workers in it."""
    index: int | None
    """Which worker of its array it is, or ``None``."""
    first_worker: int | None
    """Number of its first worker: it is ``worker-<first_worker>``, or has that and those that
    follow; ``None`` if its name does not say."""
    workers: Mapping[str, int]
    """How many workers are in which state. AWS updates it with some delay."""
    vcpus: float
    """Of one worker."""
    memory_mib: int
    """Of one worker."""
    arch: str
    compute: str
    """``"fargate"`` or ``"ec2"``."""
    spot: bool
    created_at: datetime
    started_at: datetime | None
    stopped_at: datetime | None
    expires_at: datetime | None
    """When its time limit ends it at the latest."""
    exit_code: int | None
    """Of the last attempt's container."""
    reason: str
    """What AWS says of how it ended or why it waits; empty while there is nothing to say. For an
    array, what it says of most of its failed workers."""
    attempts: tuple[AttemptInfo, ...]
    log_group: str
    log_stream: str
    """Of the last attempt; empty until it runs."""
    run_seconds: float
    """Of all its workers and attempts together, up to now."""
    cost_usd: float
    """Up to now."""
    per_hour_usd: float
    """What those of its workers cost that run now."""
    is_estimate: bool
    """Whether the cost is less sure than a list price: Spot, EC2, or an array that could not be
    looked through."""

    @property
    def is_active(self) -> bool:
        """Whether it has not ended."""
        return self.state in ACTIVE


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorInfo(_Record):
    """The jobs of one executor, added up."""

    id: str
    user: str
    project: str
    is_active: bool
    """Whether a job of it has not ended."""
    created_at: datetime
    """When its first job was submitted."""
    age_seconds: float
    expires_at: datetime | None
    """When time limits have ended the last of its jobs at the latest."""
    queues: tuple[str, ...]
    jobs: int
    workers: Mapping[str, int]
    """How many workers are in which state."""
    vcpus: float
    """Of workers that are starting or running."""
    memory_mib: int
    """Of workers that are starting or running."""
    cost_usd: float
    """Up to now."""
    per_hour_usd: float
    """What it costs at present."""
    is_estimate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine(_Record):
    """A line of a worker's log."""

    time: datetime
    message: str
    job_id: str
    attempt: int
    stream: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorCost(_Record):
    """What one executor's workers cost up to now."""

    executor: str
    user: str
    project: str
    is_active: bool
    created_at: datetime
    runs: int
    """Workers that ran, each attempt counted."""
    run_seconds: float
    vcpu_hours: float
    gib_hours: float
    cost_usd: float
    per_hour_usd: float
    is_estimate: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class CostReport(_Record):
    """What was run and what it cost, by executor, the newest first.

    List prices of vCPUs, memory, storage and public addresses, from when a worker's container
    started. What is not in it: the download of images (seconds of each worker's time), logs, data
    transfer, NAT gateways, discounts and taxes; and jobs that AWS Batch has forgotten.
    """

    executors: tuple[ExecutorCost, ...]
    cost_usd: float
    per_hour_usd: float
    is_estimate: bool
    prices_dated: str
    """Day of the price table."""
    prices_source: str
    prices_region: str
    notes: tuple[str, ...] = field(default=())
    """What to know of these numbers, in sentences."""


@dataclass(slots=True)
class _Runs:
    """How long a job's workers ran."""

    seconds: list[float] = field(default_factory=list)
    now: int = 0
    """How many run now."""
    is_complete: bool = True
    failures: Counter[str] = field(default_factory=Counter)
    """Reasons of failed workers."""
    waiting: str = ""
    """Why a worker waits, where AWS Batch says so."""


class _Budget:
    """Calls that may yet be made."""

    def __init__(self, calls: int) -> None:
        self._left = calls

    def take(self) -> bool:
        """Take one, if there is one."""
        self._left -= 1
        return self._left >= 0


class AsyncMonitor:
    """The same as ``Monitor``, for those who have an event loop and clients of their own."""

    def __init__(
        self,
        clients: AwsClients,
        *,
        queues: Mapping[str, str] = MappingProxyType({}),
        log_group: str = "",
        prices: PriceTable | None = None,
        child_calls: int = _CHILD_CALLS,
    ) -> None:
        """Take where to look.

        Args:
            clients: Whose region it is.
            queues: Name or ARN by kind, as a profile has them; empty: all queues of the region.
            log_group: Where logs are if a job does not say.
            prices: By default those last learned for the region.
            child_calls: How many calls one answer may spend on the children of arrays.
        """
        self._clients = clients
        self._given = dict(queues)
        self._log_group = log_group
        self._prices = prices
        self._child_calls = child_calls
        self._known_queues: dict[str, tuple[str, bool]] = {}
        self._definitions: dict[str, Mapping[str, Any]] = {}
        self._gate = asyncio.Semaphore(_CALLS_AT_ONCE)
        self._next_call = 0.0

    # What users see

    async def jobs(
        self,
        *,
        state: str | Iterable[str] | None = None,
        active: bool | None = None,
        executor: str | None = None,
        each_worker: bool = False,
        limit: int | None = None,
    ) -> list[JobInfo]:
        """See ``Monitor.jobs``."""
        states = _states(state)
        details = await self._details(executor=executor, active=active)
        details.sort(key=lambda each: int(each["createdAt"]), reverse=True)
        if states is not None:
            details = [each for each in details if states & _workers(each).keys()]
        if each_worker:
            found = await self._each_worker(details, limit)
            if states is not None:
                found = [each for each in found if each.state in states]
        else:
            found = await self._infos(details[:limit])
        return found[:limit]

    async def executors(
        self, *, active: bool | None = True, executor: str | None = None
    ) -> list[ExecutorInfo]:
        """See ``Monitor.executors``."""
        details = await self._details(executor=executor)
        if active is not None:
            of_active = {_executor(each) for each in details if each["status"] in ACTIVE}
            details = [each for each in details if (_executor(each) in of_active) is active]
        return [_executor_info(jobs, _now()) for jobs in _by_executor(await self._infos(details))]

    async def cost(self, executor: str | None = None, *, refresh: bool = False) -> CostReport:
        """See ``Monitor.cost``."""
        if refresh:
            self._prices = await refresh_prices(self._clients)
        details = await self._details(executor=executor)
        runs = await self._all_runs(details)
        infos = await self._infos(details, runs)
        rows: list[ExecutorCost] = []
        for jobs in _by_executor(infos):
            last = jobs[0]
            rows.append(
                ExecutorCost(
                    executor=last.executor,
                    user=last.user,
                    project=last.project,
                    is_active=any(job.is_active for job in jobs),
                    created_at=min(job.created_at for job in jobs),
                    runs=sum(len(runs[job.id].seconds) for job in jobs),
                    run_seconds=math.fsum(job.run_seconds for job in jobs),
                    vcpu_hours=math.fsum(job.run_seconds * job.vcpus for job in jobs) / 3600,
                    gib_hours=math.fsum(job.run_seconds * job.memory_mib for job in jobs)
                    / 1024
                    / 3600,
                    cost_usd=math.fsum(job.cost_usd for job in jobs),
                    per_hour_usd=math.fsum(job.per_hour_usd for job in jobs),
                    is_estimate=any(job.is_estimate for job in jobs),
                )
            )
        table = self._table()
        notes = [table.note] if table.note else []
        if table.region != self._clients.region:
            notes.append(
                f"{table.region} list prices: those of {self._clients.region} are not known here, "
                f"`cloudexec cost --refresh` looks them up"
            )
        if any(job.spot for job in infos):
            notes.append(
                f"Spot is taken to cost {table.spot_factor:.0%} of the list price; it varies"
            )
        if any(job.compute == "ec2" for job in infos):
            notes.append("jobs on EC2 are priced as their share of an instance that is full")
        if any(not each.is_complete for each in runs.values()):
            notes.append("there were too many workers to look at each: the rest is estimated")
        return CostReport(
            executors=tuple(rows),
            cost_usd=math.fsum(row.cost_usd for row in rows),
            per_hour_usd=math.fsum(row.per_hour_usd for row in rows),
            is_estimate=any(row.is_estimate for row in rows),
            prices_dated=table.dated.isoformat(),
            prices_source=table.source,
            prices_region=table.region,
            notes=tuple(notes),
        )

    async def stoppable(
        self,
        *,
        executor: str | None = None,
        job: str | Sequence[str] | None = None,
        everything: bool = False,
        older_than: float | None = None,
    ) -> list[JobInfo]:
        """See ``Monitor.stoppable``."""
        names = [job] if isinstance(job, str) else list(job or ())
        if executor is None and not names and not everything and older_than is None:
            raise ConfigError(
                "say what to stop: executor=, job=, older_than= (seconds) or everything=True"
            )
        if names:
            resolved = await asyncio.gather(*(self._resolve(name) for name in names))
            details = [each for each in resolved if each["status"] in ACTIVE]
            details = list({each["jobId"]: each for each in details}.values())
            if executor is not None:
                details = [each for each in details if _executor(each) == executor]
        else:
            details = await self._details(executor=executor, active=True)
        if older_than is not None:
            newest = _now().timestamp() - older_than
            details = [each for each in details if each["createdAt"] / 1000 <= newest]
        return await self._infos(details)

    async def stop(
        self,
        *,
        executor: str | None = None,
        job: str | Sequence[str] | None = None,
        everything: bool = False,
        older_than: float | None = None,
        reason: str = "stopped through cloudexec",
    ) -> list[str]:
        """See ``Monitor.stop``."""
        infos = await self.stoppable(
            executor=executor, job=job, everything=everything, older_than=older_than
        )
        ids = [each.id for each in infos]
        results = await asyncio.gather(
            *(
                self._call("batch", "terminate_job", jobId=each, reason=reason[:_REASON_LARGEST])
                for each in ids
            ),
            return_exceptions=True,
        )
        refused: list[tuple[str, AwsError]] = []
        for job_id, result in zip(ids, results, strict=True):
            if isinstance(result, AwsError):
                refused.append((job_id, result))
            elif isinstance(result, BaseException):
                raise result
        if refused:
            first = refused[0][1]
            listed = ", ".join(job_id for job_id, _ in refused[:5])
            more = f" and {len(refused) - 5} more" if len(refused) > 5 else ""
            raise AwsError(
                f"{len(refused)} of {len(ids)} jobs could not be stopped ({listed}{more}): {first}",
                code=first.code,
                operation=first.operation,
                transient=first.transient,
                expired=first.expired,
            ) from first
        return ids

    async def logs(
        self, job_or_worker: str, *, follow: bool = False, tail: int | None = None
    ) -> AsyncGenerator[LogLine, None]:
        """See ``Monitor.logs``."""
        if tail is not None and not 0 <= tail <= _TAIL_LARGEST:
            raise ConfigError(f"tail must be 0 to {_TAIL_LARGEST:,} lines, not {tail}")
        detail = await self._resolve(job_or_worker)
        size = int(detail.get("arrayProperties", {}).get("size", 0))
        if size:
            if follow or size > _ARRAY_LOGS:
                raise ConfigError(
                    f"job {detail['jobId']} has {size} workers: name one of them, "
                    f"{detail['jobId']}:0 to {detail['jobId']}:{size - 1}"
                )
            children = await self._describe([f"{detail['jobId']}:{i}" for i in range(size)])
            children = [child for child in children if _streams(child)]
            if not children:
                raise self._no_log(detail)
            for child in children:
                async for line in self._job_logs(child, follow=False, tail=tail):
                    yield line
            return
        async for line in self._job_logs(detail, follow=follow, tail=tail):
            yield line

    # Logs

    async def _job_logs(
        self, detail: Mapping[str, Any], *, follow: bool, tail: int | None
    ) -> AsyncIterator[LogLine]:
        tokens: dict[str, str] = {}
        # Of a job with several attempts, the tail is that of the last one so far.
        tails = {} if tail is None else {stream: tail for _, stream in _streams(detail)[-1:]}
        first = 0 if tail is None else max(0, len(_streams(detail)) - 1)
        has_read = False
        quiet = 0
        while True:
            # What was true before the log is read: what it said last is then still read.
            has_ended = detail["status"] in ENDED
            streams = _streams(detail)
            has_news = False
            for attempt, stream in streams[first:]:
                lines = self._new_lines(detail, attempt, stream, tokens, tails.get(stream))
                try:
                    async for line in lines:
                        has_news = True
                        yield line
                    has_read = True
                except AwsError as exc:
                    if exc.code != _MISSING_LOG:
                        raise
                    # The stream's name is known before anything is in it.
            # A retry begins another stream; the one before it is looked at once more.
            first = max(first, len(streams) - 1)
            quiet = 0 if has_news or not has_ended else quiet + 1
            if (has_read and not follow) or quiet > _LOG_SETTLE:
                break
            if not follow:
                raise self._no_log(detail)
            await asyncio.sleep(_LOG_POLL)
            detail = (await self._describe([detail["jobId"]]) or [detail])[0]
        if not has_read:
            raise self._no_log(detail)

    async def _new_lines(
        self,
        detail: Mapping[str, Any],
        attempt: int,
        stream: str,
        tokens: dict[str, str],
        tail: int | None,
    ) -> AsyncIterator[LogLine]:
        """Yield what a stream has beyond what was read."""
        group = self._group_of(detail)
        while True:
            token = tokens.get(stream)
            extra: dict[str, Any] = {"startFromHead": True}
            if token is not None:
                extra["nextToken"] = token
            elif tail is not None:
                extra = {"startFromHead": False, "limit": max(tail, 1)}
            page = await self._call(
                "logs", "get_log_events", logGroupName=group, logStreamName=stream, **extra
            )
            tokens[stream] = page["nextForwardToken"]
            if not (token is None and tail == 0):
                for event in page["events"]:
                    yield LogLine(
                        time=_required_time(event["timestamp"]),
                        message=event["message"],
                        job_id=detail["jobId"],
                        attempt=attempt,
                        stream=stream,
                    )
            # The API repeats the token at the end of the stream. Pages may be empty before that.
            if page["nextForwardToken"] == token:
                return

    def _group_of(self, detail: Mapping[str, Any]) -> str:
        options = _container(detail).get("logConfiguration", {}).get("options", {})
        return str(options.get("awslogs-group") or self._log_group or _BATCH_LOG_GROUP)

    def _no_log(self, detail: Mapping[str, Any]) -> AwsError:
        job, state = detail["jobId"], detail["status"]
        if state in ENDED:
            reason = _reason(detail)
            text = f"job {job} has {state} without a log" + (
                f": {reason}"
                if reason
                else "; perhaps its lines have not arrived yet, or were deleted with their log "
                f"group {self._group_of(detail)}"
            )
        else:
            reason = _reason(detail)
            text = (
                f"job {job} is {state} and has no log yet"
                + (f" ({reason})" if reason else "")
                + "; `cloudexec logs -f` waits for it"
            )
        return AwsError(text, code="NoLog", operation="logs:GetLogEvents")

    # Finding jobs

    async def _details(
        self, *, executor: str | None = None, active: bool | None = None, name: str = ""
    ) -> list[Mapping[str, Any]]:
        """Return what DescribeJobs says of jobs of ours, without the children of arrays."""
        pattern = name or f"{JOB_PREFIX}{executor}-*" if executor or name else f"{JOB_PREFIX}*"
        listed = await asyncio.gather(
            *(self._listed(queue, pattern) for queue in await self._queues())
        )
        wanted = (*ACTIVE, *ENDED) if active is None else ACTIVE if active else ENDED
        ids = {each["jobId"]: None for jobs in listed for each in jobs if each["status"] in wanted}
        details = [each for each in await self._describe(list(ids)) if _executor(each)]
        if executor is not None:
            details = [each for each in details if _executor(each) == executor]
        # Time has passed since they were listed.
        return [each for each in details if each["status"] in wanted]

    async def _listed(self, queue: str, pattern: str) -> list[Mapping[str, Any]]:
        prefix, is_prefix = pattern.rstrip("*").lower(), pattern.endswith("*")
        found = [
            each
            async for each in self._pages(
                "batch",
                "list_jobs",
                "jobSummaryList",
                jobQueue=queue,
                filters=[{"name": "JOB_NAME", "values": [pattern]}],
            )
        ]
        return [
            each
            for each in found
            if (each["jobName"].lower().startswith(prefix))
            and (is_prefix or each["jobName"].lower() == prefix)
        ]

    async def _queues(self) -> list[str]:
        if self._given:
            for kind, queue in self._given.items():
                compute, _, spot = kind.partition("_")
                self._known_queues[_last(queue)] = (compute, spot == "spot")
            return list(dict.fromkeys(self._given.values()))
        queues = [each async for each in self._pages("batch", "describe_job_queues", "jobQueues")]
        environments = {
            each["computeEnvironmentArn"]: each.get("computeResources", {}).get("type", "")
            async for each in self._pages(
                "batch", "describe_compute_environments", "computeEnvironments"
            )
        }
        for each in queues:
            kinds = [
                environments.get(order["computeEnvironment"], "")
                for order in each.get("computeEnvironmentOrder", ())
            ]
            self._known_queues[each["jobQueueName"]] = (
                "fargate" if any(kind.startswith("FARGATE") for kind in kinds) else "ec2",
                # One that falls back to on demand is priced as that: rather too much.
                bool(kinds) and all(kind.endswith("SPOT") for kind in kinds),
            )
        return [each["jobQueueArn"] for each in queues]

    async def _describe(self, ids: Sequence[str]) -> list[Mapping[str, Any]]:
        chunks = [ids[i : i + DESCRIBE_JOBS] for i in range(0, len(ids), DESCRIBE_JOBS)]
        answers = await asyncio.gather(
            *(self._call("batch", "describe_jobs", jobs=list(chunk)) for chunk in chunks)
        )
        return [each for answer in answers for each in answer["jobs"]]

    async def _resolve(self, name: str) -> Mapping[str, Any]:
        """Return what DescribeJobs says of what the user named.

        Raises:
            AwsError: If there is no such job, or it is not ours.
            ConfigError: If several answer to the name.
        """
        name = name.strip()
        if name.startswith("arn:"):
            name = name.rpartition("/")[2]
        worker = _WORKER.fullmatch(name)
        if _JOB_ID.fullmatch(name):
            return await self._by_id(name)
        if worker is not None:
            return await self._by_worker(worker["executor"], int(worker["number"]))
        job, _, index = name.partition(":")
        details = await self._details(name=job) if not index or index.isdecimal() else []
        if not details:
            raise _not_found(name, self._clients.region)
        latest = max(details, key=lambda each: int(each["createdAt"]))
        return await self._by_id(f"{latest['jobId']}:{index}") if index else latest

    async def _by_id(self, job_id: str) -> Mapping[str, Any]:
        parent_id, _, index = job_id.partition(":")
        found = {
            each["jobId"]: each
            for each in await self._describe([parent_id, job_id] if index else [job_id])
        }
        parent = found.get(parent_id)
        if parent is None or job_id not in found:
            raise _not_found(job_id, self._clients.region)
        if not _executor(parent):
            raise AwsError(
                f"job {job_id} is not one of cloudexec's: it has no tag {TAG_EXECUTOR}",
                code="NotOurs",
                operation="batch:DescribeJobs",
            )
        # Whether children carry their parent's tags is not documented.
        return {**found[job_id], "tags": parent["tags"]}

    async def _by_worker(self, executor: str | None, number: int) -> Mapping[str, Any]:
        name = f"worker-{number}"
        fitting: list[Mapping[str, Any]] = []
        for each in await self._details(executor=executor):
            first = _first_worker(each)
            size = int(each.get("arrayProperties", {}).get("size", 1))
            if first is not None and first <= number < first + size:
                fitting.append(each)
        if len(fitting) > 1:
            fitting = [each for each in fitting if each["status"] in ACTIVE] or fitting
        if not fitting:
            raise _not_found(f"{executor}/{name}" if executor else name, self._clients.region)
        if len(fitting) > 1:
            names = ", ".join(sorted(f"{_executor(each)}/{name}" for each in fitting)[:5])
            raise ConfigError(f"several executors have a {name}: say which, such as {names}")
        found = fitting[0]
        if found.get("arrayProperties", {}).get("size"):
            return await self._by_id(f"{found['jobId']}:{number - (_first_worker(found) or 0)}")
        return found

    # Records

    async def _infos(
        self, details: Sequence[Mapping[str, Any]], runs: Mapping[str, _Runs] | None = None
    ) -> list[JobInfo]:
        await self._learn_definitions(details)
        if runs is None:
            runs = await self._all_runs(details)
        return [self._info(each, runs[each["jobId"]]) for each in details]

    def _info(self, detail: Mapping[str, Any], runs: _Runs) -> JobInfo:
        tags = detail.get("tags", {})
        container = {**self._definition(detail).get("containerProperties", {})}
        container |= {key: value for key, value in _container(detail).items() if value}
        price, compute, spot = self._price(detail, container)
        array = detail.get("arrayProperties", {})
        job_id = str(detail["jobId"])
        index = array.get("index")
        if index is None and ":" in job_id:
            index = int(job_id.rpartition(":")[2])
        first = _first_worker(detail)
        streams = _streams(detail)
        reason = _reason(detail)
        if runs.failures:
            (common, count), *others = runs.failures.most_common()
            reason = f"{count} failed: {common}" + (" (and otherwise)" if others else "")
        if runs.waiting:
            reason = "; ".join(filter(None, (reason, f"waiting: {runs.waiting}")))
        vcpus, memory_mib = _size(container)
        return JobInfo(
            id=job_id,
            name=str(detail["jobName"]),
            state=str(detail["status"]),
            executor=_executor(detail),
            user=str(tags.get(TAG_USER, "")),
            project=str(tags.get(TAG_PROJECT, "")),
            queue=_last(detail.get("jobQueue", "")),
            definition=_last(detail.get("jobDefinition", "")),
            size=int(array.get("size", 1)),
            index=index,
            first_worker=None if first is None else first + (index or 0),
            workers=_workers(detail),
            vcpus=vcpus,
            memory_mib=memory_mib,
            arch=_arch(container),
            compute=compute,
            spot=spot,
            created_at=_required_time(detail["createdAt"]),
            started_at=_time(detail.get("startedAt")),
            stopped_at=_time(detail.get("stoppedAt")),
            expires_at=_iso(tags.get(TAG_EXPIRES)),
            exit_code=_exit_code(detail),
            reason=reason,
            attempts=tuple(_attempts(detail)),
            log_group=self._group_of(detail),
            log_stream=streams[-1][1] if streams else "",
            run_seconds=math.fsum(runs.seconds),
            cost_usd=price.cost_of(runs.seconds),
            per_hour_usd=runs.now * price.per_hour,
            is_estimate=price.estimated or price.assumed or not runs.is_complete,
        )

    def _table(self) -> PriceTable:
        if self._prices is None:
            self._prices = PriceTable.load(self._clients.region)
        return self._prices

    def _price(
        self, detail: Mapping[str, Any], container: Mapping[str, Any]
    ) -> tuple[WorkerPrice, str, bool]:
        """Return the price, the compute, and whether it is Spot."""
        compute, spot = self._known_queues.get(_last(detail.get("jobQueue", "")), ("", False))
        capabilities = (
            detail.get("platformCapabilities")
            or self._definition(detail).get("platformCapabilities")
            or ()
        )
        if not compute:
            compute = "fargate" if "FARGATE" in capabilities else "ec2"
        vcpus, memory_mib = _size(container)
        network = container.get("networkConfiguration", {})
        price = self._table().worker(
            vcpus=vcpus,
            memory_mib=memory_mib,
            arch=_arch(container),
            compute=compute,
            spot=spot,
            ephemeral_gib=container.get("ephemeralStorage", {}).get("sizeInGiB"),
            public_ip=network.get("assignPublicIp") == "ENABLED",
            region=self._clients.region,
        )
        return price, compute, spot

    async def _learn_definitions(self, details: Iterable[Mapping[str, Any]]) -> None:
        """Look definitions up where a job itself does not tell its size."""
        needed = {
            str(each["jobDefinition"])
            for each in details
            if not _container(each).get("resourceRequirements")
        }
        missing = sorted(needed - self._definitions.keys())
        for i in range(0, len(missing), DESCRIBE_JOBS):
            answer = await self._call(
                "batch", "describe_job_definitions", jobDefinitions=missing[i : i + DESCRIBE_JOBS]
            )
            for definition in answer["jobDefinitions"]:
                self._definitions[definition["jobDefinitionArn"]] = definition

    def _definition(self, detail: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._definitions.get(str(detail.get("jobDefinition", "")), {})

    # Runs

    async def _all_runs(self, details: Sequence[Mapping[str, Any]]) -> dict[str, _Runs]:
        budget = _Budget(self._child_calls)
        now = _now().timestamp()
        found = await asyncio.gather(
            *(
                self._array_runs(each, now, budget)
                if each.get("arrayProperties", {}).get("size")
                else _only(_own_runs(each, now))
                for each in details
            )
        )
        return {each["jobId"]: runs for each, runs in zip(details, found, strict=True)}

    async def _array_runs(self, detail: Mapping[str, Any], now: float, budget: _Budget) -> _Runs:
        counts = _workers(detail)
        states = [state for state in ("RUNNING", "SUCCEEDED", "FAILED") if counts.get(state)]
        if detail["status"] in ACTIVE and "RUNNING" not in states:
            states.append("RUNNING")  # the counts lag
        children: dict[str, Mapping[str, Any]] = {}
        runs = _Runs()
        for state in states:
            summaries, is_complete = await self._children(detail["jobId"], state, budget)
            children |= {each["jobId"]: each for each in summaries}
            runs.is_complete = runs.is_complete and is_complete
        if _may_run_again(detail):
            # A line of a list knows the last attempt only.
            started = [key for key, each in children.items() if each.get("startedAt")]
            for i in range(0, len(started), DESCRIBE_JOBS):
                if not budget.take():
                    runs.is_complete = False
                    break
                described = await self._describe(started[i : i + DESCRIBE_JOBS])
                children |= {each["jobId"]: each for each in described}
        for child in children.values():
            own = _own_runs(child, now)
            runs.seconds += own.seconds
            runs.now += own.now
            if child["status"] == "FAILED" and (reason := _reason(child)):
                runs.failures[reason] += 1
        if counts.get("RUNNABLE") and budget.take():
            # Only the first in the queue is told why it waits: one page has it.
            page = await self._call(
                "batch",
                "list_jobs",
                arrayJobId=detail["jobId"],
                jobStatus="RUNNABLE",
                maxResults=100,
            )
            reasons = (each.get("statusReason") for each in page.get("jobSummaryList", ()))
            runs.waiting = next((reason for reason in reasons if reason), "")
        unseen = sum(counts.get(state, 0) for state in states) - len(children)
        if not runs.is_complete and unseen > 0:
            whole = (detail.get("stoppedAt", now * 1000) - detail["createdAt"]) / 1000
            average = math.fsum(runs.seconds) / len(runs.seconds) if runs.seconds else whole
            runs.seconds += [average] * unseen
            runs.now += max(0, counts.get("RUNNING", 0) - runs.now)
        return runs

    async def _children(
        self, parent_id: str, state: str, budget: _Budget
    ) -> tuple[list[Mapping[str, Any]], bool]:
        """Return the children of an array that are in a state, and whether these are all."""
        found: list[Mapping[str, Any]] = []
        token: dict[str, Any] = {}
        while budget.take():
            page = await self._call(
                "batch", "list_jobs", arrayJobId=parent_id, jobStatus=state, **token
            )
            found += [
                each for each in page.get("jobSummaryList", ()) if each.get("status") == state
            ]
            if not page.get("nextToken"):
                return found, True
            token = {"nextToken": page["nextToken"]}
        return found, False

    async def _each_worker(
        self, details: Sequence[Mapping[str, Any]], limit: int | None
    ) -> list[JobInfo]:
        found: list[Mapping[str, Any]] = []
        for each in details:
            room = None if limit is None else limit - len(found)
            if room is not None and room <= 0:
                break
            size = int(each.get("arrayProperties", {}).get("size", 0))
            if not size:
                found.append(each)
                continue
            shown = size if room is None else min(size, room)
            children = await self._describe([f"{each['jobId']}:{i}" for i in range(shown)])
            children.sort(key=lambda child: int(str(child["jobId"]).rpartition(":")[2]))
            found += [{**child, "tags": each.get("tags", {})} for child in children]
        return await self._infos(found)

    # Calls

    async def _call(self, service: str, operation: str, **parameters: Any) -> Any:
        async with self._gate:
            loop = asyncio.get_running_loop()
            wait = self._next_call - loop.time()
            self._next_call = max(self._next_call, loop.time()) + _CALL_INTERVAL
            if wait > 0:
                await asyncio.sleep(wait)
            return await self._clients.call(service, operation, **parameters)

    async def _pages(
        self, service: str, operation: str, key: str, **parameters: Any
    ) -> AsyncIterator[Mapping[str, Any]]:
        token: dict[str, Any] = {}
        while True:
            page = await self._call(service, operation, **parameters, **token)
            for each in page.get(key, ()):
                yield each
            if not page.get("nextToken"):
                return
            token = {"nextToken": page["nextToken"]}


class Monitor:
    """Sees and stops what runs in an account on cloudexec's behalf, and says what it costs.

    Works wherever blocking is allowed, in a notebook too: calls are made on an event loop of its
    own, in a thread that ``close`` (or the end of a ``with`` block) ends.

    Args:
        profile: Name of a profile whose queues to look at; ``None``: all queues of the region.
        region: Where; by default the profile's, or the SDK's.

    Raises:
        ConfigError: If there is no such profile, or no region.
    """

    def __init__(self, profile: str | None = None, region: str | None = None) -> None:
        self._profile = None if profile is None else Profile.load(profile)
        if self._profile is not None:
            if region is not None and region != self._profile.region:
                raise ConfigError(
                    f"profile {profile!r} is in {self._profile.region}, not in {region}: "
                    f"give one of them"
                )
            region = self._profile.region
        self._thread = _LoopThread()
        self._finalizer = weakref.finalize(self, self._thread.close)
        try:
            self._async: AsyncMonitor = self._thread.run(self._open(region))
        except BaseException:
            self.close()
            raise

    async def _open(self, region: str | None) -> AsyncMonitor:
        clients = AwsClients(region)
        self._thread.on_close(clients.close)
        profile = self._profile
        return AsyncMonitor(
            clients,
            queues={} if profile is None else profile.queues,
            log_group="" if profile is None else profile.log_group,
        )

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close connections and end the thread. May be called again."""
        self._finalizer()

    def executors(
        self, *, active: bool | None = True, executor: str | None = None
    ) -> list[ExecutorInfo]:
        """Return executors, the newest first.

        Args:
            active: Only those that have jobs which have not ended, or (``False``) have none;
                ``None``: both.
            executor: Only the one with this id.

        Raises:
            AwsError: If AWS refuses, or cannot be reached.
        """
        return self._thread.run(self._async.executors(active=active, executor=executor))

    def jobs(
        self,
        state: str | Iterable[str] | None = None,
        *,
        active: bool | None = None,
        executor: str | None = None,
        each_worker: bool = False,
        limit: int | None = None,
    ) -> list[JobInfo]:
        """Return jobs, the newest first.

        Args:
            state: Only those in this state, or one of these; of arrays, those that have a worker
                in it.
            active: Only those that have not ended, or (``False``) have; ``None``: both.
            executor: Only those of this executor.
            each_worker: Whether workers of arrays are listed one by one, instead of the array.
            limit: How many at most.

        Raises:
            AwsError: If AWS refuses, or cannot be reached.
            ConfigError: If there is no such state.
        """
        return self._thread.run(
            self._async.jobs(
                state=state,
                active=active,
                executor=executor,
                each_worker=each_worker,
                limit=limit,
            )
        )

    def logs(
        self, job_or_worker: str, follow: bool = False, tail: int | None = None
    ) -> Iterator[LogLine]:
        """Yield the lines of a log, those of several attempts one after the other.

        Args:
            job_or_worker: A job's id, ``PARENT:INDEX``, or name; or a worker as errors name it,
                such as ``worker-12``, with its executor before it where several have one:
                ``0f3a7c9912ab44de/worker-12``. An array of up to 100 workers: all their logs,
                one after the other.
            follow: Wait for more until the job has ended. Then the log need not be there yet.
            tail: Begin with so many lines at the end of the last attempt.

        Raises:
            AwsError: If there is no such job, its log is not there yet (``code`` ``"NoLog"``),
                AWS refuses, or cannot be reached.
            ConfigError: If the name fits several, or ``tail`` is out of its range.
        """
        lines = self._async.logs(job_or_worker, follow=follow, tail=tail)
        try:
            while True:
                line = self._thread.run(_next(lines))
                if line is None:
                    return
                yield line
        finally:
            # After Ctrl-C it may still be on its way out by itself.
            with contextlib.suppress(RuntimeError):
                self._thread.run(lines.aclose())

    def stoppable(
        self,
        executor: str | None = None,
        job: str | Sequence[str] | None = None,
        everything: bool = False,
        older_than: float | None = None,
    ) -> list[JobInfo]:
        """Return the jobs that ``stop`` with the same arguments would stop."""
        return self._thread.run(
            self._async.stoppable(
                executor=executor, job=job, everything=everything, older_than=older_than
            )
        )

    def stop(
        self,
        executor: str | None = None,
        job: str | Sequence[str] | None = None,
        everything: bool = False,
        older_than: float | None = None,
        *,
        reason: str = "stopped through cloudexec",
    ) -> list[str]:
        """Stop jobs, whoever started them. Their workers get SIGTERM, and 30 s later SIGKILL.

        Args:
            executor: All jobs of this executor.
            job: This job, or these, named as for ``logs``. An array is stopped with its workers.
            everything: All jobs of all executors.
            older_than: Only those submitted so many seconds ago or earlier.
            reason: What AWS Batch is to say of them.

        Returns:
            Ids of the jobs that were told to stop; those that had ended are not among them.

        Raises:
            AwsError: If some could not be stopped; the others were.
            ConfigError: If nothing is said of what to stop.
        """
        return self._thread.run(
            self._async.stop(
                executor=executor,
                job=job,
                everything=everything,
                older_than=older_than,
                reason=reason,
            )
        )

    def cost(self, executor: str | None = None, *, refresh: bool = False) -> CostReport:
        """Return what was run and what it cost, for as long as AWS Batch remembers jobs.

        Args:
            executor: Only this one.
            refresh: Whether to look prices up first; if that is not possible, a note says so.

        Raises:
            AwsError: If AWS refuses, or cannot be reached.
        """
        return self._thread.run(self._async.cost(executor, refresh=refresh))


class _LoopThread:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._closers: list[Any] = []
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="cloudexec-monitor", daemon=True
        )
        self._thread.start()

    def on_close(self, closer: Any) -> None:
        """Have an asynchronous function called before the loop ends."""
        self._closers.append(closer)

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run to the end, from any thread."""
        if self._loop.is_closed():
            work.close()
            raise RuntimeError("the monitor was closed")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C comes while waiting: what was asked for is wanted no more.
            future.cancel()
            raise

    def close(self) -> None:
        """End the loop and its thread."""
        if self._loop.is_closed():
            return
        if threading.current_thread() is self._thread:
            # The garbage collector may run anywhere, and here it must not wait for itself.
            threading.Thread(target=self.close, name="cloudexec-monitor-close").start()
            return
        with contextlib.suppress(Exception):
            self.run(self._wind_up())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _wind_up(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for closer in reversed(self._closers):
            await closer()
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()


async def _next(lines: AsyncIterator[LogLine]) -> LogLine | None:
    return await anext(lines, None)


async def _only(value: _T) -> _T:
    return value


# What AWS says, read


def _now() -> datetime:
    return datetime.now(UTC)


def _time(milliseconds: int | float | None) -> datetime | None:
    return None if not milliseconds else datetime.fromtimestamp(milliseconds / 1000, UTC)


def _required_time(milliseconds: int | float) -> datetime:
    return datetime.fromtimestamp(milliseconds / 1000, UTC)


def _iso(text: str | None) -> datetime | None:
    try:
        time = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _last(arn_or_name: str) -> str:
    return arn_or_name.rpartition("/")[2]


def _executor(detail: Mapping[str, Any]) -> str:
    return str(detail.get("tags", {}).get(TAG_EXECUTOR, ""))


def _first_worker(detail: Mapping[str, Any]) -> int | None:
    found = _LAUNCH.search(str(detail["jobName"]))
    return None if found is None else int(found[1])


def _container(detail: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the container's part, also of a job with ``ecsProperties``."""
    container: Mapping[str, Any] = detail.get("container", {})
    if container:
        return container
    tasks = detail.get("ecsProperties", {}).get("taskProperties", ())
    containers = tasks[0].get("containers", ()) if tasks else ()
    return containers[0] if containers else {}


def _size(container: Mapping[str, Any]) -> tuple[float, int]:
    """Return vCPUs and MiB of a job's container, as requested."""
    asked = {each["type"]: each["value"] for each in container.get("resourceRequirements", ())}
    return (
        float(asked.get("VCPU") or container.get("vcpus") or 0),
        int(asked.get("MEMORY") or container.get("memory") or 0),
    )


def _arch(container: Mapping[str, Any]) -> str:
    is_arm = container.get("runtimePlatform", {}).get("cpuArchitecture") == "ARM64"
    return "arm64" if is_arm else "x86_64"


def _workers(detail: Mapping[str, Any]) -> Mapping[str, int]:
    """Return how many workers are in which state."""
    array = detail.get("arrayProperties", {})
    if not array.get("size"):
        return {str(detail["status"]): 1}
    counts = {
        state: int(count)
        for state in (*ACTIVE, *ENDED)
        if (count := array.get("statusSummary", {}).get(state))
    }
    return counts or {str(detail["status"]): int(array["size"])}


def _reason(detail: Mapping[str, Any]) -> str:
    """Return the container's reason, which says more, and the job's."""
    container = detail.get("container", {}).get("reason")
    if not container and detail.get("attempts"):
        container = detail["attempts"][-1].get("container", {}).get("reason")
    said = dict.fromkeys(str(each) for each in (container, detail.get("statusReason")) if each)
    return "; ".join(said)


def _exit_code(detail: Mapping[str, Any]) -> int | None:
    code = detail.get("container", {}).get("exitCode")
    if code is None and detail.get("attempts"):
        code = detail["attempts"][-1].get("container", {}).get("exitCode")
    return None if code is None else int(code)


def _attempts(detail: Mapping[str, Any]) -> Iterator[AttemptInfo]:
    for number, attempt in enumerate(detail.get("attempts", ()), 1):
        container = attempt.get("container", {})
        said = (container.get("reason"), attempt.get("statusReason"))
        yield AttemptInfo(
            number=number,
            started_at=_time(attempt.get("startedAt")),
            stopped_at=_time(attempt.get("stoppedAt")),
            exit_code=container.get("exitCode"),
            reason="; ".join(dict.fromkeys(str(each) for each in said if each)),
            log_stream=container.get("logStreamName") or "",
        )


def _streams(detail: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Return the number and log stream of each attempt that has one, in order."""
    streams = {
        stream: number
        for number, attempt in enumerate(detail.get("attempts", ()), 1)
        if (stream := attempt.get("container", {}).get("logStreamName"))
    }
    current = detail.get("container", {}).get("logStreamName")
    if current and current not in streams:
        streams[current] = len(detail.get("attempts", ())) + 1
    return [(number, stream) for stream, number in streams.items()]


def _own_runs(detail: Mapping[str, Any], now: float) -> _Runs:
    """Return the runs of one worker, from its description or its line in a list."""
    attempts = [each for each in detail.get("attempts", ()) if each.get("startedAt")]
    spans = {int(each["startedAt"]): each.get("stoppedAt") for each in attempts}
    started = detail.get("startedAt")
    has_ended = detail["status"] in ENDED
    # What runs now is not among the attempts until it has ended.
    if started and int(started) not in spans and (not has_ended or not spans):
        spans[int(started)] = detail.get("stoppedAt")
    runs = _Runs()
    for begin, end in spans.items():
        if end:
            runs.seconds.append(max(0.0, (end - begin) / 1000))
        elif detail["status"] == "RUNNING":
            runs.seconds.append(max(0.0, now - begin / 1000))
            runs.now += 1
    return runs


def _may_run_again(detail: Mapping[str, Any]) -> bool:
    """Whether AWS Batch may start a worker again that had run.

    The reasons of a failed start, which our own jobs are started again for, end an attempt that
    never ran and cost nothing.
    """
    strategy = detail.get("retryStrategy", {})
    if strategy.get("attempts", 1) <= 1:
        return False
    rules = strategy.get("evaluateOnExit", ())
    if not rules or (rules[-1].get("onReason"), rules[-1]["action"].upper()) != ("*", "EXIT"):
        return True  # what fits no rule is retried
    return any(
        each["action"].upper() == "RETRY"
        and not str(each.get("onReason", "")).startswith(_FAILED_STARTS)
        for each in rules
    )


def _states(state: str | Iterable[str] | None) -> set[str] | None:
    if state is None:
        return None
    states = {each.upper() for each in ([state] if isinstance(state, str) else state)}
    if unknown := states - {*ACTIVE, *ENDED}:
        raise ConfigError(
            f"a job's state is one of {', '.join((*ACTIVE, *ENDED))}, "
            f"not {', '.join(sorted(unknown))}"
        )
    return states


def _by_executor(jobs: Iterable[JobInfo]) -> list[list[JobInfo]]:
    """Group jobs; the executor with the newest job, and the newest job of each, come first."""
    groups: dict[str, list[JobInfo]] = {}
    for job in sorted(jobs, key=lambda each: each.created_at, reverse=True):
        groups.setdefault(job.executor, []).append(job)
    return list(groups.values())


def _executor_info(jobs: Sequence[JobInfo], now: datetime) -> ExecutorInfo:
    last = jobs[0]
    workers: Counter[str] = Counter()
    vcpus, memory_mib = 0.0, 0
    for job in jobs:
        workers.update(job.workers)
        placed = job.workers.get("STARTING", 0) + job.workers.get("RUNNING", 0)
        vcpus += placed * job.vcpus
        memory_mib += placed * job.memory_mib
    created_at = min(job.created_at for job in jobs)
    expiries = [job.expires_at for job in jobs if job.expires_at is not None]
    return ExecutorInfo(
        id=last.executor,
        user=last.user,
        project=last.project,
        is_active=any(job.is_active for job in jobs),
        created_at=created_at,
        age_seconds=max(0.0, (now - created_at).total_seconds()),
        expires_at=max(expiries, default=None),
        queues=tuple(sorted({job.queue for job in jobs})),
        jobs=len(jobs),
        workers={state: workers[state] for state in (*ACTIVE, *ENDED) if workers[state]},
        vcpus=vcpus,
        memory_mib=memory_mib,
        cost_usd=math.fsum(job.cost_usd for job in jobs),
        per_hour_usd=math.fsum(job.per_hour_usd for job in jobs),
        is_estimate=any(job.is_estimate for job in jobs),
    )


def _not_found(name: str, region: str) -> AwsError:
    return AwsError(
        f"there is no job {name} of cloudexec's in {region}, or AWS Batch has forgotten it: "
        f"`cloudexec jobs` lists them",
        code="NotFound",
        operation="batch:DescribeJobs",
    )


for _class in (
    AttemptInfo,
    CostReport,
    ExecutorCost,
    ExecutorInfo,
    JobInfo,
    LogLine,
    Monitor,
):
    _class.__module__ = "cloudexec.aws"
