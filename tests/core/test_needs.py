"""Tasks with needs, priorities and inputs: where they go, when, and what is launched for them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from endings import lose
from hypothesis import given
from hypothesis import strategies as st
from test_machine import SIZES, Held, make, only, out_of_memory, quick, request, requirements, tasks

from cloudexec._config import WorkerCapacity
from cloudexec._core.commands import (
    CancelTasks,
    DrainWorker,
    FailTask,
    FailTasksUnlaunched,
    JudgeFailure,
    LaunchWorker,
    SendTasks,
    TerminateLaunch,
)
from cloudexec._core.dispatch import best_holder
from cloudexec._core.events import (
    DeadlinePassed,
    Failure,
    FailureJudged,
    FailureKind,
    FailuresReceived,
    ProcessEnded,
    ResultsReceived,
    ShutdownRequested,
    TasksCancelled,
    TasksSubmitted,
    WorkerConnected,
    WorkerReady,
)
from cloudexec._core.machine import Machine
from cloudexec._core.resources import ResourceRequest, Resources
from cloudexec._core.tasks import FunctionStats, Task, TaskState
from cloudexec._core.workers import Allocation, Worker

LARGE = WorkerCapacity(cpus=8, memory=32 * 2**30)
RAISED = Failure(FailureKind.RAISED)


def machine_of(cpus: float, slots: int, gib: int = 64, **scaling: Any) -> Machine:
    """One machine, as the local launcher has it, with a worker that has connected."""
    sizes = (WorkerCapacity(cpus=cpus, memory=gib * 2**30, gpus=scaling.pop("gpus", 0)),)
    machine = make(slots, slots, sizes=sizes, one_machine=True, **scaling)
    machine.handle(TasksSubmitted(tasks(1)), 0.0)
    machine.handle(WorkerConnected("w", slots, "1"), 0.0)
    machine.handle(WorkerReady("w"), 0.0)
    answer(machine, "w")
    return machine


def fleet(max_slots: int = 4, slots_per_worker: int = 1, **scaling: Any) -> Machine:
    """Workers of 2 CPUs and 4 GiB."""
    return make(max_slots, slots_per_worker, sizes=SIZES[:1], **scaling)


def some(count: int, *requests: ResourceRequest, first: int = 100, **how: Any) -> list[Task]:
    said = requirements(*requests, **how)
    return [
        Task(number, FunctionStats(), requirements=said) for number in range(first, first + count)
    ]


def sent(commands: list[Any]) -> list[Task]:
    return [task for command in only(commands, SendTasks) for task in command.tasks]


def answer(machine: Machine, worker: str, *some: Task, now: float = 1.0) -> list[Any]:
    """Have a worker return results: of these tasks, or of all it has."""
    leases = [task.lease for task in some] or list(machine.workers[worker].leases)
    results = ResultsReceived(worker, leases, [b""] * len(leases), [0.5] * len(leases))
    commands = machine.handle(results, now)
    machine.validate()
    return commands


def submit(machine: Machine, batch: list[Task], now: float = 1.0) -> list[Any]:
    commands = machine.handle(TasksSubmitted(batch), now)
    machine.validate()
    return commands


def connect(machine: Machine, command: LaunchWorker, now: float = 1.0) -> list[Any]:
    name = f"w{command.launch}"
    commands = machine.handle(WorkerConnected(name, command.slots, command.launch), now)
    machine.handle(WorkerReady(name), now)
    machine.validate()
    return commands


# Packing.


def test_ten_tenths_of_a_processor_are_one() -> None:
    """Sums of requests are exact."""
    machine = machine_of(cpus=1, slots=20)
    batch = some(15, request(machine, 0.1, 0.1))
    assert len(sent(submit(machine, batch))) == 10


@pytest.mark.parametrize("parts", [1, 2, 3, 6, 7, 9, 11, 49])
def test_so_many_equal_parts_fit_into_the_whole(parts: int) -> None:
    whole = Resources.of(1, 2**30)
    assert Resources.of(1 / parts, 1).times_in(whole) == parts


def test_two_tasks_with_all_processors_run_one_after_another() -> None:
    machine = machine_of(cpus=2, slots=2)
    batch = some(2, request(machine, 2))
    assert sent(submit(machine, batch)) == batch[:1]
    assert sent(answer(machine, "w")) == batch[1:]


def test_a_task_within_its_slots_share_is_sent_ahead_like_any_other() -> None:
    """No accounting is needed where any mix of tasks fits."""
    machine = machine_of(cpus=2, slots=2)
    stats, said = quick(), requirements(request(machine, 1, 1))
    batch = [Task(number, stats, requirements=said) for number in range(100)]
    assert len(sent(submit(machine, batch))) == 100


def test_memory_is_counted_like_processors() -> None:
    machine = machine_of(cpus=8, slots=8, gib=8)
    batch = some(4, request(machine, 0.5, 3))
    assert len(sent(submit(machine, batch))) == 2


def test_small_tasks_fill_what_a_large_one_leaves() -> None:
    """Those without needs count as a slot's share."""
    machine = machine_of(cpus=4, slots=4)
    (large,) = some(1, request(machine, 2.5))
    plain = tasks(4)
    assert sent(submit(machine, [large])) == [large]
    assert len(sent(submit(machine, plain))) == 1
    assert len(sent(answer(machine, "w", large))) == 3


