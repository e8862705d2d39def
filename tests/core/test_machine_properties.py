"""Any history: the machine's invariants hold, and each future has one outcome, of its own lease."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from cloudexec._config import ScalingPolicy, ServerConfig, TaskOptions, WorkerCapacity
from cloudexec._core import commands, events, facts
from cloudexec._core.events import Event, Failure, FailureKind
from cloudexec._core.machine import Machine
from cloudexec._core.resources import Requirements, ResourceRequest, Resources
from cloudexec._core.tasks import TRANSITIONS, FunctionStats, Task, TaskState

GIB = 2**30
DATA = st.data()
SHARE = st.floats(0, 1)
KINDS = [
    FailureKind.SLOT_LOST,
    FailureKind.RAISED,
    FailureKind.KILLED,
    FailureKind.RECLAIMED,
    FailureKind.OUTGREW,
    FailureKind.TIMED_OUT,
    FailureKind.INPUT_LOST,
]


class Input:
    """Something large that tasks take."""

    def __init__(self, size: int, workers: set[str]) -> None:
        self.size = size
        self.workers = workers


class Traced(Task):
    """A task that sees that each of its states may follow the one before."""

    __slots__ = ("_state",)

    @property
    def state(self) -> TaskState:  # type: ignore[override]
        return self._state

    @state.setter
    def state(self, to: TaskState) -> None:
        before = getattr(self, "_state", None)
        if before is not None and before is not to:
            assert to in TRANSITIONS[before], f"a task went from {before} to {to}"
        self._state = to


class Future:
    """What is known of one task: who may answer for it, and what came of it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.outcome = ""
        self.lease = 0
        self.begun = 0


class Peer:
    """A worker: what it has, what of it has begun, and what it could not say while cut off."""

    def __init__(self, name: str, slots: int, launch: str) -> None:
        self.name = name
        self.slots = slots
        self.launch = launch
        self.ready = False
        self.cut = False
        self.draining = False
        self.is_alive = True
        self.is_reported = False
        self.is_closed = False
        self.leases: dict[int, Future] = {}
        self.begun: set[int] = set()
        self.unsaid: list[Event] = []


