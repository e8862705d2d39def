"""A worker dies with several tasks aboard: who it was is found out, and nobody else is blamed."""

from __future__ import annotations

import pytest
from endings import ends_of

from cloudexec._config import ScalingPolicy, ServerConfig, TaskOptions
from cloudexec._core.commands import FailTask, LaunchWorker, RecallTasks, SendTasks
from cloudexec._core.events import (
    Event,
    Failure,
    FailureKind,
    FailuresReceived,
    LeasesReturned,
    ProcessEnded,
    ResultsReceived,
    TasksCancelled,
    TasksStarted,
    TasksSubmitted,
    WorkerConnected,
    WorkerReady,
)
from cloudexec._core.machine import Machine
from cloudexec._core.resources import Requirements
from cloudexec._core.tasks import FunctionStats, Task


class Fleet:
    """A machine whose launches come at once, unless told otherwise."""

    def __init__(self, workers: int, slots: int = 4, *, size_count: int = 1) -> None:
        policy = ScalingPolicy(
            max_slots=workers * slots, slots_per_worker=slots, size_count=size_count
        )
        self.machine = Machine(ServerConfig(scaling=policy))
        self.coming = True
        self.aboard: dict[str, list[Task]] = {}
        self.failed: list[FailTask] = []
        self.recalled: list[RecallTasks] = []
        self.number = 0

    def tell(self, event: Event) -> None:
        for command in self.machine.handle(event, 0.0):
            if isinstance(command, SendTasks):
                self.aboard[command.worker] += command.tasks
            elif isinstance(command, FailTask):
                self.failed.append(command)
            elif isinstance(command, RecallTasks):
                self.recalled.append(command)
            elif isinstance(command, LaunchWorker) and self.coming:
                self.come(command.launch, command.slots)
        self.machine.validate()

    def come(self, launch: str, slots: int) -> None:
        self.number += 1
        name = f"w{self.number}"
        self.aboard[name] = []
        self.tell(WorkerConnected(name, slots, launch))
        if name in self.machine.workers:
            self.tell(WorkerReady(name))

    def submit(self, *tasks: Task) -> None:
        self.tell(TasksSubmitted(tasks))

    def die(self, name: str, *, out_of_memory: bool = False) -> None:
        del self.aboard[name]
        for event in ends_of(self.machine, name, "died", out_of_memory=out_of_memory):
            self.tell(event)

    def answer(self, name: str, *tasks: Task) -> None:
        for task in tasks:
            self.aboard[name].remove(task)
        leases = [task.lease for task in tasks]
        self.tell(ResultsReceived(name, leases, leases, [9.0] * len(leases)))

    def host_of(self, task: Task) -> str:
        assert task.worker is not None
        return task.worker


def some(
    count: int, *, first: int = 1, stats: FunctionStats | None = None, retries: int = 1
) -> list[Task]:
    stats = stats or FunctionStats()
    return [Task(first + n, stats, retries=retries) for n in range(count)]


def quick() -> FunctionStats:
    stats = FunctionStats()
    for _ in range(5000):
        stats.learn(1e-5)
    return stats


def test_suspects_run_alone_and_only_the_guilty_one_fails() -> None:
    """Three are cleared by coming back; the fourth takes two more workers along, alone."""
    fleet = Fleet(1)
    tasks = some(4)
    guilty = tasks[2]
    fleet.submit(*tasks)
    fleet.die("w1")
    assert [task.lost for task in tasks] == [0, 0, 0, 0]
    for _ in range(5):
        ((name, aboard),) = [entry for entry in fleet.aboard.items() if entry[1]]
        assert len(aboard) == 1
        if aboard == [guilty]:
            fleet.die(name)
        else:
            fleet.answer(name, *aboard)
    (failed,) = fleet.failed
    assert failed.task is guilty
    assert failed.failure.suspects == 1
    assert fleet.machine.counts["succeeded"] == 3
    assert fleet.machine.counts["lost_attempts"] == 2


