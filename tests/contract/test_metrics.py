"""Prometheus metrics and OpenTelemetry spans, with the real libraries."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import contract_tasks as tasks
import hostile_tasks
import pytest
from contract_helpers import PATIENCE, Signals, until
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cloudexec import BatchExecutor, metrics, tracing

pytestmark = [pytest.mark.timeout(60), pytest.mark.usefixtures("nothing_left")]


def scrape(registry: CollectorRegistry) -> dict[str, float]:
    """Return samples as Prometheus reads them, by name and labels but the executor's."""
    found = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "executor"}
            key = sample.name + "".join(f"{{{k}={v}}}" for k, v in labels.items())
            found[key] = sample.value
    return found


def test_metrics_say_what_stats_say(signals: Signals, tmp_path: Path) -> None:
    """Tasks and workers by state, what was lost and run again, bytes, launch times."""
    registry = CollectorRegistry()
    with BatchExecutor(1) as executor:
        metrics.register(executor, registry)
        assert scrape(registry)["cloudexec_tasks_total{state=succeeded}"] == 0.0
        executor.submit(tasks.die_once, str(tmp_path / "x"), "").result(PATIENCE)
        assert executor.submit(tasks.divide, 1, 0).exception(PATIENCE)
        held = [executor.submit(tasks.hold, signals.told, signals.gate) for _ in range(3)]
        signals.wait()
        now = scrape(registry)
        assert now["cloudexec_tasks_total{state=succeeded}"] == 1.0
        assert now["cloudexec_tasks_total{state=failed}"] == 1.0
        assert now["cloudexec_tasks_open{state=running}"] == 1.0
        pending = (f"cloudexec_tasks_open{{state={state}}}" for state in ("waiting", "sent"))
        assert sum(map(now.__getitem__, pending)) == 2.0
        assert now["cloudexec_workers{state=busy}"] == 1.0
        assert now["cloudexec_slots"] == 1.0
        assert now["cloudexec_attempts_lost_total"] == 1.0
        assert now["cloudexec_retries_total{cause=lost}"] == 1.0
        assert now["cloudexec_workers_launched_total"] == 1.0
        assert now["cloudexec_launch_failures_total"] == 0.0
        assert now["cloudexec_bytes_total{way=sent}"] > 0.0
        assert now["cloudexec_cost_usd_total"] == 0.0
        assert now["cloudexec_launch_seconds_count"] == 1.0
        assert 0.0 < now["cloudexec_launch_seconds_sum"] < 20.0
        assert now["cloudexec_launch_seconds_bucket{le=+Inf}"] == 1.0
        assert now["cloudexec_launch_seconds_bucket{le=0.25}"] in (0.0, 1.0)
        signals.release(3)
        assert all(each.result(PATIENCE) for each in held)
    # Shut down, it still says what it did.
    assert scrape(registry)["cloudexec_tasks_total{state=succeeded}"] == 4.0


def test_every_metric_is_well_formed() -> None:
    """Each has a help text and a type, and Prometheus's own parser reads them all."""
    registry = CollectorRegistry(auto_describe=True)
    with BatchExecutor(1) as executor:
        metrics.register(executor, registry)
        text = generate_latest(registry).decode()
    families = list(text_string_to_metric_families(text))
    assert len(families) >= 17
    for family in families:
        assert family.name.startswith("cloudexec_")
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
    with pytest.raises(ValueError, match=r"[Dd]uplicate"):
        registry.register(metrics.PrometheusCollector())


def test_several_executors_have_names() -> None:
    """Two of one name are refused; one that is gone is not exposed any more, nor one that was
    taken out."""
    registry = CollectorRegistry()
    first, second = BatchExecutor(1), BatchExecutor(1)
    metrics.register(first, registry)
    metrics.register(first, registry)
    with pytest.raises(ValueError, match="name="):
        metrics.register(second, registry)
    metrics.register(second.with_options(name="x"), registry, name="second")
    text = generate_latest(registry).decode()
    assert 'cloudexec_slots{executor="default"}' in text
    assert 'cloudexec_slots{executor="second"}' in text
    metrics.unregister(first, registry)
    assert 'executor="default"' not in generate_latest(registry).decode()
    del second
    gc.collect()
    assert "executor=" not in generate_latest(registry).decode()
    metrics.register(first, registry)
    assert 'executor="default"' in generate_latest(registry).decode()