class History(RuleBasedStateMachine):
    """Rules are what may happen; the model of each future says what may come of it."""

    @initialize(
        slots=st.integers(1, 3),
        workers=st.integers(1, 4),
        size_count=st.sampled_from([1, 1, 2]),
        shared=st.booleans(),
        sized=st.booleans(),
        grace=st.sampled_from([0.0, 5.0]),
        most=st.sampled_from([None, None, 5]),
        lifetime=st.sampled_from([None, 20.0]),
        least=st.integers(0, 1),
    )
    def begin(
        self,
        slots: int,
        workers: int,
        size_count: int,
        shared: bool,
        sized: bool,
        grace: float,
        most: int | None,
        lifetime: float | None,
        least: int,
    ) -> None:
        sizes = tuple(WorkerCapacity(cpus=4, memory=4 * GIB << n) for n in range(size_count))
        scaling = ScalingPolicy(
            max_slots=slots * workers,
            min_slots=least,
            slots_per_worker=slots,
            idle_timeout=10.0,
            max_tasks_per_worker=most,
            max_worker_lifetime=lifetime,
            size_count=size_count,
            sizes=sizes if sized else (),
            one_machine=shared and sized and size_count == 1,
        )
        config = ServerConfig(scaling=scaling, lease_timeout=30.0, reconnect_grace=grace)
        self.machine = Machine(config)
        self.now = 0.0
        self.futures: dict[int, Future] = {}
        self.launches: dict[str, int] = {}
        self.peers: dict[str, Peer] = {}
        self.past: list[Event] = []
        self.asked: list[commands.JudgeFailure] = []
        self.finished = 0
        self.ghosts: dict[str, Peer] = {}  # lost, but their process or connection may be there
        self.lost: set[str] = set()
        self.closed: set[str] = set()
        quick = FunctionStats()
        for _ in range(50):
            quick.learn(1e-5)
        self.functions = [FunctionStats(), quick]
        self.inputs = [Input(10, set()), Input(1000, set())]
        self.requirements: list[Requirements | None] = [
            None,
            None,
            Requirements(TaskOptions(), (), 1, judged=True),
        ]
        if sized:
            whole = Resources.had_by(sizes[0])
            for cpus in (0.5, 3):
                need = Resources.of(cpus, GIB)
                fitting = slots if scaling.one_machine else need.times_in(whole)
                self.requirements.append(
                    Requirements(TaskOptions(), (ResourceRequest(need, 0, whole, fitting, need),))
                )

    # Events and commands.

    def tell(self, event: Event) -> None:
        answer = self.machine.handle(event, self.now)
        for fact in self.machine.take_facts():
            if isinstance(fact, facts.WorkerLost):
                self.lose(fact)
        for command in answer:
            self.obey(command)

    def lose(self, fact: facts.WorkerLost) -> None:
        """From now on, no result of this worker counts."""
        assert fact.worker not in self.lost, "a worker is lost twice"
        self.lost.add(fact.worker)
        peer = self.ghosts[fact.worker] = self.peers.pop(fact.worker)
        self.past += peer.unsaid
        for attempt in fact.attempts:
            self.futures[attempt.task.number].lease = 0

    def say(self, peer: Peer, event: Event) -> None:
        """Have a worker say something; while it is cut off, nobody hears it."""
        if peer.cut:
            peer.unsaid.append(event)
        else:
            self.past.append(event)
            self.tell(event)

    def end(self, task: Task, how: str) -> None:
        future = self.futures[task.number]
        assert not future.outcome, f"{task} has two outcomes: {future.outcome}, {how}"
        future.outcome = how

    def obey(self, command: commands.Command) -> None:
        if isinstance(command, commands.SendTasks):
            peer = self.peers[command.worker]
            assert not peer.cut, "a worker that is cut off got tasks"
            for task in command.tasks:
                future = self.futures[task.number]
                assert not future.outcome, f"{task} was sent after its outcome"
                assert task.lost <= task.retries, f"{task} was sent more often than it may be"
                future.lease = task.lease
                peer.leases[task.lease] = future
        elif isinstance(command, commands.ResolveTasks):
            for task, lease in zip(command.tasks, command.results, strict=True):
                assert lease == self.futures[task.number].lease, "a result of a lost lease"
                self.end(task, "result")
        elif isinstance(command, commands.FailTask):
            failure = command.failure
            blamed = failure.kind is FailureKind.WORKER_LOST and failure.suspects > 1
            assert not (blamed and command.task.retries), "one of several suspects is blamed"
            self.end(command.task, "failure")
        elif isinstance(command, (commands.FailTasksUnlaunched, commands.CancelTasks)):
            for task in command.tasks:
                self.end(task, "dropped")
        elif isinstance(command, commands.JudgeFailure):
            self.asked.append(command)
        elif isinstance(command, commands.LaunchWorker):
            self.launches[command.launch] = command.slots
        elif isinstance(command, commands.TerminateLaunch):
            if self.launches.pop(command.launch, None) is None:
                ended = [p for p in self.ghosts.values() if p.launch == command.launch]
                assert ended, "the process of a worker that is not lost is ended by force"
                assert all(p.name in self.closed for p in ended), "its session is not closed"
        elif isinstance(command, commands.CloseSession):
            assert command.worker not in self.closed, "a session is closed twice"
            assert command.worker in self.lost, "the session of a worker that is there is closed"
            self.closed.add(command.worker)
        elif isinstance(command, commands.DrainWorker):
            if command.worker in self.peers:
                self.peers[command.worker].draining = True
        elif isinstance(command, commands.Finish):
            self.finished += 1

    # Who is concerned.

    def pick(self, data: Any, entries: Any) -> Any:
        return data.draw(st.sampled_from(sorted(entries)))

    def peer(self, data: Any) -> Peer:
        return self.peers[self.pick(data, self.peers)]

    def talking(self) -> list[Peer]:
        """Return the workers whose messages are read, or will be once they are back."""
        return [p for p in self.peers.values() if not p.is_closed]

    def talker(self, data: Any) -> Peer:
        return self.peers[self.pick(data, [p.name for p in self.talking()])]

    def living(self) -> list[str]:
        """Return the workers whose process lives, and may connect again."""
        return [p.name for p in self.talking() if p.is_alive]

    def some(self, data: Any, entries: Any) -> list[Any]:
        entries = sorted(entries)
        if not entries:
            return []
        return data.draw(st.lists(st.sampled_from(entries), unique=True, max_size=8))  # type: ignore[no-any-return]

    # What users do.

    @rule(
        data=DATA,
        retries=st.integers(0, 2),
        count=st.sampled_from([1, 3, 20]),
        held=st.booleans(),
    )
    def submit(self, data: Any, retries: int, count: int, held: bool) -> None:
        if self.machine.shutting_down:
            return
        stats = data.draw(st.sampled_from(self.functions))
        requirements = data.draw(st.sampled_from(self.requirements))
        inputs = data.draw(st.sampled_from([(), (), tuple(self.inputs[:1]), tuple(self.inputs)]))
        batch: list[Task] = []
        for number in range(len(self.futures) + 1, len(self.futures) + 1 + count):
            task = Traced(number, stats, retries=retries, requirements=requirements, inputs=inputs)
            batch.append(task)
            self.futures[number] = Future(task)
        if held:
            self.tell(events.TasksBlocked(batch))
        else:
            self.tell(events.TasksSubmitted(batch))

    @precondition(lambda self: self.machine.blocked)
    @rule(data=DATA, drop=st.booleans())
    def release(self, data: Any, drop: bool) -> None:
        numbers = self.some(data, [task.number for task in self.machine.blocked])
        batch = [self.futures[number].task for number in numbers]
        if not drop:
            self.tell(events.TasksReleased(batch))
            return
        for task in batch:
            self.end(task, "dropped")
        self.tell(events.TasksDropped(batch))

    @precondition(lambda self: self.futures)
    @rule(data=DATA, how=st.sampled_from(["cancel", "kill", "recall"]))
    def cancel(self, data: Any, how: str) -> None:
        numbers = self.some(data, [n for n, f in self.futures.items() if not f.outcome])
        batch = [self.futures[number].task for number in numbers]
        if how == "recall":
            self.tell(events.TasksRecalled(batch))
            return
        for task in batch:
            self.end(task, "cancelled")
        self.tell(events.TasksCancelled(batch, kill=how == "kill"))

    @rule(
        share=SHARE,
        how=st.sampled_from(["wait", "cancel", "kill"]),
    )
    def shut_down(self, share: float, how: str) -> None:
        if share < 0.03:
            self.tell(events.ShutdownRequested(cancel=how != "wait", kill=how == "kill"))

    # What platforms do.

    @precondition(lambda self: self.launches)
    @rule(data=DATA, ready=st.booleans(), taken_over=st.booleans())
    def connect(self, data: Any, ready: bool, taken_over: bool) -> None:
        launch = self.pick(data, self.launches)
        slots = self.launches.pop(launch)
        name = f"w{launch}.{len(self.past)}"
        self.peers[name] = Peer(name, slots, launch)
        self.past.append(events.WorkerHeard(name))  # so that no name comes twice
        self.tell(events.WorkerConnected(name, slots, launch, taken_over=taken_over))
        if taken_over and name in self.peers:
            self.hand_over(data, self.peers[name])
        if ready and name in self.peers:
            self.peers[name].ready = True
            self.tell(events.WorkerReady(name))

    def hand_over(self, data: Any, peer: Peer) -> None:
        """Have a worker say that it has held tasks already, be it more than it can have."""
        free = [*self.machine.blocked, *self.machine.waiting_tasks()]
        batch = [self.futures[n].task for n in self.some(data, [t.number for t in free])]
        leases = [(1 << 40) + len(self.past) * 100 + n for n in range(len(batch))]
        self.tell(events.TasksTakenOver(peer.name, batch, leases))
        for task, lease in zip(batch, leases, strict=True):
            if task.lease == lease:
                future = self.futures[task.number]
                future.lease = lease
                peer.leases[lease] = future
        self.tell(events.WorkerBack(peer.name))

    @precondition(lambda self: self.launches)
    @rule(data=DATA, how=st.sampled_from(["fails", "fails", "is killed", "fatal", "refused"]))
    def launch_fails(self, data: Any, how: str) -> None:
        launch = self.pick(data, self.launches)
        if how == "refused":
            refused = list(self.launches)
            self.launches.clear()
            self.tell(events.LaunchesRefused(refused))
            self.machine._scaling.refusing = False  # or little would follow
            return
        del self.launches[launch]
        failed = events.ProcessEnded(
            launch, "no luck", fatal=how == "fatal", killed=how == "is killed"
        )
        self.tell(failed)

    @rule(seconds=st.sampled_from([0.0, 0.06, 1.0, 7.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for peer in self.peers.values():
            if not peer.cut and seconds > 1:
                self.tell(events.WorkerHeard(peer.name))
        deadline = self.machine.next_deadline()
        if deadline is not None and deadline <= self.now:
            self.tell(events.DeadlinePassed())

    # What workers do.

    @precondition(lambda self: self.talking())
    @rule(data=DATA)
    def is_ready(self, data: Any) -> None:
        peer = self.talker(data)
        if not peer.ready:
            peer.ready = True
            self.say(peer, events.WorkerReady(peer.name))

    @precondition(lambda self: any(p.ready and p.leases for p in self.talking()))
    @rule(data=DATA, share=SHARE, times=st.integers(1, 3))
    def work(self, data: Any, share: float, times: int) -> None:
        """Begin with the first ones, in order; answer for some, and say what is running."""
        peer = self.peers[self.pick(data, [p.name for p in self.talking() if p.ready])]
        for _ in range(times):
            waiting = [lease for lease in peer.leases if lease not in peer.begun]
            for lease in waiting[: peer.slots - len(peer.begun)]:
                future = peer.leases[lease]
                future.begun += 1
                assert future.task.retries or future.begun == 1, f"{future.task} ran twice"
                peer.begun.add(lease)
            done = sorted(peer.begun)[: round(share * len(peer.begun))]
            if done:
                self.give_up(peer, done)
                seconds = [0.00001 if share < 0.9 else 0.5] * len(done)
                self.say(peer, events.ResultsReceived(peer.name, done, done, seconds))
        if peer.begun:
            self.say(peer, events.TasksStarted(peer.name, sorted(peer.begun)))

    def give_up(self, peer: Peer, leases: list[int]) -> None:
        for lease in leases:
            del peer.leases[lease]
            peer.begun.discard(lease)

    @precondition(lambda self: any(p.begun for p in self.talking()))
    @rule(data=DATA, kind=st.sampled_from(KINDS), memory=st.booleans())
    def fail(self, data: Any, kind: FailureKind, memory: bool) -> None:
        peer = self.peers[self.pick(data, [p.name for p in self.talking() if p.begun])]
        lease = self.pick(data, peer.begun)
        if kind is FailureKind.INPUT_LOST:
            peer.leases[lease].begun -= 1  # it did not get that far
        self.give_up(peer, [lease])
        self.say(peer, events.FailuresReceived(peer.name, [(lease, Failure(kind, "", memory))]))

    @precondition(lambda self: self.talking())
    @rule(data=DATA)
    def hand_back(self, data: Any) -> None:
        peer = self.talker(data)
        leases = self.some(data, peer.leases.keys() - peer.begun)
        self.give_up(peer, leases)
        self.say(peer, events.LeasesReturned(peer.name, leases))

    @precondition(lambda self: self.talking())
    @rule(data=DATA)
    def drain(self, data: Any) -> None:
        peer = self.talker(data)
        peer.draining = True
        self.say(peer, events.WorkerDraining(peer.name))

    @precondition(lambda self: self.peers)
    @rule(data=DATA, how=st.sampled_from(["died", "reclaimed", "memory"]), again=st.booleans())
    def die(self, data: Any, how: str, again: bool) -> None:
        """Both ends of a worker are known at once."""
        peer = self.peer(data)
        known = self.machine.workers[peer.name]
        aboard = list(known.leases.values())
        lost = [task.lost for task in aboard]
        self.end_process(peer, how, again)
        self.tell(events.ConnectionEnded(peer.name, how))
        assert peer.name in self.closed, "a worker of which both ends are known is not lost"
        if how == "died" and len(aboard) > 1:
            blamed = [t for t, n in zip(aboard, lost, strict=True) if t.retries and t.lost > n]
            assert not blamed, f"of {aboard} aboard a lost worker, {blamed} are blamed"

    @precondition(lambda self: self.peers)
    @rule(data=DATA, how=st.sampled_from(["died", "reclaimed", "memory"]), again=st.booleans())
    def process_ends(self, data: Any, how: str, again: bool) -> None:
        """Its last messages may still arrive, or the connection has ended before."""
        self.end_process(self.peer(data), how, again)

    def end_process(self, peer: Peer, how: str, again: bool) -> None:
        peer.is_alive = False
        peer.is_reported = True
        again = again and how == "reclaimed"
        self.tell(
            events.ProcessEnded(
                peer.launch,
                how,
                reclaimed=how == "reclaimed",
                out_of_memory=how == "memory",
                relaunched=again,
            )
        )

    @precondition(lambda self: self.peers)
    @rule(data=DATA, may_report=st.sampled_from([True, True, False]))
    def connection_ends(self, data: Any, may_report: bool) -> None:
        """For good: with a goodbye, or because of what the worker has sent."""
        peer = self.peer(data)
        peer.is_closed = True
        self.tell(events.ConnectionEnded(peer.name, "ended", may_report=may_report))

    @precondition(lambda self: self.peers)
    @rule(data=DATA)
    def starts_again(self, data: Any) -> None:
        """The platform has started the worker elsewhere, and nobody knew."""
        peer = self.peer(data)
        peer.is_alive = False
        self.tell(events.WorkerRestarted(peer.name))
        assert peer.name in self.closed

    @precondition(lambda self: self.ghosts)
    @rule(data=DATA, what=st.sampled_from(["process", "connection", "cut", "back", "restart"]))
    def haunt(self, data: Any, what: str) -> None:
        """Something is learned of a worker that is lost or was given up."""
        peer = self.ghosts[self.pick(data, self.ghosts)]
        if what == "process":
            if peer.launch in self.launches or any(
                each.launch == peer.launch for each in self.peers.values()
            ):
                return  # it was started again, and this would be said of its next process
            self.tell(events.ProcessEnded(peer.launch, "died"))
        elif what == "back":
            self.tell(events.WorkerBack(peer.name))
        elif what == "restart":
            self.tell(events.WorkerRestarted(peer.name))
        else:
            cut = what == "cut"
            self.tell(events.ConnectionEnded(peer.name, what, may_return=cut))

    @precondition(lambda self: self.living())
    @rule(data=DATA)
    def cut_or_mend(self, data: Any) -> None:
        peer = self.peers[self.pick(data, self.living())]
        peer.cut = not peer.cut
        if peer.cut:
            self.tell(events.ConnectionEnded(peer.name, "cut", may_return=True))
            peer.is_closed = not self.machine.takes_back(peer.name)
            return
        self.tell(events.WorkerBack(peer.name))
        unsaid, peer.unsaid = peer.unsaid, []
        for event in unsaid:
            self.say(peer, event)

    @precondition(lambda self: self.past)
    @rule(data=DATA)
    def repeat(self, data: Any) -> None:
        """Something arrives that has arrived before, or of a worker that was given up."""
        event = data.draw(st.sampled_from(self.past))
        if isinstance(event, events.WorkerReady):
            return
        self.tell(event)

    @precondition(lambda self: self.asked)
    @rule(again=st.booleans())
    def judge(self, again: bool) -> None:
        asked = self.asked.pop(0)
        self.tell(events.FailureJudged(asked.worker, asked.task, asked.failure, again))

    @precondition(lambda self: self.machine.backing_off_tasks())
    @rule()
    def restore(self) -> None:
        judged = {asked.task.number for asked in self.asked}
        resting = [t for t in self.machine.backing_off_tasks() if t.number not in judged]
        self.tell(events.InputsRestored(resting))

    # What holds, always.

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "machine"):
            self.machine.validate()
            assert self.finished == self.machine.finished
            assert self.closed <= self.lost
            assert self.peers.keys() == self.machine.workers.keys()
            # The launches that are waited for, also those whose platform starts them again.
            self.launches = {each.id: each.slots for each in self.machine.launches.values()}
            for future in self.futures.values():
                done = future.task.state is TaskState.DONE
                assert done == bool(future.outcome), f"{future.task}: {future.outcome!r}"

    def teardown(self) -> None:
        """Be kind from now on: then everything comes to an end."""
        if not hasattr(self, "machine"):
            return
        self.tell(events.ShutdownRequested())
        for _ in range(3000):
            if self.machine.finished:
                break
            while self.asked:
                self.judge(again=False)
            self.restore()
            if self.machine.blocked:
                self.tell(events.TasksReleased(list(self.machine.blocked)))
            for launch in list(self.launches):
                if launch in self.launches:
                    slots = self.launches.pop(launch)
                    name = f"kind{launch}.{self.now}"
                    self.peers[name] = Peer(name, slots, launch)
                    self.tell(events.WorkerConnected(name, slots, launch))
            for peer in list(self.peers.values()):
                self.be_kind(peer)
            self.now += 1.0
            for name in list(self.peers):
                self.tell(events.WorkerHeard(name))
            self.tell(events.DeadlinePassed())
        ends = self.machine._ends
        while ends.workers or ends.processes:
            deadline = self.machine.next_deadline()
            assert deadline is not None, "an end is waited for for ever"
            self.now = max(self.now, deadline)
            self.tell(events.DeadlinePassed())
        assert self.closed == self.lost
        self.holds()
        assert self.machine.finished, "it does not come to an end"
        assert all(future.outcome for future in self.futures.values())

    def be_kind(self, peer: Peer) -> None:
        if peer.is_closed:
            return
        if peer.cut:
            peer.cut = False
            self.tell(events.WorkerBack(peer.name))
            for event in peer.unsaid:
                self.tell(event)
        leases = list(peer.leases)
        self.give_up(peer, leases)
        if leases:
            times = [0.1] * len(leases)
            self.tell(events.ResultsReceived(peer.name, leases, leases, times))
        elif peer.draining or self.machine.killing:
            self.tell(events.ProcessEnded(peer.launch, "ended"))
            self.tell(events.ConnectionEnded(peer.name, "ended"))


@pytest.mark.timeout(240)
def test_any_history_resolves_every_task_exactly_once() -> None:
    """Whatever is lost, repeated, late, cut off, cancelled or taken back."""
    often = settings(
        max_examples=100,
        stateful_step_count=60,
        deadline=None,
        suppress_health_check=list(HealthCheck),  # they are about time, and a busy machine
    )
    run_state_machine_as_test(History, settings=often)  # type: ignore[no-untyped-call]
