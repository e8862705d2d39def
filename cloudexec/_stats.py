"""The numbers that ``BatchExecutor.stats()`` returns, as of one moment."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from cloudexec._launchers.base import LauncherCounts, LaunchTimes

if TYPE_CHECKING:
    from cloudexec._server.driver import Driver

__all__ = ["ExecutorStats", "SizeCounts", "TaskCounts", "WorkerCounts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCounts:
    """Number of tasks by state; a task is in exactly one state."""

    held: int = 0
    """Tasks that wait for other tasks, whose results are among their arguments."""
    resting: int = 0
    """Tasks that wait before they are run again after an exception of ``retry_on``."""
    waiting: int = 0
    """Tasks that wait to be sent to a worker."""
    sent: int = 0
    """Tasks that were sent to a worker and have not begun."""
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    resumed: int = 0
    """Calls that were not run, as the journal has their results from an earlier run. They are in
    none of the other states."""
    taken_over: int = 0
    """Tasks of all states that an earlier process had sent to workers which this process took
    over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCounts:
    """Number of workers by state; a worker has one slot or several.

    A slot is a process of the worker that runs one task at a time.
    """

    starting: int = 0
    """Workers that were launched and have not connected to the client yet."""
    idle: int = 0
    busy: int = 0
    draining: int = 0
    cut: int = 0
    """Workers of all these states whose connection was cut and who may reconnect."""
    lost: int = 0
    """Workers that were lost since the start."""
    reclaimed: int = 0
    """Connected workers that their platform took back since the start. Such a worker counts as lost
    only if it could not return all its tasks."""
    reconnected: int = 0
    """How often workers reconnected after a cut, since the start."""
    launched: int = 0
    """Workers that were requested from the launcher since the start."""
    taken_over: int = 0
    """Workers taken over from an earlier process with the same journal, which was killed."""
    slots: int = 0
    """Tasks that the connected workers can run at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeCounts:
    """Number of workers of one size, and of their tasks."""

    size: str
    """The size as text, such as ``"4 vCPU with 16 GiB"``. If all workers are on one machine, these
    are the resources of that machine."""
    starting: int = 0
    """Workers that were launched and have not connected to the client yet."""
    connected: int = 0
    slots: int = 0
    """Tasks that the connected workers can run at once."""
    running: int = 0
    """Tasks that these workers run."""
    waiting: int = 0
    """Tasks that wait for a worker of this size; a larger worker may run them, too."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ExecutorStats:
    """What ``BatchExecutor.stats()`` returns; ``print()`` shows a table of the non-zero numbers."""

    tasks: TaskCounts = field(default_factory=TaskCounts)
    workers: WorkerCounts = field(default_factory=WorkerCounts)
    bytes_sent: int = 0
    """Bytes of callables and arguments that were sent to workers directly and not through a bucket,
    counted before compression."""
    bytes_received: int = 0
    """Bytes of large results and of output that workers sent directly."""
    bytes_uploaded: int = 0
    """Bytes that this process wrote to its bucket for workers."""
    bytes_downloaded: int = 0
    """Bytes that this process read from its bucket."""
    lost_attempts: int = 0
    """Attempts whose process or worker died."""
    retries: int = 0
    """Lost attempts after which the task was run again."""
    retried_errors: int = 0
    """Attempts that raised an exception of ``retry_on``, after which the task was run again."""
    duplicates: int = 0
    """Results that came too late and were dropped."""
    pending_bytes: int = 0
    """Bytes of the pickled arguments of tasks that are not done; counted only if
    ``max_pending_bytes`` or ``max_pending_tasks`` is given."""
    launch_failures: int = 0
    """Workers that could not be started, or ended before they did any work."""
    refused: int = 0
    """Connections and messages that were refused: of peers without the key, or malformed."""
    sizes: tuple[SizeCounts, ...] = ()
    """Workers and tasks by size of worker; the launcher's own size comes first. Sizes without
    workers and without waiting tasks are left out."""
    launchers: tuple[LauncherCounts, ...] = ()
    """What each launcher of a ``Fallback`` has done, in their order; otherwise empty."""
    launches: tuple[LaunchTimes, ...] = ()
    """For each requested worker, how long the steps up to its first result took."""

    def __repr__(self) -> str:
        rows = []
        for each in fields(self):
            value = getattr(self, each.name)
            name = each.name.replace("_", " ")
            if isinstance(value, TaskCounts | WorkerCounts):
                rows.append((name, _counts(value)))
            elif each.name == "sizes":
                rows += [(size.size, _counts(size)) for size in value]
            elif each.name == "launchers":
                rows += [(one.launcher, one.in_words()) for one in value]
            elif each.name != "launches" and value:
                rows.append((name, f"{value:,}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    @classmethod
    def of(cls, driver: Driver) -> ExecutorStats:
        """Return the numbers of a driver; must be called on the driver's thread."""
        from cloudexec._core.tasks import TaskState
        from cloudexec._core.workers import WorkerState

        machine = driver.machine
        counts = machine.counts
        sent = running = idle = busy = draining = slots = 0
        sizes: dict[int, list[int]] = {}
        for launch in machine.launches.values():
            sizes.setdefault(launch.size, [0] * 5)[0] += 1
        for size, count in machine.waiting_by_size().items():
            sizes.setdefault(size, [0] * 5)[4] += count
        for worker in machine.workers.values():
            slots += worker.slots
            begun = sum(task.state is TaskState.RUNNING for task in worker.leases.values())
            found = sizes.setdefault(worker.size, [0] * 5)
            found[1:4] = found[1] + 1, found[2] + worker.slots, found[3] + begun
            if worker.state is WorkerState.DRAINING:
                draining += 1
            elif worker.leases:
                busy += 1
            else:
                idle += 1
            running += begun
            for task in worker.leases.values():
                sent += task.state is TaskState.SENT
        takeover, transfers = driver.takeover, driver.transfers
        put = 0 if transfers is None else transfers.bytes_received
        size_name = driver.launches.size_name
        return cls(
            tasks=TaskCounts(
                held=len(machine.blocked),
                resting=len(machine.backing_off_tasks()),
                waiting=machine.waiting,
                sent=sent,
                running=running,
                succeeded=counts["succeeded"],
                failed=counts["failed"],
                cancelled=counts["cancelled"],
                resumed=0 if driver.journal is None else driver.journal.resumed,
                taken_over=0 if takeover is None else takeover.tasks,
            ),
            workers=WorkerCounts(
                starting=len(machine.launches),
                idle=idle,
                busy=busy,
                draining=draining,
                cut=sum(worker.cut_at is not None for worker in machine.workers.values()),
                lost=counts["workers_lost"],
                reclaimed=counts["workers_reclaimed"],
                reconnected=driver.workers.reconnections,
                launched=counts["launches"],
                taken_over=0 if takeover is None else takeover.workers,
                slots=slots,
            ),
            bytes_sent=driver.service.bytes_sent,
            bytes_received=driver.service.bytes_received + put,
            bytes_uploaded=0 if transfers is None else transfers.bytes_uploaded,
            bytes_downloaded=0 if transfers is None else transfers.bytes_downloaded,
            lost_attempts=counts["lost_attempts"],
            retries=counts["retries"],
            retried_errors=counts["retried_errors"],
            duplicates=counts["duplicates"],
            pending_bytes=0 if driver.budget is None else driver.budget.bytes,
            launch_failures=counts["launch_failures"],
            refused=sum(driver.refusals.counts.values()),
            sizes=tuple(
                SizeCounts(
                    size=size_name(size),
                    starting=found[0],
                    connected=found[1],
                    slots=found[2],
                    running=found[3],
                    waiting=found[4],
                )
                for size, found in sorted(sizes.items())
            ),
            launchers=tuple(driver.launches.counts()),
            launches=driver.launches.times(),
        )


def _counts(counts: TaskCounts | WorkerCounts | SizeCounts) -> str:
    found = [(each.name, getattr(counts, each.name)) for each in fields(counts)]
    given = [f"{n:,} {name.replace('_', ' ')}" for name, n in found if n and name != "size"]
    return ", ".join(given) or "none"


for _class in (ExecutorStats, SizeCounts, TaskCounts, WorkerCounts):
    _class.__module__ = "cloudexec"
