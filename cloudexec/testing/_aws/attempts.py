"""Runs the attempts of jobs, from the moment that a job has been placed to the attempt's end.

Each attempt has a thread that starts it and waits for its end, outside the engine's lock.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable

from cloudexec.testing._aws.faults import Faults
from cloudexec.testing._aws.jobs import Job
from cloudexec.testing._aws.logs import LogWriter
from cloudexec.testing._aws.platform import EnvironmentView, Platform
from cloudexec.testing._aws.runners import Exit, Runner, Running, StartError, StartRequest
from cloudexec.testing._aws.timers import Timers, Timing

__all__ = ["Attempts"]

OUT_OF_MEMORY = "OutOfMemoryError: Container killed due to memory usage"
ESSENTIAL = "Essential container in task exited"
TIMED_OUT = "Job attempt duration exceeded timeout"
TASK_FAILED = "Task failed to start"
CONTAINER_REASONS = ("Cannot", "ResourceInitializationError")
FARGATE_STATUS_REASONS = ("CannotPullContainer", "ResourceInitializationError")
OVERRIDES_TOO_LONG = "Container Overrides length must be at most 8192"
OVERRIDES_MAX = 8192
STOP_TIMEOUT = 30.0
"""Seconds from SIGTERM to SIGKILL, unless the container has another time."""
TAGS_MAX = 50
TOO_MANY_TAGS = "The total number of tags from the job and the job definition is over 50."
"""AWS documents that the job fails, but not the words. AWS Batch API Reference, "SubmitJob"."""


class Attempts:
    """Starts and stops attempts.

    Args:
        platform: Queues, roles and secrets of the fake AWS.
        runner: Starts attempts.
        logs: Gets the attempts' output.
        faults: The faults that a test has requested.
        timing: Durations of state changes.
        timers: The engine's clock.
        finished: Called with a job whose attempt has ended: exit code, the container's reason,
            status reason.
    """

    def __init__(
        self,
        *,
        platform: Platform,
        runner: Runner,
        logs: LogWriter,
        faults: Faults,
        timing: Timing,
        timers: Timers,
        finished: Callable[[Job, int | None, str | None, str], None],
    ) -> None:
        self._platform = platform
        self._runner = runner
        self._logs = logs
        self._faults = faults
        self._timing = timing
        self._timers = timers
        self._finish = finished
        self._threads: set[threading.Thread] = set()

    def kill(self, jobs: Iterable[Job]) -> list[threading.Thread]:
        """Kill all running attempts, and return the threads to wait for."""
        with self._timers.lock:
            for job in jobs:
                if job.status in ("STARTING", "RUNNING"):
                    job.stop_kind = job.stop_kind or "terminate"
                    if job.running is not None:
                        job.running.kill()
            return list(self._threads)

    def start(self, job: Job, environment: EnvironmentView) -> None:
        """Begin an attempt of a job that has been placed."""
        job.environment_arn = environment.arn
        job.environment_name = environment.name
        job.environment_type = environment.kind
        if not job.spec.cluster:  # the id of a task of Amazon ECS is known before it starts
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
        job.enter("STARTING")
        job.pull = None
        delay = self._faults.start_delay()
        self._timers.later(self._timing.step + delay, lambda: self._launch(job, delay))

    def stop(self, job: Job, kind: str, reason: str, grace: float | None = None) -> None:
        """Stop an attempt, unless it is being stopped already; see ``Job.stop_kind``."""
        if job.stop_kind is not None:
            return
        job.stop_kind = kind
        job.stop_reason = reason
        job.stop_grace = grace
        if job.running is not None:
            self._send_stop(job)
        elif not job.launching:
            self._finish(job, None, None, reason)

    def _launch(self, job: Job, pull: float) -> None:
        if job.status != "STARTING" or self._timers.closing:
            return
        now = time.time()
        job.pull = (now - pull, now)
        job.launching = True
        thread = threading.Thread(
            target=self._attempt, args=(job,), name=f"fake-aws-job-{job.job_id}", daemon=True
        )
        self._threads.add(thread)
        thread.start()

    def _attempt(self, job: Job) -> None:
        """Start one attempt and wait for its end. This runs in the attempt's thread."""
        try:
            running = self._started(job)
            if running is not None:
                self._ended(job, running.wait())
        except Exception as exc:  # an error of the fake itself must show in the job's reason
            with self._timers.lock:
                self._finish(job, None, None, f"FakeAWS failed: {exc!r}")
            raise
        finally:
            with self._timers.lock:
                self._threads.discard(threading.current_thread())

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
            stream = f"{spec.log_prefix}/{spec.container_name}/{job.task_id}"
            output = self._logs.open(spec.region, spec.log_group, stream, create=spec.log_create)
        except StartError as exc:
            self._fail_start(job, exc)
            return None
        request = StartRequest(
            name=name,
            image=spec.image,
            command=spec.command,
            environment=environment,
            vcpus=spec.vcpus,
            memory_mib=spec.memory_mib,
            user=str(spec.container.get("user") or ""),
        )
        try:
            running = self._runner.start(request, output)
        except StartError as exc:
            self._fail_start(job, exc)
            return None
        with self._timers.lock:
            job.running = running
            job.log_stream = stream
            job.started_at = time.time()
            job.enter("RUNNING")
            attempt = len(job.attempts)
            if self._timers.closing:
                running.kill()
            elif job.stop_kind is not None:
                self._send_stop(job)
            elif spec.timeout is not None:
                self._timers.later(
                    spec.timeout / self._timing.speed, lambda: self._time_out(job, attempt)
                )
        return running

    def _fail_start(self, job: Job, error: StartError) -> None:
        """End an attempt that could not be started, with the reason in AWS's field.

        Users report that it is the status reason on Fargate, without a container's reason
        (nextflow#5681), and the container's reason on EC2 (nextflow#5099).
        """
        text = str(error)
        with self._timers.lock:
            if not text.startswith(CONTAINER_REASONS) or (
                job.spec.fargate and text.startswith(FARGATE_STATUS_REASONS)
            ):
                self._finish(job, error.exit_code, None, text)
            else:
                self._finish(job, error.exit_code, text, TASK_FAILED)

    def _check_start(self, job: Job) -> None:
        if job.spec.overrides_length > OVERRIDES_MAX:
            raise StartError(OVERRIDES_TOO_LONG)
        if job.spec.tags_of_task > TAGS_MAX:
            raise StartError(TOO_MANY_TAGS)
        if shared := sorted(job.spec.secrets.keys() & job.spec.environment.keys()):
            # Users quote these words of RunTask. Here, too, overrides may add variables.
            raise StartError(
                "The secret name must be unique and not shared with any new or existing "
                f"environment variables set on the container, such as '{shared[0]}'."
            )
        error = self._faults.start_error()
        if error is not None:
            raise StartError(error)
        if why := self._faults.pull_error(job.spec.image):
            raise StartError(
                "CannotPullContainerError: pull image manifest has been retried 1 time(s): failed "
                f"to resolve ref {job.spec.image}: {why}"
            )

    def _time_out(self, job: Job, attempt: int) -> None:
        if job.status == "RUNNING" and len(job.attempts) == attempt:
            self.stop(job, "timeout", TIMED_OUT)

    def _send_stop(self, job: Job) -> None:
        running = job.running
        assert running is not None
        grace = job.stop_grace
        if grace is None:
            grace = self._timing.grace * job.spec.stop_timeout / STOP_TIMEOUT
        if job.stop_kind == "instance":
            running.kill()
            return
        running.terminate()

        def kill() -> None:
            if job.running is running:
                running.kill()

        self._timers.later(grace, kill)

    def _ended(self, job: Job, how: Exit) -> None:
        spec = job.spec
        self._logs.finish(spec.region, spec.log_group, job.log_stream or "")
        with self._timers.lock:
            code = how.code
            reason = OUT_OF_MEMORY if how.out_of_memory else None
            status_reason = ESSENTIAL
            if job.stop_kind in ("terminate", "timeout"):
                status_reason = job.stop_reason or ESSENTIAL
            elif job.stop_kind == "instance":
                # After the loss of a machine, AWS does not learn how the container ended.
                code, reason, status_reason = None, None, job.stop_reason or ESSENTIAL
            elif job.stop_kind == "reclaim" and (code != 0 or spec.cluster):
                status_reason = job.stop_reason or ESSENTIAL
            self._finish(job, code, reason, status_reason)
