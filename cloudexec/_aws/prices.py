"""Prices of workers: a dated table of list prices, and the way to refresh it."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cloudexec._aws.function_prices import FunctionPrices
from cloudexec._aws.profile import profile_directory
from cloudexec._errors import AwsError, ConfigError
from cloudexec._pricing import WorkerPrice

if TYPE_CHECKING:
    from cloudexec._aws.clients import AwsClients

__all__ = [
    "LEAST_SECONDS",
    "InstancePrice",
    "PriceTable",
    "format_usd",
    "price_of_instance",
    "refresh",
]

LEAST_SECONDS = 60
"""Least time that is charged for each start of a worker. AWS Fargate pricing, "one-minute minimum";
Amazon EC2 charges for Linux in the same way."""
_HOUR = 3600.0
_MIB_PER_GB = 1024
"""Fargate's price list says GB, but its sizes are GiB."""
_FREE_EPHEMERAL_GB = 20
"""AWS Fargate pricing: the first 20 GB of a task's storage are free."""
_ARCHITECTURES = ("x86_64", "arm64")
_BUILT_IN_REGION = "us-east-1"
_PRICING_REGION = "us-east-1"
"""A region with an endpoint of the price list, which answers for all regions. AWS Billing User
Guide, "Price List Query API"."""
_FARGATE_USAGE = re.compile(
    r"(?:[A-Z0-9]+-)?Fargate-(?:(ARM)-)?"
    r"(vCPU-Hours:perCPU|GB-Hours|EphemeralStorage-GB-Hours)"
)
"""Prefixes differ by region (``USE1-``, ``EUC1-``). Names for Windows differ and do not match."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstancePrice:
    """An EC2 instance type. A job takes a share of an instance."""

    vcpus: int
    memory_gib: float
    arch: str
    per_hour: float
    """USD on demand, for Linux and shared tenancy."""
    gpus: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PriceTable:
    """List prices of one region, in USD, without taxes, free tiers and discounts."""

    dated: date
    """Day on which the prices were collected."""
    source: str
    """Where the prices come from."""
    region: str = _BUILT_IN_REGION
    note: str = ""
    """Why the prices could not be refreshed; empty if they were, or nobody tried."""
    vcpu_hour: Mapping[str, float] = field(
        default_factory=lambda: {"x86_64": 0.04048, "arm64": 0.03238}
    )
    """USD on Fargate, by architecture."""
    gb_hour: Mapping[str, float] = field(
        default_factory=lambda: {"x86_64": 0.004445, "arm64": 0.00356}
    )
    """USD on Fargate, by architecture."""
    ephemeral_gb_hour: float = 0.000111
    """USD for Fargate storage beyond 20 GB."""
    spot_factor: float = 0.3
    """Spot costs "up to 70% less". Its real price changes, and no price list has it."""
    public_ipv4_hour: float = 0.005
    """USD for the public address of a worker, if it has one."""
    instances: Mapping[str, InstancePrice] = field(default_factory=lambda: dict(_INSTANCES))
    """Prices on EC2, by instance type."""
    functions: FunctionPrices = field(default_factory=FunctionPrices)
    """Prices on AWS Lambda."""

    @classmethod
    def built_in(cls) -> PriceTable:
        """Return the prices that come with this release."""
        return _BUILT_IN

    @classmethod
    def load(cls, region: str) -> PriceTable:
        """Return the prices last looked up for a region, or else the built-in table."""
        try:
            return _read(json.loads(_cache(region).read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # A damaged file, or one of another release, is ignored: prices can be looked up again.
            return _BUILT_IN

    def __str__(self) -> str:
        return f"{self.region} list price of {self.dated.isoformat()}"

    def save(self) -> Path:
        """Write the table to the file from which ``load`` reads."""
        path = _cache(self.region)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.with_suffix(f".{os.getpid()}.tmp")
        draft.write_text(json.dumps(_write(self), indent=2, sort_keys=True) + "\n", "utf-8")
        os.replace(draft, path)
        return path

    def worker(
        self,
        *,
        vcpus: float,
        memory_mib: int,
        gpus: int = 0,
        arch: str = "x86_64",
        compute: str = "fargate",
        spot: bool = False,
        ephemeral_gib: float | None = None,
        public_ip: bool = False,
        region: str = "",
    ) -> WorkerPrice:
        """Return the price of one worker.

        Args:
            vcpus: vCPUs that the worker requests.
            memory_mib: MiB that the worker requests.
            gpus: GPUs that the worker requests, on EC2.
            arch: ``"x86_64"`` or ``"arm64"``.
            compute: ``"fargate"``, ``"ec2"`` or ``"lambda"``. A job on EC2 is priced as a share of
                the cheapest instance type for it, as if other jobs used the rest.
            spot: Whether the worker runs on spare capacity.
            ephemeral_gib: Disk of the worker on Fargate or Lambda; ``None``: what is free of
                charge.
            public_ip: Whether the worker has a public IPv4 address.
            region: Region of the worker; empty: the table's region.

        Raises:
            ConfigError: If there is no such architecture or compute.
        """
        if arch not in _ARCHITECTURES:
            raise ConfigError(f"arch must be one of {', '.join(_ARCHITECTURES)}, not {arch!r}")
        if compute == "lambda":
            return self.functions.worker(
                memory_mib=memory_mib,
                arch=arch,
                disk_gib=ephemeral_gib,
                assumed=bool(region) and region != self.region,
                table=str(self),
            )
        if compute == "fargate":
            hourly = (
                vcpus * self.vcpu_hour[arch] + memory_mib / _MIB_PER_GB * self.gb_hour[arch]
            ) * (self.spot_factor if spot else 1.0)
            extra_gib = max(0.0, (ephemeral_gib or 0.0) - _FREE_EPHEMERAL_GB)
            hourly += extra_gib * self.ephemeral_gb_hour
            address_share = 1.0
        elif compute == "ec2":
            hourly, address_share = self._share(vcpus, memory_mib, gpus, arch)
            hourly *= self.spot_factor if spot else 1.0
        else:
            raise ConfigError(f"compute must be 'fargate', 'ec2' or 'lambda', not {compute!r}")
        if public_ip:
            hourly += address_share * self.public_ipv4_hour
        return WorkerPrice(
            per_second=hourly / _HOUR,
            least_seconds=LEAST_SECONDS,
            assumed=bool(region) and region != self.region,
            estimated=spot or compute == "ec2",
            table=str(self),
            note=f"Spot at {self.spot_factor:.0%} of it" if spot else "",
        )

    def _share(self, vcpus: float, memory_mib: int, gpus: int, arch: str) -> tuple[float, float]:
        """Return USD per hour, and the share of one instance, for the cheapest type."""
        known = [each for each in self.instances.values() if bool(each.gpus) == bool(gpus)]
        known = known or [each for each in _INSTANCES.values() if each.gpus]
        # If no instance of this architecture has GPUs, one of the other is the better estimate.
        same = [each for each in known if each.arch == arch] or known
        shares = (
            (
                max(
                    vcpus / each.vcpus,
                    memory_mib / _MIB_PER_GB / each.memory_gib,
                    gpus / each.gpus if each.gpus else 0.0,
                ),
                each.per_hour,
            )
            for each in same
        )
        return min((share * per_hour, min(share, 1.0)) for share, per_hour in shares)


def format_usd(usd: float) -> str:
    """Format an amount: dollars with cents, and smaller amounts with four digits."""
    if abs(usd) >= 1:
        return f"${usd:,.2f}"
    return "$0.00" if abs(usd) < 0.00005 else f"${usd:.4f}"


async def refresh(clients: AwsClients, *, keep: bool = True) -> PriceTable:
    """Look up the prices of the clients' region, and save them.

    Args:
        clients: Calls to AWS; they need ``pricing:GetProducts``.
        keep: Whether to save them in the file from which ``PriceTable.load`` reads.

    Returns:
        A table of today. If AWS forbids the calls or cannot be reached, the table known so far,
        with a note of the reason.

    References:
        AWS Price List API, "GetProducts".
    """
    known = PriceTable.load(clients.region)
    try:
        # This call is made alone, so that a missing permission is reported only once.
        fargate = await _products(clients, "AmazonECS", {})
        functions = await _products(clients, "AWSLambda", {})
        instances = await asyncio.gather(
            *(_products(clients, "AmazonEC2", _instance_filters(each)) for each in _INSTANCES)
        )
    except AwsError as exc:
        return replace(known, note=" ".join(f"prices could not be refreshed: {exc}".split()))
    learned = _learned(clients.region, fargate, dict(zip(_INSTANCES, instances, strict=True)))
    if learned is not None:
        prices = {_usage(each): price for each in functions if (price := _on_demand(each))}
        learned = replace(learned, functions=FunctionPrices.learned(prices))
    if learned is None:
        return replace(known, note=f"the price list has no Fargate prices for {clients.region}")
    if keep:
        try:
            learned.save()
        except OSError as exc:
            return replace(learned, note=f"prices could not be kept: {exc}")
    return learned


async def price_of_instance(clients: AwsClients, instance_type: str) -> float | None:
    """Return the list price of an instance type in the clients' region, in USD per hour.

    ``None``: the price list has none.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
    """
    products = await _products(clients, "AmazonEC2", _instance_filters(instance_type))
    return min((price for each in products if (price := _on_demand(each))), default=None)


def _instance_filters(instance_type: str) -> dict[str, str]:
    return {
        "instanceType": instance_type,
        "operatingSystem": "Linux",
        "tenancy": "Shared",
        "preInstalledSw": "NA",
        "capacitystatus": "Used",
    }


async def _products(
    clients: AwsClients, service: str, fields: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Return the region's products that have these attributes."""
    filters = [
        {"Type": "TERM_MATCH", "Field": name, "Value": value}
        for name, value in {"regionCode": clients.region, **fields}.items()
    ]
    found: list[dict[str, Any]] = []
    token: dict[str, Any] = {}
    while True:
        page = await clients.call(
            "pricing",
            "get_products",
            region=_PRICING_REGION,
            ServiceCode=service,
            Filters=filters,
            MaxResults=100,
            **token,
        )
        found += [json.loads(item) for item in page.get("PriceList", ())]
        if not page.get("NextToken"):
            return found
        token = {"NextToken": page["NextToken"]}