def test_without_retries_suspects_fail_and_are_told_how_many_they_were() -> None:
    fleet = Fleet(1)
    fleet.submit(*some(3, retries=0), *some(1, first=9))
    fleet.die("w1")
    assert [command.task.number for command in fleet.failed] == [1, 2, 3]
    assert {command.failure.suspects for command in fleet.failed} == {4}
    assert [task.number for task in fleet.aboard["w2"]] == [9]


def test_suspects_run_beside_each_other_on_different_workers() -> None:
    """And half of the workers, at most, are kept from what else waits."""
    fleet = Fleet(4)
    first = some(4)
    fleet.submit(*first, *some(40, first=10))
    fleet.die("w1")
    hosts = [name for name, aboard in fleet.aboard.items() if set(aboard) & set(first)]
    assert hosts == ["w5"]  # the only one that has nothing to finish
    assert len(fleet.aboard["w5"]) == 1
    kept = fleet.machine._quarantine.reserved
    assert sorted(kept.values()) == [False, True]
    (emptied,) = [name for name, hosts in kept.items() if not hosts]
    for task in list(fleet.aboard[emptied]):
        fleet.answer(emptied, task)
    assert len([aboard for aboard in fleet.aboard.values() if set(aboard) & set(first)]) == 2
    others = [aboard for aboard in fleet.aboard.values() if not set(aboard) & set(first)]
    assert [len(aboard) for aboard in others] == [4, 4]


def test_a_worker_is_emptied_no_longer_once_nobody_waits_for_it() -> None:
    """What it was kept from, it gets."""
    fleet = Fleet(2)
    first = some(4)
    fleet.submit(*first, *some(12, first=10))
    fleet.coming = False
    fleet.die("w1")
    fleet.tell(ProcessEnded(next(iter(fleet.machine.launches)), "no luck"))
    busy = list(fleet.aboard["w2"])
    fleet.answer("w2", *busy[:2])
    fleet.tell(TasksCancelled(first))
    assert len(fleet.aboard["w2"]) == 4
    assert not fleet.machine._quarantine.reserved


def test_what_was_sent_ahead_leaves_a_worker_that_is_emptied() -> None:
    fleet = Fleet(2, slots=2)
    first = some(2)
    fleet.submit(*first, *some(300, first=10, stats=quick()))
    fleet.coming = False
    fleet.die("w1")
    fleet.tell(ProcessEnded(next(iter(fleet.machine.launches)), "no luck"))
    (recalled,) = fleet.recalled
    assert recalled.worker == "w2"
    assert len(recalled.leases) == len(fleet.aboard["w2"]) - 2


def test_a_task_of_higher_priority_goes_before_a_suspect() -> None:
    fleet = Fleet(1)
    fleet.submit(*some(4))
    fleet.coming = False
    fleet.die("w1")
    urgent = some(1, first=50)
    urgent[0].requirements = Requirements(TaskOptions(), (), priority=1)
    fleet.submit(*urgent)
    fleet.come(next(iter(fleet.machine.launches)), 4)
    assert fleet.aboard["w2"] == urgent
    fleet.answer("w2", *urgent)
    assert [task.number for task in fleet.aboard["w2"]] == [1]


def test_a_worker_that_dies_under_one_task_costs_it_an_attempt() -> None:
    """With one slot, and nothing sent ahead, there is nobody else."""
    fleet = Fleet(1, slots=1)
    (task,) = some(1)
    fleet.submit(task)
    fleet.die("w1")
    assert task.lost == 1
    fleet.die("w2")
    (failed,) = fleet.failed
    assert failed.failure.suspects == 1
    assert not fleet.machine.counts["suspects"]


