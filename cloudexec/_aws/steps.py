"""What set-up and teardown report as they go: steps, what they found, and how long they took."""

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
    """Work on something began."""

    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFinished:
    """The step that began last has ended well."""

    title: str
    found: str
    """What came of it, in a few words; may be empty."""
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ResourceChanged:
    """CloudFormation says what became of one resource of the stack."""

    resource: str
    """Its name in the template."""
    kind: str
    """Such as ``"AWS::S3::Bucket"``."""
    status: str
    """Such as ``"CREATE_COMPLETE"``."""
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """Something worth knowing that stops nothing."""

    text: str


Event: TypeAlias = StepStarted | StepFinished | ResourceChanged | Noted
Report: TypeAlias = Callable[[Event], None]
"""Called on the event loop's thread, and must not block."""


@dataclass(slots=True)
class Step:
    """A step that goes on."""

    found: str = ""


@contextlib.contextmanager
def stepping(report: Report, title: str) -> Iterator[Step]:
    """Report a step; what it finds is put into ``found``. One that raises is not finished."""
    report(StepStarted(title=title))
    started = time.monotonic()
    begun = Step()
    yield begun
    report(StepFinished(title=title, found=begun.found, seconds=time.monotonic() - started))


def counted(number: int, noun: str) -> str:
    """Write a number of things as people do."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