def _learned(
    region: str,
    fargate: Iterable[Mapping[str, Any]],
    instances: Mapping[str, Iterable[Mapping[str, Any]]],
) -> PriceTable | None:
    """Return a table of today; ``None`` if it would lack prices of Fargate."""
    vcpu_hour: dict[str, float] = {}
    gb_hour: dict[str, float] = {}
    ephemeral: list[float] = []
    for product in fargate:
        usage = _FARGATE_USAGE.fullmatch(product["product"]["attributes"].get("usagetype", ""))
        price = _on_demand(product)
        if usage is None or price is None:
            continue
        arch = "arm64" if usage[1] else "x86_64"
        if usage[2].startswith("vCPU"):
            vcpu_hour[arch] = price
        elif usage[2].startswith("GB"):
            gb_hour[arch] = price
        else:
            ephemeral.append(price)
    if not {"x86_64"} <= vcpu_hour.keys() & gb_hour.keys():
        return None
    # A region without arm64 runs no such workers. The price of x86-64 fills the gap.
    for prices in (vcpu_hour, gb_hour):
        prices.setdefault("arm64", prices["x86_64"])
    learned: dict[str, InstancePrice] = {}
    for instance_type, products in instances.items():
        prices_found = [price for each in products if (price := _on_demand(each))]
        if prices_found:
            learned[instance_type] = replace(_INSTANCES[instance_type], per_hour=min(prices_found))
    for arch in _ARCHITECTURES:
        if not any(each.arch == arch and not each.gpus for each in learned.values()):
            learned |= {name: each for name, each in _INSTANCES.items() if each.arch == arch}
    return PriceTable(
        dated=date.today(),
        source="AWS Price List API",
        region=region,
        vcpu_hour=vcpu_hour,
        gb_hour=gb_hour,
        ephemeral_gb_hour=max(ephemeral, default=_BUILT_IN.ephemeral_gb_hour),
        instances=learned,
    )


