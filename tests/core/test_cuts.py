"""Workers whose connection is cut: they are waited for, and lost when they do not come back."""

from __future__ import annotations

from typing import Any

import pytest
from endings import cut, lose

from cloudexec._config import ScalingPolicy, ServerConfig, TaskOptions, WorkerCapacity
from cloudexec._core.commands import (
    CloseSession,
    DrainWorker,
    FailTask,
    Finish,
    KillTasks,
    LaunchWorker,
    RecallTasks,
    ResolveTasks,
    SendTasks,
    TerminateLaunch,
)
from cloudexec._core.events import (
    DeadlinePassed,
    LeasesReturned,
    ResultsReceived,
    ShutdownRequested,
    TasksCancelled,
    TasksSubmitted,
    WorkerBack,
    WorkerConnected,
    WorkerDraining,
    WorkerHeard,
    WorkerReady,
)
from cloudexec._core.machine import Machine
from cloudexec._core.resources import Requirements, ResourceRequest, Resources
from cloudexec._core.tasks import FunctionStats, Task
from cloudexec._errors import ConfigError


def make(max_slots: int = 2, grace: float = 30.0, **scaling: Any) -> Machine:
    policy = ScalingPolicy(max_slots=max_slots, slots_per_worker=1, **scaling)
    return Machine(ServerConfig(scaling=policy, reconnect_grace=grace))


def some(count: int, *, stats: FunctionStats | None = None, retries: int = 2) -> list[Task]:
    return [Task(n, stats or FunctionStats(), retries=retries) for n in range(1, count + 1)]


def only(commands: list[Any], kind: type) -> list[Any]:
    return [command for command in commands if type(command) is kind]


def with_worker(machine: Machine, *tasks: Task, name: str = "w", launch: str = "1") -> None:
    if tasks:
        machine.handle(TasksSubmitted(tasks), 0.0)
    machine.handle(WorkerConnected(name, 1, launch), 0.0)
    machine.handle(WorkerReady(name), 0.0)
    machine.validate()


def cut_off(machine: Machine, name: str = "w", now: float = 1.0) -> list[Any]:
    commands = machine.handle(cut(name), now)
    machine.validate()
    return commands


def test_a_worker_that_comes_back_goes_on_as_before() -> None:
    """A cut shorter than the grace costs no attempt, and no result."""
    machine, (task, later) = make(1), some(2)
    with_worker(machine, task)
    assert cut_off(machine) == []
    assert only(machine.handle(TasksSubmitted([later]), 2.0), SendTasks) == []
    assert machine.handle(DeadlinePassed(), 30.9) == []
    machine.handle(WorkerBack("w"), 30.9)
    commands = machine.handle(ResultsReceived("w", [task.lease], ["r"], [0.1]), 30.9)
    assert [command.tasks for command in only(commands, ResolveTasks)] == [[task]]
    assert [command.tasks for command in only(commands, SendTasks)] == [[later]]
    assert (task.lost, machine.counts["workers_lost"]) == (0, 0)
    machine.validate()


def test_a_worker_that_stays_away_is_lost_after_the_grace() -> None:
    """Its task runs elsewhere, what it says later is a duplicate, and its process is ended."""
    machine, (task,) = make(), some(1)
    with_worker(machine, task)
    lease = task.lease
    cut_off(machine)
    assert machine.next_deadline() == 31.0
    commands = machine.handle(DeadlinePassed(), 31.0)
    assert [c.worker for c in only(commands, CloseSession)] == ["w"]
    assert len(only(commands, LaunchWorker)) == 1
    assert task.lost == 1
    machine.handle(ResultsReceived("w", [lease], ["late"], [0.1]), 32.0)
    assert machine.counts["duplicates"] == 1
    assert machine.handle(WorkerBack("w"), 32.0) == []
    machine.validate()
    assert machine.handle(DeadlinePassed(), 32.9) == []
    assert machine.handle(DeadlinePassed(), 33.0) == [TerminateLaunch("1")]


