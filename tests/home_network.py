"""A home behind NAT: a laptop and its router, each a network namespace of this machine."""

from __future__ import annotations

import os
import random
import shutil
import subprocess

import pytest

__all__ = ["Home", "needs_namespaces", "run"]

needs_namespaces = pytest.mark.skipif(
    not hasattr(os, "geteuid")
    or os.geteuid() != 0
    or None in map(shutil.which, ("ip", "iptables", "nsenter")),
    reason="network namespaces need root, iproute2 and iptables",
)


def run(*command: str) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (command, done.stderr)


class Home:
    """A laptop and its router.

    Names and addresses have a number in them that no other run of tests has at the moment.

    Attributes:
        laptop: The laptop's namespace.
        router: That of the router, which has an address in the internet, and hides the laptop.
        cable: This machine's device that leads to the router.
        internet: This machine's address, as the router sees it.
        second: Another one, for tests that need two.
        outside: The router's address in the internet.
        inner: The laptop's address at home.
    """

    def __init__(self) -> None:
        number = _free_number()
        self.laptop, self.router = f"celaptop{number}", f"cerouter{number}"
        self.cable = f"cewan{number}"
        self.internet, self.outside, self.second = (f"10.217.{number}.{last}" for last in (1, 2, 3))
        self.inner = f"10.218.{number}.2"
        self._home = f"10.218.{number}.0/24"
        try:
            self._build(f"cepeer{number}", f"10.218.{number}.1")
        except BaseException:
            self.close()
            raise

    def _build(self, peer: str, gateway: str) -> None:
        for name in (self.laptop, self.router):
            run("ip", "netns", "add", name)
        run("ip", "link", "set", peer, "netns", self.router, "name", "wan")
        to_laptop = f"add lan type veth peer name eth0 netns {self.laptop}"
        run("ip", "-n", self.router, "link", *to_laptop.split())
        run("ip", "address", "add", f"{self.internet}/24", "dev", self.cable)
        # Nothing in the internet has a route to an address at home.
        run("ip", "route", "add", "unreachable", self._home)
        run("ip", "link", "set", self.cable, "up")
        for name, device, address in (
            (self.router, "wan", self.outside),
            (self.router, "lan", gateway),
            (self.laptop, "eth0", self.inner),
        ):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", device)
            run("ip", "-n", name, "link", "set", device, "up")
        for name in (self.laptop, self.router):
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "-n", self.laptop, "route", "add", "default", "via", gateway)
        self.within(self.router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.firewall("-t", "nat", "-A", "POSTROUTING", "-o", "wan", "-j", "MASQUERADE")

    def within(self, name: str, *command: str) -> None:
        """Run a command in a namespace."""
        run("ip", "netns", "exec", name, *command)

    def firewall(self, *rule: str) -> None:
        """Give the router a rule."""
        self.within(self.router, "iptables", "-w", *rule)

    def only_through(self, port: int) -> None:
        """Let the laptop reach nothing outside but one port: that of a proxy."""
        for rule in (
            "-A FORWARD -i wan -o lan -m conntrack --ctstate ESTABLISHED -j ACCEPT",
            f"-A FORWARD -i lan -p tcp -d {self.internet} --dport {port} -j ACCEPT",
            "-A FORWARD -j REJECT",
        ):
            self.firewall(*rule.split())

    def leads_through(self, device: str) -> None:
        """Let the laptop and the router reach each other through another device of both."""
        for name in (self.laptop, self.router):
            run("ip", "-n", name, "link", "set", device, "up")
        run("ip", "-n", self.laptop, "route", "replace", "default", "dev", device)
        run("ip", "-n", self.router, "route", "add", self.inner, "dev", device)

    def close(self) -> None:
        """Remove all of it; the device comes last, as it keeps the number."""
        for command in (
            f"ip route delete unreachable {self._home}",
            f"ip netns delete {self.laptop}",
            f"ip netns delete {self.router}",
            f"ip link delete {self.cable}",
        ):
            # The device goes with the router's namespace, which has its other end.
            subprocess.run(command.split(), capture_output=True, check=False)


def _free_number() -> int:
    """Take a number by making a pair of devices that has it in its names."""
    for number in random.sample(range(1, 255), 254):
        pair = f"add cewan{number} type veth peer name cepeer{number}"
        made = subprocess.run(["ip", "link", *pair.split()], capture_output=True, check=False)
        if made.returncode == 0:
            return number
    raise OSError(f"no pair of network devices can be made: {made.stderr.decode()}")
