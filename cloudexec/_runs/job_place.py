"""What places have in common whose machines are told as jobs: see ``JobPlace``."""

from __future__ import annotations

import asyncio
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Any, TypeVar

from cloudexec._aws import names
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.diagnosis import Cause, cause_of_end, cause_of_refusal, is_out_of_capacity
from cloudexec._aws.function_search import FunctionSearch, is_invocation_id
from cloudexec._aws.instance_script import container_stream
from cloudexec._aws.instance_search import InstanceSearch, is_instance_id
from cloudexec._aws.job_details import streams_of, was_ordered
from cloudexec._aws.job_infos import JobInfos
from cloudexec._aws.job_search import JobSearch
from cloudexec._aws.limits import WorkerSize, format_memory
from cloudexec._aws.paced_calls import PacedCalls
from cloudexec._aws.prices import PriceTable
from cloudexec._aws.profile import Profile
from cloudexec._aws.records import ACTIVE, JobInfo
from cloudexec._aws.requests import DefinitionSpec, tag_value
from cloudexec._aws.task_requests import CONTAINER, LOG_PREFIX
from cloudexec._aws.task_search import TaskSearch, is_task_id
from cloudexec._errors import AwsError
from cloudexec._launchers.batch.reading import PHASES, end_of
from cloudexec._launchers.ending import insist
from cloudexec._launchers.platform import Phase
from cloudexec._runs.known import JobCost, Known
from cloudexec._runs.places import MachineState, StillRunning
from cloudexec._runs.plan import RunPlan
from cloudexec._runs.protocol import TIME_IS_UP

__all__ = ["JobPlace", "refused", "run_job_name"]

_T = TypeVar("_T")
_NONE: Mapping[str, Known] = MappingProxyType({})
_CHILD_CALLS = 50
_START_SECONDS = 60.0
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
_CLOCK_SKEW = 300.0
"""Seconds by which the clock of a client may be fast. The SDK corrects requests by no more."""


