"""Tools for testing what uses or extends cloudexec: fakes of workers, launchers and AWS.

``ManualLauncher`` starts nothing and lets a test say what happened; ``SimulatedWorker`` speaks the
real protocol to a real executor and answers tasks without running them. ``FakeAWS`` is an AWS on
this machine that runs real workers (``pip install 'cloudexec[testing]'``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from cloudexec.testing._manual import ManualLaunch, ManualLauncher
from cloudexec.testing._simulated import Answer, SimulatedWorker, answer_none

if TYPE_CHECKING:
    from cloudexec.testing._aws.fake import FakeAWS, Setup
    from cloudexec.testing._aws.faults import Faults
    from cloudexec.testing._aws.records import AttemptRecord, JobRecord, Request

__all__ = [
    "Answer",
    "AttemptRecord",
    "FakeAWS",
    "Faults",
    "JobRecord",
    "ManualLaunch",
    "ManualLauncher",
    "Request",
    "Setup",
    "SimulatedWorker",
    "answer_none",
]

_LAZY = {
    "AttemptRecord": "records",
    "FakeAWS": "fake",
    "Faults": "faults",
    "JobRecord": "records",
    "Request": "records",
    "Setup": "fake",
}
"""Loaded on first use: who tests without AWS needs none of it installed."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"cloudexec.testing._aws.{_LAZY[name]}"), name)
