"""Explains why workers on Fargate do not start, from what Amazon ECS says."""

from __future__ import annotations

import re
from dataclasses import replace

from cloudexec._aws.diagnosis import (
    Cause,
    Situation,
    cause_of_quota,
    cause_of_waiting,
    count_of_workers,
    is_out_of_capacity,
    is_over_quota,
)

__all__ = ["cause_of_refused_task", "cause_of_waiting_tasks", "may_pass"]

_MAY_PASS = re.compile(r"(?:RESOURCE|AGENT)\b|.*(?:rate|request limit) exceeded", re.I | re.S)
"""Failures that may be gone at the next try. Amazon ECS Developer Guide, "API failure reasons"."""


def may_pass(said: str) -> bool:
    """Return whether a task that Amazon ECS did not start may start at the next try.

    Amazon ECS gives the reason as a failure of RunTask or in the message of an error. The error's
    code does not show it.
    """
    return is_over_quota(said) or is_out_of_capacity(said) or _MAY_PASS.match(said) is not None


def cause_of_refused_task(reason: str, *, spot: bool) -> Cause:
    """Explain a failure of RunTask. If it is ``fatal``, the same request would always fail.

    Args:
        reason: Amazon ECS's reason.
        spot: Whether the task was to run on Fargate Spot.

    References:
        Amazon ECS Developer Guide, "API failure reasons".
    """
    if is_over_quota(reason):
        return cause_of_quota(reason)
    if is_out_of_capacity(reason):
        on_demand = "spot=False or spot='prefer', " if spot else ""
        return Cause(
            text=f"AWS has no capacity of this kind: {reason}",
            remedy=f"try {on_demand}another size or more subnets, or wait: it is tried again",
            no_room=True,
        )
    if reason.startswith("RESOURCE:ENI"):
        return Cause(
            text=f"there is no network interface for the worker: {reason}",
            remedy="use more or larger subnets, or fewer workers: it is tried again",
            no_room=True,
        )
    if may_pass(reason):
        return Cause(
            text=f"Amazon ECS could not start the worker now: {reason}",
            remedy="it is tried again; another size may be placed sooner",
            no_room=reason.startswith("RESOURCE"),
        )
    return Cause(
        text=f"Amazon ECS does not start the worker: {reason or 'it gives no reason'}",
        remedy="`cloudexec doctor` checks the cluster, `cloudexec up --with fargate` repairs it",
        fatal=True,
    )


def cause_of_waiting_tasks(situation: Situation) -> Cause | None:
    """Say why requested workers have not dialed back; ``None``: nothing is known to be wrong."""
    waiting = situation.statuses.get("RUNNABLE", 0)
    if waiting and all(end.reclaimed for end in situation.ends):
        if situation.reasons:
            return cause_of_refused_task(situation.reasons[0], spot=situation.spot)
        return Cause(
            text=(
                f"{count_of_workers(waiting, 'waits', 'wait')} for a place and a network interface "
                f"(PROVISIONING)"
            )
        )
    return cause_of_waiting(
        replace(situation, reasons=(), statuses={**situation.statuses, "RUNNABLE": 0})
    )
