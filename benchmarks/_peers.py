"""The libraries that are compared, behind one interface; each is imported only where it runs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from typing import Any, Protocol

import _fresh
from _report import Report

OURS = "cloudexec"
WIRE = "cloudexec (TLS)"
POOL = "ProcessPoolExecutor"
SPAWN = "ProcessPoolExecutor (spawn)"
FORKSERVER = "ProcessPoolExecutor (forkserver)"
LOKY = "loky"
DASK = "dask.distributed"
RAY = "Ray"
PARSL = "Parsl"
MPI = "mpi4py.futures"

_MODULES = {LOKY: "loky", DASK: "distributed", RAY: "ray", PARSL: "parsl", MPI: "mpi4py"}


class Contender(Protocol):
    """The interface of each library that is compared."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        """Start one call; return a handle."""

    def collect(self, handles: list[Any]) -> list[Any]:
        """Wait for calls and return their results."""

    def map(self, fn: Callable[..., Any], items: Iterable[Any], chunksize: int = 1) -> list[Any]:
        """Run one call per item, with ``chunksize`` calls per task if the library supports that."""

    def close(self) -> None:
        """Shut down the library and its workers."""


def is_installed(name: str) -> bool:
    """Return whether a contender is installed."""
    if name == MPI and shutil.which("mpiexec") is None:
        return False
    return name not in _MODULES or importlib.util.find_spec(_MODULES[name]) is not None


@contextmanager
def opened(name: str, workers: int) -> Iterator[Contender]:
    """Start a contender with ``workers`` workers, each of which runs one task at a time."""
    contender = _OPENERS[name](workers)
    try:
        yield contender
    finally:
        contender.close()


def rounds(
    names: Iterable[str],
    count: int,
    report: Report,
    what: str,
    arguments: Callable[[str], dict[str, Any]],
    *,
    pin: bool = False,
) -> dict[str, list[_fresh.Figures]]:
    """Measure contenders in turn for several rounds; report those that are missing or fail.

    Args:
        names: The contenders.
        count: Number of rounds.
        report: Report for contenders that are missing or fail.
        what: What is measured, as text for the report.
        arguments: Returns the arguments of the script's ``measure`` for a contender.
        pin: Whether to confine each measurement to one core.
    """
    figures: dict[str, list[_fresh.Figures]] = {}
    out: set[str] = set()
    names = list(names)
    for name in names:
        if not is_installed(name):
            report.missing(what, name)
            out.add(name)
    for _ in range(count):
        for name in names:
            if name in out:
                continue
            prefix = ["mpiexec", "-n", "1"] if name == MPI else []  # for MPI_Comm_spawn()
            try:
                figure = _fresh.measure(name, pin=pin, prefix=prefix, **arguments(name))
            except RuntimeError as exc:
                if name in (OURS, WIRE, POOL):
                    raise
                report.say(str(exc))
                report.missing(what, name, "failed")
                out.add(name)
                figures.pop(name, None)
            else:
                figures.setdefault(name, []).append(figure)
    return figures


class _OfExecutor:
    """A contender with the interface of ``concurrent.futures``."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self.submit = executor.submit

    def collect(self, handles: list[Any]) -> list[Any]:
        return [handle.result() for handle in handles]

    def map(self, fn: Callable[..., Any], items: Iterable[Any], chunksize: int = 1) -> list[Any]:
        return list(self._executor.map(fn, items, chunksize=chunksize))

    def close(self) -> None:
        self._executor.shutdown()


def _open_ours(workers: int) -> Contender:
    from cloudexec import BatchExecutor

    return _OfExecutor(BatchExecutor(workers))


def _open_wire(workers: int) -> Contender:
    from cloudexec import BatchExecutor

    return _OfExecutor(BatchExecutor(workers, listen="127.0.0.1:0"))


def _open_mpi(workers: int) -> Contender:
    from mpi4py.futures import MPIPoolExecutor

    return _OfExecutor(MPIPoolExecutor(workers))


def _open_pool(workers: int) -> Contender:
    from concurrent.futures import ProcessPoolExecutor

    return _OfExecutor(ProcessPoolExecutor(workers))