def test_what_was_sent_ahead_is_finished_before_a_large_task_comes() -> None:
    machine = machine_of(cpus=2, slots=2)
    stats = quick()
    submit(machine, tasks(50, stats))
    ahead = list(machine.workers["w"].leases.values())
    assert len(ahead) == 50
    (large,) = some(1, request(machine, 2))
    assert sent(submit(machine, [large])) == []
    assert sent(answer(machine, "w", *ahead[:49])) == []
    assert sent(answer(machine, "w")) == [large]


# Nobody starves.


def test_a_large_task_does_not_wait_behind_small_ones_for_ever() -> None:
    """The worker takes nothing that came later until it fits."""
    machine = machine_of(cpus=2, slots=2)
    small = tasks(2)
    submit(machine, small)
    (large,) = some(1, request(machine, 2), first=50)
    later = [Task(number, FunctionStats()) for number in range(60, 70)]
    submit(machine, [large])
    submit(machine, later)
    assert sent(answer(machine, "w", small[0])) == []
    assert sent(answer(machine, "w", small[1])) == [large]
    assert sent(answer(machine, "w")) == later[:2]


def test_only_as_many_workers_are_held_as_there_are_large_tasks() -> None:
    machine = fleet(max_slots=6, slots_per_worker=2)
    launches = only(submit(machine, tasks(6)), LaunchWorker)
    for launch in launches:
        connect(machine, launch)
    first = [list(worker.leases.values()) for worker in machine.workers.values()]
    (large,) = some(1, request(machine, 2), first=50)
    later = [Task(number, FunctionStats()) for number in range(60, 70)]
    submit(machine, [large, *later])
    assert sent(answer(machine, "w1", first[0][0])) == []
    assert len(sent(answer(machine, "w2", first[1][0]))) == 1
    assert sent(answer(machine, "w1", first[0][1])) == [large]


def test_a_held_worker_is_free_again_when_the_large_task_went_elsewhere() -> None:
    machine = fleet(max_slots=4, slots_per_worker=2)
    for launch in only(submit(machine, tasks(4)), LaunchWorker):
        connect(machine, launch)
    first = [list(worker.leases.values()) for worker in machine.workers.values()]
    (large,) = some(1, request(machine, 2), first=50)
    later = [Task(number, FunctionStats()) for number in range(60, 70)]
    submit(machine, [large, *later])
    assert sent(answer(machine, "w1", first[0][0])) == []
    commands = answer(machine, "w2", *first[1])
    assert large in sent(commands)
    assert len([task for task in sent(commands) if task is not large]) == 1


