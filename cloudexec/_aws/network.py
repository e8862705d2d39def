"""Which subnets workers can run in: what their routes reach, and in which zones they lie.

A worker must reach Amazon ECR for its image, CloudWatch Logs, and AWS Secrets Manager for its key.
Whether it can is in the route table of its subnet, not in the subnet's own settings.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from cloudexec._aws.clients import AwsClients
from cloudexec._errors import AwsError, ConfigError

__all__ = ["SUBNETS_LARGEST", "Network", "Subnet", "choose_network", "look_at_subnets"]

SUBNETS_LARGEST = 16
"""Subnets of one compute environment. AWS Batch API Reference, "ComputeResource"."""

_FARGATE_ZONES: Mapping[str, tuple[str, ...]] = {
    "us-west-1": ("usw1-az1", "usw1-az3"),
    "ap-northeast-1": ("apne1-az1", "apne1-az2", "apne1-az4"),
}
"""Zones with Fargate, of regions that have one without. Amazon ECS Developer Guide, "Supported
Regions for Amazon ECS on AWS Fargate"."""
_ENDPOINTS = ("ecr.api", "ecr.dkr", "logs", "secretsmanager")
"""Services that a task without a way out needs an endpoint for, beside the gateway endpoint of
Amazon S3, where the layers of images are. Amazon ECS Developer Guide, "Fargate platform
versions"."""
_WAYS_OUT = (
    "NatGatewayId",
    "TransitGatewayId",
    "InstanceId",
    "NetworkInterfaceId",
    "CoreNetworkArn",
)
"""Targets of a default route through which a private subnet gets out. Amazon EC2 API Reference,
"Route"."""

