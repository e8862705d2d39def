"""A client behind NAT, and behind proxies: network namespaces, with real programs in them."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from relay_helpers import PACKAGE, RelayProcess

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        not hasattr(os, "geteuid")
        or os.geteuid() != 0
        or None in map(shutil.which, ("ip", "iptables", "nsenter")),
        reason="network namespaces need root, iproute2 and iptables",
    ),
]
PATIENCE = 60.0

SCRIPT = """
import os, sys, time
from cloudexec import BatchExecutor
from relay_helpers import RelayLauncher

def task(x):
    return x + 1, len(os.listdir("/sys/class/net"))

if __name__ == "__main__":
    relay, pid = sys.argv[1:]
    if patience := os.environ.get("CLOUDEXEC_TEST_REGISTER"):
        from cloudexec._server import listener

        listener._REGISTER_TIMEOUT = float(patience)
    # The machine of the workers is the one outside.
    launcher = RelayLauncher(relay, prefix=["nsenter", "-t", pid, "-n"])
    executor = BatchExecutor(2, launcher=launcher)
    results = list(executor.map(task, range(2_000)))
    data = os.urandom(5 << 20)
    assert executor.submit(bytes, data).result() == data
    print(sum(x for x, _ in results), flush=True)
    executor.shutdown(wait=False)
    for worker in launcher.workers.values():
        worker.wait(30)
    launcher.end_all()
"""


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Home:
    """A laptop and its router, each a network namespace.

    Their names and addresses have a number that no other run has at the moment.

    Attributes:
        laptop: The client's namespace.
        router: The one that has an address in the internet, and hides the laptop behind it.
        internet: This machine's address, as the router sees it.
        outside: The router's address in the internet.
        inner: The client's address at home.
    """

    def __init__(self) -> None:
        self._number = number = _free_number()
        self.laptop, self.router = f"celaptop{number}", f"cerouter{number}"
        self._device = f"cewan{number}"
        self.internet, self.outside = f"10.217.{number}.1", f"10.217.{number}.2"
        self.inner = f"10.218.{number}.2"
        try:
            self._build(f"10.218.{number}.1")
        except BaseException:
            self.close()
            raise

    def _build(self, home: str) -> None:
        for name in (self.laptop, self.router):
            run("ip", "netns", "add", name)
        run("ip", "link", "set", f"cepeer{self._number}", "netns", self.router, "name", "wan")
        pair = f"add lan type veth peer name eth0 netns {self.laptop}"
        run("ip", "-n", self.router, "link", *pair.split())
        run("ip", "address", "add", f"{self.internet}/24", "dev", self._device)
        # Nothing in the internet has a route to an address at home.
        run("ip", "route", "add", "unreachable", f"10.218.{self._number}.0/24")
        run("ip", "link", "set", self._device, "up")
        for name, device, address in (
            (self.router, "wan", self.outside),
            (self.router, "lan", home),
            (self.laptop, "eth0", self.inner),
        ):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", device)
            run("ip", "-n", name, "link", "set", device, "up")
        for name in (self.laptop, self.router):
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "-n", self.laptop, "route", "add", "default", "via", home)
        self.inside(self.router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        self.firewall(*["-t", "nat", "-A", "POSTROUTING", "-o", "wan", "-j", "MASQUERADE"])

    def inside(self, name: str, *command: str) -> None:
        run("ip", "netns", "exec", name, *command)

    def firewall(self, *rule: str) -> None:
        """Give the router a rule."""
        self.inside(self.router, "iptables", "-w", *rule)

    def only_through(self, port: int) -> None:
        """Let the laptop reach nothing outside but one port: that of a proxy."""
        for rule in (
            "-A FORWARD -i wan -o lan -m conntrack --ctstate ESTABLISHED -j ACCEPT",
            f"-A FORWARD -i lan -p tcp -d {self.internet} --dport {port} -j ACCEPT",
            "-A FORWARD -j REJECT",
        ):
            self.firewall(*rule.split())

    def client(self, script: Path, relay: str, **environment: str) -> str:
        """Run a script on the laptop; return what it prints."""
        path = os.pathsep.join([PACKAGE, str(Path(__file__).parent)])
        pid = str(os.getpid())
        done = subprocess.run(
            [*("ip", "netns", "exec", self.laptop, sys.executable), str(script), relay, pid],
            env={**os.environ, "PYTHONPATH": path, **environment},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def close(self) -> None:
        """Remove all of it; the device comes last, as it keeps the number."""
        for command in (
            f"ip route delete unreachable 10.218.{self._number}.0/24",
            f"ip netns delete {self.laptop}",
            f"ip netns delete {self.router}",
            f"ip link delete {self._device}",
        ):
            # The device may be gone together with the router's namespace, which had its peer.
            subprocess.run(command.split(), check=False, capture_output=True)


def _free_number() -> int:
    """Take a number that no other run has, by making a pair of devices with it."""
    for number in random.sample(range(1, 255), 254):
        pair = f"add cewan{number} type veth peer name cepeer{number}"
        made = subprocess.run(["ip", "link", *pair.split()], check=False, capture_output=True)
        if made.returncode == 0:
            return number
    raise AssertionError(made.stderr.decode())


@pytest.fixture
def home() -> Iterator[Home]:
    made = Home()
    yield made
    made.close()


@pytest.fixture
def outside(home: Home) -> Iterator[RelayProcess]:
    """A relay in the internet, at the port that networks let through."""
    process = RelayProcess(f"{home.internet}:443")
    yield process
    process.kill()


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "client.py"
    path.write_text(SCRIPT)
    return path


ANSWER = f"{sum(range(1, 2_001))}\n"


def test_workers_reach_a_client_behind_nat(home: Home, outside: RelayProcess, script: Path) -> None:
    listening = subprocess.Popen(
        ["ip", "netns", "exec", home.laptop, sys.executable, "-m", "http.server", "8080"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for address in (home.outside, home.inner):
            with pytest.raises(OSError, match=r"refused|unreachable|No route"):
                socket.create_connection((address, 8080), 3)
    finally:
        listening.kill()
        listening.wait()
    assert home.client(script, outside.address) == ANSWER


def test_a_slow_network_that_loses_packets_loses_no_task(
    home: Home, outside: RelayProcess, script: Path
) -> None:
    netem = ["tc", "qdisc", "add", "dev", "wan", "root", "netem", "delay", "25ms", "loss", "1%"]
    if shutil.which("tc") is None:
        pytest.skip("tc is not installed")
    if subprocess.run(["ip", "netns", "exec", home.router, *netem], check=False).returncode:
        pytest.skip("this kernel has no netem")
    assert home.client(script, outside.address) == ANSWER


def starts(command: list[str], host: str, port: int) -> subprocess.Popen[bytes]:
    """Start a server of the internet, and wait until it listens."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((host, port), 1).close()
        except OSError:
            assert process.poll() is None, command
            assert time.monotonic() < deadline, command
            threading.Event().wait(0.05)
        else:
            return process


