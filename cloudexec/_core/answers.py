"""Handles the workers' reports that tasks have begun, have results, come back, or were taken over.

A lease is a worker's right to run a task. A report about a lease that the worker does not hold, or
not any more, is a duplicate: it is counted, and changes nothing. ``losses`` handles failed
attempts.
"""

from __future__ import annotations

from typing import Any

from cloudexec._core import commands, events, facts
from cloudexec._core.decisions import Decisions
from cloudexec._core.losses import Losses
from cloudexec._core.pool import Pool
from cloudexec._core.queue import Queues, TaskQueue
from cloudexec._core.resources import ResourceRequest
from cloudexec._core.tasks import Task, TaskState
from cloudexec._core.workers import Worker

__all__ = ["Answers"]

_SENT, _WAITING = TaskState.SENT, TaskState.WAITING
_BLOCKED, _DONE = TaskState.BLOCKED, TaskState.DONE


class Answers:
    """Handles the workers' reports about tasks."""

    def __init__(self, queues: Queues, pool: Pool, losses: Losses, decisions: Decisions) -> None:
        self._queues = queues
        self._pool = pool
        self._losses = losses
        self._do = decisions.commands.append
        self._state = decisions.facts.append
        self._counts = decisions.counts

    def on_started(self, event: events.TasksStarted, now: float) -> None:
        worker = self._pool.workers.get(event.worker)
        if worker is None:
            return
        worker.heard_at = now
        started = []
        for lease in event.leases:
            task = worker.leases.get(lease)
            if task is not None and task.state is _SENT:
                self._queues.begin(task)
                started.append(task)
        if started:
            self._do(commands.MarkRunning(started))

    def on_results(self, event: events.ResultsReceived, now: float) -> None:
        worker = self._pool.workers.get(event.worker)
        if worker is None:
            self._counts["duplicates"] += len(event.leases)
            return
        worker.heard_at = now
        held = worker.leases
        tasks: list[Task] = []
        results: list[Any] = []
        times: list[float] = []
        released = 0.0
        for lease, result, seconds in zip(event.leases, event.results, event.seconds, strict=True):
            task = held.pop(lease, None)
            if task is None:
                self._counts["duplicates"] += 1
                continue
            released += task.cost
            task.stats.learn(seconds)
            task.worker = None
            if task.state is _DONE:
                continue
            tasks.append(task)
            results.append(result)
            times.append(seconds)
        worker.load -= released
        heavy = worker.allocation.heavy
        if heavy:
            for lease in event.leases:
                heavy.pop(lease, None)
        worker.completed += len(event.leases)
        self._losses.note_results()
        if tasks:
            self._queues.finish(tasks)
            self._do(commands.ResolveTasks(worker.id, tasks, results, times))
        self._pool.settle(worker, now)

    def on_returned(self, event: events.LeasesReturned, now: float) -> None:
        worker = self._pool.workers.get(event.worker)
        if worker is None:
            return
        if event.heard:
            worker.heard_at = now
        attempts = worker.attempts(event.leases)
        if attempts:
            reason = _why_returned(worker, now)
            self._state(facts.TasksHandedBack(worker.id, attempts, reason))
        tasks = [worker.take_back(lease) for lease in event.leases]
        self._queues.requeue(task for task in tasks if task is not None)
        self._pool.settle(worker, now)

    def on_taken_over(self, event: events.TasksTakenOver, now: float) -> None:
        """Assign tasks that no worker was sent to the worker that has them already.

        If it may not have them, they are queued.
        """
        queues = self._queues
        worker = self._pool.workers.get(event.worker)
        running: list[Task] = []
        left: dict[TaskQueue, None] = {}
        lost: list[Task] = []
        for task, lease in zip(event.tasks, event.leases, strict=True):
            was_blocked = task.state is _BLOCKED
            if not was_blocked and (task.state is not _WAITING or queues.queue_of(task).apart):
                continue
            if worker is None or lease in worker.leases:
                lost.append(task)
                continue
            queue = queues.enter(task) if was_blocked else queues.queue_of(task)
            request = queue.request
            if not self._has_place(worker, request):
                if was_blocked:
                    queues.leave(task)
                lost.append(task)
                continue
            worker.give(task, lease)
            if was_blocked:
                queues.adopt(task)
            else:
                queues.send([task], 1)
                left[queue] = None
            allocation = worker.allocation
            if not allocation.is_light(request):
                allocation.heavy[lease] = allocation.free_gpus(request.need.gpus)
            running.append(task)
        if running:
            self._do(commands.MarkRunning(running))
        for queue in left:
            queue.tidy()  # a task that comes back must not stand there twice
        queues.unblock(lost)

    def _has_place(self, worker: Worker, request: ResourceRequest) -> bool:
        """Say whether a worker is large enough for a task, by its request and its size."""
        room = worker.allocation.room_left(self._queues.request_of)
        return (
            worker.free > 0
            and request.fits(worker.allocation.capacity)
            and room is not None
            and request.need.within(room)
        )


def _why_returned(worker: Worker, now: float) -> str:
    if worker.reclaimed:
        return "its platform wants the worker back"
    if not worker.is_active:
        return "the worker is to end"
    if worker.paused_until > now:
        return "tasks that it had were being cancelled"
    return "another worker was free"