def test_the_loss_names_the_grace() -> None:
    machine, (task,) = make(grace=2.5), some(1, retries=0)
    with_worker(machine, task)
    cut_off(machine)
    (failed,) = only(machine.handle(DeadlinePassed(), 3.5), FailTask)
    assert "did not come back within 2.5 s (reconnect_grace)" in failed.failure.detail


def test_without_a_grace_a_cut_is_a_loss() -> None:
    machine, (task,) = make(grace=0), some(1)
    with_worker(machine, task)
    assert [c.worker for c in only(cut_off(machine), CloseSession)] == ["w"]
    assert machine.waiting_tasks() == [task]


def test_a_cut_worker_that_is_known_to_have_ended_is_lost_at_once() -> None:
    machine, (task,) = make(), some(1)
    with_worker(machine, task)
    cut_off(machine)
    lose(machine, 2.0, "w", "killed")
    assert machine.waiting_tasks() == [task]
    machine.validate()


def test_silence_does_not_count_while_a_worker_is_cut_off() -> None:
    """Nor when it is back: it is heard of anew."""
    machine, (task,) = make(grace=1000), some(1)
    with_worker(machine, task)
    cut_off(machine)
    machine.handle(DeadlinePassed(), 500.0)
    machine.handle(WorkerBack("w"), 500.0)
    machine.handle(DeadlinePassed(), 501.0)
    assert "w" in machine.workers
    machine.handle(DeadlinePassed(), 561.0)
    assert "w" not in machine.workers


def test_no_other_worker_is_launched_in_place_of_one_that_is_cut_off() -> None:
    """It keeps its place, and gets nothing; it does not count as idle either."""
    machine = make(1, idle_timeout=5.0)
    with_worker(machine, *some(1))
    machine.handle(ResultsReceived("w", [1], ["r"], [0.1]), 0.5)
    cut_off(machine)
    commands = machine.handle(TasksSubmitted(some(1)), 2.0)
    commands += machine.handle(DeadlinePassed(), 10.0)
    assert commands == []
    assert only(machine.handle(WorkerBack("w"), 11.0), SendTasks)


def test_a_worker_that_is_back_is_idle_from_then_on() -> None:
    machine = make(1, idle_timeout=5.0)
    with_worker(machine, *some(1))
    machine.handle(ResultsReceived("w", [1], ["r"], [0.1]), 0.5)
    cut_off(machine)
    machine.handle(WorkerBack("w"), 20.0)
    assert only(machine.handle(DeadlinePassed(), 21.0), DrainWorker) == []
    assert only(machine.handle(DeadlinePassed(), 25.0), DrainWorker)


def test_tasks_on_a_cut_worker_can_be_cancelled() -> None:
    """The worker is told when it is back."""
    machine, (task,) = make(), some(1)
    with_worker(machine, task)
    cut_off(machine)
    lease = task.lease
    assert machine.handle(TasksCancelled([task], kill=True), 2.0) == [KillTasks("w", [lease])]
    machine.validate()


def test_nothing_is_recalled_from_a_cut_worker_for_an_idle_one() -> None:
    machine = make(2)
    quick = FunctionStats()
    for _ in range(100):
        quick.learn(1e-5)
    with_worker(machine, *some(10, stats=quick))
    with_worker(machine, name="v", launch="2")
    cut_off(machine)
    for worker in ("v", "w"):
        commands = machine.handle(DeadlinePassed(), 2.0)
        assert only(commands, RecallTasks) == [], worker
    machine.handle(WorkerBack("w"), 3.0)
    recalled = only(machine.handle(DeadlinePassed(), 3.2), RecallTasks)
    assert recalled


@pytest.mark.parametrize("drained", [True, False])
def test_a_shutdown_with_nothing_left_to_do_does_not_wait_for_a_cut_worker(drained: bool) -> None:
    """Whether it was draining already or not."""
    machine = make()
    with_worker(machine, *some(1))
    machine.handle(ResultsReceived("w", [1], ["r"], [0.1]), 0.5)
    if drained:
        machine.handle(WorkerDraining("w"), 0.5)
    cut_off(machine)
    commands = machine.handle(ShutdownRequested(), 2.0)
    if drained:  # the end of its process is about to be reported
        assert commands == []
        commands = machine.handle(DeadlinePassed(), 2.0)
    assert [type(c) for c in commands] == [CloseSession, Finish]


