"""Checks a platform without an executor: it submits, describes, finds and ends one job."""

from __future__ import annotations

import asyncio
import glob
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

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
    WorkerStatus,
)
from cloudexec._launchers.platform_launcher import PlatformLauncher

__all__ = ["LauncherCheckError", "PlatformTrial", "all_ended", "until"]

T = TypeVar("T")
_PAUSE = 0.1
_NOBODY = "127.0.0.1:9"
"""An address without an executor: a service at this port (discard) ignores all that it is sent."""


class LauncherCheckError(AssertionError):
    """A launcher does not do what an executor expects of it.

    Attributes:
        check: The name of the check that failed.
    """

    def __init__(self, message: str = "", *, check: str = "") -> None:
        super().__init__(f"{check}: {message}" if check else message)
        self.check = check


async def until(look: Callable[[], Awaitable[T]], good: Callable[[T], bool], patience: float) -> T:
    """Call ``look`` until its answer is good, or the time is over; return the last answer."""
    deadline = time.monotonic() + patience
    while True:
        found = await look()
        if good(found) or time.monotonic() > deadline:
            return found
        await asyncio.sleep(_PAUSE)


async def in_time(request: Awaitable[T], what: str, patience: float) -> T:
    """Await a platform's answer to a request.

    Raises:
        LauncherCheckError: If it does not answer in time.
    """
    try:
        async with asyncio.timeout(patience):
            return await request
    except TimeoutError as exc:
        raise LauncherCheckError(f"{what} has not returned within {patience:g} s") from exc


def all_ended(status: JobStatus, workers: int = 0) -> bool:
    """Return whether no worker is left, and at least ``workers`` of them have ended."""
    left = sum(count for phase, count in status.counts.items() if phase is not Phase.ENDED)
    return not left and status.counts.get(Phase.ENDED, 0) >= workers


def _expect(condition: object, message: str) -> None:
    if not condition:
        raise LauncherCheckError(message)


