"""Which queued tasks go to a worker that has room."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from cloudexec._config import SendingPolicy
from cloudexec._core.tasks import Task, TaskState
from cloudexec._core.workers import Worker

__all__ = ["take_tasks"]

_WAITING, _SENT, _RUNNING = TaskState.WAITING, TaskState.SENT, TaskState.RUNNING


def take_tasks(
    queue: deque[Task],
    worker: Worker,
    policy: SendingPolicy,
    leases: Iterator[int],
    share: int,
    now: float = 0.0,
) -> tuple[list[Task], int]:
    """Move tasks from the head of the queue to a worker.

    A free slot always gets a task. Beyond that, tasks are sent ahead only while the estimated work
    on the worker stays below ``policy.lookahead`` seconds per slot; a kind of task of which nothing
    is known counts as long, and look-ahead doubles with what is known. So no-ops travel by the
    thousand, and a task longer than the look-ahead leaves when a slot is free, not before.

    Args:
        queue: Waiting tasks; those cancelled meanwhile are dropped here.
        worker: Who has room.
        policy: How far ahead.
        leases: Where new lease numbers come from.
        share: Most tasks to take, so that others get theirs.
        now: The time, in seconds.

    Returns:
        The tasks, and how many of them (the first ones) begin at once in a free slot.
    """
    taken: list[Task] = []
    starting = 0
    slots = worker.slots
    held = worker.leases
    load = worker.load
    budget = policy.lookahead * slots
    cap = policy.max_lookahead * slots
    in_flight = len(held)
    if now < worker.paused_until:
        cap = slots
    if in_flight >= slots and (2 * load > budget or 2 * in_flight > cap):
        # Well supplied. Topping up for each result that comes would make messages of a few tasks.
        return [], 0
    name = worker.id
    while queue and len(taken) < share:
        task = queue[0]
        if task.state is not _WAITING:
            queue.popleft()
            continue
        kind = task.kind
        seconds = kind.seconds
        if in_flight < slots:
            starting += 1
            task.state = _RUNNING
        elif load + seconds <= budget and in_flight < cap and in_flight < slots + 2 * kind.samples:
            task.state = _SENT
        else:
            break
        queue.popleft()
        task.lease = lease = next(leases)
        task.worker = name
        task.cost = seconds
        load += seconds
        held[lease] = task
        in_flight += 1
        taken.append(task)
    worker.load = load
    if taken:
        worker.idle_since = None
    return taken, starting
