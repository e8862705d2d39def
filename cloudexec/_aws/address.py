"""Finds the address at which workers in AWS can reach this machine."""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import os
import re
import socket
import urllib.parse
from dataclasses import dataclass, replace

from cloudexec._aws.instance_metadata import InstanceMetadata
from cloudexec._aws.profile import Profile
from cloudexec._errors import ConfigError

__all__ = ["Advertised", "advertised_address", "vpcs_of_this_machine"]

_ADDRESS = re.compile(
    r"(?P<host>[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:(?P<port>\d{1,5}))?"
)
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_VENDOR_FILE = "/sys/class/dmi/id/sys_vendor"
_SAGEMAKER_FILE = "/opt/ml/metadata/resource-metadata.json"
"""File in which SageMaker describes a notebook or an app. Apps of Studio have no other metadata."""
_SOMEWHERE = ("198.51.100.1", 9)
"""An address for documentation (RFC 5737). A UDP socket that is connected to it sends nothing, but
shows from which address this machine reaches other networks."""


@dataclass(frozen=True, slots=True)
class Advertised:
    """An address for workers to dial, and the reason for choosing it.

    Attributes:
        address: Host, or ``host:port``.
        how: Reason for choosing this address, for people.
        listen: Host to listen on, unless the user gives one.
        port: Port to listen on, unless the user gives one; 0: any free port.
    """

    address: str
    how: str
    listen: str = "0.0.0.0"
    port: int = 0


async def advertised_address(
    profile: Profile | None = None, *, advertise: str = "", endpoint: str = ""
) -> Advertised:
    """Find the address that workers dial, and the address to listen on.

    Workers dial the first of these: ``advertise``; ``CLOUDEXEC_ADVERTISE``; the profile's address;
    loopback, if AWS and so its workers are emulated on this machine; the address of an ECS task;
    the address of an EC2 instance's interface in the workers' own VPC; a public address.
    ``CLOUDEXEC_LISTEN`` gives the address to listen on, if the dialed port is forwarded to it.

    Args:
        profile: Its VPC is the workers' VPC.
        advertise: The address that the user gives.
        endpoint: AWS endpoint in use, if not AWS itself.

    Raises:
        ConfigError: If workers cannot reach this machine. The message says what to do.
    """
    found = await _advertised_address(profile, advertise, endpoint)
    listen = os.environ.get("CLOUDEXEC_LISTEN", "")
    if not listen:
        return found
    host, _, port = listen.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(
            f"CLOUDEXEC_LISTEN must be 'host:port', such as '0.0.0.0:5000', not {listen!r}"
        )
    return replace(found, listen=host, port=int(port))


async def _advertised_address(profile: Profile | None, advertise: str, endpoint: str) -> Advertised:
    named = os.environ.get("CLOUDEXEC_ADVERTISE", "")
    if advertise:
        return _named(advertise, "given as advertise=")
    if named:
        return _named(named, "from CLOUDEXEC_ADVERTISE")
    if profile is not None and profile.advertise:
        return _named(profile.advertise, f"from the profile {profile.name!r}")
    host = urllib.parse.urlsplit(endpoint).hostname or ""
    if host == "localhost" or (host and _is_loopback(host)):
        return Advertised(
            "127.0.0.1", "AWS is emulated on this machine, and so are its workers", "127.0.0.1"
        )
    return await asyncio.to_thread(_look_around, profile.vpc if profile is not None else "")


def _named(address: str, how: str) -> Advertised:
    """Check an address that the user has given.

    Its port is also the port to listen on here. If the port is forwarded to another one, the user
    gives the other one with ``listen=`` or ``CLOUDEXEC_LISTEN``.

    Raises:
        ConfigError: If no worker can dial the address. It is raised before any worker costs money.
    """
    found = _ADDRESS.fullmatch(address)
    port = int(found["port"] or 0) if found is not None else 0
    if found is None or (found["port"] and not 0 < port < 65536):
        raise ConfigError(
            f"workers cannot dial {address!r} ({how}): it must be a host or 'host:port'"
        )
    host = found["host"]
    literal = _literal(host)
    if literal is None and (host[0] == "[" or not _is_name(host)):
        kind = "IPv6 address" if host[0] == "[" else "IPv4 address or name of a host"
        raise ConfigError(f"workers cannot dial {address!r} ({how}): {host} is no {kind}")
    if literal is not None and (literal.is_unspecified or literal.is_multicast):
        raise ConfigError(
            f"workers cannot dial {address!r} ({how}): {host} is not the address of one machine; "
            f"to listen on all addresses of this machine, use listen="
        )
    version6 = literal is not None and literal.version == 6
    if _is_loopback(host):
        listen = "[::1]" if version6 else "127.0.0.1"
    else:
        listen = "[::]" if version6 else "0.0.0.0"
    return Advertised(address, how, listen, port)


