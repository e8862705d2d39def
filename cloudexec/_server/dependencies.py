"""Holds back tasks whose arguments contain futures, until the last of these is done.

If the future belongs to this executor, the waiting task is listed in the task that computes it
(``dependents``), and the result's bytes go into the waiting call without being unpickled. Tasks
that wait for other futures are listed in ``Dependencies.foreign``. If a future fails or is
cancelled, so is each task that waits for it. Outcomes are put into a queue that one loop empties,
so that a long chain of tasks causes no recursion.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

from cloudexec import _payload
from cloudexec._core import commands, events
from cloudexec._core.tasks import TaskState
from cloudexec._describing import cause_of, describe, is_a, presentable, type_name
from cloudexec._errors import DependencyError, PayloadError
from cloudexec._forked import OwnThread, end_if_forked
from cloudexec._future import BatchFuture, Owner
from cloudexec._journal.packing import Stored
from cloudexec._objects.ref import Ref
from cloudexec._objects.store import BlobStore
from cloudexec._payload import Unfinished
from cloudexec._records import Composed, Payload
from cloudexec._server.engine import Engine
from cloudexec._server.futures import Futures
from cloudexec._server.keeper import Keeper
from cloudexec._server.outcomes import decode_result
from cloudexec._server.splicing import Spliced
from cloudexec._server.submission import Needs, Submission

if TYPE_CHECKING:
    from cloudexec._server.takeover import Takeover

__all__ = ["Dependencies", "hold_back"]

_CANCELLED = object()
_Waiting = list[Any]
"""Waiting tasks, each followed by the index of the dependency that it waits for. The list is flat
because in a graph of 100,000 tasks each further object costs time in the garbage collector."""


def hold_back(
    task: Submission,
    unfinished: Unfinished,
    name: str,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """Let a task wait for the futures among its arguments; it waits for no ``Ref``.

    Args:
        task: The task, which has not been submitted yet.
        unfinished: The pickle of its call, with placeholders for futures and for each ``Ref``.
        name: The function's name, for messages.
        args: The positional arguments.
        kwargs: The keyword arguments.
    """
    futures = unfinished.futures
    keeper = task.handle._owner.keeper
    inputs: list[Any] = [keeper.payload_of(each) if type(each) is Ref else None for each in futures]
    if None not in inputs:
        task.payload = Spliced(unfinished.payload, inputs)
        return
    task.payload = unfinished.payload
    waiting = [None if isinstance(each, Ref) else each for each in futures]
    needs = task.needs = Needs(name, waiting, _places(futures, args, kwargs))
    needs.inputs = inputs
    needs.missing = inputs.count(None)


def _places(
    futures: Sequence[object], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Find each future's place, for messages: an argument or its item, ``None`` if it is deeper."""
    found: dict[int, Any] = {}
    for where, value in (*enumerate(args), *kwargs.items()):
        if is_a(value, Future):
            found.setdefault(id(value), where)
        elif type(value) in (list, tuple):
            for position, item in enumerate(value):
                if is_a(item, Future):
                    found.setdefault(id(item), (where, position))
        elif type(value) is dict:
            for key, item in value.items():
                if is_a(item, Future):
                    found.setdefault(id(item), (where, key))
    return tuple([found.get(id(future)) for future in futures])


def _spell_out(place: Any, index: int, count: int) -> str:
    if place is None:
        return f"dependency {index + 1} of {count}"
    where, *item = place if type(place) is tuple else (place,)
    argument = f"argument {where}" if type(where) is int else f"keyword {_named(where)}"
    return f"{argument}, item {_named(item[0])}" if item else argument


def _named(key: object) -> str:
    # The repr() of other types is code of the user's, which must not run on the loop thread.
    return repr(key) if type(key) in (str, int) else f"of type {type_name(key)}"


class _Failed:
    """Why a task is not run. The exception is made only when the user asks for it."""

    __slots__ = ("dependency", "direct", "name", "origin", "stage")

    def __init__(
        self, name: str, dependency: str, origin: Any, *, direct: bool, stage: str = ""
    ) -> None:
        self.name = name
        self.dependency = dependency
        self.origin = origin  # the future that failed, or the exception
        self.direct = direct
        self.stage = stage


def _decode_failed(future: BatchFuture[Any]) -> None:
    failed: _Failed = future._result
    origin = failed.origin
    cause: Any = origin.exception() if is_a(origin, Future) else origin
    what = describe(cause).strip().partition("\n")[0]
    stage = f"stage {failed.stage!r} " if failed.stage else ""
    if failed.direct:
        why = f"its {failed.dependency} {f'({stage.strip()}) ' if stage else ''}failed: {what}"
    else:
        why = f"its {failed.dependency} was not run either, because {stage or 'a call '}"
        why += f"that it depends on failed: {what}"
    error = DependencyError(
        f"{failed.name} was not run: {why}", dependency=failed.dependency, stage=failed.stage
    )
    error.__cause__ = presentable(cause)
    future._result = None
    future._exception = error


