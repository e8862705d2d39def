"""Places waiting jobs, queue by queue, in compute environments.

Callers hold the engine's lock, except in ``poke()``.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from cloudexec.testing._aws.capacity import Capacity
from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.jobs import Job
from cloudexec.testing._aws.platform import EnvironmentView, Platform, QueueView
from cloudexec.testing._aws.timers import Timers, Timing

__all__ = ["JobQueues"]

INSUFFICIENT = (
    "CAPACITY:INSUFFICIENT_INSTANCE_CAPACITY - All compute environments have insufficient "
    "capacity to service the job."
)
TOO_LARGE = (
    "MISCONFIGURATION:COMPUTE_ENVIRONMENT_MAX_RESOURCE - All compute environments have a maxVcpu "
    "setting that is smaller than the job requirements."
)
NO_INSTANCE = (
    "MISCONFIGURATION:JOB_RESOURCE_REQUIREMENT - All compute environments have no connected "
    "instances that meet the job requirements."
)
ROLE_BROKEN = (
    "MISCONFIGURATION:SERVICE_ROLE_PERMISSIONS - All compute environments have problems with the "
    "service role permissions."
)


class JobQueues:
    """Places jobs, in each queue the next one first.

    Args:
        platform: Knows queues and their environments.
        faults: The faults that a test has requested.
        timing: Durations of state changes.
        timers: The engine's clock.
        start: Called with a job and the environment in which it was placed.
        end: Called with a job that a queue's time limit cancels, and the reason.
        max_running: Most attempts that run at a time, whatever AWS's capacity is.
    """

    def __init__(
        self,
        *,
        platform: Platform,
        faults: Faults,
        timing: Timing,
        timers: Timers,
        start: Callable[[Job, EnvironmentView], None],
        end: Callable[[Job, str], None],
        max_running: int,
    ) -> None:
        self._platform = platform
        self._faults = faults
        self._timing = timing
        self._timers = timers
        self._start = start
        self._end = end
        self._queues: dict[str, deque[Job]] = {}
        self._capacity = Capacity(
            faults,
            timers.later,
            self._schedule,
            max_running=max_running,
            boot=timing.boot,
            launch_rate=timing.launch_rate,
        )

    def front(self, queue_arn: str) -> list[Job]:
        """Return the jobs of a queue that wait to be placed, the next one first."""
        return list(self._queues.get(queue_arn, ()))

    def used(self, environment_arn: str) -> float:
        """Return the vCPUs of an environment that are in use."""
        return self._capacity.used(environment_arn)

    def refuses_task(self, cluster: str, kind: str, vcpus: float) -> str:
        """Take capacity for a task that waits in no queue; see ``Capacity.refuses``."""
        return self._capacity.refuses(cluster, kind, vcpus)

    def clear(self) -> None:
        """Remove all jobs from all queues."""
        for queue in self._queues.values():
            queue.clear()

    def poke(self) -> None:
        """Try again to place waiting jobs, because capacity may have changed."""
        self._timers.later(0.0, self._schedule)

    def append(self, jobs: Iterable[Job], *, front: bool = False) -> None:
        """Put jobs into their queues, behind all others or at the front."""
        now = time.time()
        for job in jobs:
            job.enter("RUNNABLE")
            job.status_reason = None
            job.runnable_at = now
            queue = self._queues.setdefault(job.spec.queue_arn, deque())
            if front:
                queue.appendleft(job)
            else:
                queue.append(job)
        self._timers.later(self._timing.step, self._schedule)

    def leave(self, job: Job) -> None:
        """Remove a job from its queue, if it waits in one."""
        queue = self._queues.get(job.spec.queue_arn)
        if job.status == "RUNNABLE" and queue is not None:
            if queue and queue[0] is job:
                queue.popleft()
                self.poke()
            else:
                queue.remove(job)

    def free(self, job: Job) -> None:
        """Give back the capacity of an attempt that has ended."""
        assert job.environment_arn is not None
        assert job.environment_type is not None
        self._capacity.give_back(job.environment_arn, job.environment_type, job.spec.vcpus)
        job.environment_arn = None
        self.poke()

    def _schedule(self) -> None:
        if self._timers.closing:
            return
        views = [
            view
            for arn, queue in self._queues.items()
            if queue and (view := self._platform.queue(arn)) is not None
        ]
        for view in sorted(views, key=lambda view: -view.priority):
            queue = self._queues[view.arn]
            while queue:
                job = queue[0]
                environment, reason = self._place(view, job)
                if environment is None:
                    self._at_head(view, job, reason)
                    break
                queue.popleft()
                self._start(job, environment)

    def _place(self, view: QueueView, job: Job) -> tuple[EnvironmentView | None, str | None]:
        """Take capacity for a job if there is some; else return the reason, if AWS gives one."""
        vcpus = job.spec.vcpus
        reasons: set[str | None] = set()
        for environment in view.environments:
            if not environment.enabled:
                reasons.add(None)
            elif self._faults.role_is_broken(environment.arn, environment.name):
                reasons.add(ROLE_BROKEN)
            elif not environment.has_gpus and _needs_gpus(job):
                reasons.add(NO_INSTANCE)
            elif vcpus > environment.max_vcpus:
                reasons.add(TOO_LARGE)
            elif not self._faults.has_instances(*_names(view, environment)):
                reasons.add(NO_INSTANCE)
            elif not self._faults.has_capacity(*_names(view, environment)):
                says_so = self._faults.says_no_capacity(*_names(view, environment))
                reasons.add(INSUFFICIENT if says_so else None)
            elif self._capacity.take(
                environment.arn, environment.kind, vcpus, environment.max_vcpus
            ):
                return environment, None
            else:
                reasons.add(None)
        # AWS gives a reason if it is the same for every environment of the queue.
        return None, reasons.pop() if len(reasons) == 1 else None

    def _at_head(self, view: QueueView, job: Job, reason: str | None) -> None:
        now = time.time()
        if job.status_reason != reason or job.head_since is None:
            job.status_reason = reason
            job.head_since = now if job.head_since is None else job.head_since
            for limit_reason, seconds in view.time_limits:
                self._timers.later(
                    seconds / self._timing.speed,
                    lambda limit_reason=limit_reason: self._limit_reached(  # type: ignore[misc]
                        job, limit_reason
                    ),
                )

    def _limit_reached(self, job: Job, reason: str) -> None:
        head = self._queues.get(job.spec.queue_arn)
        if not head or head[0] is not job or not (job.status_reason or "").startswith(reason):
            return
        job.cancelled = True
        self.leave(job)
        self._end(job, f"Canceled by JobStateTimeLimit action due to reason: {reason}")


def _names(queue: QueueView, environment: EnvironmentView) -> tuple[str, ...]:
    """Return the names by which a fault may name a queue's environment."""
    return (queue.arn, queue.name, environment.arn, environment.name, environment.kind)


def _needs_gpus(job: Job) -> bool:
    return any(each["type"] == "GPU" for each in job.spec.container.get("resourceRequirements", ()))
