"""AWS Fargate as a platform: each worker is a task that Amazon ECS is asked for, without a queue.

All tasks of one RunTask call get the same variables, and ten may be asked for at once. Here each
worker has a call of its own, so that the number by which it introduces itself is in its variables:
it then needs nothing that may be missing when it starts, neither an answer of the metadata endpoint
nor one of RunTask that is lost, or comes after the worker. A client token for each worker makes
sure that a call which is made again starts no second task, and a failure is that of one worker.
This costs next to nothing: AWS takes 20 calls a second, as many as Fargate starts tasks a second
after the first hundred, which therefore are asked for within four seconds instead of one.

There is no queue in AWS in which a worker could wait for capacity, so it waits here: what RunTask
could not start is asked for again whenever the executor asks how its workers are.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import botocore.exceptions

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.diagnosis import (
    Cause,
    JobEnd,
    Situation,
    is_out_of_capacity,
    is_over_quota,
)
from cloudexec._aws.prices import PriceTable
from cloudexec._aws.profile import Profile
from cloudexec._aws.refusals import THROTTLES
from cloudexec._aws.task_definitions import ensure_task_definition
from cloudexec._aws.task_diagnosis import cause_of_refused_task, cause_of_waiting_tasks
from cloudexec._aws.task_requests import (
    DESCRIBE_TASKS,
    Placement,
    run_task_request,
    task_definition_request,
)
from cloudexec._errors import AwsError, CloudexecError, ConfigError
from cloudexec._launchers.aws.platform import AwsPlatform, all_of, connected
from cloudexec._launchers.aws.platform import Settings as AwsSettings
from cloudexec._launchers.batch.inquiry import statuses_of
from cloudexec._launchers.batch.reading import worker_end
from cloudexec._launchers.fargate.pacer import Pacer
from cloudexec._launchers.fargate.reading import (
    PHASES,
    end_of_task,
    found_no_capacity,
    log_stream,
    run_of_task,
)
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

__all__ = ["FargatePlatform", "Settings", "connect"]

CALLS_PER_SECOND = 20
"""RunTask calls per second, and at once after a pause. Amazon ECS Developer Guide, "AWS Fargate
throttling quotas"."""
_SPOT_PATIENCE = 60.0
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 15.0
"""Seconds until Amazon ECS is asked again where it had no capacity, at first and in the end."""
_UNSEEN = 300.0
"""Seconds for which Amazon ECS may not know a task that it has started: it says so for a moment."""
_SPOT_DRAIN = "100"
"""Seconds in which tasks on Spot may finish, of the 120 of the notice."""


class Settings(AwsSettings, Protocol):
    """What the platform must know of the settings of ``Fargate``, which describes them."""

    cluster: str | None
    security_groups: tuple[str, ...] | None
    subnets: tuple[str, ...] | None


@dataclass(slots=True, eq=False)
class _Worker:
    """One worker, from the request on.

    Attributes:
        name: Of its job.
        spot: Whether it is to run on Fargate Spot.
        request: What is to run; ``None``: an earlier process has asked for it.
        arn: Its task; empty: there is none yet, or none any more.
        parameters: Of the RunTask call, which stay the same until it is answered.
        attempt: Which call it is.
        asked_at: When the call was made that started its task.
        reason: Why there is no task.
        end: How it ended without a task that could say so.
        is_known: Whether Amazon ECS has told of its task.
        is_unsure: Whether a call may have started a task whose answer did not come.
        is_doomed: Whether it is to end.
        asking: The call that is being made.
    """

    name: str
    spot: bool = False
    request: JobRequest | None = None
    arn: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    attempt: int = 1
    asked_at: float = 0.0
    reason: str = ""
    end: WorkerEnd | None = None
    is_known: bool = False
    is_unsure: bool = False
    is_doomed: bool = False
    asking: asyncio.Task[None] | None = None

    @property
    def waits(self) -> bool:
        """Whether it is to be asked for again."""
        return not (self.arn or self.end or self.is_doomed or self.request is None)


@dataclass(slots=True)
class _Drought:
    """There is no capacity of one kind.

    Attributes:
        reason: In AWS's words.
        until: When it is asked for again, on the monotonic clock.
        pause: Seconds until then.
    """

    reason: str
    until: float
    pause: float


def connect(
    settings: Settings, executor: ExecutorInfo
) -> contextlib.AbstractAsyncContextManager[Site]:
    """Connect to Amazon ECS; see ``connected``."""
    return connected(settings, executor, FargatePlatform, of=settings.cluster or "")