class Dependencies:
    """The waiting tasks of one executor. Used on the loop thread, unless a method says otherwise.

    Args:
        engine: Is told when tasks can be sent.
        futures: The futures of the executor's tasks.
        keeper: Looks after results that stay on workers.
        store: The client's blobs; values that are pickled here go into it.
        owner: The owner of the executor's futures.
    """

    def __init__(
        self, engine: Engine, futures: Futures, keeper: Keeper, store: BlobStore, owner: Owner
    ) -> None:
        self.takeover: Takeover | None = None
        """Knows which calls are held by workers of an earlier process."""
        self.foreign: dict[Future[Any], _Waiting] = {}
        """Futures that this executor does not complete, and the tasks that wait for them."""
        self._engine = engine
        self._futures = futures
        self._keeper = keeper
        self._store = store
        self._owner = owner
        # Tasks that waited for a future, and its outcome, for ``settle`` to carry out.
        self._concluded: deque[tuple[_Waiting, Any]] = deque()
        self._values: queue.SimpleQueue[tuple[_Waiting, Future[Any]] | None] = queue.SimpleQueue()
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None

    def prepare(self) -> None:
        """Start the thread that pickles values. Any thread may call this.

        It is started early, because no thread can be started while the interpreter ends.
        """
        with self._starting:
            if self._thread is None:
                self._thread = OwnThread(self._pickle_values, "cloudexec-values")
                self._thread.start()

    # New tasks.

    def hold(self, tasks: list[Submission]) -> None:
        """Take new tasks that wait for futures."""
        self._engine.feed(events.TasksBlocked(tasks))
        for task in tasks:
            needs = task.needs
            if needs is None or task.handle is None or task.handle.done():
                continue  # it was cancelled; the inbox holds the event for that
            futures, needs.futures = needs.futures, ()
            for index, future in enumerate(futures):
                if future is not None:
                    try:
                        self._wait_for(future, task, index)
                    except BaseException as exc:
                        # A user's class of futures may have methods that fail.
                        self._concluded.append(([task, index], self._failed_with(future, exc)))
        self.settle()

    def _wait_for(self, future: Future[Any], task: Submission, index: int) -> None:
        if isinstance(future, BatchFuture):
            producer = future._task
            if producer is not None and future._owner is self._owner and not future.done():
                if producer.dependents is None:
                    producer.dependents = [task, index]
                else:
                    producer.dependents += (task, index)
                return
        if future.done():
            self._conclude([task, index], future, None)
        elif future in self.foreign:
            self.foreign[future] += (task, index)
        else:
            self.foreign[future] = [task, index]
            future.add_done_callback(self._on_foreign)

    def _on_foreign(self, future: Future[Any]) -> None:
        """Pass on that a foreign future is done; runs in the thread that completed it."""
        try:
            self._engine.portal.post(self._take_foreign, future)
        except RuntimeError:
            pass  # the loop has closed, so no task waits any more

    def _take_foreign(self, future: Future[Any]) -> None:
        waiting = self.foreign.pop(future, None)
        if waiting:
            self._engine.now()
            self._conclude(waiting, future, None)
            self.settle()

    # Outcomes.

    def _conclude(self, waiting: _Waiting, future: Future[Any], result: object) -> None:
        """Note that a future is done; ``settle`` carries out what follows.

        Args:
            waiting: The tasks that wait for it.
            future: The future.
            result: Its pickled result. If it is anything else, the future is asked.
        """
        if type(result) is Ref:
            result = result._payload
        elif type(result) is not bytes and type(result) is not Composed:
            try:
                result = self._look(future)
            except BaseException as exc:
                result = self._failed_with(future, exc)  # a method of a user's class has failed
            if result is None:
                self._values.put((waiting, future))
                return
        self._concluded.append((waiting, result))

    def _look(self, future: Future[Any]) -> Any:
        """Return a future's outcome; ``None`` if the thread that pickles values must get it."""
        if future.cancelled():
            return _CANCELLED
        if isinstance(future, BatchFuture):
            # A thread that unpickles the result holds the lock and runs the user's code: the loop
            # must not wait for that.
            if not future._lock.acquire(blocking=False):
                return None
            try:
                decode = future._decode
                if decode is decode_result:
                    if type(future._result) is Composed:
                        future._result.shared = True
                        if not self._keeper.has(future._result):
                            return None  # it belongs to another executor, and must be copied
                    elif type(future._result) is Stored:
                        return None  # it must be read from disk
                    return future._result
                if decode is _decode_failed:
                    failed: _Failed = future._result
                    return _Failed("", "", failed.origin, direct=False, stage=failed.stage)
                if decode is not None:
                    return _Failed("", "", future, direct=True, stage=future._label)
                if type(future._result) is Ref and future._result._keeper is self._keeper:
                    return future._result._payload
            finally:
                future._lock.release()
        error = future.exception()
        return None if error is None else self._failed_with(future, error)

    def _failed_with(self, future: Future[Any], error: BaseException) -> _Failed:
        cause = cause_of(error)
        if is_a(error, DependencyError) and cause is not None:
            return _Failed("", "", cause, direct=False, stage=error.stage)
        label = future._label if isinstance(future, BatchFuture) else ""
        return _Failed("", "", error, direct=True, stage=label)

    def settle(self) -> None:
        """Release, fail or cancel the tasks whose futures are done, and then those after them."""
        released: list[Submission] = []
        dropped: list[Submission] = []
        cancelled: list[Submission] = []
        finished = self._futures.concluded
        if not (finished or self._concluded):
            return
        while finished or self._concluded:
            while finished:
                self._conclude(*finished.popleft())
            if not self._concluded:
                break
            waiting, outcome = self._concluded.popleft()
            for task, index in zip(waiting[::2], waiting[1::2], strict=True):
                needs = task.needs
                if needs is None or task.handle is None:
                    continue  # the task is done already
                if outcome is _CANCELLED:
                    task.needs = None
                    cancelled.append(task)
                    self._futures.cancel(commands.CancelTasks([task]))
                elif type(outcome) is _Failed:
                    task.needs = None
                    dropped.append(task)
                    self._fail(task, needs, index, outcome)
                else:
                    needs.inputs[index] = outcome
                    needs.missing -= 1
                    if not needs.missing:
                        task.needs = None
                        assert task.payload is not None
                        task.payload = Spliced(task.payload, needs.inputs)
                        self._keeper.note_inputs(task)
                        task.handle._released = self._engine.moment
                        released.append(task)
        feed = self._engine.feed
        if dropped:
            feed(events.TasksDropped(dropped))
        if cancelled:
            feed(events.TasksCancelled(cancelled))
        if released:
            if self.takeover is not None:
                released = self.takeover.sift(released, held=True)
            feed(events.TasksReleased(released))

    def _fail(self, task: Submission, needs: Needs, index: int, failed: _Failed) -> None:
        future: BatchFuture[Any] | None = task.handle
        if future is None:
            return
        dependency = _spell_out(needs.places[index], index, len(needs.places))
        why = _Failed(
            needs.name, dependency, failed.origin, direct=failed.direct, stage=failed.stage
        )
        done = future._finish(why, None, _decode_failed, failed=True)
        self._futures.let_go(task, future, done)

    def cancelled(self, tasks: list[Submission]) -> None:
        """Note that the user cancelled tasks; tasks that wait for them are cancelled, too."""
        for task in tasks:
            task.needs = None
            future = task.handle
            if task.dependents is not None and future is not None:
                waiting, task.dependents = task.dependents, None
                self._concluded.append((waiting, _CANCELLED))
            if task.state is TaskState.BLOCKED:
                task.payload = None
                if future is not None:
                    future._owner = None

    def give_up_foreign(self) -> None:
        """Cancel the tasks that wait for foreign futures, because the interpreter ends."""
        foreign, self.foreign = self.foreign, {}
        for waiting in foreign.values():
            self._concluded.append((waiting, _CANCELLED))
        self.settle()

    # Values.

    def _pickle_values(self) -> None:
        """Pickle values that are Python objects in this process; runs in a thread of its own.

        Such values are results of foreign futures, large results that were unpickled while they
        arrived, and results of other executors.
        """
        while (wanted := self._values.get()) is not None:
            waiting, future = wanted
            outcome: Payload | _Failed
            try:
                pickled = self._pickled(future)
                failure = None if pickled is not None else future.exception()
                if pickled is not None:
                    outcome = pickled
                elif failure is None:
                    value = future.result()
                    if type(value) is Ref:
                        outcome = self._keeper.payload_of(value)
                    else:
                        outcome = _payload.dumps(value, self._store)
                    del value
                else:
                    outcome = self._failed_with(future, failure)
                end_if_forked()
            except BaseException as exc:
                end_if_forked(exc)
                error = PayloadError(
                    f"the value of a dependency could not be pickled ({describe(exc)})"
                )
                error.__cause__ = presentable(exc)
                outcome = _Failed("", "", error, direct=True)
            try:
                self._engine.portal.post(self._take_value, waiting, outcome)
            except RuntimeError:
                pass  # the loop has closed
            del wanted, waiting, future, outcome, pickled

    def _pickled(self, future: Future[Any]) -> Composed | None:
        """Return a result that is still pickled as a payload of this executor, if it is one."""
        if not isinstance(future, BatchFuture):
            return None
        with future._lock:
            result = future._result if future._decode is decode_result else None
            if type(result) is Composed:
                result.shared = True
        if type(result) is Stored:
            return result.composed(self._store)
        if type(result) is not Composed:
            return None
        keeper = self._keeper
        return result if keeper.has(result) else keeper.copy_of(result)

    def _take_value(self, waiting: _Waiting, outcome: Payload | _Failed) -> None:
        self._concluded.append((waiting, outcome))
        self.settle()

    def stop(self) -> None:
        """End the thread."""
        self._values.put(None)

    def join(self) -> None:
        """Wait for the thread, after ``stop``."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
