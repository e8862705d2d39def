"""What an EC2 instance costs: of the type that was given, with its disk and its address."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from typing import Any

from cloudexec._aws.clients import AwsClients
from cloudexec._aws.limits import WorkerSize
from cloudexec._aws.prices import LEAST_SECONDS, PriceTable, price_of_instance
from cloudexec._errors import AwsError
from cloudexec._pricing import WorkerPrice

__all__ = ["DISK_GIB_HOUR", "InstancePrices", "assumed_price", "instance_price"]

DISK_GIB_HOUR = 0.08 / 730
"""USD for a GiB of a gp3 volume for an hour, in us-east-1: 0.08 a month. Amazon EBS pricing."""
_HOUR = 3600.0


def _per_hour_of(table: PriceTable, size: WorkerSize, arch: str) -> float:
    """Return USD per hour of the cheapest instance known that holds a worker of a size."""
    known = [each for each in table.instances.values() if bool(each.gpus) == bool(size.gpus)]
    same = [each for each in known if each.arch == arch] or known
    same = same or list(PriceTable.built_in().instances.values())
    return min(
        each.per_hour
        * max(
            1.0,
            size.vcpus / each.vcpus,
            size.memory_mib / 1024 / each.memory_gib,
            size.gpus / each.gpus if each.gpus else 0.0,
        )
        for each in same
    )


def instance_price(
    table: PriceTable,
    per_hour: float,
    *,
    spot: bool,
    disk_gib: float,
    public_ip: bool,
    estimated: bool,
    region: str = "",
    note: str = "",
) -> WorkerPrice:
    """Return the price of one instance with its disk and its address.

    Args:
        table: Has the price of an address, and is named as the source.
        per_hour: USD for the instance itself.
        spot: Whether it is Spot.
        disk_gib: Its disk.
        public_ip: Whether it has a public IPv4 address.
        estimated: Whether ``per_hour`` may differ from what is billed.
        region: Where it runs; empty: the table's region.
        note: Further assumptions.
    """
    hourly = per_hour + disk_gib * DISK_GIB_HOUR + public_ip * table.public_ipv4_hour
    return WorkerPrice(
        per_second=hourly / _HOUR,
        least_seconds=LEAST_SECONDS,
        assumed=bool(region) and region != table.region and estimated,
        estimated=estimated or spot,
        table=str(table),
        note=note,
    )


def assumed_price(
    table: PriceTable,
    size: WorkerSize,
    *,
    arch: str,
    spot: bool,
    disk_gib: float,
    public_ip: bool,
    region: str = "",
    instance_type: str = "",
) -> WorkerPrice:
    """Return what an instance for a worker of a size costs, as far as a price table knows.

    Args:
        table: List prices.
        size: What it must have.
        arch: ``"x86_64"`` or ``"arm64"``.
        spot: Whether it is Spot.
        disk_gib: Its disk.
        public_ip: Whether it has a public IPv4 address.
        region: Where it runs.
        instance_type: Its type, if that is known.
    """
    known = table.instances.get(instance_type)
    per_hour = known.per_hour if known is not None else _per_hour_of(table, size, arch)
    note = f"Spot at {table.spot_factor:.0%} of it" if spot else ""
    return instance_price(
        table,
        per_hour * (table.spot_factor if spot else 1.0),
        spot=spot,
        disk_gib=disk_gib,
        public_ip=public_ip,
        estimated=known is None or spot,
        region=region,
        note=note,
    )


class InstancePrices:
    """Prices of instance types as AWS says them, looked up once each.

    Args:
        clients: Where. They need ``pricing:GetProducts`` and ``ec2:DescribeSpotPriceHistory``;
            where that is not allowed, nothing is known.
        table: List prices that are known already.
    """

    def __init__(self, clients: AwsClients, table: PriceTable) -> None:
        self._clients = clients
        self._table = table
        self._asking: dict[tuple[str, str, bool], asyncio.Task[float | None]] = {}

    async def per_hour(self, instance_type: str, zone: str, *, spot: bool) -> float | None:
        """Return USD per hour of an instance itself; ``None``: that cannot be learned.

        Args:
            instance_type: Such as ``"c7i.large"``.
            zone: Its Availability Zone, of which the price of Spot depends.
            spot: Whether it is Spot.
        """
        known = self._table.instances.get(instance_type)
        if not spot and known is not None:
            return known.per_hour
        key = (instance_type, zone if spot else "", spot)
        if key not in self._asking:
            look = self._spot(instance_type, zone) if spot else self._listed(instance_type)
            self._asking[key] = asyncio.ensure_future(look)
        return await asyncio.shield(self._asking[key])

    async def close(self) -> None:
        """Ask for nothing more."""
        for each in self._asking.values():
            each.cancel()
        await asyncio.gather(*self._asking.values(), return_exceptions=True)

    async def _listed(self, instance_type: str) -> float | None:
        try:
            return await price_of_instance(self._clients, instance_type)
        except AwsError:
            return None  # an aid, not a need

    async def _spot(self, instance_type: str, zone: str) -> float | None:
        wanted: dict[str, Any] = {"AvailabilityZone": zone} if zone else {}
        try:
            answer = await self._clients.call(
                "ec2",
                "describe_spot_price_history",
                InstanceTypes=[instance_type],
                ProductDescriptions=["Linux/UNIX"],
                StartTime=datetime.now(UTC),
                **wanted,
            )
        except AwsError:
            return None
        prices = [float(each["SpotPrice"]) for each in answer.get("SpotPriceHistory", ())]
        return max(prices, default=None)
