"""A snapshot of what an executor is doing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cloudexec._launchers.base import LaunchTimes

if TYPE_CHECKING:
    from cloudexec._server.driver import Driver

__all__ = ["ExecutorStats", "TaskCounts", "WorkerCounts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskCounts:
    """Tasks by state; a task is in one of them."""

    held: int = 0
    """Waiting for the results of others, which are among their arguments."""
    waiting: int = 0
    """Not sent to a worker yet."""
    sent: int = 0
    """On a worker, not begun."""
    running: int = 0
    succeeded: int = 0
    failed: int = 0
    cancelled: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerCounts:
    """Workers by state; a worker serves one slot or several."""

    starting: int = 0
    """Launched, not connected yet."""
    idle: int = 0
    busy: int = 0
    draining: int = 0
    lost: int = 0
    """Since the start."""
    reclaimed: int = 0
    """Of those that had dialed back, how many their platform took back since the start. One that
    could hand back all it had is not lost."""
    launched: int = 0
    """Asked for since the start."""
    slots: int = 0
    """Tasks that the connected workers may run at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorStats:
    """What ``BatchExecutor.stats()`` returns."""

    tasks: TaskCounts = field(default_factory=TaskCounts)
    workers: WorkerCounts = field(default_factory=WorkerCounts)
    bytes_sent: int = 0
    """Payload bytes of callables and arguments."""
    bytes_received: int = 0
    """Payload bytes of large results and of output."""
    lost_attempts: int = 0
    """Attempts whose process or worker died."""
    retries: int = 0
    """Of these, how many were run again."""
    duplicates: int = 0
    """Results that came too late, and were dropped."""
    launches: tuple[LaunchTimes, ...] = ()
    """Of each worker asked for: where the time went until its first result."""

    @classmethod
    def of(cls, driver: Driver) -> ExecutorStats:
        """Read a driver, on its own thread."""
        from cloudexec._core.tasks import TaskState
        from cloudexec._core.workers import WorkerState

        machine = driver.machine
        counts = machine.counts
        sent = running = idle = busy = draining = slots = 0
        for worker in machine.workers.values():
            slots += worker.slots
            if worker.state is WorkerState.DRAINING:
                draining += 1
            elif worker.leases:
                busy += 1
            else:
                idle += 1
            for task in worker.leases.values():
                sent += task.state is TaskState.SENT
                running += task.state is TaskState.RUNNING
        return cls(
            tasks=TaskCounts(
                held=len(machine.held),
                waiting=machine.waiting,
                sent=sent,
                running=running,
                succeeded=counts["succeeded"],
                failed=counts["failed"],
                cancelled=counts["cancelled"],
            ),
            workers=WorkerCounts(
                starting=len(machine.launches),
                idle=idle,
                busy=busy,
                draining=draining,
                lost=counts["workers_lost"],
                reclaimed=counts["workers_reclaimed"],
                launched=counts["launches"],
                slots=slots,
            ),
            bytes_sent=driver.bytes_sent,
            bytes_received=driver.bytes_received,
            lost_attempts=counts["lost_attempts"],
            retries=counts["retries"],
            duplicates=counts["duplicates"],
            launches=driver.launch_times(),
        )


for _class in (ExecutorStats, TaskCounts, WorkerCounts):
    _class.__module__ = "cloudexec"
