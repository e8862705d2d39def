"""BatchExecutor: the face of ``concurrent.futures``; takes no scheduling decision."""

from __future__ import annotations

import functools
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, ParamSpec, Self, TypeAlias, TypeVar

from cloudexec._config import (
    ScalingPolicy,
    ServerConfig,
    TaskOptions,
    check_addresses,
    check_count,
    check_positive,
    usable_cpus,
)
from cloudexec._ending import kill, wait_for_end
from cloudexec._errors import (
    BrokenBatchExecutor,
    CloudexecError,
    ConfigError,
)
from cloudexec._future import BatchFuture
from cloudexec._launchers.base import Cost
from cloudexec._objects.options import ObjectOptions
from cloudexec._record_class import names_of
from cloudexec._sizing import ladder_of, requirements_of
from cloudexec._submission import Submitter

if TYPE_CHECKING:
    from cloudexec._core.resources import Requirements
    from cloudexec._launchers.base import Launcher
    from cloudexec._objects.ref import Ref
    from cloudexec._server.budget import PendingBudget
    from cloudexec._server.driver import Driver
    from cloudexec._stats import ExecutorStats
    from cloudexec._story import TaskStory

__all__ = ["BatchExecutor"]

P = ParamSpec("P")
T = TypeVar("T")

RetryOn: TypeAlias = (
    "type[BaseException] | Sequence[type[BaseException]] | Callable[[BaseException], object] | None"
)


class _Unchanged:
    def __repr__(self) -> str:
        return "unchanged"


_UNSET: Any = _Unchanged()
_OUTPUT_MODES = ("inherit", "logging", "off")


def _briefly(fn: Callable[P, T]) -> Callable[P, T]:
    """Have errors that a caller has made end at the caller's line, not inside of this package."""

    @functools.wraps(fn)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return fn(*args, **kwargs)
        except (ConfigError, TypeError) as exc:
            raise exc.with_traceback(None) from None

    return call


