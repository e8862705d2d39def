"""Finds cloudexec's jobs in an account."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cloudexec._aws.instance_search import InstanceSearch, is_instance_id
from cloudexec._aws.job_details import executor_of, first_worker, last_part, run_of
from cloudexec._aws.limits import DESCRIBE_JOBS
from cloudexec._aws.names import JOB_PREFIX, RUN_EXECUTOR, TAG_EXECUTOR, TAG_RUN
from cloudexec._aws.paced_calls import PacedCalls
from cloudexec._aws.records import ACTIVE, ENDED
from cloudexec._aws.task_search import TaskSearch, is_task_id
from cloudexec._errors import AwsError, ConfigError

__all__ = ["JobSearch"]

_JOB_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}(?::\d+)?")
_JOB_NAME = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9_-]{0,127})(?::(?P<index>\d+))?")
_WORKER = re.compile(r"(?:(?P<executor>[^/]+)/)?worker-(?P<number>\d+)")


class JobSearch:
    """Finds jobs by executor, name, id or worker.

    Args:
        calls: Calls to AWS.
        queues: Name or ARN of each queue by kind, as in a profile; empty: all of the region.
        tasks: Finds tasks of Amazon ECS, which count as jobs.
        instances: Finds EC2 instances that run workers, which count as jobs, too; ``None``: there
            are none.
    """

    def __init__(
        self,
        calls: PacedCalls,
        queues: Mapping[str, str],
        tasks: TaskSearch,
        instances: InstanceSearch | None = None,
    ) -> None:
        self._instances = instances or InstanceSearch(calls, log_group="", is_used=False)
        self._calls = calls
        self._tasks = tasks
        self._given = dict(queues)
        self._known_queues: dict[str, tuple[str, bool]] = {}

    def compute_of(self, queue: str) -> tuple[str, bool]:
        """Return a queue's compute, empty if it is not known, and whether it is Spot."""
        return self._known_queues.get(last_part(queue), ("", False))

    async def jobs(
        self, *, executor: str | None = None, active: bool | None = None, name: str = ""
    ) -> list[Mapping[str, Any]]:
        """Return the descriptions of cloudexec's jobs, without the children of arrays."""
        if executor is not None and not executor.strip():
            raise ConfigError("executor is empty: give the id that `cloudexec ps` shows")
        pattern = name or f"{JOB_PREFIX}{executor}-*" if executor or name else f"{JOB_PREFIX}*"
        listed = await asyncio.gather(
            *(self._listed(queue, pattern) for queue in await self._queues())
        )
        wanted = (*ACTIVE, *ENDED) if active is None else ACTIVE if active else ENDED
        ids = {each["jobId"]: None for jobs in listed for each in jobs if each["status"] in wanted}
        found = [
            *await self.describe(list(ids)),
            *await self._tasks.jobs(name),
            *await self._instances.jobs(name),
        ]
        details = [each for each in found if executor_of(each)]
        if executor is not None:
            details = [each for each in details if executor_of(each) == executor]
        # A job may have changed its state since it was listed.
        return [each for each in details if each["status"] in wanted]

    async def _listed(self, queue: str, pattern: str) -> list[Mapping[str, Any]]:
        prefix, is_prefix = pattern.rstrip("*").lower(), pattern.endswith("*")
        found = [
            each
            async for each in self._calls.pages(
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
        queues = [
            each async for each in self._calls.pages("batch", "describe_job_queues", "jobQueues")
        ]
        environments = {
            each["computeEnvironmentArn"]: each.get("computeResources", {}).get("type", "")
            async for each in self._calls.pages(
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
                # A queue that may fall back to on demand is priced as on demand, the upper bound.
                bool(kinds) and all(kind.endswith("SPOT") for kind in kinds),
            )
        return [each["jobQueueArn"] for each in queues]

    async def describe(self, ids: Sequence[str]) -> list[Mapping[str, Any]]:
        tasks = [each for each in ids if is_task_id(each)]
        instances = [each for each in ids if is_instance_id(each)]
        ids = [each for each in ids if not (is_task_id(each) or is_instance_id(each))]
        chunks = [ids[i : i + DESCRIBE_JOBS] for i in range(0, len(ids), DESCRIBE_JOBS)]
        answers = await asyncio.gather(
            *(self._calls.call("batch", "describe_jobs", jobs=list(chunk)) for chunk in chunks)
        )
        jobs = [each for answer in answers for each in answer["jobs"]]
        others = await self._tasks.describe(tasks), await self._instances.describe(instances)
        return [*jobs, *others[0], *others[1]]

    async def workers_of_run(self, name: str) -> list[Mapping[str, Any]]:
        """Return the descriptions of jobs that the executors of a run have submitted."""
        return [
            each
            for each in await self.jobs(active=True)
            if each["tags"].get(TAG_RUN) == name and not run_of(each)
        ]

    async def resolve(self, name: str) -> Mapping[str, Any]:
        """Return the description of a job that the user has named.

        Raises:
            AwsError: If there is no such job, or it is not cloudexec's.
            ConfigError: If several jobs have the name.
        """
        name = name.strip()
        if name.startswith("arn:"):
            name = name.rpartition("/")[2]
        worker = _WORKER.fullmatch(name)
        if _JOB_ID.fullmatch(name) or is_task_id(name) or is_instance_id(name):
            return await self._by_id(name)
        if worker is not None:
            return await self._by_worker(worker["executor"], int(worker["number"]))
        if not name:
            raise ConfigError("the name is empty: give a job or worker that `cloudexec jobs` shows")
        # A name with a star would match other jobs in AWS Batch's filter.
        named = _JOB_NAME.fullmatch(name)
        details = [] if named is None else await self.jobs(name=named["name"])
        if named is not None and not details:
            details = await self.jobs(executor=f"{RUN_EXECUTOR}{named['name']}")
        if named is None or not details:
            raise _not_found(name, self._calls.region)
        latest = max(details, key=lambda each: int(each["createdAt"]))
        index = named["index"]
        return latest if index is None else await self._by_id(f"{latest['jobId']}:{int(index)}")

    async def _by_id(self, job_id: str) -> Mapping[str, Any]:
        parent_id, _, index = job_id.partition(":")
        found = {
            each["jobId"]: each
            for each in await self.describe([parent_id, job_id] if index else [job_id])
        }
        parent = found.get(parent_id)
        if parent is None or job_id not in found:
            raise _not_found(job_id, self._calls.region)
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
        for each in await self.jobs(executor=executor):
            first = first_worker(each)
            size = int(each.get("arrayProperties", {}).get("size", 1))
            if first is not None and first <= number < first + size:
                fitting.append(each)
        if len(fitting) > 1:
            fitting = [each for each in fitting if each["status"] in ACTIVE] or fitting
        if not fitting:
            raise _not_found(f"{executor}/{name}" if executor else name, self._calls.region)
        if len(fitting) > 1:
            names = ", ".join(sorted(f"{executor_of(each)}/{name}" for each in fitting)[:5])
            raise ConfigError(f"several executors have a {name}: say which, such as {names}")
        found = fitting[0]
        if found.get("arrayProperties", {}).get("size"):
            return await self._by_id(f"{found['jobId']}:{number - (first_worker(found) or 0)}")
        return found


def _not_found(name: str, region: str) -> AwsError:
    return AwsError(
        f"there is no job {name} of cloudexec in {region}, or AWS has forgotten it: "
        f"`cloudexec jobs` lists them, and `cloudexec runs` those of `cloudexec run`",
        code="NotFound",
        operation="batch:DescribeJobs",
    )
