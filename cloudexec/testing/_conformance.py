"""Checks a launcher against all that an executor expects of it, on its real platform."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from typing import Any

from cloudexec._errors import LaunchError, PlatformError
from cloudexec._executor import BatchExecutor
from cloudexec._launchers.base import Launcher
from cloudexec._launchers.ledger import Job
from cloudexec._launchers.platform import ExecutorInfo, Inspection, Site, Target
from cloudexec._launchers.platform_launcher import PlatformLauncher
from cloudexec.testing._platform_trial import (
    LauncherCheckError,
    PlatformTrial,
    all_ended,
    in_time,
    until,
)

__all__ = ["check_launcher"]

_PAUSE = 0.05


def check_launcher(
    launcher: Launcher,
    *,
    timeout: float = 60.0,
    report: Callable[[str], object] | None = None,
    fail_next: Callable[[PlatformError], object] | None = None,
) -> list[str]:
    """Check that an executor can rely on a launcher. This runs about a dozen workers, two at once.

    A ``PlatformLauncher`` is first asked to run, find, end and describe jobs whose workers find no
    executor. Then, with any launcher, executors run tasks, map over two workers, let idle workers
    end and start new ones, lose workers in the middle of a task, and cancel waiting tasks. After
    each of these checks, nothing may be left running.

    Args:
        launcher: The launcher, with all settings that it needs. No executor may use it meanwhile,
            and no event loop may run in the calling thread.
        timeout: Seconds within which each single step must happen, such as the start of a worker.
        report: Called with the name of each check before it begins.
        fail_next: Lets the next ``Platform.submit`` raise the given error, if your launcher has
            such a function for tests. Failed submissions are checked then, too.

    Returns:
        The names of all checks, which the launcher has passed.

    Raises:
        LauncherCheckError: If a check fails. The message names the check and what the failure
            means.
    """
    passed: list[str] = []
    check = _Check(launcher, timeout, fail_next)
    for name, method in check.all():
        if report is not None:
            report(name)
        try:
            method()
        except LauncherCheckError as exc:
            raise LauncherCheckError(str(exc), check=name) from exc.__cause__
        except Exception as exc:
            what = str(exc) or f"it was not done within {timeout:g} s"
            raise LauncherCheckError(f"{type(exc).__name__}: {what}", check=name) from exc
        passed.append(name)
    return passed


def _expect(condition: object, message: str) -> None:
    if not condition:
        raise LauncherCheckError(message)


class _Check:
    """The checks of one launcher."""

    def __init__(
        self,
        launcher: Launcher,
        timeout: float,
        fail_next: Callable[[PlatformError], object] | None,
    ) -> None:
        self._launcher = launcher
        self._timeout = timeout
        self._fail_next = fail_next

    def all(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """Yield all checks that apply, with their names."""
        if isinstance(self._launcher, PlatformLauncher):
            yield "a job is submitted, found, described and ended", self._platform_keeps_its_word
        yield "calls return and raise", self._calls_return_and_raise
        yield "several workers share the work", self._workers_share_the_work
        yield "idle workers end and new ones come", self._idle_workers_end
        yield "work goes on after workers were lost", self._lost_workers_are_replaced
        yield "workers are withdrawn when no task needs them", self._launches_are_withdrawn
        if self._fail_next is not None:
            yield "failed submissions are tried again or reported", self._failures_are_told

    # Checks of the platform without an executor.

    def _platform_keeps_its_word(self) -> None:
        assert isinstance(self._launcher, PlatformLauncher)
        executor = ExecutorInfo(id=secrets.token_hex(8), launch_timeout=self._timeout)
        launcher = self._launcher

        async def run() -> None:
            async with self._connected(launcher, executor) as site:
                await PlatformTrial(launcher, site, executor, self._timeout).run()

        asyncio.run(run())

    @contextlib.asynccontextmanager
    async def _connected(
        self, launcher: PlatformLauncher, executor: ExecutorInfo
    ) -> AsyncIterator[Site]:
        async with contextlib.AsyncExitStack() as stack:
            entering = stack.enter_async_context(launcher.connect(executor))
            yield await in_time(entering, "connect()", self._timeout)
            await in_time(stack.aclose(), "the end of connect()", self._timeout)

    # Checks with executors.

    @contextlib.contextmanager
    def _executor(self, **options: Any) -> Iterator[BatchExecutor]:
        """Make an executor with two workers, and check that nothing of it is left at its end."""
        slots = 1 if self._launcher.one_machine else self._launcher.slots_per_worker(1_000_000)
        executor = BatchExecutor(
            2 * slots, launcher=self._launcher, launch_timeout=self._timeout, **options
        )
        try:
            yield executor
        except BaseException:
            executor.kill_workers()  # do not wait for tasks that still run
            raise
        executor.shutdown()
        driver = executor._driver
        if self._launcher.ends_are_seen and driver is not None:
            left = ", ".join(driver.launches.running)
            _expect(not left, f"on_end was not called for the launches {left}")
        for launcher in getattr(self._launcher, "launchers", (self._launcher,)):
            fleet = getattr(launcher, "_fleet", None)
            if isinstance(launcher, PlatformLauncher) and fleet is not None:
                asyncio.run(self._see_that_nothing_is_left(launcher, fleet.ledger.jobs))

    async def _see_that_nothing_is_left(
        self, launcher: PlatformLauncher, jobs: Sequence[Job]
    ) -> None:
        executor = ExecutorInfo(id=secrets.token_hex(8), launch_timeout=self._timeout)
        inspections = [
            Inspection(job_id=job.id, workers=len(job.members)) for job in jobs if job.id
        ]
        async with self._connected(launcher, executor) as site:

            async def left() -> list[str]:
                telling = site.platform.describe(inspections)
                found = await in_time(telling, "describe()", self._timeout)
                return [
                    each.job_id
                    for each in inspections
                    if each.job_id in found and not all_ended(found[each.job_id])
                ]

            found = await until(left, lambda found: not found, self._timeout)
        _expect(
            not found,
            f"the executor has shut down, and describe() does not say of all workers of "
            f"{', '.join(found)} that they have ended: they would cost money until they notice by "
            f"themselves that their executor is gone",
        )

    def _calls_return_and_raise(self) -> None:
        with self._executor() as executor:
            found = executor.submit(pow, 2, 10).result(self._timeout)
            _expect(found == 1024, f"pow(2, 10) returned {found!r}")
            error = executor.submit(int, "not a number").exception(self._timeout)
            _expect(isinstance(error, ValueError), f"int('not a number') ended with {error!r}")

    def _workers_share_the_work(self) -> None:
        def who(_: int) -> tuple[str, int]:
            import os
            import socket
            import time

            time.sleep(0.05)
            return socket.gethostname(), os.getppid()

        with self._executor() as executor:
            deadline, workers = time.monotonic() + self._timeout, set[tuple[str, int]]()
            many = range(20 * executor._max_workers)
            slots = executor._max_workers
            is_alone = self._launcher.slots_per_worker(slots) >= slots
            while len(workers) < (1 if is_alone else 2):
                workers |= set(executor.map(who, many, timeout=self._timeout))
                failures = executor.stats().launch_failures
                _expect(
                    not failures and (len(workers) > 1 or time.monotonic() < deadline),
                    f"two workers were asked for, {failures} of them failed to start, and tasks "
                    f"ran on {len(workers)}: submit() must start each worker of a job, and each "
                    f"must know its own index (CLOUDEXEC_INDEX)",
                )

    def _idle_workers_end(self) -> None:
        with self._executor(idle_timeout=0.5) as executor:
            executor.submit(abs, -1).result(self._timeout)

            def count() -> int:
                workers = executor.stats().workers
                return workers.starting + workers.idle + workers.busy + workers.draining

            self._wait(lambda: not count(), "workers with nothing to do are still connected")
            found = executor.submit(abs, -2).result(self._timeout)
            _expect(found == 2, f"abs(-2) returned {found!r}")

    def _lost_workers_are_replaced(self) -> None:
        # A platform that does not tell of the end of workers leaves that to this time.
        with self._executor(reconnect_grace=5.0) as executor:
            futures = [executor.submit(time.sleep, 2) for _ in range(2)]
            self._wait(futures[0].running, "no task has begun to run")
            self._take_workers_away(executor)
            for future in futures:
                future.result(self._timeout)
            found = executor.submit(abs, -3).result(self._timeout)
            _expect(found == 3, f"abs(-3) returned {found!r}")

    def _take_workers_away(self, executor: BatchExecutor) -> None:
        """End all workers, if possible without the executor's knowledge."""
        launcher, driver = self._launcher, executor._driver
        assert driver is not None

        async def end() -> None:
            if not isinstance(launcher, PlatformLauncher):
                launcher.terminate(list(driver.launches.running))
                return
            fleet = launcher._running
            targets = [Target(job_id=job.id) for job in fleet.ledger.alive()]
            await fleet.site.platform.terminate(targets, "a check of the launcher")

        driver.portal.run(end()).result(self._timeout)

    def _launches_are_withdrawn(self) -> None:
        with self._executor(idle_timeout=0.5) as executor:
            futures = [executor.submit(time.sleep, 600) for _ in range(2)]
            for future in futures:
                future.cancel(running=True)
            found = executor.submit(abs, -4).result(self._timeout)
            _expect(found == 4, f"abs(-4) returned {found!r}")
        with self._executor() as executor:
            executor.submit(time.sleep, 600)
            self._wait(lambda: executor.stats().workers.launched, "no worker was launched")
            executor.kill_workers()  # while the worker starts

    def _failures_are_told(self) -> None:
        assert self._fail_next is not None
        words = "check_launcher has made this submission fail"
        with self._executor() as executor:
            self._fail_next(PlatformError(words, transient=True))
            found = executor.submit(abs, -5).result(self._timeout)
            _expect(found == 5, f"abs(-5) returned {found!r}")
        with self._executor() as executor:
            self._fail_next(PlatformError(words))
            error = executor.submit(abs, -6).exception(self._timeout)
            _expect(
                isinstance(error, LaunchError) and words in str(error),
                f"submit() was to raise {words!r}, and the call ended with {error!r}: the error "
                f"that submit() raises must be a PlatformError with the platform's words",
            )

    def _wait(self, condition: Callable[[], object], otherwise: str) -> None:
        """Wait until a condition holds; fail if it does not hold in time."""
        deadline = time.monotonic() + self._timeout
        while not condition():
            _expect(time.monotonic() < deadline, otherwise)
            time.sleep(_PAUSE)