Reach = Literal["public", "routed", "endpoints", "nothing", "unknown"]
"""Where the default route of a subnet leads: an internet gateway, something else that leads out,
nowhere but with endpoints for what a worker needs, nowhere; or it may not be looked at."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subnet:
    """A subnet, as far as workers are concerned."""

    id: str
    vpc: str
    zone: str
    """Name of its availability zone."""
    free: int
    """Addresses that are not in use: each Fargate worker takes one."""
    reach: Reach
    missing: tuple[str, ...] = ()
    """Services that have no endpoint, where there is no way out."""
    maps_public: bool = False
    """Whether instances get a public address there."""
    unfit: str = ""
    """Why no worker can run there, whatever its routes are."""

    def problem(self, *, public_ip: bool) -> str:
        """Say why workers cannot start there; empty if they can.

        Args:
            public_ip: Whether they get a public address.
        """
        if self.unfit:
            return self.unfit
        if self.reach == "nothing":
            return (
                "its route table has no default route, and there is no VPC endpoint for "
                + ", ".join(self.missing)
            )
        if self.reach == "public" and not public_ip:
            return "its default route is an internet gateway, of no use without a public address"
        return ""

    def __str__(self) -> str:
        return f"{self.id} ({self.zone})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Network:
    """Where workers are to run."""

    vpc: str
    subnets: tuple[Subnet, ...]
    public_ip: bool
    """Whether Fargate workers get a public address."""
    left_out: tuple[str, ...] = ()
    """Subnets that are not used, and why: for people."""


async def choose_network(
    clients: AwsClients,
    *,
    vpc: str = "",
    subnets: Sequence[str] = (),
    public_ip: bool | None = None,
) -> Network:
    """Choose subnets in which workers can start.

    Args:
        clients: Where.
        vpc: Its subnets are looked at; empty: the account's default VPC, and its default subnets.
        subnets: Take exactly these, or none.
        public_ip: Whether workers are to have a public address; ``None``: if there are subnets in
            which that helps.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
        ConfigError: If there is nothing that works: it says what would.
    """
    if subnets:
        found = await look_at_subnets(clients, ids=subnets)
        vpcs = sorted({each.vpc for each in found} | ({vpc} - {""}))
        if len(vpcs) != 1:
            raise ConfigError(f"all subnets must be in one VPC, but these are in {', '.join(vpcs)}")
        vpc = vpcs[0]
    else:
        is_default = not vpc
        vpc = vpc or await _default_vpc(clients)
        found = await look_at_subnets(clients, vpc=vpc, default=is_default)
        if not found:
            raise ConfigError(f"{vpc} has no subnets to run workers in: name them with --subnet")
    fit = [each for each in found if not each.unfit]
    with_public = [each for each in fit if each.reach == "public"]
    if public_ip is None:
        # Where nothing is known of the routes, as the template has it.
        public_ip = bool(with_public) or any(each.reach == "unknown" for each in fit)
    usable = [each for each in found if not each.problem(public_ip=public_ip)]
    private: list[Subnet] = []
    if public_ip and with_public and not subnets:
        private = [each for each in usable if each not in with_public]
        usable = with_public
    refused = [each for each in found if each.problem(public_ip=public_ip)]
    if not usable or (subnets and refused):
        raise ConfigError(_refusal(vpc, refused, public_ip=public_ip))
    chosen = _of_every_zone(usable)
    unused = [each for each in usable if each not in chosen]
    return Network(
        vpc=vpc,
        subnets=tuple(sorted(chosen, key=lambda each: (each.zone, each.id))),
        public_ip=public_ip,
        left_out=(
            *(f"{each}: {each.problem(public_ip=public_ip)}" for each in refused),
            *(f"{each}: workers have public addresses, of no use there" for each in private),
            *(f"{each}: {SUBNETS_LARGEST} subnets are the most, of all zones" for each in unused),
        ),
    )


async def _default_vpc(clients: AwsClients) -> str:
    answer = await clients.call(
        "ec2", "describe_vpcs", Filters=[{"Name": "is-default", "Values": ["true"]}]
    )
    if not answer["Vpcs"]:
        raise ConfigError(
            f"there is no default VPC in {clients.region}: name one with --vpc and, if not all "
            f"of its subnets are meant, --subnet; or make one with `aws ec2 create-default-vpc`"
        )
    return str(answer["Vpcs"][0]["VpcId"])


def _of_every_zone(subnets: Iterable[Subnet]) -> list[Subnet]:
    """Take as many as one environment may have, from each zone in turn, the emptiest first."""
    ordered = sorted(subnets, key=lambda each: (each.zone, -each.free, each.id))
    zones = [list(group) for _, group in itertools.groupby(ordered, key=lambda each: each.zone)]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*zones))
    return [each for each in turns if each is not None][:SUBNETS_LARGEST]


def _refusal(vpc: str, refused: Sequence[Subnet], *, public_ip: bool) -> str:
    reasons = "; ".join(f"{each}: {each.problem(public_ip=public_ip)}" for each in refused[:4])
    more = f"; and {len(refused) - 4} more" if len(refused) > 4 else ""
    remedies = []
    if any(each.reach == "public" and not each.unfit for each in refused) and not public_ip:
        remedies.append("give workers public addresses with --public-ip")
    if any(not each.unfit for each in refused):
        remedies.append("add a default route to a NAT gateway or an internet gateway")
        services = sorted({name for each in refused for name in each.missing})
        remedies.append(f"add VPC endpoints for {', '.join(services or (*_ENDPOINTS, 's3'))}")
    remedies.append("name other subnets with --subnet")
    return f"workers cannot start in {vpc}: {reasons}{more}. Either {', or '.join(remedies)}"


async def look_at_subnets(
    clients: AwsClients, *, vpc: str = "", ids: Sequence[str] = (), default: bool = False
) -> list[Subnet]:
    """Find out what subnets are, and where their routes lead.

    Args:
        clients: Where.
        vpc: Look at its subnets.
        ids: Look at these instead.
        default: Of a VPC, look at the default subnets alone.

    Raises:
        AwsError: If AWS refuses, or cannot be reached; that routes may not be looked at is no
            error.
    """
    filters: list[dict[str, Any]] = [{"Name": "state", "Values": ["available"]}]
    filters.append({"Name": "vpc-id", "Values": [vpc]})
    if default:
        filters.append({"Name": "default-for-az", "Values": ["true"]})
    wanted: dict[str, Any] = {"SubnetIds": list(ids)} if ids else {"Filters": filters}
    subnets = [each async for each in clients.pages("ec2", "describe_subnets", "Subnets", **wanted)]
    if not subnets:
        return []
    kinds = await _zone_kinds(clients)
    in_vpcs = [{"Name": "vpc-id", "Values": sorted({each["VpcId"] for each in subnets})}]
    tables: list[dict[str, Any]] | None
    endpoints: list[dict[str, Any]] = []
    try:
        pages = clients.pages("ec2", "describe_route_tables", "RouteTables", Filters=in_vpcs)
        tables = [each async for each in pages]
        if any(_default_route(_table_of(each, tables)) == "nothing" for each in subnets):
            pages = clients.pages("ec2", "describe_vpc_endpoints", "VpcEndpoints", Filters=in_vpcs)
            endpoints = [each async for each in pages]
    except AwsError as exc:
        if exc.code != "UnauthorizedOperation":
            raise
        tables = None
    return [_subnet(clients.region, each, kinds, tables, endpoints) for each in subnets]


async def _zone_kinds(clients: AwsClients) -> dict[str, str]:
    """Return the kinds of zones by name, as far as they may be looked at."""
    try:
        answer = await clients.call("ec2", "describe_availability_zones")
    except AwsError as exc:
        if exc.code != "UnauthorizedOperation":
            raise
        return {}
    return {each["ZoneName"]: each.get("ZoneType", "") for each in answer["AvailabilityZones"]}


def _subnet(
    region: str,
    found: Mapping[str, Any],
    kinds: Mapping[str, str],
    tables: Sequence[Mapping[str, Any]] | None,
    endpoints: Sequence[Mapping[str, Any]],
) -> Subnet:
    zone, zone_id = found.get("AvailabilityZone", ""), found.get("AvailabilityZoneId", "")
    kind = kinds.get(zone, "availability-zone")
    allowed = _FARGATE_ZONES.get(region)
    unfit = ""
    if found.get("OutpostArn"):
        unfit = "it is on an Outpost, where there is no Fargate"
    elif kind != "availability-zone":
        unfit = f"it is in a {kind.replace('-', ' ')}, where there is no Fargate"
    elif allowed and zone_id and zone_id not in allowed:
        unfit = f"its zone, {zone_id}, has no Fargate"
    elif found.get("Ipv6Native"):
        unfit = "it has IPv6 alone, and workers need IPv4"
    reach: Reach = "unknown"
    missing: tuple[str, ...] = ()
    if tables is not None:
        table = _table_of(found, tables)
        reach = _default_route(table)
        if reach == "nothing" and not (missing := _missing_endpoints(found, table, endpoints)):
            reach = "endpoints"
    return Subnet(
        id=found["SubnetId"],
        vpc=found["VpcId"],
        zone=zone,
        free=int(found.get("AvailableIpAddressCount", 0)),
        reach=reach,
        missing=missing,
        maps_public=bool(found.get("MapPublicIpOnLaunch")),
        unfit=unfit,
    )


def _table_of(
    subnet: Mapping[str, Any], tables: Sequence[Mapping[str, Any]]
) -> Mapping[str, Any] | None:
    """Return the route table that a subnet is associated with, or else its VPC's main one."""
    main = None
    for table in tables:
        for each in table.get("Associations", ()):
            if each.get("SubnetId") == subnet["SubnetId"]:
                return table
            if each.get("Main") and table.get("VpcId") == subnet["VpcId"]:
                main = table
    return main


