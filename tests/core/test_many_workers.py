"""What an event costs does not grow with the number of workers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from endings import cut, ends_of

import cloudexec._core
from cloudexec._config import ScalingPolicy, ServerConfig
from cloudexec._core.commands import DrainWorker, LaunchWorker, SendTasks
from cloudexec._core.events import (
    DeadlinePassed,
    Event,
    ResultsReceived,
    ShutdownRequested,
    TasksSubmitted,
    WorkerBack,
    WorkerConnected,
    WorkerDraining,
    WorkerHeard,
)
from cloudexec._core.machine import Machine
from cloudexec._core.tasks import FunctionStats, Task

FEW, MANY = 50, 800
_CORE = str(Path(cloudexec._core.__file__).parent)


class Crowd:
    """A machine with many workers, and how many lines of the core it has gone through."""

    def __init__(self, workers: int, *, connected: bool = True) -> None:
        policy = ScalingPolicy(max_slots=workers, min_slots=workers, slots_per_worker=1)
        self.machine = Machine(ServerConfig(scaling=policy))
        self.now = 0.0
        self.lines = 0
        commands = self.machine.handle(DeadlinePassed(), 0.0)
        self.launches = [each.launch for each in commands if isinstance(each, LaunchWorker)]
        self.names = [f"worker-{launch}" for launch in self.launches]
        if connected:
            for event in self.arrivals():
                self.machine.handle(event, 0.0)

    def arrivals(self) -> Iterator[Event]:
        for launch, name in zip(self.launches, self.names, strict=True):
            yield WorkerConnected(name, 1, launch)

    def handle(self, event: Event) -> list[Any]:
        self.now += 0.001

        def count(frame: FrameType, event: str, _: Any) -> Any:
            if frame.f_code.co_filename.startswith(_CORE):
                self.lines += event == "line"
                return count
            return None

        before = sys.gettrace()
        sys.settrace(count)
        try:
            return self.machine.handle(event, self.now)
        finally:
            sys.settrace(before)


def arrive(workers: int) -> Crowd:
    crowd = Crowd(workers, connected=False)
    for event in crowd.arrivals():
        crowd.handle(event)
    return crowd


def work(workers: int) -> Crowd:
    crowd = Crowd(workers)
    stats = FunctionStats()
    for number in range(workers):
        sent = crowd.handle(TasksSubmitted([Task(number, stats)]))
        for command in sent:
            if isinstance(command, SendTasks):
                leases = [task.lease for task in command.tasks]
                crowd.handle(ResultsReceived(command.worker, leases, [b""], [0.1]))
    assert crowd.machine.counts["succeeded"] == workers
    return crowd


def beat(workers: int) -> Crowd:
    crowd = Crowd(workers)
    for name in crowd.names:
        crowd.handle(WorkerHeard(name))
    return crowd


def cut_and_back(workers: int) -> Crowd:
    crowd = Crowd(workers)
    for name in crowd.names:
        crowd.handle(cut(name))
    for name in crowd.names:
        crowd.handle(WorkerBack(name))
    return crowd


def lose(workers: int) -> Crowd:
    crowd = Crowd(workers)
    for name in crowd.names:
        crowd.handle(cut(name))
    crowd.now += 100.0
    crowd.handle(DeadlinePassed())
    assert crowd.machine.counts["workers_lost"] == workers
    return crowd


def end(workers: int) -> Crowd:
    crowd = Crowd(workers)
    told = crowd.handle(ShutdownRequested())
    assert sum(isinstance(command, DrainWorker) for command in told) == workers
    for name in crowd.names:
        crowd.handle(WorkerDraining(name))
    for name in crowd.names:
        for event in ends_of(crowd.machine, name, "it has ended"):
            crowd.handle(event)
    assert crowd.machine.finished
    return crowd


@pytest.mark.parametrize("play", [arrive, work, beat, cut_and_back, lose, end])
def test_an_event_costs_the_same_among_few_workers_and_many(play: Callable[[int], Crowd]) -> None:
    """Counted in lines of the core that run, which no other program's load can change."""
    few, many = play(FEW).lines / FEW, play(MANY).lines / MANY
    assert many <= 1.5 * few + 5


def test_workers_that_are_due_one_after_the_other_are_looked_at_together() -> None:
    """A look goes through all of them: it is taken now and then, not for each."""
    crowd = Crowd(MANY)
    for number, name in enumerate(crowd.names):
        crowd.machine.handle(cut(name), number * 0.0005)
    looks = 0
    while crowd.machine.counts["workers_lost"] < MANY:
        deadline = crowd.machine.next_deadline()
        assert deadline is not None
        crowd.machine.handle(DeadlinePassed(), deadline)
        crowd.machine.validate()
        looks += 1
    # They were cut within 0.4 s, and a look at all 800 comes 8 ms after another at the earliest.
    assert looks <= MANY / 3
