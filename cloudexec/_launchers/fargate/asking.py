"""Asks Amazon ECS for tasks, with one call for each worker, until there is capacity for it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import botocore.exceptions

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.task_diagnosis import cause_of_refused_task, may_pass
from cloudexec._errors import AwsError
from cloudexec._launchers.aws.asking import CapacityAsker
from cloudexec._launchers.aws.pacer import Pacer
from cloudexec._launchers.platform import JobRequest, Phase, Reason, WorkerEnd, WorkerStatus

__all__ = ["BURST", "CALLS_PER_SECOND", "Asker", "Worker"]

CALLS_PER_SECOND = 20
"""RunTask calls that AWS accepts per second, and at once after a pause. Amazon ECS Developer Guide,
"AWS Fargate throttling quotas"."""
BURST = CALLS_PER_SECOND // 2
"""Calls that are made at once. These are half of what AWS accepts, as slow calls arrive together
with later ones."""
_NOT_SEEN = WorkerStatus(phase=Phase.ACCEPTED)


@dataclass(slots=True, eq=False)
class Worker:
    """One worker, from the request for its job on.

    Attributes:
        name: Name of its job.
        spot: Whether it runs on Fargate Spot.
        request: The request for its job; ``None`` if an earlier process had the request.
        arn: ARN of its task; empty if there is no task yet, or no task any more.
        parameters: Parameters of the RunTask call. They stay the same until the call is answered.
        attempt: Number of the RunTask call, from 1.
        asked_at: Time when its task was started, on the monotonic clock.
        tried_at: Time of the last RunTask call, on the monotonic clock.
        reason: Why there is no task, in the words of Amazon ECS.
        end: The worker's end, if it has no task from which the end could be read.
        seen: The last status of its task.
        missing_since: Time since which Amazon ECS does not list its task, on the monotonic clock;
            ``None`` if it does.
        is_known: Whether Amazon ECS has ever listed its task.
        is_taken: Whether the job counts as submitted, so that the worker is asked for until there
            is capacity.
        is_unsure: Whether a call that was not answered may have started a task.
        is_doomed: Whether the worker must end.
        doom: The reason for that, for people.
        asking: The asyncio task that makes a call; ``None`` if there is none.
    """

    name: str
    spot: bool = False
    request: JobRequest | None = None
    arn: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    attempt: int = 1
    asked_at: float = 0.0
    tried_at: float = 0.0
    reason: str = ""
    end: WorkerEnd | None = None
    seen: WorkerStatus = _NOT_SEEN
    missing_since: float | None = None
    is_known: bool = False
    is_taken: bool = False
    is_unsure: bool = False
    is_doomed: bool = False
    doom: str = ""
    asking: asyncio.Task[None] | None = None

    @property
    def waits(self) -> bool:
        """Whether it must be asked for again."""
        return self.is_taken and not (
            self.arn or self.end or self.is_doomed or self.request is None
        )

    @property
    def kind(self) -> tuple[bool, int]:
        """The kind of capacity that it needs. Workers of the same kind find capacity or do not."""
        return self.spot, self.request.size if self.request is not None else 0


class Asker(CapacityAsker[Worker]):
    """Asks for the tasks of one executor's workers.

    Args:
        clients: Makes calls to AWS.
        workers: All workers by name. The platform adds workers to it.
        parameters: Returns the parameters of a worker's RunTask call.
        redefine: Takes a task definition that was removed, and registers it again.
        started_by: Takes the name of a worker, and returns the ARNs of its tasks that run.
        stop: Stops a task. Takes its ARN and the reason.
        stop_hint: What a user can do to end workers; see ``Platform``.
    """

    service, machines = "Amazon ECS", "tasks"

    def __init__(
        self,
        clients: AwsClients,
        workers: Mapping[str, Worker],
        *,
        parameters: Callable[[Worker], dict[str, Any]],
        redefine: Callable[[str], Awaitable[object]],
        started_by: Callable[[str], Awaitable[list[str]]],
        stop: Callable[[str, str], Coroutine[Any, Any, None]],
        stop_hint: str,
    ) -> None:
        super().__init__(workers, stop_hint)
        self.pacer = Pacer(CALLS_PER_SECOND, BURST)
        self._clients = clients
        self._parameters = parameters
        self._redefine = redefine
        self._started_by = started_by
        self._stop = stop

    def go_without(self, worker: Worker, reason: str) -> None:
        """Let a worker and all others of its kind wait for capacity."""
        worker.arn, worker.reason = "", reason
        worker.seen, worker.is_known, worker.missing_since = _NOT_SEEN, False, None
        worker.parameters = {}
        worker.attempt += 1
        self._pause(worker, reason)

    def stop_soon(self, arn: str, reason: str) -> None:
        """Stop a task in the background."""
        self._end_in_background(lambda: self._stop(arn, reason), f"the task {arn}")

    async def _turn(self, worker: Worker) -> None:
        await self.pacer.wait()

    def _fail(self, worker: Worker, reason: Reason) -> None:
        worker.end = WorkerEnd(reason=reason)

    def _doom(self, worker: Worker) -> None:
        if not worker.is_doomed:
            worker.is_doomed, worker.doom = True, "cloudexec: the executor has shut down"

    async def _end_doomed(self, worker: Worker) -> None:
        if worker.is_doomed and worker.arn:
            await self._end_late(
                lambda: self._stop(worker.arn, worker.doom), f"the task {worker.arn}"
            )

    # One call.

    async def _call_for(self, worker: Worker) -> None:
        if worker.is_doomed:
            return
        if not worker.is_unsure and self._is_dry(worker):
            return
        worker.tried_at = time.monotonic()
        was_unsure = worker.is_unsure
        if not worker.parameters:
            worker.parameters = self._parameters(worker)
        try:
            tasks, reason = await self._call_run_task(worker)
        except AwsError as exc:
            if not exc.transient and may_pass(exc.message):
                tasks, reason = [], exc.message
            elif _is_gone(exc):
                # The definition was removed meanwhile, so it is registered again.
                await self._redefine(worker.parameters["taskDefinition"])
                tasks, reason = await self._call_anew(worker)
            else:
                raise
        if not tasks and was_unsure:
            # The next call has another client token, and AWS would start a second task for it. So
            # a task that was started without an answer must be found now.
            worker.is_unsure = True
            tasks = await self._started_by(worker.name)
        worker.is_unsure = False
        if tasks:
            worker.arn, worker.reason, worker.asked_at = tasks[0], "", time.monotonic()
            worker.parameters = {}  # the parameters may contain the key, so they are not kept
            self._droughts.pop(worker.kind, None)
            return
        if worker.is_doomed:
            return
        cause = cause_of_refused_task(reason, spot=worker.spot)
        if cause.fatal:
            raise AwsError(str(cause), code="RunTaskFailure", operation="ecs:RunTask")
        self.go_without(worker, reason)

    async def _call_anew(self, worker: Worker) -> tuple[list[str], str]:
        """Make another call instead of one that always fails, unless the worker must end."""
        if worker.is_unsure and (found := await self._started_by(worker.name)):
            return found, ""
        if worker.is_doomed:
            return [], ""
        if not worker.is_unsure:
            worker.attempt += 1
        # Otherwise the client token stays the same: if a call that was not answered has started a
        # task that is not listed yet, AWS refuses this call as a conflict, and names the task.
        worker.parameters = self._parameters(worker)
        return await self._call_run_task(worker)

    async def _call_run_task(self, worker: Worker) -> tuple[list[str], str]:
        """Make the RunTask call, and return the ARNs of its tasks, or else the reason.

        If there is no answer, the SDK repeats the call by itself, with the same client token.
        """
        before, worker.is_unsure = worker.is_unsure, True
        try:
            answer = await self._clients.call("ecs", "run_task", **worker.parameters)
        except AwsError as exc:
            if exc.code == "ConflictException":
                worker.is_unsure = False
                return _arns_in(exc), exc.message
            # Also if the last try was throttled: the answer to an earlier one may be lost.
            exc.uncertain = exc.transient
            worker.is_unsure = before or exc.uncertain
            raise
        worker.is_unsure = False
        failures = [str(each.get("reason", "")) for each in answer.get("failures", ())]
        return [str(each["taskArn"]) for each in answer["tasks"]], next(iter(failures), "")


def _is_gone(exc: AwsError) -> bool:
    """Return whether the call has failed because the task definition was removed."""
    return exc.code == "ClientException" and "TaskDefinition" in exc.message


def _arns_in(exc: AwsError) -> list[str]:
    """Return the tasks that an earlier call with the same client token has started."""
    cause = exc.__cause__
    if not isinstance(cause, botocore.exceptions.ClientError):
        return []
    response: Mapping[str, Any] = cause.response
    return [str(each) for each in response.get("resourceIds", ())]
