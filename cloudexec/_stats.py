"""A snapshot of what an executor is doing."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING

from cloudexec._launchers.base import LaunchTimes

if TYPE_CHECKING:
    from cloudexec._server.driver import Driver

__all__ = ["ExecutorStats", "SizeCounts", "TaskCounts", "WorkerCounts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCounts:
    """Tasks by state; a task is in one of them."""

    held: int = 0
    """Waiting for the results of others, which are among their arguments."""
    resting: int = 0
    """Between two attempts, because of what the last one raised."""
    waiting: int = 0
    """Not sent to a worker yet."""
    sent: int = 0
    """On a worker, not begun."""
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0
    resumed: int = 0
    """Not run, and in none of the other states: an earlier run had left their results in the
    journal."""
    taken_over: int = 0
    """Of all these, how many an earlier process had sent to workers that work for this one now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCounts:
    """Workers by state; a worker serves one slot or several."""

    starting: int = 0
    """Launched, not connected yet."""
    idle: int = 0
    busy: int = 0
    draining: int = 0
    cut: int = 0
    """Of all these, how many have lost their connection and may come back."""
    lost: int = 0
    """Since the start."""
    reclaimed: int = 0
    """Of those that had dialed back, how many their platform took back since the start. One that
    could hand back all it had is not lost."""
    reconnected: int = 0
    """How often one came back over another connection, since the start."""
    launched: int = 0
    """Asked for since the start."""
    taken_over: int = 0
    """Launched by an earlier process with the same journal, which was killed, and taken over."""
    slots: int = 0
    """Tasks that the connected workers may run at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeCounts:
    """Workers of one size, and what waits for them."""

    size: str
    """Such as ``"4 vCPU with 16 GiB"``; what the machine has, where all workers are on one."""
    starting: int = 0
    """Launched, not connected yet."""
    connected: int = 0
    slots: int = 0
    """Tasks that those connected may run at once."""
    running: int = 0
    """Tasks that they run."""
    waiting: int = 0
    """Tasks for which workers of this size are launched; a larger one may take them."""


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ExecutorStats:
    """What ``BatchExecutor.stats()`` returns; prints as a table of what is not zero."""

    tasks: TaskCounts = field(default_factory=TaskCounts)
    workers: WorkerCounts = field(default_factory=WorkerCounts)
    bytes_sent: int = 0
    """Payload bytes of callables and arguments, before compression, that went to workers directly:
    not through a bucket."""
    bytes_received: int = 0
    """Payload bytes of large results and of output."""
    bytes_uploaded: int = 0
    """Bytes that this process has put into its bucket, for workers."""
    bytes_downloaded: int = 0
    """Bytes that it has read from there."""
    lost_attempts: int = 0
    """Attempts whose process or worker died."""
    retries: int = 0
    """Of these, how many were run again."""
    retried_errors: int = 0
    """Attempts that raised what ``retry_on`` names, and were run again."""
    duplicates: int = 0
    """Results that came too late, and were dropped."""
    pending_bytes: int = 0
    """Of pickled arguments of tasks that are not done; counted where ``max_pending_bytes`` or
    ``max_pending_tasks`` is given."""
    launch_failures: int = 0
    """Workers that could not be started, or ended before they did anything."""
    refused: int = 0
    """Peers that were turned away, and messages that were: strangers, malformed or impostors'."""
    sizes: tuple[SizeCounts, ...] = ()
    """The same by size of worker, those of which there is none and that nobody waits for left out;
    the launcher's own first."""
    launches: tuple[LaunchTimes, ...] = ()
    """Of each worker asked for: where the time went until its first result."""

    def __repr__(self) -> str:
        rows = []
        for each in fields(self):
            value = getattr(self, each.name)
            name = each.name.replace("_", " ")
            if isinstance(value, TaskCounts | WorkerCounts):
                rows.append((name, _counts(value)))
            elif each.name == "sizes":
                rows += [(size.size, _counts(size)) for size in value]
            elif each.name != "launches" and value:
                rows.append((name, f"{value:,}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    @classmethod
    def of(cls, driver: Driver) -> ExecutorStats:
        """Read a driver, on its own thread."""
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
            launches=driver.launches.times(),
        )


def _counts(counts: TaskCounts | WorkerCounts | SizeCounts) -> str:
    found = [(each.name, getattr(counts, each.name)) for each in fields(counts)]
    given = [f"{n:,} {name.replace('_', ' ')}" for name, n in found if n and name != "size"]
    return ", ".join(given) or "none"


for _class in (ExecutorStats, SizeCounts, TaskCounts, WorkerCounts):
    _class.__module__ = "cloudexec"
