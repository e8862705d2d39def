"""What the core is told when a worker ends, for tests."""

from __future__ import annotations

from typing import Any

from cloudexec._core.commands import Command
from cloudexec._core.events import ConnectionEnded, Event, ProcessEnded
from cloudexec._core.machine import Machine

__all__ = ["cut", "ends_of", "lose"]


def ends_of(machine: Machine, worker: str, reason: str = "", **how: Any) -> list[Event]:
    """Return the events of a worker's process and connection; ``how`` is what is reported."""
    launch = machine.workers[worker].launch
    return [ProcessEnded(launch, reason, **how), ConnectionEnded(worker, reason)]


def lose(machine: Machine, now: float, worker: str, reason: str = "", **how: Any) -> list[Command]:
    """Let both ends of a worker be known, so that it is lost; return the commands."""
    answers = [machine.handle(event, now) for event in ends_of(machine, worker, reason, **how)]
    return [command for answer in answers for command in answer]


def cut(worker: str) -> ConnectionEnded:
    """Return the event that a worker's connection was cut."""
    return ConnectionEnded(worker, "its connection was cut", may_return=True)