def _open_with(method: str, workers: int) -> Contender:
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    context = multiprocessing.get_context(method)
    return _OfExecutor(ProcessPoolExecutor(workers, mp_context=context))


def _open_spawn(workers: int) -> Contender:
    return _open_with("spawn", workers)


def _open_forkserver(workers: int) -> Contender:
    return _open_with("forkserver", workers)


def _open_loky(workers: int) -> Contender:
    from loky import get_reusable_executor

    return _OfExecutor(get_reusable_executor(max_workers=workers, timeout=600))


class _Dask:
    def __init__(self, workers: int) -> None:
        import logging

        from distributed import Client, LocalCluster

        self._directory = tempfile.mkdtemp(prefix="benchmark-dask-")
        self._cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=1,
            dashboard_address=None,
            local_directory=self._directory,
            silence_logs=logging.CRITICAL,
        )
        self._client = Client(self._cluster)

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        return self._client.submit(fn, *args, pure=False)

    def collect(self, handles: list[Any]) -> list[Any]:
        return self._client.gather(handles)  # type: ignore[no-any-return]

    def map(self, fn: Callable[..., Any], items: Iterable[Any], chunksize: int = 1) -> list[Any]:
        return self.collect(self._client.map(fn, items, pure=False))

    def close(self) -> None:
        self._client.close()
        self._cluster.close()
        shutil.rmtree(self._directory, ignore_errors=True)


class _Ray:
    def __init__(self, workers: int) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._ray = ray
        self._remote: dict[Callable[..., Any], Any] = {}
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        remote = self._remote.get(fn)
        if remote is None:
            remote = self._remote[fn] = self._ray.remote(fn)
        return remote.remote(*args)

    def collect(self, handles: list[Any]) -> list[Any]:
        return self._ray.get(handles)  # type: ignore[no-any-return]

    def map(self, fn: Callable[..., Any], items: Iterable[Any], chunksize: int = 1) -> list[Any]:
        return self.collect([self.submit(fn, item) for item in items])

    def close(self) -> None:
        self._ray.shutdown()


class _Parsl:
    def __init__(self, workers: int) -> None:
        import parsl
        from parsl.config import Config
        from parsl.executors import HighThroughputExecutor
        from parsl.providers import LocalProvider

        # Parsl starts its worker pool by name, and workers import the modules of tasks.
        here = os.path.dirname(os.path.abspath(__file__))
        paths = [here, *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        path = [os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]
        os.environ["PATH"] = os.pathsep.join(path)
        self._parsl = parsl
        self._apps: dict[Callable[..., Any], Any] = {}
        self._directory = tempfile.mkdtemp(prefix="benchmark-parsl-")
        executor = HighThroughputExecutor(
            label="local",
            address="127.0.0.1",
            max_workers_per_node=workers,
            cores_per_worker=0.01,
            encrypted=False,  # cloudexec's Unix socket is not encrypted, either
            provider=LocalProvider(init_blocks=1, max_blocks=1),
        )
        parsl.load(
            Config(
                executors=[executor],
                run_dir=self._directory,
                strategy="none",
                initialize_logging=False,
            )
        )

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        app = self._apps.get(fn)
        if app is None:
            app = self._apps[fn] = self._parsl.python_app(fn)
        return app(*args)

    def collect(self, handles: list[Any]) -> list[Any]:
        return [handle.result() for handle in handles]

    def map(self, fn: Callable[..., Any], items: Iterable[Any], chunksize: int = 1) -> list[Any]:
        return self.collect([self.submit(fn, item) for item in items])

    def close(self) -> None:
        self._parsl.dfk().cleanup()
        self._parsl.clear()
        shutil.rmtree(self._directory, ignore_errors=True)


_OPENERS: dict[str, Callable[[int], Contender]] = {
    OURS: _open_ours,
    WIRE: _open_wire,
    POOL: _open_pool,
    SPAWN: _open_spawn,
    FORKSERVER: _open_forkserver,
    LOKY: _open_loky,
    DASK: _Dask,
    RAY: _Ray,
    PARSL: _Parsl,
    MPI: _open_mpi,
}
