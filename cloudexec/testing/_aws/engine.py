"""The engine behind Batch: places jobs, runs them, and walks them through their states.

One lock guards every job. One thread carries out what is due later; each attempt that runs has a
thread that starts it and waits for its end. Starting and waiting happen outside the lock.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cloudexec.testing._aws.capacity import Capacity
from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.jobs import Attempt, Job, JobSpec
from cloudexec.testing._aws.logs import LogWriter
from cloudexec.testing._aws.runners import Exit, Runner, Running, StartError, StartRequest

__all__ = ["Engine", "EnvironmentView", "Platform", "QueueView", "Timing"]

OUT_OF_MEMORY = "OutOfMemoryError: Container killed due to memory usage"
ESSENTIAL = "Essential container in task exited"
SPOT_RECLAIMED = "Your Spot Task was interrupted."
TIMED_OUT = "Job attempt duration exceeded timeout"
TASK_FAILED = "Task failed to start"
OVERRIDES_TOO_LONG = "Container Overrides length must be at most 8192"
OVERRIDES_MAX = 8192
TAGS_MAX = 50
TOO_MANY_TAGS = "The total number of tags from the job and the job definition is over 50."
"""That the job fails is documented, in which words is not. AWS Batch API Reference, "SubmitJob"."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """How long things take, in seconds."""

    step: float
    """From each state to the next where nothing is waited for."""
    grace: float
    """From SIGTERM to SIGKILL."""
    speed: float
    """AWS's seconds per real second, for attempt timeouts and queue time limits."""
    boot: float = 0.0
    """Until a new EC2 instance runs jobs."""
    launch_rate: tuple[int, float] | None = None
    """Tasks that Fargate starts at once, and per second after that, of each kind of capacity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentView:
    """A compute environment as scheduling sees it."""

    arn: str
    name: str
    kind: str
    max_vcpus: float
    enabled: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueView:
    """A job queue as scheduling sees it."""

    arn: str
    name: str
    priority: int
    environments: tuple[EnvironmentView, ...]
    time_limits: tuple[tuple[str, float], ...]
    """Reason and AWS seconds at the head of the queue, after which a job is cancelled."""


class Platform(Protocol):
    """What the engine asks of the rest of AWS; see ``resources.MotoPlatform``."""

    def queue(self, arn: str) -> QueueView | None:
        """The queue, ``None`` where it has been deleted."""

    def task_environment(self, job: Job) -> Mapping[str, str]:
        """Variables that the task's agent sets."""

    def secrets(self, spec: JobSpec) -> Mapping[str, str]:
        """The values of the definition's secrets.

        Raises:
            StartError: If one cannot be read; the text is the job's status reason.
        """


