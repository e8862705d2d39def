"""Prometheus metrics of executors, which are read only at a scrape and so do not slow down tasks.

This module needs ``pip install 'cloudexec[metrics]'``.

    from cloudexec import metrics

    executor = BatchExecutor()
    metrics.register(executor)
    prometheus_client.start_http_server(8000)

All metrics have names that begin with ``cloudexec_``, and the label ``executor``. Counters count
from the start of the executor.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from dataclasses import fields
from itertools import accumulate

try:
    from prometheus_client.core import (
        REGISTRY,
        CounterMetricFamily,
        GaugeMetricFamily,
        HistogramMetricFamily,
        Metric,
    )
    from prometheus_client.registry import Collector, CollectorRegistry
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        "metrics need prometheus-client: pip install 'cloudexec[metrics]'", name=exc.name
    ) from exc

from cloudexec._executor import BatchExecutor, OptionsView
from cloudexec._launchers.base import Cost
from cloudexec._stats import ExecutorStats

__all__ = ["PrometheusCollector", "register", "unregister"]

_LAUNCH_BUCKETS = (0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0, 600.0)
"""Buckets in seconds: a worker on this machine starts in less than one, a container in minutes."""
_OPEN = ("held", "resting", "waiting", "sent", "running")
_DONE = ("succeeded", "failed", "cancelled")
_WORKERS = ("starting", "idle", "busy", "draining")

_collectors: weakref.WeakKeyDictionary[CollectorRegistry, PrometheusCollector]
_collectors = weakref.WeakKeyDictionary()
_lock = threading.Lock()


class PrometheusCollector(Collector):
    """A collector of ``prometheus_client`` for executors, which ``register()`` makes.

    It does not keep executors alive. An executor that was garbage-collected is no longer exposed.
    """

    def __init__(self) -> None:
        self._executors: dict[str, weakref.ref[BatchExecutor]] = {}

    def add(self, executor: BatchExecutor | OptionsView, name: str = "default") -> None:
        """Expose an executor.

        Args:
            executor: The executor, or a view of it.
            name: The value of the label ``executor``.

        Raises:
            ValueError: If another executor is exposed under that name.
        """
        known = self._executors.get(name)
        before = None if known is None else known()
        if before is not None and before is not executor._executor:
            raise ValueError(f"an executor named {name!r} is registered already: give name=")
        self._executors = {**self._executors, name: weakref.ref(executor._executor)}

    def remove(self, executor: BatchExecutor | OptionsView) -> None:
        """Stop exposing an executor; does nothing if it is not exposed."""
        gone = (None, executor._executor)
        self._executors = {n: ref for n, ref in self._executors.items() if ref() not in gone}

    def describe(self) -> list[Metric]:
        """Return the metrics without samples, for their names."""
        return list(_Families().all())

    def collect(self) -> Iterator[Metric]:
        """Return the metrics with their current samples; reads each executor once."""
        families = _Families()
        for name, reference in self._executors.items():
            executor = reference()
            if executor is not None:
                families.add(name, executor.stats(), executor.cost())
        return families.all()


def register(
    executor: BatchExecutor | OptionsView,
    registry: CollectorRegistry | None = None,
    *,
    name: str = "default",
) -> None:
    """Expose an executor's metrics.

    Args:
        executor: The executor, or a view of it.
        registry: The registry; ``None`` means the default registry of ``prometheus_client``.
        name: The value of the label ``executor``, which tells several executors of a process apart.

    Raises:
        ValueError: If another executor is exposed in the registry under that name.
    """
    registry = REGISTRY if registry is None else registry
    with _lock:
        collector = _collectors.get(registry)
        if collector is None:
            collector = PrometheusCollector()
            registry.register(collector)
            _collectors[registry] = collector
        collector.add(executor, name)


def unregister(
    executor: BatchExecutor | OptionsView, registry: CollectorRegistry | None = None
) -> None:
    """Stop exposing an executor's metrics, which go on being exposed after its shutdown."""
    with _lock:
        collector = _collectors.get(REGISTRY if registry is None else registry)
        if collector is not None:
            collector.remove(executor)


