"""What workers on AWS Lambda cost: their memory by the millisecond, and each invocation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from cloudexec._pricing import WorkerPrice

__all__ = ["FunctionPrices"]

_FREE_DISK_GIB = 0.5
_MIB_PER_GB = 1024
_MILLISECOND = 0.001
_USAGE = re.compile(r"(?:[A-Z0-9]+-)?(Lambda-GB-Second|Request|Lambda-Storage-GB-Second)(-ARM)?")
"""A region's prefix differs, as in other services' price lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FunctionPrices:
    """List prices of one region, in USD, without the free tier and without tiers for much use.

    References:
        AWS Lambda Pricing.
    """

    gb_second: float = 0.0000166667
    arm_gb_second: float = 0.0000133334
    request: float = 0.0000002
    disk_gb_second: float = 0.0000000309
    """``/tmp`` beyond 512 MiB."""

    def worker(
        self, *, memory_mib: int, arch: str, disk_gib: float | None, assumed: bool, table: str
    ) -> WorkerPrice:
        """Return the price of one worker.

        Args:
            memory_mib: Of its function.
            arch: ``"x86_64"`` or ``"arm64"``.
            disk_gib: Of ``/tmp``; ``None``: what is free of charge.
            assumed: Whether these are the prices of another region.
            table: Source and date of the prices.
        """
        per_gb = self.arm_gb_second if arch == "arm64" else self.gb_second
        disk = max(0.0, (disk_gib or 0.0) - _FREE_DISK_GIB)
        return WorkerPrice(
            per_second=memory_mib / _MIB_PER_GB * per_gb + disk * self.disk_gb_second,
            least_seconds=_MILLISECOND,
            step_seconds=_MILLISECOND,
            per_run=self.request,
            assumed=assumed,
            table=table,
        )

    @classmethod
    def learned(cls, prices: Mapping[str, float]) -> FunctionPrices:
        """Return the prices of a region by what the price list calls them.

        Args:
            prices: By usage type; what is not among them stays as this release knows it.
        """
        kinds = {
            ("Lambda-GB-Second", False): "gb_second",
            ("Lambda-GB-Second", True): "arm_gb_second",
            ("Request", False): "request",
            ("Lambda-Storage-GB-Second", False): "disk_gb_second",
        }
        found: dict[str, float] = {}
        for usage, price in prices.items():
            known = _USAGE.fullmatch(usage)
            kind = kinds.get((known[1], bool(known[2]))) if known is not None else None
            if kind is not None:
                found[kind] = price
        return cls(**found)
