"""AWS Batch as a platform: workers are jobs and array jobs."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from cloudexec._aws.definitions import ensure_definition
from cloudexec._aws.diagnosis import (
    JobEnd,
    allowed_vcpus,
    cause_of_refusal,
    cause_of_waiting,
    is_definition_gone,
    is_out_of_capacity,
)
from cloudexec._aws.limits import ARRAY_LARGEST, DESCRIBE_JOBS
from cloudexec._aws.requests import DefinitionSpec, definition_request, submit_request
from cloudexec._errors import AwsError, ConfigError
from cloudexec._launchers.aws.platform import DefinedPlatform, all_of, connected
from cloudexec._launchers.aws.platform import Settings as AwsSettings
from cloudexec._launchers.batch.inquiry import DEFAULT_LOG_GROUP, reason_of
from cloudexec._launchers.batch.reading import PHASES, end_of, run_of, worker_end
from cloudexec._launchers.platform import (
    ExecutorInfo,
    Inspection,
    JobRequest,
    JobStatus,
    Phase,
    Reason,
    Site,
    Submitted,
    Target,
    WaitingJob,
    WorkerEnd,
    WorkerStatus,
)

__all__ = ["BatchPlatform", "Settings", "connect"]

_FARGATE_SPOT_PATIENCE = 60.0
_EC2_SPOT_PATIENCE = 300.0
"""A new instance takes minutes before it runs a job, so a shorter wait says nothing of capacity."""
_FARGATE_BURST = 100
_FARGATE_PER_SECOND = 20
"""Tasks that Fargate starts at once, and per second after these, on Spot and on demand. Amazon ECS
Developer Guide, "AWS Fargate throttling quotas"."""
_TERMINATED_AT_ONCE = 50
"""Jobs in one TerminateJobs call. AWS Batch API Reference."""


class Settings(AwsSettings, Protocol):
    """The settings of ``Batch`` that the platform uses; ``Batch`` describes them."""

    definition: str | None
    queue: str | None
    scheduling_priority: int
    share_identifier: str


def connect(
    settings: Settings, executor: ExecutorInfo
) -> contextlib.AbstractAsyncContextManager[Site]:
    """Connect to AWS Batch; see ``connected``."""
    return connected(settings, executor, BatchPlatform, of=settings.queue or "")


class BatchPlatform(DefinedPlatform):
    """AWS Batch, for one executor; see ``DefinedPlatform``."""

    name = "AWS Batch"
    most_workers = ARRAY_LARGEST
    _settings: Settings

    # The start.

    async def _check(self) -> None:
        """Check the queues and the job definition, and find or make the image."""
        settings = self._settings
        for spot in {bool(settings.spot), bool(settings.spot) and settings.spot != "prefer"}:
            self._queue(spot=spot)  # raises ConfigError if there is no queue
        if settings.compute == "ec2" and settings.arch == "arm64" and settings.queue is None:
            raise ConfigError(
                "the queues of `cloudexec up` start x86-64 instances on EC2: workers with "
                "arch='arm64' run on Fargate, or in a queue of your own (queue=)"
            )
        if settings.definition is not None:
            await self._check_definition(settings.definition)
        else:
            self._image = await self._find_image()

    async def _check_definition(self, name: str) -> None:
        """Check that the user's job definition exists, can run workers and has the right key."""
        parameters: dict[str, Any] = {"jobDefinitions": [name]}
        if ":" not in name:
            parameters = {"jobDefinitionName": name, "status": "ACTIVE"}
        found = await self._call("batch", "describe_job_definitions", **parameters)
        if not found["jobDefinitions"]:
            raise ConfigError(
                f"there is no job definition {name!r}; `cloudexec definitions list` shows ours"
            )
        newest = max(found["jobDefinitions"], key=lambda each: int(each["revision"]))
        if newest.get("status", "ACTIVE") != "ACTIVE":
            raise ConfigError(f"the job definition {name!r} has been deregistered")
        container = newest.get("containerProperties")
        if not container:
            kinds = ("ecsProperties", "eksProperties", "nodeProperties")
            kind = next((each for each in kinds if newest.get(each)), "no containerProperties")
            raise ConfigError(
                f"the job definition {name!r} has {kind}, and workers run only in definitions with "
                f"containerProperties: register such a definition, or leave definition= out, so "
                f"that the executor registers its own"
            )
        self._definition = newest["jobDefinitionArn"]
        options = container.get("logConfiguration", {}).get("options", {})
        self._inquiry.log_group = options.get("awslogs-group", DEFAULT_LOG_GROUP)
        secrets_ = container.get("secrets", ())
        keys = [each["valueFrom"] for each in secrets_ if each["name"] == "CLOUDEXEC_KEY"]
        if keys and keys[0] != self._profile.key_secret:
            known = f"the profile {self._profile.name!r}"
            raise ConfigError(
                f"the job definition {name!r} gives workers another key ({keys[0]}) than "
                f"{known if self._profile.name else 'a launch without a profile'} has: give "
                f"profile=, the profile of the stack to which the definition belongs"
            )
        self._keyed_by_stack = bool(keys)

    def _queue(self, *, spot: bool) -> str:
        settings = self._settings
        if settings.queue is not None:
            return settings.queue
        kind = settings.compute + ("_spot" if spot else "")
        queue = self._profile.queues.get(kind, "")
        if not queue:
            there = ", ".join(sorted(self._profile.queues)) or "none"
            hint = "; `cloudexec up --ec2` adds them" if settings.compute == "ec2" else ""
            raise ConfigError(
                f"the profile {self._profile.name!r} has no queue for {kind} (it has: {there})"
                f"{hint}"
            )
        return queue

    def spot_patience(self, workers: int) -> float:
        """Return the seconds in which workers find a place on Spot if there is capacity."""
        if self._settings.compute == "ec2":
            return _EC2_SPOT_PATIENCE
        return _FARGATE_SPOT_PATIENCE + max(0, workers - _FARGATE_BURST) / _FARGATE_PER_SECOND

    def lacks_capacity(self, reason: str) -> bool:
        """Return whether a message of AWS Batch says that there is no capacity."""
        return is_out_of_capacity(reason)

    async def is_full(self, jobs: Sequence[WaitingJob]) -> bool:
        """Return whether the executor's workers use all vCPUs that the environments allow."""
        _, environments = await self._inquiry.queue(self._queue(spot=True))
        least = min(self._settings.size_of(each.size).vcpus for each in jobs)
        return 0 < allowed_vcpus(environments) < self._used_vcpus(jobs) + least

    def _used_vcpus(self, jobs: Iterable[WaitingJob]) -> float:
        return sum(
            self._settings.size_of(each.size).vcpus * each.counts.get(phase, 0)
            for each in jobs
            for phase in (Phase.STARTING, Phase.RUNNING)
        )

    # Submission.

    async def prepare(self) -> None:
        """Find the job definition, or register it."""
        await self._define()

    async def _ensure(self, spec: DefinitionSpec) -> str:
        return await ensure_definition(self._clients, definition_request(spec))

    async def submit(self, request: JobRequest) -> Submitted:
        """Submit a job, or an array job for several workers."""
        definition = self._definition
        try:
            try:
                return await self._submit(request, definition)
            except AwsError as exc:
                if self._settings.definition is not None or not is_definition_gone(exc.message):
                    raise
                # The definition was deregistered meanwhile, so it is registered again.
                return await self._submit(request, await self._define(definition))
        except AwsError as exc:
            exc.message = str(cause_of_refusal(exc.message))
            raise

    async def _submit(self, request: JobRequest, definition: str) -> Submitted:
        settings = self._settings
        parameters = submit_request(
            name=request.name,
            queue=self._queue(spot=request.spot),
            definition=definition,
            workers=request.workers,
            size=settings.size_of(request.size),
            environment={**request.environment, **request.secrets},
            tags=self._tags(settings.max_runtime),
            attempt_seconds=int(settings.max_runtime),
            compute=settings.compute,
            retry_reclaimed=settings.spot != "prefer",
            share_identifier=settings.share_identifier,
            scheduling_priority=settings.scheduling_priority,
        )
        try:
            answer = await self._clients.call("batch", "submit_job", once=True, **parameters)
        except AwsError as exc:
            exc.uncertain = exc.transient and not exc.code.startswith(("TooMany", "Throttl"))
            raise
        return Submitted(job_id=str(answer["jobId"]))

    async def find(self, name: str, *, spot: bool) -> Submitted | None:
        """Return a job by its name; ``None`` if there is none."""
        listed = await self._call(
            "batch",
            "list_jobs",
            jobQueue=self._queue(spot=spot),
            filters=[{"name": "JOB_NAME", "values": [name]}],
        )
        for summary in listed.get("jobSummaryList", ()):
            if summary["jobName"] == name:
                return Submitted(job_id=str(summary["jobId"]))
        return None

    # Status.

    async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
        """Return the states of jobs, and of the workers that the inspections ask for."""
        described = await self._describe([each.job_id for each in inspections])
        return {
            each.job_id: await self._status(each, described[each.job_id])
            for each in inspections
            if each.job_id in described
        }

    async def _describe(self, ids: Sequence[str]) -> dict[str, Any]:
        pages = [ids[at : at + DESCRIBE_JOBS] for at in range(0, len(ids), DESCRIBE_JOBS)]
        answers = await asyncio.gather(
            *(self._call("batch", "describe_jobs", jobs=page) for page in pages)
        )
        return {each["jobId"]: each for answer in answers for each in answer["jobs"]}

    async def _status(self, inspection: Inspection, details: Mapping[str, Any]) -> JobStatus:
        reason = details.get("statusReason", "")
        if inspection.workers == 1:
            return JobStatus(workers={0: await self._worker(inspection, 0, details)}, reason=reason)
        counts: Counter[Phase] = Counter()
        summary = details.get("arrayProperties", {}).get("statusSummary", {})
        for state, count in summary.items():
            counts[PHASES[state]] += count
        interesting = set(inspection.wanted)
        over = PHASES[details["status"]] is Phase.ENDED
        if over or counts[Phase.ENDED] > len(inspection.settled):
            for state in ("FAILED", "SUCCEEDED"):
                interesting |= await self._indexes(inspection, state)
            interesting -= set(inspection.settled)
        workers: dict[int, WorkerStatus] = {}
        if inspection.survey and counts[Phase.RUNNING]:
            running = await self._indexes(inspection, "RUNNING")
            workers = dict.fromkeys(running, WorkerStatus(phase=Phase.RUNNING))
        children = [f"{inspection.job_id}:{index}" for index in sorted(interesting)]
        for child_id, child in (await self._describe(children)).items():
            index = _index_of(child_id)
            workers[index] = await self._worker(inspection, index, child)
        return JobStatus(workers=workers, counts=counts, reason=reason)

    async def _indexes(self, inspection: Inspection, state: str) -> set[int]:
        """Return the indexes of an array job's workers that are in a state of AWS Batch."""
        listed = self._clients.pages(
            "batch", "list_jobs", "jobSummaryList", arrayJobId=inspection.job_id, jobStatus=state
        )
        return {_index_of(summary["jobId"]) async for summary in listed}

    async def _worker(
        self, inspection: Inspection, index: int, details: Mapping[str, Any]
    ) -> WorkerStatus:
        phase = PHASES[details["status"]]
        attempts = details.get("attempts", ())
        over = phase is Phase.ENDED
        ends = [run_of(each) for each in attempts]
        if attempts or over:
            end = end_of(details, attempts)
            if not end.reclaimed and inspection.asks_why(index, len(attempts), over=over):
                tail = await self._inquiry.log_tail(details)
                end = replace(end, log_tail=tail, retried=not over, relay=self._inquiry.relay)
            # A job that failed before its first attempt has an end, but no attempt.
            run = ends.pop() if ends else run_of({"stoppedAt": details.get("stoppedAt")})
            ends.append(worker_end(end, run))
        return WorkerStatus(phase=phase, reason=details.get("statusReason", ""), ends=ends)

    async def explain(
        self, waiting: Sequence[WaitingJob], ends: Sequence[WorkerEnd]
    ) -> Reason | None:
        """Return why workers have not connected, by the state of queue, environments and quotas."""
        oldest = waiting[0]
        situation = await self._inquiry.situation(
            waiting,
            [end.details for end in ends if isinstance(end.details, JobEnd)],
            queue=self._queue(spot=oldest.spot),
            vcpus=self._settings.size_of(oldest.size).vcpus,
            used_vcpus=self._used_vcpus(each for each in waiting if each.spot == oldest.spot),
        )
        return reason_of(cause_of_waiting(situation))

    # The end.

    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        """Terminate jobs, or workers of array jobs, with few requests if the SDK can do that."""
        ids = [
            job_id
            for each in targets
            for job_id in (
                [each.job_id]
                if each.workers is None
                else [f"{each.job_id}:{index}" for index in each.workers]
            )
        ]
        # Older SDKs do not have this call.
        if len(ids) > 1 and hasattr(await self._clients.client("batch"), "terminate_jobs"):
            size = _TERMINATED_AT_ONCE
            pages = [ids[at : at + size] for at in range(0, len(ids), size)]
            await all_of(self._terminate_many(page, reason) for page in pages)
        else:
            await all_of(self._terminate_one(job_id, reason) for job_id in ids)

    async def _terminate_one(self, job_id: str, reason: str) -> None:
        await self._call("batch", "terminate_job", jobId=job_id, reason=reason)

    async def _terminate_many(self, ids: Sequence[str], reason: str) -> None:
        try:
            answer = await self._call("batch", "terminate_jobs", jobs=list(ids), reason=reason)
        except AwsError as exc:
            if exc.may_pass:
                raise
            # The endpoint may not know the newer call.
            left = list(ids)
        else:
            left = [str(each.get("jobId") or each.get("job")) for each in answer.get("errors", ())]
        await all_of(self._terminate_one(job_id, reason) for job_id in left)


def _index_of(child_id: str) -> int:
    return int(child_id.rpartition(":")[2])
