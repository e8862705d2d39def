"""AWS Batch as the place of runs: a job for each, on Fargate or, if need be, on EC2."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any

from cloudexec._aws import names
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.definitions import ensure_definition
from cloudexec._aws.diagnosis import cause_of_end, cause_of_refusal, cause_of_waiting
from cloudexec._aws.job_details import streams_of, was_ordered
from cloudexec._aws.job_infos import JobInfos
from cloudexec._aws.job_search import JobSearch
from cloudexec._aws.limits import (
    WorkerSize,
    default_memory,
    fargate_size_for,
    format_memory,
    instance_size_for,
)
from cloudexec._aws.paced_calls import PacedCalls
from cloudexec._aws.prices import PriceTable
from cloudexec._aws.profile import Profile
from cloudexec._aws.records import ACTIVE, JobInfo
from cloudexec._aws.requests import DefinitionSpec, definition_request, submit_request, tag_value
from cloudexec._aws.task_search import TaskSearch
from cloudexec._errors import AwsError, ConfigError
from cloudexec._launchers.batch.inquiry import Inquiry
from cloudexec._launchers.batch.reading import PHASES, end_of
from cloudexec._launchers.ending import insist
from cloudexec._launchers.platform import Phase, WaitingJob
from cloudexec._runs.places import Machine, MachineRequest, MachineState, StillRunning
from cloudexec._runs.plan import RunPlan

__all__ = ["OnBatch"]

_CHILD_CALLS = 50
_SUBMIT_SECONDS = 60.0
_STOP_SECONDS = 20.0
_REASON_LARGEST = 1024
"""AWS Batch API Reference, "TerminateJob"."""
_PHASES = {
    Phase.ACCEPTED: "waiting",
    Phase.WAITING: "waiting",
    Phase.STARTING: "starting",
    Phase.RUNNING: "running",
    Phase.ENDED: "ended",
}
_QUEUED = timedelta(days=1)
"""How long a job may wait, for its tag with the time at which it has ended at the latest."""


class OnBatch:
    """Runs as jobs of AWS Batch.

    Args:
        clients: Calls to AWS, in the profile's region.
        profile: Names queues and roles.
    """

    def __init__(self, clients: AwsClients, profile: Profile) -> None:
        self._clients = clients
        self._profile = profile
        self._prices = PriceTable.load(clients.region)
        self._calls = PacedCalls(clients)
        tasks = TaskSearch(self._calls, [], public_ip=True)  # runs and their workers are jobs
        self._search = JobSearch(self._calls, profile.queues, tasks)
        self._infos = JobInfos(
            self._calls,
            self._search,
            log_group=profile.log_group,
            prices=self._prices,
            child_calls=_CHILD_CALLS,
        )

    # The machine.

    def choose(self, request: MachineRequest) -> Machine:
        """Return the least size of Fargate that is enough, or one on EC2."""
        size, compute = _size(request)
        self._queue(compute, spot=request.spot)  # complains if there is none
        price = self._prices.worker(
            vcpus=size.vcpus,
            memory_mib=size.memory_mib,
            gpus=size.gpus,
            arch=request.arch,
            compute=compute,
            spot=request.spot,
            public_ip=self._profile.assign_public_ip,
            region=self._clients.region,
        )
        return Machine(size=size, compute=compute, price=price)

    def _queue(self, compute: str, *, spot: bool) -> str:
        kind = compute + ("_spot" if spot else "")
        queue = self._profile.queues.get(kind, "")
        if not queue:
            there = ", ".join(sorted(self._profile.queues)) or "none"
            hint = "; `cloudexec up --ec2` adds them" if compute == "ec2" else ""
            raise ConfigError(
                f"the profile {self._profile.name!r} has no queue for {kind} (it has: {there}), "
                f"on which this machine would be{hint}"
            )
        return queue

    async def start(self, plan: RunPlan, variables: Mapping[str, str]) -> str:
        """Submit the job."""
        profile = self._profile
        size = WorkerSize(vcpus=plan.vcpus, memory_mib=plan.memory_mib, gpus=plan.gpus)
        spec = DefinitionSpec(
            image=plan.image,
            compute=plan.compute,
            arch=plan.arch,
            execution_role=profile.execution_role,
            job_role=profile.run_role,
            log_group=profile.log_group,
            region=self._clients.region,
            assign_public_ip=profile.assign_public_ip,
            stack=profile.stack,
            size=size,
        )
        definition = await ensure_definition(self._clients, definition_request(spec))
        request = submit_request(
            name=_job_name(plan),
            queue=self._queue(plan.compute, spot=plan.spot),
            definition=definition,
            workers=1,
            size=size,
            environment=variables,
            tags=self._tags(plan),
            attempt_seconds=plan.max_seconds,
            compute=plan.compute,
            retry_reclaimed=True,
        )

        async def once() -> str:
            try:
                answer = await self._clients.call("batch", "submit_job", once=True, **request)
            except AwsError as exc:
                # It may have got there.
                found = await self._search.jobs(name=request["jobName"]) if exc.transient else []
                if not found:
                    raise
                return str(found[0]["jobId"])
            return str(answer["jobId"])

        # Interrupted in the middle of it, the job has to be known, to be ended.
        submitting = asyncio.ensure_future(insist(once, _SUBMIT_SECONDS))
        try:
            return await asyncio.shield(submitting)
        except AwsError as exc:
            exc.message = str(cause_of_refusal(exc.message))
            raise
        except asyncio.CancelledError:
            (job_id,) = await asyncio.gather(submitting, return_exceptions=True)
            if isinstance(job_id, str):
                try:
                    await self.end(job_id, "stopped by its user before it began")
                except AwsError as exc:
                    raise StillRunning.of(job_id, exc) from exc
            raise

    async def end(self, job_id: str, reason: str) -> None:
        """Terminate a job."""
        terminate = functools.partial(
            self._clients.call,
            "batch",
            "terminate_job",
            jobId=job_id,
            reason=reason[:_REASON_LARGEST],
        )
        await insist(terminate, _STOP_SECONDS)

    def _tags(self, plan: RunPlan) -> dict[str, str]:
        expires = datetime.now(UTC) + _QUEUED + timedelta(seconds=plan.max_seconds)
        tags = {
            names.TAG_EXECUTOR: f"{names.RUN_EXECUTOR}{plan.name}",
            names.TAG_RUN: plan.name,
            names.TAG_USER: tag_value(plan.user),
            names.TAG_EXPIRES: expires.strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        if plan.project:
            tags[names.TAG_PROJECT] = tag_value(plan.project)
        if self._profile.stack:
            tags[names.TAG_STACK] = self._profile.stack
        return tags

    # Looking.

    async def find(
        self, plans: Sequence[RunPlan], job_ids: Mapping[str, str] = MappingProxyType({})
    ) -> dict[str, MachineState]:
        """Look at the jobs of runs, and at those of executors in them."""
        if not plans:
            return {}
        details = await self._search.jobs()
        # ListJobs may be late: AWS does not say how much.
        listed = {str(each["jobId"]) for each in details}
        unlisted = [each for each in job_ids.values() if each not in listed]
        details += await self._search.describe(unlisted)
        of_runs: dict[str, list[Mapping[str, Any]]] = {}
        for each in details:
            of_runs.setdefault(str(each.get("tags", {}).get(names.TAG_RUN, "")), []).append(each)
        jobs = {plan.name: _of_this_start(plan, of_runs.get(plan.name, ())) for plan in plans}
        all_jobs = [each for found in jobs.values() for each in found]
        infos = {each.id: each for each in await self._infos.infos(all_jobs)}
        return {
            plan.name: state
            for plan in plans
            if (state := _state(plan, jobs[plan.name], infos, job_ids.get(plan.name, "")))
        }

    async def look(self, plan: RunPlan, state: MachineState) -> MachineState:
        """Look at the run's job."""
        details = await self._search.describe([state.job_id])
        infos = {each.id: each for each in await self._infos.infos(details)}
        return _state(plan, details, infos) or state

    async def why(self, state: MachineState) -> str:
        """Ask queue, environments and quotas why a job waits; or read how it ended."""
        described = await self._search.describe([state.job_id])
        if not described:
            return "AWS Batch does not know the job any more"
        details = described[0]
        inquiry = Inquiry(self._clients.call, _compute(details))
        inquiry.log_group = state.log_group
        if PHASES[details["status"]] is Phase.ENDED:
            return _why_it_ended(details)
        reason = str(details.get("statusReason", ""))
        waiting = WaitingJob(
            job_id=state.job_id, counts={PHASES[details["status"]]: 1}, reason=reason
        )
        with contextlib.suppress(AwsError):
            queue = str(details["jobQueue"])
            vcpus = end_of(details, ()).size
            situation = await inquiry.situation(
                [waiting],
                [],
                queue=queue,
                vcpus=vcpus.vcpus if vcpus is not None else 1.0,
                used_vcpus=0.0,
            )
            if (cause := cause_of_waiting(situation)) is not None:
                return str(cause)
        return reason

    # The end.

    async def stop(
        self, name: str, reason: str, job_id: str = "", *, workers_only: bool = False
    ) -> int:
        """Terminate the job, and then those of executors in it, which would start no more."""
        details = await self._search.jobs(active=True)
        if job_id and job_id not in {each["jobId"] for each in details}:
            # ListJobs may be late.
            described = await self._search.describe([job_id])
            details += [each for each in described if each["status"] in ACTIVE]
        details = [
            each
            for each in details
            if each.get("tags", {}).get(names.TAG_RUN) == name
            and not (workers_only and _is_own(each, name))
        ]
        details.sort(key=lambda each: not _is_own(each, name))
        for each in details:
            await self.end(str(each["jobId"]), reason)
        return len(details)


