"""BatchExecutor: the face of ``concurrent.futures``; takes no scheduling decision."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import fields
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, Literal, NoReturn, ParamSpec, Self, TypeAlias, TypeVar

from cloudexec import _nesting
from cloudexec._config import ScalingPolicy, ServerConfig, TaskOptions, check_count, check_positive
from cloudexec._describing import (
    describe,
    is_a,
    is_interrupt,
    name_of,
    presentable,
    type_name,
    unfinished,
)
from cloudexec._errors import (
    BrokenBatchExecutor,
    CloudexecError,
    ConfigError,
    PayloadError,
    PayloadTooLargeError,
    RefLostError,
)
from cloudexec._future import BatchFuture
from cloudexec._launchers.base import Cost
from cloudexec._objects.options import ObjectOptions
from cloudexec._sizing import ladder_of, requirements_of

if TYPE_CHECKING:
    from cloudexec._core.resources import Requirements
    from cloudexec._functions import Function, FunctionTable
    from cloudexec._launchers.base import Launcher
    from cloudexec._objects.ref import Ref
    from cloudexec._objects.store import BlobStore
    from cloudexec._progress import ProgressBar
    from cloudexec._server.budget import PendingBudget
    from cloudexec._server.driver import Driver
    from cloudexec._server.submission import Submission
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
        return self._executor._submit(fn, args, kwargs, self._options, self._requirements)

    def _prepare(self, fn: Callable[..., T]) -> Callable[..., BatchFuture[T]]:
        """Pickle a callable once, and return what submits calls of it; for graphs.

        Returns:
            Takes the arguments, the keyword arguments, a label for the future, and what is to be
            called with its outcome.
        """
        executor, options, requirements = self._executor, self._options, self._requirements
        if executor._driver is None:
            executor._start(fn)
        executor._check_open()
        assert executor._table is not None
        error: CloudexecError | None = None
        try:
            function = executor._table.numbered(fn)
        except BaseException as exc:
            if is_interrupt(exc):
                raise
            error = _pickling_error(exc, fn)
        if error is not None:
            raise error

        def submit(
            args: tuple[Any, ...], kwargs: Mapping[str, Any], label: str, on_end: Any
        ) -> BatchFuture[T]:
            return executor._submit(
                fn, args, kwargs, options, requirements, function, label, on_end
            )

        return submit

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
        if chunksize > 1:
            chunks = _chunks(calls, chunksize)
            many = self._map(
                _Chunk(fn), ((chunk,) for chunk in chunks), timeout, buffersize, progress
            )
            return _flatten(many)
        return self._map(fn, calls, timeout, buffersize, progress)

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
        deadline = None if timeout is None else time.monotonic() + timeout
        submit: Callable[[Iterable[tuple[Any, ...]]], list[BatchFuture[T]]]
        if getattr(self.submit, "__func__", None) is _Base.submit:
            submit = self._executor._prepare_map(fn, self._options, self._requirements)
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
        return _results(futures, rest, submit, deadline, bar)


def _results(
    futures: deque[BatchFuture[T]],
    calls: Iterator[tuple[Any, ...]],
    submit: Callable[[Iterable[tuple[Any, ...]]], list[BatchFuture[T]]],
    deadline: float | None,
    bar: ProgressBar | None,
) -> Iterator[T]:
    """Yield results in order; submit one more of ``calls`` for each one taken."""
    try:
        while futures:
            # Nothing here refers to a result once it has been handed out.
            result = [_take(futures.popleft(), deadline)]
            for call in calls:
                more = submit((call,))
                futures.extend(more)
                if bar is not None:
                    bar.watch(more)
                break
            yield result.pop()
    finally:
        for future in futures:
            future.cancel()
        if bar is not None:
            bar.close()


def _take(future: BatchFuture[T], deadline: float | None) -> T:
    try:
        return future.result(None if deadline is None else deadline - time.monotonic())
    except BaseException:
        future.cancel()  # it is nobody's any more
        raise
    finally:
        del future


class _Chunk:
    """Calls a function for each of several inputs: one task of ``map(chunksize=...)``."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self._fn = fn

    @property
    def _called_for_each(self) -> Callable[..., Any]:
        """What a journal knows it by, with keys of the caller's own."""
        return self._fn

    def __call__(self, chunk: list[tuple[Any, ...]]) -> list[Any]:
        return [self._fn(*args) for args in chunk]


