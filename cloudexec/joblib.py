"""A backend for joblib, and so for scikit-learn and other packages that have ``n_jobs``.

Importing this module registers it::

    import cloudexec.joblib
    import joblib

    with joblib.parallel_config(backend="cloudexec", n_jobs=8):
        search.fit(x, y)

All other arguments of ``parallel_config()`` are passed to ``BatchExecutor``. To use an executor
that you have made, pass it as ``executor=``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import joblib
from joblib._parallel_backends import (
    AutoBatchingMixin,
    FallbackToBackend,
    ParallelBackendBase,
    SequentialBackend,
)

from cloudexec._config import usable_cpus
from cloudexec._executor import BatchExecutor
from cloudexec._objects.ref import Ref

__all__ = ["CloudexecBackend"]

_LARGE = 256 * 1024
"""Bytes from which on an array is put once for each call of ``Parallel`` and not once per task."""


class _Shared:
    """An executor that consecutive calls of ``Parallel`` with the same settings use."""

    def __init__(self, executor: BatchExecutor) -> None:
        self.executor = executor
        self.users = 0


_lock = threading.Lock()
_executors: dict[tuple[Any, ...], _Shared] = {}


def _take(n_jobs: int, settings: dict[str, Any]) -> tuple[Any, ...]:
    """Return the executor of an earlier call or a new one, and shut down unused executors."""
    key = (n_jobs, *sorted((name, repr(value)) for name, value in settings.items()))
    with _lock:
        for other in [other for other, each in _executors.items() if not each.users]:
            if other != key or _executors[other].executor._broken is not None:
                _executors.pop(other).executor.shutdown(wait=False)
        if key not in _executors:
            _executors[key] = _Shared(BatchExecutor(n_jobs, **settings))
        _executors[key].users += 1
    return key


class CloudexecBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Runs the calls of ``joblib.Parallel`` on a ``BatchExecutor``.

    A call of ``Parallel`` inside a task runs in threads of that task, and calls inside those run
    one after another, as joblib's own backends do. Large arrays among the arguments are sent once
    to each worker, however many calls take them.

    Args:
        nesting_level: Set by joblib.
        inner_max_num_threads: Threads that numeric libraries may use in each task.
        executor: The executor that runs the calls; with ``None`` one is made and kept for later
            calls.
        **settings: Arguments for the executor that is made.
    """

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True
    default_n_jobs = -1

    def __init__(
        self,
        nesting_level: int | None = None,
        inner_max_num_threads: int | None = None,
        executor: BatchExecutor | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(nesting_level=nesting_level, inner_max_num_threads=inner_max_num_threads)
        self._given = executor
        self._settings = settings
        self._key: tuple[Any, ...] | None = None
        self._view: Any = None
        self._executor: BatchExecutor | None = executor
        self._refs: dict[int, tuple[Any, Ref[Any]]] = {}
        self._futures: set[Future[Any]] = set()

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        """Return how many calls run at once."""
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        if n_jobs < 0:
            most = self._given._max_workers if self._given is not None else usable_cpus()
            n_jobs = max(most + 1 + n_jobs, 1)
        return n_jobs

    def configure(
        self,
        n_jobs: int = 1,
        parallel: Any = None,
        prefer: Any = None,
        require: Any = None,
        **_: Any,
    ) -> int:
        """Prepare for a call of ``Parallel``, and return how many tasks run at once."""
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        if self._given is None and self._key is None:
            self._key = _take(n_jobs, self._settings)
            self._executor = _executors[self._key].executor
        assert self._executor is not None
        self._view = self._executor.with_options(env=self._prepare_worker_env(n_jobs=n_jobs))
        self.parallel = parallel
        return n_jobs

    def submit(
        self, func: Any, callback: Callable[[Future[Any]], object] | None = None
    ) -> Future[Any]:
        """Schedule a batch of calls."""
        items = getattr(func, "items", None)
        if items is not None:
            func.items = [
                (fn, tuple(map(self._put, args)), {k: self._put(v) for k, v in kwargs.items()})
                for fn, args, kwargs in items
            ]
        future: Future[Any] = self._view.submit(_call, func)
        self._futures.add(future)
        future.add_done_callback(self._futures.discard)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def _put(self, value: Any) -> Any:
        """Put a large array into the executor once and return its handle; return other values."""
        kind = type(value)
        if kind.__module__ != "numpy" or kind.__name__ != "ndarray" or value.nbytes < _LARGE:
            return value
        found = self._refs.get(id(value))
        if found is None:
            assert self._executor is not None
            # The array is kept, too, so that no other object can get its id.
            found = self._refs[id(value)] = (value, self._executor.put(value))
        return found[1]

    def retrieve_result_callback(self, out: Future[Any]) -> Any:
        """Return the results of a batch."""
        return out.result()

    def stop_call(self) -> None:
        """Release the arrays of this call of ``Parallel``."""
        self._refs.clear()

    def terminate(self) -> None:
        """Release the executor, so that the next call can use it."""
        self._refs.clear()
        if self._key is not None:
            with _lock:
                _executors[self._key].users -= 1
            self._key = self._executor = None
        self._view = None
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """Cancel all submitted tasks, including those that run."""
        for future in list(self._futures):
            future.cancel(running=True)  # type: ignore[call-arg]
        if not ensure_ready:
            self.terminate()


def _call(batch: Callable[[], Any]) -> Any:
    return batch()


joblib.register_parallel_backend("cloudexec", CloudexecBackend)
