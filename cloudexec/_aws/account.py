"""Lists, stops and prices cloudexec's jobs in an account, and reads their logs.

Jobs are found in AWS itself, by the tags and names that cloudexec gives to each of them. So they
are found from any machine, and also after the client that started them has died. AWS Batch forgets
a job 7 days after its end or later, and it cannot be found from then on. Tasks of Amazon ECS that
were started without AWS Batch count as jobs here, too. Amazon ECS forgets them after about an hour.
So do EC2 instances, which Amazon EC2 forgets after about an hour, too, and invocations of AWS
Lambda, which are found in the log of the last day.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import (
    AsyncGenerator,
    Iterable,
    Mapping,
    Sequence,
)
from dataclasses import replace
from types import MappingProxyType

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.function_search import FunctionSearch, is_invocation_id
from cloudexec._aws.instance_search import InstanceSearch, is_instance_id
from cloudexec._aws.job_details import (
    by_executor,
    executor_info,
    executor_of,
    run_of,
    states_of,
    streams_of,
    utc_now,
    workers_of,
)
from cloudexec._aws.job_infos import JobInfos
from cloudexec._aws.job_logs import JobLogs
from cloudexec._aws.job_search import JobSearch
from cloudexec._aws.paced_calls import PacedCalls
from cloudexec._aws.prices import PriceTable
from cloudexec._aws.prices import refresh as refresh_prices
from cloudexec._aws.records import (
    ACTIVE,
    CostReport,
    ExecutorCost,
    ExecutorInfo,
    JobInfo,
    LogLine,
)
from cloudexec._aws.task_search import TaskSearch, is_task_id
from cloudexec._errors import AwsError, ConfigError

__all__ = ["AsyncMonitor"]

_CHILD_CALLS = 200
"""Most calls that one answer makes to list children of arrays. The rest is estimated."""
_ARRAY_LOGS = 100
"""Most workers of an array whose logs are read, one log after the other."""
_TAIL_LARGEST = 10_000
"""Most events in one page. Amazon CloudWatch Logs API Reference, "GetLogEvents"."""
_REASON_LARGEST = 1024
"""Most characters of a reason. AWS Batch API Reference, "TerminateJob"."""


class AsyncMonitor:
    """The same as ``Monitor``, for programs that have their own event loop and AWS clients."""

    def __init__(
        self,
        clients: AwsClients,
        *,
        queues: Mapping[str, str] = MappingProxyType({}),
        clusters: Sequence[str] | None = None,
        functions: Sequence[str] | None = None,
        instances: bool = True,
        public_ip: bool = True,
        log_group: str = "",
        prices: PriceTable | None = None,
        child_calls: int = _CHILD_CALLS,
    ) -> None:
        """Create a monitor of one region.

        Args:
            clients: Calls to AWS in the region to look at.
            queues: Name or ARN of each queue by kind, as in a profile; empty: all of the region.
            clusters: ARNs or names of clusters of Amazon ECS; ``None``: all of the region.
            functions: Log groups of functions of AWS Lambda; ``None``: of all of the region.
            instances: Whether there may be EC2 instances that run workers without AWS Batch.
            public_ip: Whether tasks in these clusters have public addresses, which cost money.
            log_group: Log group of jobs that do not name one.
            prices: By default the prices that were last looked up for the region.
            child_calls: Most calls that one answer makes to list children of arrays.
        """
        self._clients = clients
        self._calls = PacedCalls(clients)
        tasks = TaskSearch(self._calls, clusters, public_ip=public_ip)
        self._functions = FunctionSearch(self._calls, functions)
        self._instances = InstanceSearch(
            self._calls, log_group=log_group, is_used=instances, public_ip=public_ip
        )
        self._search = JobSearch(self._calls, queues, tasks, self._functions, self._instances)
        self._logs = JobLogs(self._calls, self._search, log_group)
        self._infos = JobInfos(
            self._calls, self._search, log_group=log_group, prices=prices, child_calls=child_calls
        )

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
        details = await self._search.jobs(executor=executor, active=active)
        details.sort(key=lambda each: int(each["createdAt"]), reverse=True)
        if states is not None:
            details = [each for each in details if states & workers_of(each).keys()]
        if each_worker:
            found = await self._infos.each_worker(details, limit)
            if states is not None:
                found = [each for each in found if each.state in states]
        else:
            found = await self._infos.infos(details[:limit])
        return found[:limit]

    async def executors(
        self, *, active: bool | None = True, executor: str | None = None
    ) -> list[ExecutorInfo]:
        """See ``Monitor.executors``."""
        details = await self._search.jobs(executor=executor)
        if active is not None:
            of_active = {executor_of(each) for each in details if each["status"] in ACTIVE}
            details = [each for each in details if (executor_of(each) in of_active) is active]
        return [
            executor_info(jobs, utc_now()) for jobs in by_executor(await self._infos.infos(details))
        ]

    async def cost(self, executor: str | None = None, *, refresh: bool = False) -> CostReport:
        """See ``Monitor.cost``."""
        if refresh:
            self._infos.prices = await refresh_prices(self._clients)
        details = await self._search.jobs(executor=executor)
        runs = await self._infos.all_runs(details)
        infos = await self._infos.infos(details, runs)
        rows: list[ExecutorCost] = []
        for jobs in by_executor(infos):
            last = jobs[0]
            workers = [job for job in jobs if not job.is_relay]
            relays = [job for job in jobs if job.is_relay]
            rows.append(
                ExecutorCost(
                    executor=last.executor,
                    user=last.user,
                    project=last.project,
                    is_active=any(job.is_active for job in jobs),
                    created_at=min(job.created_at for job in jobs),
                    runs=sum(len(runs[job.id].seconds) for job in workers),
                    run_seconds=math.fsum(job.run_seconds for job in workers),
                    vcpu_hours=math.fsum(job.run_seconds * job.vcpus for job in workers) / 3600,
                    gib_hours=math.fsum(job.run_seconds * job.memory_mib for job in workers)
                    / 1024
                    / 3600,
                    relay_seconds=math.fsum(job.run_seconds for job in relays),
                    relay_usd=math.fsum(job.cost_usd for job in relays),
                    cost_usd=math.fsum(job.cost_usd for job in jobs),
                    per_hour_usd=math.fsum(job.per_hour_usd for job in jobs),
                    is_estimate=any(job.is_estimate for job in jobs),
                )
            )
        table = self._infos.table()
        notes = [table.note] if table.note else []
        if table.region != self._clients.region:
            notes.append(
                f"{table.region} list prices: those of {self._clients.region} are not known here, "
                f"`cloudexec cost --refresh` looks them up"
            )
        if any(is_task_id(job.id) for job in infos):
            notes.append("Amazon ECS remembers tasks for about an hour after they ended")
        if any(is_invocation_id(job.id) for job in infos):
            notes.append("workers on AWS Lambda are those of the last day that the log tells of")
        if any(is_instance_id(job.id) for job in infos):
            notes.append("Amazon EC2 remembers instances for about an hour after they ended")
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
        expired: bool = False,
    ) -> list[JobInfo]:
        """See ``Monitor.stoppable``."""
        names = [job] if isinstance(job, str) else list(job or ())
        is_limited = older_than is not None or expired
        if executor is None and not names and not everything and not is_limited:
            raise ConfigError(
                "say what to stop: executor=, job=, older_than= (seconds), expired=True or "
                "everything=True"
            )
        if older_than is not None and not older_than >= 0:
            raise ConfigError(f"older_than must be 0 seconds or more, not {older_than}")
        if names:
            resolved = await asyncio.gather(*(self._search.resolve(name) for name in names))
            # Stopping a run also stops its executors' workers. The run's own job comes first, as it
            # would start new workers.
            for run in filter(None, map(run_of, list(resolved))):
                resolved += await self._search.workers_of_run(run)
            details = [each for each in resolved if each["status"] in ACTIVE]
            details = list({each["jobId"]: each for each in details}.values())
            if executor is not None:
                details = [each for each in details if executor_of(each) == executor]
        else:
            details = await self._search.jobs(executor=executor, active=True)
        if older_than is not None:
            newest = utc_now().timestamp() - older_than
            details = [each for each in details if each["createdAt"] / 1000 <= newest]
        found = await self._infos.infos(details)
        if expired:
            now = utc_now()
            found = [each for each in found if each.expires_at and each.expires_at < now]
        return found

    async def stop(
        self,
        *,
        executor: str | None = None,
        job: str | Sequence[str] | None = None,
        everything: bool = False,
        older_than: float | None = None,
        expired: bool = False,
        reason: str = "stopped through cloudexec",
    ) -> list[str]:
        """See ``Monitor.stop``."""
        infos = await self.stoppable(
            executor=executor,
            job=job,
            everything=everything,
            older_than=older_than,
            expired=expired,
        )
        ids = [each.id for each in infos]
        results = await asyncio.gather(
            *(self._stop(each, reason[:_REASON_LARGEST]) for each in infos),
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

    async def _stop(self, job: JobInfo, reason: str) -> None:
        if is_invocation_id(job.id):
            await self._functions.stop(job.queue)
        elif is_instance_id(job.id):
            await self._instances.stop(job.id)
        elif is_task_id(job.id):
            await self._calls.call(
                "ecs", "stop_task", cluster=job.queue, task=job.id, reason=reason
            )
        else:
            await self._calls.call("batch", "terminate_job", jobId=job.id, reason=reason)

    async def logs(
        self, job_or_worker: str, *, follow: bool = False, tail: int | None = None
    ) -> AsyncGenerator[LogLine, None]:
        """See ``Monitor.logs``."""
        if tail is not None and not 0 <= tail <= _TAIL_LARGEST:
            raise ConfigError(f"tail must be 0 to {_TAIL_LARGEST:,} lines, not {tail}")
        detail = await self._search.resolve(job_or_worker)
        size = int(detail.get("arrayProperties", {}).get("size", 0))
        if size:
            if follow or size > _ARRAY_LOGS:
                raise ConfigError(
                    f"job {detail['jobId']} has {size} workers: name one of them, "
                    f"{detail['jobId']}:0 to {detail['jobId']}:{size - 1}"
                )
            children = await self._search.describe([f"{detail['jobId']}:{i}" for i in range(size)])
            children = [child for child in children if streams_of(child)]
            if not children:
                raise self._logs.no_log(detail)
            for child in children:
                async for line in self._logs.of(child, follow=False, tail=tail):
                    yield line
            return
        async for line in self._logs.of(detail, follow=follow, tail=tail):
            yield line

    async def logs_of_attempts(
        self,
        log_group: str,
        streams: Sequence[tuple[int, str]],
        *,
        follow: bool = False,
        tail: int | None = None,
    ) -> AsyncGenerator[LogLine, None]:
        """See ``Monitor.logs_of_attempts``."""
        *before, last = streams
        for each in [*before, last] if tail is None else [last]:
            number, stream = each
            job_id = stream.rpartition("/")[2]  # of a task or an instance
            described = await self._search.describe([job_id]) if each == last else []
            container = {
                "logStreamName": stream,
                "logConfiguration": {"options": {"awslogs-group": log_group}},
            }
            # How one ended that is forgotten is of no matter: there is nothing to wait for.
            detail = {"jobId": job_id, "status": "FAILED", "container": container}
            detail |= described[0] if described else {}
            try:
                async for line in self._logs.of(detail, follow=follow and each == last, tail=tail):
                    yield replace(line, attempt=number)
            except AwsError as exc:
                if exc.code != "NoLog" or described:
                    raise
                if each == last:
                    text = f"the log {stream} is not in {log_group} (any more)"
                    raise AwsError(text, code=exc.code, operation=exc.operation) from exc
