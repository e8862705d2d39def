"""On the machine: what is left to it by a place that has neither time limits nor other attempts."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from urllib.parse import urlsplit

from cloudexec._aws.instance_metadata import InstanceMetadata
from cloudexec._aws.instance_search import is_instance_id
from cloudexec._errors import AwsError, CloudexecError
from cloudexec._runs.bucket import RunBucket
from cloudexec._runs.budget import Budget
from cloudexec._runs.places import MachineState, Place
from cloudexec._runs.plan import RunPlan, RunResult
from cloudexec._runs.protocol import INTERRUPTED, MACHINE_VARIABLE

__all__ = ["Succession", "own_machine", "succession_of"]

_MOST_ATTEMPTS = 3
"""As many as AWS Batch makes of a run."""
_METADATA_SECONDS = 2.0
_NOTICE = 90.0
"""Seconds from SIGTERM on in which the next attempt is asked for. AWS kills this process after 120.
Amazon ECS Developer Guide, "Amazon ECS clusters for Fargate"; Amazon EC2 User Guide, "Spot Instance
interruption notices"."""


def own_machine() -> str:
    """Return the id of the job that this process runs in; empty: it is not known.

    References:
        Amazon ECS Developer Guide, "Task metadata endpoint version 4".
    """
    if named := os.environ.get(MACHINE_VARIABLE, ""):
        return named
    where = urlsplit(os.environ.get("ECS_CONTAINER_METADATA_URI_V4", ""))
    if where.scheme != "http" or not where.hostname:
        return ""
    connection = http.client.HTTPConnection(
        where.hostname, where.port or 80, timeout=_METADATA_SECONDS
    )
    try:
        connection.request("GET", f"{where.path}/task")
        answer = json.loads(connection.getresponse().read())
        return str(answer["TaskARN"]).rpartition("/")[2]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return ""
    finally:
        connection.close()


def _has_notice() -> bool:
    """Whether AWS is about to take back the EC2 instance that this process runs on.

    References:
        Amazon EC2 User Guide, "Spot Instance interruption notices".
    """
    with contextlib.suppress(OSError, http.client.HTTPException), InstanceMetadata() as metadata:
        return bool(metadata.get("spot/instance-action"))
    return False


def succession_of(
    bucket: RunBucket, plan: RunPlan, budget: Budget, variables: Mapping[str, str], attempt: int
) -> Succession | None:
    """Return what the machine has to see to; ``None``: its place does."""
    place = budget.place
    if place is None or place.tries_again:
        return None
    return Succession(bucket, plan, budget, place, variables, attempt)


class Succession:
    """Ends this process in time, and starts another attempt when the machine is taken back.

    Args:
        bucket: What the bucket has of the run.
        plan: What is run.
        budget: Knows the jobs of the run.
        place: Has the machine.
        variables: With which the next machine is started.
        attempt: Number of this one.
    """

    def __init__(
        self,
        bucket: RunBucket,
        plan: RunPlan,
        budget: Budget,
        place: Place,
        variables: Mapping[str, str],
        attempt: int,
    ) -> None:
        self._bucket = bucket
        self._plan = plan
        self._budget = budget
        self._place = place
        self._variables = variables
        self._attempt = attempt
        self._task = ""

    async def begin(self) -> None:
        """Write that this attempt runs the program."""
        self.end_after(self._plan.max_seconds)
        self._task = await asyncio.to_thread(own_machine)
        if self._task:
            await self._budget.begun_by(self._task)

    @staticmethod
    def end_after(seconds: float) -> None:
        """End this process after a time, whatever it does then: nothing else would."""
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))

    async def stopped(self) -> str:
        """Say why no further attempt is to run the program; empty: one may."""
        return await self._bucket.stop_reason(self._plan.start_id)

    async def after(self, result: RunResult) -> RunResult:
        """Start another attempt after one that was told to stop, if its machine was taken back.

        Args:
            result: Of this attempt, which is not final.

        Returns:
            The same, if another attempt follows; or how the run has ended.
        """
        told_at = time.monotonic()
        end = replace(result, is_final=True, exit_code=INTERRUPTED)
        try:
            state = await self._own_state()
        except AwsError as exc:
            return replace(end, reason=f"{result.reason}; which of them, AWS does not say: {exc}")
        if reason := await self.stopped():
            return replace(end, was_stopped=True, reason=reason)
        if not state.was_reclaimed:
            return replace(end, was_stopped=True, reason=state.reason or result.reason)
        if self._attempt >= _MOST_ATTEMPTS:
            text = f"AWS took its machine back in attempt {self._attempt}, the last one"
            return replace(end, reason=f"{text} ({state.reason})")
        try:
            async with asyncio.timeout(_NOTICE - (time.monotonic() - told_at)):
                task = await self._place.start(
                    self._plan, self._variables, attempt=self._attempt + 1
                )
        except (CloudexecError, TimeoutError) as exc:
            why = str(exc) or f"{self._place.title} does not answer"
            text = f"AWS took its machine back, and there is no other one for it: {why}"
            return replace(end, reason=f"{text}. --resume goes on with its journal and its files")
        await self._budget.begun_by(task)
        # Whoever stops the run writes that first, and then ends the machines that there are.
        if reason := await self.stopped():
            await self._place.end(task, reason)
            return replace(end, was_stopped=True, reason=reason)
        return result

    async def _own_state(self) -> MachineState:
        """Return what the place says of this machine.

        Raises:
            AwsError: If it does not answer, or this machine does not know its own name.
        """
        unknown = MachineState(
            job_id=self._task,
            phase="running",
            created_at=datetime.now(UTC),
            known=await self._budget.known(),
        )
        if not self._task:
            raise AwsError("its metadata endpoint has not answered", code="NoMetadata")
        state = await self._place.look(self._plan, unknown)
        # Amazon EC2 says so to the instance, and only later to others.
        if is_instance_id(self._task) and await asyncio.to_thread(_has_notice):
            reason = state.reason or "Amazon EC2 has given notice"
            return replace(state, was_reclaimed=True, reason=reason)
        return state