def _chunks(calls: Iterator[tuple[Any, ...]], size: int) -> Iterator[list[tuple[Any, ...]]]:
    while chunk := list(itertools.islice(calls, size)):
        yield chunk


def _flatten(chunks: Iterator[list[T]]) -> Iterator[T]:
    for chunk in chunks:
        chunk.reverse()
        while chunk:
            yield chunk.pop()


def _send_spawned_main_by_value() -> None:
    """Have functions of the script travel by value from a process that multiprocessing spawned.

    There the script is the module ``__mp_main__``, which workers do not have.
    """
    if "__mp_main__" in sys.modules:
        import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules["__mp_main__"])


def _names_of_main() -> dict[str, str]:
    """Return what tells a module where it is, of the script."""
    names = vars(sys.modules["__main__"])
    return {
        name: value
        for name in ("__file__", "__package__", "__doc__")
        if isinstance(value := names.get(name), str)
    }


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
            over what it has done.
        orphan_timeout: Seconds for which such a worker dials a client that does not answer before
            it ends; with a ``journal``, the time in which the program can be run again and take
            it over. Workers on this machine end with the client, at once.
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
        reconnect_grace: float = 30.0,
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
            max_workers = _usable_cpus()
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
        if listen is not None and (not isinstance(listen, str) or ":" not in listen):
            raise ConfigError(f"listen must be 'host:port', such as '127.0.0.1:0', not {listen!r}")
        if listen is not None and not listen.startswith("unix:"):
            port = listen.rpartition(":")[2]
            if not (port.isascii() and port.isdigit() and int(port) < 2**16):
                raise ConfigError(f"the port of listen={listen!r} must be a number from 0 to 65535")
        check_positive("task_timeout", task_timeout)
        check_positive("orphan_timeout", orphan_timeout)
        check_positive("max_cost_usd", max_cost_usd)
        if advertise is not None and (not isinstance(advertise, str) or not advertise.strip()):
            raise ConfigError(
                f"advertise must be a host or 'host:port' that workers can dial, not {advertise!r}"
            )
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
            rungs=launcher.size_count,
            sizes=ladder_of(launcher),
            one_machine=launcher.one_machine,
        )
        self._max_workers = max_workers  # libraries read this name to size their chunks
        self._launcher = launcher
        self._config = ServerConfig(scaling=scaling, reconnect_grace=reconnect_grace)
        self._options = TaskOptions(timeout=task_timeout, retries=retries)
        self._requirements = requirements_of(self._options, launcher, scaling)
        self._executor = self
        self._setup: dict[str, Any] = {
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
        }
        self._budget: PendingBudget | None = None
        if (max_pending_bytes, max_pending_tasks, when_full) != (None, None, "block"):
            from cloudexec._server.budget import pending_budget

            self._budget = pending_budget(max_pending_bytes, max_pending_tasks, when_full)
        self._initializer = (initializer, initargs) if initializer is not None else None
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._shut_down = False
        self._forked = False
        self._driver: Driver | None = None
        self._on_submit: Callable[..., Requirements | None] | None = None  # see cloudexec.tracing
        self._table: FunctionTable | None = None
        self._journal = journal
        self._preload = preload if isinstance(preload, bool) else list(preload)
        _executors.add(self)
        if min_workers or journal is not None:
            self._start()

    def _start(self, fn: object = None) -> Driver:
        """Start the server, once; ``fn`` is the function of the first task."""
        with self._lock:
            if self._driver is not None:
                return self._driver
            self._check_open()
            _nesting.check()
            if _forked_from_user:
                raise RuntimeError(
                    "this process was forked from one that had used an executor, and gRPC cannot "
                    "start anew in it: use multiprocessing's 'spawn' or 'forkserver', or fork first"
                )
            _send_spawned_main_by_value()
            if "cloudexec._server.portal" in sys.modules:
                from cloudexec._server.portal import Portal

                Portal.wait_for_end(_THREAD_ENDS)
            looked_up = functools.partial(_modules_to_preload, fn)
            preload = looked_up if self._preload is True else self._preload or []
            # With a journal, all results may be there already.
            slots = 0 if self._journal is not None else self._config.scaling.slots_per_worker
            self._launcher.begin(slots, preload)
            try:
                return self._start_server()
            except BaseException:
                self._launcher.stand_down()
                raise

    def _start_server(self) -> Driver:
        """Start the server; the lock is held."""
        from cloudexec import _payload, _settings
        from cloudexec._functions import FunctionTable
        from cloudexec._objects.store import BlobStore
        from cloudexec._server.driver import Driver
        from cloudexec._server.submission import Setup

        program: Any = None
        if self._journal is not None:
            from cloudexec._journal.program import Program

            program = Program()  # before anything of it is sent, or a worker reads it
        setup = dict(self._setup)
        store = BlobStore(setup["objects"].limits(), shared=not self._is_far)
        started: list[Driver] = []

        def on_end(number: int) -> None:
            for driver in started:
                driver.post(number)

        table = FunctionTable(on_end, store, is_near=not self._is_far)
        if self._initializer is not None:
            error: CloudexecError | None = None
            names: set[str] = set()
            try:
                setup["initializer"] = _payload.dumps(self._initializer, store, names)
                setup["initializer_needs"] = table.extended(None, names)
            except BaseException as exc:
                if is_interrupt(exc):
                    raise
                error = _pickling_error(exc, *self._initializer, noun="initargs[{}]")
            if error is not None:
                raise error
        setup["argv"] = tuple(sys.argv)
        setup["settings"] = _settings.collect()
        setup["main"] = _names_of_main()
        if self._launcher.needs_network():
            setup["modules"] = _modules_for(self._launcher.modules)
        else:
            setup["cwd"] = _working_directory()
            setup["sys_path"] = tuple(path or setup["cwd"] for path in sys.path)
        driver = Driver(
            self._config, Setup(**setup), self._launcher, store, self._numbers, self._budget
        )
        started.append(driver)
        try:
            if self._journal is not None:
                driver.open_journal(self._journal, program, self._initializer)
            driver.portal.run(driver.start()).result()
        except BaseException:
            driver.portal.run(driver.abandon()).result()
            driver.join()
            raise
        self._table = table
        _drivers[driver] = None
        # Once nobody can submit any more, what was submitted is finished and workers stop.
        weakref.finalize(self, _collected, driver).atexit = False
        self._driver = driver
        return driver

    @property
    def _is_far(self) -> bool:
        """Whether workers are not known to be on this machine: they dial a network address."""
        return self._launcher.needs_network() or self._setup["listen"] is not None

    def _check_open(self) -> None:
        if _exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        if self._shut_down:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self._forked:
            raise RuntimeError(
                "this executor belongs to the parent process: create another one after os.fork()"
            )
        driver = self._driver
        if driver is not None and driver.broken is not None:
            raise driver.futures.broken_error()

    def _submit(
        self,
        fn: Callable[..., T],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        options: TaskOptions,
        requirements: Requirements | None,
        function: Function | None = None,
        label: str = "",
        on_end: Any = None,
    ) -> BatchFuture[T]:
        driver = self._driver
        if driver is None:
            driver = self._start(fn)
        elif self._shut_down or self._forked or _exiting or driver.broken is not None:
            self._check_open()
        future: BatchFuture[T] = BatchFuture(driver)
        table = self._table
        assert table is not None
        if label:
            future._label = label
            future._on_end = on_end
        if self._on_submit is not None:
            requirements = self._on_submit(future, fn, options, requirements, driver)
        try:
            if function is None:
                function, kind, payload = table.call(fn, args, kwargs)  # type: ignore[arg-type]
            else:
                names: set[str] = set()
                payload = _dumps_arguments(args, kwargs, driver.store, names)
                kind = function.stats
                if names:
                    function = table.extended(function, names)
        except BaseException as exc:
            if is_interrupt(exc):
                raise
            return _failed(future, _pickling_error(exc, fn, args, kwargs), driver)
        if driver.journal is not None:
            named = function if function is not None and function.pickle else None
            identity = driver.journal.identify(fn, named, options)
            pickled = None if named is None else payload
            if identity is not None and driver.journal.resume(
                future, identity, args, kwargs, pickled, options
            ):
                return future
        if requirements is not None and requirements.judged:
            driver.retry_predicate.prepare()
        task = _submission()(
            next(self._numbers), kind, future, function, payload, options.retries, requirements
        )
        if type(payload) is not bytes:
            try:
                if _hold_back(task, fn, args, kwargs):
                    driver.dependencies.prepare()
            except BaseException as exc:
                if is_interrupt(exc):
                    raise
                return _failed(future, _pickling_error(exc, fn, args, kwargs), driver)
        future._task = task
        if driver.budget is not None:
            driver.budget.take(task, driver.engine.executor_id, driver.is_busy, self._check_open)
        with self._lock:
            # Under the lock: nothing may come into the inbox behind the request to shut down.
            if self._shut_down:
                if driver.budget is not None:
                    driver.budget.give(task)
                self._check_open()
            driver.post(task)
        return future

    def _prepare_map(
        self, fn: Callable[..., T], options: TaskOptions, requirements: Requirements | None
    ) -> Callable[[Iterable[tuple[Any, ...]]], list[BatchFuture[T]]]:
        """Pickle the callable once and return what submits calls of it."""
        driver = self._driver
        if driver is None:
            driver = self._start(fn)
        self._check_open()
        table = self._table
        assert table is not None
        from cloudexec import _payload

        error: BaseException | None = None
        function = sent = None
        kind: Any = None
        dumps: Callable[..., Any] = _payload.dumps_arguments
        try:
            function = sent = table.numbered(fn)
            if function is None:
                sent, kind, dumps = table.unnumbered(fn)
            else:
                kind = function.stats
        except BaseException as exc:
            if is_interrupt(exc):
                raise
            error = _pickling_error(exc, fn)
        if requirements is not None and requirements.judged:
            driver.retry_predicate.prepare()
        submission = _submission()
        retries, numbers = options.retries, self._numbers
        store, budget, on_submit = driver.store, driver.budget, self._on_submit
        journal, identity = driver.journal, None
        if journal is not None and error is None:
            if type(fn) is _Chunk and callable(options.key):
                options = options.changed({"key": journal.key_of_chunks(options.key)})
            identity = journal.identify(fn, function, options)

        def submit(calls: Iterable[tuple[Any, ...]]) -> list[BatchFuture[T]]:
            futures: list[BatchFuture[T]] = []
            tasks: list[Any] = []

            def flush() -> None:
                with self._lock:
                    if self._shut_down:
                        self._check_open()
                    driver.post_all(tasks)
                tasks.clear()

            for args in calls:
                future: BatchFuture[T] = BatchFuture(driver)
                futures.append(future)
                of_task = requirements
                if on_submit is not None:
                    of_task = on_submit(future, fn, options, requirements, driver)
                if error is not None:
                    future.set_exception(error)
                    continue
                try:
                    names: set[str] = set()
                    payload = dumps(args, None, store, names)
                    its = table.extended(sent, names) if names or sent is None else sent
                except BaseException as exc:
                    if is_interrupt(exc):
                        raise
                    future.set_exception(_pickling_error(exc, fn, args))
                    continue
                if (
                    journal is not None
                    and identity is not None
                    and journal.resume(
                        future, identity, args, {}, None if function is None else payload, options
                    )
                ):
                    continue
                task = submission(next(numbers), kind, future, its, payload, retries, of_task)
                if type(payload) is not bytes:
                    try:
                        if _hold_back(task, fn, args, {}):
                            driver.dependencies.prepare()
                    except BaseException as exc:
                        if is_interrupt(exc):
                            raise
                        future.set_exception(_pickling_error(exc, fn, args))
                        continue
                future._task = task
                if budget is not None and not budget.try_take(task):
                    if tasks:
                        flush()  # or it would wait for these, too
                    try:
                        budget.take(
                            task, driver.engine.executor_id, driver.is_busy, self._check_open
                        )
                    except BaseException:
                        futures.pop()
                        for each in futures:
                            each.cancel()  # they are nobody's
                        raise
                tasks.append(task)
                if len(tasks) >= 256:
                    flush()
            if tasks:
                flush()
            return futures

        return submit

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
        driver = self._driver
        if driver is None:
            driver = self._start()
        self._check_open()
        from cloudexec import _payload
        from cloudexec._objects.ref import Ref

        error: PayloadError | None = None
        try:
            payload = _payload.dumps(value, driver.store)
            if not isinstance(payload, bytes):
                for blob in payload.blobs:
                    driver.store.share(blob)
        except BaseException as exc:
            if is_interrupt(exc) or is_a(exc, PayloadError):
                raise
            from cloudexec._unsendable import explain_value

            error = PayloadError(
                explain_value("the value", value, exc)
                or f"{name_of(value)} could not be pickled ({describe(exc)})"
            )
            error.__cause__ = presentable(exc)
        if error is not None:
            raise error
        if not isinstance(payload, bytes):
            payload.shared = True
        ref: Ref[T] = Ref(payload, driver.keeper)
        if driver.journal is not None:
            ref._digest = driver.journal.digest_of(value, payload)
        return ref

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
        if driver is None or driver.finished.is_set() or self._forked:
            return ExecutorStats() if driver is None else ExecutorStats.of(driver)

        async def look() -> ExecutorStats:
            assert driver is not None
            return ExecutorStats.of(driver)

        return ExecutorStats.of(driver) if driver.portal.is_this_thread else _run(driver, look())

    def cost(self) -> Cost:
        """Return what the workers have cost so far, estimated from list prices; local ones cost
        nothing."""
        driver = self._driver
        if driver is None or driver.finished.is_set() or self._forked:
            return Cost() if driver is None else self._launcher.cost()

        async def look() -> Cost:
            return self._launcher.cost()

        return self._launcher.cost() if driver.portal.is_this_thread else _run(driver, look())

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

        with self._lock:
            self._shut_down = True
            driver = self._driver
            if driver is None or self._forked:
                return
            driver.post(ShutdownRequested(cancel=cancel_futures))
        if driver.budget is not None:
            driver.budget.wake()  # who waits for room there will never have it
        if wait:
            _wait_for_end(driver)

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
        with self._lock:
            self._shut_down = True
            driver = self._driver
        if driver is None or self._forked or driver.finished.is_set():
            return

        async def break_down() -> None:
            driver.break_down(BrokenBatchExecutor(f"the executor is broken: {why}"))

        driver.portal.run(break_down()).result()
        _wait_for_end(driver)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_val: BaseException | None,
        exc_tb: TracebackType | None,
    ) -> None:
        if exc_type is not None and issubclass(exc_type, KeyboardInterrupt):
            # Whoever pressed Ctrl-C does not want to wait for what is running.
            with self._lock:
                self._shut_down = True
                driver = self._driver
            if driver is not None and not self._forked:
                _kill(driver)
        self.shutdown(wait=True)

    @property
    def _broken(self) -> BaseException | None:
        driver = self._driver
        return None if driver is None else driver.broken

    def __repr__(self) -> str:
        state = "shut down" if self._shut_down else "open"
        return f"<BatchExecutor max_workers={self._max_workers} {self._launcher!r} {state}>"


