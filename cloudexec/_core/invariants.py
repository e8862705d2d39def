"""What holds for a machine between any two events; tests look after each of them."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from cloudexec._core.scheduling import room_left
from cloudexec._core.tasks import TaskState
from cloudexec._core.workers import WorkerState

if TYPE_CHECKING:
    from cloudexec._core.machine import Machine

__all__ = ["check"]

_WAITING, _SENT = TaskState.WAITING, TaskState.SENT
_RUNNING, _DONE = TaskState.RUNNING, TaskState.DONE
_BLOCKED, _BACKING_OFF = TaskState.BLOCKED, TaskState.BACKING_OFF


def check(machine: Machine) -> None:
    """Check every invariant.

    Raises:
        AssertionError: Naming the one that does not hold.
    """
    waiting = machine.waiting_tasks()
    assert len(waiting) == machine._waiting, "the count of waiting tasks is off"
    assert len(set(map(id, waiting))) == len(waiting), "a task waits twice"
    held: set[int] = set()
    open_held = 0
    for worker in machine.workers.values():
        assert worker.id in machine.workers
        cost = sum(task.cost for task in worker.leases.values())
        assert abs(cost - worker.load) < 1.0, "a worker's load is off"
        assert (worker.idle_since is None) == bool(worker.leases), "idle with leases"
        for lease, task in worker.leases.items():
            assert id(task) not in held or task.state is _DONE, "a task is leased twice"
            if task.state is _DONE:
                continue
            held.add(id(task))
            open_held += 1
            assert task.lease == lease, "task and worker disagree on the lease"
            assert task.worker == worker.id, "task and worker disagree on who has it"
            assert task.state in (_SENT, _RUNNING), "a leased task is neither sent nor running"
            assert task.lost <= task.retries, "a task has more attempts than it may"
    assert not held & set(map(id, waiting)), "a task is both waiting and leased"
    resting = len(machine.backing_off)
    assert all(task.state is _BACKING_OFF for task in machine.backing_off), "a task rests elsewhere"
    assert machine.open_tasks == len(waiting) + open_held + resting, "open tasks are nowhere"
    opened = Counter(id(machine._queue_of(task)) for task in waiting)
    opened.update(id(machine._queue_of(task)) for task in machine.backing_off)
    for worker in machine.workers.values():
        alive = [task for task in worker.leases.values() if task.state is not _DONE]
        opened.update(id(machine._queue_of(task)) for task in alive)
    for queue in machine._queues.values():
        assert machine._open_of(queue) == opened[id(queue)], "open tasks by queue are off"
        assert queue is machine._plain or queue.open, "a queue without tasks is kept"
        misplaced = [
            t for t in queue.tasks if t.state is _WAITING and machine._queue_of(t) is not queue
        ]
        assert not misplaced, "a task waits in another queue than its own"
    _check_allocations(machine)
    for name in machine.available:
        assert machine.workers[name].state is WorkerState.ACTIVE, "a draining worker is available"
        assert machine.workers[name].cut_at is None, "a worker that was cut off is available"
    _check_cuts(machine)
    _check_quarantine(machine)
    active = sum(w.slots for w in machine.workers.values() if w.state is WorkerState.ACTIVE)
    starting = sum(launch.slots for launch in machine.launches.values())
    total = sum(w.slots for w in machine.workers.values()) + starting
    assert machine._active_slots == active + starting, "the count of active slots is off"
    assert machine._active_slots == sum(machine._active_pools.values()), "slots by pool are off"
    assert machine._total_slots == total, "the count of slots is off"
    assert total <= machine.config.scaling.max_slots, "more slots than max_workers"
    assert all(task.state is _BLOCKED for task in machine.blocked), (
        "a held task is in another state"
    )
    if machine.finished:
        assert not machine.open_tasks, "finished with tasks left"
        assert not machine.blocked, "finished with held tasks left"
        assert not machine.workers, "finished with workers left"


def _check_cuts(machine: Machine) -> None:
    for worker in machine.workers.values():
        if worker.cut_at is None:
            continue
        until = max(worker.cut_at + machine.config.reconnect_grace, machine._look_not_before)
        assert machine._deadline is not None, "nobody looks after a worker that was cut off"
        assert machine._deadline <= until, "a worker that was cut off is looked after too late"


def _check_quarantine(machine: Machine) -> None:
    suspects, kept = machine._quarantine.suspects, machine._quarantine.kept
    queues = [queue for queue in machine._queues.values() if queue.alone]
    assert len(suspects) == sum(queue.open for queue in queues), "suspects are in other queues"
    assert all(task.state is not _DONE for task in suspects), "a suspect is done"
    assert not kept.keys() & machine.available.keys(), "a worker that is kept gets tasks"
    for worker in machine.workers.values():
        hosts = kept.get(worker.id, False)
        alive = [task for task in worker.leases.values() if task.state is not _DONE]
        if hosts or any(task in suspects for task in alive):
            assert hosts, "a suspect is on a worker that is not kept for it"
            most = min([suspects.get(task, 0) for task in alive], default=1)
            assert len(alive) <= most, "a suspect is not alone"
    for name in kept:
        assert machine.workers[name].leases, "a worker is kept for nothing"


def _check_allocations(machine: Machine) -> None:
    allocations = {id(w.allocation): w.allocation for w in machine.workers.values()}
    for allocation in allocations.values():
        takes = any(
            w.state is WorkerState.ACTIVE and w.cut_at is None for w in allocation.workers.values()
        )
        assert takes or allocation.saving_for is None, "held for tasks where no worker takes any"
        leases = {
            lease: task for w in allocation.workers.values() for lease, task in w.leases.items()
        }
        assert allocation.heavy.keys() <= leases.keys(), "room is kept for a task that is gone"
        gpus = [each for ids in allocation.heavy.values() for each in ids]
        assert len(set(gpus)) == len(gpus), "two tasks have one GPU"
        for worker in allocation.workers.values():
            assert machine.workers.get(worker.id) is worker, (
                "an allocation of a worker that is gone"
            )
            for lease, task in worker.leases.items():
                request = machine.request_of(task)
                if task.state is _RUNNING:
                    assert request.floor.within(allocation.capacity), "a task where it cannot be"
                    assert allocation.is_light(request) or lease in allocation.heavy, "not counted"
                    wanted = request.need.gpus
                    assert len(allocation.heavy.get(lease, ())) == wanted, "GPUs are off"
        if allocation.heavy:
            room = room_left(allocation, machine.request_of)
            assert room is not None, "tasks were sent ahead beside one with more than its share"
            assert min(room) >= 0, "more is taken of a worker than it has"
