"""A launcher for Slurm: workers are the tasks of array jobs, submitted with ``sbatch``.

Copy this file beside your program, and change what your cluster has differently::

    from cloudexec import BatchExecutor
    from slurm_launcher import Slurm

    with BatchExecutor(100, launcher=Slurm(partition="short", cpus=2)) as executor:
        results = list(executor.map(simulate, range(10_000)))

The program runs where ``sbatch`` works, such as on a login node, and computing nodes must be able
to connect to it. They need the same Python with cloudexec at the same path, as on a shared disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shlex
import shutil
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cloudexec import ConfigError
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
    WorkerStatus,
)

MIB = 1 << 20
PHASES = {
    "PENDING": Phase.WAITING,
    "CONFIGURING": Phase.STARTING,
    "RUNNING": Phase.RUNNING,
    "COMPLETING": Phase.RUNNING,
    "STOPPED": Phase.RUNNING,
    "SUSPENDED": Phase.RUNNING,
    "REQUEUED": Phase.WAITING,
    "REQUEUE_HOLD": Phase.WAITING,
}
"""All other states are ends. See "JOB STATE CODES" in the manual of squeue."""
TAKEN_BACK = ("PREEMPTED", "NODE_FAIL", "BOOT_FAIL", "REVOKED")
HOPELESS = ("BadConstraints", "InvalidAccount", "PartitionConfig", "PartitionNode", "PartitionTime")
NO_ROOM = ("Resources", "Priority", "QOS", "Assoc", "ReqNodeNotAvail", "Nodes", "PartitionDown")
"""How the reasons for which a job waits begin: those that do not pass, and those by which there is
no room now or a limit is reached. See "JOB REASON CODES" in the manual of squeue."""
MAY_PASS = ("Unable to contact slurm controller", "temporarily unable", "try again")
NO_ANSWER = ("Socket timed out", "Zero Bytes were transmitted", "Unexpected message received")


@dataclass(frozen=True, kw_only=True)
class Slurm(PlatformLauncher):
    """Runs workers as jobs of Slurm.

    Args:
        partition: The partition; empty for the cluster's own choice.
        cpus: Processors of each worker.
        memory_mib: Memory of each worker, in MiB.
        hours: Hours after which Slurm ends a worker.
        options: More options for ``sbatch``, such as ``("--account=physics",)``.
        slots: Tasks that each worker runs at once.
        launch_timeout: Seconds that a worker may wait in the queue, and start.
        host: The name or address by which computing nodes reach this machine; empty for its name.
        logs: A folder on a shared disk, which is there already, for what workers print; empty: it
            is dropped.
    """

    partition: str = ""
    cpus: int = 1
    memory_mib: int = 2048
    hours: float = 24.0
    options: tuple[str, ...] = ()
    slots: int = 1
    launch_timeout: float = 3600.0
    host: str = ""
    logs: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def connect(self, executor: ExecutorInfo) -> AsyncIterator[Site]:
        if shutil.which("sbatch") is None:
            raise ConfigError("there is no sbatch here: run the program on a login node of Slurm")
        host = self.host or socket.gethostname()
        yield Site(platform=SlurmPlatform(self), listen="0.0.0.0:0", advertise=host)

    def capacities(self) -> Sequence[WorkerCapacity]:
        return [WorkerCapacity(cpus=self.cpus, memory=self.memory_mib * MIB)]

    def capacity_for(self, cpus: float, memory: int, gpus: int) -> WorkerCapacity:
        """Slurm cuts a node as it is asked to: there is a worker for each task."""
        mib = max(math.ceil(memory / MIB), self.memory_mib)
        return WorkerCapacity(cpus=max(math.ceil(cpus), 1), memory=mib * MIB, gpus=gpus)


class SlurmPlatform(Platform):
    name = "Slurm"
    most_workers = 1000
    """``MaxArraySize`` of slurm.conf is 1001 by default."""
    stop_hint = "`scancel --me` ends all of your jobs"

    def __init__(self, settings: Slurm) -> None:
        self._settings = settings

    async def submit(self, request: JobRequest) -> Submitted:
        settings = self._settings
        has = request.capacity or settings.capacities()[0]
        command = [
            "sbatch",
            "--parsable",
            f"--job-name={request.name}",
            f"--array=0-{request.workers - 1}",
            "--ntasks=1",
            f"--cpus-per-task={has.cpus:g}",
            f"--mem={has.memory // MIB}M",
            f"--time={math.ceil(settings.hours * 60)}",
            "--no-requeue",  # the executor asks for another worker
            "--export=ALL",  # the key goes by the environment, which other users cannot read
            f"--output={self._log(request.name, '%a')}",
            *([f"--partition={settings.partition}"] if settings.partition else []),
            *([f"--gres=gpu:{has.gpus}"] if has.gpus else []),
            *settings.options,
        ]
        script = (
            "#!/bin/sh\n"
            'export CLOUDEXEC_INDEX="$SLURM_ARRAY_TASK_ID"\n'
            'export CLOUDEXEC_JOB_ID="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"\n'
            f"exec {shlex.join(request.command)}\n"
        )
        variables = {**os.environ, **request.environment, **request.secrets}
        said = await _run(command, stdin=script, environment=variables)
        job_id = said.strip().partition(";")[0]  # the name of a cluster may follow
        ids = [f"{job_id}_{index}" for index in range(request.workers)]
        return Submitted(job_id=job_id, worker_ids=ids)

    def _log(self, name: str, index: object) -> str:
        return f"{self._settings.logs}/{name}-{index}.log" if self._settings.logs else "/dev/null"

    async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
        listed: dict[str, dict[int, WorkerStatus]] = {}
        reasons: dict[str, str] = {}
        for job_id, index, name, state, reason, code in await self._list():
            status = self._status(name, index, state, reason, code)
            listed.setdefault(job_id, {})[index] = status
            if status.phase is Phase.WAITING and reason != "None":
                reasons[job_id] = reason
        # Slurm forgets each task some minutes after its end.
        forgotten = WorkerStatus(phase=Phase.ENDED)
        return {
            each.job_id: JobStatus(
                workers=dict.fromkeys(range(each.workers), forgotten) | listed[each.job_id],
                reason=reasons.get(each.job_id, ""),
            )
            for each in inspections
            if each.job_id in listed
        }

    async def _list(self, *options: str) -> list[tuple[str, int, str, str, str, str]]:
        """Return id, index, name, state, reason and exit code of each task that Slurm knows."""
        columns = "ArrayJobID,ArrayTaskID,Name:80,State:30,Reason:60,exit_code:20"
        asked = ["squeue", "--me", "--array", "--states=all", "--noheader"]
        rows = []
        for line in (await _run([*asked, f"--Format={columns}", *options])).splitlines():
            # The columns have fixed widths, as reasons may contain spaces.
            job_id, index = line[:20].strip(), line[20:40].strip()
            name, state = line[40:120].strip(), line[120:150].strip()
            reason, code = line[150:210].strip(), line[210:].strip()
            if index.isdecimal():
                rows.append((job_id, int(index), name, state, reason, code))
        return rows

    def _status(self, name: str, index: int, state: str, reason: str, code: str) -> WorkerStatus:
        phase = PHASES.get(state, Phase.ENDED)
        if phase is not Phase.ENDED:
            return WorkerStatus(phase=phase, reason=reason)
        # squeue has it as wait() does; negative is the number of a signal.
        ended = os.waitstatus_to_exitcode(int(code or 0))
        text = f"{state}, signal {-ended}" if ended < 0 else f"{state}, exit code {ended}"
        if reason not in ("None", "") and state != "COMPLETED":
            text += f" ({reason})"
        words = _last_lines(self._log(name, index))
        end = WorkerEnd(
            # With exit code 3, worker and executor do not fit together.
            reason=Reason(f"{text}\n{words}".strip(), fatal=ended == 3),
            killed=state in ("CANCELLED", "TIMEOUT", "DEADLINE") or ended < 0,
            reclaimed=state in TAKEN_BACK,
            out_of_memory=state == "OUT_OF_MEMORY",
        )
        return WorkerStatus(phase=phase, ends=[end])

    async def find(self, name: str, *, spot: bool) -> Submitted | None:
        rows = [row for row in await self._list(f"--name={name}") if row[2] == name]
        if not rows:
            return None
        ids = sorted((index, job_id) for job_id, index, *_ in rows)
        return Submitted(job_id=rows[0][0], worker_ids=[f"{job_id}_{n}" for n, job_id in ids])

    async def terminate(self, targets: Sequence[Target], reason: str) -> None:
        ids = []
        for each in targets:
            some = each.workers
            ids += [each.job_id] if some is None else [f"{each.job_id}_{n}" for n in some]
        for at in range(0, len(ids), 100):  # a command line has no room for more
            await _run(["scancel", "--quiet", *ids[at : at + 100]], gone_is_fine=True)

    async def explain(
        self, waiting: Sequence[WaitingJob], ends: Sequence[WorkerEnd]
    ) -> Reason | None:
        if ends:
            return ends[-1].reason
        reason = waiting[0].reason
        if not reason or not waiting[0].counts.get(Phase.WAITING):
            return None
        if reason.startswith(HOPELESS):
            what = "Slurm will never have a place for such workers"
            return Reason(f"{what}: {reason}", "ask for less, or for another partition", fatal=True)
        return Reason(
            f"Slurm has no place for workers yet: {reason}",
            "`squeue --me --start` shows when they are expected to start",
            no_room=reason.startswith(NO_ROOM),
        )


async def _run(
    command: Sequence[str],
    *,
    stdin: str = "",
    environment: Mapping[str, str] | None = None,
    gone_is_fine: bool = False,
) -> str:
    """Run a command of Slurm, and return what it prints.

    Raises:
        PlatformError: If it fails, with what it says.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        env=environment,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the program
    )
    try:
        out, err = await process.communicate(stdin.encode())
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        ended = asyncio.ensure_future(process.wait())
        while not ended.done():  # a second cancellation must not leave its pipes open
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(ended)
        raise
    said = err.decode(errors="replace").strip()
    if process.returncode and not (gone_is_fine and "Invalid job id" in said):
        uncertain = any(words in said for words in NO_ANSWER)
        transient = uncertain or any(words in said for words in MAY_PASS)
        raise PlatformError(
            f"{command[0]}: {said or f'exit code {process.returncode}'}",
            transient=transient,
            uncertain=uncertain,
        )
    return out.decode(errors="replace")


def _last_lines(path: str) -> str:
    try:
        return "\n".join(Path(path).read_text(errors="replace").splitlines()[-20:])
    except OSError:
        return ""