def _usage(product: Mapping[str, Any]) -> str:
    return str(product["product"]["attributes"].get("usagetype", ""))


def _on_demand(product: Mapping[str, Any]) -> float | None:
    """Return the price above zero, as a product may have a free tier besides."""
    prices = [
        float(dimension["pricePerUnit"]["USD"])
        for term in product.get("terms", {}).get("OnDemand", {}).values()
        for dimension in term["priceDimensions"].values()
        if "USD" in dimension["pricePerUnit"]  # China's regions have CNY
    ]
    return max(prices, default=0.0) or None


def _cache(region: str) -> Path:
    # A folder of its own, because every *.json in the parent folder is a profile.
    return profile_directory() / "prices" / f"{region}.json"


def _write(table: PriceTable) -> dict[str, Any]:
    return {
        "dated": table.dated.isoformat(),
        "source": table.source,
        "region": table.region,
        "vcpu_hour": dict(table.vcpu_hour),
        "gb_hour": dict(table.gb_hour),
        "ephemeral_gb_hour": table.ephemeral_gb_hour,
        "instances": {name: each.per_hour for name, each in table.instances.items()},
        "functions": asdict(table.functions),
    }


def _read(data: Mapping[str, Any]) -> PriceTable:
    return PriceTable(
        dated=date.fromisoformat(data["dated"]),
        source=str(data["source"]),
        region=str(data["region"]),
        vcpu_hour={arch: float(data["vcpu_hour"][arch]) for arch in _ARCHITECTURES},
        gb_hour={arch: float(data["gb_hour"][arch]) for arch in _ARCHITECTURES},
        ephemeral_gb_hour=float(data["ephemeral_gb_hour"]),
        instances={
            name: replace(_INSTANCES[name], per_hour=float(per_hour))
            for name, per_hour in data["instances"].items()
            if name in _INSTANCES
        },
        functions=FunctionPrices(**data.get("functions", {})),
    )