class _Base(Executor):
    """What the executor and its views share: submitting with the options of the one at hand."""

    _options: TaskOptions
    _requirements: Requirements | None
    _executor: BatchExecutor
    _submitter: Submitter

    def __enter__(self) -> Self:
        return self

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> BatchFuture[T]:
        """Schedule ``fn(*args, **kwargs)`` to run on a worker.

        Callable and arguments are pickled now, in this thread; changing them afterwards changes
        nothing. What cannot be pickled fails the future, not this call, whatever pickling raises,
        ``SystemExit`` too; only Ctrl-C in the main thread interrupts it.

        A future among the arguments, however deep in them, is a dependency: the call waits for it,
        takes no slot meanwhile, and gets its value in its place. Any ``concurrent.futures.Future``
        will do, of this executor or not. If it fails, the call is not run and fails with
        ``DependencyError``; if it is cancelled, so is the call.

        Returns:
            A future for the call.

        Raises:
            RuntimeError: After ``shutdown()``, at the end of the interpreter, or in a forked child;
                ``NestingError`` while a module is imported for a task.
            BrokenBatchExecutor: If the executor is broken.
        """
        try:
            return self._submitter.submit(fn, args, kwargs, self._options, self._requirements)
        except CloudexecError as exc:
            raise exc.with_traceback(None)

    def map(
        self,
        fn: Callable[..., T],
        *iterables: Iterable[Any],
        timeout: float | None = None,
        chunksize: int = 1,
        buffersize: int | None = None,
        progress: bool = False,
    ) -> Iterator[T]:
        """Return an iterator over ``fn(*items)``, in the order of the inputs.

        The callable is pickled once. Short tasks travel in batches by themselves: ``chunksize`` is
        not needed for speed.

        Args:
            fn: Takes as many arguments as there are iterables.
            iterables: Read at once, up to the shortest one, unless ``buffersize`` is given.
            timeout: Seconds from this call in which each result must be there; ``None``: no limit.
            chunksize: Calls per task.
            buffersize: Most results not yet taken from the iterator: inputs are read as results
                are taken, so that endless iterables work.
            progress: Show a progress bar on standard error.

        Returns:
            An iterator that raises what a call raised when its turn comes, and ``TimeoutError``
            when the time is up. Closing it, once it has been read from, cancels what has not begun.

        Raises:
            ValueError: If ``chunksize`` or ``buffersize`` is less than 1.
        """
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        if buffersize is not None and not isinstance(buffersize, int):
            raise TypeError("buffersize must be an integer or None")
        if buffersize is not None and buffersize < 1:
            raise ValueError("buffersize must be None or > 0")
        calls: Iterator[tuple[Any, ...]] = zip(*iterables, strict=False)
        try:
            if chunksize > 1:
                from cloudexec._mapping import Chunk, chunks, flatten

                many = self._map(
                    Chunk(fn),
                    ((chunk,) for chunk in chunks(calls, chunksize)),
                    timeout,
                    buffersize,
                    progress,
                )
                return flatten(many)
            return self._map(fn, calls, timeout, buffersize, progress)
        except CloudexecError as exc:
            raise exc.with_traceback(None)

    @_briefly
    def with_options(
        self,
        *,
        timeout: float | None = _UNSET,
        retries: int = _UNSET,
        retry_on: RetryOn = _UNSET,
        cpus: float | None = _UNSET,
        memory: int | str | None = _UNSET,
        gpus: int | None = _UNSET,
        name: str | None = _UNSET,
        priority: int = _UNSET,
        env: Mapping[str, str] | None = _UNSET,
        keep: bool = _UNSET,
        on_loss: Literal["recompute", "raise"] = _UNSET,
        key: str | Callable[..., object] | None = _UNSET,
    ) -> OptionsView:
        """Return a view of this executor whose tasks have other options.

        The view is an ``Executor`` itself, so that it can be handed to a library; it shares the
        workers. Shutting it down does nothing. What is not given stays as it is here.

            >>> with BatchExecutor(1) as executor:
            ...     careful = executor.with_options(timeout=60, env={"MODE": "safe"}, name="safe")
            ...     careful.submit(os.getenv, "MODE").result()
            'safe'

        ``max_workers`` goes on to count tasks: one with ``cpus=4`` is one of them, and takes one
        slot, but is sent only where four processors are free, and nothing else is sent there that
        would need them. One that needs more than any worker of the usual size has is sent to
        larger ones, which are launched for it. On this machine all tasks share its processors and
        memory. It is a matter of accounting: nobody keeps a task from starting more threads.

        Args:
            timeout: Seconds that a task may run before its process is killed; ``None``: no limit.
            retries: How often a task is run again after an attempt was lost; 0: at most once.
            retry_on: What a task may raise and is then run again, as often as ``retries`` says and
                after a pause that grows from a tenth of a second: types of exceptions, or a
                function that takes the exception and says whether. It is called here, in a thread
                of its own. ``TaskTimeoutError`` counts as raised. By default nothing does.
            cpus: Processors that each task needs, such as 0.5 or 4; ``None``: one slot's share of
                its worker.
            memory: Memory that each task needs: bytes, or ``"2GiB"``. Past it the task is killed
                and fails with ``WorkerLostError`` (``out_of_memory``), or, where the launcher has
                a ladder of sizes, goes to the next one. What counts is what the task's processes
                have taken since it began, not what they share. It is looked at many times a
                second: a task may exceed it for a moment. ``None``: one slot's share is reserved,
                and nothing is enforced but what the machine does.
            gpus: GPUs that each task needs. It alone has them: ``CUDA_VISIBLE_DEVICES`` says
                which.
            name: What people call these tasks: in log lines, error messages and before what they
                print.
            priority: Tasks with a higher one are sent first; 0 by default. What was sent goes on.
            env: Variables that are in ``os.environ`` while the task runs, and as they were after
                it; added to those of this view. Libraries that read theirs when they are imported
                do so once per process. None is set by itself, not even ``OMP_NUM_THREADS`` where
                ``cpus`` is given, for that reason: what the first task brought would hold for
                those after it.
            keep: Whether results stay on the worker that made them: the result of a future is then
                a ``Ref``, to be passed to other calls, which prefer to run where it is, or
                ``get()`` from.
            on_loss: What to do when a kept result is lost with its worker: ``"recompute"`` runs its
                task again when it is needed, ``"raise"`` fails with ``RefLostError``.
            key: What the executor's journal knows a call by, in the place of its arguments and of
                objects that are bound to its function: a string, or a function that takes the
                call's arguments, here, and returns a string, a whole number or bytes. It is the
                caller's word that calls with one key have one result. The program's code, Python
                and the versions of what it imports count all the same.

        Raises:
            ConfigError: If an option is out of its range, or no worker can have that much; what
                comes nearest is named.
        """
        given = {name: value for name, value in locals().items() if value is not _UNSET}
        del given["self"]
        return OptionsView(self._executor, self._options.changed(given))

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "an executor cannot be sent to its workers: pass what the call needs of it, such as "
            "the results of others, or make an executor there"
        )

    def explain(self, future: Future[Any]) -> TaskStory:
        """Tell what became of a call: when it was submitted, where it was sent, why attempts of it
        were lost, and how it ended; ``print()`` shows it.

        For a future of this executor or of a view of it, whatever its state, and after
        ``shutdown()`` too. It costs the tasks that nobody asks about nothing.

        Raises:
            TypeError: If it is not a future that ``submit()`` or a graph returned.
            ValueError: If it belongs to another executor.
        """
        from cloudexec._server.explaining import explain

        return explain(self._executor._driver, future)

    def _map(
        self,
        fn: Callable[..., T],
        calls: Iterator[tuple[Any, ...]],
        timeout: float | None,
        buffersize: int | None,
        progress: bool,
    ) -> Iterator[T]:
        from cloudexec._mapping import results

        deadline = None if timeout is None else time.monotonic() + timeout
        submit: Callable[[Iterable[tuple[Any, ...]]], list[BatchFuture[T]]]
        if getattr(self.submit, "__func__", None) is _Base.submit:
            submit = self._submitter.prepare_map(fn, self._options, self._requirements)
        else:  # somebody has replaced it, as tqdm does, and expects it to be called

            def submit(calls: Iterable[tuple[Any, ...]]) -> list[BatchFuture[T]]:
                return [self.submit(fn, *args) for args in calls]

        futures: deque[BatchFuture[T]]
        futures = deque(
            submit(calls if buffersize is None else itertools.islice(calls, buffersize))
        )
        bar = None
        if progress:
            from cloudexec._progress import ProgressBar

            bar = ProgressBar(len(futures) if buffersize is None else None)
            bar.watch(futures)
        rest = iter(()) if buffersize is None else calls
        return results(futures, rest, submit, deadline, bar)


