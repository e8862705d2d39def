"""Chooses subnets in which workers can run, by their routes and their zones.

A worker must reach Amazon ECR for its image, CloudWatch Logs, and AWS Secrets Manager for its key.
The route table of its subnet decides whether it can, not the subnet's own settings.
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
"""Most subnets of one compute environment. AWS Batch API Reference, "ComputeResource"."""

_FARGATE_ZONES: Mapping[str, tuple[str, ...]] = {
    "us-west-1": ("usw1-az1", "usw1-az3"),
    "ap-northeast-1": ("apne1-az1", "apne1-az2", "apne1-az4"),
}
"""Zones with Fargate, for regions that also have zones without. Amazon ECS Developer Guide,
"Supported Regions for Amazon ECS on AWS Fargate"."""
_ENDPOINTS = ("ecr.api", "ecr.dkr", "logs", "secretsmanager")
"""Services that need an endpoint if a task cannot reach the internet, besides the gateway endpoint
of Amazon S3, which stores the layers of images. Amazon ECS Developer Guide, "Fargate platform
versions"."""
_WAYS_OUT = (
    "NatGatewayId",
    "TransitGatewayId",
    "InstanceId",
    "NetworkInterfaceId",
    "CoreNetworkArn",
)
"""Targets of a default route that lead a private subnet to the internet. Amazon EC2 API Reference,
"Route"."""

Reach = Literal["public", "routed", "endpoints", "nothing", "unknown"]
"""Target of a subnet's default route: an internet gateway ("public") or something else that leads
out ("routed"). Without one, the VPC has the endpoints that workers need, or not ("nothing"). If AWS
forbids to look at routes, it is "unknown"."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Subnet:
    """A subnet, with the facts that matter to workers."""

    id: str
    vpc: str
    zone: str
    """Name of the availability zone."""
    free: int
    """Number of free addresses. Each Fargate worker takes one."""
    reach: Reach
    missing: tuple[str, ...] = ()
    """Services for which an endpoint is missing, if the subnet has no default route."""
    maps_public: bool = False
    """Whether instances in the subnet get a public address."""
    unfit: str = ""
    """Why no worker can run in the subnet, whatever its routes are; empty if one can."""

    def problem(self, *, public_ip: bool) -> str:
        """Say why workers cannot start in the subnet; empty if they can.

        Args:
            public_ip: Whether workers get a public address.
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
    """The subnets in which workers run."""

    vpc: str
    subnets: tuple[Subnet, ...]
    public_ip: bool
    """Whether Fargate workers get a public address."""
    left_out: tuple[str, ...] = ()
    """Subnets that are not used, each with the reason, for people."""


async def choose_network(
    clients: AwsClients,
    *,
    vpc: str = "",
    subnets: Sequence[str] = (),
    public_ip: bool | None = None,
) -> Network:
    """Choose subnets in which workers can start.

    Args:
        clients: Calls to AWS.
        vpc: Choose among its subnets; empty: among the default subnets of the default VPC.
        subnets: Take exactly these, or fail.
        public_ip: Whether workers get a public address; ``None``: they do if there are subnets
            with an internet gateway.

    Raises:
        AwsError: If AWS refuses, or cannot be reached.
        ConfigError: If no subnet will do. The message says what to change.
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
        # If the routes are not known, workers get public addresses, as is the template's default.
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
            *(f"{each}: workers have public addresses, which need a gateway" for each in private),
            *(f"{each}: not needed, as {SUBNETS_LARGEST} subnets are the most" for each in unused),
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
    """Take as many subnets as an environment may have, from each zone in turn, emptiest first."""
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
    """Look up subnets and the targets of their routes.

    Args:
        clients: Calls to AWS.
        vpc: Look at the subnets of this VPC.
        ids: Look at these subnets instead.
        default: Look only at the default subnets of the VPC.

    Raises:
        AwsError: If AWS refuses, or cannot be reached. If it only forbids to look at the routes,
            their targets are "unknown".
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
    """Return the kinds of zones by name, or nothing if AWS forbids to look at them."""
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
    """Return the route table of a subnet: its own one, or else the main one of its VPC."""
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
        # A route whose target is gone is a black hole.
        if route.get("DestinationCidrBlock") != "0.0.0.0/0" or route.get("State") == "blackhole":
            continue
        gateway = route.get("GatewayId", "")
        if gateway.startswith("igw-"):
            return "public"
        # "vgw-" leads to another network by VPN, "vpce-" to a firewall.
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
            # Workers use the services' usual names, so the endpoint must answer to these.
            is_here = bool(each.get("PrivateDnsEnabled"))
        if is_here:
            reached.add(each["ServiceName"])
    return tuple(
        service
        for service in (*_ENDPOINTS, "s3")
        if not any(name.endswith(f".{service}") for name in reached)
    )
