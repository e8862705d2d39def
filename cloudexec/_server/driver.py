"""Reads the clock, feeds events to the machine, and carries out its commands."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import logging
import math
import os
import secrets
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cloudexec import _payload
from cloudexec._config import ServerConfig
from cloudexec._core import commands, events
from cloudexec._core.events import Event, Failure, FailureKind
from cloudexec._core.machine import Machine
from cloudexec._core.resources import Requirements
from cloudexec._core.tasks import FunctionStats, Task, TaskState
from cloudexec._core.workers import WorkerState
from cloudexec._describing import describe, text_of, type_name
from cloudexec._errors import (
    BrokenBatchExecutor,
    InitializerError,
    LaunchError,
)
from cloudexec._functions import Function
from cloudexec._future import BatchFuture
from cloudexec._launchers.base import (
    Arrival,
    Contact,
    LaunchEnd,
    Launcher,
)
from cloudexec._log import Log
from cloudexec._objects.options import ObjectOptions
from cloudexec._objects.ref import Ref
from cloudexec._objects.store import Blob, BlobStore
from cloudexec._payload import Composed, Payload
from cloudexec._server.bucket import Depot
from cloudexec._server.budget import PendingBudget
from cloudexec._server.callbacks import CallbackThread
from cloudexec._server.chronicle import Chronicle, Moment
from cloudexec._server.dependencies import Dependencies, Needs
from cloudexec._server.descriptors import check_files
from cloudexec._server.direct import Delivered, DirectChannel
from cloudexec._server.keeper import Keeper, Recipe
from cloudexec._server.launches import Launches
from cloudexec._server.outcomes import (
    LOSSES,
    counted,
    decode_exception,
    decode_result,
    error_of,
    name_of,
)
from cloudexec._server.output import OutputThread
from cloudexec._server.portal import Portal
from cloudexec._server.retrying import Judge
from cloudexec._server.splicing import Spliced
from cloudexec._server.telling import fields

if TYPE_CHECKING:
    from cloudexec._journal.journal import Journal
    from cloudexec._journal.program import Program
    from cloudexec._server.takeover import Takeover

__all__ = ["Driver", "Setup", "Submission"]

_logger = Log()
_RECALL_TIMEOUT = 1.0
"""Seconds that ``cancel()`` waits for a worker to say whether a task had begun."""
_AWAY = (TaskState.SENT, TaskState.RUNNING, TaskState.DONE)
"""States in which a worker has a task, or has had it to the end."""
_END_GRACE = 5.0
"""Seconds that workers have to end by themselves when the executor does."""
_END_TRIES = 6
"""Times that launches which do not end are terminated then, before they are left alone."""
_TERMINATION = 2.0
"""Seconds that a worker has to end by itself once it was told to end at once."""
_LAST_WORDS = 5.0
"""Seconds in which the connection of a worker whose process has ended must end, too."""
_STOP_TIMEOUT = 5.0
"""Seconds in which the server must have let go of all connections."""
_REFUSALS_PAUSE = 30.0
"""Seconds in which peers that are turned away for the same reason are mentioned once."""
_MOST_STALL = 2.0
"""Seconds that the machine's clock moves at most between two looks: while this process was stopped
or its main thread held the GIL, workers were silent through no fault of theirs."""


class Submission(Task):
    """A task with what it takes to send it; ``handle`` is its future."""

    __slots__ = ("charge", "dependents", "function", "needs", "payload")

    charge: int | None
    """Bytes that it counts in the budget of what is pending; a slot that is empty without one."""

    def __init__(
        self,
        number: int,
        stats: FunctionStats,
        future: BatchFuture[Any],
        function: Function | None,
        payload: Payload,
        retries: int,
        requirements: Requirements | None = None,
    ) -> None:
        # Written out: this runs once per task, in the caller's thread.
        self.number = number
        self.stats = stats
        self.retries = retries
        self.handle = future
        self.state = _WAITING
        self.lease = 0
        self.worker = None
        self.cost = 0.0
        self.lost = 0
        self.suspected = 0
        self.size = 0
        self.function = function
        self.payload: Payload | Spliced | None = payload
        self.requirements = requirements
        self.inputs = ()
        self.needs: Needs | None = None  # what it waits for, if it does
        self.dependents: list[Any] | None = None  # who waits for its result; see Dependencies

    @property
    def timeout(self) -> float | None:
        """Seconds that it may run; ``None``: no limit."""
        return None if self.requirements is None else self.requirements.options.timeout


_WAITING = TaskState.WAITING


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every worker is told at the start, and how the server listens."""

    max_workers: int
    min_workers: int = 0
    initializer: Payload = b""
    initializer_needs: Function | None = None
    main: Mapping[str, str] = field(default_factory=dict)
    max_tasks_per_child: int = 0
    output: str = "inherit"
    forward_logs: bool = True
    listen: str | None = None
    advertise: str = ""
    max_cost_usd: float | None = None
    orphan_timeout: float = 120.0
    idle_timeout: float | None = 60.0
    cwd: str = ""
    sys_path: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()
    settings: bytes = b""
    modules: bytes = b""
    objects: ObjectOptions = field(default_factory=ObjectOptions)


class Hold:
    """Keeps a task from being sent.

    Attributes:
        was_kept: Whether it was not sent for this.
    """

    __slots__ = ("was_kept",)

    def __init__(self) -> None:
        self.was_kept = False


