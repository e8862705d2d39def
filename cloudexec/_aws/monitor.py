"""The blocking form of ``account``, with an event loop in a thread of its own."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import (
    AsyncGenerator,
    Iterable,
    Iterator,
    Sequence,
)

from cloudexec._aws.account import AsyncMonitor
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.loop_thread import LoopThread
from cloudexec._aws.profile import Profile
from cloudexec._aws.records import (
    CostReport,
    ExecutorInfo,
    JobInfo,
    LogLine,
)
from cloudexec._errors import ConfigError

__all__ = ["Monitor"]


class Monitor:
    """Lists and stops cloudexec's jobs in an account, and says what they cost.

    It works wherever a program may block, in a notebook, too: it makes its calls on an event loop
    of its own, in a thread that ``close`` (or the end of a ``with`` block) ends.

    Args:
        profile: Name of a profile whose queues and cluster to look at; ``None``: all queues and
            clusters of the region.
        region: Region to look at; by default the profile's, or the SDK's.

    Raises:
        ConfigError: If there is no such profile, or no region.
    """

    def __init__(self, profile: str | None = None, region: str | None = None) -> None:
        self._profile = None if profile is None else Profile.load(profile)
        if self._profile is not None:
            if region is not None and region != self._profile.region:
                raise ConfigError(
                    f"profile {profile!r} is in {self._profile.region}, not in {region}: "
                    f"give one of them"
                )
            region = self._profile.region
        self._thread = LoopThread("cloudexec-monitor")
        self._finalizer = weakref.finalize(self, self._thread.close)
        try:
            self._async: AsyncMonitor = self._thread.run(self._open(region))
        except BaseException:
            self.close()
            raise

    async def _open(self, region: str | None) -> AsyncMonitor:
        clients = AwsClients(region)
        self._thread.on_close(clients.close)
        profile = self._profile
        return AsyncMonitor(
            clients,
            queues={} if profile is None else profile.queues,
            clusters=None if profile is None else list(filter(None, [profile.cluster])),
            functions=(
                None if profile is None else [profile.log_group] if profile.function_role else []
            ),
            instances=profile is None or bool(profile.instance_profile),
            public_ip=profile is None or profile.assign_public_ip,
            log_group="" if profile is None else profile.log_group,
        )

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close connections and end the thread. More calls do nothing."""
        self._finalizer()

    def executors(
        self, *, active: bool | None = True, executor: str | None = None
    ) -> list[ExecutorInfo]:
        """Return executors, the newest first.

        Args:
            active: ``True``: only executors with a job that has not ended; ``False``: only
                executors without; ``None``: both.
            executor: Only the executor with this id.

        Raises:
            AwsError: If AWS refuses, or cannot be reached.
        """
        return self._thread.run(self._async.executors(active=active, executor=executor))

    def jobs(
        self,
        state: str | Iterable[str] | None = None,
        *,
        active: bool | None = None,
        executor: str | None = None,
        each_worker: bool = False,
        limit: int | None = None,
    ) -> list[JobInfo]:
        """Return jobs, the newest first.

        Args:
            state: Only jobs in this state, or in one of these. Of an array, one worker suffices.
            active: ``True``: only jobs that have not ended; ``False``: only jobs that have ended;
                ``None``: both.
            executor: Only jobs of this executor.
            each_worker: Whether workers of arrays are listed one by one, instead of the array.
            limit: Most jobs to return.

        Raises:
            AwsError: If AWS refuses, or cannot be reached.
            ConfigError: If there is no such state.
        """
        return self._thread.run(
            self._async.jobs(
                state=state,
                active=active,
                executor=executor,
                each_worker=each_worker,
                limit=limit,
            )
        )

    def logs(
        self, job_or_worker: str, follow: bool = False, tail: int | None = None
    ) -> Iterator[LogLine]:
        """Yield the lines of a log, one attempt after the other.

        Args:
            job_or_worker: A job's id, ``PARENT:INDEX``, or name; or a worker as errors name it,
                such as ``worker-12``. If several executors have such a worker, put the executor
                before it: ``0f3a7c9912ab44de/worker-12``. For an array of up to 100 workers, all
                their logs follow one after the other.
            follow: Wait for more lines until the job has ended. The log need not exist yet.
            tail: Begin with so many lines at the end of the last attempt.

        Raises:
            AwsError: If there is no such job, its log does not exist yet (``code`` ``"NoLog"``),
                AWS refuses, or cannot be reached.
            ConfigError: If several jobs have the name, or ``tail`` is out of its range.
        """
        yield from self._each(self._async.logs(job_or_worker, follow=follow, tail=tail))

    def logs_of_attempts(
        self,
        log_group: str,
        streams: Sequence[tuple[int, str]],
        follow: bool = False,
        tail: int | None = None,
    ) -> Iterator[LogLine]:
        """Yield the lines of tasks or instances, which AWS need not remember, one after the other.

        Args:
            log_group: Of all of them.
            streams: Number and log stream of each.
            follow: Wait for more lines until the last one has ended.
            tail: Begin with so many lines at the end of the last one.

        Raises:
            AwsError: If the last one has no log (``code`` ``"NoLog"``), AWS refuses, or cannot be
                reached.
        """
        yield from self._each(
            self._async.logs_of_attempts(log_group, streams, follow=follow, tail=tail)
        )

    def _each(self, lines: AsyncGenerator[LogLine, None]) -> Iterator[LogLine]:
        try:
            while True:
                line = self._thread.run(_next(lines))
                if line is None:
                    return
                yield line
        finally:
            # After Ctrl-C, the generator may still be closing itself.
            with contextlib.suppress(RuntimeError):
                self._thread.run(lines.aclose())

    def stoppable(
        self,
        executor: str | None = None,
        job: str | Sequence[str] | None = None,
        everything: bool = False,
        older_than: float | None = None,
        expired: bool = False,
    ) -> list[JobInfo]:
        """Return the jobs that ``stop`` with the same arguments would stop."""
        return self._thread.run(
            self._async.stoppable(
                executor=executor,
                job=job,
                everything=everything,
                older_than=older_than,
                expired=expired,
            )
        )

    def stop(
        self,
        executor: str | None = None,
        job: str | Sequence[str] | None = None,
        everything: bool = False,
        older_than: float | None = None,
        expired: bool = False,
        *,
        reason: str = "stopped through cloudexec",
    ) -> list[str]:
        """Stop jobs, no matter who started them. Their workers get SIGTERM, and 30 s later SIGKILL.

        Args:
            executor: Stop all jobs of this executor.
            job: Stop this job, or these, named as for ``logs``. An array is stopped as a whole.
            everything: Stop all jobs of all executors.
            older_than: Stop only jobs that were submitted at least so many seconds ago.
            expired: Stop only jobs that run past their time limit.
            reason: The reason that AWS Batch shows for the jobs.

        Returns:
            Ids of the jobs that were told to stop, without those that had ended before.

        Raises:
            AwsError: If some jobs could not be stopped. The others were stopped.
            ConfigError: If the arguments do not say what to stop.
        """
        return self._thread.run(
            self._async.stop(
                executor=executor,
                job=job,
                everything=everything,
                older_than=older_than,
                expired=expired,
                reason=reason,
            )
        )

    def cost(self, executor: str | None = None, *, refresh: bool = False) -> CostReport:
        """Return the executors and their costs, as far as AWS remembers their jobs.

        AWS Batch remembers jobs for seven days or more, and Amazon ECS tasks for about an hour. The
        executor's own receipt has all of them.

        Args:
            executor: Only this executor.
            refresh: Whether to look up prices first. If that fails, a note in the report says so.

        Raises:
            AwsError: If AWS refuses, or cannot be reached.
        """
        return self._thread.run(self._async.cost(executor, refresh=refresh))


async def _next(lines: AsyncGenerator[LogLine, None]) -> LogLine | None:
    return await anext(lines, None)


Monitor.__module__ = "cloudexec.aws"
