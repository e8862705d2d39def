"""Which address workers are told to dial."""

from __future__ import annotations

import asyncio
import dataclasses
import re
from typing import Any

import pytest
from instance_metadata import on_instance

from cloudexec import ConfigError
from cloudexec._aws import address
from cloudexec._aws.address import advertised_address, vpcs_of_this_machine
from cloudexec._aws.profile import Profile

PROFILE = Profile(name="p", region="r", vpc="vpc-1", advertise="profile.example:99")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine's environment counts."""
    for name in (
        "CLOUDEXEC_ADVERTISE",
        "CLOUDEXEC_LISTEN",
        "ECS_CONTAINER_METADATA_URI_V4",
        "AWS_EC2_METADATA_SERVICE_ENDPOINT",
    ):
        monkeypatch.delenv(name, raising=False)


def find(*args: Any, **kwargs: Any) -> address.Advertised:
    return asyncio.run(advertised_address(*args, **kwargs))


def test_what_is_given_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the environment, then the profile."""
    monkeypatch.setenv("CLOUDEXEC_ADVERTISE", "10.1.2.3")
    assert find(PROFILE, advertise="given.example").address == "given.example"
    assert find(PROFILE).address == "10.1.2.3"
    monkeypatch.delenv("CLOUDEXEC_ADVERTISE")
    assert find(PROFILE).address == "profile.example:99"


def test_a_forwarded_port_is_described_by_two_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a script that nobody changes."""
    monkeypatch.setenv("CLOUDEXEC_ADVERTISE", "router.example:8443")
    monkeypatch.setenv("CLOUDEXEC_LISTEN", "0.0.0.0:5000")
    found = find(PROFILE)
    assert (found.address, found.listen, found.port) == ("router.example:8443", "0.0.0.0", 5000)


@pytest.mark.parametrize("value", ["5000", "0.0.0.0", "0.0.0.0:x", "0.0.0.0:70000", ":5000"])
def test_a_listen_variable_that_cannot_be_is_refused(
    monkeypatch: pytest.MonkeyPatch, value: str
) -> None:
    monkeypatch.setenv("CLOUDEXEC_LISTEN", value)
    with pytest.raises(ConfigError, match=re.escape(f"not {value!r}")):
        find(PROFILE)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_an_emulated_aws_has_its_workers_here(host: str) -> None:
    """Nobody else can connect then."""
    found = find(None, endpoint=f"http://{host}:5000")
    assert (found.address, found.listen) == ("127.0.0.1", "127.0.0.1")


def test_a_task_of_ecs_is_in_the_vpc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own address is what others there dial."""
    monkeypatch.setenv("ECS_CONTAINER_METADATA_URI_V4", "http://169.254.170.2/v4/x")
    monkeypatch.setattr(address, "_outward_address", lambda: "10.0.0.7")
    assert find(None).address == "10.0.0.7"


def test_a_public_address_is_reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has one of its own."""
    monkeypatch.setattr(address, "_is_ec2_instance", lambda: False)
    monkeypatch.setattr(address, "_outward_address", lambda: "8.8.4.4")
    assert find(None).address == "8.8.4.4"


@pytest.mark.parametrize("own", ["192.168.1.5", "10.0.0.3", ""])
def test_a_private_network_is_not(monkeypatch: pytest.MonkeyPatch, own: str) -> None:
    """The error says every way out, before anything is launched."""
    monkeypatch.setattr(address, "_is_ec2_instance", lambda: False)
    monkeypatch.setattr(address, "_outward_address", lambda: own)
    with pytest.raises(ConfigError, match=r"advertise='HOST:PORT'.*listen=") as caught:
        find(None)
    assert re.search("VPC", str(caught.value))


@pytest.mark.parametrize(
    "value",
    [
        *("127.0.0.1:", "http://127.0.0.1", " ", "a b", "host:0", "host:70000", "host:x", "-a"),
        *("256.1.1.1", "256.1.1.1:80", "1.2.3", "1.2.3.4.5", "123", "[12345::1]", "[:::]:5"),
        *("a..b", "a-.b", "x" * 64),
        *("0.0.0.0", "0.0.0.0:80", "[::]:80", "224.0.0.1"),
    ],
)
def test_what_nobody_can_dial_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before workers are paid for trying; the error says where it came from."""
    with pytest.raises(ConfigError, match="advertise="):
        find(None, advertise=value)
    monkeypatch.setenv("CLOUDEXEC_ADVERTISE", value)
    with pytest.raises(ConfigError, match="CLOUDEXEC_ADVERTISE"):
        find(None)


@pytest.mark.parametrize(
    "value", ["10.0.0.1", "host.example:99", "[fe80::1]", "[::1]:5", "a", "1a.b2", "x" * 63]
)
def test_what_can_be_dialed(value: str) -> None:
    """Hosts and addresses, with and without a port."""
    assert find(None, advertise=value).address == value


@pytest.mark.parametrize(
    ("value", "listen", "port"),
    [
        ("10.0.0.1", "0.0.0.0", 0),
        ("host.example:99", "0.0.0.0", 99),
        ("127.0.0.1:7", "127.0.0.1", 7),
        ("localhost", "127.0.0.1", 0),
        ("[2001:db8::1]:80", "[::]", 80),
        ("[::1]", "[::1]", 0),
    ],
)
def test_what_is_listened_on_is_what_is_dialed(value: str, listen: str, port: int) -> None:
    """The port that is named, in the family of the address; loopback for loopback alone."""
    found = find(None, advertise=value)
    assert (found.listen, found.port) == (listen, port)


def test_an_instance_in_the_workers_vpc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its private address, although it has a public one."""
    with on_instance(monkeypatch, ("vpc-1", "10.1.0.5", "8.8.4.4")):
        found = find(dataclasses.replace(PROFILE, advertise=""))
        assert (found.address, found.listen) == ("10.1.0.5", "0.0.0.0")
        assert asyncio.run(vpcs_of_this_machine()) == ("vpc-1",)


def test_any_interface_may_be_in_the_workers_vpc(monkeypatch: pytest.MonkeyPatch) -> None:
    """The primary one of a SageMaker notebook is in SageMaker's VPC, another in the owner's."""
    with on_instance(monkeypatch, ("vpc-s", "172.16.0.9", ""), ("vpc-1", "10.1.0.5", "")):
        found = find(dataclasses.replace(PROFILE, advertise=""))
        assert found.address == "10.1.0.5"
        assert "vpc-1" in found.how


def test_an_instance_in_another_vpc_with_a_public_address(monkeypatch: pytest.MonkeyPatch) -> None:
    with on_instance(monkeypatch, ("vpc-2", "10.2.0.5", "8.8.4.4")):
        found = find(dataclasses.replace(PROFILE, advertise=""))
        assert found.address == "8.8.4.4"
        assert "it is in vpc-2, not in vpc-1" in found.how


def test_an_instance_in_another_vpc_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody in the workers' VPC reaches its private address."""
    monkeypatch.setattr(address, "_outward_address", lambda: "10.2.0.5")
    with (
        on_instance(monkeypatch, ("vpc-2", "10.2.0.5", "")),
        pytest.raises(ConfigError, match=r"in vpc-2, the workers are in vpc-1.*up --vpc"),
    ):
        find(dataclasses.replace(PROFILE, advertise=""))