def _size(request: MachineRequest) -> tuple[WorkerSize, str]:
    """Return the least size that is enough, and where it is."""
    cpus, mib = request.cpus, request.memory_mib
    if request.gpus:
        mib = default_memory(cpus, "ec2") if mib is None else mib
        return instance_size_for(cpus, mib, request.gpus), "ec2"
    mib = math.ceil(2048 * cpus) if mib is None else mib
    try:
        return fargate_size_for(cpus, mib), "fargate"
    except ConfigError:
        return instance_size_for(cpus, mib, 0), "ec2"


def _is_own(details: Mapping[str, Any], name: str) -> bool:
    """Whether a job is the machine of a run, and not a worker of an executor in it."""
    return str(details.get("tags", {}).get(names.TAG_EXECUTOR)) == f"{names.RUN_EXECUTOR}{name}"


def _job_name(plan: RunPlan) -> str:
    """Return the name of the job of a start, which has its id."""
    # A letter before the digits: what ends in a number is a job of workers.
    return names.job_name(f"{names.RUN_EXECUTOR}{plan.name}", f"r{plan.start_id}")


def _of_this_start(plan: RunPlan, details: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the jobs of a start, and of executors in it, among those of all of its name."""
    own = [each for each in details if each["jobName"] == _job_name(plan)]
    if not own:
        return []
    # An earlier start has ended before this one began, and its workers were submitted before that.
    began = min(int(each["createdAt"]) for each in own)
    workers = [each for each in details if not _is_own(each, plan.name)]
    return [*own, *(each for each in workers if int(each["createdAt"]) >= began)]


def _compute(details: Mapping[str, Any]) -> str:
    return "ec2" if "EC2" in details.get("platformCapabilities", ()) else "fargate"


def _why_it_ended(details: Mapping[str, Any]) -> str:
    """Say how the machine of a run ended, in words for its user."""
    end = end_of(details, details.get("attempts", ()))
    said = "; ".join(filter(None, (end.container_reason, end.status_reason)))
    if was_ordered(details):
        return f"it was {said}" if said.startswith("stopped") else said
    if end.out_of_memory:
        size = f" of {format_memory(end.size.memory_mib)}" if end.size is not None else ""
        return f"its memory{size} was used up: give a larger --memory ({said})"
    if "exceeded timeout" in said:
        return f"its time limit was over: --max-hours or --max-cost allow more ({said})"
    if end.reclaimed:
        last = len(details.get("attempts", ()))
        return f"AWS took its machine back in attempt {last}, the last one ({said})"
    if end.exit_code is not None:
        return f"it ended with exit code {end.exit_code} ({said})"
    return str(cause_of_end(end))


def _state(
    plan: RunPlan,
    details: Sequence[Mapping[str, Any]],
    infos: Mapping[str, JobInfo],
    job_id: str = "",
) -> MachineState | None:
    """Put together what the jobs of a start say; ``None``: its own is not among them.

    Of several own ones, the one with the id runs the program.
    """
    own = [each for each in details if _is_own(each, plan.name)]
    if not own:
        return None
    newest = max(own, key=lambda each: (each["jobId"] == job_id, int(each["createdAt"])))
    info = infos[newest["jobId"]]
    workers = [infos[each["jobId"]] for each in details if not _is_own(each, plan.name)]
    all_own = [infos[each["jobId"]] for each in own]
    return MachineState(
        job_id=info.id,
        phase=_PHASES[PHASES[info.state]],
        created_at=info.created_at,
        started_at=info.started_at,
        stopped_at=info.stopped_at,
        exit_code=info.exit_code,
        reason=info.reason,
        was_stopped=was_ordered(newest),
        streams=tuple(streams_of(newest)),
        log_group=info.log_group,
        attempts=len(newest.get("attempts", ())),
        run_seconds=math.fsum(each.run_seconds for each in all_own),
        cost_usd=math.fsum(each.cost_usd for each in all_own),
        workers_usd=math.fsum(each.cost_usd for each in workers),
        workers=sum(each.state in ACTIVE for each in workers),
        is_estimate=any(each.is_estimate for each in (*all_own, *workers)),
    )
