"""OpenTelemetry spans of tasks: one span for each task, from ``submit()`` to its outcome.

This module needs ``pip install 'cloudexec[otel]'``, and an SDK that exports spans.

    from cloudexec import tracing

    executor = BatchExecutor()
    tracing.instrument(executor)

A span's parent is the span that is current where the call is submitted. The span is made after the
call has its outcome, in the thread that runs callbacks. Lost attempts are events of the span.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any

try:
    from opentelemetry import context as contexts
    from opentelemetry import trace
    from opentelemetry.trace import Span, SpanKind, Status, StatusCode, TracerProvider
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
except ModuleNotFoundError as exc:
    raise ModuleNotFoundError(
        "spans need opentelemetry-api: pip install 'cloudexec[otel]'", name=exc.name
    ) from exc

from cloudexec._core.resources import Requirements
from cloudexec._describing import (
    attribute_of,
    describe,
    format_exception,
    traceback_of,
    type_name,
)
from cloudexec._executor import BatchExecutor, OptionsView
from cloudexec._record_class import replace
from cloudexec._server.explaining import explain

if TYPE_CHECKING:
    from cloudexec._config import TaskOptions
    from cloudexec._future import BatchFuture
    from cloudexec._server.driver import Driver
    from cloudexec._story import StoryEvent, TaskStory

__all__ = ["instrument", "task_context", "uninstrument"]

_SILENT = frozenset({"submitted", "waiting", "result", "exception", "cancelled"})
"""Steps of a task's story that are not added as events, as the span's begin and end show them."""
_EVIDENCE = (
    "worker_id",
    "job_id",
    "attempt",
    "reason",
    "exit_code",
    "signal",
    "peak_memory_bytes",
    "out_of_memory",
    "run_time",
)


def instrument(
    executor: BatchExecutor | OptionsView,
    tracer_provider: TracerProvider | None = None,
    *,
    propagate: bool = False,
) -> None:
    """Make a span for each call that is submitted from now on, until ``uninstrument()``.

    The span has the name of the call, from ``with_options(name=...)``, or that of its function. Its
    attributes are ``cloudexec.task``, ``cloudexec.worker``, ``cloudexec.job``,
    ``cloudexec.attempts`` and ``cloudexec.run_time`` (seconds). Its status is an error if the call
    failed.

    Args:
        executor: The executor, or a view of it.
        tracer_provider: The provider that makes the spans; ``None`` means the global one.
        propagate: Whether the context of a call's span is set in the environment variables
            ``TRACEPARENT`` and ``TRACESTATE`` on the worker; see ``task_context()``. Submitting a
            call then takes about 50 microseconds longer.
    """
    tracer = trace.get_tracer("cloudexec", tracer_provider=tracer_provider)

    def submitted(
        future: BatchFuture[Any],
        fn: Callable[..., object],
        options: TaskOptions,
        requirements: Requirements | None,
        driver: Driver,
    ) -> Requirements | None:
        context, start = contexts.get_current(), time.time_ns()
        name = options.name or future._label or _name(fn)
        span: Span | None = None

        def begin() -> Span:
            return tracer.start_span(name, context, kind=SpanKind.CLIENT, start_time=start)

        if propagate:
            span = begin()
            requirements = _with_context(span, options, requirements)

        def end(done: Future[Any]) -> None:
            _end(begin() if span is None else span, future, driver)

        future.add_done_callback(end)
        return requirements

    executor._submitter.on_submit = submitted


def uninstrument(executor: BatchExecutor | OptionsView) -> None:
    """Make no more spans of calls; those of earlier ones are still made."""
    executor._submitter.on_submit = None


def task_context() -> contexts.Context:
    """Return the context of the current call's span, if ``instrument(propagate=True)`` sent it.

    A call uses it as the parent of spans that it makes itself, with the SDK that is set up in the
    worker. In all other cases the context is empty.
    """
    names = ("traceparent", "tracestate")
    carrier = {name: os.environ[name.upper()] for name in names if name.upper() in os.environ}
    return TraceContextTextMapPropagator().extract(carrier, contexts.Context())


def _with_context(
    span: Span, options: TaskOptions, requirements: Requirements | None
) -> Requirements:
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier, trace.set_span_in_context(span))
    env = {**(options.env or {}), **{name.upper(): value for name, value in carrier.items()}}
    mine = replace(options, env=env)
    return Requirements(mine) if requirements is None else replace(requirements, options=mine)


def _end(span: Span, future: BatchFuture[Any], driver: Driver) -> None:
    story = explain(driver, future)
    last = story.events[-1]
    end = time.time_ns() if last.at is None else _nanoseconds(last.at)
    try:
        if span.is_recording():
            _describe(span, future, story, end)
    finally:
        span.end(end)


def _describe(span: Span, future: BatchFuture[Any], story: TaskStory, end: int) -> None:
    attributes: dict[str, Any] = {
        "cloudexec.task": story.number,
        "cloudexec.worker": future.worker_id,
        "cloudexec.job": next((e.job_id for e in reversed(story.events) if e.job_id), None),
        "cloudexec.attempts": future.attempts or None,
        "cloudexec.run_time": future.run_time,
        "cloudexec.cancelled": True if story.state == "cancelled" else None,
    }
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
    for event in story.events:
        if event.what not in _SILENT and event.at is not None:
            span.add_event(
                f"cloudexec.{event.what.replace(' ', '_')}",
                _evidence(event),
                timestamp=_nanoseconds(event.at),
            )
    error = None if future.cancelled() else future.exception(0)
    if error is not None:
        try:
            span.record_exception(error, timestamp=end)
        except BaseException:  # the exception cannot be formatted
            trace_of = format_exception(error, traceback_of(error))
            span.add_event(
                "exception",
                {"exception.type": type_name(error), "exception.stacktrace": trace_of},
                timestamp=end,
            )
        span.set_status(Status(StatusCode.ERROR, describe(error)))


def _evidence(event: StoryEvent) -> dict[str, Any]:
    found = ((name, getattr(event, name)) for name in _EVIDENCE)
    return {f"cloudexec.{name}": value for name, value in found if value not in (None, "", False)}


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


def _name(fn: object) -> str:
    fn = attribute_of(fn, "_fn", fn)  # the function of several calls in one task
    name = attribute_of(fn, "__qualname__") or type_name(fn)
    return f"{attribute_of(fn, '__module__', '?')}.{name}"
