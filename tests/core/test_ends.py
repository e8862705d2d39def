"""All orders in which the ends of one worker can become known; each is played to its end."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import pytest
from endings import cut

from cloudexec._config import ScalingPolicy, ServerConfig
from cloudexec._core import commands, events, facts
from cloudexec._core.commands import CloseSession, TerminateLaunch, TerminateWorker
from cloudexec._core.events import (
    ConnectionEnded,
    DeadlinePassed,
    Event,
    ProcessEnded,
    ResultsReceived,
    ShutdownRequested,
    TasksSubmitted,
    WorkerBack,
    WorkerConnected,
    WorkerDraining,
    WorkerReady,
    WorkerRestarted,
)
from cloudexec._core.machine import Machine
from cloudexec._core.tasks import FunctionStats, Task, TaskState
from cloudexec._core.workers import Stage

GRACE, SILENCE, REPORT = 30.0, 60.0, 10.0


class Life:
    """One worker with two tasks, of which one may run once only, and what became of them."""

    def __init__(self, *, taken_over: bool = False, ready: bool = True) -> None:
        scaling = ScalingPolicy(max_slots=2, slots_per_worker=2, launch_timeout=1e6)
        self.machine = Machine(
            ServerConfig(
                scaling=scaling,
                lease_timeout=SILENCE,
                reconnect_grace=GRACE,
                last_words=REPORT,
            )
        )
        self.now = 0.0
        self.given: Counter[str] = Counter()
        self.outcomes: Counter[int] = Counter()
        self.lost: list[facts.WorkerLost] = []
        self.has_ended = False  # whether it is known that no process of the launch lives
        stats = FunctionStats()
        self.tasks = [Task(1, stats, retries=2), Task(2, stats, retries=0)]
        self.tell(TasksSubmitted(self.tasks))
        self.tell(WorkerConnected("w", 2, "1", taken_over=taken_over))
        if ready:
            self.tell(WorkerReady("w"))
        self.leases = [task.lease for task in self.tasks]
        self.is_ready = ready

    def tell(self, event: Event) -> list[Any]:
        answer = self.machine.handle(event, self.now)
        told = [each for each in self.machine.take_facts() if isinstance(each, facts.WorkerLost)]
        self.lost += [fact for fact in told if fact.worker == "w"]
        for command in answer:
            self.note(command)
        self.machine.validate()
        return answer

    def note(self, command: Any) -> None:
        if isinstance(command, (CloseSession, TerminateWorker)) and command.worker == "w":
            self.given[type(command).__name__] += 1
        elif isinstance(command, TerminateLaunch) and command.launch == "1":
            assert "w" not in self.machine.workers, "the process of a worker that is there is ended"
            assert not self.has_ended, "a process is ended that is known to have ended"
            self.given["TerminateLaunch"] += 1
        elif isinstance(command, (commands.ResolveTasks, commands.CancelTasks)):
            self.outcomes.update(task.number for task in command.tasks)
        elif isinstance(command, commands.FailTask):
            self.outcomes[command.task.number] += 1

    @property
    def is_open(self) -> bool:
        """Whether anything is waited for."""
        return bool(self.machine._ends.workers or self.machine._ends.processes)

    @property
    def worker(self) -> Any:
        return self.machine._ends.workers.get("w")

    # What may happen.

    def cut(self) -> None:
        self.tell(cut("w"))

    def close(self) -> None:
        self.tell(ConnectionEnded("w", "it has ended"))

    def fail(self) -> None:
        self.tell(ConnectionEnded("w", "it sent a malformed message", unheard=True))

    def close_late(self) -> None:
        self.tell(ConnectionEnded("w", "it has ended", may_report=False))

    def end(self) -> None:
        self.has_ended = True
        self.tell(ProcessEnded("1", "killed"))

    def end_to_start_again(self) -> None:
        if not self.has_ended:
            self.tell(ProcessEnded("1", "taken back", reclaimed=True, relaunched=True))

    def start_again(self) -> None:
        if not self.has_ended:
            self.tell(WorkerRestarted("w"))
            assert self.worker is None, "the earlier process is waited for"

    def come_back(self) -> None:
        self.tell(WorkerBack("w"))

    def kill(self) -> None:
        self.tell(ShutdownRequested(cancel=True, kill=True))

    def shut_down(self) -> None:
        self.tell(ShutdownRequested())

    def drain(self) -> None:
        self.tell(WorkerDraining("w"))

    def answer(self) -> None:
        self.tell(ResultsReceived("w", self.leases, [b""] * 2, [0.1] * 2))

    def fall_silent(self) -> None:
        self.now += SILENCE
        self.tell(DeadlinePassed())

    def wait(self) -> None:
        deadline = self.machine.next_deadline()
        if deadline is not None:
            self.now = max(self.now, deadline)
            self.tell(DeadlinePassed())

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while (deadline := self.machine.next_deadline()) is not None and deadline <= until:
            self.wait()
        self.now = until

    # What is to be compared and checked.

    def state(self) -> Any:
        """Return what decides about all that follows, with times relative to the present."""
        machine, worker = self.machine, self.worker

        def rest(at: float | None) -> float | None:
            return None if at is None else round(at - self.now, 3)

        of_worker = worker and (
            worker.stage,
            worker.report,
            worker.state,
            worker.reclaimed,
            worker.told_at is not None,
            # What it was last heard of does not matter once there is a deadline.
            rest(worker.until or worker.cut_at or worker.heard_at),
            "w" in machine.workers,
        )
        return repr(
            (
                of_worker,
                {launch: rest(at) for launch, at in machine._ends.processes.items()},
                "1" in machine.launches,
                machine.shutting_down,
                machine.killing,
                machine.finished,
                self.has_ended,
                self.given["CloseSession"],
                self.given["TerminateLaunch"],
                [task.state for task in self.tasks],
            )
        )

    def play_to_its_end(self) -> None:
        """Let only the time pass, and check what has become of the worker and its tasks."""
        for _ in range(50):
            if not self.is_open:
                break
            assert self.machine.next_deadline() is not None, "no deadline is set"
            self.wait()
        assert self.worker is None, "the worker is waited for for ever"
        assert not self.machine._ends.processes, "a process is waited for for ever"
        assert len(self.lost) == 1, "the worker was not lost exactly once"
        assert self.given["CloseSession"] == 1, "its session was not closed exactly once"
        expected = "1" in self.machine.launches
        may_live = not self.has_ended and not expected
        assert self.given["TerminateLaunch"] >= may_live, "its process may live on"
        assert self.given["TerminateLaunch"] <= 1, "its process was ended twice"
        told = [attempt.task for attempt in self.lost[0].attempts]
        for task in self.tasks:
            outcomes, is_open = self.outcomes[task.number], task.state is not TaskState.DONE
            assert outcomes + is_open == 1, f"{task} has {outcomes} outcomes"
            if is_open and self.leases[0]:
                assert task in told, f"{task} has not come back"
                assert task.worker != "w", f"{task} is on a worker that is lost"
        if self.leases[0] and self.is_ready:
            once = self.tasks[1]
            assert once.state is TaskState.DONE, "a task that may run once waits to run again"


STEPS: list[Callable[[Life], None]] = [
    Life.cut,
    Life.close,
    Life.close_late,
    Life.end,
    Life.end_to_start_again,
    Life.start_again,
    Life.come_back,
    Life.kill,
    Life.shut_down,
    Life.drain,
    Life.answer,
    Life.fall_silent,
    Life.wait,
]


@pytest.mark.parametrize("how", [{}, {"ready": False}, {"taken_over": True}])
def test_in_every_order_a_worker_is_lost_once_and_nothing_is_waited_for_for_ever(
    how: dict[str, bool],
) -> None:
    """All steps in all orders: what leads to a state that was seen before is not gone on with."""
    seen: set[str] = set()
    stages: set[Stage] = set()
    paths: deque[tuple[Callable[[Life], None], ...]] = deque([()])
    while paths:
        path = paths.popleft()
        life, was_open = Life(**how), True
        try:
            for step in path:
                was_open = life.is_open
                step(life)
            state = life.state()
            if life.worker is not None:
                stages.add(life.worker.stage)
            life.play_to_its_end()
        except (AssertionError, RuntimeError, KeyError) as exc:
            pytest.fail(f"after {[step.__name__ for step in path]}: {type(exc).__name__}: {exc}")
        # After all is over, one further step shows that nothing follows.
        if state not in seen and was_open:
            seen.add(state)
            paths += [(*path, step) for step in STEPS]
    assert stages == set(Stage) - {Stage.LOST}
    assert len(seen) > 50


@pytest.mark.parametrize("first", [Life.end_to_start_again, Life.close])
def test_a_worker_that_is_started_again_is_a_worker_like_others(
    first: Callable[[Life], None],
) -> None:
    """What was waited for because of its earlier process does not end the new one."""
    life = Life()
    first(life)
    life.start_again()
    assert life.machine.launches.keys() == {"1"}
    (sent,) = [
        each
        for each in life.tell(WorkerConnected("again", 2, "1"))
        if isinstance(each, commands.SendTasks)
    ]
    assert (sent.worker, list(sent.tasks)) == ("again", life.tasks[:1])
    for _ in range(20):
        life.pass_time(1.0)
        life.tell(events.WorkerHeard("again"))
    assert life.given["TerminateLaunch"] == 0
    assert life.machine.workers.keys() == {"again"}


def test_a_process_that_was_started_again_and_is_not_wanted_any_more_is_ended() -> None:
    """Its earlier one was given up before, so that no worker of this launch is expected."""
    life = Life()
    life.fall_silent()
    life.end_to_start_again()
    life.close()
    assert life.worker is None
    assert life.given["TerminateLaunch"] == 0
    life.pass_time(2.0)
    assert life.given["TerminateLaunch"] == 1


def test_no_task_is_sent_where_an_end_is_known() -> None:
    """Neither end alone tells that the worker is lost, but each that it runs nothing more."""
    for step in (Life.end, Life.close):
        life = Life()
        step(life)
        more = [Task(3, FunctionStats())]
        answer = life.tell(TasksSubmitted(more))
        assert [type(each) for each in answer] == [], step
        assert life.lost == []


@pytest.mark.parametrize("stage", [Life.end, Life.close])
def test_the_first_end_is_waited_for_before_the_cause_is_told(stage: Any) -> None:
    """So that the failure says what the launcher has said, whatever came first."""
    life = Life()
    stage(life)
    (Life.close if stage is Life.end else Life.end)(life)
    assert [fact.reason for fact in life.lost] == ["killed"]


def test_an_end_that_is_not_reported_has_the_reason_of_the_connection() -> None:
    """After ``last_words``; the process is ended by force two seconds later."""
    life = Life()
    life.close()
    assert life.machine.next_deadline() == REPORT
    life.pass_time(REPORT)
    assert [fact.reason for fact in life.lost] == ["it has ended"]
    life.pass_time(1.9)
    assert life.given["TerminateLaunch"] == 0
    life.pass_time(0.1)
    assert life.given["TerminateLaunch"] == 1


def test_what_a_worker_said_before_its_connection_hangs_may_be_lost() -> None:
    """A task that may run once counts as begun, though the worker is not known to be ready."""
    life = Life(ready=False)
    life.end()
    life.pass_time(4.9)
    assert life.outcomes[2] == 0
    life.pass_time(0.1)
    assert life.outcomes[2] == 1
    life = Life(ready=False)
    life.end()
    life.close()
    assert life.outcomes[2] == 0


@pytest.mark.parametrize(
    "steps",
    [
        (Life.end, Life.cut),
        (Life.cut, Life.end),
        (Life.end, Life.fail),
        (Life.fail, Life.end),
        (Life.drain, Life.cut, Life.end),
        (Life.drain, Life.fail),
    ],
    ids=lambda steps: " ".join(step.__name__ for step in steps),
)
def test_what_a_worker_said_before_its_connection_fails_may_be_lost(steps: Any) -> None:
    """In whatever order both ends are learnt."""
    life = Life(ready=False)
    for step in steps:
        step(life)
    life.play_to_its_end()
    assert life.outcomes[2] == 1
    assert life.outcomes[1] == 0


@pytest.mark.parametrize("step", [Life.end, Life.end_to_start_again])
def test_the_last_messages_of_a_process_that_has_ended_count(step: Any) -> None:
    """As long as its connection lasts; no task of a worker that has answered runs again."""
    life = Life()
    step(life)
    life.answer()
    life.close()
    assert life.machine.counts["succeeded"] == 2
    assert [fact.attempts for fact in life.lost] == [[]]


def test_a_worker_whose_connection_has_ended_for_good_is_not_taken_back() -> None:
    """Be it that the connection was cut before."""
    life = Life()
    life.cut()
    assert life.machine.takes_back("w")
    life.close()
    assert not life.machine.takes_back("w")
    life.come_back()
    assert life.machine.counts["workers_back"] == 0
    life.pass_time(REPORT)
    assert [fact.reason for fact in life.lost] == ["it has ended"]
