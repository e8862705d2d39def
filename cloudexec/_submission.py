"""Makes a task of each call: pickles it, and hands it to the server that the first one starts."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from cloudexec import _ending, _nesting
from cloudexec._config import ServerConfig, TaskOptions
from cloudexec._describing import describe, is_a, is_interrupt, name_of, presentable
from cloudexec._errors import (
    CloudexecError,
    ConfigError,
    LaunchError,
    PayloadError,
    PlatformError,
)
from cloudexec._future import BatchFuture

if TYPE_CHECKING:
    from cloudexec._core.events import Event
    from cloudexec._core.resources import Requirements
    from cloudexec._functions import Function, FunctionTable
    from cloudexec._launchers.base import Launcher
    from cloudexec._objects.ref import Ref
    from cloudexec._server.budget import PendingBudget
    from cloudexec._server.driver import Driver
    from cloudexec._server.submission import Submission

__all__ = ["Submitter"]

T = TypeVar("T")

_THREAD_ENDS = 0.1
"""Seconds in which the thread of earlier executors must end, so that a fork is safe."""


class Submitter:
    """Takes calls until it is shut down, for an executor and all its views.

    Args:
        launcher: Starts the workers.
        config: How the server schedules.
        setup: What workers are told, and how the server listens.
        initializer: Function and arguments, called in each process that runs tasks.
        journal: Where results are kept.
        preload: Whether workers have modules before their first task, or which.
        budget: Limits what is pending.
    """

    def __init__(
        self,
        launcher: Launcher,
        config: ServerConfig,
        setup: Mapping[str, Any],
        *,
        initializer: tuple[Callable[..., object], tuple[Any, ...]] | None,
        journal: str | os.PathLike[str] | None,
        preload: bool | list[str],
        budget: PendingBudget | None,
    ) -> None:
        self.driver: Driver | None = None
        self.is_shut = False
        self.forked = False
        self.on_submit: Callable[..., Requirements | None] | None = None  # see cloudexec.tracing
        self._launcher = launcher
        self._config = config
        self._setup = setup
        self._initializer = initializer
        self._journal = journal
        self._preload = preload
        self._budget = budget
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self._table: FunctionTable | None = None
        self._make_task: Callable[..., Submission] | None = None
        _ending.submitters.add(self)

    def forget_after_fork(self) -> None:
        """Refuse further use in a forked child: everything belongs to the parent process."""
        self.forked = True
        self._lock = threading.Lock()

    def shut(self, request: Event | None = None) -> Driver | None:
        """Take no more calls, post a last request, and return the server if it was started."""
        with self._lock:
            self.is_shut = True
            driver = self.driver
            if driver is None or self.forked:
                return None
            if request is not None:
                driver.post(request)
        return driver

    def start(self, fn: object = None) -> Driver:
        """Start the server, once; ``fn`` is the function of the first task."""
        with self._lock:
            if self.driver is not None:
                return self.driver
            self.check_open()
            _nesting.check()
            if _ending.forked_from_user:
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
            except BaseException as exc:
                self._launcher.stand_down()
                if isinstance(exc, (ConfigError, LaunchError, PlatformError)):
                    raise exc.with_traceback(None) from None  # it says all that a user needs
                raise

    def _start_server(self) -> Driver:
        """Start the server; the lock is held."""
        from cloudexec import _module_state, _payload, _settings
        from cloudexec._functions import FunctionTable
        from cloudexec._objects.store import BlobStore
        from cloudexec._server.driver import Driver
        from cloudexec._server.submission import Setup, Submission

        program: Any = None
        if self._journal is not None:
            from cloudexec._journal.program import Program

            program = Program()  # before anything of it is sent, or a worker reads it
        setup = dict(self._setup)
        store = BlobStore(setup["objects"].limits(), shared=not self.is_far)
        started: list[Driver] = []

        def on_end(number: int) -> None:
            for driver in started:
                driver.post(number)

        state = _module_state.ModuleState()
        if self._journal is None:
            # A journal's results are found by the program's source and the call's arguments.
            state = _module_state.collect()
        setup["module_state"] = state.data
        if self.is_far:
            state = state._replace(places={})  # a module that reads local files fails there
        table = FunctionTable(on_end, store, is_near=not self.is_far, modules=state)
        if self._initializer is not None:
            error: CloudexecError | None = None
            names: set[str] = set()
            try:
                setup["initializer"] = _payload.dumps(self._initializer, store, names)
                setup["initializer_needs"] = table.extended(None, names)
            except BaseException as exc:
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
        self._make_task = Submission
        _ending.drivers[driver] = None
        # Once nobody can submit any more, what was submitted is finished and workers stop.
        weakref.finalize(self, _ending.finish, driver).atexit = False
        self.driver = driver
        return driver

    @property
    def is_far(self) -> bool:
        """Whether workers may be on other machines, because they dial a network address."""
        return self._launcher.needs_network() or self._setup["listen"] is not None

    def check_open(self) -> None:
        """Tell a caller that no more calls are taken, and why.

        Raises:
            RuntimeError: If that is so; ``BrokenBatchExecutor`` if the executor is broken.
        """
        if _ending.exiting:
            raise RuntimeError("cannot schedule new futures after interpreter shutdown")
        if self.is_shut:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self.forked:
            raise RuntimeError(
                "this executor belongs to the parent process: create another one after os.fork()"
            )
        driver = self.driver
        if driver is not None and driver.broken is not None:
            raise driver.futures.broken_error()

    def look(self, at: Callable[[], T]) -> T:
        """Call a function that reads data of the server, again if they changed meanwhile."""
        driver = self.driver
        if driver is None or driver.finished.is_set() or self.forked:
            return at()
        if driver.portal.is_this_thread:
            return at()

        async def look() -> T:
            return at()

        return driver.portal.run(look()).result()

    def submit(
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
        """Make a task of a call, hand it to the server, and return its future.

        Args:
            fn: What is called.
            args: With these arguments.
            kwargs: And these.
            options: The task's.
            requirements: What the scheduler must know of them.
            function: ``fn`` as it was pickled before, if it was.
            label: Of the future.
            on_end: Called with the future's outcome; with a label only.
        """
        driver = self.driver
        if driver is None:
            driver = self.start(fn)
        elif self.is_shut or self.forked or _ending.exiting or driver.broken is not None:
            self.check_open()
        future: BatchFuture[T] = BatchFuture(driver)
        table = self._table
        assert table is not None
        if label:
            future._label = label
            future._on_end = on_end
        if self.on_submit is not None:
            requirements = self.on_submit(future, fn, options, requirements, driver)
        try:
            if function is None:
                function, kind, payload = table.call(fn, args, kwargs)  # type: ignore[arg-type]
            else:
                from cloudexec._payload import dumps_arguments

                names: set[str] = set()
                payload = dumps_arguments(args, dict(kwargs), driver.store, names)
                kind = function.stats
                if names:
                    function = table.extended(function, names)
        except BaseException as exc:
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
        assert self._make_task is not None
        task = self._make_task(
            next(self._numbers), kind, future, function, payload, options.retries, requirements
        )
        if type(payload) is not bytes:
            refusal = _hold_back(task, fn, args, kwargs, driver)
            if refusal is not None:
                return _failed(future, refusal, driver)
        future._task = task
        if driver.budget is not None:
            driver.budget.take(task, driver.engine.executor_id, driver.is_busy, self.check_open)
        with self._lock:
            # Under the lock: nothing may come into the inbox behind the request to shut down.
            if self.is_shut:
                if driver.budget is not None:
                    driver.budget.give(task)
                self.check_open()
            driver.post(task)
        return future

    def prepare_map(
        self, fn: Callable[..., T], options: TaskOptions, requirements: Requirements | None
    ) -> Callable[[Iterable[tuple[Any, ...]]], list[BatchFuture[T]]]:
        """Pickle the callable once and return what submits calls of it."""
        driver = self.driver
        if driver is None:
            driver = self.start(fn)
        self.check_open()
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
            error = _pickling_error(exc, fn)
        if requirements is not None and requirements.judged:
            driver.retry_predicate.prepare()
        make_task = self._make_task
        assert make_task is not None
        retries, numbers = options.retries, self._numbers
        store, budget, on_submit = driver.store, driver.budget, self.on_submit
        journal, identity = driver.journal, None
        if journal is not None and error is None:
            from cloudexec._mapping import Chunk

            if type(fn) is Chunk and callable(options.key):
                options = options.changed({"key": journal.key_of_chunks(options.key)})
            identity = journal.identify(fn, function, options)

        def submit(calls: Iterable[tuple[Any, ...]]) -> list[BatchFuture[T]]:
            futures: list[BatchFuture[T]] = []
            tasks: list[Any] = []

            def flush() -> None:
                with self._lock:
                    if self.is_shut:
                        self.check_open()
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
                task = make_task(next(numbers), kind, future, its, payload, retries, of_task)
                if type(payload) is not bytes:
                    refusal = _hold_back(task, fn, args, {}, driver)
                    if refusal is not None:
                        future.set_exception(refusal)
                        continue
                future._task = task
                if budget is not None and not budget.try_take(task):
                    if tasks:
                        flush()  # or it would wait for these, too
                    try:
                        budget.take(
                            task, driver.engine.executor_id, driver.is_busy, self.check_open
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

    def prepare(
        self, fn: Callable[..., T], options: TaskOptions, requirements: Requirements | None
    ) -> Callable[..., BatchFuture[T]]:
        """Pickle a callable once, and return what submits calls of it; for graphs.

        Returns:
            Takes the arguments, the keyword arguments, a label for the future, and what is to be
            called with its outcome.
        """
        if self.driver is None:
            self.start(fn)
        self.check_open()
        assert self._table is not None
        error: CloudexecError | None = None
        try:
            function = self._table.numbered(fn)
        except BaseException as exc:
            error = _pickling_error(exc, fn)
        if error is not None:
            raise error

        def submit(
            args: tuple[Any, ...], kwargs: Mapping[str, Any], label: str, on_end: Any
        ) -> BatchFuture[T]:
            return self.submit(fn, args, kwargs, options, requirements, function, label, on_end)

        return submit

    def put(self, value: T) -> Ref[T]:
        """See ``BatchExecutor.put()``."""
        driver = self.driver
        if driver is None:
            driver = self.start()
        self.check_open()
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


def _pickling_error(exc: BaseException, fn: object, *call: Any, **kwargs: Any) -> CloudexecError:
    """Return the error of a call that cannot be pickled; raise what interrupts the caller."""
    if is_interrupt(exc):
        raise exc
    from cloudexec._unsendable import pickling_error

    return pickling_error(exc, fn, *call, **kwargs)


def _send_spawned_main_by_value() -> None:
    """Have functions of the script travel by value from a process that multiprocessing spawned.

    There the script is the module ``__mp_main__``, which workers do not have.
    """
    if "__mp_main__" in sys.modules:
        import cloudpickle

        cloudpickle.register_pickle_by_value(sys.modules["__mp_main__"])


def _names_of_main() -> dict[str, str]:
    """Return those globals of the script that tell where it is."""
    names = vars(sys.modules["__main__"])
    return {
        name: value
        for name in ("__file__", "__package__", "__doc__")
        if isinstance(value := names.get(name), str)
    }


def _failed(future: BatchFuture[T], error: BaseException, driver: Driver) -> BatchFuture[T]:
    """Fail a call that cannot be submitted; return its future."""
    future.set_exception(error)
    if future._on_end is not None:
        with contextlib.suppress(RuntimeError):  # the loop has closed
            driver.portal.post(future._on_end, future, False)
    return future


def _hold_back(
    task: Submission, fn: object, args: tuple[Any, ...], kwargs: Mapping[str, Any], driver: Driver
) -> CloudexecError | None:
    """Make a task wait for the futures among its arguments, if there are any.

    Returns:
        Why it cannot be submitted.
    """
    from cloudexec._payload import Unfinished
    from cloudexec._server.dependencies import hold_back

    payload: Any = task.payload
    if type(payload) is not Unfinished:
        return None  # it is just large
    try:
        hold_back(task, payload, name_of(fn), args, kwargs)
        if task.needs is not None:
            driver.dependencies.prepare()
    except BaseException as exc:
        return _pickling_error(exc, fn, args, kwargs)
    return None


def _modules_for(wanted: bool | Sequence[str]) -> bytes:
    """Pack the modules that workers elsewhere have to import from here."""
    if not wanted:
        return b""
    from cloudexec._modules import local_modules, pack_modules

    return pack_modules(local_modules(None if wanted is True else frozenset(wanted)))


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return ""


def _modules_to_preload(fn: object) -> list[str]:
    """Return the names of modules that workers will probably need for their first task."""
    from cloudexec._preload import modules_of

    try:
        return modules_of(fn)
    except Exception:
        return []  # some module is not what it seems; tasks import what they need
