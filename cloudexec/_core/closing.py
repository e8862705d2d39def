"""Ends an executor: first its tasks end, then its workers, then it is finished.

After ``ShutdownRequested`` no more tasks come. Once no task is open, or the open ones are to be
dropped, all workers are told to end: launches are withdrawn, workers drain, and workers that are
cut off are given up. ``ends`` limits how long a worker may take. When the last worker is gone,
the command ``Finish`` is given, once.
"""

from __future__ import annotations

from cloudexec._core import commands, events
from cloudexec._core.decisions import Decisions
from cloudexec._core.ends import Ends
from cloudexec._core.pool import Pool
from cloudexec._core.queue import Queues
from cloudexec._core.tasks import Task, TaskState

__all__ = ["Closing"]

_ANSWERS = 1.0
"""Seconds that workers may take to hand back tasks that they have not begun."""


class Closing:
    """Ends an executor.

    Attributes:
        finished: Whether ``Finish`` has been given.
    """

    def __init__(self, queues: Queues, pool: Pool, ends: Ends, decisions: Decisions) -> None:
        self.finished = False
        self._queues = queues
        self._pool = pool
        self._ends = ends
        self._do = decisions.commands.append
        self._remind = decisions.remind
        self._state_dropped = decisions.state_dropped
        self._to_look = True
        self._asked: dict[Task, None] = {}
        self._answers_due = 0.0

    @property
    def is_asking(self) -> bool:
        """Whether workers have been asked to hand back unbegun tasks, so that none is sent now."""
        return bool(self._asked)

    @property
    def is_due(self) -> bool:
        """Whether shutdown was requested, and no task keeps workers from ending."""
        return self._queues.killing or not self._queues.has_work

    def look_again(self) -> None:
        """Note that workers must be checked again, although none of them is active."""
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
                        dropped.append(task)  # the workers are ended anyway
                elif task.state is TaskState.SENT:
                    # The task may have begun. It is cancelled only if its worker hands it back.
                    self._asked[task] = None
                    recalls.setdefault(worker.id, []).append(lease)
        self._cancel(dropped)
        for name, leases in recalls.items():
            self._do(commands.RecallTasks(name, leases))
        if recalls:
            self._answers_due = now + _ANSWERS
            self._remind(self._answers_due)

    def cancel_returned(self, now: float) -> None:
        """Cancel tasks that workers have handed back and, after a while, those of silent workers.

        A worker that has answered since, and has not handed a task back, has begun that task.
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
        """End all launches and workers; when all are gone, finish."""
        # Each worker causes events, so not all of thousands of workers are checked each time.
        if self._to_look or self._pool.active_slots:
            self._to_look = False
            self._stop_all(now)
        if not (self._pool.workers or self._queues.has_work or self.finished):
            self.finished = True
            self._state_dropped()
            self._do(commands.Finish())

    def _stop_all(self, now: float) -> None:
        pool, killing = self._pool, self._queues.killing
        for launch in list(pool.launches.values()):
            pool.withdraw(launch)
        for worker in list(pool.workers.values()):
            if worker.cut_at is not None:
                pool.drain(worker)
                self._ends.give_up_cut(worker, now)  # its results are not needed any more
            elif killing:
                # Also a worker that drains and has no task left, as it may never end by itself.
                pool.drain(worker)
                self._ends.terminate(worker, now)
            elif worker.until is not None:
                pool.drain(worker)  # it is about to end
            else:
                pool.retire(worker)
            self._remind(now)  # so that ``ends`` can limit how long the worker takes to end
            if worker.leases and not killing:
                # All these tasks are cancelled. Those that have begun are killed, as the worker
                # would finish them otherwise.
                self._do(commands.KillTasks(worker.id, list(worker.leases)))
