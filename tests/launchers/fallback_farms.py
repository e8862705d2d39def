"""Farms of processes that cannot start workers, each in its own way."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from process_farm import Farm, ProcessFarm

from cloudexec.launchers import (
    ExecutorInfo,
    JobRequest,
    Phase,
    PlatformError,
    Reason,
    Site,
    Submitted,
    Target,
    WaitingJob,
    WorkerEnd,
    WorkerStatus,
)


class FullFarm(Farm):
    """Takes jobs, and has no place for them; says nothing of it."""

    reason = ""

    def start(self, request: JobRequest, path: Path, index: int) -> None:
        path.with_suffix(".waits").touch()

    def workers(self, job_id: str) -> dict[int, WorkerStatus]:
        found = super().workers(job_id)
        for path in (self._folder / job_id).glob("*.waits"):
            phase = Phase.ENDED if self.is_over(job_id) else Phase.WAITING
            status = WorkerStatus(phase=phase, reason=self.reason)
            found.setdefault(int(path.stem), status)
        return found

    def is_over(self, job_id: str) -> bool:
        return (self._folder / job_id / "ended").exists()

    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        await super().terminate(targets, reason)
        for target in targets:
            (self._folder / target.job_id / "ended").touch()

    async def explain(
        self, waiting: Sequence[WaitingJob], ends: Sequence[WorkerEnd]
    ) -> Reason | None:
        return None


class DryFarm(FullFarm):
    """Says of each worker that there is no capacity."""

    reason = "the well is dry"

    def lacks_capacity(self, reason: str) -> bool:
        return reason == self.reason


class LimitedFarm(FullFarm):
    """Explains that a limit is reached."""

    async def explain(
        self, waiting: Sequence[WaitingJob], ends: Sequence[WorkerEnd]
    ) -> Reason | None:
        return Reason("the limit of the farm is reached", no_room=True)


class FatalFarm(FullFarm):
    """Explains that waiting cannot help."""

    async def explain(
        self, waiting: Sequence[WaitingJob], ends: Sequence[WorkerEnd]
    ) -> Reason | None:
        return Reason("the farm is closed for good", fatal=True)


class RefusingFarm(Farm):
    """Takes no job."""

    async def submit(self, request: JobRequest) -> Submitted:
        raise PlatformError("wolves in the farm")


class BusyFarm(Farm):
    """Cannot be asked."""

    async def submit(self, request: JobRequest) -> Submitted:
        raise PlatformError("the farm does not answer", transient=True)


class DeafFarm(Farm):
    """Takes jobs, and never answers."""

    async def submit(self, request: JobRequest) -> Submitted:
        await super().submit(request)
        await asyncio.Event().wait()
        raise AssertionError


class MuteFarm(Farm):
    """Never answers, and takes nothing."""

    async def submit(self, request: JobRequest) -> Submitted:
        await asyncio.Event().wait()
        raise AssertionError


class BrokenFarm(Farm):
    """Starts workers that end at once."""

    def start(self, request: JobRequest, path: Path, index: int) -> None:
        super().start(dataclasses.replace(request, command=("sh", "-c", "exit 7")), path, index)


class OldFarm(Farm):
    """Starts workers of another version, which the executor refuses when they have connected."""

    def start(self, request: JobRequest, path: Path, index: int) -> None:
        script = (
            "import runpy; from cloudexec import _enrolment; _enrolment.WIRE_VERSION = 0; "
            "runpy.run_module('cloudexec.worker', run_name='__main__')"
        )
        command = (sys.executable, "-c", script)
        super().start(dataclasses.replace(request, command=command), path, index)


class SilentFarm(Farm):
    """Starts workers that run, and never connect."""

    def start(self, request: JobRequest, path: Path, index: int) -> None:
        super().start(dataclasses.replace(request, command=("sleep", "60")), path, index)


class DeadlyFarm(Farm):
    """Kills each worker before it connects."""

    def start(self, request: JobRequest, path: Path, index: int) -> None:
        super().start(dataclasses.replace(request, command=("sleep", "60")), path, index)
        self._kill(path.with_suffix(".pid"))


class BuggyFarm(Farm):
    """Fails as no platform is meant to."""

    async def submit(self, request: JobRequest) -> Submitted:
        raise KeyError("submit")


class LateFarm(FullFarm):
    """Says that workers wait, ends none of them, and starts them in the end."""

    held: list[tuple[JobRequest, Path, int]]

    def start(self, request: JobRequest, path: Path, index: int) -> None:
        super().start(request, path, index)
        self.held = [*getattr(self, "held", []), (request, path, index)]

    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        for request, path, index in self.held:
            Farm.start(self, request, path, index)
        self.held = []


@dataclasses.dataclass(frozen=True)
class Unreachable(ProcessFarm):
    """Cannot be connected to."""

    @contextlib.asynccontextmanager
    async def connect(self, executor: ExecutorInfo) -> AsyncIterator[Site]:
        raise PlatformError("the road to the farm is blocked")
        yield


@dataclasses.dataclass(frozen=True)
class Placed(ProcessFarm):
    """Says where the executor is to listen, and what workers are to know."""

    listen: str = "127.0.0.1:0"
    advertise: str = ""
    key: bytes = b""
    relay: str = ""

    @contextlib.asynccontextmanager
    async def connect(self, executor: ExecutorInfo) -> AsyncIterator[Site]:
        async with super().connect(executor) as site:
            farm = site.platform
            if self.key:
                assert isinstance(farm, Farm)
                keyed = KeyedFarm(self, self.key)
                keyed.children = farm.children  # which are waited for in the end
                farm = keyed
            yield dataclasses.replace(
                site,
                platform=farm,
                listen=self.listen,
                advertise=self.advertise,
                key=self.key,
                relay=self.relay,
            )


class KeyedFarm(Farm):
    """Has a key for all of its workers."""

    def __init__(self, settings: ProcessFarm, key: bytes) -> None:
        super().__init__(settings)
        self._key = key

    def variables(self, request: JobRequest, index: int) -> dict[str, str]:
        return {**super().variables(request, index), "CLOUDEXEC_KEY": self._key.hex()}


def workers_of(farm: ProcessFarm) -> list[Path]:
    """Return a path for each worker that a farm has started."""
    return sorted(Path(farm.folder).glob("*/*.pid"))


def nothing_runs(*farms: ProcessFarm) -> bool:
    """Say whether no worker of these farms is left."""
    return not any(_runs(int(path.read_text())) for farm in farms for path in workers_of(farm))


def _runs(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
