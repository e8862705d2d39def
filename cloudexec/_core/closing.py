"""How an executor ends: first its tasks, then its workers, then it is finished.

After ``ShutdownRequested`` no more tasks come. Once none is open, or nobody waits for them, whoever
is there is told to end: launches are withdrawn, workers drain, and those that are cut off are given
up. How long a worker may take is limited in ``losses``. With the last worker gone, ``Finish`` is
said, once.
"""

from __future__ import annotations

from cloudexec._core import commands, events
from cloudexec._core.decisions import Decisions
from cloudexec._core.losses import Losses
from cloudexec._core.pool import Pool
from cloudexec._core.queue import Queues
from cloudexec._core.tasks import TaskState

__all__ = ["Closing"]


class Closing:
    """Ends an executor.

    Attributes:
        finished: Whether the end was said.
    """

    def __init__(self, queues: Queues, pool: Pool, losses: Losses, decisions: Decisions) -> None:
        self.finished = False
        self._queues = queues
        self._pool = pool
        self._losses = losses
        self._do = decisions.commands.append
        self._remind = decisions.remind
        self._to_look = True

    @property
    def is_due(self) -> bool:
        """Whether, once it has been asked for, nothing keeps workers from ending."""
        return self._queues.killing or not self._queues.has_work

    def look_again(self) -> None:
        """Take in that somebody may have to be told to end although nobody is active."""
        self._to_look = True

    def on_shutdown(self, event: events.ShutdownRequested, now: float) -> None:
        queues = self._queues
        queues.shut_down(kill=event.kill)
        self.look_again()
        if not (event.cancel or event.kill):
            return
        dropped = [*queues.waiting_tasks(), *queues.blocked, *queues.backing_off]
        queues.clear()
        recalls: dict[str, list[int]] = {}
        for worker in self._pool.workers.values():
            for lease, task in worker.leases.items():
                running = event.kill and task.state is TaskState.RUNNING
                if task.state is TaskState.SENT or running:
                    dropped.append(task)
                    recalls.setdefault(worker.id, []).append(lease)
        for task in dropped:
            queues.close(task, "cancelled")
        if dropped:
            self._do(commands.CancelTasks(dropped))
        if not event.kill:  # else the workers end anyway
            for name, leases in recalls.items():
                self._do(commands.RecallTasks(name, leases))

    def wind_down(self, now: float) -> None:
        """Stop whatever still runs; once it is all gone, finish."""
        # Events come from each worker: of thousands, not all are looked at for each of them.
        if self._to_look or self._pool.active_slots:
            self._to_look = False
            self._stop_all(now)
        if not (self._pool.workers or self._queues.has_work or self.finished):
            self.finished = True
            self._do(commands.Finish())

    def _stop_all(self, now: float) -> None:
        pool, killing = self._pool, self._queues.killing
        for launch in list(pool.launches.values()):
            pool.withdraw(launch)
        for worker in list(pool.workers.values()):
            if worker.cut_at is not None:
                pool.drain(worker)
                self._losses.give_up(worker, now)  # nothing that it has is of use any more
            elif killing:
                # Also one that drains and has nothing left: it may never end by itself.
                pool.drain(worker)
                self._do(commands.TerminateWorker(worker.id))
            else:
                pool.retire(worker)
            self._remind(now)  # how long it takes to end is limited
            if worker.leases and not killing:
                # Cancelled, all of them; some may have begun, and would be waited for.
                self._do(commands.KillTasks(worker.id, list(worker.leases)))