def _literal(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def _is_name(host: str) -> bool:
    """Return whether it can be a name. If its last part is a number, it can only be an address."""
    labels = host.split(".")
    return not labels[-1].isdecimal() and all(_LABEL.fullmatch(each) for each in labels)


def _is_loopback(host: str) -> bool:
    literal = _literal(host)
    return host == "localhost" if literal is None else literal.is_loopback


def _outward_address() -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(_SOMEWHERE)
        except OSError:
            return ""
        return str(probe.getsockname()[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Interface:
    """A network interface of this instance, as the metadata service describes it."""

    vpc: str
    private: str
    public: str


async def vpcs_of_this_machine() -> tuple[str, ...]:
    """Return the VPCs of this EC2 instance. The result is empty on other machines."""
    interfaces = await asyncio.to_thread(_interfaces) if _is_ec2_instance() else []
    return tuple(dict.fromkeys(each.vpc for each in interfaces if each.vpc))


def _look_around(vpc: str) -> Advertised:
    """Find an address of this machine that workers in a VPC can reach.

    Raises:
        ConfigError: If there is no such address.
    """
    task = os.environ.get("ECS_CONTAINER_METADATA_URI_V4", "")
    own = _outward_address()
    if task and own:
        return Advertised(own, "this is a task of Amazon ECS: its address in the VPC")
    interfaces = _interfaces() if _is_ec2_instance() else []
    for each in interfaces:
        if each.private and (not vpc or each.vpc == vpc):
            return Advertised(each.private, f"this instance's address in {each.vpc}")
    elsewhere = ", ".join(dict.fromkeys(each.vpc for each in interfaces if each.vpc))
    for each in interfaces:
        if each.public:
            how = f"this instance's public address: it is in {elsewhere}, not in {vpc}"
            return Advertised(each.public, how)
    if own and ipaddress.ip_address(own).is_global:
        return Advertised(own, "this machine's public address")
    if elsewhere:
        raise ConfigError(
            f"workers in AWS cannot reach this instance: it is in {elsewhere}, the workers are in "
            f"{vpc}. Run this program in {vpc}, or set workers up here with `cloudexec up --vpc`; "
            f"where the two VPCs are peered, give advertise={interfaces[0].private!r}"
        )
    raise ConfigError(
        f"workers in AWS cannot reach this machine at {own or 'any address'}: it is in a private "
        f"network of its own. {_ways_out(own)}"
    )


def _ways_out(own: str) -> str:
    if os.path.exists(_SAGEMAKER_FILE):
        return (
            "In SageMaker Studio, the domain must have the network access type VpcOnly and be in "
            "the workers' VPC: then give the address that the app has there as advertise='ADDRESS'"
        )
    return (
        f"Run this program in the workers' VPC (an EC2 instance, a SageMaker notebook instance, an "
        f"ECS task); or let workers connect through a relay with Batch(relay='auto'), for about "
        f"$0.02 an hour; or forward a port of a public address to this machine and give "
        f"advertise='HOST:PORT' (and listen='0.0.0.0:PORT' if the port here is another one; "
        f"CLOUDEXEC_ADVERTISE and CLOUDEXEC_LISTEN do the same); or, if a VPN or Direct "
        f"Connect connects the VPC to this network, give advertise={own or 'ADDRESS'!r}"
    )


def _is_ec2_instance() -> bool:
    if os.environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true":
        return False
    if os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT"):
        return True
    try:
        with open(_VENDOR_FILE) as file:
            return "amazon" in file.read().lower()
    except OSError:
        return False


def _interfaces() -> list[_Interface]:
    """Ask the instance metadata service, version 2, for all interfaces, the primary one first.

    A SageMaker notebook instance with direct internet access has its primary interface in
    SageMaker's VPC, and another one in its owner's. Amazon EC2 User Guide, "Instance metadata
    categories".
    """
    found: list[tuple[int, _Interface]] = []
    try:
        with InstanceMetadata() as metadata:
            macs = "network/interfaces/macs"
            for line in metadata.get(f"{macs}/").split():
                base = f"{macs}/{line.strip('/')}"
                number, vpc, private, public = (
                    metadata.get(f"{base}/{name}")
                    for name in ("device-number", "vpc-id", "local-ipv4s", "public-ipv4s")
                )
                addresses = [(each.split() or [""])[0] for each in (private, public)]
                interface = _Interface(vpc=vpc, private=addresses[0], public=addresses[1])
                found.append((int(number or 0), interface))
    except (OSError, ValueError, http.client.HTTPException):
        return []
    return [each for _, each in sorted(found, key=lambda pair: pair[0])]