@pytest.mark.skipif(shutil.which("tinyproxy") is None, reason="tinyproxy is not installed")
@pytest.mark.parametrize("login", [True, False])
def test_the_way_out_is_an_http_proxy(
    home: Home, outside: RelayProcess, script: Path, tmp_path: Path, login: bool
) -> None:
    """One that does nothing but CONNECT to port 443, with a password and without."""
    settings = tmp_path / "tinyproxy.conf"
    settings.write_text(
        f"Port 8888\nListen {home.internet}\nConnectPort 443\nMaxClients 50\n"
        + "BasicAuth laptop s3cret\n" * login
    )
    home.only_through(8888)
    proxy = starts(["tinyproxy", "-d", "-c", str(settings)], home.internet, 8888)
    try:
        word = "laptop:s3cret@" * login
        url = f"http://{word}{home.internet}:8888"
        assert home.client(script, outside.address, HTTPS_PROXY=url) == ANSWER
        # Without it there is no way.
        with pytest.raises(AssertionError, match=r"cannot reach the relay at .*443"):
            home.client(script, outside.address, CLOUDEXEC_TEST_REGISTER="3")
        if login:
            wrong = f"http://laptop:wrong@{home.internet}:8888"
            with pytest.raises(AssertionError) as caught:
                home.client(script, outside.address, HTTPS_PROXY=wrong, CLOUDEXEC_TEST_REGISTER="3")
            said = str(caught.value)
            assert f"the proxy http://{home.internet}:8888 does not connect to" in said
            assert "Unauthorized" in said
            assert "wrong@" not in said
    finally:
        proxy.kill()
        proxy.wait()


@pytest.mark.skipif(shutil.which("microsocks") is None, reason="microsocks is not installed")
def test_the_way_out_is_a_socks_proxy(home: Home, outside: RelayProcess, script: Path) -> None:
    home.only_through(1080)
    proxy = starts(["microsocks", "-i", home.internet, "-p", "1080"], home.internet, 1080)
    try:
        url = f"socks5h://{home.internet}:1080"
        assert home.client(script, outside.address, ALL_PROXY=url) == ANSWER
    finally:
        proxy.kill()
        proxy.wait()