class _Families:
    """The metrics of one scrape."""

    def __init__(self) -> None:
        self._tasks_open = _gauge("tasks_open", "Tasks that are not done, by state.", "state")
        self._tasks = _counter("tasks", "Tasks that are done, by outcome.", "state")
        self._workers = _gauge("workers", "Workers, by state.", "state")
        self._slots = _gauge("slots", "Tasks that the connected workers may run at once.")
        self._launched = _counter("workers_launched", "Workers that were asked for.")
        self._lost = _counter("workers_lost", "Workers that were lost unexpectedly.")
        self._reclaimed = _counter("workers_reclaimed", "Workers that their platform took back.")
        self._failures = _counter("launch_failures", "Workers that could not be started.")
        self._bytes = _counter("bytes", "Payload bytes moved, by way.", "way")
        self._pending = _gauge(
            "pending_bytes", "Arguments of tasks that are not done, where that is limited."
        )
        self._attempts = _counter("attempts_lost", "Attempts whose process or worker died.")
        self._retries = _counter("retries", "Attempts that were run again, by cause.", "cause")
        self._duplicates = _counter("duplicates", "Results that came too late and were dropped.")
        self._refused = _counter("refused", "Peers and messages that were turned away.")
        self._cost = _counter("cost_usd", "What the workers have cost, estimated.")
        self._rate = _gauge("cost_usd_per_hour", "What the workers that run now cost, estimated.")
        self._launches = HistogramMetricFamily(
            "cloudexec_launch_seconds",
            "From asking for a worker until it was connected.",
            labels=["executor"],
        )

    def all(self) -> Iterator[Metric]:
        return iter(list(vars(self).values()))

    def add(self, name: str, stats: ExecutorStats, cost: Cost) -> None:
        """Add the samples of one executor."""
        for state in _OPEN:
            self._tasks_open.add_metric([name, state], getattr(stats.tasks, state))
        for state in _DONE:
            self._tasks.add_metric([name, state], getattr(stats.tasks, state))
        for state in _WORKERS:
            self._workers.add_metric([name, state], getattr(stats.workers, state))
        self._slots.add_metric([name], stats.workers.slots)
        self._launched.add_metric([name], stats.workers.launched)
        self._lost.add_metric([name], stats.workers.lost)
        self._reclaimed.add_metric([name], stats.workers.reclaimed)
        self._failures.add_metric([name], stats.launch_failures)
        for way in (each.name for each in fields(stats) if each.name.startswith("bytes_")):
            self._bytes.add_metric([name, way.removeprefix("bytes_")], getattr(stats, way))
        self._pending.add_metric([name], stats.pending_bytes)
        self._attempts.add_metric([name], stats.lost_attempts)
        self._retries.add_metric([name, "lost"], stats.retries)
        self._retries.add_metric([name, "raised"], stats.retried_errors)
        self._duplicates.add_metric([name], stats.duplicates)
        self._refused.add_metric([name], stats.refused)
        self._cost.add_metric([name], cost.accrued_usd)
        self._rate.add_metric([name], cost.per_hour_usd)
        waits = [
            each.total - (each.first_task or 0.0)
            for each in stats.launches
            if each.worker_id and each.total is not None
        ]
        bounds = (*_LAUNCH_BUCKETS, float("inf"))
        counts = [0] * len(bounds)
        for wait in waits:
            counts[next(i for i, bound in enumerate(bounds) if wait <= bound)] += 1
        buckets = [
            ("+Inf" if bound == float("inf") else str(bound), float(count))
            for bound, count in zip(bounds, accumulate(counts), strict=True)
        ]
        self._launches.add_metric([name], buckets, sum(waits))


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"cloudexec_{name}", text, labels=["executor", *labels])


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(f"cloudexec_{name}", text, labels=["executor", *labels])
