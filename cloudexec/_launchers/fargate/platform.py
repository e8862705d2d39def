"""AWS Fargate as a platform: each worker is a task of Amazon ECS, without a queue of AWS Batch.

One RunTask call can start ten tasks, but they all get the same environment variables. So each
worker has a call of its own, and its launch number is in its variables. It then depends neither on
the metadata endpoint nor on the answer of RunTask, which may be lost, or come after the worker has
started. A client token for each worker makes sure that a repeated call starts no second task, and a
failed call concerns one worker only. This costs little time: AWS accepts 20 calls a second, and
after the first hundred tasks, Fargate starts 20 tasks a second. Only the first hundred take four
seconds instead of one.

AWS has no queue in which such a worker could wait for capacity, so it waits here: see ``asking``.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.diagnosis import (
    is_out_of_capacity,
    is_over_quota,
)
from cloudexec._aws.prices import PriceTable
from cloudexec._aws.profile import Profile
from cloudexec._aws.requests import DefinitionSpec
from cloudexec._aws.task_definitions import ensure_task_definition
from cloudexec._aws.task_diagnosis import cause_of_waiting_tasks
from cloudexec._aws.task_requests import (
    DESCRIBE_TASKS,
    STOP_TIMEOUT,
    Placement,
    run_task_request,
    task_definition_request,
)
from cloudexec._errors import AwsError, ConfigError
from cloudexec._launchers.aws.asking import is_forgotten
from cloudexec._launchers.aws.platform import DefinedPlatform, all_of, connected
from cloudexec._launchers.aws.platform import Settings as AwsSettings
from cloudexec._launchers.batch.inquiry import reason_of
from cloudexec._launchers.batch.reading import worker_end
from cloudexec._launchers.fargate.asking import BURST, CALLS_PER_SECOND, Asker, Worker
from cloudexec._launchers.fargate.reading import (
    end_of_task,
    found_no_capacity,
    log_stream,
    phase_of_task,
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

_SPOT_PATIENCE = 60.0
_SPOT_DRAIN = "100"
"""Seconds in which the tasks of a worker may finish, of the 120 seconds of a Spot notice."""


class Settings(AwsSettings, Protocol):
    """The settings of ``Fargate`` that the platform uses; ``Fargate`` describes them."""

    cluster: str | None
    security_groups: tuple[str, ...] | None
    subnets: tuple[str, ...] | None


def connect(
    settings: Settings, executor: ExecutorInfo
) -> contextlib.AbstractAsyncContextManager[Site]:
    """Connect to Amazon ECS; see ``connected``."""
    return connected(settings, executor, FargatePlatform, of=settings.cluster or "")


class FargatePlatform(DefinedPlatform):
    """AWS Fargate, for one executor; see ``DefinedPlatform``."""

    name = "AWS Fargate"
    most_workers = 1
    stop_seconds = float(STOP_TIMEOUT)
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
        self._workers: dict[str, Worker] = {}
        self._asker = Asker(
            clients,
            self._workers,
            parameters=self._parameters,
            redefine=self._define,
            started_by=self._started_by,
            stop=self._stop_task,
            stop_hint=self.stop_hint,
        )
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
        """Make no more calls for tasks, and end the relay."""
        await self._asker.close()
        await super().close()

    def spot_patience(self, workers: int) -> float:
        """Return the seconds in which workers find a place on Spot if there is capacity."""
        return _SPOT_PATIENCE + max(0, workers - BURST) / CALLS_PER_SECOND

    def lacks_capacity(self, reason: str) -> bool:
        """Return whether a message of Amazon ECS says that there is no capacity."""
        return is_out_of_capacity(reason)

    async def is_full(self, jobs: Sequence[WaitingJob]) -> bool:
        """Return whether workers wait because the executor's others use up the account's quota."""
        reasons = [each.reason for each in jobs if each.reason and each.counts.get(Phase.WAITING)]
        placed = any(
            each.counts.get(Phase.STARTING) or each.counts.get(Phase.RUNNING) for each in jobs
        )
        return placed and bool(reasons) and all(map(is_over_quota, reasons))

    # Submission.

    async def prepare(self) -> None:
        """Find the task definition, or register it, and wait until a RunTask call may be made.

        The wait may be long. It is here because ``prepare`` is cancelled when the executor shuts
        down, and ``submit`` is not.
        """
        await self._define()
        await self._asker.pacer.wait()

    async def _ensure(self, spec: DefinitionSpec) -> str:
        return await ensure_task_definition(self._clients, task_definition_request(spec))

    async def submit(self, request: JobRequest) -> Submitted:
        """Ask for a task; if there is no capacity for it, let the worker wait."""
        worker = self._workers.setdefault(request.name, Worker(request.name))
        worker.request, worker.spot = request, request.spot
        await self._asker.ask_now(worker)
        return self._taken(worker)

    def _taken(self, worker: Worker) -> Submitted:
        """Mark a worker as submitted, and return its ids."""
        worker.is_taken = True
        if worker.waits:
            self._asker.ask_again()
        return Submitted(job_id=worker.name, worker_ids=[worker.arn or worker.name])

    def _parameters(self, worker: Worker) -> dict[str, Any]:
        request = worker.request
        assert request is not None
        environment = {
            "CLOUDEXEC_LIFETIME": str(math.ceil(self._settings.max_runtime)),
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
        """Return the worker of a job by its task, whose ``startedBy`` is the job's name."""
        arns = await self._started_by(name)
        if not arns:
            return None
        worker = self._workers.setdefault(name, Worker(name, spot))
        worker.arn, worker.is_unsure, worker.asked_at = arns[0], False, time.monotonic()
        return self._taken(worker)

    async def _started_by(self, name: str) -> list[str]:
        cluster = self._placement.cluster
        listed = await self._call("ecs", "list_tasks", cluster=cluster, startedBy=name)
        return [str(each) for each in listed["taskArns"]]

    # Status.

    async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
        """Return the states of workers, by the states of their tasks."""
        await self._learn({each.job_id for each in inspections} - self._workers.keys())
        workers = {
            each.job_id: self._workers[each.job_id]
            for each in inspections
            if each.job_id in self._workers
        }
        tasks = await self._describe([each.arn for each in workers.values() if each.arn])
        found: dict[str, JobStatus] = {}
        for each in inspections:
            worker = workers.get(each.job_id)
            if worker is not None:
                status = await self._status(each, worker, tasks)
                found[each.job_id] = JobStatus(workers={0: status}, reason=status.reason)
        return found

    async def _learn(self, names: set[str]) -> None:
        """Find the tasks that an earlier process has started, even if they have stopped."""
        if not names:
            return
        arns: dict[str, None] = {}
        for desired in ("STOPPED", "RUNNING"):
            given = {"cluster": self._placement.cluster, "desiredStatus": desired}
            listed = self._clients.pages("ecs", "list_tasks", "taskArns", **given)
            arns |= {str(each): None async for each in listed}
        tasks = await self._describe(list(arns))
        # If a worker has had several tasks, all but the last one have found no capacity.
        for arn, task in sorted(tasks.items(), key=lambda each: _made_at(each[1])):
            if (name := task.get("startedBy", "")) in names:
                spot = task.get("capacityProviderName") == "FARGATE_SPOT"
                self._workers[name] = Worker(name, spot, arn=arn, asked_at=time.monotonic())

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
        self, inspection: Inspection, worker: Worker, tasks: Mapping[str, Mapping[str, Any]]
    ) -> WorkerStatus:
        if worker.end is not None:
            return WorkerStatus(phase=Phase.ENDED, ends=[worker.end])
        if not worker.arn:
            phase = Phase.ENDED if worker.request is None else Phase.WAITING
            return WorkerStatus(phase=phase, reason=worker.reason)
        task = tasks.get(worker.arn)
        if task is None:
            return self._missing(worker)
        worker.is_known, worker.missing_since = True, None
        phase = phase_of_task(task)
        if phase is not Phase.ENDED:
            worker.seen = WorkerStatus(phase=phase)
            return worker.seen
        if found_no_capacity(task) and worker.request is not None and not worker.is_doomed:
            self._asker.go_without(worker, str(task["stoppedReason"]))
            self._asker.ask_again()
            return WorkerStatus(phase=Phase.WAITING, reason=worker.reason)
        end = end_of_task(task, lifetime=self._settings.max_runtime)
        if not end.reclaimed and inspection.asks_why(0, 1, over=True):
            tail = await self._inquiry.tail(log_stream(worker.arn))
            end = replace(end, log_tail=tail, relay=self._inquiry.relay)
        worker.seen = WorkerStatus(phase=phase, ends=[worker_end(end, run_of_task(task))])
        return worker.seen

    def _missing(self, worker: Worker) -> WorkerStatus:
        """Return the status of a worker whose task Amazon ECS does not list."""
        if worker.seen.phase is Phase.ENDED:
            return worker.seen
        if not is_forgotten(worker):
            return worker.seen
        forgotten = (
            "Amazon ECS does not know its task any more: it has ended some time ago, or is stopped "
            "now"
        )
        worker.end = WorkerEnd(reason=Reason(forgotten))
        # If the task runs after all, nothing else would stop it.
        self._asker.stop_soon(worker.arn, "cloudexec: Amazon ECS did not know it any more")
        return WorkerStatus(phase=Phase.ENDED, ends=[worker.end])

    async def explain(
        self, waiting: Sequence[WaitingJob], ends: Sequence[WorkerEnd]
    ) -> Reason | None:
        """Return why workers have not connected, by the messages of Amazon ECS."""
        for each in waiting:
            worker = self._workers.get(each.job_id)
            if worker is not None and (trouble := self._asker.trouble(worker)):
                # The error is not the worker's, and may pass, so no other cause is looked for.
                text = f"Amazon ECS cannot be asked for workers now: {trouble}"
                return Reason(text, "the request is repeated")
        return reason_of(cause_of_waiting_tasks(self._inquiry.known(waiting, ends)))

    # The end.

    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        """Stop the tasks of workers, and ask no more for workers that wait."""
        workers = [
            self._workers.setdefault(each.job_id, Worker(each.job_id, is_unsure=True))
            for each in targets
        ]
        for worker in workers:
            worker.is_doomed, worker.doom = True, reason
        await all_of(self._stop(worker, reason) for worker in workers)

    async def _stop(self, worker: Worker, reason: str) -> None:
        if worker.asking is not None and not worker.arn:
            # If the caller gives up this wait, the task is stopped when the answer comes.
            await asyncio.wait([worker.asking])
        arns = {worker.arn} - {""}
        if worker.is_unsure:
            arns |= set(await self._started_by(worker.name))
        for arn in arns:
            await self._stop_task(arn, reason)

    async def _stop_task(self, arn: str, reason: str) -> None:
        try:
            cluster = self._placement.cluster
            await self._call("ecs", "stop_task", cluster=cluster, task=arn, reason=reason)
        except AwsError as exc:
            # Amazon ECS does not know a task any more that has stopped long ago.
            if exc.code != "InvalidParameterException":
                raise


def _made_at(task: Mapping[str, Any]) -> float:
    """Return the Unix time when a task was created; 0 if it is not known."""
    created = task.get("createdAt")
    return created.timestamp() if created else 0.0
