"""What runs in an account on cloudexec's behalf: to look at it, read its logs, stop it, price it.

Everything is found in AWS itself, by the tags and names that every job of ours carries, so that it
is seen from any machine, and after the client that started it has died. AWS Batch forgets jobs
some time after they ended, 7 days at the least, and this with them.
"""

from __future__ import annotations

import asyncio
import math
import re
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Iterable,
    Mapping,
    Sequence,
)
from types import MappingProxyType
from typing import Any

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.job_details import (
    Runs,
    arch_of,
    attempts_of,
    by_executor,
    container_of,
    executor_info,
    executor_of,
    exit_code_of,
    first_worker,
    last_part,
    may_run_again,
    own_runs,
    reason_of,
    required_time,
    size_of,
    states_of,
    streams_of,
    time_of,
    time_of_text,
    utc_now,
    workers_of,
)
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
from cloudexec._aws.records import (
    ACTIVE,
    ENDED,
    CostReport,
    ExecutorCost,
    ExecutorInfo,
    JobInfo,
    LogLine,
)
from cloudexec._errors import AwsError, ConfigError

__all__ = ["AsyncMonitor"]

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
_JOB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_-]{0,127})(?::(?P<index>\d+))?")
_WORKER = re.compile(r"(?:(?P<executor>[^/]+)/)?worker-(?P<number>\d+)")
_MISSING_LOG = "ResourceNotFoundException"


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
        states = states_of(state)
        if limit is not None and limit < 0:
            raise ConfigError(f"limit must be 0 or more, not {limit}")
        details = await self._details(executor=executor, active=active)
        details.sort(key=lambda each: int(each["createdAt"]), reverse=True)
        if states is not None:
            details = [each for each in details if states & workers_of(each).keys()]
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
            of_active = {executor_of(each) for each in details if each["status"] in ACTIVE}
            details = [each for each in details if (executor_of(each) in of_active) is active]
        return [executor_info(jobs, utc_now()) for jobs in by_executor(await self._infos(details))]

    async def cost(self, executor: str | None = None, *, refresh: bool = False) -> CostReport:
        """See ``Monitor.cost``."""
        if refresh:
            self._prices = await refresh_prices(self._clients)
        details = await self._details(executor=executor)
        runs = await self._all_runs(details)
        infos = await self._infos(details, runs)
        rows: list[ExecutorCost] = []
        for jobs in by_executor(infos):
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
        if older_than is not None and not older_than >= 0:
            raise ConfigError(f"older_than must be 0 seconds or more, not {older_than}")
        if names:
            resolved = await asyncio.gather(*(self._resolve(name) for name in names))
            details = [each for each in resolved if each["status"] in ACTIVE]
            details = list({each["jobId"]: each for each in details}.values())
            if executor is not None:
                details = [each for each in details if executor_of(each) == executor]
        else:
            details = await self._details(executor=executor, active=True)
        if older_than is not None:
            newest = utc_now().timestamp() - older_than
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
            children = [child for child in children if streams_of(child)]
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
        tails = {} if tail is None else {stream: tail for _, stream in streams_of(detail)[-1:]}
        first = 0 if tail is None else max(0, len(streams_of(detail)) - 1)
        has_read = False
        quiet = 0
        while True:
            # What was true before the log is read: what it said last is then still read.
            has_ended = detail["status"] in ENDED
            streams = streams_of(detail)
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
                        time=required_time(event["timestamp"]),
                        message=event["message"],
                        job_id=detail["jobId"],
                        attempt=attempt,
                        stream=stream,
                    )
            # The API repeats the token at the end of the stream. Pages may be empty before that.
            if page["nextForwardToken"] == token:
                return

    def _group_of(self, detail: Mapping[str, Any]) -> str:
        options = container_of(detail).get("logConfiguration", {}).get("options", {})
        return str(options.get("awslogs-group") or self._log_group or _BATCH_LOG_GROUP)

    def _no_log(self, detail: Mapping[str, Any]) -> AwsError:
        job, state = detail["jobId"], detail["status"]
        if state in ENDED:
            reason = reason_of(detail)
            text = f"job {job} has {state} without a log" + (
                f": {reason}"
                if reason
                else "; perhaps its lines have not arrived yet, or were deleted with their log "
                f"group {self._group_of(detail)}"
            )
        else:
            reason = reason_of(detail)
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
        if executor is not None and not executor.strip():
            raise ConfigError("an executor is its id, as `cloudexec ps` shows it, not nothing")
        pattern = name or f"{JOB_PREFIX}{executor}-*" if executor or name else f"{JOB_PREFIX}*"
        listed = await asyncio.gather(
            *(self._listed(queue, pattern) for queue in await self._queues())
        )
        wanted = (*ACTIVE, *ENDED) if active is None else ACTIVE if active else ENDED
        ids = {each["jobId"]: None for jobs in listed for each in jobs if each["status"] in wanted}
        details = [each for each in await self._describe(list(ids)) if executor_of(each)]
        if executor is not None:
            details = [each for each in details if executor_of(each) == executor]
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
                self._known_queues[last_part(queue)] = (compute, spot == "spot")
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
        if not name:
            raise ConfigError("a job or worker is named, as `cloudexec jobs` shows it, not nothing")
        # One with a star would fit what nobody meant.
        named = _JOB_NAME.fullmatch(name)
        details = [] if named is None else await self._details(name=named["name"])
        if named is None or not details:
            raise _not_found(name, self._clients.region)
        latest = max(details, key=lambda each: int(each["createdAt"]))
        index = named["index"]
        return latest if index is None else await self._by_id(f"{latest['jobId']}:{int(index)}")

    async def _by_id(self, job_id: str) -> Mapping[str, Any]:
        parent_id, _, index = job_id.partition(":")
        found = {
            each["jobId"]: each
            for each in await self._describe([parent_id, job_id] if index else [job_id])
        }
        parent = found.get(parent_id)
        if parent is None or job_id not in found:
            raise _not_found(job_id, self._clients.region)
        if not executor_of(parent):
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
            first = first_worker(each)
            size = int(each.get("arrayProperties", {}).get("size", 1))
            if first is not None and first <= number < first + size:
                fitting.append(each)
        if len(fitting) > 1:
            fitting = [each for each in fitting if each["status"] in ACTIVE] or fitting
        if not fitting:
            raise _not_found(f"{executor}/{name}" if executor else name, self._clients.region)
        if len(fitting) > 1:
            names = ", ".join(sorted(f"{executor_of(each)}/{name}" for each in fitting)[:5])
            raise ConfigError(f"several executors have a {name}: say which, such as {names}")
        found = fitting[0]
        if found.get("arrayProperties", {}).get("size"):
            return await self._by_id(f"{found['jobId']}:{number - (first_worker(found) or 0)}")
        return found

    # Records

    async def _infos(
        self, details: Sequence[Mapping[str, Any]], runs: Mapping[str, Runs] | None = None
    ) -> list[JobInfo]:
        await self._learn_definitions(details)
        if runs is None:
            runs = await self._all_runs(details)
        return [self._info(each, runs[each["jobId"]]) for each in details]

    def _info(self, detail: Mapping[str, Any], runs: Runs) -> JobInfo:
        tags = detail.get("tags", {})
        container = {**self._definition(detail).get("containerProperties", {})}
        container |= {key: value for key, value in container_of(detail).items() if value}
        price, compute, spot = self._price(detail, container)
        array = detail.get("arrayProperties", {})
        job_id = str(detail["jobId"])
        index = array.get("index")
        if index is None and ":" in job_id:
            index = int(job_id.rpartition(":")[2])
        first = first_worker(detail)
        streams = streams_of(detail)
        reason = reason_of(detail)
        if runs.failures:
            (common, count), *others = runs.failures.most_common()
            reason = f"{count} failed: {common}" + (" (and otherwise)" if others else "")
        if runs.waiting:
            reason = "; ".join(filter(None, (reason, f"waiting: {runs.waiting}")))
        vcpus, memory_mib = size_of(container)
        return JobInfo(
            id=job_id,
            name=str(detail["jobName"]),
            state=str(detail["status"]),
            executor=executor_of(detail),
            user=str(tags.get(TAG_USER, "")),
            project=str(tags.get(TAG_PROJECT, "")),
            queue=last_part(detail.get("jobQueue", "")),
            definition=last_part(detail.get("jobDefinition", "")),
            size=int(array.get("size", 1)),
            index=index,
            first_worker=None if first is None else first + (index or 0),
            workers=workers_of(detail),
            vcpus=vcpus,
            memory_mib=memory_mib,
            arch=arch_of(container),
            compute=compute,
            spot=spot,
            created_at=required_time(detail["createdAt"]),
            started_at=time_of(detail.get("startedAt")),
            stopped_at=time_of(detail.get("stoppedAt")),
            expires_at=time_of_text(tags.get(TAG_EXPIRES)),
            exit_code=exit_code_of(detail),
            reason=reason,
            attempts=tuple(attempts_of(detail)),
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
        compute, spot = self._known_queues.get(last_part(detail.get("jobQueue", "")), ("", False))
        capabilities = (
            detail.get("platformCapabilities")
            or self._definition(detail).get("platformCapabilities")
            or ()
        )
        if not compute:
            compute = "fargate" if "FARGATE" in capabilities else "ec2"
        vcpus, memory_mib = size_of(container)
        network = container.get("networkConfiguration", {})
        price = self._table().worker(
            vcpus=vcpus,
            memory_mib=memory_mib,
            arch=arch_of(container),
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
            if not container_of(each).get("resourceRequirements")
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

    async def _all_runs(self, details: Sequence[Mapping[str, Any]]) -> dict[str, Runs]:
        budget = _Budget(self._child_calls)
        now = utc_now().timestamp()
        found = await asyncio.gather(
            *(
                self._array_runs(each, now, budget)
                if each.get("arrayProperties", {}).get("size")
                else _only(own_runs(each, now))
                for each in details
            )
        )
        return {each["jobId"]: runs for each, runs in zip(details, found, strict=True)}

    async def _array_runs(self, detail: Mapping[str, Any], now: float, budget: _Budget) -> Runs:
        counts = workers_of(detail)
        states = [state for state in ("RUNNING", "SUCCEEDED", "FAILED") if counts.get(state)]
        if detail["status"] in ACTIVE and "RUNNING" not in states:
            states.append("RUNNING")  # the counts lag
        children: dict[str, Mapping[str, Any]] = {}
        runs = Runs()
        for state in states:
            summaries, is_complete = await self._children(detail["jobId"], state, budget)
            children |= {each["jobId"]: each for each in summaries}
            runs.is_complete = runs.is_complete and is_complete
        if may_run_again(detail):
            # A line of a list knows the last attempt only.
            started = [key for key, each in children.items() if each.get("startedAt")]
            for i in range(0, len(started), DESCRIBE_JOBS):
                if not budget.take():
                    runs.is_complete = False
                    break
                described = await self._describe(started[i : i + DESCRIBE_JOBS])
                children |= {each["jobId"]: each for each in described}
        for child in children.values():
            own = own_runs(child, now)
            runs.seconds += own.seconds
            runs.now += own.now
            if child["status"] == "FAILED" and (reason := reason_of(child)):
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


def _not_found(name: str, region: str) -> AwsError:
    return AwsError(
        f"there is no job {name} of cloudexec's in {region}, or AWS Batch has forgotten it: "
        f"`cloudexec jobs` lists them",
        code="NotFound",
        operation="batch:DescribeJobs",
    )


async def _only(value: Runs) -> Runs:
    return value