class Driver:
    """The loop thread's half of one executor.

    Args:
        config: For the machine.
        setup: For workers and server.
        launcher: Starts workers.
        store: Where large pieces of arguments and results are.
    """

    def __init__(
        self, config: ServerConfig, setup: Setup, launcher: Launcher, store: BlobStore
    ) -> None:
        self.setup = setup
        self.store = store
        store.on_end = self._blob_ended
        self.blob_ranges = itertools.count(1)
        self.executor_id = secrets.token_hex(8)
        self.key = secrets.token_bytes(32)
        self.portal = Portal.acquire()
        self.machine = Machine(config)
        self.finished = threading.Event()
        self.inbox: deque[Submission | Event | int] = deque()
        self.broken: BaseException | None = None
        self.journal: Journal | None = None
        self.takeover: Takeover | None = None
        """Where workers outlive this process, and another one may stand in its place."""
        self.contact: Contact | None = None
        self.listening = ""
        """``host:port`` where the server listens, if that is a network address."""
        self.sessions: dict[str, Any] = {}
        self._identities: dict[str, Any] = {}
        self._tokens: dict[bytes, Any] = {}
        # Of functions, and of blobs as negative numbers: which workers are to hear of their end.
        # Among thousands, those are few.
        self._told: dict[int, list[str]] = {}
        self.bytes_sent = 0
        self.bytes_received = 0
        self.reconnections = 0
        self.refusals: Counter[str] = Counter()
        """Of peers and of what they sent, by kind."""
        self._refused_at: dict[str, float] = {}
        self.holds: dict[BatchFuture[Any], Hold] = {}
        """Of futures that are being cancelled: their tasks are not to be sent."""
        self._launcher = launcher
        self._woken = False
        self.clock = 0.0
        """Seconds, as the machine is told; it stands still while this process is stopped."""
        self._looked_at = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._tasks: set[asyncio.Task[Any]] = set()
        self.launches = Launches(self, launcher, self._on_launch_end)
        self._prepared = False
        self._starting: asyncio.Task[Any] | None = None
        self.started_at = time.monotonic()
        self._all_ended = asyncio.Event()
        self._last_words: dict[str, LaunchEnd] = {}
        self._expected_ends: dict[str, asyncio.TimerHandle] = {}
        self._directory: str | None = None
        self.direct_path = ""
        self.depot: Depot | None = None
        self._direct: DirectChannel | None = None
        self._server: Any = None
        self.is_closing = False
        """Whether nobody is let in, or told anything, any more."""
        self.callbacks = CallbackThread()
        self.moment: Moment = (time.monotonic(), time.time(), self.executor_id)
        """When what is being handled came."""
        self.chronicle = Chronicle(self)
        self.budget: PendingBudget | None = None
        """Of what is submitted and not done, if there is a limit."""
        self.judge = Judge(self.portal.post)
        self.dependencies = Dependencies(self, decode_result)
        self.keeper = Keeper(self)
        self.numbers = itertools.count(1)
        """Of tasks."""
        is_shown = setup.output != "off" or setup.forward_logs
        self.output = OutputThread(setup.output) if is_shown else None
        self._carry_out: dict[type, Callable[[Any], None]] = {
            commands.SendTasks: self._send,
            commands.MarkRunning: self._mark_running,
            commands.ResolveTasks: self._resolve,
            commands.FailTask: self._fail,
            commands.JudgeFailure: self._judge_failure,
            commands.FailTasksUnlaunched: self._fail_unlaunched,
            commands.CancelTasks: self._cancel,
            commands.RecallTasks: self._recall,
            commands.KillTasks: self._kill,
            commands.LaunchWorker: self.launches.ask,
            commands.TerminateLaunch: self.launches.withdraw,
            commands.DrainWorker: self._drain_worker,
            commands.TerminateWorker: self._terminate_worker,
            commands.Finish: self._finish,
        }

    # Called from any thread.

    def post(self, item: Submission | Event | int) -> None:
        """Put a task, an event, or the number of a function that ended into the inbox."""
        self.inbox.append(item)
        if not self._woken:
            self._woken = True
            try:
                self.portal.post(self._take_inbox)
            except RuntimeError:
                pass  # the loop has closed: the executor is finished

    def post_all(self, items: Iterable[Submission]) -> None:
        """Put many tasks into the inbox, with one wake-up."""
        self.inbox.extend(items)
        if not self._woken:
            self._woken = True
            self.portal.post(self._take_inbox)

    def cancelled(self, future: BatchFuture[Any], was_running: bool) -> None:
        """A future was cancelled by its user."""
        task = future._task
        if task is not None:
            self.post(events.TasksCancelled((task,), kill=was_running))

    @contextlib.contextmanager
    def withheld(self, future: BatchFuture[Any]) -> Iterator[bool]:
        """Have a task back that was sent ahead, and send it to nobody until this is left.

        Returns:
            Whether no worker has it. False: a worker has begun it, or has not said in time.
        """
        if self.portal.is_this_thread:
            yield True
            return
        # Said before the task's state is looked at, and asked, when it is sent, after that has
        # changed: one of the two threads sees what the other has done.
        hold = self.holds[future] = Hold()
        try:
            task = future._task
            if task is not None and task.state is TaskState.SENT:
                self.post(events.TasksRecalled((task,)))
                deadline = time.monotonic() + _RECALL_TIMEOUT
                while task.state is TaskState.SENT and not hold.was_kept:
                    if time.monotonic() > deadline:
                        break
                    time.sleep(0.0005)
            yield task is None or hold.was_kept or task.state not in _AWAY
        finally:
            self.holds.pop(future, None)

    async def start(self) -> None:
        """Listen, then wait for work.

        Raises:
            LaunchError: If the server cannot listen where it was told to.
        """
        setup = self.setup
        if self._launcher.needs_network():
            self.portal.outlast_main_thread()
        self._starting = asyncio.current_task()
        scaling = self.machine.config.scaling
        workers = -(-scaling.max_slots // scaling.slots_per_worker)
        local = self._launcher.one_machine
        check_files(workers, scaling.slots_per_worker, local=local)
        takeover, wanted = self.takeover, setup.listen or ""
        network = await self._launcher.start(
            self.executor_id,
            wanted if takeover is None else takeover.listen(wanted),
            setup.advertise,
            self.machine.config.scaling.launch_timeout,
        )
        self._prepared = True
        self.key = network.key or self.key
        if takeover is not None:
            await takeover.look()
        listen = network.listen
        if not listen and hasattr(os, "fork"):
            self._directory = _private_directory()
            listen = f"unix:{self._directory}/s"
        if self._directory is not None:
            self.direct_path = f"{self._directory}/d"
            gathers = None if self.journal is None else self.store
            self._direct = DirectChannel(
                self.direct_path,
                self._blob_of,
                self.expects,
                self._deliver,
                self.session_of,
                gathers,
            )
        else:
            self.depot = self._depot()
        listen = listen or "127.0.0.1:0"
        certificate = None
        if self._directory is not None and self._launcher.own_processes:
            from cloudexec._server.plain import start_plain_server

            target = f"plain:{self._directory}/s"
            self._server = await start_plain_server(self, f"{self._directory}/s")
        else:
            with _quiet_grpc():
                from cloudexec._server.network import start_server

                if not listen.startswith("unix:"):
                    from cloudexec._server.certificate import make_certificate

                    certificate = takeover.certificate if takeover is not None else None
                    certificate = certificate or make_certificate()
                started = await start_server(self, listen, network.advertise, certificate)
            self._server, target, self.listening = started
        sha256 = "" if certificate is None else certificate.sha256
        self.contact = Contact(target, self.executor_id, self.key, sha256)
        if takeover is not None and certificate is not None:
            takeover.begin(certificate)
        self._looked_at = time.monotonic()
        if self.machine.config.scaling.min_slots:
            self.feed(events.DeadlinePassed())
        if setup.max_cost_usd is not None:
            self.create_task(self.launches.watch_cost(setup.max_cost_usd))
        if self._launcher.needs_network():  # what starts here says at once why it does not
            self.create_task(self.launches.watch_start())

    async def abandon(self) -> None:
        """Let go of everything after ``start()`` failed."""
        self.is_closing = True
        await self._close_journal()
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()  # interrupted in the middle of it
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._prepared:
            await self._launcher.close()
        if self._direct is not None:
            self._direct.close()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        if self.output is not None:
            self.output.stop()
        self.dependencies.stop()
        self.judge.stop()
        self.callbacks.stop()
        self.portal.loop.call_soon(self._closed)

    # On the loop thread.

    def _take_inbox(self) -> None:
        self._woken = False
        inbox = self.inbox
        tasks: list[Submission] = []
        held: list[Submission] = []
        ended: list[int] = []
        for _ in range(len(inbox)):
            item = inbox.popleft()
            if isinstance(item, Submission):
                if item.needs is None:
                    tasks.append(item)
                else:
                    held.append(item)
            elif isinstance(item, int):
                ended.append(item)
            else:
                if tasks or held:
                    self._submitted(tasks, held)
                    tasks, held = [], []
                if type(item) is events.TasksCancelled:
                    self.dependencies.cancelled(item.tasks)  # type: ignore[arg-type]
                self.feed(item)
                if type(item) is events.TasksCancelled:
                    self._drop(item.tasks)
        if tasks or held:
            self._submitted(tasks, held)
        if ended:
            self._forget(ended)

    def _drop(self, tasks: Sequence[Any]) -> None:
        """Let go of what tasks would take that were cancelled; their futures may live on."""
        for task in tasks:
            if task.worker is None:
                task.payload = None
            if self.budget is not None:
                self.budget.give(task)

    def _blob_ended(self, number: int) -> None:
        self.post(-number)

    def _forget(self, ended: list[int]) -> None:
        """Tell workers of functions and, as negative numbers, of blobs that have ended."""
        told: dict[str, list[int]] = {}
        for number in ended:
            for worker in self._told.pop(number, ()):
                told.setdefault(worker, []).append(number)
        for worker, numbers in told.items():
            session = self.sessions.get(worker)
            if session is not None:
                session.forget_functions([number for number in numbers if number > 0])
                session.forget_blobs([-number for number in numbers if number < 0])
        blobs = [-number for number in ended if number < 0]
        if blobs:
            self.store.sweep()
            if self.depot is not None:
                self.depot.forget(blobs)

    def note_told(self, worker: str, number: int) -> None:
        """A worker is told of a function or, as a negative number, of a blob."""
        self._told.setdefault(number, []).append(worker)

    def be(self, executor_id: str, key: bytes) -> None:
        """Stand in the place of an executor whose process was killed, before the start.

        Args:
            executor_id: Its name.
            key: That its workers know.
        """
        self.executor_id, self.key = executor_id, key
        self.chronicle = Chronicle(self)
        self.now()

    def _submitted(self, tasks: list[Submission], held: list[Submission]) -> None:
        last = max(some[-1].number for some in (tasks, held) if some)
        self.chronicle.submitted.add(last, self.now())
        if self.broken is not None:
            for task in (*tasks, *held):
                self._set_exception(task, self._broken_error())
            return
        if tasks:
            for task in tasks:
                if type(task.payload) is not bytes:
                    self.keeper.note_inputs(task)
            if self.takeover is not None:
                tasks = self.takeover.sift(tasks)
            self.feed(events.TasksSubmitted(tasks))
        if held:
            self.dependencies.hold(held)

    def release(self, tasks: list[Submission]) -> None:
        """What held tasks depend on is there."""
        if self.takeover is not None:
            tasks = self.takeover.sift(tasks, held=True)
        self.feed(events.TasksReleased(tasks))

    def now(self) -> Moment:
        """Look at the clocks, for whatever is noted next."""
        self.moment = (time.monotonic(), time.time(), self.executor_id)
        return self.moment

    def feed(self, event: Event) -> None:
        """Tell the machine what happened, and do what it says."""
        now = self.now()[0]
        self.clock += min(now - self._looked_at, _MOST_STALL)
        self._looked_at = now
        watch = self.chronicle.watches.get(type(event))
        try:
            note = None if watch is None else watch(event)
            answer = self.machine.handle(event, self.clock)
            if note is not None:
                note()  # before anybody learns of the outcome, and asks
            for command in answer:
                self._carry_out[type(command)](command)
        except BaseException as exc:
            # A bug of ours. Whoever waits for a future learns of it, rather than waits for ever.
            if self.broken is not None:
                raise
            _logger.exception("internal error while handling %s", type(event).__name__)
            error = BrokenBatchExecutor(f"internal error ({describe(exc)})")
            error.__cause__ = exc
            self.break_down(error)
        deadline = self.machine.next_deadline()
        if deadline is not None and (self._timer is None or deadline < self._timer_at):
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = deadline
            # Not in one go past a stall: the clock of the machine may then be behind.
            pause = min(max(deadline - self.clock, 0.001), 1.0)
            self._timer = self.portal.loop.call_later(pause, self._on_timer)
        if self.dependencies.concluded:
            self.dependencies.settle()

    def _on_timer(self) -> None:
        self._timer = None
        now = time.monotonic()
        if self.is_closing:
            return
        if self.clock + min(now - self._looked_at, _MOST_STALL) >= self._timer_at:
            self.feed(events.DeadlinePassed())
        else:
            self.clock += min(now - self._looked_at, _MOST_STALL)
            self._looked_at = now
            pause = min(max(self._timer_at - self.clock, 0.001), 1.0)
            self._timer = self.portal.loop.call_later(pause, self._on_timer)

    def create_task(self, work: Coroutine[Any, Any, object]) -> None:
        """Run a coroutine in the background until the executor ends."""
        task = self.portal.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Commands about tasks.

    def _send(self, command: commands.SendTasks) -> None:
        self.chronicle.sent(command)
        session = self.sessions.get(command.worker)
        if session is not None:
            session.send_tasks(command.tasks)

    def _mark_running(self, command: commands.MarkRunning) -> None:
        for task in command.tasks:
            future = task.handle
            with future._lock:
                if future._state == "PENDING":
                    future._state = "RUNNING"

    def _resolve(self, command: commands.ResolveTasks) -> None:
        worker = command.worker
        session = self.sessions.get(worker)
        printed: set[int] = session.printed if session is not None else set()
        give = self._give_result if self.journal is None else self._record
        newcomers = self.launches.newcomers
        for task, result, seconds in zip(
            command.tasks, command.results, command.seconds, strict=True
        ):
            future = task.handle
            future._worker_id = worker
            future._run_time = seconds
            future._attempts = task.lost + 1
            if worker in newcomers:
                self.launches.first_result(worker)
            if printed and task.lease in printed:
                printed.discard(task.lease)
                self._after_output(give, task, future, result)
            else:
                give(task, future, result)

    def open_journal(
        self, where: str | os.PathLike[str], program: Program, initializer: object
    ) -> None:
        """Have results kept, and found again; from another thread than the loop's.

        Args:
            where: The journal.
            program: The code of this process.
            initializer: Of each worker, with its arguments; ``None``: there is none.

        Raises:
            CloudexecError: If the journal cannot be used.
        """
        from cloudexec._journal.journal import Journal

        self.journal = Journal.open(where, program, self.portal, decode_result, self._give_recorded)
        self.journal.set_up(initializer, is_watching=not self._launcher.needs_network())
        if self._launcher.needs_network() and self.journal.store.keeps_state:
            from cloudexec._server.takeover import Takeover

            self.takeover = Takeover(self, self.journal, self._launcher, self._on_launch_end)

    def _record(self, task: Any, future: BatchFuture[Any], result: Any) -> None:
        """Have a result in the journal before anybody learns of it."""
        assert self.journal is not None
        if not self.journal.add(task, future, result):
            self._give_result(task, future, result)

    def _give_recorded(self, given: list[tuple[Any, BatchFuture[Any], Any]]) -> None:
        self.now()
        for task, future, result in given:
            if task is not None:
                self._give_result(task, future, result)
        if self.dependencies.concluded:
            self.dependencies.settle()

    def give_resumed(self, task: Any, result: Payload, seconds: float) -> None:
        """Give a call that is in nobody's hands a result that is in the journal."""
        assert self.journal is not None
        future = task.handle
        self.journal.note_resumed(future)
        future._run_time = seconds
        self._give_result(task, future, result)

    async def _close_journal(self) -> None:
        journal = self.journal
        if self.takeover is not None:
            self.takeover.close()
        if journal is not None:
            if self.output is not None:  # results that wait for it are still to come
                shown = asyncio.Event()
                self._after_output(shown.set)
                await shown.wait()
            closed = asyncio.Event()
            journal.close(lambda: self.portal.post(closed.set))
            await closed.wait()

    def _give_result(self, task: Any, future: BatchFuture[Any], result: Any) -> None:
        kind = type(result)
        if kind is bytes:
            done = future._finish(result, None, decode_result)
        elif kind is Composed:
            if task.requirements is not None and task.requirements.options.keep:
                if task.requirements.options.on_loss == "recompute":
                    result.recipe = Recipe(task)
                result = Ref(result, self.keeper)
                done = future._finish(result, None, None)
            else:
                result.shared = result.shared or task.dependents is not None
                done = future._finish(result, None, decode_result)
        else:
            done = future._finish(result.value, result.error, None)
        self._let_go(task, future, done, result)

    def _after_output(self, call: Callable[..., object], *args: object) -> None:
        """Call something on the loop once all that was printed so far has been shown."""
        assert self.output is not None

        def carry_on() -> None:
            self.now()
            call(*args)
            if self.dependencies.concluded:
                self.dependencies.settle()

        self.output.after(lambda: self.portal.post(carry_on))

    def _let_go(
        self, task: Any, future: BatchFuture[Any], done: bool, result: object = None
    ) -> None:
        task.payload = task.function = task.handle = None
        future._task = None
        future._owner = None
        if self.budget is not None:
            self.budget.give(task)
        future._number = task.number
        future._ended = self.moment
        if self.journal is not None and result is None:
            self.journal.give_back(future)
        if future._on_end is not None:
            on_end, future._on_end = future._on_end, None
            on_end(future, result is not None)
        if done and future._has_callbacks():
            self.callbacks.put(future)
        if task.dependents is not None:
            dependents, task.dependents = task.dependents, None
            self.dependencies.conclude(dependents, future, result if done else None)

    def _set_exception(self, task: Any, error: BaseException) -> None:
        future = task.handle
        if future is not None:
            self._let_go(task, future, future._finish(None, error, None))

    def _fail(self, command: commands.FailTask) -> None:
        task: Any = command.task
        failure = command.failure
        future = task.handle
        future._worker_id = command.worker
        future._attempts = task.lost if failure.kind in LOSSES else task.lost + 1
        if failure.kind is not FailureKind.WORKER_LOST:
            future._run_time = failure.detail.seconds
            future._output = failure.detail.output
            if failure.detail.output and self.output is not None:
                self._after_output(self._give_failure, command.worker, task, failure)
                return
        self._give_failure(command.worker, task, failure)

    def _judge_failure(self, command: commands.JudgeFailure) -> None:
        worker, failure = command.worker, command.failure
        task: Any = command.task

        raised = ""

        def error() -> BaseException:
            nonlocal raised
            payload = failure.detail.payload
            exc: BaseException
            exc = _payload.loads_exception(payload) if payload else error_of(worker, task, failure)
            raised = describe(exc).partition("\n")[0]
            return exc

        def verdict(again: bool) -> None:
            self.now()
            self.chronicle.raised(task, worker, raised, again=again)
            self.feed(events.FailureJudged(worker, task, failure, again))

        assert task.requirements is not None
        self.judge.ask(task.requirements.options.retry_on, error, verdict)

    def terms_of(self, worker: str, task: Task) -> tuple[dict[str, str], int, bool]:
        """Say what a worker must know of a task beyond the usual.

        Returns:
            Variables, bytes of memory that it may take (0: no limit), and whether its process is to
            end with it.
        """
        requirements, known = task.requirements, self.machine.workers.get(worker)
        assert requirements is not None
        options = requirements.options
        env = dict(options.env or {})
        gpus = () if known is None else known.allocation.heavy.get(task.lease, ())
        if gpus:
            env.setdefault("CUDA_VISIBLE_DEVICES", ",".join(gpus))
        # Who climbed a ladder may have all that a worker of the next size has.
        memory = options.memory_bytes or 0
        return env, memory if not task.size else 0, bool(gpus)

    def shares_gpus(self, task: Task) -> bool:
        """Say whether a task that was sent has some of its worker's GPUs, and others the rest."""
        known = self.machine.workers.get(task.worker or "")
        if known is None or known.allocation.capacity.gpus < 2:
            return False
        return bool(known.allocation.heavy.get(task.lease))

    def size_name(self, rung: int) -> str:
        """Say what a worker of a size has."""
        return self._launcher.size_name(rung)

    def name_of(self, worker: str, lease: int) -> str:
        """Return what people call the task of a lease, or an empty string."""
        known = self.machine.workers.get(worker)
        task = None if known is None else known.leases.get(lease)
        return "" if task is None else name_of(task)

    def _give_failure(self, worker: str, task: Any, failure: Failure) -> None:
        future = task.handle
        detail = failure.detail
        if failure.kind is not FailureKind.WORKER_LOST and detail.payload:
            done = future._finish(detail.payload, None, decode_exception, failed=True)
            self._let_go(task, future, done)
        elif failure.kind is FailureKind.KILLED:
            future.cancel(running=True)
            self._let_go(task, future, True)
        else:
            self._set_exception(task, error_of(worker, task, failure))

    def _fail_unlaunched(self, command: commands.FailTasksUnlaunched) -> None:
        rungs = sorted({self.machine.request_of(task).size for task in command.tasks})
        what = self._launcher.describe()
        if rungs != [0]:
            what += f"; wanted: {' or '.join(map(self.size_name, rungs))}"
        error_text = f"no worker could be started ({what}): {command.reason}"
        why = self.launches.why()
        if why and why not in error_text:
            error_text += f"\n{why}"
        for task in command.tasks:
            self._set_exception(task, LaunchError(error_text, reason=why or command.reason))

    def _cancel(self, command: commands.CancelTasks) -> None:
        for task in command.tasks:
            future = task.handle
            future._owner = None
            with future._lock:
                if not future.done():
                    future._conclude("CANCELLED_AND_NOTIFIED", "add_cancelled")
            self._let_go(task, future, True)

    def _recall(self, command: commands.RecallTasks) -> None:
        session = self.sessions.get(command.worker)
        if session is not None:
            session.recall(command.leases)

    def _kill(self, command: commands.KillTasks) -> None:
        session = self.sessions.get(command.worker)
        if session is not None:
            session.kill(command.leases)

    # Commands about workers.

    def _on_launch_end(self, launch: str, end: LaunchEnd) -> None:
        if not end.relaunched:
            self.launches.running.discard(launch)
            if self.takeover is not None:
                self.takeover.launch_ended(launch)
        session = self._identities.get(launch)
        if session is not None:
            worker = session.worker_id
            # Its stream ends too, and what it still said is to be read first.
            self._last_words[worker] = end
            if launch in self._expected_ends or session.is_cut:
                self._lost(self.sessions[worker], end.reason)
            else:
                loop = self.portal.loop
                loop.call_later(_LAST_WORDS, self._cut_off, session, end.reason)
        elif not end.relaunched:
            self.feed(events.LaunchFailed(launch, end.reason, end.fatal, end.killed, end.reclaimed))
        if not self.launches.running:
            self._all_ended.set()

    def _drain_worker(self, command: commands.DrainWorker) -> None:
        session = self.sessions.get(command.worker)
        if session is not None:
            session.drain()
            # It ends when what it has is done, and what it keeps has been taken.
            self.create_task(self.keeper.evacuate(session))

    def _terminate_worker(self, command: commands.TerminateWorker) -> None:
        session = self.sessions.get(command.worker)
        if session is not None:
            session.terminate()
            if session.is_cut:  # and the machine has given it up: should it dial again, it is told
                self.portal.loop.call_soon(self._lost, session, "its connection was cut")
            self.portal.loop.call_later(_TERMINATION, self._end_by_force, session)

    def _end_by_force(self, session: Any) -> None:
        """A worker has had its chance to end by itself: end its process, and its connection.

        Whoever holds that may not be the process, or may be on a machine that nobody can reach.
        """
        self._launcher.terminate([session.identity])
        self._cut_off(session, "it did not end when it was told to, and was cut off")

    def _cut_off(self, session: Any, reason: str) -> None:
        """Wait no longer for a worker's stream to end: end it from here."""
        if self.sessions.get(session.worker_id) is session:
            self._lost(session, reason)

    # What the servicer reports.

    def key_of(self, identity: str) -> bytes:
        """Return the key that a worker with this identity must know."""
        return self._launcher.key_of(identity) or self.key

    def pid_of(self, identity: str) -> int:
        """Return the process that was started for a launch; 0: it is not known here."""
        return self._launcher.pid_of(self.executor_id, identity)

    def returning(self, identity: str, attempt: int) -> None:
        """A proven worker dials: if its platform has started it again, the one before is gone.

        A platform does so by itself only after it took the machine back.
        """
        session = self._identities.get(identity)
        if session is None or attempt <= session.attempt:
            return
        self._launcher.disconnected(identity, orderly=False, reclaimed=True)
        worker = session.worker_id
        if worker not in self._last_words:
            why = "its machine was taken back, and it was started again on another"
            self._last_words[worker] = LaunchEnd(why, reclaimed=True, relaunched=True)
        self._lost(session, "")

    def admit(self, identity: str) -> str | None:
        """Say why a worker with this identity may not connect; ``None`` if it may."""
        if self.is_closing or self.machine.finished:
            return "the executor has shut down"
        if identity in self._identities:
            return "a worker with this identity is connected already"
        if identity not in self.machine.launches:
            return "nobody launched a worker with this identity, or its time to connect is over"
        return None

    def session_of(self, token: bytes) -> Any:
        """Find the session that a token belongs to, or ``None``."""
        # A hash table gives away less by its timing than it takes to guess 16 random bytes.
        return self._tokens.get(token)

    def _blob_of(self, token: bytes, number: int) -> Blob | None:
        session = self.session_of(token)
        blob: Blob | None = None if session is None else session.blob(number)
        if blob is None or blob.origin is not None:
            return None  # who has it is no longer there
        self.bytes_sent += blob.size
        return blob

    def _depot(self) -> Depot | None:
        """Make what moves large blobs through the bucket that the user, or the launcher, names."""
        objects = self.setup.objects
        name, region = self._launcher.bucket()
        if objects.bucket is not None:
            name = str(objects.bucket or "")
        threshold = objects.bucket_threshold
        assert isinstance(threshold, int)
        return Depot(self, name, region, threshold) if name else None

    @property
    def compresses(self) -> bool:
        """Whether what goes to and from workers may be compressed."""
        return self.setup.objects.compression and not self.direct_path

    def count_sent(self, size: int) -> None:
        """So many bytes of content have gone to a worker."""
        self.bytes_sent += size

    def transfer_failed(self, session: Any, why: str) -> None:
        """A part of a result has arrived damaged: say so; it is sent again."""
        worker = session.worker_id
        extra = self._fields("transfer_failed", worker=worker, reason=why)
        _logger.warning("a part of a result from %s: %s", worker, why, extra=extra)

    def expects(self, token: bytes, lease: int) -> bool:
        """Say whether a worker has a lease, so that a result of it is waited for."""
        session = self.session_of(token)
        worker = None if session is None else self.machine.workers.get(session.worker_id)
        if worker is None:
            return False
        if lease in worker.leases:
            return True
        return self.takeover is not None and self.takeover.has(worker.id, lease)

    def _deliver(self, token: bytes, lease: int, delivered: Delivered | Composed) -> None:
        if self.expects(token, lease):
            self.session_of(token).delivered[lease] = delivered

    def refused(self, kind: str, what: str) -> None:
        """A peer, or what it sent, was turned away.

        Counted, and said at the first of each kind and now and then of those that follow, however
        many they are.

        Args:
            kind: Of what it did; one of a few.
            what: What happened, with nothing in it that a peer may choose at will.
        """
        if self.is_closing or self.machine.finished:
            return  # it came too late, that is all
        self.refusals[kind] += 1
        now = time.monotonic()
        if now - self._refused_at.get(kind, -math.inf) > _REFUSALS_PAUSE:
            self._refused_at[kind] = now
            # A worker that was given up, and does not know it yet, is nothing to warn of.
            late = kind == "no session" and bool(self.machine.counts["workers_connected"])
            _logger.log(
                logging.DEBUG if late else logging.WARNING,
                "connection refused (%s, %d so far): %s",
                kind,
                self.refusals[kind],
                what,
                extra=self._fields("peer_refused", reason=kind, count=self.refusals[kind]),
            )

    def _fields(self, event: str, **details: Any) -> dict[str, object]:
        return fields(event, self.executor_id, **details)

    def draining(self, session: Any) -> None:
        """A worker takes nothing new: unless we told it to, its platform did."""
        worker = self.machine.workers.get(session.worker_id)
        if worker is not None and worker.state is WorkerState.ACTIVE:
            session.reclaimed = True
            self.create_task(self.keeper.evacuate(session))
        self.feed(events.WorkerDraining(session.worker_id))

    def connected(self, session: Any, slots: int, arrival: Arrival, dial_in: float) -> None:
        """A worker has proved who it is; ``dial_in`` is how long that took it."""
        self.sessions[session.worker_id] = session
        self._identities[session.identity] = session
        self._launcher.connected(session.identity, arrival)
        self.launches.arrived(session, arrival, dial_in)
        self._tokens[session.token] = session
        launched = self.machine.launches[session.identity].slots
        self.feed(
            events.WorkerConnected(
                session.worker_id,
                min(slots, launched),
                session.identity,
                taken_over=session.taken_over,
            )
        )
        if self.takeover is not None:
            self.takeover.changed()

    def session_to_resume(self, identity: str, name: bytes) -> Any:
        """Find the session that a worker says it has, or ``None``: it was given up."""
        session = self._identities.get(identity)
        if session is None or not session.resumable or self.is_closing or session.name != name:
            return None
        return session

    def reconnected(self, session: Any) -> None:
        """A worker goes on over another connection; that of the one before may not be known yet."""
        self.reconnections += 1
        session.is_cut = False
        self._launcher.connected(session.identity, Arrival("", session.attempt, None, None))
        if not session.taken_over:  # else it is still to say what it holds, and is back then
            self.feed(events.WorkerBack(session.worker_id))

    def disconnected(self, session: Any, reason: str, *, cut: bool) -> None:
        """A worker's stream has ended.

        Args:
            session: Whose.
            reason: Why.
            cut: Whether it was the connection that failed, so that the worker may come again.
        """
        worker, identity = session.worker_id, session.identity
        if worker not in self.sessions or self.sessions[worker] is not session:
            return
        known = self.machine.workers.get(worker)
        orderly = known is not None and not known.leases and known.state is WorkerState.DRAINING
        self._launcher.disconnected(identity, orderly=orderly, reclaimed=session.reclaimed)
        may_return = cut and session.resumable and not orderly and worker not in self._last_words
        if may_return and known is not None and not self.is_closing:
            session.is_cut = True
            self.feed(events.WorkerCut(worker))
            return
        if (
            worker not in self._last_words
            and identity in self.launches.running
            and not self.is_closing
        ):
            # Its process is about to end, and how it ended is worth a moment.
            hurry = (orderly and not session.reclaimed) or self.machine.killing
            patience = 0.1 if hurry else self._launcher.last_words
            self._expected_ends[identity] = self.portal.loop.call_later(
                patience, self._lost, session, reason
            )
            return
        self._lost(session, reason)

    def _lost(self, session: Any, reason: str) -> None:
        worker = session.worker_id
        end = self._last_words.pop(worker, None)
        timer = self._expected_ends.pop(session.identity, None)
        if timer is not None:
            timer.cancel()
        if self.sessions.pop(worker, None) is None:
            return
        session.close()
        if self.takeover is not None:
            self.takeover.worker_lost(session)
        self.keeper.worker_lost(worker, session.blobs())
        if self.depot is not None:
            self.depot.session_ended(session)
        del self._identities[session.identity], self._tokens[session.token]
        self._launcher.clean_up(session.slot_groups)
        self.launches.newcomers.pop(worker, None)
        if end is None:
            end = LaunchEnd(reason, reclaimed=bool(session.reclaimed))
        if session.identity in self.launches.running and not end.relaunched:
            # Without its connection it ends by itself.
            loop = self.portal.loop
            loop.call_later(_TERMINATION, self._launcher.terminate, [session.identity])
        self.feed(
            events.WorkerLost(
                worker,
                end.reason,
                reclaimed=end.reclaimed,
                out_of_memory=end.out_of_memory,
                relaunched=end.relaunched,
            )
        )

    def initializer_failed(self, payload: bytes) -> None:
        """The initializer raised in a worker: nothing can be run, and all that waits fails."""
        cause = _payload.loads_exception(payload)
        error = InitializerError(
            f"the initializer raised {type_name(cause)} in a worker: {text_of(cause)}"
        )
        error.__cause__ = cause
        log = Log("concurrent.futures")  # the standard library's own logger and words
        log.log_exception("Exception in initializer:", exc=cause, level=logging.CRITICAL)
        self.break_down(error)

    def break_down(self, error: BaseException) -> None:
        """Fail every open task, and all that are submitted later, and stop the workers."""
        if self.broken is not None:
            return
        self.broken = error
        if self.budget is not None:
            self.budget.wake()
        machine = self.machine
        waiting = [*machine.waiting_tasks(), *machine.blocked, *machine.backing_off_tasks()]
        tasks: list[Any] = [task for task in waiting if task.handle is not None]
        for worker in machine.workers.values():
            tasks.extend(task for task in worker.leases.values() if task.handle is not None)
        for task in tasks:
            future = task.handle
            future._finish(None, self._broken_error(), None)
            if future._has_callbacks():
                self.callbacks.put(future)
        self.feed(events.TasksCancelled(tasks))
        self.feed(events.ShutdownRequested(cancel=True, kill=True))

    def _broken_error(self) -> BaseException:
        broken = self.broken
        assert broken is not None
        error = copy.copy(broken)  # each future's traceback is its own
        error.__cause__ = broken.__cause__
        return error

    # The end.

    def _finish(self, command: commands.Finish) -> None:
        self.create_task(self._close())

    async def _close(self) -> None:
        """Let the workers' processes end, then close the server and everything else."""
        await self._close_journal()
        await self._see_launches_end()
        self.is_closing = True
        self.launches.terminate_now()
        await self._launcher.close()
        if self.depot is not None:
            await self.depot.close()
        self.chronicle.tell_duplicates()
        self.chronicle.teller.sum_up()
        self._sum_up()
        for task in list(self._tasks - {asyncio.current_task()}):
            task.cancel()
        if self._timer is not None:
            self._timer.cancel()
        self.keeper.close()
        if self._direct is not None:
            self._direct.close()
        stopping = asyncio.ensure_future(self._server.stop(grace=None))
        await asyncio.wait({stopping}, timeout=_STOP_TIMEOUT)
        self._server = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
        if self.output is not None:
            shown = asyncio.Event()
            self._after_output(shown.set)
            await shown.wait()
            self.output.stop()
        self.dependencies.stop()
        self.judge.stop()
        self.callbacks.stop()
        self.store.close()
        self.portal.loop.call_soon(self._closed)

    async def _see_launches_end(self) -> None:
        """Wait for the processes, which end by themselves once their streams have."""
        for tries in range(_END_TRIES + 1):
            if not (self.launches.running and self._launcher.ends_are_seen):
                return
            self._all_ended.clear()
            try:
                async with asyncio.timeout(_END_GRACE):
                    await self._all_ended.wait()
            except TimeoutError:
                # The rest is for those that do not.
                if tries < _END_TRIES:
                    self._launcher.terminate(list(self.launches.running))
        if self.launches.running:
            _logger.warning(
                "%s not known to have ended %g s after the executor had it terminated: %s",
                counted(len(self.launches.running), "worker"),
                _END_TRIES * _END_GRACE,
                self._launcher.describe(),
                extra=self._fields("launches_left", count=len(self.launches.running)),
            )

    def _sum_up(self) -> None:
        """Where money was spent, say in one line for what."""
        cost = self._launcher.cost()
        if not cost.accrued_usd:
            return
        counts = self.machine.counts
        done = counts["succeeded"] + counts["failed"]
        connected, launched = counts["workers_connected"], counts["launches"]
        workers = counted(launched, "worker")
        if connected < launched:
            workers = f"{connected} of {workers}"
        minutes, seconds = divmod(round(time.monotonic() - self.started_at), 60)
        line = (
            f"{counted(done, 'task')} on {workers} in "
            f"{minutes}:{seconds:02d}, about ${cost.accrued_usd:.4f} ({cost.note})"
        )
        if self.setup.output == "inherit":
            print(f"cloudexec: {line}", file=sys.stderr)
        else:
            _logger.info("%s", line)

    def _closed(self) -> None:
        self.portal.release()
        self.finished.set()

    def join(self) -> None:
        """Wait, after ``finished``, for the threads that served this executor."""
        if self._direct is not None:
            self._direct.join()
        if self.output is not None:
            self.output.join()
        self.dependencies.join()
        self.judge.join()
        self.callbacks.join()
        if self.journal is not None:
            self.journal.join()


@contextlib.contextmanager
def _quiet_grpc() -> Iterator[None]:
    """Let gRPC read its settings as it starts: no handlers around ``os.fork()``, no log on stderr.

    Those handlers start gRPC's own threads anew in a forked child, where they serve this process's
    connections and crash.
    """
    ours = {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "NONE"}
    added = {name: value for name, value in ours.items() if name not in os.environ}
    os.environ.update(added)
    try:
        from grpc._cython import cygrpc  # type: ignore[attr-defined]

        if reset := getattr(cygrpc, "reset_grpc_config_vars", None):
            reset()  # the program may have imported gRPC before, which has it read them
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _private_directory() -> str:
    """Make a directory that only this user can enter, with a path short enough for a socket."""
    path = tempfile.mkdtemp(prefix="cloudexec-")
    if len(path) > 100:  # a socket's address has 108 bytes at most
        shutil.rmtree(path)
        path = tempfile.mkdtemp(prefix="cloudexec-", dir="/tmp")
    return path
