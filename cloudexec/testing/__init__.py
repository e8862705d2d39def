"""Tools for testing programs that use or extend cloudexec: fakes of workers, launchers and AWS.

``check_launcher`` checks whether an executor can rely on a launcher. ``ManualLauncher`` starts no
worker; a test reports to the executor what happened. ``SimulatedWorker`` speaks the real protocol
with a real executor, and answers tasks without running them. ``FakeAWS`` emulates AWS on this
machine and runs real workers (``pip install 'cloudexec[testing]'``).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cloudexec.testing._aws.fake import FakeAWS
    from cloudexec.testing._aws.faults import Faults
    from cloudexec.testing._aws.records import (
        AttemptRecord,
        InstanceRecord,
        JobRecord,
        Request,
        Setup,
    )
    from cloudexec.testing._conformance import check_launcher
    from cloudexec.testing._manual import ManualLaunch, ManualLauncher
    from cloudexec.testing._platform_trial import LauncherCheckError
    from cloudexec.testing._simulated import Answer, SimulatedWorker, answer_none

__all__ = [
    "Answer",
    "AttemptRecord",
    "FakeAWS",
    "Faults",
    "InstanceRecord",
    "JobRecord",
    "LauncherCheckError",
    "ManualLaunch",
    "ManualLauncher",
    "Request",
    "Setup",
    "SimulatedWorker",
    "answer_none",
    "check_launcher",
]

_LAZY = {
    "Answer": "_simulated",
    "AttemptRecord": "_aws.records",
    "FakeAWS": "_aws.fake",
    "Faults": "_aws.faults",
    "InstanceRecord": "_aws.records",
    "JobRecord": "_aws.records",
    "LauncherCheckError": "_platform_trial",
    "ManualLaunch": "_manual",
    "ManualLauncher": "_manual",
    "Request": "_aws.records",
    "Setup": "_aws.records",
    "SimulatedWorker": "_simulated",
    "answer_none": "_simulated",
    "check_launcher": "_conformance",
}
"""The modules are imported on first use. pytest imports this package in every run, for its plugin,
and a run that tests neither AWS nor gRPC must not load their libraries."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"cloudexec.testing.{_LAZY[name]}"), name)
