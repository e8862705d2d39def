"""What the client knows of a run: how it is, and how far its log was read."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from cloudexec._aws.job_details import required_time
from cloudexec._runs.info import RunInfo
from cloudexec._runs.known import Known, KnownEnd
from cloudexec._runs.places import MachineState, has_place
from cloudexec._runs.plan import RunPlan, RunResult
from cloudexec._runs.protocol import TIME_IS_UP

__all__ = ["KILLED", "Found", "Look", "Position", "with_end"]

_PREPARING = 3600.0
"""Seconds in which a run whose machine is not known may yet be about to start."""
_REMEMBERED = 7 * 86400.0
"""AWS Batch User Guide, "Job states": jobs that have ended are kept for 7 days or more."""
_QUIET = 3
"""Looks at a log that must find nothing new after a machine was killed."""
_PATIENCE = 30
"""Looks at a log whose last line has not come, though the program has ended by itself."""
KILLED = (None, 137, TIME_IS_UP, 143)
"""Exit codes that a machine has whose program may not have ended by itself."""


@dataclass(frozen=True, slots=True)
class Found:
    """A run, and all that is known of it."""

    plan: RunPlan
    machine: MachineState | None
    result: RunResult | None
    known: Known = field(default_factory=Known)
    """What the bucket has of its jobs."""

    @property
    def exit_code(self) -> int | None:
        """The program's exit code, as the machine's place or the machine has it."""
        if self.machine is not None and self.machine.phase != "ended":
            return None
        # A machine may be killed after the program has ended, and before the machine has.
        if self.result is not None and self.result.is_final:
            return self.result.exit_code
        # An attempt that was told to stop ended with a code of ours, and was not the last one.
        return None if self.machine is None else self.machine.exit_code

    @property
    def state(self) -> str:
        """The state in one or two words: see ``RunInfo``."""
        if self.machine is None and self.result is None:
            age = time.time() - self.plan.created_at
            if age > _REMEMBERED or not has_place(self.plan.on):
                return "unknown"
            if age < _PREPARING:
                return "preparing"
            # It had a machine of which nobody has seen the end.
            return "unknown" if self.known.job_id else "not started"
        if self.machine is not None and self.machine.phase != "ended":
            return self.machine.phase
        if self.result is not None and self.result.is_final:
            was_stopped = self.result.was_stopped
        else:
            was_stopped = self.machine is not None and self.machine.was_stopped
        if was_stopped:
            return "stopped"
        return "succeeded" if self.exit_code == 0 else "failed"

    def info(self) -> RunInfo:
        """Return what users are told."""
        plan, machine, result = self.plan, self.machine, self.result
        seconds = 0.0 if machine is None else machine.run_seconds
        cost = 0.0 if machine is None else machine.cost_usd
        workers = 0.0 if machine is None else machine.workers_usd
        if result is not None and (machine is None or machine.is_remembered):
            # Its place has forgotten the job.
            workers = max(workers, result.workers_usd)
        if machine is None and result is not None:
            seconds = result.ended_at - result.started_at
            cost = seconds / 3600 * plan.per_hour_usd
        if result is not None and result.is_final:
            # Such as that files are lost; nothing, where the program ended by itself.
            reason = result.reason
        else:
            reason = "" if machine is None or self.state == "succeeded" else machine.reason
        return RunInfo(
            name=plan.name,
            state=self.state,
            exit_code=self.exit_code,
            reason=reason,
            command=plan.title,
            user=plan.user,
            project=plan.project,
            on=plan.on,
            vcpus=plan.vcpus,
            memory_mib=plan.memory_mib,
            gpus=plan.gpus,
            spot=plan.spot,
            outputs=plan.outputs,
            created_at=required_time(plan.created_at * 1000),
            started_at=None if machine is None else machine.started_at,
            stopped_at=None if machine is None else machine.stopped_at,
            attempts=0 if machine is None else machine.attempts,
            workers=0 if machine is None else machine.workers,
            run_seconds=seconds,
            machine_usd=cost,
            workers_usd=workers,
            is_estimate=machine is None or machine.is_estimate,
        )


@dataclass(frozen=True, slots=True)
class Position:
    """How far the log of a run was read."""

    tokens: Mapping[str, str] = field(default_factory=dict)
    first: int = 0
    quiet: int = 0
    has_last_line: bool = False
    has_result: bool = False
    """Whether the program is known to have ended by itself."""

    def is_over(self, machine: MachineState) -> bool:
        """Whether nothing more is to be expected."""
        if machine.phase != "ended":
            return False
        if machine.is_remembered:
            return self.has_last_line or self.quiet > 0  # its log is complete
        # A program may end itself with 137.
        was_killed = machine.was_stopped or (machine.exit_code in KILLED and not self.has_result)
        return self.has_last_line or self.quiet > (_QUIET if was_killed else _PATIENCE)


@dataclass(frozen=True, slots=True)
class Look:
    """One look at a run that is followed."""

    machine: MachineState
    lines: Sequence[str]
    position: Position


def with_end(known: Known, plan: RunPlan, result: RunResult | None) -> Known:
    """Add how the program ended, as its machine has written it, for a place that has forgotten it.

    That is where each attempt is a machine of its own.
    """
    if result is None or not result.is_final or not known.attempts:
        return known
    end = KnownEnd(
        created_at=required_time(plan.created_at * 1000),
        started_at=required_time(result.started_at * 1000) if result.started_at else None,
        stopped_at=required_time(result.ended_at * 1000) if result.ended_at else None,
        exit_code=result.exit_code,
        reason=result.reason,
        was_stopped=result.was_stopped,
    )
    return replace(known, end=end)