def test_cancelling_a_large_task_lets_the_others_go_on() -> None:
    machine = machine_of(cpus=2, slots=2)
    small = tasks(1)
    submit(machine, small)
    (large,) = some(1, request(machine, 2), first=50)
    later = [Task(60, FunctionStats())]
    submit(machine, [large, *later])
    commands = machine.handle(TasksCancelled([large]), 1.0)
    assert sent(commands) == later
    machine.validate()


def test_a_large_task_that_is_cancelled_while_it_runs_keeps_its_room_until_it_is_gone() -> None:
    machine = machine_of(cpus=2, slots=2)
    first, second = some(2, request(machine, 2))
    submit(machine, [first, second])
    assert sent(machine.handle(TasksCancelled([first], kill=True), 1.0)) == []
    killed = (first.lease or next(iter(machine.workers["w"].leases)), Failure(FailureKind.KILLED))
    assert sent(machine.handle(FailuresReceived("w", [killed]), 1.0)) == [second]
    machine.validate()


# Sizes.


def test_a_worker_of_the_size_that_a_task_needs_is_launched() -> None:
    machine = fleet()
    (large,) = some(1, request(machine, 6, 16, whole=LARGE, size=3))
    (launch,) = only(submit(machine, [large]), LaunchWorker)
    assert (launch.size, launch.slots) == (3, 1)
    plain = tasks(1)
    (usual,) = only(submit(machine, plain), LaunchWorker)
    assert usual.size == 0
    assert sent(connect(machine, usual)) == plain
    assert sent(connect(machine, launch)) == [large]


def test_a_large_worker_is_launched_for_as_many_as_fit() -> None:
    machine = fleet(max_slots=5)
    batch = some(8, request(machine, 3, 8, whole=LARGE, size=1))
    launches = only(submit(machine, batch), LaunchWorker)
    assert [launch.slots for launch in launches] == [2, 2, 1]
    assert sent(connect(machine, launches[0])) == batch[:2]


def test_a_large_worker_serves_small_tasks_when_it_has_nothing_else_to_do() -> None:
    machine = fleet(max_slots=1)
    (large,) = some(1, request(machine, 6, 16, whole=LARGE, size=1))
    (launch,) = only(submit(machine, [large]), LaunchWorker)
    plain = tasks(1)
    submit(machine, plain)
    assert sent(connect(machine, launch)) == [large]
    commands = answer(machine, f"w{launch.launch}")
    assert sent(commands) == plain
    assert only(commands, LaunchWorker) == []


def test_small_claims_share_a_worker_of_the_usual_size() -> None:
    """A worker is launched with as many slots as fit, and plain tasks count for more there."""
    machine = fleet(max_slots=8)
    packed = request(machine, 0.5, 0.5)
    (one, two) = only(submit(machine, some(8, packed)), LaunchWorker)
    assert (one.slots, two.slots) == (4, 4)
    assert len(sent(connect(machine, one))) == 4
    answer(machine, "w1")
    answer(machine, "w1")
    assert machine.open_tasks == 0
    plain = tasks(5)
    assert len(sent(submit(machine, plain))) == 1


def test_room_is_made_for_a_size_that_nobody_else_serves_when_it_is_its_turn() -> None:
    """However much small work there is, and although all workers are at it."""
    machine = fleet(max_slots=2)
    for launch in only(submit(machine, tasks(3)), LaunchWorker):
        connect(machine, launch)
    (large,) = some(1, request(machine, 6, 16, whole=LARGE, size=1), first=50)
    commands = submit(machine, [large])
    commands += submit(machine, [Task(number, FunctionStats()) for number in range(60, 90)])
    assert only(commands, DrainWorker) == []  # task 3 was there before it
    commands = answer(machine, "w1")
    (drain,) = only(commands, DrainWorker)
    answer(machine, drain.worker)
    commands = lose(machine, 2.0, drain.worker, "ended")
    (launch,) = only(commands, LaunchWorker)
    assert launch.size == 1
    assert sent(connect(machine, launch)) == [large]


