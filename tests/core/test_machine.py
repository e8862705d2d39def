"""The machine: events in, commands out, no clock."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from endings import lose

from cloudexec._config import ScalingPolicy, ServerConfig, TaskOptions, WorkerCapacity
from cloudexec._core.commands import (
    CancelTasks,
    DrainWorker,
    EvacuateWorker,
    FailTask,
    FailTasksUnlaunched,
    Finish,
    KillTasks,
    LaunchWorker,
    MarkRunning,
    RecallTasks,
    ResolveTasks,
    SendTasks,
    TerminateLaunch,
    TerminateWorker,
)
from cloudexec._core.events import (
    DeadlinePassed,
    Failure,
    FailureJudged,
    FailureKind,
    FailuresReceived,
    LaunchesRefused,
    LaunchesTakenOver,
    LeasesReturned,
    ProcessEnded,
    ResultsReceived,
    ShutdownRequested,
    TasksBlocked,
    TasksCancelled,
    TasksDropped,
    TasksReleased,
    TasksStarted,
    TasksSubmitted,
    TasksTakenOver,
    WorkerBack,
    WorkerConnected,
    WorkerDraining,
    WorkerHeard,
    WorkerReady,
)
from cloudexec._core.machine import Machine
from cloudexec._core.resources import Requirements, ResourceRequest, Resources
from cloudexec._core.tasks import FunctionStats, Task, TaskState

LOST = Failure(FailureKind.SLOT_LOST)


def make(max_slots: int = 4, slots_per_worker: int = 2, **scaling: Any) -> Machine:
    policy = ScalingPolicy(max_slots=max_slots, slots_per_worker=slots_per_worker, **scaling)
    return Machine(ServerConfig(scaling=policy))


def tasks(count: int, stats: FunctionStats | None = None, **options: Any) -> list[Task]:
    stats = stats or FunctionStats()
    return [Task(number, stats, **options) for number in range(1, count + 1)]


def quick() -> FunctionStats:
    stats = FunctionStats()
    for _ in range(100):
        stats.learn(0.00001)
    return stats


def only(commands: list[Any], kind: type) -> list[Any]:
    return [command for command in commands if type(command) is kind]


SIZES = tuple(WorkerCapacity(cpus=2, memory=gib * 2**30, gpus=0) for gib in (4, 8, 16))


@dataclasses.dataclass
class Held:
    """An input of a task, as the executor has them."""

    size: int
    workers: set[str]


def request(
    machine: Machine,
    cpus: float,
    gib: float = 1.0,
    gpus: int = 0,
    *,
    whole: WorkerCapacity | None = None,
    size: int = 0,
) -> ResourceRequest:
    """Make a request on workers of the first size, or another, as the executor does it."""
    need = Resources.of(cpus, int(gib * 2**30), gpus)
    capacity = Resources.had_by(whole or machine.config.scaling.sizes[0])
    fitting = max(1, need.times_in(capacity))
    scaling = machine.config.scaling
    if scaling.one_machine:
        fitting = scaling.slots_per_worker
    return ResourceRequest(need, size, capacity, fitting, need)


def requirements(
    *requests: ResourceRequest, priority: int = 0, judged: bool = False
) -> Requirements:
    return Requirements(TaskOptions(), requests, priority, judged)


def test_a_task_launches_a_worker_and_is_sent_when_it_connects() -> None:
    """A task waits for the worker it caused, and starts in its free slot at once."""
    machine = make()
    (task,) = tasks(1)
    assert machine.handle(TasksSubmitted([task]), 0.0) == [LaunchWorker("1", 2)]
    connected = machine.handle(WorkerConnected("w", 2, "1"), 1.0)
    assert connected == [MarkRunning([task]), SendTasks("w", [task])]
    resolved = machine.handle(ResultsReceived("w", [task.lease], [b"r"], [0.5]), 2.0)
    # The lease is gone with the result: number 1 was the first.
    assert resolved == [ResolveTasks("w", [task], [b"r"], [0.5])]
    machine.validate()


def test_no_worker_is_launched_while_enough_are_starting() -> None:
    """Demand that starting workers will serve asks for no more of them."""
    machine = make(max_slots=8)
    assert len(only(machine.handle(TasksSubmitted(tasks(3)), 0.0), LaunchWorker)) == 2
    assert only(machine.handle(TasksSubmitted(tasks(1)), 0.1), LaunchWorker) == []
    assert len(only(machine.handle(TasksSubmitted(tasks(100)), 0.2), LaunchWorker)) == 2
    machine.validate()


def test_the_last_worker_has_only_the_slots_that_are_left() -> None:
    """Workers never add up to more slots than max_workers."""
    launches = only(make(max_slots=5).handle(TasksSubmitted(tasks(50)), 0.0), LaunchWorker)
    assert [launch.slots for launch in launches] == [2, 2, 1]


def test_a_task_of_unknown_length_is_not_sent_ahead() -> None:
    """Only free slots get tasks of which nothing is known."""
    machine = make(max_slots=2)
    machine.handle(TasksSubmitted(tasks(10)), 0.0)
    (sent,) = only(machine.handle(WorkerConnected("w", 2, "1"), 0.0), SendTasks)
    assert len(sent.tasks) == 2


def test_short_tasks_travel_by_the_thousand() -> None:
    """No-ops are sent far ahead of need, within the limit per slot."""
    machine = make(max_slots=2)
    stats = quick()
    stats.samples = 100_000
    machine.handle(TasksSubmitted(tasks(10_000, stats)), 0.0)
    (sent,) = only(machine.handle(WorkerConnected("w", 2, "1"), 0.0), SendTasks)
    assert 3000 < len(sent.tasks) <= 2 * 2048
    machine.validate()


def test_a_slow_one_among_short_tasks_closes_the_look_ahead() -> None:
    """One long run time is enough to stop sending ahead."""
    machine = make(max_slots=1, slots_per_worker=1)
    stats = quick()
    machine.handle(TasksSubmitted(tasks(50, stats)), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    worker = machine.workers["w"]
    leases = list(worker.leases)
    assert len(leases) > 1
    machine.handle(TasksSubmitted(tasks(50, stats)), 0.0)
    more = machine.handle(ResultsReceived("w", leases[:1], [b""], [5.0]), 5.0)
    assert only(more, SendTasks) == []
    machine.validate()


def test_a_lost_attempt_runs_again_as_often_as_allowed_and_then_fails_alone() -> None:
    """Two retries make three attempts; the last one's evidence is what fails the task."""
    machine = make(max_slots=1, slots_per_worker=1)
    (task,) = tasks(1, retries=2)
    machine.handle(TasksSubmitted([task]), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    for _ in range(2):
        commands = machine.handle(FailuresReceived("w", [(task.lease, LOST)]), 0.0)
        assert len(only(commands, SendTasks)) == 1
        assert only(commands, FailTask) == []
        machine.validate()
    commands = machine.handle(FailuresReceived("w", [(task.lease, LOST)]), 0.0)
    assert [command.task for command in only(commands, FailTask)] == [task]
    assert machine.open_tasks == 0
    machine.validate()


def test_an_exception_is_a_result_and_never_retried() -> None:
    """What the task itself raised fails it in the first attempt."""
    machine = make(max_slots=1, slots_per_worker=1)
    (task,) = tasks(1)
    machine.handle(TasksSubmitted([task]), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    failure = Failure(FailureKind.RAISED, "boom")
    commands = machine.handle(FailuresReceived("w", [(task.lease, failure)]), 0.0)
    assert [command.failure for command in only(commands, FailTask)] == [failure]


def test_a_worker_lost_with_several_tasks_costs_none_of_them_an_attempt() -> None:
    """Whatever was sent may have begun: all go back to the head of the queue, in order."""
    machine = make(max_slots=2)
    batch = tasks(10, quick())
    machine.handle(TasksSubmitted(batch), 0.0)
    machine.handle(WorkerConnected("w", 2, "1"), 0.0)
    assert len(machine.workers["w"].leases) == 10
    machine.handle(WorkerReady("w"), 0.0)
    machine.handle(TasksStarted("w", [batch[0].lease, batch[4].lease]), 0.5)
    commands = lose(machine, 1.0, "w", "gone")
    assert [task.lost for task in batch] == [0] * 10
    assert len(only(commands, LaunchWorker)) == 1
    assert sorted(task.number for task in machine.waiting_tasks()) == list(range(1, 11))
    machine.validate()


def test_a_task_under_which_every_worker_dies_young_comes_to_an_end() -> None:
    """Workers that die before they are ready cost no attempt, up to a bound."""
    machine = make(max_slots=1, slots_per_worker=1)
    machine.handle(TasksSubmitted(tasks(1)), 0.0)
    failed: list[Any] = []
    for number in range(1, 30):
        machine.handle(WorkerConnected("w", 1, str(number)), 0.0)
        failed += only(lose(machine, 0.0, "w", "gone"), FailTask)
        machine.validate()
        if failed:
            break
    assert len(failed) == 1
    assert number == 13


def test_at_most_once_fails_whatever_was_sent_to_a_lost_worker() -> None:
    """Without retries, a task that may have run is not run again."""
    machine = make(max_slots=2)
    machine.handle(TasksSubmitted(tasks(5, quick(), retries=0)), 0.0)
    machine.handle(WorkerConnected("w", 2, "1"), 0.0)
    machine.handle(WorkerReady("w"), 0.0)
    commands = lose(machine, 1.0, "w", "gone")
    assert len(only(commands, FailTask)) == 5
    machine.validate()


def test_a_duplicate_result_is_dropped_and_counted() -> None:
    """The second answer under a lease changes nothing."""
    machine = make(max_slots=1, slots_per_worker=1)
    (task,) = tasks(1)
    machine.handle(TasksSubmitted([task]), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    event = ResultsReceived("w", [task.lease], [b""], [0.0])
    assert len(only(machine.handle(event, 1.0), ResolveTasks)) == 1
    assert only(machine.handle(event, 1.0), ResolveTasks) == []
    assert machine.counts["duplicates"] == 1


def test_cancelling_recalls_what_was_sent_and_kills_only_when_told() -> None:
    """A cancelled task's lease stays booked until the worker answers for it."""
    machine = make(max_slots=1, slots_per_worker=1)
    first, second = tasks(2, quick())
    machine.handle(TasksSubmitted([first, second]), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    lease = second.lease
    assert machine.handle(TasksCancelled([second]), 0.0) == [RecallTasks("w", [lease])]
    machine.validate()
    assert only(machine.handle(LeasesReturned("w", [lease]), 0.0), SendTasks) == []
    lease = first.lease
    assert machine.handle(TasksCancelled([first], kill=True), 0.0) == [KillTasks("w", [lease])]
    machine.validate()


def test_a_silent_worker_is_lost_however_often_its_tasks_are_withdrawn() -> None:
    """What was not sent to it after all comes back without a word of the worker itself."""
    scaling = ScalingPolicy(max_slots=1, slots_per_worker=1)
    machine = Machine(ServerConfig(scaling=scaling, lease_timeout=10.0))
    batch = tasks(5, quick())
    machine.handle(TasksSubmitted(batch), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    withdrawn, said, *_ = batch
    machine.handle(TasksCancelled([withdrawn]), 6.0)
    machine.handle(LeasesReturned("w", [withdrawn.lease], heard=False), 6.0)
    machine.handle(DeadlinePassed(), 9.0)
    assert "w" in machine.workers
    machine.handle(DeadlinePassed(), 10.0)
    assert "w" not in machine.workers
    machine.validate()

    machine.handle(WorkerConnected("x", 1, "2"), 11.0)
    machine.handle(TasksCancelled([said]), 17.0)
    machine.handle(LeasesReturned("x", [said.lease]), 17.0)
    machine.handle(DeadlinePassed(), 21.0)
    assert "x" in machine.workers
    machine.validate()


def test_tasks_behind_a_straggler_are_recalled_for_an_idle_worker() -> None:
    """What one worker has not begun is taken back as soon as another has nothing to do."""
    machine = make(max_slots=2, slots_per_worker=1)
    batch = tasks(20, quick())
    machine.handle(TasksSubmitted(batch), 0.0)
    machine.handle(WorkerConnected("a", 1, "1"), 0.0)
    assert len(machine.workers["a"].leases) == 20
    machine.handle(WorkerConnected("b", 1, "2"), 0.0)
    deadline = machine.next_deadline()
    assert deadline is not None
    (recall,) = only(machine.handle(DeadlinePassed(), deadline), RecallTasks)
    assert recall.worker == "a"
    commands = machine.handle(LeasesReturned("a", recall.leases), deadline)
    assert {command.worker for command in only(commands, SendTasks)} >= {"b"}
    machine.validate()


def test_an_idle_worker_is_drained_after_its_time_but_not_the_warm_ones() -> None:
    """Scale-in keeps min_workers."""
    machine = make(max_slots=4, min_slots=2, idle_timeout=10.0)
    machine.handle(TasksSubmitted(batch := tasks(4)), 0.0)
    for number in ("1", "2"):
        machine.handle(WorkerConnected(number, 2, number), 0.0)
    for task in batch:
        machine.handle(ResultsReceived(task.worker or "", [task.lease], [b""], [1.0]), 1.0)
    assert only(machine.handle(DeadlinePassed(), 5.0), DrainWorker) == []
    assert len(only(machine.handle(DeadlinePassed(), 11.5), DrainWorker)) == 1
    machine.validate()


def test_a_worker_that_never_dials_back_is_replaced_and_at_last_given_up() -> None:
    """Launches that time out are tried again with a pause; after three in a row tasks fail."""
    machine = make(max_slots=1, slots_per_worker=1, launch_timeout=10.0)
    batch = tasks(2)
    machine.handle(TasksSubmitted(batch), 0.0)
    now, terminated, failed = 0.0, 0, []
    for _ in range(20):
        deadline = machine.next_deadline()
        if deadline is None:
            break
        now = max(now, deadline)
        commands = machine.handle(DeadlinePassed(), now)
        terminated += len(only(commands, TerminateLaunch))
        failed += only(commands, FailTasksUnlaunched)
        machine.validate()
    assert terminated == 3
    assert [command.tasks for command in failed] == [batch]
    assert "10 s" in failed[0].reason


def test_a_fatal_launch_failure_fails_what_waits_at_once() -> None:
    """Where trying again cannot help, nobody waits for it."""
    machine = make(max_slots=1, slots_per_worker=1)
    batch = tasks(1)
    machine.handle(TasksSubmitted(batch), 0.0)
    commands = machine.handle(ProcessEnded("1", "wrong Python", fatal=True), 0.0)
    assert commands == [FailTasksUnlaunched(batch, "wrong Python")]


def test_launches_that_fail_together_count_as_one_failure() -> None:
    """A registry that is busy for a minute fails a whole round: the next one may do."""
    machine = make(max_slots=10, slots_per_worker=1)
    batch = tasks(10)
    machine.handle(TasksSubmitted(batch), 0.0)
    for at in (10.0, 20.0, 30.0):
        assert len(machine.launches) == 10
        failed = []
        for number, launch in enumerate(list(machine.launches)):
            assert not failed
            commands = machine.handle(ProcessEnded(launch, "busy"), at + number / 1000)
            failed += only(commands, FailTasksUnlaunched)
        machine.validate()
        if at < 30.0:
            machine.handle(DeadlinePassed(), at + 5.0)
    assert failed == [FailTasksUnlaunched(batch, "busy")]


def test_shutdown_waits_for_tasks_and_finishes_when_the_last_worker_is_gone() -> None:
    """Finish comes once, after tasks and workers."""
    machine = make(max_slots=1, slots_per_worker=1)
    (task,) = tasks(1)
    machine.handle(TasksSubmitted([task]), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    assert machine.handle(ShutdownRequested(), 0.0) == []
    commands = machine.handle(ResultsReceived("w", [task.lease], [b""], [0.0]), 1.0)
    assert len(only(commands, DrainWorker)) == 1
    assert only(lose(machine, 2.0, "w"), Finish) == [Finish()]
    assert machine.handle(DeadlinePassed(), 3.0) == []


def test_a_shutdown_gives_up_a_worker_that_does_not_end() -> None:
    """It may say that it lives for as long as it likes: ten seconds are enough for a farewell."""
    machine = make(max_slots=1, slots_per_worker=1)
    (task,) = tasks(1)
    machine.handle(TasksSubmitted([task]), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    machine.handle(ResultsReceived("w", [task.lease], [b""], [0.0]), 1.0)
    machine.handle(ShutdownRequested(), 2.0)
    commands: list[Any] = []
    for second in range(2, 20):
        commands += machine.handle(WorkerHeard("w"), float(second))
        deadline = machine.next_deadline()
        if deadline is not None and deadline <= second:
            commands += machine.handle(DeadlinePassed(), float(second))
        if machine.finished:
            break
    assert second == 12
    assert [type(command) for command in commands] == [TerminateWorker, Finish]


@pytest.mark.parametrize("by_itself", [True, False])
def test_killing_ends_a_worker_that_drains_and_has_nothing_left(by_itself: bool) -> None:
    """It was to end by itself, and may not mean to."""
    machine = make(max_slots=1, slots_per_worker=1)
    (task,) = tasks(1)
    machine.handle(TasksSubmitted([task]), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    machine.handle(ResultsReceived("w", [task.lease], [b""], [0.0]), 1.0)
    machine.handle(WorkerDraining("w") if by_itself else ShutdownRequested(), 2.0)
    commands = machine.handle(ShutdownRequested(cancel=True, kill=True), 3.0)
    assert [command.worker for command in only(commands, TerminateWorker)] == ["w"]


def test_a_worker_that_was_to_make_room_and_does_not_is_given_up() -> None:
    """Its place is another one's, for whose tasks nobody would be launched otherwise."""
    machine = make(max_slots=1, slots_per_worker=1, max_worker_lifetime=10.0)
    (task,) = tasks(1)
    machine.handle(TasksSubmitted([task]), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    machine.handle(ResultsReceived("w", [task.lease], [b""], [0.0]), 1.0)
    assert only(machine.handle(DeadlinePassed(), 10.0), DrainWorker)
    machine.handle(TasksSubmitted(tasks(1)), 11.0)
    commands: list[Any] = []
    for second in range(11, 300):
        commands += machine.handle(WorkerHeard("w"), float(second))
        commands += machine.handle(DeadlinePassed(), float(second))
        if only(commands, LaunchWorker):
            break
    assert only(commands, TerminateWorker)
    assert second < 150
    machine.validate()


def test_a_held_task_is_no_demand_until_it_is_released() -> None:
    """No worker is launched for what cannot begin."""
    machine = make(max_slots=4, slots_per_worker=1)
    batch = tasks(2)
    assert machine.handle(TasksBlocked(batch), 0.0) == []
    assert machine.open_tasks == 0
    commands = machine.handle(TasksReleased(batch[:1]), 1.0)
    assert commands == [LaunchWorker("1", 1)]
    assert machine.waiting_tasks() == batch[:1]
    machine.validate()


def test_shutdown_waits_for_held_tasks() -> None:
    """The last result of others and the release of what waited for it are two events."""
    machine = make(max_slots=1, slots_per_worker=1)
    (task,), (dependent,) = tasks(1), tasks(1)
    machine.handle(TasksSubmitted([task]), 0.0)
    machine.handle(TasksBlocked([dependent]), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    machine.handle(ShutdownRequested(), 0.0)
    commands = machine.handle(ResultsReceived("w", [task.lease], [b""], [0.0]), 1.0)
    assert only(commands, DrainWorker) == []
    commands = machine.handle(TasksReleased([dependent]), 1.0)
    assert [list(command.tasks) for command in only(commands, SendTasks)] == [[dependent]]
    commands = machine.handle(ResultsReceived("w", [dependent.lease], [b""], [0.0]), 2.0)
    assert len(only(commands, DrainWorker)) == 1


def test_held_tasks_fail_or_are_cancelled_where_they_are() -> None:
    """Dropped, cancelled by their user, and cancelled with the executor."""
    machine = make()
    batch = tasks(3)
    machine.handle(TasksBlocked(batch), 0.0)
    assert machine.handle(TasksDropped(batch[:1]), 0.0) == []
    assert machine.handle(TasksCancelled(batch[1:2]), 0.0) == []
    commands = machine.handle(ShutdownRequested(cancel=True), 0.0)
    assert [list(command.tasks) for command in only(commands, CancelTasks)] == [batch[2:]]
    assert (machine.counts["failed"], machine.counts["cancelled"]) == (1, 2)
    assert machine.handle(TasksReleased(batch), 1.0) == []
    machine.validate()


def take_over(machine: Machine, *launches: str, slots: int = 1) -> list[Any]:
    taken = [(launch, slots, 0, None) for launch in launches]
    return machine.handle(LaunchesTakenOver(taken, 10_000, 1 << 40), 0.0)


def test_a_worker_that_is_taken_over_goes_on_with_its_tasks() -> None:
    """Nobody else is sent them, nor launched for them; what comes of them counts."""
    machine = make(max_slots=2, slots_per_worker=1)
    assert take_over(machine, "7") == []
    batch = tasks(2)
    machine.handle(TasksBlocked(batch), 0.0)
    # Until it has said what it holds, it gets nothing.
    other = tasks(1)
    machine.handle(TasksSubmitted(other), 0.0)
    commands = machine.handle(WorkerConnected("w", 1, "7", taken_over=True), 0.0)
    assert not only(commands, SendTasks)
    machine.handle(TasksCancelled(other), 0.0)
    commands = machine.handle(TasksTakenOver("w", batch[:1], [99]), 0.0)
    assert [list(command.tasks) for command in only(commands, MarkRunning)] == [batch[:1]]
    assert not only(commands, SendTasks)
    assert not only(commands, LaunchWorker)
    assert machine.handle(WorkerBack("w"), 0.0) == []
    machine.validate()
    commands = machine.handle(TasksReleased(batch[1:]), 1.0)
    # The one that is there is busy.
    assert [command.launch for command in commands] == ["10001"]
    commands = machine.handle(ResultsReceived("w", [99], [b"r"], [1.0]), 2.0)
    assert [list(command.results) for command in only(commands, ResolveTasks)] == [[b"r"]]
    assert [task.lease for task in only(commands, SendTasks)[0].tasks] == [(1 << 40) + 1]
    machine.validate()


def test_tasks_of_a_worker_that_was_lost_again_wait() -> None:
    """Before it could be said that they are its own, or after that."""
    machine = make(max_slots=2, slots_per_worker=2)
    take_over(machine, "7", slots=2)
    batch = tasks(3)
    machine.handle(TasksBlocked(batch), 0.0)
    machine.handle(TasksCancelled(batch[:1]), 0.0)
    machine.handle(TasksTakenOver("w", batch[:2], [98, 99]), 0.0)
    assert machine.waiting_tasks() == batch[1:2]
    machine.handle(WorkerConnected("w", 2, "7"), 0.0)
    machine.handle(TasksTakenOver("w", batch[2:], [100]), 0.0)
    machine.validate()
    lose(machine, 1.0, "w", "gone")
    assert machine.waiting_tasks() == batch[1:]
    machine.validate()


def test_a_task_that_waits_is_taken_over_too() -> None:
    """Its worker comes when nobody expects that it has tasks any more."""
    machine = make(max_slots=2, slots_per_worker=1)
    take_over(machine, "7", "8")
    batch = tasks(3)
    machine.handle(TasksSubmitted(batch), 0.0)
    machine.handle(WorkerConnected("w", 1, "7", taken_over=True), 0.0)
    commands = machine.handle(TasksTakenOver("w", batch[:2], [98, 99]), 0.0)
    assert [list(command.tasks) for command in only(commands, MarkRunning)] == [batch[:1]]
    assert machine.waiting_tasks() == batch[1:]  # the worker has one slot
    machine.validate()
    commands = machine.handle(WorkerConnected("x", 1, "8"), 0.0)
    assert [task for command in only(commands, SendTasks) for task in command.tasks] == batch[1:2]
    # A task that is on another worker stays there.
    assert machine.handle(TasksTakenOver("w", batch[1:2], [100]), 0.0) == []
    lose(machine, 1.0, "w", "gone")
    assert sorted(task.number for task in machine.waiting_tasks()) == [1, 3]
    machine.validate()


def test_no_more_is_taken_over_than_may_be() -> None:
    """The program was run again with fewer workers."""
    machine = make(max_slots=2, slots_per_worker=1)
    commands = take_over(machine, "1", "2", "3")
    assert [command.launch for command in only(commands, TerminateLaunch)] == ["3"]
    machine.validate()
    # Those that were expected and do not come are replaced, as all others.
    machine.handle(TasksSubmitted(tasks(2)), 0.0)
    commands = machine.handle(ProcessEnded("1", "no sign of it", reclaimed=True), 1.0)
    assert [command.launch for command in only(commands, LaunchWorker)] == ["10001"]


def test_shutdown_with_cancel_keeps_only_what_runs() -> None:
    """Waiting and sent-ahead tasks are cancelled; the running one is waited for."""
    machine = make(max_slots=1, slots_per_worker=1)
    batch = tasks(5, quick())
    machine.handle(TasksSubmitted(batch), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    machine.handle(TasksStarted("w", [batch[0].lease]), 0.0)
    sent = [task for task in batch if task.state is TaskState.SENT]
    commands = machine.handle(ShutdownRequested(cancel=True), 0.0)
    waiting = [task for command in only(commands, CancelTasks) for task in command.tasks]
    assert [*sent, *waiting] == batch[1:]
    # What was sent ahead may have begun: its worker is asked, and nothing is sent meanwhile.
    assert [list(c.leases) for c in only(commands, RecallTasks)] == [[task.lease for task in sent]]
    assert len(sent) > 1
    commands = machine.handle(LeasesReturned("w", [sent[0].lease]), 0.1)
    assert [list(c.tasks) for c in only(commands, CancelTasks)] == [sent[:1]]
    assert only(commands, SendTasks) == []
    # The others have begun: they are waited for.
    commands = machine.handle(DeadlinePassed(), 2.0)
    assert only(commands, CancelTasks) == []
    assert only(commands, DrainWorker) == []
    machine.validate()


def test_shutdown_with_cancel_does_not_wait_for_a_silent_worker() -> None:
    """What was sent ahead to it, and it may have begun, is cancelled after a second."""
    machine = make(max_slots=1, slots_per_worker=1)
    batch = tasks(3, quick())
    machine.handle(TasksSubmitted(batch), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    machine.handle(ShutdownRequested(cancel=True), 1.0)
    assert machine.next_deadline() is not None
    assert machine.next_deadline() <= 2.0
    commands = machine.handle(DeadlinePassed(), 2.0)
    assert {task for c in only(commands, CancelTasks) for task in c.tasks} == set(batch[1:])
    machine.validate()


def test_shutdown_with_kill_cancels_what_runs_too() -> None:
    """Nothing is waited for."""
    machine = make(max_slots=1, slots_per_worker=1)
    batch = tasks(2)
    machine.handle(TasksSubmitted(batch), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    commands = machine.handle(ShutdownRequested(cancel=True, kill=True), 0.0)
    assert {task.number for command in only(commands, CancelTasks) for task in command.tasks} == {
        1,
        2,
    }
    assert only(commands, TerminateWorker) == [TerminateWorker("w")]


def ladder(size_count: int = 3, max_slots: int = 2) -> Machine:
    return make(max_slots=max_slots, slots_per_worker=1, size_count=size_count)


def out_of_memory(machine: Machine, worker: str, task: Task) -> list[Any]:
    failure = Failure(FailureKind.SLOT_LOST, "killed", out_of_memory=True)
    return machine.handle(FailuresReceived(worker, [(task.lease, failure)]), 1.0)


def test_a_task_lost_to_memory_runs_again_on_the_next_larger_size() -> None:
    """Its worker makes room when nothing else waits for it, and a larger one is launched."""
    machine = ladder(max_slots=1)
    (task,) = tasks(1)
    machine.handle(TasksSubmitted([task]), 0.0)
    machine.handle(WorkerConnected("small", 1, "1"), 0.0)
    machine.handle(WorkerReady("small"), 0.0)
    commands = out_of_memory(machine, "small", task)
    assert only(commands, DrainWorker) == [DrainWorker("small")]
    machine.validate()
    (launch,) = only(lose(machine, 2.0, "small", "ended"), LaunchWorker)
    assert launch.size == 1
    (sent,) = only(machine.handle(WorkerConnected("large", 1, launch.launch), 3.0), SendTasks)
    assert sent.tasks == [task]
    machine.validate()


def test_climbing_costs_no_attempt_and_the_largest_size_is_the_last() -> None:
    """A task with one retry climbs two sizes, and is run twice on the largest."""
    machine = ladder(size_count=3, max_slots=5)
    (task,) = tasks(1, retries=1)
    machine.handle(TasksSubmitted([task]), 0.0)
    sizes = []
    launch = "1"
    for number in range(4):
        worker = f"w{number}"
        machine.handle(WorkerConnected(worker, 1, launch), 0.0)
        machine.handle(WorkerReady(worker), 0.0)
        if task.worker is None:
            break
        sizes.append(machine.workers[task.worker].size)
        commands = out_of_memory(machine, task.worker, task)
        machine.validate()
        launches = only(commands, LaunchWorker)
        launch = launches[0].launch if launches else launch
    assert sizes == [0, 1, 2, 2]
    assert len(only(commands, FailTask)) == 1


def test_what_was_enough_for_a_function_is_remembered() -> None:
    """Waiting tasks of a function that outgrew a size, and new ones, go to the next at once."""
    machine = ladder(max_slots=1)
    stats = FunctionStats()
    batch = tasks(3, stats)
    machine.handle(TasksSubmitted(batch), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    machine.handle(WorkerReady("w"), 0.0)
    out_of_memory(machine, "w", batch[0])
    assert [task.size for task in batch] == [1, 1, 1]
    other, later = tasks(1)[0], tasks(1, stats)[0]
    machine.handle(TasksSubmitted([other, later]), 2.0)
    assert (other.size, later.size) == (0, 1)
    machine.validate()


def test_one_outlier_does_not_move_the_others_to_larger_workers() -> None:
    """A size is left behind only once more tasks outgrew it than finished on it."""
    machine = ladder(max_slots=1)
    stats = quick()
    batch = tasks(3, stats)
    machine.handle(TasksSubmitted(batch), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    machine.handle(WorkerReady("w"), 0.0)
    out_of_memory(machine, "w", batch[0])
    assert [task.size for task in batch] == [1, 0, 0]
    machine.validate()


def test_a_worker_that_ran_out_of_memory_before_it_was_ready_is_followed_by_a_larger_one() -> None:
    """Whatever its tasks need before they begin did not fit; that costs them no attempt."""
    machine = ladder(max_slots=1)
    (task,) = tasks(1)
    machine.handle(TasksSubmitted([task]), 0.0)
    machine.handle(WorkerConnected("a", 1, "1"), 0.0)
    commands = lose(machine, 1.0, "a", "killed", out_of_memory=True)
    assert [launch.size for launch in only(commands, LaunchWorker)] == [1]
    assert (task.size, task.lost) == (1, 0)
    machine.validate()


def test_a_reclaimed_worker_costs_its_tasks_no_attempt() -> None:
    """Tasks of a worker that its platform took back run again, and the launch is awaited again."""
    machine = make(max_slots=1, slots_per_worker=1)
    (task,) = tasks(1, retries=1)
    machine.handle(TasksSubmitted([task]), 0.0)
    machine.handle(WorkerConnected("a", 1, "1"), 0.0)
    machine.handle(WorkerReady("a"), 0.0)
    commands = lose(machine, 1.0, "a", "spot", reclaimed=True, relaunched=True)
    assert only(commands, LaunchWorker) == []
    assert task.lost == 0
    (sent,) = only(machine.handle(WorkerConnected("b", 1, "1"), 2.0), SendTasks)
    assert sent.tasks == [task]
    machine.validate()


def test_a_task_without_retries_is_not_run_again_after_a_reclaim() -> None:
    """At most once means at most once, whoever took the worker."""
    machine = make(max_slots=1, slots_per_worker=1)
    (task,) = tasks(1, retries=0)
    machine.handle(TasksSubmitted([task]), 0.0)
    machine.handle(WorkerConnected("a", 1, "1"), 0.0)
    machine.handle(WorkerReady("a"), 0.0)
    assert only(lose(machine, 1.0, "a", "spot", reclaimed=True), FailTask)


def test_a_worker_is_replaced_after_so_many_tasks() -> None:
    """``max_tasks_per_worker`` bounds what is sent to it, too."""
    machine = make(max_slots=1, slots_per_worker=1, max_tasks_per_worker=3)
    batch = tasks(5, quick())
    machine.handle(TasksSubmitted(batch), 0.0)
    (sent,) = only(machine.handle(WorkerConnected("a", 1, "1"), 0.0), SendTasks)
    assert len(sent.tasks) == 3
    leases = [task.lease for task in sent.tasks]
    answers = ResultsReceived("a", leases, [b""] * 3, [0.1] * 3)
    assert only(machine.handle(answers, 1.0), DrainWorker) == [DrainWorker("a")]
    assert len(only(lose(machine, 1.0, "a", "ended"), LaunchWorker)) == 1
    machine.validate()


def test_a_worker_is_replaced_when_it_is_too_old() -> None:
    """``max_worker_lifetime`` drains it: what it has, it finishes."""
    machine = make(max_slots=1, slots_per_worker=1, max_worker_lifetime=10.0)
    machine.handle(TasksSubmitted(tasks(1)), 0.0)
    machine.handle(WorkerConnected("a", 1, "1"), 1.0)
    machine.handle(WorkerHeard("a"), 10.5)
    assert only(machine.handle(DeadlinePassed(), 10.9), DrainWorker) == []
    assert only(machine.handle(DeadlinePassed(), 11.0), DrainWorker) == [DrainWorker("a")]
    machine.validate()


def test_launches_that_fail_do_not_fail_what_other_workers_can_do() -> None:
    """With a worker at work, tasks wait for it, and launching pauses."""
    machine = make(max_slots=2, slots_per_worker=1)
    batch = tasks(5)
    machine.handle(TasksSubmitted(batch), 0.0)
    machine.handle(WorkerConnected("a", 1, "1"), 0.0)
    commands = machine.handle(ProcessEnded("2", "no image", fatal=True), 1.0)
    assert commands == []
    assert only(machine.handle(WorkerHeard("a"), 30.0), LaunchWorker) == []
    assert len(only(machine.handle(WorkerHeard("a"), 62.0), LaunchWorker)) == 1
    machine.validate()


def test_tasks_that_need_a_larger_worker_fail_when_none_can_be_had() -> None:
    """Smaller workers are no help to them; the others go on."""
    machine = ladder(max_slots=2)
    stats = quick()
    batch = tasks(4, stats)
    machine.handle(TasksSubmitted([*batch, *tasks(1)]), 0.0)
    machine.handle(WorkerConnected("a", 1, "1"), 0.0)
    machine.handle(WorkerReady("a"), 0.0)
    machine.handle(ProcessEnded("2", "killed", killed=True), 0.0)
    # It is the turn of the task that climbed: another worker that would not serve it makes way.
    commands = out_of_memory(machine, "a", batch[0])
    assert [each.launch for each in only(commands, TerminateLaunch)] == ["3"]
    (launch,) = only(commands, LaunchWorker)
    assert launch.size == 1
    commands = machine.handle(ProcessEnded(launch.launch, "no such size", fatal=True), 2.0)
    (failed,) = only(commands, FailTasksUnlaunched)
    assert failed.tasks == [batch[0]]
    machine.validate()


def test_workers_that_nobody_waits_for_any_more_are_withdrawn() -> None:
    """After as long as an idle worker would be kept, and not before; those needed stay."""
    machine = make(max_slots=4, slots_per_worker=1, idle_timeout=10.0)
    batch = tasks(4)
    machine.handle(TasksSubmitted(batch), 0.0)
    machine.handle(WorkerConnected("a", 1, "1"), 1.0)
    for number in range(3):
        leases = [task.lease for task in batch if task.state is TaskState.RUNNING]
        answers = ResultsReceived("a", leases[:1], [b""], [9.0])
        assert only(machine.handle(answers, 2.0 + number), TerminateLaunch) == []
    assert machine.open_tasks == 1
    assert only(machine.handle(DeadlinePassed(), 11.0), TerminateLaunch) == []
    commands = machine.handle(DeadlinePassed(), 12.1)
    assert [each.launch for each in only(commands, TerminateLaunch)] == ["4", "3", "2"]
    assert only(machine.handle(WorkerHeard("a"), 13.0), LaunchWorker) == []
    machine.validate()


def test_a_shutdown_withdraws_what_only_cancelled_tasks_were_waiting_for() -> None:
    """What runs is waited for, and nobody else comes."""
    machine = make(max_slots=3, slots_per_worker=1)
    machine.handle(TasksSubmitted(tasks(3)), 0.0)
    machine.handle(WorkerConnected("a", 1, "1"), 1.0)
    commands = machine.handle(ShutdownRequested(cancel=True), 2.0)
    assert sorted(each.launch for each in only(commands, TerminateLaunch)) == ["2", "3"]
    assert machine.open_tasks == 1
    machine.validate()


def test_a_shutdown_launches_nothing_for_what_runs_on_a_draining_worker() -> None:
    """Each sign of life would have launched a worker, and the next one withdrawn it."""
    machine = make(slots_per_worker=1)
    machine.handle(TasksSubmitted(tasks(1)), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    machine.handle(ShutdownRequested(), 1.0)
    commands = machine.handle(WorkerDraining("w"), 2.0)
    for second in range(3, 10):
        commands += machine.handle(WorkerHeard("w"), float(second))
    assert commands == [EvacuateWorker("w")]
    machine.handle(WorkerReady("w"), 10.0)
    lost = lose(machine, 11.0, "w", "gone")
    assert len(only(lost, LaunchWorker)) == 1
    machine.validate()


def test_a_shutdown_keeps_the_worker_that_a_resting_task_will_need() -> None:
    """A task between two attempts is work still to come."""
    machine = make(slots_per_worker=1)
    (task,) = tasks(1, requirements=requirements(judged=True))
    machine.handle(TasksSubmitted([task]), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    failure = Failure(FailureKind.RAISED, "boom")
    machine.handle(FailuresReceived("w", [(task.lease, failure)]), 1.0)
    machine.handle(ShutdownRequested(), 1.0)
    lose(machine, 2.0, "w", "gone")
    assert len(machine.launches) == 1
    commands = machine.handle(DeadlinePassed(), 3.0) + machine.handle(DeadlinePassed(), 4.0)
    assert commands == []
    machine.handle(FailureJudged("w", task, failure, again=True), 5.0)
    machine.handle(DeadlinePassed(), 6.0)
    commands = machine.handle(WorkerConnected("v", 1, "2"), 7.0)
    assert [command.tasks for command in only(commands, SendTasks)] == [[task]]


def test_a_shutdown_does_not_wait_for_a_cancelled_task_that_began_all_the_same() -> None:
    """Nobody wants its result, and it may never end."""
    machine = make(slots_per_worker=1)
    (task,) = tasks(1)
    machine.handle(TasksSubmitted([task]), 0.0)
    machine.handle(WorkerConnected("w", 1, "1"), 0.0)
    lease = task.lease
    machine.handle(TasksCancelled([task]), 1.0)
    commands = machine.handle(ShutdownRequested(), 2.0)
    assert [c.leases for c in only(commands, KillTasks)] == [[lease]]
    assert only(commands, DrainWorker)
    machine.handle(FailuresReceived("w", [(lease, Failure(FailureKind.KILLED))]), 3.0)
    assert only(lose(machine, 4.0, "w", "ended"), Finish)


def test_a_worker_that_fell_silent_does_not_count_among_the_warm_ones() -> None:
    """Of two, one is kept: not the silent one."""
    machine = make(slots_per_worker=1, min_slots=1, idle_timeout=1.0)
    machine.handle(TasksSubmitted(tasks(2)), 0.0)
    for name, launch in (("a", "1"), ("b", "2")):
        machine.handle(WorkerConnected(name, 1, launch), 0.0)
    leases = {name: list(machine.workers[name].leases) for name in "ab"}
    machine.handle(ResultsReceived("a", leases["a"], [b""], [0.1]), 0.0)
    machine.handle(ResultsReceived("b", leases["b"], [b""], [0.1]), 59.5)
    commands = machine.handle(DeadlinePassed(), 60.6)
    assert [c.worker for c in only(commands, TerminateWorker)] == ["a"]
    assert only(commands, DrainWorker) == []
    machine.validate()


def test_nothing_is_launched_any_more_once_the_budget_is_used_up() -> None:
    """Workers that are there go on; refused launches are forgotten."""
    machine = make(max_slots=4, slots_per_worker=1)
    machine.handle(TasksSubmitted(tasks(10)), 0.0)
    machine.handle(WorkerConnected("a", 1, "1"), 0.0)
    commands = machine.handle(LaunchesRefused(["2", "3", "4"]), 0.0)
    assert only(commands, LaunchWorker) == []
    assert not machine.launches
    machine.handle(WorkerHeard("a"), 5.0)
    machine.validate()
