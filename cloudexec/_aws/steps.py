"""Events of set-up and teardown: steps, their results, and how long they took."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

__all__ = [
    "Event",
    "Noted",
    "Report",
    "ResourceChanged",
    "StepFinished",
    "StepStarted",
    "counted",
    "stepping",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStarted:
    """A step has begun."""

    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished:
    """The step that began last has ended well."""

    title: str
    found: str
    """Result in a few words; may be empty."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceChanged:
    """CloudFormation has changed the status of one resource of the stack."""

    resource: str
    """Name of the resource in the template."""
    kind: str
    """Type of the resource, such as ``"AWS::S3::Bucket"``."""
    status: str
    """Status, such as ``"CREATE_COMPLETE"``."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """A note for the user. The work goes on."""

    text: str


Event: TypeAlias = StepStarted | StepFinished | ResourceChanged | Noted
Report: TypeAlias = Callable[[Event], None]
"""Called with each event in the event loop's thread. It must not block."""


@dataclass(slots=True)
class Step:
    """A step that is under way."""

    found: str = ""


@contextlib.contextmanager
def stepping(report: Report, title: str) -> Iterator[Step]:
    """Report a step, and at its end the result in ``found``. If it raises, no end is reported."""
    report(StepStarted(title=title))
    started = time.monotonic()
    begun = Step()
    yield begun
    report(StepFinished(title=title, found=begun.found, seconds=time.monotonic() - started))


def counted(number: int, noun: str) -> str:
    """Format a number with its noun, such as "3 jobs"."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