class OptionsView(_Base):
    """A view of a ``BatchExecutor`` whose tasks have other options; see ``with_options()``."""

    def __init__(self, executor: BatchExecutor, options: TaskOptions) -> None:
        self._executor = executor
        self._options = options
        self._requirements = requirements_of(options, executor._launcher, executor._config.scaling)
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
            f"{each.name}={sorted(value) if each.name == 'env' else value!r}"
            for each in fields(options)
            if (value := getattr(options, each.name)) != getattr(usual, each.name)
        ]
        return f"<OptionsView {' '.join([*given, 'of', repr(self._executor)])}>"


_NO_KEYWORDS: Mapping[str, Any] = MappingProxyType({})


def _failed(future: BatchFuture[T], error: BaseException, driver: Driver) -> BatchFuture[T]:
    """Fail a call that cannot be submitted; return its future."""
    future.set_exception(error)
    if future._on_end is not None:
        with contextlib.suppress(RuntimeError):  # the loop has closed
            driver.portal.post(future._on_end, future, False)
    return future


def _pickling_error(
    exc: BaseException,
    fn: object,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] = _NO_KEYWORDS,
    noun: str = "argument {}",
) -> CloudexecError:
    """Return what a call fails with that cannot be pickled: what in it, why, and what to do."""
    if is_a(exc, (PayloadTooLargeError, RefLostError)):
        return exc
    if is_a(exc, PayloadError) and exc.__cause__ is not None:
        return exc  # it says already what cannot be sent, and why
    from cloudexec._unsendable import explain_call

    error = PayloadError(
        _refusal(exc, fn, args, kwargs, noun)
        or explain_call(fn, args, kwargs, exc, noun=noun)
        or f"{type_name(fn)} {name_of(fn)} or its arguments could not be pickled ({describe(exc)})"
    )
    error.__cause__ = presentable(exc)
    return error


