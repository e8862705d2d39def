"""Which address of this machine workers in AWS can reach."""

from __future__ import annotations

import asyncio
import http.client
import ipaddress
import os
import re
import socket
import urllib.parse
from dataclasses import dataclass

from cloudexec._aws.profile import Profile
from cloudexec._errors import ConfigError

__all__ = ["Advertised", "advertised_address"]

_ADDRESS = re.compile(
    r"(?P<host>[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(:(?P<port>\d{1,5}))?"
)
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_METADATA_HOST = "169.254.169.254"
_METADATA_TIMEOUT = 1.0
_VENDOR_FILE = "/sys/class/dmi/id/sys_vendor"
_SOMEWHERE = ("198.51.100.1", 9)
"""An address for documentation (RFC 5737): a UDP socket connected to it sends nothing, and tells
which of this machine's addresses leads out."""


@dataclass(frozen=True, slots=True)
class Advertised:
    """An address, and where it comes from.

    Attributes:
        address: Host, or ``host:port``.
        how: For people: why this one.
        listen: Host to listen on, unless the user says otherwise.
        port: Port to listen on, likewise; 0: any free one.
    """

    address: str
    how: str
    listen: str = "0.0.0.0"
    port: int = 0


async def advertised_address(
    profile: Profile | None = None, *, advertise: str = "", endpoint: str = ""
) -> Advertised:
    """Find the address that workers dial.

    In this order: what is given; ``CLOUDEXEC_ADVERTISE``; the profile's; loopback, where the AWS
    endpoint is on this machine and so are its workers; the private address of an EC2 instance or
    ECS task in the workers' own VPC; a public address.

    Args:
        profile: Says in which VPC the workers are.
        advertise: What the user wants.
        endpoint: AWS endpoint in use, if not AWS itself.

    Raises:
        ConfigError: If workers cannot reach this machine, saying what to do.
    """
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
    found = await asyncio.to_thread(_look_around, profile.vpc if profile is not None else "")
    if found is not None:
        return found
    own = _outward_address()
    raise ConfigError(
        f"workers in AWS cannot reach this machine at {own or 'any address'}: it is in a private "
        f"network of its own. Run this program in the workers' VPC (an EC2 instance, SageMaker, "
        f"Cloud9, an ECS task); or forward a port of a public address here and give "
        f"advertise='HOST:PORT' (and listen='0.0.0.0:PORT' where it is another one here); or, "
        f"where a VPN or Direct Connect leads here, advertise={own or 'ADDRESS'!r}"
    )


def _named(address: str, how: str) -> Advertised:
    """Take an address that somebody has named.

    A port in it is listened on here too: who forwards another one says so with ``listen=``.

    Raises:
        ConfigError: If nobody can dial it, before workers are paid for trying.
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
            f"to listen on all of this one's is what listen= is for"
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
    """Whether it can be a name; one whose last part is a number is an address, or nothing."""
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


def _look_around(vpc: str) -> Advertised | None:
    task = os.environ.get("ECS_CONTAINER_METADATA_URI_V4", "")
    own = _outward_address()
    if task and own:
        return Advertised(own, "this is a task of Amazon ECS: its address in the VPC")
    if _is_ec2_instance():
        found = _instance_address(vpc)
        if found is not None:
            return found
    if own and ipaddress.ip_address(own).is_global:
        return Advertised(own, "this machine's public address")
    return None


def _is_ec2_instance() -> bool:
    try:
        with open(_VENDOR_FILE) as file:
            return "amazon" in file.read().lower()
    except OSError:
        return False


def _instance_address(vpc: str) -> Advertised | None:
    """Ask the instance metadata service, version 2, where this instance is."""
    connection = http.client.HTTPConnection(_METADATA_HOST, timeout=_METADATA_TIMEOUT)

    def ask(method: str, path: str, headers: dict[str, str]) -> str:
        connection.request(method, f"/latest/{path}", headers=headers)
        response = connection.getresponse()
        text = response.read().decode()
        return text if response.status == 200 else ""

    try:
        token = ask("PUT", "api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"})
        headers = {"X-aws-ec2-metadata-token": token}
        mac = ask("GET", "meta-data/mac", headers)
        here = ask("GET", f"meta-data/network/interfaces/macs/{mac}/vpc-id", headers)
        private = ask("GET", "meta-data/local-ipv4", headers)
        public = ask("GET", "meta-data/public-ipv4", headers)
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()
    if private and (not vpc or here == vpc):
        return Advertised(private, f"this instance's address in {here}")
    if public:
        return Advertised(public, f"this instance's public address: it is in {here}, not in {vpc}")
    return None