class BatchExecutor(_Base):
    """Runs calls on worker processes: on this machine by default, elsewhere with a launcher.

    A drop-in for ``concurrent.futures.ProcessPoolExecutor``.

        >>> with BatchExecutor(2) as executor:
        ...     future = executor.submit(pow, 2, 10)
        ...     list(executor.map(abs, [-1, -2])), future.result()
        ([1, 2], 1024)

    Args:
        max_workers: Tasks that may run at once; by default the processors this process may use.
        mp_context: Taken for the sake of programs that give one, and not used: how processes start
            is the same everywhere.
        initializer: Called once in each process that runs tasks, before its first task.
        initargs: Its arguments; pickled once, when the workers are started. If that fails,
            ``submit()`` raises ``PayloadError``, as no task could run.
        max_tasks_per_child: Tasks after which a process is replaced by a fresh one.
        launcher: Starts the workers: an object such as ``Batch()``, or the name under which a
            package registers one. By default, the environment variable ``CLOUDEXEC_LAUNCHER``
            names it; or it is ``Batch()`` where ``CLOUDEXEC_PROFILE`` names a profile; or else
            workers are subprocesses on this machine.
        min_workers: How many to start at once, and to keep when there is nothing to do.
        idle_timeout: Seconds after which what has nothing to do is stopped; ``None``: never.
        retries: How often a task is run again when the process or worker that ran it died. An
            exception that the task raises is its result and is never retried. 0: at most once.
        task_timeout: Seconds that a task may run before the process that runs it is killed.
        output: What tasks print: ``"inherit"`` shows it here as it comes, ``"logging"`` logs it to
            ``cloudexec.output``, ``"off"`` drops it. A failed task's last lines are kept anyway.
        forward_logs: Whether what tasks log reaches the handlers of this process, as it does where
            processes are forked, with the attributes ``worker``, ``task`` and ``task_name``.
            Levels are those that loggers have here when a worker starts. ``False``: it goes where
            tasks say themselves, or, from ``WARNING`` on, to their standard error.
        listen: Where workers connect, as ``host:port``, with TLS; by default a private Unix socket,
            or any free port for workers elsewhere.
        advertise: Host, or ``host:port``, at which workers reach this process; by default found by
            itself. Unless ``listen`` names another, the port is the one that is listened on.
        launch_timeout: Seconds in which a worker must have connected; by default 60 here, and what
            the launcher thinks fit elsewhere.
        reconnect_grace: Seconds for which a worker elsewhere whose connection was cut is waited for
            before its tasks run on another one; 0: not at all. It works on meanwhile, and hands
            over what it has done. By default 30, or what the launcher thinks fit.
        orphan_timeout: Seconds for which such a worker dials a client that does not answer before
            it ends, and 10 where the client's own machine refuses connections; with a ``journal``,
            the time in which the program can be run again and take it over. Workers on this machine
            end with the client, at once.
        max_tasks_per_worker: Tasks after which a worker, with all its processes, is replaced.
        max_worker_lifetime: Seconds after which a worker is replaced; it finishes what it has.
        max_cost_usd: Ceiling for what the workers may cost, as estimated: no worker is launched
            that would exceed it, and before it is reached all end, and what is not done fails with
            ``BudgetExceededError``.
        objects: How large arguments and results are kept and moved.
        journal: A file, or ``s3://bucket/prefix``, that has the result of each call as soon as it
            is there: the same program run again, after whatever has ended it, gets these results
            without running the calls again, and workers elsewhere that still live go on for it. A
            file belongs to this user alone, and to one program at a time. See
            ``docs/how-to/resuming.md``.
        max_pending_bytes: Bytes, or ``"2GiB"``, of pickled arguments of calls that are submitted
            and not done; their large parts are counted by ``objects``. ``None``: no limit.
        max_pending_tasks: Calls that are submitted and not done; ``None``: no limit.
        when_full: What ``submit()`` and ``map()`` do when such a limit is reached: ``"block"``
            until there is room, or ``"raise"`` ``QueueFullError``. A call that a done-callback
            submits never waits, as it would hold up what it waits for.
        preload: Whether workers on this machine have, before their first task, the installed
            modules that the script has imported: as copies of this process where a fork of it is
            safe (see ``Local``), and otherwise by importing them once for all their processes,
            which share them. Or the names of modules that fresh interpreters import. Modules that
            cannot be imported, or start threads then, are left to the tasks that need them.

    Raises:
        ValueError: If an argument is out of its range (a ``ConfigError`` that names it).
        TypeError: If an argument is of the wrong type.
        JournalError: If the journal cannot be used (a ``ConfigError`` if ``journal`` cannot be the
            name of one); ``JournalLockedError`` if another program has
            it, ``JournalVersionError`` if a newer version wrote it.
    """

    @_briefly
    def __init__(
        self,
        max_workers: int | None = None,
        mp_context: object = None,
        initializer: Callable[..., object] | None = None,
        initargs: tuple[Any, ...] = (),
        *,
        max_tasks_per_child: int | None = None,
        launcher: Launcher | str | None = None,
        min_workers: int = 0,
        idle_timeout: float | None = 60.0,
        retries: int = 2,
        task_timeout: float | None = None,
        output: Literal["inherit", "logging", "off"] = "inherit",
        forward_logs: bool = True,
        listen: str | None = None,
        advertise: str | None = None,
        launch_timeout: float | None = None,
        reconnect_grace: float | None = None,
        orphan_timeout: float = 120.0,
        max_tasks_per_worker: int | None = None,
        max_worker_lifetime: float | None = None,
        max_cost_usd: float | None = None,
        objects: ObjectOptions | None = None,
        journal: str | os.PathLike[str] | None = None,
        max_pending_bytes: int | str | None = None,
        max_pending_tasks: int | None = None,
        when_full: Literal["block", "raise"] = "block",
        preload: bool | Sequence[str] = True,
    ) -> None:
        if journal is not None and not isinstance(journal, str | os.PathLike):
            raise TypeError(
                f"journal must be a str or os.PathLike, a path or 's3://bucket/prefix', not "
                f"{journal!r}"
            )
        if objects is None:
            objects = ObjectOptions()
        elif not isinstance(objects, ObjectOptions):
            raise TypeError(f"objects must be ObjectOptions(...), not {objects!r}")
        if max_workers is None:
            max_workers = usable_cpus()
        if isinstance(max_workers, int) and max_workers <= 0:
            raise ConfigError(f"max_workers must be greater than 0, not {max_workers}")
        check_count("max_workers", max_workers, least=1)
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if max_tasks_per_child is not None:
            if not isinstance(max_tasks_per_child, int):
                raise TypeError("max_tasks_per_child must be an integer")
            if max_tasks_per_child <= 0:
                raise ConfigError(f"max_tasks_per_child must be >= 1, not {max_tasks_per_child}")
        if output not in _OUTPUT_MODES:
            choices = ", ".join(map(repr, _OUTPUT_MODES))
            raise ConfigError(f"output must be one of {choices}, not {output!r}")
        check_addresses(listen, advertise)
        check_positive("task_timeout", task_timeout)
        check_positive("orphan_timeout", orphan_timeout)
        check_positive("max_cost_usd", max_cost_usd)
        if not isinstance(preload, bool) and (
            isinstance(preload, str)
            or not isinstance(preload, Sequence)
            or not all(isinstance(name, str) for name in preload)
        ):
            raise TypeError(f"preload must be True, False or names of modules, not {preload!r}")
        if launcher is None or isinstance(launcher, str):
            from cloudexec._launchers.registry import default_launcher, launcher_named

            launcher = default_launcher() if launcher is None else launcher_named(launcher)
        elif isinstance(launcher, type) or not hasattr(launcher, "slots_per_worker"):
            raise TypeError(f"launcher must be one such as Local() or Batch(), not {launcher!r}")
        scaling = ScalingPolicy(
            max_slots=max_workers,
            min_slots=min_workers,
            slots_per_worker=launcher.slots_per_worker(max_workers),
            idle_timeout=idle_timeout,
            launch_timeout=(launcher.launch_timeout if launch_timeout is None else launch_timeout),
            max_tasks_per_worker=max_tasks_per_worker,
            max_worker_lifetime=max_worker_lifetime,
            size_count=launcher.size_count,
            sizes=ladder_of(launcher),
            one_machine=launcher.one_machine,
        )
        budget: PendingBudget | None = None
        if (max_pending_bytes, max_pending_tasks, when_full) != (None, None, "block"):
            from cloudexec._server.budget import pending_budget

            budget = pending_budget(max_pending_bytes, max_pending_tasks, when_full)
        if reconnect_grace is None:
            reconnect_grace = launcher.reconnect_grace
        self._max_workers = max_workers  # libraries read this name to size their chunks
        self._launcher = launcher
        self._scaling = scaling
        self._options = TaskOptions(timeout=task_timeout, retries=retries)
        self._requirements = requirements_of(self._options, launcher, scaling)
        self._executor = self
        self._submitter = Submitter(
            launcher,
            ServerConfig(
                scaling=scaling,
                reconnect_grace=reconnect_grace,
                last_words=launcher.last_words,
            ),
            {
                "max_workers": max_workers,
                "min_workers": min_workers,
                "idle_timeout": idle_timeout,
                "max_tasks_per_child": max_tasks_per_child or 0,
                "output": output,
                "forward_logs": bool(forward_logs),
                "listen": listen,
                "advertise": advertise or "",
                "max_cost_usd": max_cost_usd,
                "orphan_timeout": orphan_timeout,
                "objects": objects,
            },
            initializer=None if initializer is None else (initializer, initargs),
            journal=journal,
            preload=preload if isinstance(preload, bool) else list(preload),
            budget=budget,
        )
        if min_workers or journal is not None:
            self._submitter.start()

    @property
    def _driver(self) -> Driver | None:
        return self._submitter.driver

    def put(self, value: T) -> Ref[T]:
        """Put a value where workers have it from, once each, and return a handle to it.

        Pass the handle as an argument, alone or deep in others, and the call receives the value.
        Worth it for what many calls take: it is pickled and looked at only once. (An array that is
        passed plainly is sent once per worker too, but compared with what was sent, each time.)

            >>> with BatchExecutor(1) as executor:
            ...     table = executor.put({"a": 1})
            ...     executor.submit(dict.get, table, "a").result()
            1

        Raises:
            PayloadError: If it cannot be pickled, whatever pickling raises but Ctrl-C.
            PayloadTooLargeError: If there is no room for it, in memory or on disk.
            RuntimeError: As with ``submit()``.
        """
        return self._submitter.put(value)

    def stats(self) -> ExecutorStats:
        """Return a snapshot: tasks and workers by state, bytes, retries.

        It prints as a table of what is not zero, and has a field for each number.

            >>> with BatchExecutor(1) as executor:
            ...     _ = executor.submit(abs, -1).result()
            ...     executor.stats().tasks.succeeded
            1
        """
        from cloudexec._stats import ExecutorStats

        driver = self._driver
        if driver is None:
            return ExecutorStats()
        return self._submitter.look(lambda: ExecutorStats.of(driver))

    def cost(self) -> Cost:
        """Return what the workers have cost so far, estimated from list prices; local ones cost
        nothing."""
        return Cost() if self._driver is None else self._submitter.look(self._launcher.cost)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; finish those submitted and stop the workers.

        Tasks are waited for as long as they take. Workers are not: one that has nothing left to do
        and does not end by itself is ended after ten seconds.

        Args:
            wait: Return only when all is done. Interrupted by Ctrl-C, what is left is cancelled and
                the workers are killed.
            cancel_futures: Cancel what has not begun to run.
        """
        from cloudexec._core.events import ShutdownRequested

        driver = self._submitter.shut(ShutdownRequested(cancel=cancel_futures))
        if driver is None:
            return
        if driver.budget is not None:
            driver.budget.wake()  # who waits for room there will never have it
        if wait:
            wait_for_end(driver)

    def terminate_workers(self) -> None:
        """End every worker now; whatever is not done fails with ``BrokenBatchExecutor``.

        Returns when they are gone. One that does not go by itself, because it is stopped or means
        no good, is killed and cut off after two seconds.
        """
        self._break("its workers were ended by terminate_workers()")

    def kill_workers(self) -> None:
        """End every worker now; whatever is not done fails with ``BrokenBatchExecutor``.

        Returns when they are gone. One that does not go by itself, because it is stopped or means
        no good, is killed and cut off after two seconds.
        """
        self._break("its workers were ended by kill_workers()")

    def _break(self, why: str) -> None:
        driver = self._submitter.shut()
        if driver is None or driver.finished.is_set():
            return

        async def break_down() -> None:
            driver.break_down(BrokenBatchExecutor(f"the executor is broken: {why}"))

        driver.portal.run(break_down()).result()
        wait_for_end(driver)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if exc_type is not None and issubclass(exc_type, KeyboardInterrupt):
            # A user who pressed Ctrl-C does not want to wait for what is running.
            driver = self._submitter.shut()
            if driver is not None:
                kill(driver)
        self.shutdown(wait=True)

    @property
    def _broken(self) -> BaseException | None:
        driver = self._driver
        return None if driver is None else driver.broken

    def __repr__(self) -> str:
        state = "shut down" if self._submitter.is_shut else "open"
        return f"<BatchExecutor max_workers={self._max_workers} {self._launcher!r} {state}>"


class OptionsView(_Base):
    """A view of a ``BatchExecutor`` whose tasks have other options; see ``with_options()``."""

    def __init__(self, executor: BatchExecutor, options: TaskOptions) -> None:
        self._executor = executor
        self._submitter = executor._submitter
        self._options = options
        self._requirements = requirements_of(options, executor._launcher, executor._scaling)
        self._max_workers = executor._max_workers

    def put(self, value: T) -> Ref[T]:
        """Put a value where workers have it from; see ``BatchExecutor.put()``."""
        return self._executor.put(value)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Do nothing: the workers belong to the executor, which is shut down on its own."""

    def __repr__(self) -> str:
        options, usual = self._options, TaskOptions()
        given = [
            # Of variables the names: what they hold may be nobody's business.
            f"{name}={sorted(value) if name == 'env' else value!r}"
            for name in names_of(options)
            if (value := getattr(options, name)) != getattr(usual, name)
        ]
        return f"<OptionsView {' '.join([*given, 'of', repr(self._executor)])}>"


BatchExecutor.__module__ = "cloudexec"
OptionsView.__module__ = "cloudexec"