def _instance(
    vcpus: int, memory_gib: float, arch: str, per_hour: float, gpus: int = 0
) -> InstancePrice:
    return InstancePrice(
        vcpus=vcpus, memory_gib=memory_gib, arch=arch, per_hour=per_hour, gpus=gpus
    )


# The instance types from which Batch chooses by default: compute, general and memory families.
# Burstable types are left out, as their price is not for a processor in full use.
_INSTANCES: Mapping[str, InstancePrice] = {
    "c6i.large": _instance(2, 4, "x86_64", 0.085),
    "c7i.large": _instance(2, 4, "x86_64", 0.08925),
    "c7i.xlarge": _instance(4, 8, "x86_64", 0.1785),
    "m7i.large": _instance(2, 8, "x86_64", 0.1008),
    "r6i.large": _instance(2, 16, "x86_64", 0.126),
    "c7g.large": _instance(2, 4, "arm64", 0.0725),
    "c7g.xlarge": _instance(4, 8, "arm64", 0.145),
    "c8g.large": _instance(2, 4, "arm64", 0.07976),
    "m7g.large": _instance(2, 8, "arm64", 0.0816),
    # Workers with GPUs are priced by the cheapest of these types. The compute environment decides
    # which type they really get.
    "g4dn.xlarge": _instance(4, 16, "x86_64", 0.526, gpus=1),
    "g6.xlarge": _instance(4, 16, "x86_64", 0.8048, gpus=1),
    "g5.xlarge": _instance(4, 16, "x86_64", 1.006, gpus=1),
    "g5g.xlarge": _instance(4, 8, "arm64", 0.42, gpus=1),
}
_BUILT_IN = PriceTable(dated=date(2026, 11, 21), source="AWS price lists, as of this release")
