"""Carries out the core's commands about tasks: gives each future its outcome.

If other tasks wait for a task that ends, they are put into ``concluded``, and ``Dependencies``
handles them.
"""

from __future__ import annotations

import asyncio
import copy
import logging
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cloudexec import _payload
from cloudexec._core import commands, events
from cloudexec._core.events import Failure, FailureKind
from cloudexec._describing import text_of, type_name
from cloudexec._errors import InitializerError
from cloudexec._future import BatchFuture
from cloudexec._log import Log
from cloudexec._objects.ref import Ref
from cloudexec._records import Composed, Payload
from cloudexec._server.budget import PendingBudget
from cloudexec._server.callbacks import CallbackThread
from cloudexec._server.engine import Engine
from cloudexec._server.keeper import Keeper, Recipe
from cloudexec._server.outcomes import LOSSES, decode_exception, decode_result, error_of
from cloudexec._server.output import OutputThread
from cloudexec._server.sessions import Sessions

if TYPE_CHECKING:
    from cloudexec._journal.journal import Journal

__all__ = ["Futures"]


class Futures:
    """The futures of one executor. Used on the loop thread only.

    Args:
        engine: Whose tasks they are of.
        sessions: Of the workers that ran them.
        keeper: Of results that stay on workers.
        output: Shows what tasks print; ``None``: that is not shown.
        budget: Of what is submitted and not done; ``None``: there is no limit.
        more_memory: Says which settings give a worker of a size more memory.
    """

    def __init__(
        self,
        engine: Engine,
        sessions: Sessions,
        keeper: Keeper,
        output: OutputThread | None,
        budget: PendingBudget | None,
        more_memory: Callable[[int], str],
    ) -> None:
        self.journal: Journal | None = None
        """Records results, before their futures are done if its store is a file."""
        self.concluded: deque[tuple[list[Any], Any, object]] = deque()
        """The tasks that waited for a task, its future, and its pickled result if it has one."""
        self._engine = engine
        self._sessions = sessions
        self._keeper = keeper
        self._output = output
        self._budget = budget
        self._more_memory = more_memory
        self._callbacks = CallbackThread()

    # Commands.

    def mark_running(self, command: commands.MarkRunning) -> None:
        """Mark the futures of tasks that workers have begun as running."""
        for task in command.tasks:
            future = task.handle
            with future._lock:
                if future._state == "PENDING":
                    future._state = "RUNNING"

    def resolve(self, command: commands.ResolveTasks) -> None:
        """Give tasks their results, after their output has been shown."""
        worker = command.worker
        session = self._sessions.get(worker)
        printed: set[int] = session.printed if session is not None else set()
        give = self._give_result if self.journal is None else self._record
        for task, result, seconds in zip(
            command.tasks, command.results, command.seconds, strict=True
        ):
            future = task.handle
            future._worker_id = worker
            future._run_time = seconds
            future._attempts = task.lost + 1
            if printed and task.lease in printed:
                printed.discard(task.lease)
                self.after_output(give, task, future, result)
            else:
                give(task, future, result)

    def fail(self, command: commands.FailTask) -> None:
        """Give a task that is not tried again its exception, after its output has been shown."""
        task: Any = command.task
        failure = command.failure
        future = task.handle
        future._worker_id = command.worker
        future._attempts = task.lost if failure.kind in LOSSES else task.lost + 1
        if failure.kind is not FailureKind.WORKER_LOST:
            future._run_time = failure.detail.seconds
            future._output = failure.detail.output
            if failure.detail.output and self._output is not None:
                self.after_output(self._give_failure, command.worker, task, failure)
                return
        self._give_failure(command.worker, task, failure)

    def cancel(self, command: commands.CancelTasks) -> None:
        """Cancel tasks on behalf of the executor."""
        for task in command.tasks:
            future = task.handle
            future._owner = None
            with future._lock:
                if not future.done():
                    future._conclude("CANCELLED_AND_NOTIFIED", "add_cancelled")
            self.let_go(task, future, True)

    # Outcomes.

    def _record(self, task: Any, future: BatchFuture[Any], result: Any) -> None:
        """Hand a result to the journal, which gives it to its future, now or once it is written."""
        assert self.journal is not None
        if not self.journal.add(task, future, result):
            self._give_result(task, future, result)

    def give_recorded(self, given: list[tuple[Any, BatchFuture[Any], Any]]) -> None:
        """Give results that are in the journal now to their futures."""
        self._engine.now()
        for task, future, result in given:
            if task is not None:
                self._give_result(task, future, result)
        self._engine.settle()

    def give_resumed(self, task: Any, result: Payload, seconds: float) -> None:
        """Give a task that no worker has a result that was found in the journal."""
        assert self.journal is not None
        future = task.handle
        self.journal.note_resumed(future)
        future._run_time = seconds
        self._give_result(task, future, result)

    def _give_result(self, task: Any, future: BatchFuture[Any], result: Any) -> None:
        kind = type(result)
        if kind is bytes:
            done = future._finish(result, None, decode_result)
        elif kind is Composed:
            if task.requirements is not None and task.requirements.options.keep:
                if task.requirements.options.on_loss == "recompute":
                    result.recipe = Recipe(task)
                result = Ref(result, self._keeper)
                done = future._finish(result, None, None)
            else:
                result.shared = result.shared or task.dependents is not None
                done = future._finish(result, None, decode_result)
        else:
            done = future._finish(result.value, result.error, None)
        self.let_go(task, future, done, result)

    def _give_failure(self, worker: str, task: Any, failure: Failure) -> None:
        future = task.handle
        detail = failure.detail
        if failure.kind is not FailureKind.WORKER_LOST and detail.payload:
            done = future._finish(detail.payload, None, decode_exception, failed=True)
            self.let_go(task, future, done)
        elif failure.kind is FailureKind.KILLED:
            future.cancel(running=True)
            self.let_go(task, future, True)
        else:
            more = ""
            if failure.out_of_memory:
                more = self._more_memory(self._engine.machine.request_of(task).size)
            self.set_exception(task, error_of(worker, task, failure, more))

    def set_exception(self, task: Any, error: BaseException) -> None:
        """End a task with an exception that was made here, not sent by a worker."""
        future = task.handle
        if future is not None:
            self.let_go(task, future, future._finish(None, error, None))

    def let_go(
        self, task: Any, future: BatchFuture[Any], done: bool, result: object = None
    ) -> None:
        """Free all that an ended task holds, and pass its outcome on to callbacks and dependents.

        Args:
            task: The task.
            future: The task's future.
            done: Whether the future took this outcome. It is false if it was done already.
            result: The task's result, pickled or as an object; ``None`` if it has none.
        """
        task.payload = task.function = task.handle = None
        future._task = None
        future._owner = None
        if self._budget is not None:
            self._budget.give(task)
        future._number = task.number
        future._ended = self._engine.moment
        if self.journal is not None and result is None:
            self.journal.give_back(future)
        if future._on_end is not None:
            on_end, future._on_end = future._on_end, None
            on_end(future, result is not None)
        if done and future._has_callbacks():
            self._callbacks.put(future)
        if task.dependents is not None:
            dependents, task.dependents = task.dependents, None
            self.concluded.append((dependents, future, result if done else None))

    def after_output(self, call: Callable[..., object], *args: object) -> None:
        """Call a function on the loop once all output so far has been shown."""
        assert self._output is not None

        def carry_on() -> None:
            self._engine.now()
            call(*args)
            self._engine.settle()

        self._output.after(lambda: self._engine.portal.post(carry_on))

    # The end of all tasks.

    def initializer_failed(self, payload: bytes) -> None:
        """Fail all tasks, as the initializer has raised in a worker.

        Args:
            payload: The pickled exception.
        """
        cause = _payload.loads_exception(payload)
        error = InitializerError(
            f"the initializer raised {type_name(cause)} in a worker: {text_of(cause)}"
        )
        error.__cause__ = cause
        log = Log("concurrent.futures")  # the standard library's logger, with its message
        log.log_exception("Exception in initializer:", exc=cause, level=logging.CRITICAL)
        self.break_down(error)

    def break_down(self, error: BaseException) -> None:
        """Fail every open task and all later ones with an error, and stop the workers."""
        engine = self._engine
        if engine.broken is not None:
            return
        engine.broken = error
        if self._budget is not None:
            self._budget.wake()
        machine = engine.machine
        waiting = [*machine.waiting_tasks(), *machine.blocked, *machine.backing_off_tasks()]
        tasks: list[Any] = [task for task in waiting if task.handle is not None]
        for worker in machine.workers.values():
            tasks.extend(task for task in worker.leases.values() if task.handle is not None)
        for task in tasks:
            future = task.handle
            future._finish(None, self.broken_error(), None)
            if future._has_callbacks():
                self._callbacks.put(future)
        engine.feed(events.TasksCancelled(tasks))
        engine.feed(events.ShutdownRequested(cancel=True, kill=True))

    def broken_error(self) -> BaseException:
        """Return a copy of the error with which every task fails."""
        broken = self._engine.broken
        assert broken is not None
        error = copy.copy(broken)  # a copy, as each future's exception gets its own traceback
        error.__cause__ = broken.__cause__
        return error

    async def close_journal(self) -> None:
        """Let the journal write the remaining results, and close it."""
        journal = self.journal
        if journal is None:
            return
        await self.all_shown()  # some results reach the journal only after their output is shown
        closed = asyncio.Event()
        journal.close(lambda: self._engine.portal.post(closed.set))
        await closed.wait()

    async def all_shown(self) -> None:
        """Wait until all output of tasks has been shown."""
        if self._output is not None:
            shown = asyncio.Event()
            self.after_output(shown.set)
            await shown.wait()

    def stop(self) -> None:
        """End the thread that runs callbacks, after all callbacks."""
        self._callbacks.stop()

    def join(self) -> None:
        """Wait for the threads, after ``stop``."""
        self._callbacks.join()
        if self.journal is not None:
            self.journal.join()
