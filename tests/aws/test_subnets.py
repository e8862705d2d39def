"""In which subnets workers can run: what their routes reach, and where they lie."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from cloudexec import ConfigError
from cloudexec._aws.clients import AwsClients
from cloudexec._aws.network import Network, _default_route, choose_network
from cloudexec.testing import FakeAWS

ZONES = {
    "us-west-1c": ("usw1-az2", "availability-zone"),
    "us-west-1-lax-1a": ("usw1-lax1-az1", "local-zone"),
    "us-west-1-wl1-las-wlz-1": ("usw1-wl1-las-wlz1", "wavelength-zone"),
    # More zones with Fargate than the region really has, to have some to choose from.
    "us-west-1x": ("usw1-az1", "availability-zone"),
    "us-west-1y": ("usw1-az3", "availability-zone"),
}
"""Northern California, one of whose zones has no Fargate."""


@pytest.fixture(scope="module")
def aws() -> Iterator[FakeAWS]:
    """AWS with zones of all kinds, shared: each test makes a VPC of its own."""
    with FakeAWS(region="us-west-1", zones=ZONES) as fake:
        yield fake


@pytest.fixture(scope="module")
def ec2(aws: FakeAWS) -> Iterator[Any]:
    """One client: another takes as long as a test."""
    client = boto3.client("ec2")
    yield client
    client.close()


class Vpc:
    """A new VPC with ways out."""

    numbers = itertools.count()

    def __init__(self, ec2: Any) -> None:
        self.ec2 = ec2
        self.octet = next(Vpc.numbers)
        self.id = self.ec2.create_vpc(CidrBlock=f"10.{self.octet}.0.0/16")["Vpc"]["VpcId"]
        self.subnets = 0
        self._gateway = ""

    @property
    def gateway(self) -> str:
        if not self._gateway:
            made = self.ec2.create_internet_gateway()["InternetGateway"]
            self._gateway = made["InternetGatewayId"]
            self.ec2.attach_internet_gateway(InternetGatewayId=self._gateway, VpcId=self.id)
        return self._gateway

    def subnet(self, zone: str = "us-west-1a", *, route: dict[str, str] | None = None) -> str:
        """Make a subnet; with a default route, it gets a route table of its own."""
        block = f"10.{self.octet}.{self.subnets}.0/24"
        self.subnets += 1
        made = self.ec2.create_subnet(VpcId=self.id, CidrBlock=block, AvailabilityZone=zone)
        name: str = made["Subnet"]["SubnetId"]
        if route is not None:
            table = self.ec2.create_route_table(VpcId=self.id)["RouteTable"]["RouteTableId"]
            self.ec2.create_route(RouteTableId=table, DestinationCidrBlock="0.0.0.0/0", **route)
            self.ec2.associate_route_table(RouteTableId=table, SubnetId=name)
        return name

    def public(self, zone: str = "us-west-1a") -> str:
        return self.subnet(zone, route={"GatewayId": self.gateway})

    def private(self, zone: str = "us-west-1a") -> str:
        """A subnet whose default route is a NAT gateway."""
        address = self.ec2.allocate_address(Domain="vpc")["AllocationId"]
        nat = self.ec2.create_nat_gateway(SubnetId=self.public(), AllocationId=address)
        return self.subnet(zone, route={"NatGatewayId": nat["NatGateway"]["NatGatewayId"]})

    def main_route(self) -> None:
        """Let what has no route table of its own lead to the internet."""
        self.ec2.create_route(
            RouteTableId=self.main_table(),
            DestinationCidrBlock="0.0.0.0/0",
            GatewayId=self.gateway,
        )

    def main_table(self) -> str:
        filters = [
            {"Name": "vpc-id", "Values": [self.id]},
            {"Name": "association.main", "Values": ["true"]},
        ]
        tables = self.ec2.describe_route_tables(Filters=filters)["RouteTables"]
        return str(tables[0]["RouteTableId"])


@pytest.fixture
def vpc(ec2: Any) -> Vpc:
    return Vpc(ec2)


def _choose(**options: Any) -> Network:
    async def main() -> Network:
        async with AwsClients() as clients:
            return await choose_network(clients, **options)

    return asyncio.run(main())


def _ids(network: Network) -> set[str]:
    return {each.id for each in network.subnets}


def test_the_default_vpc_is_public(aws: FakeAWS) -> None:
    """As AWS makes it: an internet gateway, and a main route table that leads there."""
    network = _choose()
    assert network.public_ip
    assert {each.reach for each in network.subnets} == {"public"}
    assert {each.zone for each in network.subnets} == {"us-west-1a", "us-west-1b"}


def test_a_subnet_is_public_by_its_route(vpc: Vpc) -> None:
    """Its own setting, which is off in subnets made by the API, says nothing of that."""
    public, _ = vpc.public(), vpc.private()
    network = _choose(vpc=vpc.id)
    assert public in _ids(network)
    assert {each.reach for each in network.subnets} == {"public"}
    assert not any(each.maps_public for each in network.subnets)
    assert network.public_ip


def test_a_setting_of_the_subnet_makes_nothing_public(vpc: Vpc) -> None:
    subnet = vpc.subnet()
    vpc.ec2.modify_subnet_attribute(SubnetId=subnet, MapPublicIpOnLaunch={"Value": True})
    with pytest.raises(ConfigError, match=r"no default route.*NAT gateway"):
        _choose(vpc=vpc.id)


def test_the_main_route_table_counts_where_none_is_associated(vpc: Vpc) -> None:
    subnet = vpc.subnet()
    vpc.main_route()
    assert _ids(_choose(vpc=vpc.id)) == {subnet}


def test_private_subnets_are_used_where_there_are_no_others(vpc: Vpc) -> None:
    """Through a NAT gateway; public addresses are of no use there."""
    private = vpc.private()
    assert _ids(_choose(vpc=vpc.id, public_ip=False)) == {private}
    network = _choose(subnets=[private])
    assert not network.public_ip


def test_public_subnets_are_of_no_use_without_public_addresses(vpc: Vpc) -> None:
    vpc.public()
    with pytest.raises(ConfigError, match=r"no use without a public address.*--public-ip"):
        _choose(vpc=vpc.id, public_ip=False)


def test_endpoints_stand_in_for_a_way_out(vpc: Vpc) -> None:
    """All that a worker needs; as long as one is missing, it is named."""
    subnet = vpc.subnet()
    for name in ("ecr.api", "ecr.dkr", "logs"):
        vpc.ec2.create_vpc_endpoint(
            VpcId=vpc.id,
            ServiceName=f"com.amazonaws.us-west-1.{name}",
            VpcEndpointType="Interface",
            SubnetIds=[subnet],
            PrivateDnsEnabled=True,
        )
    with pytest.raises(ConfigError, match="endpoint for secretsmanager, s3"):
        _choose(vpc=vpc.id)
    vpc.ec2.create_vpc_endpoint(
        VpcId=vpc.id,
        ServiceName="com.amazonaws.us-west-1.secretsmanager",
        VpcEndpointType="Interface",
        SubnetIds=[subnet],
        PrivateDnsEnabled=True,
    )
    vpc.ec2.create_vpc_endpoint(
        VpcId=vpc.id,
        ServiceName="com.amazonaws.us-west-1.s3",
        VpcEndpointType="Gateway",
        RouteTableIds=[vpc.main_table()],
    )
    network = _choose(vpc=vpc.id)
    assert _ids(network) == {subnet}
    assert not network.public_ip


def test_zones_without_fargate_are_left_out(vpc: Vpc) -> None:
    """Local Zones, Wavelength, and of this region one zone; each is said."""
    usable = vpc.public()
    others = [vpc.public(zone) for zone in list(ZONES)[:3]]
    network = _choose(vpc=vpc.id)
    assert _ids(network) == {usable}
    said = "; ".join(network.left_out)
    for subnet, words in zip(others, ("usw1-az2", "local zone", "wavelength zone"), strict=True):
        assert subnet in said
        assert words in said


def test_what_is_named_and_cannot_work_is_refused(vpc: Vpc) -> None:
    """Rather than left out: the user asked for it."""
    usable, unusable = vpc.public(), vpc.public("us-west-1-lax-1a")
    with pytest.raises(ConfigError, match=f"{unusable}.*local zone") as caught:
        _choose(subnets=[usable, unusable])
    assert usable not in str(caught.value)


def test_too_many_subnets_keep_every_zone(vpc: Vpc) -> None:
    """Sixteen are the most; the zone with one subnet keeps it."""
    vpc.main_route()
    rest = [vpc.subnet("us-west-1a") for _ in range(17)]
    alone = vpc.subnet("us-west-1y")
    network = _choose(vpc=vpc.id)
    assert len(network.subnets) == 16
    assert alone in _ids(network)
    assert len(network.left_out) == 2
    assert all("16 subnets are the most" in each for each in network.left_out)
    assert _ids(network) <= {*rest, alone}


def test_private_subnets_beside_public_ones_are_named_as_left_out(vpc: Vpc) -> None:
    private = vpc.private()  # and the public one that its NAT gateway is in
    network = _choose(vpc=vpc.id)
    assert network.public_ip
    assert private not in _ids(network)
    (said,) = network.left_out
    assert said.startswith(f"{private} (us-west-1a): workers have public addresses")


def test_a_route_whose_target_is_gone_leads_nowhere() -> None:
    """A black hole: the NAT gateway was deleted, the route was not."""
    route = {"DestinationCidrBlock": "0.0.0.0/0", "NatGatewayId": "nat-1", "State": "active"}
    assert _default_route({"Routes": [route]}) == "routed"
    assert _default_route({"Routes": [{**route, "State": "blackhole"}]}) == "nothing"


def test_routes_that_may_not_be_looked_at_stop_nothing(vpc: Vpc, aws: FakeAWS) -> None:
    """Then subnets are used as they are, with public addresses as the template has them."""
    subnet = vpc.subnet()
    aws.faults.deny("DescribeRouteTables", count=1)
    network = _choose(vpc=vpc.id)
    assert _ids(network) == {subnet}
    assert network.public_ip
    assert {each.reach for each in network.subnets} == {"unknown"}


def test_subnets_of_two_vpcs_are_refused(vpc: Vpc) -> None:
    other = Vpc(vpc.ec2)
    with pytest.raises(ConfigError, match="must be in one VPC"):
        _choose(subnets=[vpc.subnet(), other.subnet()])