class Engine:
    """Runs Batch jobs.

    Args:
        platform: The rest of AWS.
        runner: Starts attempts.
        logs: Where output goes.
        faults: What goes wrong.
        timing: How long things take.
        max_running: Attempts that run at a time at most, whatever AWS's capacity is.
    """

    def __init__(
        self,
        *,
        platform: Platform,
        runner: Runner,
        logs: LogWriter,
        faults: Faults,
        timing: Timing,
        max_running: int,
    ) -> None:
        self._platform = platform
        self._runner = runner
        self._logs = logs
        self._faults = faults
        self._timing = timing
        self.lock = threading.RLock()
        self.jobs: dict[str, Job] = {}
        """Every job by id, children included, in the order of submission."""
        self._changed = threading.Condition(self.lock)
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._queues: dict[str, deque[Job]] = {}
        self._capacity = Capacity(
            faults,
            self._later,
            self._schedule,
            max_running=max_running,
            boot=timing.boot,
            launch_rate=timing.launch_rate,
        )
        self._dependents: dict[str, list[Job]] = {}
        self._attempt_threads: set[threading.Thread] = set()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="fake-aws-engine", daemon=True)
        self._thread.start()

    # From the API.

    def submit(
        self,
        spec: JobSpec,
        size: int | None,
        depends_on: list[dict[str, str]],
    ) -> Job:
        """Take a job in.

        Args:
            spec: What to run.
            size: Number of children, ``None`` for a plain job.
            depends_on: As in SubmitJob.
        """
        with self.lock:
            now = time.time()
            job = Job(spec=spec, job_id=str(uuid.uuid4()), created_at=now)
            job.depends_on = depends_on
            self.jobs[job.job_id] = job
            if size is not None:
                job.children = [
                    Job(
                        spec=spec,
                        job_id=f"{job.job_id}:{index}",
                        created_at=now,
                        parent=job,
                        index=index,
                    )
                    for index in range(size)
                ]
                job.counts["SUBMITTED"] = size
                for child in job.children:
                    self.jobs[child.job_id] = child
            self._note_dependencies(job)
            self._later(self._timing.step, lambda: self._admit(job))
            return job

    def terminate(self, job: Job, reason: str) -> None:
        """Stop a job and its children, whatever their state."""
        with self.lock:
            if job.ended:
                return
            job.terminated = True
            if job.is_parent:
                job.stop_reason = reason
                for child in job.children:
                    self.terminate(child, reason)
            elif job.status in ("STARTING", "RUNNING"):
                self._stop(job, "terminate", reason)
            else:
                self._leave_queue(job)
                self._end(job, "FAILED", reason)

    def cancel(self, job: Job, reason: str) -> None:
        """Stop a job and its children as far as they have not been placed."""
        with self.lock:
            if job.ended:
                return
            if job.is_parent:
                job.cancelled = True
                job.stop_reason = reason
                for child in job.children:
                    self.cancel(child, reason)
            elif job.status not in ("STARTING", "RUNNING"):
                job.cancelled = True
                self._leave_queue(job)
                self._end(job, "FAILED", reason)

    def delete_queue(self, arn: str) -> None:
        """Terminate what is left of a queue that is being deleted."""
        with self.lock:
            for job in self.active(arn):
                if job.parent is None:
                    self.terminate(job, "Job queue was deleted")

    def active(self, queue_arn: str) -> list[Job]:
        """Jobs of a queue that have not ended, children included."""
        with self.lock:
            return [
                job
                for job in self.jobs.values()
                if job.spec.queue_arn == queue_arn and not job.ended
            ]

    def in_environment(self, arn: str) -> int:
        """How many attempts an environment has placed now."""
        with self.lock:
            return sum(job.environment_arn == arn for job in self.jobs.values())

    def front(self, queue_arn: str) -> list[Job]:
        """Jobs of a queue that wait to be placed, the next one first."""
        with self.lock:
            return list(self._queues.get(queue_arn, ()))

    def used(self, environment_arn: str) -> float:
        """vCPUs in use in an environment."""
        with self.lock:
            return self._capacity.used(environment_arn)

    def poke(self) -> None:
        """Look again whether waiting jobs can be placed: something about capacity has changed."""
        self._later(0.0, self._schedule)

    # From faults.

    def reclaim(self, job_id: str, *, notice: float, grace: float | None) -> None:
        """Take a job's machine back; see ``Faults.reclaim``."""
        with self.lock:
            job = self._placed_job(job_id)
            reason = SPOT_RECLAIMED
            if not job.spec.fargate:
                reason = f"Host EC2 (instance {job.instance_id}) terminated."
            attempt = len(job.attempts)

            def stop() -> None:
                if len(job.attempts) != attempt:
                    return
                if job.status == "STARTING":
                    # Its process is being made: there is nothing to tell yet.
                    self._later(0.02, stop)
                elif job.status == "RUNNING":
                    self._stop(job, "reclaim", reason, grace)

            if notice > 0:
                self._later(notice, stop)
            else:
                stop()

    def reclaim_fraction(self, fraction: float, *, notice: float, grace: float | None) -> list[str]:
        """Take back part of the running spot jobs; see ``Faults.reclaim_fraction``."""
        if not 0 < fraction <= 1:
            raise ValueError("fraction must be above 0, at most 1")
        with self.lock:
            running = sorted(
                (job for job in self.jobs.values() if job.status == "RUNNING" and job.spot),
                key=lambda job: job.started_at or 0.0,
            )
            chosen = running[: math.ceil(len(running) * fraction)]
            for job in chosen:
                self.reclaim(job.job_id, notice=notice, grace=grace)
            return [job.job_id for job in chosen]

    def forget_ended(self) -> list[str]:
        """Know jobs that have ended no longer; see ``Faults.forget_ended``."""
        with self.lock:
            awaited = {other for job in self.jobs.values() for other in job.waits}
            ended = [
                job
                for job in self.jobs.values()
                if job.parent is None
                and job.ended
                and awaited.isdisjoint(each.job_id for each in (job, *job.children))
            ]
            for job in ended:
                for each in (job, *job.children):
                    del self.jobs[each.job_id]
            return [job.job_id for job in ended]

    def out_of_memory(self, job_id: str) -> None:
        """Kill a job's container for its memory."""
        with self.lock:
            job = self._placed_job(job_id)
            if job.running is None:
                raise ValueError(f"job {job_id} does not run yet")
            job.running.out_of_memory()

    def kill_instance(self, job_id: str) -> None:
        """Let the machine under a job vanish."""
        with self.lock:
            job = self._placed_job(job_id)
            name = job.instance_id or f"i-{uuid.uuid4().hex[:17]}"
            self._stop(job, "instance", f"Host EC2 (instance {name}) terminated.", 0.0)

    def close(self) -> None:
        """Kill what runs and end every thread."""
        with self.lock:
            self._closing = True
            for queue in self._queues.values():
                queue.clear()
            for job in self.jobs.values():
                if job.status in ("STARTING", "RUNNING"):
                    job.stop_kind = job.stop_kind or "terminate"
                    if job.running is not None:
                        job.running.kill()
            self._changed.notify_all()
            threads = list(self._attempt_threads)
        for thread in threads:
            thread.join()
        self._thread.join()

    # The engine's thread.

    def _run(self) -> None:
        with self.lock:
            while not self._closing:
                now = time.monotonic()
                if self._timers and self._timers[0][0] <= now:
                    self._carry_out(heapq.heappop(self._timers)[2])
                    continue
                self._changed.wait(self._timers[0][0] - now if self._timers else None)

    @staticmethod
    def _carry_out(action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as exc:
            # Shown as any thread's, but the others' jobs go on.
            kind, trace = type(exc), exc.__traceback__
            threading.excepthook(
                threading.ExceptHookArgs((kind, exc, trace, threading.current_thread()))
            )

    def _later(self, seconds: float, action: Callable[[], None]) -> None:
        with self.lock:
            due = time.monotonic() + seconds
            heapq.heappush(self._timers, (due, next(self._numbers), action))
            self._changed.notify_all()

    # Before a job runs.

    def _note_dependencies(self, job: Job) -> None:
        for entry in job.depends_on:
            kind, other_id = entry.get("type"), entry.get("jobId")
            other = self.jobs.get(other_id or "")
            if kind == "SEQUENTIAL" and job.is_parent:
                for before, child in itertools.pairwise(job.children):
                    self._wait_for(child, before)
            elif kind == "N_TO_N" and other is not None and job.is_parent:
                for before, child in zip(other.children, job.children, strict=True):
                    self._wait_for(child, before)
            elif other is not None:
                for leaf in job.children or [job]:
                    self._wait_for(leaf, other)

    def _wait_for(self, job: Job, other: Job) -> None:
        if other.status != "SUCCEEDED":
            job.waits.add(other.job_id)
            self._dependents.setdefault(other.job_id, []).append(job)

    def _admit(self, job: Job) -> None:
        """From SUBMITTED on."""
        if job.ended:
            return
        if job.is_parent:
            job.status = "PENDING"
        leaves = job.children or [job]
        ready = []
        for leaf in leaves:
            if leaf.ended:
                continue
            if leaf.waits:
                self._set_status(leaf, "PENDING")
                if any(self.jobs[other].status == "FAILED" for other in leaf.waits):
                    self._end(leaf, "FAILED", "Dependent Job failed")
            else:
                ready.append(leaf)
        self._make_runnable(ready)

    def _make_runnable(self, jobs: Iterable[Job], *, front: bool = False) -> None:
        now = time.time()
        for job in jobs:
            self._set_status(job, "RUNNABLE")
            job.status_reason = None
            job.runnable_at = now
            queue = self._queues.setdefault(job.spec.queue_arn, deque())
            if front:
                queue.appendleft(job)
            else:
                queue.append(job)
        self._later(self._timing.step, self._schedule)

    def _leave_queue(self, job: Job) -> None:
        queue = self._queues.get(job.spec.queue_arn)
        if job.status == "RUNNABLE" and queue is not None:
            if queue and queue[0] is job:
                queue.popleft()
                self._later(0.0, self._schedule)
            else:
                queue.remove(job)

    def _schedule(self) -> None:
        if self._closing:
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
        """Take a place where a job can go now; else say why it cannot, where AWS does."""
        vcpus = job.spec.vcpus
        reasons: set[str | None] = set()
        for environment in view.environments:
            if not environment.enabled:
                reasons.add(None)
            elif self._faults.role_is_broken(environment.arn, environment.name):
                reasons.add(ROLE_BROKEN)
            elif vcpus > environment.max_vcpus:
                reasons.add(TOO_LARGE)
            elif not self._faults.has_instances(*_names(view, environment)):
                reasons.add(NO_INSTANCE)
            elif not self._faults.has_capacity(*_names(view, environment)):
                reasons.add(INSUFFICIENT)
            elif self._capacity.take(
                environment.arn, environment.kind, vcpus, environment.max_vcpus
            ):
                return environment, None
            else:
                reasons.add(None)
        # AWS names a reason where it holds of every environment of the queue.
        return None, reasons.pop() if len(reasons) == 1 else None

    def _at_head(self, view: QueueView, job: Job, reason: str | None) -> None:
        now = time.time()
        if job.status_reason != reason or job.head_since is None:
            job.status_reason = reason
            job.head_since = now if job.head_since is None else job.head_since
            for limit_reason, seconds in view.time_limits:
                self._later(
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
        self._leave_queue(job)
        self._end(job, "FAILED", f"Canceled by JobStateTimeLimit action due to reason: {reason}")

    # While a job is placed.

    def _start(self, job: Job, environment: EnvironmentView) -> None:
        job.environment_arn = environment.arn
        job.environment_name = environment.name
        job.environment_type = environment.kind
        job.task_id = uuid.uuid4().hex
        job.instance_id = None if job.spec.fargate else f"i-{uuid.uuid4().hex[:17]}"
        job.status_reason = None
        job.head_since = None
        job.exit_code = None
        job.reason = None
        job.log_stream = None
        job.started_at = None
        job.stopped_at = None
        job.stop_kind = job.stop_reason = job.stop_grace = None
        self._set_status(job, "STARTING")
        job.pull = None
        delay = self._faults.start_delay()
        self._later(self._timing.step + delay, lambda: self._launch(job, delay))

    def _launch(self, job: Job, pull: float) -> None:
        if job.status != "STARTING" or self._closing:
            return
        now = time.time()
        job.pull = (now - pull, now)
        job.launching = True
        thread = threading.Thread(
            target=self._attempt, args=(job,), name=f"fake-aws-job-{job.job_id}", daemon=True
        )
        self._attempt_threads.add(thread)
        thread.start()

    def _attempt(self, job: Job) -> None:
        """Start one attempt and wait for its end; runs in a thread of its own."""
        try:
            running = self._started(job)
            if running is not None:
                self._ended(job, running.wait())
        except Exception as exc:  # a fault of ours must show in the job, not vanish in a thread
            with self.lock:
                self._finish(job, None, None, f"FakeAWS failed: {exc!r}")
            raise
        finally:
            with self.lock:
                self._attempt_threads.discard(threading.current_thread())

    def _started(self, job: Job) -> Running | None:
        spec = job.spec
        name = f"{job.job_id.replace(':', '-')}-{len(job.attempts) + 1}"
        try:
            self._check_start(job)
            environment = {
                **spec.environment,
                **self._platform.secrets(spec),
                **self._platform.task_environment(job),
            }
            stream = f"{spec.log_prefix}/default/{job.task_id}"
            output = self._logs.open(spec.region, spec.log_group, stream, create=spec.log_create)
        except StartError as exc:
            with self.lock:
                text = str(exc)
                pulled = text.startswith(("CannotPullContainer", "CannotStartContainer"))
                self._finish(job, None, text if pulled else None, TASK_FAILED if pulled else text)
            return None
        request = StartRequest(
            name=name,
            image=spec.image,
            command=spec.command,
            environment=environment,
            vcpus=spec.vcpus,
            memory_mib=spec.memory_mib,
        )
        try:
            running = self._runner.start(request, output)
        except StartError as exc:
            with self.lock:
                self._finish(job, exc.exit_code, str(exc), TASK_FAILED)
            return None
        with self.lock:
            job.running = running
            job.log_stream = stream
            job.started_at = time.time()
            self._set_status(job, "RUNNING")
            attempt = len(job.attempts)
            if self._closing:
                running.kill()
            elif job.stop_kind is not None:
                self._send_stop(job)
            elif spec.timeout is not None:
                self._later(spec.timeout / self._timing.speed, lambda: self._time_out(job, attempt))
        return running

    def _check_start(self, job: Job) -> None:
        if job.spec.overrides_length > OVERRIDES_MAX:
            raise StartError(OVERRIDES_TOO_LONG)
        if job.spec.tags_of_task > TAGS_MAX:
            raise StartError(TOO_MANY_TAGS)
        if shared := sorted(job.spec.secrets.keys() & job.spec.environment.keys()):
            # What Amazon ECS answers to RunTask, as users quote it: overrides may add variables.
            raise StartError(
                "The secret name must be unique and not shared with any new or existing "
                f"environment variables set on the container, such as '{shared[0]}'."
            )
        error = self._faults.start_error()
        if error is not None:
            raise StartError(error)
        if self._faults.pull_fails(job.spec.image):
            raise StartError(
                "CannotPullContainerError: pull image manifest has been retried 1 time(s): failed "
                f"to resolve ref {job.spec.image}: {job.spec.image}: not found"
            )

    def _time_out(self, job: Job, attempt: int) -> None:
        if job.status == "RUNNING" and len(job.attempts) == attempt:
            self._stop(job, "timeout", TIMED_OUT)

    def _stop(self, job: Job, kind: str, reason: str, grace: float | None = None) -> None:
        if job.stop_kind is not None:
            return
        job.stop_kind = kind
        job.stop_reason = reason
        job.stop_grace = grace
        if job.running is not None:
            self._send_stop(job)
        elif not job.launching:
            self._finish(job, None, None, reason)

    def _send_stop(self, job: Job) -> None:
        running = job.running
        assert running is not None
        grace = self._timing.grace if job.stop_grace is None else job.stop_grace
        if job.stop_kind == "instance":
            running.kill()
            return
        running.terminate()

        def kill() -> None:
            if job.running is running:
                running.kill()

        self._later(grace, kill)

    def _ended(self, job: Job, how: Exit) -> None:
        spec = job.spec
        self._logs.finish(spec.region, spec.log_group, job.log_stream or "")
        with self.lock:
            code = how.code
            reason = OUT_OF_MEMORY if how.out_of_memory else None
            status_reason = ESSENTIAL
            if job.stop_kind in ("terminate", "timeout"):
                status_reason = job.stop_reason or ESSENTIAL
            elif job.stop_kind == "instance":
                # Nobody is left on that machine to report how the container ended.
                code, reason, status_reason = None, None, job.stop_reason or ESSENTIAL
            elif job.stop_kind == "reclaim" and code != 0:
                status_reason = job.stop_reason or ESSENTIAL
            self._finish(job, code, reason, status_reason)

    def _finish(self, job: Job, code: int | None, reason: str | None, status_reason: str) -> None:
        """One attempt has ended: free its place, then retry or end the job."""
        if job.status not in ("STARTING", "RUNNING"):
            return
        now = time.time()
        if job.stop_kind == "terminate" and job.stop_reason is not None:
            status_reason = job.stop_reason
        attempt = Attempt(
            exit_code=code,
            reason=reason,
            status_reason=status_reason,
            task_arn=job.task_arn,
            log_stream=job.log_stream,
            instance_arn=job.instance_arn,
            started_at=job.started_at,
            stopped_at=now,
        )
        job.attempts.append(attempt)
        job.exit_code = code
        job.reason = reason
        job.running = None
        job.launching = False
        self._free(job)
        stopped = job.stop_kind in ("terminate", "timeout")
        if code == 0 and not stopped:
            self._end(job, "SUCCEEDED", status_reason)
        elif not stopped and not self._closing and self._retries(job.spec, job, attempt):
            self._make_runnable([job], front=True)
        else:
            self._end(job, "FAILED", status_reason)

    def _free(self, job: Job) -> None:
        assert job.environment_arn is not None
        assert job.environment_type is not None
        self._capacity.give_back(job.environment_arn, job.environment_type, job.spec.vcpus)
        job.environment_arn = None
        self._later(0.0, self._schedule)

    @staticmethod
    def _retries(spec: JobSpec, job: Job, attempt: Attempt) -> bool:
        if len(job.attempts) >= spec.attempts:
            return False
        for rule in spec.rules:
            if rule.fits(attempt):
                return rule.action == "RETRY"
        return True

    # The end.

    def _end(self, job: Job, status: str, reason: str) -> None:
        self._set_status(job, status)
        job.status_reason = reason
        job.stopped_at = time.time()
        parent = job.parent
        if parent is not None and not parent.ended:
            done = parent.counts["SUCCEEDED"] + parent.counts["FAILED"]
            if done == len(parent.children):
                if parent.counts["FAILED"]:
                    self._end(parent, "FAILED", parent.stop_reason or "Array Child Job failed")
                else:
                    self._end(parent, "SUCCEEDED", "Array Job succeeded")
        self._release(job)

    def _release(self, job: Job) -> None:
        ready = []
        for waiting in self._dependents.pop(job.job_id, ()):
            if waiting.ended:
                continue
            if job.status == "FAILED":
                if waiting.status == "PENDING":
                    self._end(waiting, "FAILED", "Dependent Job failed")
                continue
            waiting.waits.discard(job.job_id)
            if not waiting.waits and waiting.status == "PENDING":
                ready.append(waiting)
        if ready:
            self._make_runnable(ready)

    def _set_status(self, job: Job, status: str) -> None:
        if job.parent is not None:
            job.parent.counts[job.status] -= 1
            job.parent.counts[status] += 1
        job.status = status

    def _placed_job(self, job_id: str) -> Job:
        job = self.jobs.get(job_id)
        if job is None or job.status not in ("STARTING", "RUNNING"):
            raise ValueError(f"job {job_id} is neither STARTING nor RUNNING")
        return job


def _names(queue: QueueView, environment: EnvironmentView) -> tuple[str, ...]:
    """Names by which a fault may mean a place."""
    return (queue.arn, queue.name, environment.arn, environment.name, environment.kind)