def _default_route(table: Mapping[str, Any] | None) -> Reach:
    for route in (table or {}).get("Routes", ()):
        # The target of a route that is a black hole is gone.
        if route.get("DestinationCidrBlock") != "0.0.0.0/0" or route.get("State") == "blackhole":
            continue
        gateway = route.get("GatewayId", "")
        if gateway.startswith("igw-"):
            return "public"
        # "vgw-": to another network by VPN; "vpce-": to a firewall.
        if gateway.startswith(("vgw-", "vpce-")) or any(route.get(name) for name in _WAYS_OUT):
            return "routed"
    return "nothing"


def _missing_endpoints(
    subnet: Mapping[str, Any],
    table: Mapping[str, Any] | None,
    endpoints: Sequence[Mapping[str, Any]],
) -> tuple[str, ...]:
    reached = set()
    for each in endpoints:
        if each.get("VpcId") != subnet["VpcId"] or each.get("State", "").lower() != "available":
            continue
        kind = each.get("VpcEndpointType", "Interface")
        if kind == "Gateway":
            is_here = (table or {}).get("RouteTableId") in each.get("RouteTableIds", ())
        else:
            # Workers ask for the usual names.
            is_here = bool(each.get("PrivateDnsEnabled"))
        if is_here:
            reached.add(each["ServiceName"])
    return tuple(
        service
        for service in (*_ENDPOINTS, "s3")
        if not any(name.endswith(f".{service}") for name in reached)
    )