class FargatePlatform(AwsPlatform):
    """AWS Fargate, for one executor; see ``AwsPlatform``."""

    name = "AWS Fargate"
    most_workers = 1
    _settings: Settings

    def __init__(
        self,
        settings: Settings,
        executor: ExecutorInfo,
        clients: AwsClients,
        profile: Profile,
        prices: PriceTable,
    ) -> None:
        super().__init__(settings, executor, clients, profile, prices)
        self._definition = ""
        self._defining = asyncio.Lock()
        self._pacer = Pacer(CALLS_PER_SECOND, CALLS_PER_SECOND)
        self._workers: dict[str, _Worker] = {}
        self._droughts: dict[bool, _Drought] = {}
        self._placement = Placement(
            cluster=self._cluster(),
            subnets=settings.subnets or profile.subnets,
            security_groups=(
                tuple(filter(None, [profile.security_group]))
                if settings.security_groups is None
                else settings.security_groups
            ),
            assign_public_ip=self._public_ip,
        )

    # The start.

    def _cluster(self) -> str:
        found = self._settings.cluster or self._profile.cluster
        if not found:
            name = self._profile.name
            up = f"cloudexec up --name {name}" if name not in ("", "default") else "cloudexec up"
            raise ConfigError(
                f"the profile {name!r} has no cluster of Amazon ECS, in which Fargate(...) could "
                f"run workers: `{up} --with fargate` adds one; Batch(...) needs none"
            )
        return found

    async def _check(self) -> None:
        self._image = await self._find_image()

    async def close(self) -> None:
        """End what was started for the executor as a whole."""
        asking = [each.asking for each in self._workers.values() if each.asking is not None]
        await asyncio.gather(*asking, return_exceptions=True)
        await super().close()

    def spot_patience(self, workers: int) -> float:
        """Say in how many seconds so many workers find a place on Spot, if there is any."""
        return _SPOT_PATIENCE + max(0, workers - CALLS_PER_SECOND) / CALLS_PER_SECOND

    def lacks_capacity(self, reason: str) -> bool:
        """Say whether Amazon ECS has said that there is no capacity."""
        return is_out_of_capacity(reason)

    # Submission.

    async def prepare(self) -> None:
        """Find the task definition, or register it; and wait for the turn of this worker.

        That is done here since the wait may be long, and ends when the executor shuts down.
        """
        await self._define()
        await self._pacer.wait()

    async def _define(self) -> None:
        async with self._defining:
            if not self._definition:
                request = task_definition_request(await self._definition_spec())
                self._definition = await ensure_task_definition(self._clients, request)

    async def submit(self, request: JobRequest) -> Submitted:
        """Ask for a task; where there is no capacity for it, the worker waits."""
        worker = self._workers.setdefault(request.name, _Worker(request.name))
        worker.request, worker.spot = request, request.spot
        await self._ask(worker)
        return Submitted(
            job_id=request.name, worker_ids=[worker.arn] if worker.arn else [request.name]
        )

    async def _ask(self, worker: _Worker) -> None:
        """Ask for the task of a worker, and hear the answer, also if nobody waits for that."""
        if worker.asking is None:
            worker.asking = asyncio.get_running_loop().create_task(self._run_task(worker))
            worker.asking.add_done_callback(lambda done: _asked(worker, done))
        await asyncio.shield(worker.asking)

    async def _run_task(self, worker: _Worker) -> None:
        drought = self._droughts.get(worker.spot)
        if drought is not None and time.monotonic() < drought.until and not worker.is_unsure:
            worker.reason = drought.reason
            return
        if not worker.parameters:
            worker.parameters = self._parameters(worker)
        try:
            tasks, reason = await self._call_run_task(worker)
        except AwsError as exc:
            if is_over_quota(exc.message):
                tasks, reason = [], exc.message
            elif _is_gone(exc):
                # Somebody has removed the definition since: it is registered again.
                self._definition = ""
                await self._define()
                worker.attempt += 1
                worker.parameters = self._parameters(worker)
                tasks, reason = await self._call_run_task(worker)
            else:
                raise
        if tasks:
            worker.arn, worker.reason, worker.asked_at = tasks[0], "", time.monotonic()
            self._droughts.pop(worker.spot, None)
            return
        cause = cause_of_refused_task(reason, spot=worker.spot)
        if cause.fatal:
            raise AwsError(str(cause), code="RunTaskFailure", operation="ecs:RunTask")
        self._go_without(worker, reason)

    async def _call_run_task(self, worker: _Worker) -> tuple[list[str], str]:
        """Make the call; return ARNs, or why there are none.

        The SDK makes it again by itself where no answer came, with the same client token.
        """
        before, worker.is_unsure = worker.is_unsure, True
        try:
            answer = await self._clients.call("ecs", "run_task", **worker.parameters)
        except AwsError as exc:
            if exc.code == "ConflictException":
                worker.is_unsure = False
                return _arns_in(exc), exc.message
            exc.uncertain = exc.transient and exc.code not in THROTTLES
            worker.is_unsure = before or exc.uncertain
            raise
        worker.is_unsure = False
        failures = [str(each.get("reason", "")) for each in answer.get("failures", ())]
        return [str(each["taskArn"]) for each in answer["tasks"]], next(iter(failures), "")

    def _go_without(self, worker: _Worker, reason: str) -> None:
        """Let a worker wait for capacity, and with it all others of its kind."""
        worker.arn, worker.reason, worker.parameters = "", reason, {}
        worker.attempt += 1
        now = time.monotonic()
        drought = self._droughts.get(worker.spot)
        if drought is None or now >= drought.until:
            pause = _FIRST_PAUSE if drought is None else min(2 * drought.pause, _LONGEST_PAUSE)
            self._droughts[worker.spot] = _Drought(reason, now + pause, pause)

    def _parameters(self, worker: _Worker) -> dict[str, Any]:
        request = worker.request
        assert request is not None
        environment = {
            "CLOUDEXEC_LIFETIME": str(int(self._settings.max_runtime)),
            **({"CLOUDEXEC_DRAIN_GRACE": _SPOT_DRAIN} if worker.spot else {}),
            **request.environment,
            **request.secrets,
        }
        return run_task_request(
            name=request.name,
            attempt=worker.attempt,
            definition=self._definition,
            placement=self._placement,
            size=self._settings.size_of(request.size),
            spot=worker.spot,
            environment=environment,
            tags=self._tags(self._settings.max_runtime),
        )

    async def find(self, name: str, *, spot: bool) -> Submitted | None:
        """Find a task by whom it was started by."""
        arns = await self._started_by(name)
        if not arns:
            return None
        worker = self._workers.setdefault(name, _Worker(name, spot))
        worker.arn, worker.is_unsure, worker.asked_at = arns[0], False, time.monotonic()
        return Submitted(job_id=name, worker_ids=[worker.arn])

    async def _started_by(self, name: str) -> list[str]:
        cluster = self._placement.cluster
        listed = await self._call("ecs", "list_tasks", cluster=cluster, startedBy=name)
        return [str(each) for each in listed["taskArns"]]

    # Looking.

    async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
        """Ask for the states of tasks, and again for those that there was no capacity for."""
        await self._learn({each.job_id for each in inspections} - self._workers.keys())
        workers = {
            each.job_id: self._workers[each.job_id]
            for each in inspections
            if each.job_id in self._workers
        }
        await self._ask_again(list(workers.values()))
        tasks = await self._describe([each.arn for each in workers.values() if each.arn])
        found: dict[str, JobStatus] = {}
        for each in inspections:
            worker = workers.get(each.job_id)
            if worker is not None:
                status = await self._status(each, worker, tasks)
                found[each.job_id] = JobStatus(workers={0: status}, reason=status.reason)
        return found

    async def _learn(self, names: set[str]) -> None:
        """Find the tasks that an earlier process has started."""
        if not names:
            return
        cluster = self._placement.cluster
        listed = self._clients.pages("ecs", "list_tasks", "taskArns", cluster=cluster)
        tasks = await self._describe([str(each) async for each in listed])
        for arn, task in tasks.items():
            if (name := task.get("startedBy", "")) in names:
                spot = task.get("capacityProviderName") == "FARGATE_SPOT"
                self._workers[name] = _Worker(name, spot, arn=arn, asked_at=time.monotonic())

    async def _ask_again(self, workers: Sequence[_Worker]) -> None:
        """Ask again for workers that wait for capacity; the first shows whether there is any."""
        for spot in (False, True):
            waiting = [each for each in workers if each.waits and each.spot is spot]
            for worker in waiting:
                drought = self._droughts.get(spot)
                if drought is not None and time.monotonic() < drought.until:
                    worker.reason = drought.reason
                elif self._pacer.take():
                    await self._ask_once_more(worker)

    async def _ask_once_more(self, worker: _Worker) -> None:
        try:
            await self._ask(worker)
        except AwsError as exc:
            if not exc.may_pass:
                worker.end = WorkerEnd(reason=Reason(str(exc), fatal=True))
            worker.reason = str(exc)
        except CloudexecError as exc:
            worker.end = WorkerEnd(reason=Reason(str(exc), fatal=True))

    async def _describe(self, arns: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        pages = [arns[at : at + DESCRIBE_TASKS] for at in range(0, len(arns), DESCRIBE_TASKS)]
        cluster = self._placement.cluster
        answers = await asyncio.gather(
            *(
                self._call("ecs", "describe_tasks", cluster=cluster, tasks=list(page))
                for page in pages
            )
        )
        return {str(each["taskArn"]): each for answer in answers for each in answer["tasks"]}

    async def _status(
        self, inspection: Inspection, worker: _Worker, tasks: Mapping[str, Mapping[str, Any]]
    ) -> WorkerStatus:
        if worker.end is not None:
            return WorkerStatus(phase=Phase.ENDED, ends=[worker.end])
        if not worker.arn:
            phase = Phase.ENDED if worker.request is None else Phase.WAITING
            return WorkerStatus(phase=phase, reason=worker.reason)
        task = tasks.get(worker.arn)
        if task is None:
            if not worker.is_known and time.monotonic() - worker.asked_at < _UNSEEN:
                return WorkerStatus(phase=Phase.ACCEPTED)
            forgotten = "Amazon ECS does not know its task any more, as it is an hour after the end"
            return WorkerStatus(phase=Phase.ENDED, ends=[WorkerEnd(reason=Reason(forgotten))])
        worker.is_known = True
        phase = PHASES.get(task["lastStatus"], Phase.RUNNING)
        if phase is not Phase.ENDED:
            return WorkerStatus(phase=phase)
        if found_no_capacity(task) and worker.request is not None and not worker.is_doomed:
            self._go_without(worker, str(task["stoppedReason"]))
            worker.is_known = False
            return WorkerStatus(phase=Phase.WAITING, reason=worker.reason)
        end = end_of_task(task, lifetime=self._settings.max_runtime)
        if not end.reclaimed and inspection.asks_why(0, 1, over=True):
            tail = await self._inquiry.tail(log_stream(worker.arn))
            end = replace(end, log_tail=tail, relay=self._inquiry.relay)
        return WorkerStatus(phase=phase, ends=[worker_end(end, run_of_task(task))])

    async def explain(
        self, waiting: Sequence[WaitingJob], ends: Sequence[WorkerEnd]
    ) -> Reason | None:
        """Say why workers do not come, by what Amazon ECS has said of them."""
        situation = Situation(
            statuses=statuses_of(waiting),
            reasons=[each.reason for each in waiting if each.reason],
            ends=[end.details for end in ends if isinstance(end.details, JobEnd)],
            spot=waiting[0].spot,
            advertised=self._inquiry.advertised,
            relay=self._inquiry.relay,
        )
        cause: Cause | None = cause_of_waiting_tasks(situation)
        if cause is None:
            return None
        return Reason(cause.text, cause.remedy, cause.fatal, no_room=cause.no_room)

    # The end.

    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        """Stop tasks, and ask for no more of those that wait."""
        for each in targets:
            self._workers.setdefault(each.job_id, _Worker(each.job_id, is_unsure=True))
        await all_of(self._stop(self._workers[each.job_id], reason) for each in targets)

    async def _stop(self, worker: _Worker, reason: str) -> None:
        worker.is_doomed = True
        if worker.asking is not None:
            await asyncio.wait([worker.asking])
        arns = {worker.arn} - {""}
        if worker.is_unsure:
            arns |= set(await self._started_by(worker.name))
        for arn in arns:
            try:
                cluster = self._placement.cluster
                await self._call("ecs", "stop_task", cluster=cluster, task=arn, reason=reason)
            except AwsError as exc:
                # One that has stopped long ago is not known any more.
                if exc.code != "InvalidParameterException":
                    raise


def _asked(worker: _Worker, done: asyncio.Task[None]) -> None:
    worker.asking = None
    if not done.cancelled():
        done.exception()  # whoever waits for it hears it; nobody need wait


def _is_gone(exc: AwsError) -> bool:
    """Whether there is no task definition of that name any more, or it is not active."""
    return exc.code == "ClientException" and "TaskDefinition" in exc.message


def _arns_in(exc: AwsError) -> list[str]:
    """Return the tasks that an earlier call with the same client token has started."""
    cause = exc.__cause__
    if not isinstance(cause, botocore.exceptions.ClientError):
        return []
    response: Mapping[str, Any] = cause.response
    return [str(each) for each in response.get("resourceIds", ())]