def test_workers_that_have_not_come_make_way_first() -> None:
    machine = fleet(max_slots=2)
    first, second = only(submit(machine, tasks(2)), LaunchWorker)
    connect(machine, first)
    machine.handle(TasksCancelled(machine.waiting_tasks()), 1.0)
    (large,) = some(1, request(machine, 6, 16, whole=LARGE, size=1), first=50)
    commands = submit(machine, [large])
    assert [each.launch for each in only(commands, TerminateLaunch)] == [second.launch]
    assert [each.size for each in only(commands, LaunchWorker)] == [1]


def test_a_worker_lost_with_a_large_task_is_replaced_by_its_like() -> None:
    machine = fleet()
    (large,) = some(1, request(machine, 6, 16, whole=LARGE, size=2))
    (launch,) = only(submit(machine, [large]), LaunchWorker)
    connect(machine, launch)
    commands = lose(machine, 1.0, "w1", "gone")
    machine.validate()
    (again,) = only(commands, LaunchWorker)
    assert (again.size, large.lost) == (2, 1)
    assert sent(connect(machine, again)) == [large]


def test_launches_that_fail_fail_only_those_that_nobody_else_serves() -> None:
    machine = fleet()
    plain = tasks(1)
    for launch in only(submit(machine, plain), LaunchWorker):
        connect(machine, launch)
    (large,) = some(1, request(machine, 6, 16, whole=LARGE, size=1))
    (launch,) = only(submit(machine, [large]), LaunchWorker)
    commands = machine.handle(ProcessEnded(launch.launch, "no such size", fatal=True), 1.0)
    assert [each.tasks for each in only(commands, FailTasksUnlaunched)] == [[large]]
    assert plain[0].state is TaskState.RUNNING
    machine.validate()


def test_a_large_task_that_waits_is_cancelled_by_a_shutdown() -> None:
    machine = fleet()
    (large,) = some(1, request(machine, 6, 16, whole=LARGE, size=1))
    submit(machine, [large])
    commands = machine.handle(ShutdownRequested(cancel=True), 1.0)
    assert [list(each.tasks) for each in only(commands, CancelTasks)] == [[large]]
    assert len(only(commands, TerminateLaunch)) == 1
    assert machine.finished


def test_a_large_worker_that_has_nothing_to_do_is_stopped() -> None:
    machine = fleet(idle_timeout=10.0, min_slots=1)
    (large,) = some(1, request(machine, 6, 16, whole=LARGE, size=1))
    for launch in only(submit(machine, [large]), LaunchWorker):
        connect(machine, launch)
    answer(machine, "w1", now=2.0)
    machine.handle(DeadlinePassed(), 30.0)
    assert list(machine.workers) == ["w1"], "min_workers are kept, whatever their size"
    machine.validate()


def test_the_minimum_of_workers_is_kept_once_not_for_each_size_of_a_ladder() -> None:
    machine = make(8, 1, sizes=SIZES, size_count=3, min_slots=2)
    launches = only(machine.handle(DeadlinePassed(), 0.0), LaunchWorker)
    assert [launch.size for launch in launches] == [0, 0]


def test_a_worker_is_replaced_after_so_many_tasks_large_or_not() -> None:
    machine = fleet(max_slots=1, max_tasks_per_worker=2)
    batch = some(3, request(machine, 2, 4))
    (launch,) = only(submit(machine, batch), LaunchWorker)
    assert sent(connect(machine, launch)) == batch[:1]
    assert sent(answer(machine, "w1")) == batch[1:2]
    commands = answer(machine, "w1")
    assert only(commands, DrainWorker)
    assert only(lose(machine, 2.0, "w1", "ended"), LaunchWorker)
    machine.validate()


