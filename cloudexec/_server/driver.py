"""Creates the parts of one executor, starts and ends them, and takes the tasks of its users."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from cloudexec._config import ServerConfig
from cloudexec._core import commands, events
from cloudexec._core.events import Event
from cloudexec._core.tasks import TaskState
from cloudexec._future import BatchFuture
from cloudexec._launchers.base import Launcher
from cloudexec._log import Log
from cloudexec._objects.store import BlobStore
from cloudexec._server.bucket import BucketTransfers
from cloudexec._server.budget import PendingBudget
from cloudexec._server.dependencies import Dependencies
from cloudexec._server.descriptors import check_files
from cloudexec._server.engine import Engine
from cloudexec._server.futures import Futures
from cloudexec._server.keeper import Keeper
from cloudexec._server.launches import Launches
from cloudexec._server.listener import Listener
from cloudexec._server.outcomes import counted, decode_result
from cloudexec._server.output import OutputThread
from cloudexec._server.portal import Portal
from cloudexec._server.refusals import Refusals
from cloudexec._server.retrying import RetryPredicate
from cloudexec._server.service import Hold, Service
from cloudexec._server.sessions import Sessions
from cloudexec._server.story import Story
from cloudexec._server.submission import Setup, Submission
from cloudexec._server.workers import Workers

if TYPE_CHECKING:
    from cloudexec._journal.journal import Journal
    from cloudexec._journal.program import Program
    from cloudexec._server.takeover import Takeover

__all__ = ["Driver"]

_logger = Log()
_RECALL_TIMEOUT = 1.0
"""Seconds that ``cancel()`` waits for a worker to say whether a task has begun."""
_AWAY = (TaskState.SENT, TaskState.RUNNING, TaskState.DONE)
"""States in which a worker has the task, or has finished it."""
_END_GRACE = 5.0
"""Seconds that workers have to end by themselves when the executor ends."""
_END_TRIES = 6
"""Times that workers which do not end are terminated, before the executor gives up on them."""


class Driver:
    """The part of one executor that runs on the loop thread.

    Args:
        config: Settings of the core.
        setup: Settings of the workers and of the server.
        launcher: Starts workers.
        store: The client's blobs (large pieces of arguments and results).
        numbers: Numbers tasks.
        budget: Limits the tasks that are submitted and not done; ``None`` for no limit.
    """

    def __init__(
        self,
        config: ServerConfig,
        setup: Setup,
        launcher: Launcher,
        store: BlobStore,
        numbers: Iterator[int],
        budget: PendingBudget | None,
    ) -> None:
        self.setup = setup
        self.store = store
        store.on_end = self._blob_ended
        self.numbers = numbers
        self.budget = budget
        self.portal = Portal.acquire()
        self.engine = engine = Engine(config, self.portal)
        self.machine = engine.machine
        self.finished = threading.Event()
        self.inbox: deque[Submission | Event | int] = deque()
        self.journal: Journal | None = None
        self.takeover: Takeover | None = None
        self.transfers: BucketTransfers | None = None
        self._launcher = launcher
        self._woken = False
        self._prepared = False
        self._starting: asyncio.Task[Any] | None = None
        self._started_at = time.monotonic()
        is_shown = setup.output != "off" or setup.forward_logs
        self.output = OutputThread(setup.output) if is_shown else None
        # Each part knows only parts that are made before it. Of later parts it knows at most a
        # function that it is given to call.
        self.sessions = Sessions()
        self.keeper = Keeper(engine, self.sessions, store, self, numbers, self.finished)
        self.futures = Futures(
            engine, self.sessions, self.keeper, self.output, budget, launcher.more_memory
        )
        self.launches = Launches(
            engine,
            self.sessions,
            self.futures,
            launcher,
            setup.max_cost_usd,
            lambda launch, end: self.workers.launch_ended(launch, end),
        )
        self.story = Story(engine, self.launches, launcher)
        self.retry_predicate = RetryPredicate(engine)
        self.dependencies = Dependencies(engine, self.futures, self.keeper, store, self)
        self.workers = Workers(engine, self.sessions, self.launches, self.keeper, launcher)
        self.refusals = Refusals(engine)
        self.service = Service(
            engine=engine,
            setup=setup,
            store=store,
            sessions=self.sessions,
            workers=self.workers,
            launches=self.launches,
            keeper=self.keeper,
            futures=self.futures,
            refusals=self.refusals,
            output=self.output,
        )
        self.listener = Listener(self.service)
        engine.connect(
            carry_out={
                commands.SendTasks: self._send,
                commands.MarkRunning: self.futures.mark_running,
                commands.ResolveTasks: self._resolve,
                commands.FailTask: self.futures.fail,
                commands.JudgeFailure: self.retry_predicate.judge,
                commands.FailTasksUnlaunched: self.launches.fail_tasks,
                commands.CancelTasks: self.futures.cancel,
                commands.RecallTasks: self.workers.recall,
                commands.KillTasks: self.workers.kill,
                commands.LaunchWorker: self.launches.ask,
                commands.TerminateLaunch: self.launches.withdraw,
                commands.DrainWorker: self.workers.drain,
                commands.EvacuateWorker: self.workers.evacuate,
                commands.TerminateWorker: self.workers.terminate,
                commands.CloseSession: self.workers.close,
                commands.Finish: self._finish,
            },
            notes=self.story.notes,
            settle=self.dependencies.settle,
            break_down=self.futures.break_down,
        )

    # Called from any thread.

    def post(self, item: Submission | Event | int) -> None:
        """Put an item into the inbox, and wake the loop.

        Args:
            item: A task; an event for the core; or the number of a function that is not used any
                more, or the negative number of such a blob.
        """
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

    def is_busy(self) -> bool:
        """Say whether there are tasks that can run, or items in the inbox."""
        return bool(self.machine.open_tasks or self.inbox)

    @property
    def broken(self) -> BaseException | None:
        """The error with which every task fails, or ``None``."""
        return self.engine.broken

    def cancelled(self, future: BatchFuture[Any], was_running: bool) -> None:
        """Pass on that the user has cancelled a future."""
        task = future._task
        if task is not None:
            self.post(events.TasksCancelled((task,), kill=was_running))

    @contextlib.contextmanager
    def withheld(self, future: BatchFuture[Any]) -> Iterator[bool]:
        """Recall a task that was sent ahead, and do not send it again within this context.

        Yields:
            Whether no worker has the task. It is false if a worker has begun the task, or has not
            answered in time.
        """
        if self.portal.is_this_thread:
            yield True
            return
        holds = self.service.holds
        # This thread sets the hold and then reads the task's state. The loop thread, when it sends
        # the task, changes the state and then reads the hold. So at least one of the two threads
        # sees what the other has done.
        hold = holds[future] = Hold()
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
            holds.pop(future, None)

    # The start.

    def open_journal(
        self, where: str | os.PathLike[str], program: Program, initializer: object
    ) -> None:
        """Open the journal, from which results are taken and to which they are written.

        Called in another thread than the loop's.

        Args:
            where: The journal's file or URL.
            program: The code of this process.
            initializer: The workers' initializer with its arguments; ``None`` without one.

        Raises:
            CloudexecError: If the journal cannot be used.
        """
        from cloudexec._journal.journal import Journal

        give = self.futures.give_recorded
        self.journal = journal = Journal.open(where, program, self.portal, decode_result, give)
        self.futures.journal = journal
        journal.set_up(initializer, is_watching=not self._launcher.needs_network())
        if self._launcher.needs_network() and journal.store.keeps_state:
            self._take_over(journal)

    def _take_over(self, journal: Journal) -> None:
        """Let workers survive this process, and look for workers that survived an earlier one."""
        from cloudexec._server.takeover import Takeover

        self.takeover = takeover = Takeover(
            engine=self.engine,
            sessions=self.sessions,
            launches=self.launches,
            futures=self.futures,
            story=self.story,
            setup=self.setup,
            store=self.store,
            journal=journal,
            launcher=self._launcher,
            on_end=self.workers.launch_ended,
        )
        self.workers.takeover = self.dependencies.takeover = self.service.takeover = takeover
        self.launches.on_change = takeover.changed

    async def start(self) -> None:
        """Start the launcher and the server.

        Raises:
            LaunchError: If the server cannot listen at its address.
        """
        setup, launcher, engine, takeover = self.setup, self._launcher, self.engine, self.takeover
        self._starting = asyncio.current_task()
        scaling = self.machine.config.scaling
        workers = -(-scaling.max_slots // scaling.slots_per_worker)
        check_files(workers, scaling.slots_per_worker, local=launcher.one_machine)
        wanted = setup.listen or ""
        network = await launcher.start(
            engine.executor_id,
            wanted if takeover is None else takeover.listen(wanted),
            setup.advertise,
            scaling.launch_timeout,
        )
        self._prepared = True
        engine.key = network.key or engine.key
        gathers = None if self.journal is None else self.store
        if self.listener.prepare(network.listen, gathers):
            self.keeper.one_machine = True
        else:
            self._use_bucket()
        self.launches.contact = await self.listener.start(
            network,
            is_plain=launcher.own_processes,
            certificate=None if takeover is None else takeover.certificate,
        )
        if takeover is not None:
            # Last, as from here on an end of this executor is the end of those workers.
            await takeover.look()
            if self.listener.certificate is not None:
                takeover.begin(
                    self.listener.certificate,
                    self.listener.address,
                    has_relay=network.is_relayed,
                )
        for way_in in (network, *network.others):
            if way_in.moving is not None:
                way_in.moving.is_used = True
        engine.start_clock()
        if scaling.min_slots:
            engine.feed(events.DeadlinePassed())
        if setup.max_cost_usd is not None:
            engine.create_task(self.launches.watch_cost(setup.max_cost_usd))
        if launcher.needs_network():  # a worker on this machine that cannot start says so at once
            engine.create_task(self.launches.watch_start())

    def _use_bucket(self) -> None:
        """Send large blobs through the bucket that the user or the launcher names, if any."""
        objects = self.setup.objects
        name, region = self._launcher.bucket()
        if objects.bucket is not None:
            name = str(objects.bucket or "")
        threshold = objects.bucket_threshold
        assert isinstance(threshold, int)
        if name:
            self.transfers = transfers = BucketTransfers(
                self.engine,
                self.sessions,
                self.store,
                name,
                region,
                threshold,
                self.workers.expects,
            )
            self.keeper.transfers = self.workers.transfers = self.service.transfers = transfers

    async def abandon(self) -> None:
        """Close everything after ``start()`` has failed or was interrupted."""
        self.engine.is_closing = True
        if self._starting is not None and not self._starting.done():
            self._starting.cancel()  # the caller was interrupted while ``start()`` ran
            await asyncio.gather(self._starting, return_exceptions=True)
        await self._close_journal()  # after ``start()``, which writes to it
        if self._prepared:
            await self._launcher.close()
        self.listener.close_direct()
        await self.listener.stop()
        self._stop_threads()
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
                self.engine.feed(item)
                if type(item) is events.TasksCancelled:
                    self._drop(item.tasks)
        if tasks or held:
            self._submitted(tasks, held)
        if ended:
            self._forget(ended)

    def _submitted(self, tasks: list[Submission], held: list[Submission]) -> None:
        last = max(some[-1].number for some in (tasks, held) if some)
        self.story.submitted.add(last, self.engine.now())
        if self.broken is not None:
            for task in (*tasks, *held):
                self.futures.set_exception(task, self.futures.broken_error())
            return
        if tasks:
            for task in tasks:
                if type(task.payload) is not bytes:
                    self.keeper.note_inputs(task)
            if self.takeover is not None:
                tasks = self.takeover.sift(tasks)
            self.engine.feed(events.TasksSubmitted(tasks))
        if held:
            self.dependencies.hold(held)

    def _drop(self, tasks: Sequence[Any]) -> None:
        """Free the arguments of cancelled tasks; the user may keep their futures."""
        for task in tasks:
            if task.worker is None:
                task.payload = None
            if self.budget is not None:
                self.budget.give(task)

    def _blob_ended(self, number: int) -> None:
        self.post(-number)

    def _forget(self, ended: list[int]) -> None:
        """Forget unused functions and (as negative numbers) blobs, here and on the workers."""
        self.sessions.forget(ended)
        blobs = [-number for number in ended if number < 0]
        if blobs:
            self.store.sweep()
            if self.transfers is not None:
                self.transfers.forget(blobs)

    def break_down(self, error: BaseException) -> None:
        """Fail every task, also those in the inbox, and stop the workers."""
        self._take_inbox()
        self.futures.break_down(error)

    def _send(self, command: commands.SendTasks) -> None:
        self.story.sent(command)
        self.workers.send(command)

    def _resolve(self, command: commands.ResolveTasks) -> None:
        self.launches.first_result(command.worker)
        self.futures.resolve(command)

    # The end.

    def _finish(self, command: commands.Finish) -> None:
        self.engine.create_task(self._close())

    async def _close(self) -> None:
        """Wait until the workers' processes have ended, then close all parts."""
        await self._close_journal()
        await self._see_launches_end()
        self.engine.is_closing = True
        self.launches.terminate_now()
        await self._launcher.close()
        if self.transfers is not None:
            await self.transfers.close()
        self.story.teller.sum_up()
        self._sum_up()
        self.engine.stop()
        self.keeper.close()
        self.listener.close_direct()
        await self.listener.stop()
        await self.futures.all_shown()
        self._stop_threads()
        self.store.close()
        self.portal.loop.call_soon(self._closed)

    async def _close_journal(self) -> None:
        if self.takeover is not None:
            self.takeover.close()
        await self.futures.close_journal()

    def _stop_threads(self) -> None:
        if self.output is not None:
            self.output.stop()
        self.dependencies.stop()
        self.retry_predicate.stop()
        self.futures.stop()

    async def _see_launches_end(self) -> None:
        """Wait for the workers' processes, which end by themselves when their connections end."""
        running = self.launches.running
        for tries in range(_END_TRIES + 1):
            if not (running and self._launcher.ends_are_seen):
                return
            self.workers.all_ended.clear()
            try:
                async with asyncio.timeout(_END_GRACE):
                    await self.workers.all_ended.wait()
            except TimeoutError:
                if tries < _END_TRIES:
                    self._launcher.terminate(list(running))
        if running:
            _logger.warning(
                "%s not known to have ended %g s after the executor had it terminated: %s",
                counted(len(running), "worker"),
                _END_TRIES * _END_GRACE,
                self._launcher.describe(),
                extra=self.engine.fields("launches_left", count=len(running)),
            )

    def _sum_up(self) -> None:
        """Log one line with tasks, time, cost and launchers, if there were workers elsewhere."""
        cost, launchers = self._launcher.cost(), self.launches.counts()
        if not cost.accrued_usd and not (launchers and self._launcher.needs_network()):
            return
        counts = self.machine.counts
        done = counts["succeeded"] + counts["failed"]
        connected, launched = counts["workers_connected"], counts["launches"]
        workers = counted(max(connected, launched), "worker")
        if connected < launched:
            workers = f"{connected} of {workers}"
        if self.takeover is not None and self.takeover.workers:
            workers += f", {self.takeover.workers} taken over,"
        minutes, seconds = divmod(round(time.monotonic() - self._started_at), 60)
        line = f"{counted(done, 'task')} on {workers} in {minutes}:{seconds:02d}"
        if cost.accrued_usd:
            line += f", about ${cost.accrued_usd:.4f} ({cost.note})"
        line = "; ".join((line, *map(str, launchers)))
        if self.setup.output == "inherit":
            # Nobody may read it any more, as with `2>&1 | head`; the executor ends nevertheless.
            with contextlib.suppress(OSError, ValueError):
                print(f"cloudexec: {line}", file=sys.stderr)
        else:
            _logger.info("%s", line)

    def _closed(self) -> None:
        self.portal.release()
        self.finished.set()

    def join(self) -> None:
        """Wait for the threads that served this executor, after ``finished`` was set."""
        self.listener.join()
        if self.output is not None:
            self.output.join()
        self.dependencies.join()
        self.retry_predicate.join()
        self.futures.join()