class JobPlace(ABC):
    """Runs as jobs, which are found by their names and tags.

    They are jobs of AWS Batch, tasks of Amazon ECS or EC2 instances. Executors in a run may have
    workers in any of these and on AWS Lambda, wherever its machine is, so all are looked at.

    Args:
        clients: Calls to AWS, in the profile's region.
        profile: Names queues, cluster and roles.
    """

    title: str
    """What people call the place."""
    launcher = ""
    """Name of the launcher that executors in a run have by default; empty: that of the profile."""
    tries_again: bool
    """Whether the place itself starts another attempt if it takes a machine back; otherwise the
    machine does so, and each attempt is a job of its own."""
    remembers: float
    """Seconds for which the place knows a job that has ended."""
    overhead: float
    """Seconds of a machine's life besides those of its program, at the most: its tag says when it
    has ended at the latest."""

    def __init__(self, clients: AwsClients, profile: Profile) -> None:
        self._clients = clients
        self._profile = profile
        self._prices = PriceTable.load(clients.region)
        self._calls = PacedCalls(clients)
        clusters = [profile.cluster] if profile.cluster else []
        tasks = TaskSearch(
            self._calls,
            clusters,
            public_ip=profile.assign_public_ip,
            # Runs on AWS Batch go on in a stack whose role of runs is older than those on Fargate.
            may_be_denied=self.tries_again,
        )
        group = profile.log_group
        functions = FunctionSearch(
            self._calls, [group] if profile.function_role else [], may_be_denied=True
        )
        self._instances = InstanceSearch(
            self._calls,
            log_group=group,
            is_used=bool(profile.instance_profile),
            public_ip=profile.assign_public_ip,
        )
        self._search = JobSearch(self._calls, profile.queues, tasks, functions, self._instances)
        self._infos = JobInfos(
            self._calls,
            self._search,
            log_group=group,
            prices=self._prices,
            child_calls=_CHILD_CALLS,
        )

    def _definition(self, plan: RunPlan) -> DefinitionSpec:
        """Return what the definition of a run's job has to say."""
        profile = self._profile
        return DefinitionSpec(
            image=plan.image,
            compute=plan.compute,
            arch=plan.arch,
            execution_role=profile.execution_role,
            job_role=plan.role or profile.run_role,
            log_group=profile.log_group,
            region=self._clients.region,
            assign_public_ip=profile.assign_public_ip,
            ephemeral_gib=plan.disk_gib,
            stack=profile.stack,
            size=WorkerSize(vcpus=plan.vcpus, memory_mib=plan.memory_mib, gpus=plan.gpus),
        )

    def _tags(self, plan: RunPlan) -> dict[str, str]:
        longest = timedelta(seconds=_CLOCK_SKEW + self.overhead + plan.max_seconds)
        expires = datetime.now(UTC) + longest
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

    async def _surely(self, start: Callable[[], Coroutine[Any, Any, str]]) -> str:
        """Start a job, also if that has to be tried again; return its id.

        If this is cancelled, the job is ended.

        Raises:
            StillRunning: If this was cancelled, and the job could not be ended.
        """
        # Interrupted in the middle of it, the job has to be known, to be ended.
        starting = asyncio.ensure_future(insist(start, _START_SECONDS))
        try:
            return await asyncio.shield(starting)
        except AwsError as exc:
            exc.message = str(cause_of_refusal(exc.message))
            raise
        except asyncio.CancelledError:
            (job_id,) = await asyncio.gather(starting, return_exceptions=True)
            if isinstance(job_id, str):
                try:
                    await self.end(job_id, "stopped by its user before it began")
                except AwsError as exc:
                    raise StillRunning.of(job_id, exc) from exc
            raise

    # Looking.

    async def find(
        self, plans: Sequence[RunPlan], known: Mapping[str, Known] = _NONE
    ) -> dict[str, MachineState]:
        """Look at the jobs of runs, and at those of executors in them."""
        if not plans:
            return {}
        details = await self._search.jobs()
        # Lists may be late: AWS does not say how much.
        listed = {str(each["jobId"]) for each in details}
        unlisted = [each.job_id for each in known.values() if each.job_id not in {*listed, ""}]
        details += await self._search.describe(unlisted)
        of_runs: dict[str, list[Mapping[str, Any]]] = {}
        for each in details:
            of_runs.setdefault(str(each.get("tags", {}).get(names.TAG_RUN, "")), []).append(each)
        jobs = {
            plan.name: _of_this_start(
                plan, of_runs.get(plan.name, ()), known.get(plan.name, Known())
            )
            for plan in plans
        }
        for plan in plans:
            jobs[plan.name] = await self._all_learned(plan, jobs[plan.name])
        all_jobs = [each for found in jobs.values() for each in found]
        infos = {each.id: each for each in await self._infos.infos(all_jobs)}
        return {
            plan.name: state
            for plan in plans
            if (state := self._state(plan, jobs[plan.name], infos, known.get(plan.name, Known())))
        }

    async def look(self, plan: RunPlan, state: MachineState) -> MachineState:
        """Look at the run's job."""
        details = await self._all_learned(plan, await self._search.describe([state.job_id]))
        infos = {each.id: each for each in await self._infos.infos(details)}
        return self._state(plan, details, infos, state.known) or state

    async def _all_learned(
        self, plan: RunPlan, details: Sequence[Mapping[str, Any]]
    ) -> list[Mapping[str, Any]]:
        return list(
            await asyncio.gather(
                *(
                    self._learned(plan, each) if _is_own(each, plan.name) else _only(each)
                    for each in details
                )
            )
        )

    async def _learned(self, plan: RunPlan, details: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return what is told of the machine of a run, with what is to be learned elsewhere."""
        return details

    async def why(self, plan: RunPlan, state: MachineState) -> str:
        """Ask why a job waits, or read how it ended."""
        if state.is_remembered:
            return state.reason
        described = await self._all_learned(plan, await self._search.describe([state.job_id]))
        if not described:
            return f"{self.title} does not know the job any more"
        details = described[0]
        if PHASES[details["status"]] is Phase.ENDED:
            return _why_it_ended(details, state)
        return await self._why_it_waits(state, details)

    @abstractmethod
    async def _why_it_waits(self, state: MachineState, details: Mapping[str, Any]) -> str:
        """Say why a machine waits."""

    def _state(
        self,
        plan: RunPlan,
        details: Sequence[Mapping[str, Any]],
        infos: Mapping[str, JobInfo],
        known: Known,
    ) -> MachineState | None:
        """Put together what the jobs of a start say; ``None``: its own is not among them.

        Of several own ones, the one that is known runs the program, or the newest one where each
        attempt has a job of its own.
        """
        own = [each for each in details if _is_own(each, plan.name)]
        workers = [infos[each["jobId"]] for each in details if not _is_own(each, plan.name)]
        own.sort(key=lambda each: int(each["createdAt"]))
        all_own = [infos[each["jobId"]] for each in own]
        costs = {
            **known.costs,
            **{each.id: _cost(each, is_own=True) for each in all_own if _is_forgotten_soon(each)},
            **{each.id: _cost(each, is_own=False) for each in workers if _is_forgotten_soon(each)},
        }
        forgotten = [each for key, each in known.costs.items() if key not in infos]
        known = replace(known, costs=costs)
        own_before = [each for each in forgotten if each.is_own]
        cost = math.fsum(each.usd for each in own_before)
        seconds = math.fsum(each.seconds for each in own_before)
        workers_usd = math.fsum(each.usd for each in forgotten if not each.is_own)
        workers_usd += math.fsum(each.cost_usd for each in workers)
        active = sum(each.state in ACTIVE for each in workers)
        if not own:
            if known.end is None:
                return None
            end = known.end
            last = known.costs.get(known.job_id)
            if end.started_at is not None and end.stopped_at is not None:
                # The last look at it may have been long before its end.
                ran = (end.stopped_at - end.started_at).total_seconds()
                missing = max(0.0, ran - (0.0 if last is None else last.seconds))
                seconds += missing
                cost += missing / 3600 * plan.per_hour_usd
            return MachineState(
                job_id=known.job_id,
                phase="ended",
                created_at=end.created_at,
                started_at=end.started_at,
                stopped_at=end.stopped_at,
                exit_code=end.exit_code,
                reason=end.reason,
                was_stopped=end.was_stopped,
                streams=tuple(_streams_of_attempts((), known)),
                log_group=self._profile.log_group,
                attempts=len(known.attempts),
                run_seconds=seconds,
                cost_usd=cost,
                workers_usd=workers_usd,
                workers=active,
                is_estimate=True,
                known=known,
                is_remembered=True,
            )
        newest = own[-1]
        if self.tries_again:
            newest = next((each for each in own if each["jobId"] == known.job_id), newest)
        info = infos[newest["jobId"]]
        attempts = len(newest.get("attempts", ()))
        streams = streams_of(newest)
        if not self.tries_again:
            streams = _streams_of_attempts(own, known)
            began = {*known.attempts, *(each.id for each in all_own)}
            attempts = len(began) - (info.state in ACTIVE)
        return MachineState(
            job_id=info.id,
            phase=_PHASES[PHASES[info.state]],
            created_at=info.created_at,
            started_at=info.started_at,
            stopped_at=info.stopped_at,
            exit_code=info.exit_code,
            reason=info.reason,
            was_stopped=was_ordered(newest),
            streams=tuple(streams),
            log_group=info.log_group,
            attempts=attempts,
            run_seconds=seconds + math.fsum(each.run_seconds for each in all_own),
            cost_usd=cost + math.fsum(each.cost_usd for each in all_own),
            workers_usd=workers_usd,
            workers=active,
            is_estimate=any(each.is_estimate for each in (*all_own, *workers)),
            was_reclaimed=end_of(newest, newest.get("attempts", ())).reclaimed,
            known=known,
        )

    # The end.

    async def end(self, job_id: str, reason: str) -> None:
        """End a job."""
        call = self._clients.call
        if is_instance_id(job_id):
            stop: Callable[[], Coroutine[Any, Any, Any]] = functools.partial(
                self._instances.stop, job_id
            )
        elif is_task_id(job_id):
            stop = functools.partial(
                call,
                "ecs",
                "stop_task",
                cluster=self._profile.cluster,
                task=job_id,
                reason=reason[:_REASON_LARGEST],
            )
        else:
            stop = functools.partial(
                call, "batch", "terminate_job", jobId=job_id, reason=reason[:_REASON_LARGEST]
            )
        try:
            await insist(stop, _STOP_SECONDS)
        except AwsError as exc:
            # A task that has stopped long ago is not known any more.
            if not is_task_id(job_id) or exc.code != "InvalidParameterException":
                raise

    async def stop(
        self, name: str, reason: str, job_id: str = "", *, workers_only: bool = False
    ) -> int:
        """End the job, and then those of executors in it, which would start no more."""
        details = await self._search.jobs(active=True)
        if job_id and job_id not in {each["jobId"] for each in details}:
            # Lists may be late.
            described = await self._search.describe([job_id])
            details += [each for each in described if each["status"] in ACTIVE]
        details = [
            each
            for each in details
            if each.get("tags", {}).get(names.TAG_RUN) == name
            and not (workers_only and _is_own(each, name))
            # No request ends these: they end when they lose their program.
            and not is_invocation_id(str(each["jobId"]))
        ]
        details.sort(key=lambda each: not _is_own(each, name))
        for each in details:
            await self.end(str(each["jobId"]), reason)
        return len(details)


def run_job_name(plan: RunPlan) -> str:
    """Return the name of the job of a start, which has its id."""
    # A letter before the digits: what ends in a number is a job of workers.
    return names.job_name(f"{names.RUN_EXECUTOR}{plan.name}", f"r{plan.start_id}")


def refused(cause: Cause, plan: RunPlan, *, code: str, operation: str) -> AwsError:
    """Say why a place without a queue has started no machine; it may be asked again if that may
    pass."""
    text = f"{cause.text}. {_no_room(plan.spot)}" if cause.no_room else str(cause)
    return AwsError(text, code=code, operation=operation, transient=not cause.fatal)


def _no_room(spot: bool) -> str:
    """Say what to do where there is no capacity or no quota for a machine."""
    on_demand = "without --spot, " if spot else ""
    return f"Try {on_demand}another size, or later; --on batch waits in a queue until there is room"


def _is_own(details: Mapping[str, Any], name: str) -> bool:
    """Whether a job is the machine of a run, and not a worker of an executor in it."""
    return str(details.get("tags", {}).get(names.TAG_EXECUTOR)) == f"{names.RUN_EXECUTOR}{name}"


def _of_this_start(
    plan: RunPlan, details: Sequence[Mapping[str, Any]], known: Known
) -> list[Mapping[str, Any]]:
    """Return the jobs of a start, and of executors in it, among those of all of its name."""
    own = [each for each in details if each["jobName"] == run_job_name(plan)]
    workers = [each for each in details if not _is_own(each, plan.name)]
    # An earlier start has ended before this one began, and its workers were submitted before that.
    began = [int(each["createdAt"]) for each in own]
    if {*known.attempts} - {str(each["jobId"]) for each in own}:
        # The first machines are forgotten, and the clock that this comes from may be fast.
        began.append(int((plan.created_at - _CLOCK_SKEW) * 1000))
    if not began:
        return []
    return [*own, *(each for each in workers if int(each["createdAt"]) >= min(began))]


async def _only(value: _T) -> _T:
    return value


def _is_forgotten_soon(info: JobInfo) -> bool:
    """Whether AWS forgets a job about an hour after its end."""
    return is_task_id(info.id) or is_instance_id(info.id)


def _cost(info: JobInfo, *, is_own: bool) -> JobCost:
    return JobCost(
        usd=info.cost_usd,
        seconds=info.run_seconds,
        is_own=is_own,
        has_ended=info.state not in ACTIVE,
    )


def _streams_of_attempts(own: Sequence[Mapping[str, Any]], known: Known) -> list[tuple[int, str]]:
    """Return the number and log stream of each attempt that has begun, in order."""
    ids = dict.fromkeys(known.attempts)
    ids |= {str(each["jobId"]): None for each in own if streams_of(each)}
    return [(number, _stream_of(job_id)) for number, job_id in enumerate(ids, 1)]


def _stream_of(job_id: str) -> str:
    """Return the log stream of a task or an instance."""
    if is_instance_id(job_id):
        return container_stream(job_id)
    return f"{LOG_PREFIX}/{CONTAINER}/{job_id}"


def _why_it_ended(details: Mapping[str, Any], state: MachineState) -> str:
    """Say how the machine of a run ended, in words for its user."""
    end = end_of(details, details.get("attempts", ()))
    said = "; ".join(filter(None, (end.container_reason, end.status_reason)))
    if was_ordered(details):
        return f"it was {said}" if said.startswith("stopped") else said
    if end.out_of_memory:
        size = f" of {format_memory(end.size.memory_mib)}" if end.size is not None else ""
        return f"its memory{size} was used up: give a larger --memory ({said})"
    if "exceeded timeout" in said or end.exit_code == TIME_IS_UP:
        return f"its time limit was over: --max-hours or --max-cost allow more ({said})"
    if end.reclaimed:
        return f"AWS took its machine back in attempt {state.attempts}, the last one ({said})"
    if is_out_of_capacity(said):
        return f"AWS has no capacity of this kind: {said}. {_no_room(details.get('spot', False))}"
    if end.exit_code is not None:
        return f"it ended with exit code {end.exit_code} ({said})"
    return str(cause_of_end(end))
