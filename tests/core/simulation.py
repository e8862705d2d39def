"""Simulates workers, a network, a launcher and users around the core's machine, on one clock.

The machine is the real one. All else is random and follows from one seed: what tasks do, which
workers crash, hang, are slow or are taken back, which connections are cut and for how long, and
which messages are late. The same seed gives the same history, so ``CLOUDEXEC_SEED=n`` repeats a
failure.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from cloudexec._config import (
    RetryPolicy,
    ScalingPolicy,
    ServerConfig,
    TaskOptions,
    WorkerCapacity,
)
from cloudexec._core import commands, events, facts
from cloudexec._core.events import Event, Failure, FailureKind
from cloudexec._core.machine import Machine
from cloudexec._core.resources import Requirements, ResourceRequest, Resources
from cloudexec._core.tasks import FunctionStats, Task, TaskState
from cloudexec._core.workers import WorkerState

__all__ = ["Simulation", "Wrong"]

GIB = 2**30
_ENDS = (
    "raises",
    "kills its slot",
    "kills its worker",
    "kills its worker",
    "hangs",
    "grows",
    "misses its input",
)
_PATIENCE = 3.0
"""Seconds that a worker may be idle while tasks wait that it could run."""


class Wrong(AssertionError):
    """The machine broke one of its promises."""


@dataclass(eq=False)
class Call:
    """What a task does in each of its runs."""

    seconds: float = 0.01
    ends: str = "returns"
    """How a run ends: the task returns, raises, kills its slot or its worker, hangs, uses too much
    memory, or lacks its input."""
    times: int = 1 << 30
    """Number of runs that end like this; later runs return."""
    runs: int = 0
    outcome: str = ""
    leases: set[int] = field(default_factory=set)
    """Leases under which a result of the task may arrive."""

    @property
    def innocent(self) -> bool:
        return self.ends == "returns"


@dataclass(eq=False)
class Input:
    """A large object that tasks take as an argument."""

    size: int
    workers: set[str]


class Link:
    """Delivers messages in order, with delays; after a cut, messages that were under way arrive."""

    def __init__(self, world: Simulation) -> None:
        self._world = world
        self.cut = False
        self.dead = False
        self._free_at = 0.0
        self._stuck: list[Callable[[], None]] = []

    def carry(self, deliver: Callable[[], None]) -> None:
        if self.cut:
            self._stuck.append(deliver)
            return
        world = self._world
        self._free_at = max(self._free_at, world.now + world.delay())
        world.at(self._free_at, lambda: self._arrive(deliver))

    def _arrive(self, deliver: Callable[[], None]) -> None:
        if self.cut:
            self._stuck.append(deliver)
        elif not self.dead:
            deliver()

    def mend(self) -> None:
        self.cut = False
        stuck, self._stuck = self._stuck, []
        for deliver in stuck:
            self.carry(deliver)


class SimulatedWorker:
    """A worker's process: takes messages, runs tasks in its slots, answers in batches."""

    def __init__(self, world: Simulation, name: str, slots: int, launch: str) -> None:
        self.world = world
        self.name = name
        self.slots = slots
        self.launch = launch
        self.down = Link(world)
        self.up = Link(world)
        self.alive = True
        self.hung = False
        self.ready = False
        self.draining = False
        self.queue: list[tuple[int, Task]] = []
        self.running: dict[int, Task] = {}
        self.results: list[tuple[int, float]] = []
        self.failures: list[tuple[int, Failure]] = []
        self.returned: list[int] = []
        self.started: list[int] = []
        self.flushing = False
        self.noticed_at = 0.0
        self.pace = world.random.choice([1.0, 1.0, 1.0, 3.0])

    # Messages of the client.

    def take(self, tasks: list[tuple[int, Task]]) -> None:
        if self.draining:
            self.returned += [lease for lease, _ in tasks]
            self.answer()
            return
        self.queue += tasks
        self.begin()

    def recall(self, leases: list[int]) -> None:
        waiting = {lease for lease, _ in self.queue}
        given = [lease for lease in leases if lease in waiting]
        self.queue = [entry for entry in self.queue if entry[0] not in given]
        self.returned += given
        self.answer()

    def kill(self, leases: list[int]) -> None:
        self.recall(leases)
        for lease in leases:
            if self.running.pop(lease, None) is not None:
                self.failures.append((lease, Failure(FailureKind.KILLED)))
        self.answer()
        self.begin()

    def drain(self) -> None:
        self.draining = True
        self.returned += [lease for lease, _ in self.queue]
        self.queue = []
        self.answer()
        self.end_if_done()

    def end_if_done(self) -> None:
        if self.alive and self.draining and not self.running and not self.flushing:
            self.end("it drained")

    # The worker's own actions.

    def start(self) -> None:
        self.beat()
        self.world.after(self.world.random.uniform(0, 0.5), self.be_ready)

    def be_ready(self) -> None:
        if self.alive:
            self.ready = True
            # Sent before any task begins, so that this message arrives first.
            self.up.carry(lambda: self.world.tell(events.WorkerReady(self.name)))
            self.begin()

    def beat(self) -> None:
        if self.alive:
            if not self.hung:
                self.up.carry(lambda: self.world.tell(events.WorkerHeard(self.name)))
            self.world.after(self.world.machine.config.lease_timeout / 6, self.beat)

    def begin(self) -> None:
        while self.ready and self.alive and self.queue and len(self.running) < self.slots:
            lease, task = self.queue.pop(0)
            self.running[lease] = task
            call: Call = task.handle
            self.world.begins(self, lease, task)
            seconds = call.seconds * self.pace
            if seconds > 0.002:
                self.started.append(lease)
                self.answer()
            if call.ends == "hangs" and call.runs <= call.times:
                continue
            self.world.after(seconds, lambda lease=lease, task=task: self.finish(lease, task))  # type: ignore[misc]

    def finish(self, lease: int, task: Task) -> None:
        if not self.alive or self.running.get(lease) is not task:
            return
        call: Call = task.handle
        ends = call.ends if call.runs <= call.times else "returns"
        if ends == "kills its worker":
            self.end("killed by its task")
            return
        if ends == "grows" and self.world.grows_too_far(self, task):
            self.end("out of memory", out_of_memory=True)
            return
        del self.running[lease]
        if ends == "raises":
            self.failures.append((lease, Failure(FailureKind.RAISED, "boom")))
        elif ends == "kills its slot":
            self.failures.append((lease, Failure(FailureKind.SLOT_LOST)))
        elif ends == "misses its input":
            self.failures.append((lease, Failure(FailureKind.INPUT_LOST)))
        else:
            self.results.append((lease, call.seconds * self.pace))
        self.answer()
        self.begin()

    def answer(self) -> None:
        """Send all collected answers after a short delay."""
        if not self.flushing:
            self.flushing = True
            self.world.after(self.world.random.choice([0.0, 0.001, 0.01]), self.flush)

    def flush(self) -> None:
        self.flushing = False
        if not self.alive:
            return
        world, name = self.world, self.name
        said: list[Event] = []
        if self.started:
            said.append(events.TasksStarted(name, self.started))
        if self.results:
            leases = [lease for lease, _ in self.results]
            times = [seconds for _, seconds in self.results]
            said.append(events.ResultsReceived(name, leases, leases, times))
        if self.failures:
            said.append(events.FailuresReceived(name, self.failures))
        if self.returned:
            said.append(events.LeasesReturned(name, self.returned))
        self.started, self.results, self.failures, self.returned = [], [], [], []
        for event in said:
            self.up.carry(lambda event=event: world.tell(event))  # type: ignore[misc]
            if world.random.random() < world.echoes:
                self.up.carry(lambda event=event: world.tell(event))  # type: ignore[misc]
        self.end_if_done()

    # Events that happen to the worker.

    def end(self, reason: str, *, out_of_memory: bool = False, reclaimed: bool = False) -> None:
        """End at once; unsent answers are lost, and the client learns of the end later."""
        if not self.alive:
            return
        self.alive = False
        world = self.world
        world.living.pop(self.name, None)
        world.ended(self)
        relaunched = reclaimed and world.random.random() < 0.3
        ended = events.ProcessEnded(
            self.launch,
            reason,
            reclaimed=reclaimed,
            out_of_memory=out_of_memory,
            relaunched=relaunched,
        )
        if world.scattered:
            self._end_scattered(ended)
            return

        def learn() -> None:
            again = relaunched and self.name in world.machine.workers
            again = again and not world.machine.shutting_down
            world.tell(ended)
            world.tell(events.ConnectionEnded(self.name, reason))
            if again and self.launch in world.machine.launches:
                world.come(self.launch, self.slots)

        if self.up.cut:
            # The client cannot see the stream end. Either the launcher reports the worker's end,
            # which counts once the cut was noticed, or the grace passes.
            if not self.hung and world.random.random() < 0.5:
                said = world.now + world.random.uniform(0.1, 5.0)
                world.at(max(said, self.noticed_at), learn)
        else:
            self.up.carry(learn)

    def _end_scattered(self, ended: events.ProcessEnded) -> None:
        """Let the client learn of both ends at different times, in any order, or never of one."""
        world, r = self.world, self.world.ends
        said = world.now + r.choice([0.0, r.uniform(0.0, 0.2), r.uniform(0.0, 8.0)])
        is_said = ended.relaunched or r.random() < 0.8

        def say() -> None:
            if self.launch in world.pending or world.worker_of(self.launch) not in (None, self):
                return  # it is started again: a platform does not report an earlier process then
            world.tell(ended)
            for _ in range(r.choice([0, 0, 1])):
                world.tell(ended)

        if is_said:
            world.at(said, say)
        if not self.up.cut:
            may_return = r.random() < 0.3
            seen = events.ConnectionEnded(self.name, "its connection ended", may_return)
            self.up.carry(lambda: world.after(r.choice([0.0, 0.0, 2.0]), lambda: world.tell(seen)))
        if ended.relaunched:
            world.after(r.uniform(0.1, 9.0), lambda: world.come(self.launch, self.slots))

    def cut(self, seconds: float) -> None:
        world = self.world
        if not self.alive or self.up.cut:
            return
        self.up.cut = self.down.cut = True
        noticed = world.random.uniform(0.0, 2.0)
        self.noticed_at = world.now + noticed
        for_good = world.scattered and world.ends.random() < 0.1

        def notice() -> None:
            # A worker that sent something wrong may not return.
            ended = events.ConnectionEnded(self.name, "cut", not for_good, unheard=True)
            world.tell(ended)

        world.at(self.noticed_at, notice)
        world.after(max(seconds, noticed + 0.01), self.mend)

    def mend(self) -> None:
        if not self.alive:
            return
        world = self.world
        if self.name not in world.machine.workers or not world.machine.takes_back(self.name):
            if world.scattered and world.ends.random() < 0.5:
                world.tell(events.WorkerBack(self.name))
            self.end("told that it came too late")
            return
        world.tell(events.WorkerBack(self.name))
        self.up.mend()
        self.down.mend()


