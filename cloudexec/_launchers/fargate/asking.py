"""Asks Amazon ECS for tasks, with one call for each worker, until there is capacity for it.

AWS has no queue in which such a worker could wait for capacity, so it waits here: one asyncio task
asks again for all workers that wait. Of workers of the same kind, only one is asked for until there
is capacity.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, field
from typing import Any

import botocore.exceptions

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.refusals import THROTTLES
from cloudexec._aws.task_diagnosis import cause_of_refused_task, may_pass
from cloudexec._errors import AwsError, CloudexecError
from cloudexec._launchers.ending import insist
from cloudexec._launchers.fargate.pacer import Pacer
from cloudexec._launchers.platform import JobRequest, Phase, Reason, WorkerEnd, WorkerStatus
from cloudexec._log import Log

__all__ = ["BURST", "CALLS_PER_SECOND", "Asker", "Worker"]

_logger = Log()

CALLS_PER_SECOND = 20
"""RunTask calls that AWS accepts per second, and at once after a pause. Amazon ECS Developer Guide,
"AWS Fargate throttling quotas"."""
BURST = CALLS_PER_SECOND // 2
"""Calls that are made at once. These are half of what AWS accepts, as slow calls arrive together
with later ones."""
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 15.0
"""Seconds until Amazon ECS is asked again after it had no capacity; doubled up to the longest."""
_CLOSE_PATIENCE = 20.0
"""Seconds that ``close`` waits for the answers of calls."""
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


@dataclass(slots=True)
class _Drought:
    """A time in which there is no capacity of one kind.

    Attributes:
        reason: The message of Amazon ECS; empty if the call failed.
        until: Time of the next call, on the monotonic clock.
        pause: Seconds between the last call and the next one.
        trouble: The error with which the call failed, if it may pass; empty if there was none.
    """

    reason: str
    until: float
    pause: float
    trouble: str = ""


class Asker:
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
        self.pacer = Pacer(CALLS_PER_SECOND, BURST)
        self._clients = clients
        self._workers = workers
        self._parameters = parameters
        self._redefine = redefine
        self._started_by = started_by
        self._stop = stop
        self._stop_hint = stop_hint
        self._droughts: dict[tuple[bool, int], _Drought] = {}
        self._wake = asyncio.Event()
        self._again: asyncio.Task[None] | None = None
        self._stops: set[asyncio.Task[None]] = set()

    async def ask(self, worker: Worker) -> None:
        """Ask for the task of a worker. If this is cancelled, the answer is still recorded.

        Raises:
            AwsError: If AWS refuses.
            CloudexecError: If the settings make it impossible.
        """
        await asyncio.shield(self._begin(worker, self._run_task(worker)))

    def ask_again(self) -> None:
        """Start to ask again for the workers that wait, in the background."""
        self._wake.set()
        if self._again is None or self._again.done():
            self._again = asyncio.get_running_loop().create_task(self._keep_asking())

    def go_without(self, worker: Worker, reason: str) -> None:
        """Let a worker and all others of its kind wait for capacity."""
        worker.arn, worker.reason = "", reason
        worker.seen, worker.is_known, worker.missing_since = _NOT_SEEN, False, None
        worker.parameters = {}
        worker.attempt += 1
        self._pause(worker, reason)

    def trouble(self, worker: Worker) -> str:
        """Return why AWS cannot be asked for a worker that waits; empty if it can."""
        drought = self._droughts.get(worker.kind)
        return drought.trouble if drought is not None and worker.waits else ""

    def stop_soon(self, arn: str, reason: str) -> None:
        """Stop a task in the background."""
        stop = asyncio.get_running_loop().create_task(self._stop_late(arn, reason))
        self._stops.add(stop)
        stop.add_done_callback(self._stops.discard)

    async def close(self) -> None:
        """Make no more calls, and stop the tasks that calls still start.

        A call that is not answered within some seconds is given up. If it has started a task, its
        worker finds no client, and ends by itself.
        """
        if self._again is not None:
            self._again.cancel()
            await asyncio.gather(self._again, return_exceptions=True)
        for worker in self._workers.values():
            if worker.asking is not None and not worker.is_doomed:
                worker.is_doomed, worker.doom = True, "cloudexec: the executor has shut down"
        asking = [each.asking for each in self._workers.values() if each.asking is not None]
        if pending := [*asking, *self._stops]:
            _, late = await asyncio.wait(pending, timeout=_CLOSE_PATIENCE)
            if late:
                unheard = [each.name for each in self._workers.values() if each.asking in late]
                _logger.error(
                    "Amazon ECS does not answer, and may have started tasks for %s that are not "
                    "stopped: they end by themselves when they find no client. %s",
                    ", ".join(unheard) or "this executor",
                    self._stop_hint,
                )
            for each in late:
                each.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    # One call.

    def _begin(self, worker: Worker, call: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        if worker.asking is not None:
            call.close()
            return worker.asking

        async def ask() -> None:
            await call
            if worker.is_doomed and worker.arn:
                # ``FargatePlatform.terminate`` may have given up waiting for this answer.
                await self._stop_late(worker.arn, worker.doom)

        def asked(done: asyncio.Task[None]) -> None:
            worker.asking = None
            self._wake.set()
            if not done.cancelled():
                done.exception()  # so that asyncio does not warn if no caller awaits the task

        worker.asking = asyncio.get_running_loop().create_task(ask())
        worker.asking.add_done_callback(asked)
        return worker.asking

    async def _run_task(self, worker: Worker) -> None:
        if worker.is_doomed:
            return
        drought = self._droughts.get(worker.kind)
        if drought is not None and time.monotonic() < drought.until and not worker.is_unsure:
            worker.reason = drought.reason or worker.reason
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
            exc.uncertain = exc.transient and exc.code not in THROTTLES
            worker.is_unsure = before or exc.uncertain
            raise
        worker.is_unsure = False
        failures = [str(each.get("reason", "")) for each in answer.get("failures", ())]
        return [str(each["taskArn"]) for each in answer["tasks"]], next(iter(failures), "")

    def _pause(self, worker: Worker, reason: str, trouble: str = "") -> None:
        """Ask for no workers of this worker's kind for a while."""
        now = time.monotonic()
        drought = self._droughts.get(worker.kind)
        if drought is None or now >= drought.until:
            pause = _FIRST_PAUSE if drought is None else min(2 * drought.pause, _LONGEST_PAUSE)
            self._droughts[worker.kind] = _Drought(reason, now + pause, pause, trouble)

    async def _stop_late(self, arn: str, reason: str) -> None:
        """Stop a task, and log an error if that fails."""
        try:
            await insist(lambda: self._stop(arn, reason))
        except CloudexecError as exc:
            _logger.error("the task %s could not be stopped: %s. %s", arn, exc, self._stop_hint)

    # Later calls.

    async def _keep_asking(self) -> None:
        """Ask for workers that wait, until there are none."""
        while any(each.waits for each in self._workers.values()):
            self._wake.clear()
            pause = await self._ask_some()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), pause)

    async def _ask_some(self) -> float:
        """Ask for workers that may find a place now, and return the seconds until the next round.

        Calls are made at the same time, since each of them may take long.
        """
        kinds: dict[tuple[bool, int], list[Worker]] = {}
        for worker in self._workers.values():
            if worker.waits:
                kinds.setdefault(worker.kind, []).append(worker)
        pause = _LONGEST_PAUSE
        for kind, workers in kinds.items():
            idle = [each for each in workers if each.asking is None]
            drought = self._droughts.get(kind)
            if drought is not None:
                for each in idle:
                    each.reason = drought.reason or each.reason
                if (left := drought.until - time.monotonic()) > 0:
                    pause = min(pause, left)
                    continue
                if len(idle) < len(workers):
                    continue  # one worker is being asked for, and its answer wakes this up
                idle = sorted(idle, key=lambda each: each.tried_at)[:1]
            for each in idle:
                await self.pacer.wait()
                if each.waits:
                    self._begin(each, self._ask_quietly(each))
                if self._droughts.get(kind) is not drought:
                    break  # an answer has come meanwhile, so the next round decides
        return pause

    async def _ask_quietly(self, worker: Worker) -> None:
        """Ask for a worker in the background, and record an error in the worker."""
        try:
            await self._run_task(worker)
        except CloudexecError as exc:
            if isinstance(exc, AwsError) and exc.may_pass:
                self._pause(worker, "", str(exc))
            else:
                worker.end = WorkerEnd(reason=Reason(str(exc), fatal=True))
        except Exception as exc:
            _logger.exception("internal error while asking for the worker %s", worker.name)
            worker.end = WorkerEnd(reason=Reason(f"internal error: {exc}", fatal=True))


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