def test_a_cancelled_task_that_may_have_run_is_a_suspect_too() -> None:
    """The one beside it is not blamed for what the cancelled one may have done."""
    fleet = Fleet(1)
    one, other = some(2)
    fleet.submit(one, other)
    fleet.tell(TasksCancelled([other], kill=True))
    fleet.die("w1")
    assert one.lost == 0
    fleet.die(fleet.host_of(one))
    assert one.lost == 1


@pytest.mark.parametrize("slots", [1, 2])
def test_short_tasks_are_divided_until_the_guilty_one_is_found(slots: int) -> None:
    """By the thousand: it takes few workers, and costs the others nothing."""
    fleet = Fleet(1, slots=slots)
    tasks = some(1000, stats=quick())
    guilty = tasks[700]
    fleet.submit(*tasks)
    died = 0
    while fleet.machine.open_tasks:
        ((name, aboard),) = [entry for entry in fleet.aboard.items() if entry[1]]
        if guilty in aboard:
            # It takes along what was done in the meantime, and not yet told.
            died += 1
            fleet.die(name)
        else:
            some_of_it = aboard[: max(1, len(aboard) // 2)]
            leases = [task.lease for task in some_of_it]
            del aboard[: len(some_of_it)]
            fleet.tell(ResultsReceived(name, leases, leases, [1e-5] * len(leases)))
    assert [command.task for command in fleet.failed] == [guilty]
    assert fleet.machine.counts["succeeded"] == 999
    assert fleet.machine.counts["lost_attempts"] == 2
    assert died <= 8


def test_machines_that_die_for_reasons_of_their_own_come_to_an_end() -> None:
    """Each loss uses something up, whoever is aboard."""
    fleet = Fleet(2)
    fleet.submit(*some(20), *some(100, first=100, stats=quick()))
    for died in range(3000):
        names = [name for name, aboard in fleet.aboard.items() if aboard]
        if not names:
            break
        name = names[died % len(names)]
        fleet.tell(ResultsReceived(name, [0], [None], [0.1]))  # else it would be given up at last
        fleet.die(name)
    assert len(fleet.failed) == 120
    assert fleet.machine.open_tasks == 0


def test_suspects_that_come_back_unstarted_are_suspects_still() -> None:
    fleet = Fleet(1)
    tasks = some(2)
    fleet.submit(*tasks)
    fleet.die("w1")
    (task,) = fleet.aboard["w2"]
    fleet.aboard["w2"].clear()
    fleet.tell(LeasesReturned("w2", [task.lease]))
    assert fleet.aboard["w2"] == [task]
    fleet.aboard["w2"].clear()
    fleet.tell(FailuresReceived("w2", [(task.lease, Failure(FailureKind.SLOT_LOST))]))
    assert task.lost == 1
    assert fleet.aboard["w2"] == [task]


def test_out_of_memory_together_tries_larger_workers_and_then_alone() -> None:
    """A larger one costs no attempt; where there is none, each is given all that there is."""
    fleet = Fleet(1, size_count=2)
    tasks = some(4)
    fleet.submit(*tasks)
    fleet.die("w1", out_of_memory=True)
    assert [task.size for task in tasks] == [1] * 4
    assert len(fleet.aboard["w2"]) == 4
    fleet.die("w2", out_of_memory=True)
    assert not fleet.failed
    assert [len(aboard) for aboard in fleet.aboard.values()] == [1]


def test_workers_that_die_before_they_are_ready_blame_none_of_several() -> None:
    """Time and again, until the tasks have to show one by one who it is."""
    fleet = Fleet(1)
    fleet.coming = False
    tasks = some(4)
    fleet.submit(*tasks)
    for launch in range(1, 13):
        fleet.aboard[f"w{launch}"] = []
        fleet.tell(WorkerConnected(f"w{launch}", 4, str(launch)))
        fleet.tell(TasksStarted(f"w{launch}", []))
        if len(fleet.aboard[f"w{launch}"]) == 1:
            break
        fleet.die(f"w{launch}")
    assert launch == 12
    assert [task.lost for task in tasks] == [0] * 4
