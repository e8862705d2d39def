"""The engine behind Batch: places jobs, runs them, and moves them from state to state.

One lock guards every job. One thread carries out delayed actions. Each running attempt has a thread
that starts it and waits for its end, outside the lock.
"""

from __future__ import annotations

import itertools
import math
import time
import uuid

from cloudexec.testing._aws.attempts import Attempts
from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.job_queues import JobQueues
from cloudexec.testing._aws.jobs import Attempt, Job, JobSpec
from cloudexec.testing._aws.logs import LogWriter
from cloudexec.testing._aws.platform import EnvironmentView, Platform
from cloudexec.testing._aws.runners import Runner
from cloudexec.testing._aws.timers import Timers, Timing

__all__ = ["Engine"]

SPOT_RECLAIMED = "Your Spot Task was interrupted."


class Engine:
    """Runs Batch jobs.

    Args:
        platform: Queues, roles and secrets of the fake AWS.
        runner: Starts attempts.
        logs: Gets the attempts' output.
        faults: The faults that a test has requested.
        timing: Durations of state changes.
        max_running: Most attempts that run at a time, whatever AWS's capacity is.
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
        self._timing = timing
        self._timers = Timers()
        self.lock = self._timers.lock
        self.jobs: dict[str, Job] = {}
        """All jobs by id, children included, in the order of submission."""
        self._attempts = Attempts(
            platform=platform,
            runner=runner,
            logs=logs,
            faults=faults,
            timing=timing,
            timers=self._timers,
            finished=self._finish,
        )
        self._queues = JobQueues(
            platform=platform,
            faults=faults,
            timing=timing,
            timers=self._timers,
            start=self._attempts.start,
            end=lambda job, reason: self._end(job, "FAILED", reason),
            max_running=max_running,
        )
        self._dependents: dict[str, list[Job]] = {}

    # Methods for the API.

    def submit(
        self,
        spec: JobSpec,
        size: int | None,
        depends_on: list[dict[str, str]],
    ) -> Job:
        """Accept a job.

        Args:
            spec: The job's parameters.
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
            self._timers.later(self._timing.step, lambda: self._admit(job))
            return job

    def refuses_task(self, spec: JobSpec, kind: str) -> str:
        """Take capacity for a task of Amazon ECS, or return what is lacking.

        Args:
            spec: The task's parameters.
            kind: The capacity provider.
        """
        with self.lock:
            return self._queues.refuses_task(spec.queue_arn, kind, spec.vcpus)

    def run_task(self, spec: JobSpec, failure: str = "") -> Job:
        """Start a task of Amazon ECS, whose capacity was taken before.

        Args:
            spec: The task's parameters.
            failure: Why it stops before it runs; such a task needs no capacity.
        """
        task_id = uuid.uuid4().hex
        job = Job(spec=spec, job_id=task_id, created_at=time.time(), task_id=task_id)
        with self.lock:
            self.jobs[task_id] = job
            if failure:
                job.enter("STARTING")
                self._timers.later(self._timing.step, lambda: self._fail(job, failure))
            else:
                place = EnvironmentView(
                    arn=spec.queue_arn,
                    name=spec.cluster,
                    kind=spec.provider,
                    max_vcpus=math.inf,
                    enabled=True,
                )
                self._attempts.start(job, place)
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
            elif job.environment_arn is not None:
                self._attempts.stop(job, "terminate", reason)
            else:
                self._queues.leave(job)
                self._end(job, "FAILED", reason)

    def cancel(self, job: Job, reason: str) -> None:
        """Stop a job and those of its children that have not been placed."""
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
                self._queues.leave(job)
                self._end(job, "FAILED", reason)

    def delete_queue(self, arn: str) -> None:
        """Terminate the remaining jobs of a queue that is being deleted."""
        with self.lock:
            for job in self.active(arn):
                if job.parent is None:
                    self.terminate(job, "Job queue was deleted")

    def active(self, queue_arn: str) -> list[Job]:
        """Return the jobs of a queue that have not ended, children included."""
        with self.lock:
            return [
                job
                for job in self.jobs.values()
                if job.spec.queue_arn == queue_arn and not job.ended
            ]

    def in_environment(self, arn: str) -> int:
        """Return the number of attempts that are placed in an environment."""
        with self.lock:
            return sum(job.environment_arn == arn for job in self.jobs.values())

    def front(self, queue_arn: str) -> list[Job]:
        """Return the jobs of a queue that wait to be placed, the next one first."""
        with self.lock:
            return self._queues.front(queue_arn)

    def used(self, environment_arn: str) -> float:
        """Return the vCPUs of an environment that are in use."""
        with self.lock:
            return self._queues.used(environment_arn)

    def poke(self) -> None:
        """Try again to place waiting jobs, because capacity may have changed."""
        self._queues.poke()

    # Methods for faults.

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
                    # The process does not exist yet, so it gets the signal a little later.
                    self._timers.later(0.02, stop)
                elif job.status == "RUNNING":
                    self._attempts.stop(job, "reclaim", reason, grace)

            if notice > 0:
                self._timers.later(notice, stop)
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
        """Forget jobs that have ended; see ``Faults.forget_ended``."""
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
        """Kill a job's container as if it had used up its memory."""
        with self.lock:
            job = self._placed_job(job_id)
            if job.running is None:
                raise ValueError(f"job {job_id} does not run yet")
            job.running.out_of_memory()

    def kill_instance(self, job_id: str) -> None:
        """End a job as if its machine had vanished."""
        with self.lock:
            job = self._placed_job(job_id)
            name = job.instance_id or f"i-{uuid.uuid4().hex[:17]}"
            self._attempts.stop(job, "instance", f"Host EC2 (instance {name}) terminated.", 0.0)

    def close(self) -> None:
        """Kill all running attempts, and end all threads."""
        with self.lock:
            self._timers.stop()
            self._queues.clear()
            threads = self._attempts.kill(self.jobs.values())
        for thread in threads:
            thread.join()
        self._timers.join()

    # States before a job runs.

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
        """Move a job on from SUBMITTED."""
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
                leaf.enter("PENDING")
                if any(self.jobs[other].status == "FAILED" for other in leaf.waits):
                    self._end(leaf, "FAILED", "Dependent Job failed")
            else:
                ready.append(leaf)
        self._queues.append(ready)

    # Ends of attempts.

    def _finish(self, job: Job, code: int | None, reason: str | None, status_reason: str) -> None:
        """Free the capacity of an attempt that has ended, then retry or end its job."""
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
        self._queues.free(job)
        stopped = job.stop_kind in ("terminate", "timeout")
        if code == 0 and not stopped:
            self._end(job, "SUCCEEDED", status_reason)
        elif not stopped and not self._timers.closing and self._retries(job.spec, job, attempt):
            self._queues.append([job], front=True)
        else:
            self._end(job, "FAILED", status_reason)

    @staticmethod
    def _retries(spec: JobSpec, job: Job, attempt: Attempt) -> bool:
        if len(job.attempts) >= spec.attempts:
            return False
        for rule in spec.rules:
            if rule.fits(attempt):
                return rule.action == "RETRY"
        return True

    # Ends of jobs.

    def _fail(self, job: Job, reason: str) -> None:
        if not job.ended:
            self._end(job, "FAILED", reason)

    def _end(self, job: Job, status: str, reason: str) -> None:
        job.enter(status)
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
            self._queues.append(ready)

    def _placed_job(self, job_id: str) -> Job:
        job = self.jobs.get(job_id)
        if job is None or job.status not in ("STARTING", "RUNNING"):
            raise ValueError(f"job {job_id} is neither STARTING nor RUNNING")
        return job
