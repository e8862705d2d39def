"""Which tasks may have killed a worker, and which workers are reserved so that those run alone.

When a worker dies with several tasks aboard, any of them may be the cause. None is blamed: each is
run again with nothing beside it, and whoever takes a worker along then has shown that it was the
one. Short tasks are aboard by the thousand, most of them sent ahead; those are run again in groups,
and only a group that takes its worker along is divided further.

Quarantine ends with the task, and groups only get smaller: so whatever kills workers, and be it the
machines themselves, each lost worker uses up something that there is only so much of.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from cloudexec._core.queue import Queues, TaskQueue
from cloudexec._core.tasks import Task, TaskState
from cloudexec._core.workers import Worker

__all__ = ["PARTS", "Quarantine"]


PARTS = 16
"""Into how many groups suspects are divided, or as many as the worker has slots: those that ran
there run alone. Tasks aboard beyond so many are suspects only once they were aboard twice: they
were sent ahead, by the thousand, and would all be slowed down whenever a machine fails."""
_MOST = 1 << 30


class Quarantine:
    """Who is reserved for suspects; the suspects themselves are in the queues.

    Attributes:
        reserved: Ids of the workers that are reserved for suspects: whether some are there
            (``True``), or the worker is to finish first what it has.
    """

    __slots__ = ("_queues", "_suspects", "reserved")

    def __init__(self, queues: Queues) -> None:
        self._queues = queues
        self._suspects = queues.suspects
        self.reserved: dict[str, bool] = {}

    def suspect(self, task: Task, aboard: int, slots: int) -> None:
        """Take in that a worker with so many slots died under a task and others, so many in all."""
        together = min(self._suspects.get(task, aboard), aboard)
        self._queues.set_apart(task, max(1, together // max(slots, PARTS)))

    def group(self, queue: TaskQueue, aboard: Collection[Task] = ()) -> int:
        """Return how many of a queue's tasks, the first ones, may be together on one worker.

        Args:
            queue: Whose tasks.
            aboard: Those that are there already.
        """
        size = len(aboard)
        most = min([self._suspects.get(task, 0) for task in aboard], default=_MOST)
        for task in queue.tasks:
            if size >= most:
                break
            if task.state is TaskState.WAITING:
                most = min(most, self._suspects[task])
                size += size < most
        return size - len(aboard)

    def reserve(self, worker: Worker, *, hosts: bool) -> None:
        """Reserve a worker for suspects: some are there, or it finishes first what it has."""
        self.reserved[worker.id] = hosts

    def release(self, worker: Worker, *, empty: bool = False) -> None:
        """Reserve a worker no longer, unless suspects are there and it is not empty."""
        if empty or self.reserved.get(worker.id) is False:
            self.reserved.pop(worker.id, None)

    def room(self, workers: Iterable[Worker], *, shared: bool) -> int:
        """Return how many more workers may have a suspect.

        Args:
            workers: All there are.
            shared: Whether other tasks wait, too: half of the workers are theirs, if there are two.
        """
        able = sum(worker.takes_tasks for worker in workers)
        hosts = sum(self.reserved.values())
        return (max(1, able // 2) if shared else able) - hosts

    def to_empty(self, queue: TaskQueue, workers: Iterable[Worker]) -> Worker | None:
        """Return the worker that is soonest done with what it has, and may have these tasks."""
        return min(
            (
                worker
                for worker in workers
                if worker.leases
                and worker.takes_tasks
                and worker.id not in self.reserved
                and queue.request.fits(worker.allocation.capacity)
            ),
            key=lambda worker: (worker.load, len(worker.leases)),
            default=None,
        )