def test_a_task_with_needs_climbs_its_own_ladder() -> None:
    """And costs no attempt by it; past its end it has those that it was given."""
    machine = fleet()
    small = request(machine, 2, 4)
    large = request(machine, 2, 8, whole=LARGE, size=1)
    (task,) = some(1, small, large)
    task.retries = 1
    (launch,) = only(submit(machine, [task]), LaunchWorker)
    connect(machine, launch)
    (launch,) = only(out_of_memory(machine, "w1", task), LaunchWorker)
    assert (launch.size, task.size) == (1, 1)
    connect(machine, launch)
    machine.validate()
    assert only(out_of_memory(machine, f"w{launch.launch}", task), FailTask) == []
    assert only(out_of_memory(machine, f"w{launch.launch}", task), FailTask)


@pytest.mark.parametrize("ladder", [False, True])
def test_a_task_that_outgrew_what_it_asked_for(ladder: bool) -> None:
    """Fails at once, or goes where there is more."""
    machine = fleet()
    requests = [request(machine, 1, 1)]
    if ladder:
        requests.append(request(machine, 1, 8, whole=LARGE, size=1))
    (task,) = some(1, *requests)
    (launch,) = only(submit(machine, [task]), LaunchWorker)
    connect(machine, launch)
    failure = Failure(FailureKind.OUTGREW)
    commands = machine.handle(FailuresReceived("w1", [(task.lease, failure)]), 1.0)
    machine.validate()
    assert bool(only(commands, FailTask)) != ladder
    assert bool(only(commands, LaunchWorker)) == ladder


def test_each_gpu_has_one_task() -> None:
    machine = machine_of(cpus=8, slots=8, gpus=3)
    batch = some(3, request(machine, 1, 1, 1))
    pair = some(1, request(machine, 1, 1, 2), first=200)
    assert sent(submit(machine, [*batch, *pair])) == batch
    heavy = machine.workers["w"].allocation.heavy
    assert sorted(heavy[task.lease] for task in batch) == [("0",), ("1",), ("2",)]
    answer(machine, "w", batch[0])
    assert sent(answer(machine, "w", batch[2])) == pair
    assert heavy[pair[0].lease] == ("0", "2")


# Priorities.


def test_higher_priorities_go_first_and_equals_in_order() -> None:
    machine = machine_of(cpus=1, slots=1)
    submit(machine, tasks(1))
    low = some(2, priority=-1, first=10)
    usual = [Task(20, FunctionStats()), Task(21, FunctionStats())]
    high = some(2, priority=5, first=30)
    for batch in (low, usual, high):
        submit(machine, batch)
    order = []
    for _ in range(6):
        order += sent(answer(machine, "w"))
    assert order == [*high, *usual, *low]
    answer(machine, "w")
    assert machine.open_tasks == 0


def test_a_cancelled_task_of_high_priority_is_passed_by() -> None:
    machine = machine_of(cpus=1, slots=1)
    submit(machine, tasks(1))
    high = some(2, priority=5, first=30)
    submit(machine, high)
    machine.handle(TasksCancelled(high[:1]), 1.0)
    assert sent(answer(machine, "w")) == high[1:]


def test_a_lost_task_comes_back_to_the_head_of_its_priority() -> None:
    machine = fleet(max_slots=1)
    high = some(2, priority=1, first=30)
    (launch,) = only(submit(machine, [*tasks(1), *high]), LaunchWorker)
    assert sent(connect(machine, launch)) == high[:1]
    (launch,) = only(lose(machine, 1.0, "w1", "gone"), LaunchWorker)
    assert sent(connect(machine, launch)) == high[:1]


# Exceptions that are worth another try.


def judged(retries: int = 2) -> tuple[Machine, Task]:
    machine = machine_of(cpus=1, slots=1)
    (task,) = some(1, judged=True)
    task.retries = retries
    submit(machine, [task])
    return machine, task


