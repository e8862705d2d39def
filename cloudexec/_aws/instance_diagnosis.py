"""Why workers on EC2 instances do not come: what Amazon EC2 says, and what to do about it."""

from __future__ import annotations

import re
from dataclasses import replace

from cloudexec._aws.diagnosis import (
    Cause,
    Situation,
    cause_of_quota,
    cause_of_waiting,
    count_of_workers,
)

__all__ = [
    "cause_of_refused_fleet",
    "cause_of_waiting_instances",
    "lacks_capacity",
    "may_pass",
    "worst_of",
]

_CAPACITY = re.compile(
    r"InsufficientInstanceCapacity|InsufficientHostCapacity|InsufficientCapacity"
    r"|UnfulfillableCapacity|SpotMaxPriceTooLow|InsufficientFreeAddressesInSubnet"
)
_QUOTA = re.compile(
    r"VcpuLimitExceeded|MaxSpotInstanceCountExceeded|InstanceLimitExceeded|VolumeLimitExceeded"
)
_PASSES = re.compile(
    r"RequestLimitExceeded|ResourceCountExceeded|InternalError|InternalFailure|ServiceUnavailable"
    r"|Unavailable|InvalidSubnetID\.NotFound|InvalidLaunchTemplateName\.NotFound"
)
"""Codes that may not come again. Amazon EC2 API Reference, "Error codes for the Amazon EC2 API".
What was made a moment ago may not be known yet: "Eventual consistency"."""
_ROLE = re.compile(r"AWSServiceRoleForEC2(Spot|Fleet)|AuthFailure\.ServiceLinkedRole", re.I)


def lacks_capacity(said: str) -> bool:
    """Whether Amazon EC2 says that it has no capacity for an instance."""
    return _CAPACITY.search(said) is not None


def may_pass(said: str) -> bool:
    """Whether what Amazon EC2 says of instances that it does not start may not come again."""
    return any(each.search(said) for each in (_CAPACITY, _QUOTA, _PASSES))


def worst_of(errors: tuple[tuple[str, str], ...]) -> str:
    """Return the one of several errors that says most, as text.

    A fleet names an error for each type of instance and each subnet that it tried. That there is no
    capacity in one of them matters less than what prevents instances of any type.
    """
    said = [f"{code}: {words}" if words else code for code, words in errors]
    for pattern in (_QUOTA, _CAPACITY):
        if found := next(filter(pattern.search, said), ""):
            return found
    return next(iter(said), "Amazon EC2 gives no reason")


def cause_of_refused_fleet(reason: str, *, spot: bool) -> Cause:
    """Say what an error of CreateFleet means; ``fatal``: the same request always fails.

    Args:
        reason: Code and words.
        spot: Whether the instances were to be Spot.

    References:
        Amazon EC2 API Reference, "Error codes for the Amazon EC2 API".
    """
    if _QUOTA.search(reason):
        return cause_of_quota(reason)
    if lacks_capacity(reason):
        on_demand = "spot=False or spot='prefer', " if spot else ""
        return Cause(
            text=f"AWS has no capacity of this kind: {reason}",
            remedy=(
                f"{on_demand}another size, more instance types or subnets, or waiting: it is tried "
                f"again"
            ),
            no_room=True,
        )
    if may_pass(reason):
        return Cause(
            text=f"Amazon EC2 could not start the instance now: {reason}",
            remedy="it is tried again",
        )
    if _ROLE.search(reason):
        service = "spot" if spot else "ec2fleet"
        return Cause(
            text=f"AWS misses a role of its own: {reason}",
            remedy=(
                f"somebody who may call iam:CreateServiceLinkedRole makes it once: `aws iam "
                f"create-service-linked-role --aws-service-name {service}.amazonaws.com`"
            ),
            fatal=True,
        )
    return Cause(
        text=f"Amazon EC2 does not start the instance: {reason}",
        remedy="`cloudexec doctor` looks at the set-up, `cloudexec up --with ec2` repairs it",
        fatal=True,
    )


def cause_of_waiting_instances(situation: Situation) -> Cause | None:
    """Say why workers that were asked for are not there; ``None``: nothing is known to be wrong."""
    waiting = situation.statuses.get("RUNNABLE", 0)
    if waiting and all(end.reclaimed for end in situation.ends) and situation.reasons:
        return cause_of_refused_fleet(situation.reasons[0], spot=situation.spot)
    starting = situation.statuses.get("STARTING", 0)
    if starting and not situation.ends:
        return Cause(text=f"{count_of_workers(starting, 'has', 'have')} an instance that boots")
    return cause_of_waiting(
        replace(situation, reasons=(), statuses={**situation.statuses, "RUNNABLE": 0})
    )
