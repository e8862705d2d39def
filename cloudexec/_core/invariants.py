"""The invariants of the core, which hold between any two events; tests check them each time."""

from __future__ import annotations

from collections import Counter

from cloudexec._config import ServerConfig
from cloudexec._core.decisions import Decisions
from cloudexec._core.ends import Ends
from cloudexec._core.pool import Pool
from cloudexec._core.quarantine import Quarantine
from cloudexec._core.queue import Queues
from cloudexec._core.tasks import TaskState
from cloudexec._core.workers import Stage, WorkerState

__all__ = ["check"]

_WAITING, _SENT = TaskState.WAITING, TaskState.SENT
_RUNNING, _DONE = TaskState.RUNNING, TaskState.DONE
_BLOCKED, _BACKING_OFF = TaskState.BLOCKED, TaskState.BACKING_OFF


def check(
    config: ServerConfig,
    queues: Queues,
    pool: Pool,
    quarantine: Quarantine,
    ends: Ends,
    decisions: Decisions,
) -> None:
    """Check every invariant.

    Raises:
        AssertionError: If an invariant does not hold; the message names it.
    """
    waiting = queues.waiting_tasks()
    assert len(waiting) == queues.waiting, "the count of waiting tasks is off"
    assert len(set(map(id, waiting))) == len(waiting), "a task waits twice"
    held: set[int] = set()
    open_held = 0
    for worker in pool.workers.values():
        assert worker.id in pool.workers
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
    resting = len(queues.backing_off)
    assert all(task.state is _BACKING_OFF for task in queues.backing_off), "not backing off"
    assert queues.open_tasks == len(waiting) + open_held + resting, "open tasks are nowhere"
    opened = Counter(id(queues.queue_of(task)) for task in waiting)
    opened.update(id(queues.queue_of(task)) for task in queues.backing_off)
    for worker in pool.workers.values():
        alive = [task for task in worker.leases.values() if task.state is not _DONE]
        opened.update(id(queues.queue_of(task)) for task in alive)
    for queue in queues.by_key.values():
        assert queues.open_in(queue) == opened[id(queue)], "open tasks by queue are off"
        assert queue is queues.plain or queue.open, "a queue without tasks is kept"
        misplaced = [
            t for t in queue.tasks if t.state is _WAITING and queues.queue_of(t) is not queue
        ]
        assert not misplaced, "a task waits in another queue than its own"
    _check_allocations(queues, pool)
    for name in pool.available:
        assert pool.workers[name].state is WorkerState.ACTIVE, "a draining worker is available"
        assert pool.workers[name].is_within_reach, "a worker out of reach is available"
    _check_ends(config, pool, ends, decisions)
    _check_quarantine(queues, pool, quarantine)
    active = sum(w.slots for w in pool.workers.values() if w.state is WorkerState.ACTIVE)
    starting = sum(launch.slots for launch in pool.launches.values())
    total = sum(w.slots for w in pool.workers.values()) + starting
    assert pool.active_slots == active + starting, "the count of active slots is off"
    assert pool.active_slots == sum(pool.active_by_shape.values()), "slots by shape are off"
    assert pool.total_slots == total, "the count of slots is off"
    assert total <= config.scaling.max_slots, "more slots than max_workers"
    assert pool.starting_slots == starting, "the count of starting slots is off"
    assert all(task.state is _BLOCKED for task in queues.blocked), "blocked in another state"


def _check_ends(config: ServerConfig, pool: Pool, ends: Ends, decisions: Decisions) -> None:
    assert pool.workers.items() <= ends.workers.items(), "the end of a worker is not followed"
    due = list(ends.processes.values())
    for worker in ends.workers.values():
        stage, waits = worker.stage, worker.until is not None
        assert stage is not Stage.LOST, "a worker that is lost is not forgotten"
        assert waits or stage in (Stage.CONNECTED, Stage.CUT), "an end is waited for without limit"
        assert (worker.report is not None) == (stage is Stage.REPORTED), "report and stage differ"
        if worker.id not in pool.workers:
            assert worker.told_at is not None, "a worker was given up and not told to end"
        if worker.told_at is not None:
            assert waits, "a worker that was told to end is not waited for"
        if stage is Stage.CUT:
            assert worker.cut_at is not None, "a worker was cut off at no time"
            assert not waits, "a worker that may come back is ended"
        if worker.until is not None:
            due.append(worker.until)
        elif worker.cut_at is not None:
            due.append(worker.cut_at + config.reconnect_grace)
    if due:
        assert decisions.deadline is not None, "no deadline is set while an end is waited for"
        until = max(min(due), decisions.not_before)
        assert decisions.deadline <= until, "the deadline of an end is too late"


def _check_quarantine(queues: Queues, pool: Pool, quarantine: Quarantine) -> None:
    suspects, kept = queues.suspects, quarantine.reserved
    apart = sum(queue.open for queue in queues.by_key.values() if queue.apart)
    assert len(suspects) == apart, "suspects are in other queues"
    assert all(task.state is not _DONE for task in suspects), "a suspect is done"
    assert not kept.keys() & pool.available.keys(), "a worker that is kept gets tasks"
    for worker in pool.workers.values():
        hosts = kept.get(worker.id, False)
        alive = [task for task in worker.leases.values() if task.state is not _DONE]
        if hosts or any(task in suspects for task in alive):
            assert hosts, "a suspect is on a worker that is not kept for it"
            most = min([suspects.get(task, 0) for task in alive], default=1)
            assert len(alive) <= most, "a suspect is not alone"
    for name in kept:
        assert pool.workers[name].leases, "a worker is kept for nothing"


def _check_allocations(queues: Queues, pool: Pool) -> None:
    allocations = {id(w.allocation): w.allocation for w in pool.workers.values()}
    for allocation in allocations.values():
        takes = any(
            w.state is WorkerState.ACTIVE and w.is_within_reach for w in allocation.workers.values()
        )
        assert takes or allocation.saving_for is None, "room is saved where no worker takes tasks"
        leases = {
            lease: task for w in allocation.workers.values() for lease, task in w.leases.items()
        }
        assert allocation.heavy.keys() <= leases.keys(), "room is kept for a task that is gone"
        gpus = [each for ids in allocation.heavy.values() for each in ids]
        assert len(set(gpus)) == len(gpus), "two tasks have one GPU"
        for worker in allocation.workers.values():
            assert pool.workers.get(worker.id) is worker, "an allocation of a worker that is gone"
            for lease, task in worker.leases.items():
                request = queues.request_of(task)
                if task.state is _RUNNING:
                    assert request.floor.within(allocation.capacity), "a task where it cannot be"
                    assert allocation.is_light(request) or lease in allocation.heavy, "not counted"
                    wanted = request.need.gpus
                    assert len(allocation.heavy.get(lease, ())) == wanted, "GPUs are off"
        if allocation.heavy:
            room = allocation.room_left(queues.request_of)
            assert room is not None, "tasks were sent ahead beside one with more than its share"
            assert min(room) >= 0, "more is taken of a worker than it has"
