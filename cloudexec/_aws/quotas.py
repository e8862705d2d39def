"""Looks up an account's quotas of vCPUs by the names that AWS gives them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import Any

__all__ = ["kind_of_quota", "vcpu_quotas"]


async def vcpu_quotas(
    call: Callable[..., Awaitable[Any]], services: Iterable[str]
) -> dict[str, float]:
    """Return the vCPUs that the account may run at once, by kind of queue, if AWS lists them.

    Args:
        call: Makes a call to AWS: service, operation, parameters.
        services: ``"fargate"``, ``"ec2"`` or both.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    quotas: dict[str, float] = {}
    for service in services:
        token: dict[str, Any] = {}
        while True:
            page = await call("service-quotas", "list_service_quotas", ServiceCode=service, **token)
            for each in page.get("Quotas", ()):
                if kind := kind_of_quota(each["QuotaName"]):
                    quotas[kind] = float(each["Value"])
            if not page.get("NextToken"):
                break
            token = {"NextToken": page["NextToken"]}
    return quotas


def kind_of_quota(name: str) -> str:
    """Return the kind of queue that a quota limits, or an empty string."""
    lower = name.lower()
    if "fargate" in lower and "vcpu" in lower:
        return "fargate_spot" if "spot" in lower else "fargate"
    if lower.startswith("running on-demand standard"):
        return "ec2"
    if lower.startswith("all standard") and "spot" in lower:
        return "ec2_spot"
    return ""
