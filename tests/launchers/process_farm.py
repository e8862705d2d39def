"""A launcher as another package would write it; its workers are processes listed in a folder.

It imports only public names of cloudexec.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloudexec.launchers import (
    ExecutorInfo,
    Inspection,
    JobRequest,
    JobStatus,
    Phase,
    Platform,
    PlatformError,
    PlatformLauncher,
    Reason,
    Site,
    Submitted,
    Target,
    WaitingJob,
    WorkerCapacity,
    WorkerEnd,
    WorkerPrice,
    WorkerStatus,
)

# The shell waits for the worker and writes the worker's exit code to a file, to be read later.
_SCRIPT = 'path=$1; shift; "$@" > "$path.log" 2>&1; echo $? > "$path.part"; mv "$path.part" "$path"'


@dataclass(frozen=True)
class ProcessFarm(PlatformLauncher):
    """Runs workers as processes of this machine.

    Args:
        folder: Folder with the state of all jobs.
        room: Number of workers that may run at once.
        faults: Exceptions that the next submissions raise, one each. An ``uncertain`` one is raised
            after the job was accepted.
        kind: The class of the platform.
    """

    folder: str = field(default_factory=lambda: tempfile.mkdtemp(prefix="farm-"))
    room: int = 8
    environment: Mapping[str, str] = field(default_factory=dict)
    most_workers: int | None = None
    cpus: float = 0.0
    hourly_usd: float = 0.0
    faults: list[PlatformError] = field(default_factory=list, repr=False)
    kind: type[Farm] | None = None

    @contextlib.asynccontextmanager
    async def connect(self, executor: ExecutorInfo) -> AsyncIterator[Site]:
        farm = (self.kind or Farm)(self)
        try:
            yield Site(platform=farm, listen="127.0.0.1:0")
        finally:
            for child in farm.children:
                await asyncio.to_thread(child.wait)

    def capacities(self) -> Sequence[WorkerCapacity]:
        return [WorkerCapacity(cpus=self.cpus)] if self.cpus else []


class Farm(Platform):
    name = "the farm"
    stop_hint = "`pkill -f cloudexec.worker` ends them"

    def __init__(self, settings: ProcessFarm) -> None:
        self.children: list[subprocess.Popen[bytes]] = []
        self.most_workers = settings.most_workers
        self._settings = settings
        self._folder = Path(settings.folder)

    async def submit(self, request: JobRequest) -> Submitted:
        fault = self._settings.faults.pop(0) if self._settings.faults else None
        if fault is not None and not fault.uncertain:
            raise fault
        job = self._folder / request.name
        job.mkdir()
        running = sum(child.poll() is None for child in self.children)
        taken = min(request.workers, max(0, self._settings.room - running))
        for index in range(taken):
            self.start(request, job / str(index), index)
        if fault is not None:
            raise fault
        return Submitted(job_id=request.name, shortfall=request.workers - taken)

    def start(self, request: JobRequest, path: Path, index: int) -> None:
        child = subprocess.Popen(
            ["sh", "-c", _SCRIPT, "sh", str(path), *request.command],
            env={**os.environ, **self.variables(request, index)},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        path.with_suffix(".pid").write_text(str(child.pid))
        self.children.append(child)

    def variables(self, request: JobRequest, index: int) -> dict[str, str]:
        return request.environment_of(index)

    async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
        return {
            each.job_id: JobStatus(workers=self.workers(each.job_id))
            for each in inspections
            if (self._folder / each.job_id).is_dir()
        }

    def workers(self, job_id: str) -> dict[int, WorkerStatus]:
        found = {}
        for path in (self._folder / job_id).glob("*.pid"):
            end = path.with_suffix("")
            if not end.exists():
                found[int(path.stem)] = WorkerStatus(phase=Phase.RUNNING)
                continue
            code = int(end.read_text())
            log = path.with_suffix(".log")
            words = log.read_text().strip() if log.exists() else ""  # killed before it began
            reason = Reason(f"exit code {code}\n{words}".strip(), fatal=code == 3)
            ended = WorkerEnd(reason=reason, killed=code == 137)
            found[int(path.stem)] = WorkerStatus(phase=Phase.ENDED, ends=[ended])
        return found

    async def find(self, name: str, *, spot: bool) -> Submitted | None:
        return Submitted(job_id=name) if (self._folder / name).is_dir() else None

    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        for target in targets:
            for path in (self._folder / target.job_id).glob("*.pid"):
                if target.workers is None or int(path.stem) in target.workers:
                    self._kill(path)

    def _kill(self, path: Path) -> None:
        end = path.with_suffix("")
        if not end.exists():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(path.read_text()), signal.SIGKILL)
            end.write_text("137")

    async def explain(
        self, waiting: Sequence[WaitingJob], ends: Sequence[WorkerEnd]
    ) -> Reason | None:
        return ends[-1].reason if ends else None

    def price(self, size: int, spot: bool) -> WorkerPrice | None:
        hourly = self._settings.hourly_usd
        return WorkerPrice(per_second=hourly / 3600, table="price of electricity")