@pytest.mark.parametrize("module", ["metrics", "tracing"])
def test_extras_are_imported_only_when_asked_for(module: str) -> None:
    """``import cloudexec`` knows nothing of them; without them the import says what is missing."""
    script = (
        "import sys; sys.modules['prometheus_client'] = sys.modules['opentelemetry'] = None\n"
        "import cloudexec\n"
        f"try:\n    import cloudexec.{module}\n"
        "except ModuleNotFoundError as exc:\n    print(exc)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
    assert f"pip install 'cloudexec[{'metrics' if module == 'metrics' else 'otel'}]'" in done.stdout


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> Iterator[TracerProvider]:
    made = TracerProvider()
    made.add_span_processor(SimpleSpanProcessor(exporter))
    yield made
    made.shutdown()


def spans(exporter: InMemorySpanExporter, count: int) -> list[ReadableSpan]:
    """Return the spans by their start, once there are so many."""
    until(lambda: len(exporter.get_finished_spans()) >= count)
    found = exporter.get_finished_spans()
    assert len(found) == count
    return sorted(found, key=lambda span: span.start_time or 0)


def test_each_call_is_a_span(exporter: InMemorySpanExporter, provider: TracerProvider) -> None:
    """From submit to result, below the span that is current then; of submit, map and views."""
    tracer = provider.get_tracer("program")
    with BatchExecutor(1) as executor:
        executor.submit(tasks.double, 0).result(PATIENCE)
        tracing.instrument(executor, provider)
        before = time.time_ns()
        with tracer.start_as_current_span("program") as parent:
            future = executor.with_options(name="nap").submit(time.sleep, 0.1)
            assert list(executor.map(tasks.double, range(4), chunksize=2)) == [0, 2, 4, 6]
        future.result(PATIENCE)
        after = time.time_ns()
        made = [span for span in spans(exporter, 4) if span.name != "program"]
        tracing.uninstrument(executor)
        executor.submit(tasks.double, 1).result(PATIENCE)
    assert len(exporter.get_finished_spans()) == 4
    nap, *doubles = made
    assert nap.name == "nap"
    assert [each.name for each in doubles] == ["contract_tasks.double"] * 2
    for span in made:
        assert span.parent is not None
        assert span.parent.span_id == parent.get_span_context().span_id
        assert span.kind is SpanKind.CLIENT
        assert span.status.status_code is StatusCode.UNSET
        assert before <= (span.start_time or 0) < (span.end_time or 0) <= after + 1_000_000
        assert not [event for event in span.events if "lost" in event.name]
    assert (nap.end_time or 0) - (nap.start_time or 0) >= 95_000_000
    attributes = dict(nap.attributes or {})
    assert attributes["cloudexec.task"] == 2
    assert attributes["cloudexec.worker"] == "worker-1"
    assert attributes["cloudexec.attempts"] == 1
    assert attributes["cloudexec.run_time"] == future.run_time


def test_lost_attempts_are_events_and_failures_are_errors(
    exporter: InMemorySpanExporter, provider: TracerProvider, tmp_path: Path
) -> None:
    """With the evidence; an exception is recorded as OpenTelemetry has it."""
    with BatchExecutor(1) as executor:
        tracing.instrument(executor, provider)
        executor.submit(tasks.die_once, str(tmp_path / "x"), "").result(PATIENCE)
        assert executor.submit(tasks.divide, 1, 0).exception(PATIENCE)
        assert executor.submit(tasks.echo, exporter).exception(PATIENCE)  # it has a lock
        lost, failed, unsent = spans(exporter, 3)
    events = {event.name: dict(event.attributes or {}) for event in lost.events}
    assert events["cloudexec.lost"]["cloudexec.signal"] == signal.SIGKILL
    assert events["cloudexec.lost"]["cloudexec.attempt"] == 1
    assert lost.status.status_code is StatusCode.UNSET
    assert (lost.attributes or {})["cloudexec.attempts"] == 2
    times = [event.timestamp for event in lost.events]
    assert times == sorted(times)
    assert (lost.start_time or 0) - 10_000_000 < times[0] <= times[-1] <= (lost.end_time or 0)
    assert failed.status.status_code is StatusCode.ERROR
    assert failed.status.description == "ZeroDivisionError: division by zero"
    (raised,) = [event for event in failed.events if event.name == "exception"]
    assert (raised.attributes or {})["exception.type"] == "ZeroDivisionError"
    assert unsent.status.status_code is StatusCode.ERROR


def test_a_call_whose_exception_cannot_be_formatted_is_a_span(
    exporter: InMemorySpanExporter, provider: TracerProvider, tmp_path: Path
) -> None:
    """Neither that nor a callable without attributes is anything that submit() raises."""

    class Silent:
        def __getattr__(self, name: str) -> Any:
            raise SystemExit(name)

        def __reduce__(self) -> Any:
            raise SystemExit("pickling")

        def __call__(self) -> None: ...

    with BatchExecutor(1) as executor:
        tracing.instrument(executor, provider)
        arguments = (str(tmp_path / "log"), "__str__", SystemExit, "itself")
        assert executor.submit(hostile_tasks.fail, *arguments).exception(PATIENCE)
        assert executor.submit(Silent()).exception(PATIENCE)
        failed, unsent = sorted(spans(exporter, 2), key=lambda span: span.name.endswith("Silent"))
        for span in (failed, unsent):
            assert span.status.status_code is StatusCode.ERROR
            assert "exception" in [event.name for event in span.events]


def test_a_cancelled_call_is_a_span(
    exporter: InMemorySpanExporter, provider: TracerProvider, signals: Signals
) -> None:
    with BatchExecutor(1) as executor:
        tracing.instrument(executor, provider)
        held = executor.submit(tasks.hold, signals.told, signals.gate)
        waiting = executor.submit(tasks.hold, signals.told, signals.gate)
        signals.wait()
        assert waiting.cancel()
        (span,) = spans(exporter, 1)
        signals.release()
        held.result(PATIENCE)
    assert (span.attributes or {})["cloudexec.cancelled"] is True


def traced() -> tuple[str | None, int, int]:
    """Return what a span of the call would be a child of."""
    found = trace.get_current_span(tracing.task_context()).get_span_context()
    return os.environ.get("MINE"), found.trace_id, found.span_id


@pytest.mark.parametrize("propagate", [True, False])
def test_calls_find_their_span(
    exporter: InMemorySpanExporter, provider: TracerProvider, propagate: bool
) -> None:
    """In the environment, beside the variables of their own; not unless it was asked for."""
    with BatchExecutor(1) as executor:
        tracing.instrument(executor, provider, propagate=propagate)
        found = [
            executor.submit(traced).result(PATIENCE),
            executor.with_options(env={"MINE": "yes"}).submit(traced).result(PATIENCE),
        ]
        made = spans(exporter, 2)
    assert [each[0] for each in found] == [None, "yes"]
    for (_, trace_id, span_id), span in zip(found, made, strict=True):
        context: Any = span.get_span_context()
        expected = (context.trace_id, context.span_id) if propagate else (0, 0)
        assert (trace_id, span_id) == expected
