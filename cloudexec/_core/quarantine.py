"""Finds the task that kills its workers: suspects run apart, on workers that are reserved for them.

When a worker dies with several tasks, any of them may be the cause, and none is blamed. Each runs
again without other tasks beside it; a task that then loses its worker again is the cause. Short
tasks are sent to a worker by the thousand, and most of them have not begun. These run again in
groups, and only a group that loses its worker is divided further.

A task stays in quarantine until it is done, and groups only become smaller. So even if the machines
themselves fail, the number of workers that can be lost in this way is limited.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from cloudexec._core.queue import Queues, TaskQueue
from cloudexec._core.tasks import Task, TaskState
from cloudexec._core.workers import Worker

__all__ = ["PARTS", "Quarantine"]


PARTS = 16
"""Number of groups into which suspects are divided; the number of the worker's slots if that is
higher, so that tasks which ran there run alone. If the worker had more tasks than that, those that
had not begun become suspects only the second time. They were sent ahead by the thousand, and a
single failing machine would otherwise slow all of them down."""
_MOST = 1 << 30


class Quarantine:
    """The workers that are reserved for suspects; the suspects themselves are in the queues.

    Attributes:
        reserved: By worker id: whether the worker has suspects (``True``), or first finishes other
            tasks.
    """

    __slots__ = ("_queues", "_suspects", "reserved")

    def __init__(self, queues: Queues) -> None:
        self._queues = queues
        self._suspects = queues.suspects
        self.reserved: dict[str, bool] = {}

    def suspect(self, task: Task, aboard: int, slots: int) -> None:
        """Note that a worker has died with a task.

        Args:
            task: The task.
            aboard: Number of the worker's tasks, including this one.
            slots: Number of the worker's slots.
        """
        together = min(self._suspects.get(task, aboard), aboard)
        self._queues.set_apart(task, max(1, together // max(slots, PARTS)))

    def group(self, queue: TaskQueue, aboard: Collection[Task] = ()) -> int:
        """Return how many of a queue's first tasks may be together on one worker.

        Args:
            queue: The queue.
            aboard: The tasks that the worker has already.
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
        """Reserve a worker for suspects; ``hosts`` says whether it has some already."""
        self.reserved[worker.id] = hosts

    def release(self, worker: Worker, *, empty: bool = False) -> None:
        """End the reservation of a worker, unless it has suspects and is not empty."""
        if empty or self.reserved.get(worker.id) is False:
            self.reserved.pop(worker.id, None)

    def room(self, workers: Iterable[Worker], *, shared: bool) -> int:
        """Return how many more workers may be given suspects.

        Args:
            workers: All workers.
            shared: Whether other tasks wait, too. Half of the workers are left to these, if there
                are at least two.
        """
        able = sum(worker.takes_tasks for worker in workers)
        hosts = sum(self.reserved.values())
        return (max(1, able // 2) if shared else able) - hosts

    def to_empty(self, queue: TaskQueue, workers: Iterable[Worker]) -> Worker | None:
        """Return the worker that will be done with its tasks first, of those that fit a queue."""
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
