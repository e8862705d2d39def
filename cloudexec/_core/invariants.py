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
_HELD, _RESTING = TaskState.HELD, TaskState.RESTING


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
    resting = len(machine._resting)
    assert all(task.state is _RESTING for task in machine._resting), "a task rests elsewhere"
    assert machine.open_tasks == len(waiting) + open_held + resting, "open tasks are nowhere"
    opened = Counter(id(machine._line_of(task)) for task in waiting)
    opened.update(id(machine._line_of(task)) for task in machine._resting)
    for worker in machine.workers.values():
        alive = [task for task in worker.leases.values() if task.state is not _DONE]
        opened.update(id(machine._line_of(task)) for task in alive)
    for line in machine._lines.values():
        assert machine._open_of(line) == opened[id(line)], "open tasks by line are off"
        assert line is machine._plain or line.open, "a line without tasks is kept"
        misplaced = [
            t for t in line.tasks if t.state is _WAITING and machine._line_of(t) is not line
        ]
        assert not misplaced, "a task waits in another line than its own"
    _check_accounts(machine)
    for name in machine._hungry:
        assert machine.workers[name].state is WorkerState.ACTIVE, "a draining worker is hungry"
        assert machine.workers[name].cut_at is None, "a worker that was cut off is hungry"
    _check_cuts(machine)
    _check_quarantine(machine)
    active = sum(w.slots for w in machine.workers.values() if w.state is WorkerState.ACTIVE)
    starting = sum(launch.slots for launch in machine.launches.values())
    total = sum(w.slots for w in machine.workers.values()) + starting
    assert machine._active_slots == active + starting, "the count of active slots is off"
    assert machine._active_slots == sum(machine._active_pools.values()), "slots by pool are off"
    assert machine._total_slots == total, "the count of slots is off"
    assert total <= machine.config.scaling.max_slots, "more slots than max_workers"
    assert all(task.state is _HELD for task in machine.held), "a held task is in another state"
    if machine.finished:
        assert not machine.open_tasks, "finished with tasks left"
        assert not machine.held, "finished with held tasks left"
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
    lines = [line for line in machine._lines.values() if line.alone]
    assert len(suspects) == sum(line.open for line in lines), "suspects are in other lines"
    assert all(task.state is not _DONE for task in suspects), "a suspect is done"
    assert not kept.keys() & machine._hungry.keys(), "a worker that is kept gets tasks"
    for worker in machine.workers.values():
        hosts = kept.get(worker.id, False)
        alive = [task for task in worker.leases.values() if task.state is not _DONE]
        if hosts or any(task in suspects for task in alive):
            assert hosts, "a suspect is on a worker that is not kept for it"
            most = min([suspects.get(task, 0) for task in alive], default=1)
            assert len(alive) <= most, "a suspect is not alone"
    for name in kept:
        assert machine.workers[name].leases, "a worker is kept for nothing"


def _check_accounts(machine: Machine) -> None:
    accounts = {id(w.account): w.account for w in machine.workers.values()}
    for account in accounts.values():
        takes = any(
            w.state is WorkerState.ACTIVE and w.cut_at is None for w in account.workers.values()
        )
        assert takes or account.held_for is None, "held for tasks where no worker takes any"
        leases = {lease: task for w in account.workers.values() for lease, task in w.leases.items()}
        assert account.heavy.keys() <= leases.keys(), "room is kept for a task that is gone"
        gpus = [each for ids in account.heavy.values() for each in ids]
        assert len(set(gpus)) == len(gpus), "two tasks have one GPU"
        for worker in account.workers.values():
            assert machine.workers.get(worker.id) is worker, "an account of a worker that is gone"
            for lease, task in worker.leases.items():
                claim = machine.claim_of(task)
                if task.state is _RUNNING:
                    assert claim.floor.within(account.capacity), "a task where it cannot be"
                    assert account.is_light(claim) or lease in account.heavy, "not counted"
                    wanted = claim.need.gpus
                    assert len(account.heavy.get(lease, ())) == wanted, "GPUs are off"
        if account.heavy:
            room = room_left(account, machine.claim_of)
            assert room is not None, "tasks were sent ahead beside one with more than its share"
            assert min(room) >= 0, "more is taken of a worker than it has"