def test_a_task_that_raised_what_is_worth_it_rests_and_runs_again() -> None:
    machine, task = judged()
    (ask,) = only(machine.handle(FailuresReceived("w", [(task.lease, RAISED)]), 1.0), JudgeFailure)
    assert (ask.task, task.state) == (task, TaskState.BACKING_OFF)
    machine.validate()
    assert machine.handle(FailureJudged("w", task, RAISED, again=True), 1.0) == []
    due = machine.next_deadline()
    assert due is not None
    assert 1.0 < due < 2.0
    assert sent(machine.handle(DeadlinePassed(), due)) == [task]
    assert task.lost == 1
    machine.validate()


def test_pauses_grow_and_have_an_end() -> None:
    machine, task = judged(retries=40)
    now, pauses = 0.0, []
    for _ in range(40):
        machine.handle(FailuresReceived("w", [(task.lease, RAISED)]), now)
        machine.handle(FailureJudged("w", task, RAISED, again=True), now)
        pauses.append(machine._queues.backing_off[task] - now)
        now = machine._queues.backing_off[task]
        machine.handle(DeadlinePassed(), now)
    assert all(after > before - 1e-9 for before, after in itertools.pairwise(pauses))
    assert pauses[0] < 0.2
    assert pauses[-1] < 20.0
    assert only(machine.handle(FailuresReceived("w", [(task.lease, RAISED)]), now), FailTask)


@pytest.mark.parametrize("retries", [0, 2])
def test_what_is_not_worth_it_is_the_outcome(retries: int) -> None:
    """Without retries nobody is asked."""
    machine, task = judged(retries)
    commands = machine.handle(FailuresReceived("w", [(task.lease, RAISED)]), 1.0)
    if retries:
        commands = machine.handle(FailureJudged("w", task, RAISED, again=False), 1.0)
    assert [each.task for each in only(commands, FailTask)] == [task]
    machine.validate()


@pytest.mark.parametrize("known", [False, True])
def test_a_resting_task_can_be_cancelled(known: bool) -> None:
    machine, task = judged()
    machine.handle(FailuresReceived("w", [(task.lease, RAISED)]), 1.0)
    if known:
        machine.handle(FailureJudged("w", task, RAISED, again=True), 1.0)
    machine.handle(TasksCancelled([task], kill=True), 1.0)
    machine.validate()
    assert machine.handle(FailureJudged("w", task, RAISED, again=True), 1.0) == []
    assert sent(machine.handle(DeadlinePassed(), 60.0)) == []
    machine.validate()


def test_a_shutdown_waits_for_a_resting_task_and_one_that_cancels_does_not() -> None:
    machine, task = judged()
    machine.handle(FailuresReceived("w", [(task.lease, RAISED)]), 1.0)
    machine.handle(FailureJudged("w", task, RAISED, again=True), 1.0)
    assert only(machine.handle(ShutdownRequested(), 1.0), DrainWorker) == []
    commands = machine.handle(ShutdownRequested(cancel=True), 1.0)
    assert [list(each.tasks) for each in only(commands, CancelTasks)] == [[task]]
    machine.validate()


# Inputs.


def near(machine: Machine, *inputs: Held, number: int, stats: FunctionStats | None = None) -> Task:
    return Task(number, stats or FunctionStats(), inputs=inputs)


def pair(slots: int = 1) -> Machine:
    """Two idle workers, w1 and w2."""
    machine = make(2 * slots, slots)
    for launch in only(submit(machine, tasks(2 * slots)), LaunchWorker):
        connect(machine, launch)
    for worker in list(machine.workers):
        answer(machine, worker)
    return machine


@pytest.mark.parametrize("holder", ["w1", "w2"])
def test_of_two_idle_workers_the_one_with_most_of_the_inputs_gets_a_task(holder: str) -> None:
    machine = pair()
    other = {"w1": "w2", "w2": "w1"}[holder]
    task = near(machine, Held(10, {other}), Held(1000, {holder}), number=50)
    (command,) = only(submit(machine, [task]), SendTasks)
    assert command.worker == holder


