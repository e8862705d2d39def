"""Needs and costs of relays that are started in a stack's VPC."""

from __future__ import annotations

from cloudexec._aws.limits import WorkerSize
from cloudexec._aws.names import RELAY_QUEUE
from cloudexec._aws.prices import PriceTable
from cloudexec._aws.profile import Profile
from cloudexec._pricing import WorkerPrice

__all__ = ["AUTO", "RELAY_SIZE", "lacks_for_relay", "relay_price"]

AUTO = "auto"
"""Setting that starts a relay if workers cannot reach the client."""
RELAY_SIZE = WorkerSize(vcpus=0.25, memory_mib=512)
"""The smallest size of Fargate."""


def lacks_for_relay(profile: Profile) -> str:
    """Say what a set-up lacks to start a relay, and what to do; empty if it lacks nothing."""
    if not profile.stack:
        return "it needs the stack of a profile, which `cloudexec up` creates"
    if RELAY_QUEUE not in profile.queues or not profile.bucket or not profile.key_secret:
        if profile.is_adopted:
            return (
                f"the stack {profile.stack} has no queue for relays: its administrator can bring "
                f"it up to date with `cloudexec template`, and then `cloudexec up --adopt "
                f"{profile.stack} --name {profile.name}` writes the profile again"
            )
        return (
            f"the profile {profile.name!r} has no queue for relays: `cloudexec up --name "
            f"{profile.name}` adds it"
        )
    if not profile.assign_public_ip:
        return (
            f"the subnets of the stack {profile.stack} give no public addresses (AssignPublicIp "
            f"is DISABLED): use a host that both sides reach, with relay='ssh://user@host'"
        )
    return ""


def relay_price(prices: PriceTable, arch: str, region: str) -> WorkerPrice:
    """Return the price of a relay with a public address.

    Args:
        prices: Price table.
        arch: Architecture of the worker image.
        region: Region of the relay.
    """
    return prices.worker(
        vcpus=RELAY_SIZE.vcpus,
        memory_mib=RELAY_SIZE.memory_mib,
        arch=arch,
        public_ip=True,
        region=region,
    )
