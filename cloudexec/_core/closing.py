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
from cloudexec._core.tasks import Task, TaskState

__all__ = ["Closing"]

_ANSWERS = 1.0
"""Seconds that workers have to say which tasks they have not begun."""


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
        self._asked: dict[Task, None] = {}
        self._answers_due = 0.0

    @property
    def is_asking(self) -> bool:
        """Whether workers are to say which tasks they have not begun, so that nothing is sent."""
        return bool(self._asked)

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
        self._asked.clear()
        recalls: dict[str, list[int]] = {}
        for worker in self._pool.workers.values():
            for lease, task in worker.leases.items():
                if event.kill:
                    if task.state is not TaskState.DONE:
                        dropped.append(task)  # the workers end anyway
                elif task.state is TaskState.SENT:
                    # It may have begun. Only if its worker hands it back, it is cancelled.
                    self._asked[task] = None
                    recalls.setdefault(worker.id, []).append(lease)
        self._cancel(dropped)
        for name, leases in recalls.items():
            self._do(commands.RecallTasks(name, leases))
        if recalls:
            self._answers_due = now + _ANSWERS
            self._remind(self._answers_due)

    def cancel_returned(self, now: float) -> None:
        """Cancel what workers have handed back, and in the end what silent workers have.

        A worker that has said something since and has not handed a task back has begun it.
        """
        is_late = now >= self._answers_due
        dropped = []
        for task in list(self._asked):
            if task.state is TaskState.SENT:
                if not is_late:
                    continue
                worker = self._pool.workers.get(task.worker or "")
                has_begun = worker is not None and worker.heard_at > self._answers_due - _ANSWERS
            else:
                has_begun = task.state in (TaskState.RUNNING, TaskState.DONE)
            del self._asked[task]
            if not has_begun:
                dropped.append(task)
        self._cancel(dropped)
        if dropped and not self._queues.waiting:
            self._queues.clear()
        if self._asked:
            self._remind(self._answers_due)

    def _cancel(self, tasks: list[Task]) -> None:
        for task in tasks:
            self._queues.close(task, "cancelled")
        if tasks:
            self._do(commands.CancelTasks(tasks))

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