def test_an_idle_worker_gets_a_task_whose_holder_is_full() -> None:
    """At once."""
    machine = pair()
    busy = near(machine, Held(10, {"w1"}), number=50)
    submit(machine, [busy])
    (command,) = only(submit(machine, [near(machine, Held(10, {"w1"}), number=51)]), SendTasks)
    assert command.worker == "w2"


def test_of_tasks_that_wait_a_worker_takes_those_whose_inputs_it_has() -> None:
    machine = pair()
    batch = [near(machine, Held(10, {f"w{1 + number % 2}"}), number=number) for number in range(20)]
    commands = submit(machine, batch)
    hits = 0
    for _ in range(10):
        for worker in ("w1", "w2"):
            for task in list(machine.workers[worker].leases.values()):
                hits += worker in task.inputs[0].workers
            commands = answer(machine, worker)
    assert commands is not None
    assert hits == 20


def test_who_is_overtaken_is_not_overtaken_for_ever() -> None:
    """The holder of the first task is busy for long; the other worker has it in the end."""
    machine = pair()
    submit(machine, [near(machine, Held(10, {"w1"}), number=1)])
    first = near(machine, Held(10, {"w1"}), number=2)
    submit(machine, [near(machine, Held(10, {"w2"}), number=3)])
    submit(machine, [first])
    for number in range(10, 200):
        submit(machine, [near(machine, Held(10, {"w2"}), number=number)])
        if first in sent(answer(machine, "w2")):
            break
    assert first.worker == "w2"


def test_short_tasks_are_sent_ahead_to_holders_only() -> None:
    machine = pair()
    stats = quick()
    batch = [near(machine, Held(10, {"w1"}), number=number, stats=stats) for number in range(30)]
    submit(machine, batch)
    assert len(machine.workers["w1"].leases) > 1
    assert len(machine.workers["w2"].leases) == 1


@given(
    st.lists(
        st.tuples(st.integers(0, 1000), st.sets(st.sampled_from(["a", "b", "c", "d"]))), max_size=6
    ),
    st.lists(st.sampled_from(["a", "b", "c"]), unique=True),
)
def test_the_best_holder_holds_most(inputs: list[tuple[int, set[str]]], names: list[str]) -> None:
    """Nobody else among those that may have the task holds more; who holds nothing is not it."""
    held = [Held(size, workers) for size, workers in inputs]

    def bytes_held(worker: str) -> int:
        return sum(each.size for each in held if worker in each.workers)

    plain = ResourceRequest(Resources(1, 1), 0, Resources(1, 1), 1, Resources(1, 1))
    allocation = Allocation(Resources(1, 1), 1, plain)
    workers = [Worker(name, 1, "", 0.0, (0, 1), allocation) for name in names]
    best = best_holder(held, workers)
    most = max((bytes_held(name) for name in names), default=0)
    assert (0 if best is None else bytes_held(best.id)) == most
    assert best is None or most > 0


@given(
    st.lists(st.tuples(st.floats(0.01, 4), st.integers(1, 8 * 2**30)), min_size=1, max_size=30),
    st.integers(1, 8),
)
def test_what_runs_together_always_fits(needs: list[tuple[float, int]], slots: int) -> None:
    """Whatever is asked for, in whatever order it ends; and all of it is run."""
    machine = machine_of(cpus=4, slots=slots, gib=8)
    batch = []
    for number, (cpus, memory) in enumerate(needs):
        batch.append(some(1, request(machine, cpus, memory / 2**30), first=100 + number)[0])
    submit(machine, batch)
    for _ in range(len(batch)):
        running = list(machine.workers["w"].leases.values())
        if not running:
            break
        assert math.fsum(needs[task.number - 100][0] for task in running) <= 4 + 1e-3
        assert sum(needs[task.number - 100][1] for task in running) <= 8 * 2**30
        answer(machine, "w", running[0])
    assert machine.open_tasks == 0
