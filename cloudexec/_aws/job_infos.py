"""Makes the records of jobs that users see: state, size, run time and cost."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cloudexec._aws.instance_prices import assumed_price, instance_price
from cloudexec._aws.job_details import (
    Runs,
    arch_of,
    attempts_of,
    container_of,
    executor_of,
    exit_code_of,
    first_worker,
    gpus_of,
    last_part,
    log_group_of,
    may_run_again,
    own_runs,
    reason_of,
    required_time,
    size_of,
    streams_of,
    time_of,
    time_of_text,
    utc_now,
    was_ordered,
    workers_of,
)
from cloudexec._aws.job_search import JobSearch
from cloudexec._aws.limits import DESCRIBE_JOBS, USUAL_DISK_GIB, WorkerSize
from cloudexec._aws.names import TAG_DISK, TAG_EXPIRES, TAG_PROJECT, TAG_USER
from cloudexec._aws.paced_calls import PacedCalls
from cloudexec._aws.prices import PriceTable
from cloudexec._aws.records import ACTIVE, JobInfo
from cloudexec._pricing import WorkerPrice

__all__ = ["JobInfos"]


class _Budget:
    """The number of calls that may still be made."""

    def __init__(self, calls: int) -> None:
        self._left = calls

    def take(self) -> bool:
        """Count one call, and return whether it may be made."""
        self._left -= 1
        return self._left >= 0


class JobInfos:
    """Makes records of jobs from their descriptions.

    Args:
        calls: Calls to AWS.
        search: Knows the queues, and describes the children of arrays.
        log_group: Log group of jobs that do not name one.
        prices: By default the prices that were last looked up for the region.
        child_calls: Most calls that one answer makes to list children of arrays.
    """

    def __init__(
        self,
        calls: PacedCalls,
        search: JobSearch,
        *,
        log_group: str,
        prices: PriceTable | None,
        child_calls: int,
    ) -> None:
        self.prices = prices
        self._calls = calls
        self._search = search
        self._log_group = log_group
        self._child_calls = child_calls
        self._definitions: dict[str, Mapping[str, Any]] = {}

    async def infos(
        self, details: Sequence[Mapping[str, Any]], runs: Mapping[str, Runs] | None = None
    ) -> list[JobInfo]:
        await self._learn_definitions(details)
        if runs is None:
            runs = await self.all_runs(details)
        return [self._info(each, runs[each["jobId"]]) for each in details]

    async def each_worker(
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
            children = await self._search.describe([f"{each['jobId']}:{i}" for i in range(shown)])
            children.sort(key=lambda child: int(str(child["jobId"]).rpartition(":")[2]))
            found += [{**child, "tags": each.get("tags", {})} for child in children]
        return await self.infos(found)

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
        elif runs.ordered:
            reason = f"{runs.ordered} told to end"
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
            workers=workers_of(detail, runs.ordered),
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
            without_client=runs.without_client,
            reason=reason,
            attempts=tuple(attempts_of(detail)),
            log_group=log_group_of(detail, self._log_group),
            log_stream=streams[-1][1] if streams else "",
            run_seconds=math.fsum(runs.seconds),
            cost_usd=price.cost_of(runs.seconds),
            per_hour_usd=runs.now * price.per_hour,
            is_estimate=price.estimated or price.assumed or not runs.is_complete,
        )

    def table(self) -> PriceTable:
        if self.prices is None:
            self.prices = PriceTable.load(self._calls.region)
        return self.prices

    def _price(
        self, detail: Mapping[str, Any], container: Mapping[str, Any]
    ) -> tuple[WorkerPrice, str, bool]:
        """Return the price, the compute, and whether it is Spot."""
        compute, spot = self._search.compute_of(detail.get("jobQueue", ""))
        if "spot" in detail:  # it is no job of AWS Batch
            compute, spot = str(detail.get("compute", "fargate")), bool(detail["spot"])
        capabilities = (
            detail.get("platformCapabilities")
            or self._definition(detail).get("platformCapabilities")
            or ()
        )
        if not compute:
            compute = "fargate" if "FARGATE" in capabilities else "ec2"
        vcpus, memory_mib = size_of(container)
        network = container.get("networkConfiguration", {})
        if compute == "instance":
            return self._price_of_instance(detail, container), compute, spot
        price = self.table().worker(
            vcpus=vcpus,
            memory_mib=memory_mib,
            gpus=gpus_of(container),
            arch=arch_of(container),
            compute=compute,
            spot=spot,
            ephemeral_gib=container.get("ephemeralStorage", {}).get("sizeInGiB"),
            public_ip=network.get("assignPublicIp") == "ENABLED",
            region=self._calls.region,
        )
        return price, compute, spot

    def _price_of_instance(
        self, detail: Mapping[str, Any], container: Mapping[str, Any]
    ) -> WorkerPrice:
        """Return the price of an instance: as AWS has told it, or else as a table has it."""
        spot, per_hour = bool(detail["spot"]), detail.get("perHour")
        # An instance itself does not say how large its disk is.
        tagged = str(detail.get("tags", {}).get(TAG_DISK, ""))
        disk_gib = int(tagged) if tagged.isdecimal() else USUAL_DISK_GIB
        has_address = container.get("networkConfiguration", {}).get("assignPublicIp") == "ENABLED"
        if per_hour is not None:
            return instance_price(
                self.table(),
                float(per_hour),
                spot=spot,
                disk_gib=disk_gib,
                public_ip=has_address,
                estimated=spot,
                region=self._calls.region,
            )
        vcpus, memory_mib = size_of(container)
        return assumed_price(
            self.table(),
            WorkerSize(vcpus=vcpus or 1, memory_mib=memory_mib or 1, gpus=gpus_of(container)),
            arch=arch_of(container),
            spot=spot,
            disk_gib=disk_gib,
            public_ip=has_address,
            region=self._calls.region,
            instance_type=str(detail["instanceType"]),
        )

    async def _learn_definitions(self, details: Iterable[Mapping[str, Any]]) -> None:
        """Look up the definitions of jobs whose own descriptions lack the size."""
        needed = {
            str(each["jobDefinition"])
            for each in details
            if not container_of(each).get("resourceRequirements")
        }
        missing = sorted(needed - self._definitions.keys())
        for i in range(0, len(missing), DESCRIBE_JOBS):
            answer = await self._calls.call(
                "batch", "describe_job_definitions", jobDefinitions=missing[i : i + DESCRIBE_JOBS]
            )
            for definition in answer["jobDefinitions"]:
                self._definitions[definition["jobDefinitionArn"]] = definition

    def _definition(self, detail: Mapping[str, Any]) -> Mapping[str, Any]:
        return self._definitions.get(str(detail.get("jobDefinition", "")), {})

    async def all_runs(self, details: Sequence[Mapping[str, Any]]) -> dict[str, Runs]:
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
            states.append("RUNNING")  # the counts are updated late
        children: dict[str, Mapping[str, Any]] = {}
        runs = Runs()
        for state in states:
            summaries, is_complete = await self._children(detail["jobId"], state, budget)
            children |= {each["jobId"]: each for each in summaries}
            runs.is_complete = runs.is_complete and is_complete
        if may_run_again(detail):
            # Summaries in a list have the last attempt only.
            started = [key for key, each in children.items() if each.get("startedAt")]
            for i in range(0, len(started), DESCRIBE_JOBS):
                if not budget.take():
                    runs.is_complete = False
                    break
                described = await self._search.describe(started[i : i + DESCRIBE_JOBS])
                children |= {each["jobId"]: each for each in described}
        for child in children.values():
            own = own_runs(child, now)
            runs.seconds += own.seconds
            runs.now += own.now
            runs.without_client += own.without_client
            if was_ordered(child):
                runs.ordered += 1
            elif child["status"] == "FAILED" and (reason := reason_of(child)):
                runs.failures[reason] += 1
        if counts.get("RUNNABLE") and budget.take():
            # AWS Batch gives a reason to the first job in the queue only, so one page suffices.
            page = await self._calls.call(
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
        """Return the children of an array in one state, and whether the list is complete."""
        found: list[Mapping[str, Any]] = []
        token: dict[str, Any] = {}
        while budget.take():
            page = await self._calls.call(
                "batch", "list_jobs", arrayJobId=parent_id, jobStatus=state, **token
            )
            found += [
                each for each in page.get("jobSummaryList", ()) if each.get("status") == state
            ]
            if not page.get("nextToken"):
                return found, True
            token = {"nextToken": page["nextToken"]}
        return found, False


async def _only(value: Runs) -> Runs:
    return value
