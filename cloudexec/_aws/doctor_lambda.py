"""Looks at what workers on AWS Lambda need: the role, the account's limits, the network."""

from __future__ import annotations

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.functions import concurrency_of_account
from cloudexec._aws.profile import Profile

__all__ = ["look_at_lambda"]

_USUAL = 1000
"""Invocations that an account may have at once. AWS Lambda Developer Guide, "Lambda quotas"."""


async def look_at_lambda(clients: AwsClients, profile: Profile) -> tuple[str, str]:
    """Return what was found, and what to do if that is less than usual; empty: nothing.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    limits = await concurrency_of_account(clients)
    found = f"{limits.unreserved} workers at once"
    if limits.unreserved < limits.account:
        found += f", as {limits.account - limits.unreserved} are reserved for certain functions"
    if profile.assign_public_ip:
        where = "in the VPC they reach that alone, as its subnets are public ones"
    else:
        where = "in the VPC they reach what its private subnets lead to"
    found += f"; outside of the VPC, workers reach the internet, and {where}"
    if limits.account < _USUAL:
        return found, (
            "ask for more under Service Quotas, AWS Lambda, Concurrent executions: new accounts "
            "have few, and may have functions of 3008 MiB at most"
        )
    return found, ""
