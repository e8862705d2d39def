"""Instance types of the emulated Amazon EC2: a few of each kind, with prices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["TYPES", "InstanceType", "fitting"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceType:
    """One type. Prices are USD per hour in us-east-1; those of Spot are made up."""

    name: str
    vcpus: int
    memory_mib: int
    arch: str
    per_hour: float
    spot: float
    gpus: int = 0
    burstable: bool = False


def _types() -> Iterator[InstanceType]:
    for name, vcpus, gib, arch, per_hour, gpus in (
        ("t3.medium", 2, 4, "x86_64", 0.0416, 0),
        ("c7a.medium", 1, 2, "x86_64", 0.05132, 0),
        ("c6i.large", 2, 4, "x86_64", 0.085, 0),
        ("c7i.large", 2, 4, "x86_64", 0.08925, 0),
        ("c7i.xlarge", 4, 8, "x86_64", 0.1785, 0),
        ("c7i.2xlarge", 8, 16, "x86_64", 0.357, 0),
        ("m7i.large", 2, 8, "x86_64", 0.1008, 0),
        ("m7i.xlarge", 4, 16, "x86_64", 0.2016, 0),
        ("r6i.large", 2, 16, "x86_64", 0.126, 0),
        ("r6i.xlarge", 4, 32, "x86_64", 0.252, 0),
        ("c7g.medium", 1, 2, "arm64", 0.0363, 0),
        ("c7g.large", 2, 4, "arm64", 0.0725, 0),
        ("m7g.large", 2, 8, "arm64", 0.0816, 0),
        ("g4dn.xlarge", 4, 16, "x86_64", 0.526, 1),
        ("g5.xlarge", 4, 16, "x86_64", 1.006, 1),
    ):
        yield InstanceType(
            name=name,
            vcpus=vcpus,
            memory_mib=gib * 1024,
            arch=arch,
            per_hour=per_hour,
            spot=round(per_hour * 0.4, 4),
            gpus=gpus,
            burstable=name.startswith("t"),
        )


TYPES: Mapping[str, InstanceType] = {each.name: each for each in _types()}


def fitting(requirements: Mapping[str, Any], arch: str) -> list[InstanceType]:
    """Return the types that have what is asked for, the cheapest first.

    Burstable types are left out unless they are asked for, and so are those whose price is more
    than 20 % above that of the cheapest. Amazon EC2 API Reference, "InstanceRequirementsRequest".

    Args:
        requirements: As CreateFleet takes them.
        arch: Architecture of the image.
    """
    found = [
        each
        for each in TYPES.values()
        if each.arch == arch
        and _within(each.vcpus, requirements["VCpuCount"])
        and _within(each.memory_mib, requirements["MemoryMiB"])
        and _within(each.gpus, requirements.get("AcceleratorCount") or {})
        and (not each.burstable or requirements.get("BurstablePerformance") == "included")
    ]
    found.sort(key=lambda each: each.per_hour)
    limit = requirements.get("OnDemandMaxPricePercentageOverLowestPrice", 20)
    return [each for each in found if each.per_hour <= found[0].per_hour * (1 + limit / 100)]


def _within(number: int, bounds: Mapping[str, int]) -> bool:
    return bounds.get("Min", 0) <= number <= bounds.get("Max", number)
