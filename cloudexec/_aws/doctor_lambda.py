"""Looks at what workers on AWS Lambda need: the role, the account's limits, the network."""

from __future__ import annotations

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.functions import limits_of_account
from cloudexec._aws.profile import Profile

__all__ = ["look_at_lambda"]

_FULL = 0.95
"""Share of the storage for archives from which on a large one may find no room."""
_USUAL = 1000
"""Invocations that an account may have at once. AWS Lambda Developer Guide, "Lambda quotas"."""


async def look_at_lambda(clients: AwsClients, profile: Profile) -> tuple[str, str]:
    """Return what was found, and what to do if that is less than usual; empty: nothing.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    limits = await limits_of_account(clients)
    found = f"{limits.unreserved} workers at once"
    if limits.unreserved < limits.account:
        found += f", as {limits.account - limits.unreserved} are reserved for certain functions"
    if profile.assign_public_ip:
        where = "in the VPC they reach that alone, as its subnets are public ones"
    else:
        where = "in the VPC they reach what its private subnets lead to"
    found += f"; outside of the VPC, workers reach the internet, and {where}"
    is_full = False
    if limits.storage:
        found += (
            f"; {limits.stored / 1e9:,.1f} of {limits.storage / 1e9:,.1f} GB for .zip archives of "
            f"functions are used"
        )
        is_full = limits.stored > _FULL * limits.storage
    remedies = []
    if limits.account < _USUAL:
        remedies.append(
            "ask for more under Service Quotas, AWS Lambda, Concurrent executions: new accounts "
            "have few, and may have functions of 3008 MiB at most"
        )
    if is_full:
        remedies.append(
            "delete functions and versions that nobody uses, or ask for more under Service "
            "Quotas, AWS Lambda, Function and layer storage; package='image' needs none of it"
        )
    return found, "; ".join(remedies)