class PlatformTrial:
    """One job with two workers, which find no executor.

    Args:
        launcher: The launcher, which knows the sizes of workers.
        site: The platform.
        executor: The id of the executor that the job names.
        timeout: Seconds within which each single step must happen.
    """

    def __init__(
        self, launcher: PlatformLauncher, site: Site, executor: ExecutorInfo, timeout: float
    ) -> None:
        self._platform = site.platform
        self._timeout = timeout
        self._key = "" if site.key else secrets.token_hex(32)
        environment = {
            **launcher.environment,
            "CLOUDEXEC_TARGET": _NOBODY,
            "CLOUDEXEC_EXECUTOR_ID": executor.id,
            "CLOUDEXEC_LAUNCH": "1",
            "CLOUDEXEC_SLOTS": "1",
            "CLOUDEXEC_CERTIFICATE_SHA256": "00" * 32,
        }
        self._request = JobRequest(
            name=f"cloudexec-{executor.id}-1",
            workers=min(2, site.platform.most_workers or 2),
            capacity=launcher.capacity(0),
            spot=bool(launcher.spot),
            environment=environment,
            secrets={"CLOUDEXEC_KEY": self._key} if self._key else {},
        )

    async def run(self) -> None:
        """Submit the job, describe it, and end it.

        Raises:
            LauncherCheckError: If the platform does not do what it should.
            CloudexecError: If the platform reports an error.
        """
        platform, request = self._platform, self._request
        await self._in_time(platform.prepare(), "prepare()")
        submitted = await self._in_time(platform.submit(request), "submit()")
        whole = Target(job_id=submitted.job_id)
        taken = request.workers - submitted.shortfall
        try:
            await self._look_at(submitted)
            if taken > 1:
                await self._end_one(submitted)
        finally:
            await self._terminate(whole)
        found = await until(
            lambda: self._status(submitted), lambda status: all_ended(status, taken), self._timeout
        )
        _expect(
            all_ended(found, taken),
            f"terminate() was called for a job with {taken} workers, and {self._timeout:g} s later "
            f"describe() says {_said(found)} of it, and not that each of its workers has ended",
        )
        await self._terminate(whole)  # a second time, which must be no error

    async def _in_time(self, request: Awaitable[T], what: str) -> T:
        return await in_time(request, what, self._timeout)

    async def _terminate(self, target: Target) -> None:
        ending = self._platform.terminate([target], "a check of the launcher")
        await self._in_time(ending, "terminate()")

    async def _find(self, name: str) -> Submitted | None:
        return await self._in_time(self._platform.find(name, spot=self._request.spot), "find()")

    async def _look_at(self, submitted: Submitted) -> None:
        platform, request = self._platform, self._request
        _expect(submitted.job_id, "submit() returned a job with an empty id")
        _expect(
            0 <= submitted.shortfall < request.workers,
            f"submit() was asked for {request.workers} workers and says that "
            f"{submitted.shortfall} of them are missing; if it can start none, it must raise a "
            f"PlatformError",
        )
        self._see_that_the_key_is_secret()
        found = await until(lambda: self._find(request.name), bool, self._timeout)
        _expect(
            found is not None and found.job_id == submitted.job_id,
            f"find() with the name of the job {submitted.job_id!r} returned {found!r}: if the "
            f"answer to a submission gets lost, its workers would be started twice",
        )
        missing = await self._find(f"{request.name}0")
        _expect(missing is None, f"find() with a name that no job has returned {missing!r}")
        status = await until(
            lambda: self._status(submitted), lambda status: bool(status.counts), self._timeout
        )
        total = sum(status.counts.values())
        _expect(
            0 < total <= request.workers,
            f"describe() says {_said(status)} of a job with {request.workers} workers",
        )
        nobody = Inspection(job_id="no-such-job")
        others = await self._in_time(platform.describe([nobody]), "describe()")
        _expect(
            "no-such-job" not in others,
            "describe() returned a job that does not exist: it must leave out unknown jobs",
        )
        waiting = WaitingJob(job_id=submitted.job_id, spot=request.spot, counts=status.counts)
        reason = await self._in_time(platform.explain([waiting], []), "explain()")
        _expect(
            reason is None or isinstance(reason, Reason),
            f"explain() must return a Reason or None, not {reason!r}",
        )

    async def _end_one(self, submitted: Submitted) -> None:
        """End the first worker, and check that the second one goes on."""
        await self._terminate(Target(job_id=submitted.job_id, workers=[0]))

        def first_ended(status: JobStatus) -> bool:
            worker = status.workers.get(0)
            return worker is not None and worker.phase is Phase.ENDED

        status = await until(lambda: self._status(submitted), first_ended, self._timeout)
        _expect(
            first_ended(status),
            f"terminate() was called for worker 0, and {self._timeout:g} s later describe() says "
            f"{_said(status)}, and not that worker 0 has ended",
        )
        other: WorkerStatus | None = status.workers.get(1)
        killed = other is not None and any(end.killed for end in other.ends)
        _expect(
            not killed, "terminate() was called for worker 0 alone, and worker 1 was killed, too"
        )

    def _see_that_the_key_is_secret(self) -> None:
        """Check that no command line on this machine shows the key; others cannot be seen."""
        if not self._key or not sys.platform.startswith("linux"):
            return
        for path in glob.glob("/proc/[0-9]*/cmdline"):
            try:
                with open(path, "rb") as file:
                    line = file.read()
            except OSError:
                continue  # the process has ended
            _expect(
                self._key.encode() not in line,
                "JobRequest.secrets is in a command line, where every user of the machine can "
                "read it: give it to workers as environment variables, or in a file that only "
                "they can read",
            )

    async def _status(self, submitted: Submitted) -> JobStatus:
        """Return the job's status; a job that the platform has forgotten counts as ended."""
        taken = self._request.workers - submitted.shortfall
        inspection = Inspection(job_id=submitted.job_id, workers=taken, wanted=range(taken))
        told = await self._in_time(self._platform.describe([inspection]), "describe()")
        return told.get(submitted.job_id, JobStatus(counts={Phase.ENDED: taken}))


def _said(status: JobStatus) -> str:
    counts = [f"{count} {phase.value}" for phase, count in status.counts.items() if count]
    return repr(", ".join(counts) or "nothing")