def test_a_worker_that_is_cut_off_while_the_executor_ends_is_not_waited_for() -> None:
    machine = make()
    with_worker(machine, *some(1))
    machine.handle(ResultsReceived("w", [1], ["r"], [0.1]), 0.5)
    assert only(machine.handle(ShutdownRequested(), 1.0), DrainWorker)
    assert cut_off(machine) == []
    commands = machine.handle(DeadlinePassed(), 1.1)  # the end of its process was not reported
    assert [type(c) for c in commands] == [CloseSession, Finish]


def test_a_shutdown_waits_for_what_runs_on_a_cut_worker() -> None:
    """Unless it kills."""
    machine, (task,) = make(), some(1)
    with_worker(machine, task)
    cut_off(machine)
    assert machine.handle(ShutdownRequested(), 2.0) == []
    machine.handle(WorkerHeard("w"), 3.0)
    commands = machine.handle(ShutdownRequested(kill=True), 4.0)
    assert [type(c) for c in commands][-2:] == [CloseSession, Finish]


def test_without_retries_a_task_may_have_begun_where_the_link_failed() -> None:
    """The news that the worker was ready may be what was lost: it is not run again."""
    machine, (task,) = make(), some(1, retries=0)
    machine.handle(TasksSubmitted([task]), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    cut_off(machine)
    assert only(machine.handle(DeadlinePassed(), 31.0), FailTask)


def test_no_cut_or_draining_worker_is_held_for_a_large_task() -> None:
    """It takes nothing, so another one is held: or small tasks would go before for ever."""
    size = WorkerCapacity(cpus=2, memory=8 << 30)
    policy = ScalingPolicy(max_slots=4, slots_per_worker=2, sizes=(size,))
    for gone in (cut, WorkerDraining):
        machine = Machine(ServerConfig(scaling=policy))
        machine.handle(TasksSubmitted([Task(n, FunctionStats()) for n in range(1, 9)]), 0.0)
        for name, launch in (("a", "1"), ("b", "2")):
            machine.handle(WorkerConnected(name, 2, launch), 0.0)
        whole = Resources.had_by(size)
        need = Resources.of(2, 1 << 30)
        large = Task(9, FunctionStats())
        request = ResourceRequest(need, 0, whole, 2, need)
        large.requirements = Requirements(TaskOptions(), (request,), priority=1)
        machine.handle(TasksSubmitted([large]), 1.0)
        first = next(iter(machine.workers["a"].leases))
        machine.handle(ResultsReceived("a", [first], ["r"], [9.0]), 1.5)
        held = [w for w in machine.workers.values() if w.allocation.saving_for is not None]
        assert len(held) == 1
        machine.handle(gone(held[0].id), 2.0)
        machine.validate()
        (other,) = [w for w in machine.workers.values() if w is not held[0]]
        commands: list[Any] = []
        for lease in list(other.leases):
            commands = machine.handle(ResultsReceived(other.id, [lease], ["r"], [9.0]), 3.0)
        assert [c.tasks for c in only(commands, SendTasks)] == [[large]]


def test_returned_leases_of_a_cut_worker_do_not_make_it_get_more() -> None:
    """What was on its way when the link failed may still be read."""
    machine, tasks = make(1), some(2)
    with_worker(machine, *tasks)
    cut_off(machine)
    lease = tasks[0].lease
    assert only(machine.handle(LeasesReturned("w", [lease]), 1.5), SendTasks) == []
    machine.validate()


@pytest.mark.parametrize("grace", [-1.0, float("nan"), "soon"])
def test_a_grace_is_no_less_than_nothing(grace: Any) -> None:
    with pytest.raises(ConfigError, match="reconnect_grace"):
        make(grace=grace)