class Simulation:
    """One simulated history.

    Args:
        seed: The seed of all random choices.
        scattered: Whether the ends of a worker's connection and process are learned of separately;
            ``None`` to choose at random.
    """

    def __init__(self, seed: int, scattered: bool | None = None) -> None:
        self.seed = seed
        # What has to do with ends has random choices of its own, so that all others are the same
        # whether ends are scattered or not.
        self.ends = random.Random(seed + 1_000_003)
        self.scattered = self.ends.random() < 0.7 if scattered is None else scattered
        r = self.random = random.Random(seed)
        self.now = 0.0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self.slots_per_worker = r.choice([1, 1, 2, 4, 20])
        self.echoes = r.choice([0.0, 0.0, 0.2])
        self.slow = r.choice([0.0005, 0.005, 0.2])
        self.outside = r.choice([False, True])
        """Whether workers also die for reasons that no task causes."""
        self.calm_at = r.choice([20.0, 90.0])
        size_count = r.choice([1, 1, 3])
        sizes = tuple(WorkerCapacity(cpus=8, memory=8 * GIB << n) for n in range(size_count))
        self.rich = r.random() < 0.4
        scaling = ScalingPolicy(
            max_slots=self.slots_per_worker * r.choice([1, 2, 2, 5]),
            slots_per_worker=self.slots_per_worker,
            min_slots=r.choice([0, 0, 1]),
            idle_timeout=r.choice([1.0, 10.0, None]),
            launch_timeout=20.0,
            max_tasks_per_worker=r.choice([None, None, None, 30]),
            max_worker_lifetime=r.choice([None, None, 15.0]),
            size_count=size_count,
            sizes=sizes if self.rich or r.random() < 0.5 else (),
            one_machine=self.rich and size_count == 1 and r.random() < 0.5,
        )
        config = ServerConfig(
            scaling=scaling,
            retry=RetryPolicy(launch_failures=1000),
            lease_timeout=6.0,
            reconnect_grace=r.choice([0.0, 5.0, 5.0]),
            last_words=self.ends.choice([0.0, 0.1, 4.0]),
        )
        self.machine = Machine(config)
        self.living: dict[str, SimulatedWorker] = {}
        self.workers: dict[str, SimulatedWorker] = {}
        self.pending: set[str] = set()
        self.tasks: list[Task] = []
        self.inputs = [Input(r.choice([0, 10, 1000]), set()) for _ in range(3)]
        self.functions = [FunctionStats() for _ in range(3)]
        self.finished = 0
        self.counts: Counter[str] = Counter()
        self._task_numbers = itertools.count(1)
        self._worker_numbers = itertools.count(1)
        self._timer = float("inf")
        self._idle_since: dict[str, float] = {}
        self.steps = 0
        self._drained: set[str] = set()
        self._lost: set[str] = set()
        self._closed: set[str] = set()
        self._busy_until = 0.0
        self._gone: dict[str, list[Event]] = {}
        self.requirements = self._some_requirements()

    # The clock.

    def at(self, when: float, do: Callable[[], None]) -> None:
        heapq.heappush(self._queue, (when, next(self._numbers), do))

    def after(self, seconds: float, do: Callable[[], None]) -> None:
        self.at(self.now + seconds, do)

    def delay(self) -> float:
        return self.random.expovariate(1 / self.slow)

    def run(self) -> None:
        """Run the history to its end.

        Raises:
            Wrong: If the machine breaks a promise.
        """
        self._plan()
        limit = self.calm_at + 3000.0
        while self._queue:
            self.now, _, do = heapq.heappop(self._queue)
            if self.now > limit:
                raise Wrong(f"not finished after {limit:g} s: {self._state()}")
            if self.finished and not self.living and not self.ends_are_open():
                break
            do()
        self._judge()

    # The machine.

    def tell(self, event: Event) -> None:
        if self.finished and not isinstance(
            event,
            (
                events.ConnectionEnded,
                events.ProcessEnded,
                events.WorkerRestarted,
                events.WorkerBack,
                events.WorkerHeard,
                events.DeadlinePassed,
            ),
        ):
            return
        if isinstance(event, events.WorkerDraining):
            self._drained.add(event.worker)
        answer = self.machine.handle(event, self.now)
        for fact in self.machine.take_facts():
            if isinstance(fact, facts.WorkerLost):
                self._lose(fact)
        for command in answer:
            self._obey(command)
        self.steps += 1
        if self.steps % 8 == 0 or self.steps < 200:
            self.machine.validate()
        self._look_at_the_idle()
        deadline = self.machine.next_deadline()
        if deadline is not None and deadline < self._timer:
            self._timer = deadline
            self.at(max(deadline, self.now), self._ring)

    def _ring(self) -> None:
        self._timer = float("inf")
        deadline = self.machine.next_deadline()
        if deadline is None:
            return
        if deadline <= self.now:
            self.tell(events.DeadlinePassed())
        else:
            self._timer = deadline
            self.at(deadline, self._ring)

    def _lose(self, fact: facts.WorkerLost) -> None:
        """Expect no more results of a worker's tasks."""
        if fact.worker in self._lost:
            raise Wrong(f"{fact.worker} was lost twice")
        self._lost.add(fact.worker)
        for attempt in fact.attempts:
            call: Call = attempt.task.handle
            call.leases.discard(attempt.lease)

    def worker_of(self, launch: str) -> SimulatedWorker | None:
        """Return the last worker of a launch."""
        return next((w for w in reversed(self.workers.values()) if w.launch == launch), None)

    def ends_are_open(self) -> bool:
        """Say whether the machine waits for the end of a connection or a process."""
        return bool(self.machine._ends.workers or self.machine._ends.processes)

    def _obey(self, command: commands.Command) -> None:
        if isinstance(command, commands.SendTasks):
            self._send(command)
        elif isinstance(command, commands.ResolveTasks):
            for task, result in zip(command.tasks, command.results, strict=True):
                if result not in task.handle.leases:
                    raise Wrong(f"{task} got the result of a lease that it does not have")
                self._outcome(task, "result")
        elif isinstance(command, commands.FailTask):
            self._check_failure(command)
            self._outcome(command.task, "failed")
        elif isinstance(command, commands.JudgeFailure):
            judged = events.FailureJudged(
                command.worker, command.task, command.failure, self.random.random() < 0.8
            )
            self.after(self.delay(), lambda: self.tell(judged))
        elif isinstance(command, (commands.FailTasksUnlaunched, commands.CancelTasks)):
            for task in command.tasks:
                self._outcome(task, "dropped")
        elif isinstance(command, commands.LaunchWorker):
            self._launch(command.launch, command.slots)
        elif isinstance(command, commands.TerminateLaunch):
            self.pending.discard(command.launch)
            worker = self.worker_of(command.launch)
            if worker is not None:
                self.after(self.ends.uniform(0.0, 1.0), lambda: worker.end("ended by force"))
        elif isinstance(command, commands.Finish):
            self.finished += 1
        elif not isinstance(command, commands.MarkRunning):
            self._say(command)

    def _say(self, command: Any) -> None:
        worker = self.workers[command.worker]
        if isinstance(command, commands.RecallTasks):
            leases = list(command.leases)
            worker.down.carry(lambda: worker.recall(leases) if worker.alive else None)
        elif isinstance(command, commands.KillTasks):
            leases = list(command.leases)
            worker.down.carry(lambda: worker.kill(leases) if worker.alive else None)
        elif isinstance(command, commands.DrainWorker):
            self._drained.add(command.worker)
            worker.down.carry(lambda: worker.drain() if worker.alive else None)
        elif isinstance(command, commands.TerminateWorker):
            if not self.scattered:
                self.after(self.delay(), lambda: worker.end("terminated"))
            elif not worker.hung:
                worker.down.carry(lambda: worker.end("told to end"))
        elif isinstance(command, commands.CloseSession):
            if command.worker in self._closed:
                raise Wrong(f"the session of {command.worker} was closed twice")
            self._closed.add(command.worker)

    def _send(self, command: commands.SendTasks) -> None:
        worker = self.workers[command.worker]
        known = self.machine.workers[command.worker]
        if not known.is_within_reach:
            raise Wrong(f"{command.tasks} were sent to {command.worker}, which is out of reach")
        if command.worker in self._drained:
            raise Wrong(f"{command.tasks} were sent to {command.worker}, which is draining")
        sent = [(task.lease, task) for task in command.tasks]
        for lease, task in sent:
            if task.handle.outcome:
                raise Wrong(f"{task} was sent although it has an outcome")
            task.handle.leases = {lease}
        worker.down.carry(lambda: worker.take(sent) if worker.alive else None)

    def _outcome(self, task: Task, how: str) -> None:
        call: Call = task.handle
        if call.outcome:
            raise Wrong(f"{task} has two outcomes: {call.outcome}, {how}")
        call.outcome = how
        call.leases.clear()
        self.counts[how] += 1

    def _check_failure(self, command: commands.FailTask) -> None:
        """Check that no task fails because of what another task did."""
        task, failure = command.task, command.failure
        call: Call = task.handle
        if not call.innocent or not task.retries:
            return
        if failure.kind is FailureKind.WORKER_LOST and failure.suspects > 1:
            raise Wrong(f"{task} is blamed, as one of {failure.suspects} suspects")
        if not self.outside:
            raise Wrong(f"{task} is innocent, and failed: {failure}")

    def begins(self, worker: SimulatedWorker, lease: int, task: Task) -> None:
        call: Call = task.handle
        call.runs += 1
        if not task.retries and call.runs > 1 and call.ends != "misses its input":
            raise Wrong(f"{task} may run once, and runs again")

    def grows_too_far(self, worker: SimulatedWorker, task: Task) -> bool:
        known = self.machine.workers.get(worker.name)
        return known is None or known.size == 0 or task.number % 3 == 0

    def _look_at_the_idle(self) -> None:
        """Check that no worker is idle while tasks wait that it could run."""
        machine = self.machine
        if self.rich or not machine.waiting or machine.shutting_down:
            self._idle_since.clear()
            return
        plain = any(not queue.apart and queue.head() for queue in machine._queues.by_key.values())
        for name, worker in machine.workers.items():
            able = (
                plain
                and worker.state is WorkerState.ACTIVE
                and worker.is_within_reach
                and not worker.leases
                and any(
                    not queue.apart
                    and queue.head()
                    and queue.request.fits(worker.allocation.capacity)
                    for queue in machine._queues.by_key.values()
                )
            )
            if not able:
                self._idle_since.pop(name, None)
            elif self.now - self._idle_since.setdefault(name, self.now) > _PATIENCE:
                raise Wrong(f"{name} idles while work waits: {self._state()}")

    # The launcher.

    def _launch(self, launch: str, slots: int) -> None:
        self.pending.add(launch)
        if len(self.pending) > self.machine.config.scaling.max_slots:
            raise Wrong("more is launched than workers may be")
        r, calm = self.random, self.now > self.calm_at
        draw = 1.0 if calm else r.random()
        if draw < 0.05:
            return  # the worker never starts
        if draw < 0.15:
            failed = events.ProcessEnded(
                launch, "no luck", killed=draw < 0.1, reclaimed=r.random() < 0.3
            )
            self.after(r.uniform(0, 3), lambda: self._launch_failed(failed))
            return
        self.come(launch, slots)

    def come(self, launch: str, slots: int) -> None:
        self.pending.add(launch)
        self.after(self.random.uniform(0.1, 3.0), lambda: self._arrive(launch, slots))

    def _launch_failed(self, failed: events.ProcessEnded) -> None:
        self.pending.discard(failed.launch)
        self.tell(failed)

    def _arrive(self, launch: str, slots: int) -> None:
        if launch not in self.pending:
            return  # it was terminated
        self.pending.discard(launch)
        earlier = self.worker_of(launch)
        if earlier is not None and earlier.name in self.machine._ends.workers:
            self.tell(events.WorkerRestarted(earlier.name))
        if launch not in self.machine.launches:
            return
        name = f"w{next(self._worker_numbers)}"
        worker = SimulatedWorker(self, name, slots, launch)
        self.living[name] = self.workers[name] = worker
        self.tell(events.WorkerConnected(name, slots, launch))
        worker.start()

    def ended(self, worker: SimulatedWorker) -> None:
        for each in self.inputs:
            each.workers.discard(worker.name)

    # Users and faults.

    def _some_requirements(self) -> list[Requirements | None]:
        r, scaling = self.random, self.machine.config.scaling
        found: list[Requirements | None] = [None, None]
        found.append(Requirements(TaskOptions(), (), r.choice([0, 1, -1]), judged=True))
        if self.rich:
            whole = Resources.had_by(scaling.sizes[0])
            for _ in range(3):
                need = Resources.of(r.choice([0.5, 1, 3, 8]), r.choice([1, 4]) * GIB)
                fitting = max(1, need.times_in(whole))
                slots = scaling.slots_per_worker if scaling.one_machine else fitting
                requests = (ResourceRequest(need, 0, whole, slots, need),)
                found.append(
                    Requirements(TaskOptions(), requests, r.choice([0, 0, 1]), judged=False)
                )
        return found

    def _plan(self) -> None:
        r = self.random
        for _ in range(r.randint(1, 8)):
            self.after(r.uniform(0, self.calm_at), self._submit)
        for _ in range(r.randint(0, 6)):
            self.after(r.uniform(0, self.calm_at), self._cancel)
        if self.outside:
            for _ in range(r.randint(0, 12)):
                self.after(r.uniform(0, self.calm_at), self._harm)
        for _ in range(r.randint(0, 8)):
            self.after(r.uniform(0, self.calm_at), self._annoy)
        how = r.choice(["waits", "waits", "waits", "cancels", "kills"])
        end = self.calm_at + 1.0 if how == "waits" else r.uniform(1.0, self.calm_at)
        self.at(end, lambda: self._shut_down(how))
        self.at(self.calm_at + 60.0, self._stop_the_hung)

    def _submit(self) -> None:
        r = self.random
        if self.machine.shutting_down:
            return
        batch = []
        lengths = r.choice([[0.0001], [0.01, 0.03], [0.5, 5.0], [0.0001, 1.0]])
        deadly = r.choice([0.0, 0.0, 0.02, 0.1])
        for _ in range(r.choice([1, 5, 30, 150])):
            ends = "returns"
            if r.random() < deadly:
                ends = r.choice(_ENDS)
            times = 1 if ends == "misses its input" else r.choice([1, 2, 1 << 30])
            task = Task(
                next(self._task_numbers),
                r.choice(self.functions),
                retries=r.choice([0, 1, 2, 2]),
                handle=Call(r.choice(lengths), ends, times),
                requirements=r.choice(self.requirements),
            )
            if r.random() < 0.1:
                task.inputs = (r.choice(self.inputs),)
            batch.append(task)
        self.tasks += batch
        if r.random() < 0.2:
            self.tell(events.TasksBlocked(batch))
            self.after(r.uniform(0, 5), lambda: self._release(batch))
        else:
            self.tell(events.TasksSubmitted(batch))

    def _release(self, batch: list[Task]) -> None:
        if self.random.random() < 0.9:
            self.tell(events.TasksReleased(batch))
            return
        for task in batch:
            if task.state is TaskState.BLOCKED:
                self._outcome(task, "dropped")
        self.tell(events.TasksDropped(batch))

    def _cancel(self) -> None:
        r = self.random
        some = [task for task in self.tasks if not task.handle.outcome]
        some = r.sample(some, min(len(some), r.choice([1, 10])))
        if r.random() < 0.3:
            self.tell(events.TasksRecalled(some))
            return
        kill = r.random() < 0.5
        some = [task for task in some if kill or task.state is not TaskState.RUNNING]
        for task in some:
            self._outcome(task, "cancelled")
        self.tell(events.TasksCancelled(some, kill))

    def _harm(self) -> None:
        """Cause a fault of a worker that may cost its tasks an attempt."""
        r = self.random
        if not self.living:
            return
        worker = self.living[r.choice(sorted(self.living))]
        what = r.choice(["crash", "crash", "hang", "long cut", "out of memory"])
        if what == "crash":
            worker.end("crashed")
        elif what == "hang":
            worker.hung = worker.up.cut = True
        elif what == "long cut":
            worker.cut(r.uniform(4.0, 20.0))
        else:
            worker.end("killed by the kernel", out_of_memory=True)

    def _annoy(self) -> None:
        """Cause a fault of a worker that must not cost its tasks an attempt."""
        r = self.random
        if not self.living:
            return
        worker = self.living[r.choice(sorted(self.living))]
        if r.random() < 0.4:
            worker.up.carry(lambda: self.tell(events.WorkerDraining(worker.name)))
            worker.drain()
            self.after(2.0, lambda: worker.end("reclaimed", reclaimed=True))
        elif self.machine.config.reconnect_grace:
            worker.cut(r.uniform(0.0, 2.5))

    def _stop_the_hung(self) -> None:
        """At the end, cancel tasks that hang and restore inputs that are missing."""
        if self.finished:
            return
        hung = [t for t in self.tasks if not t.handle.outcome and t.handle.ends == "hangs"]
        for task in hung:
            self._outcome(task, "cancelled")
        self.tell(events.TasksCancelled(hung, kill=True))
        self.tell(events.InputsRestored(self.machine.backing_off_tasks()))
        self.after(30.0, self._stop_the_hung)

    def _shut_down(self, how: str) -> None:
        if how == "kills":
            self.calm_at = min(self.calm_at, self.now)
        self.tell(events.ShutdownRequested(how != "waits", how == "kills"))

    # The end.

    def _judge(self) -> None:
        if self.finished != 1:
            raise Wrong(f"Finish came {self.finished} times: {self._state()}")
        open_ones = [task for task in self.tasks if not task.handle.outcome]
        if open_ones:
            raise Wrong(f"{open_ones} have no outcome")
        if self.ends_are_open():
            raise Wrong(f"an end is waited for for ever: {self._state()}")
        if self._closed != self.workers.keys():
            raise Wrong(f"{self.workers.keys() - self._closed} were not forgotten")
        if self._lost != self.workers.keys():
            raise Wrong(f"{self.workers.keys() - self._lost} were not lost")
        self.machine.validate()

    def _state(self) -> str:
        machine = self.machine
        workers = {
            w.id: (w.state.value, len(w.leases), w.cut_at, w.id in machine._pool.available)
            for w in machine.workers.values()
        }
        left = [task for task in self.tasks if not task.handle.outcome]
        return (
            f"at {self.now:.2f} {workers}, launches {list(machine.launches)}, "
            f"{machine.waiting} waiting, {len(left)} open {left[:5]}, "
            f"{len(machine.backing_off_tasks())} resting, {len(machine.blocked)} held, "
            f"quarantine {machine._quarantine.reserved}"
        )