def _refusal(
    exc: BaseException, fn: object, args: tuple[Any, ...], kwargs: Mapping[str, Any], noun: str
) -> str:
    """Say what is wrong with a callable or an argument that is never sent; ``""``: nothing."""
    from cloudexec import _sharing

    called = fn._fn if type(fn) is _Chunk else fn
    elements: dict[str, object] = {noun.format(i): each for i, each in enumerate(args)}
    elements |= {f"keyword {name!r}": each for name, each in kwargs.items()}
    if is_a(exc, _sharing.NotSharedError):
        where = _sharing.where(exc.element, called, elements)
        return f"{where}{name_of(called)}: {exc.message}"
    if why := unfinished(called):
        return f"the callable is {why}, and give submit() that function itself"
    for where, value in elements.items():
        if why := unfinished(value):
            return f"{where} of {name_of(called)} is {why}"
    return ""


def _run(driver: Driver, work: Coroutine[Any, Any, T]) -> T:
    return driver.portal.run(work).result()


def _submission() -> Any:
    from cloudexec._server.submission import Submission

    return Submission


def _dumps_arguments(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], store: BlobStore, names: set[str]
) -> Any:
    from cloudexec import _payload

    return _payload.dumps_arguments(args, dict(kwargs), store, names)


def _hold_back(
    task: Submission, fn: object, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> bool:
    """Make a task wait for the futures among its arguments, if there are any."""
    from cloudexec._payload import Unfinished
    from cloudexec._server.dependencies import hold_back

    payload: Any = task.payload
    if type(payload) is not Unfinished:
        return False  # it is just large
    hold_back(task, payload, name_of(fn), args, kwargs)
    return task.needs is not None


def _usable_cpus() -> int:
    try:
        return len(os.sched_getaffinity(0)) or 1
    except AttributeError:
        return os.cpu_count() or 1


def _modules_for(wanted: bool | Sequence[str]) -> bytes:
    """Pack what workers elsewhere have to import from here."""
    if not wanted:
        return b""
    from cloudexec._modules import local_modules, pack_modules

    return pack_modules(local_modules(None if wanted is True else frozenset(wanted)))


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""


# The end of things.

_executors: weakref.WeakSet[BatchExecutor] = weakref.WeakSet()
_drivers: dict[Driver, None] = {}
_exiting = False
_forked_from_user = False


def _collected(driver: Driver) -> None:
    from cloudexec._core.events import ShutdownRequested

    driver.post(ShutdownRequested())


def _kill(driver: Driver) -> None:
    from cloudexec._core.events import ShutdownRequested

    driver.post(ShutdownRequested(cancel=True, kill=True))


def _wait_for_end(driver: Driver, *, at_exit: bool = False) -> None:
    if driver.portal.is_this_thread:
        return
    try:
        if at_exit:
            _outlast(driver)
        driver.finished.wait()
    except BaseException:
        _kill(driver)
        driver.finished.wait(10.0)
        raise
    driver.join()
    _drivers.pop(driver, None)


def _modules_to_preload(fn: object) -> list[str]:
    """Return the names of what workers will probably need for their first task."""
    from cloudexec._preload import modules_of

    try:
        return modules_of(fn)
    except Exception:
        return []  # some module is not what it seems; tasks import what they need


def _outlast(driver: Driver) -> None:
    """Wait for the end, but not for futures that nobody is left to complete."""
    waited = 0.0
    while not driver.finished.wait(_EXIT_LOOK):
        foreign = list(driver.dependencies.foreign)
        if not foreign or driver.machine.open_tasks:
            waited = 0.0
            continue
        waited += _EXIT_LOOK
        main = threading.main_thread()
        alone = not any(driver.machine.open_tasks for driver in _drivers) and all(
            thread.daemon or thread is main for thread in threading.enumerate()
        )
        if not alone and any(future.running() for future in foreign):
            continue
        if waited >= (_EXIT_ALONE if alone else _EXIT_PATIENCE):
            driver.portal.post(driver.dependencies.give_up_foreign)
            waited = 0.0


_THREAD_ENDS = 0.1
"""Seconds that the thread of executors before this one has to end, for a fork to be safe."""
_EXIT_LOOK = 0.25
"""Seconds between two looks at what the interpreter's end still waits for."""
_EXIT_ALONE = 1.0
"""Seconds in which a future of somebody else must be done once all other work is."""
_EXIT_PATIENCE = 30.0
"""The same while other threads are there, which may be about to begin with it."""


def _at_exit() -> None:
    """Finish what was submitted before the interpreter goes, as the standard library does."""
    global _exiting
    _exiting = True
    interrupted = getattr(sys, "last_type", None) is KeyboardInterrupt
    for driver in list(_drivers):
        if interrupted:
            _kill(driver)
        else:
            _collected(driver)
    for driver in list(_drivers):
        _wait_for_end(driver, at_exit=True)


def _forget_after_fork() -> None:
    global _forked_from_user
    _forked_from_user = _forked_from_user or "cloudexec._server.network" in sys.modules
    for executor in list(_executors):
        executor._forked = True
        executor._lock = threading.Lock()
    # Also those whose executor is gone: gRPC's destructors are not to run in this process.
    _kept.extend(_drivers)
    _drivers.clear()


_kept: list[object] = []

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)

# As concurrent.futures.process does: before the threads that we wait for are joined.
threading._register_atexit(_at_exit)  # type: ignore[attr-defined]

BatchExecutor.__module__ = "cloudexec"
OptionsView.__module__ = "cloudexec"
