"""A client behind NAT, and behind proxies: network namespaces, with real programs in them."""

from __future__ import annotations

import os
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
INTERNET = "10.213.77.1"
"""This machine's address, as the client's router sees it."""
ROUTER = "10.213.77.2"
HOME, LAPTOP = "192.168.213.1", "192.168.213.2"
"""The router's and the client's addresses at home."""
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

    Attributes:
        laptop: The client's namespace.
        router: The one that has an address in the internet, and hides the laptop behind it.
    """

    laptop, router = "celaptop", "cerouter"

    def __init__(self) -> None:
        for name in (self.laptop, self.router):
            run("ip", "netns", "add", name)
        run(
            *[
                "ip",
                "link",
                "add",
                "cewan",
                "type",
                "veth",
                "peer",
                "name",
                "wan",
                "netns",
                "cerouter",
            ]
        )
        run(
            *[
                "ip",
                "-n",
                "cerouter",
                "link",
                "add",
                "lan",
                "type",
                "veth",
                "peer",
                "name",
                "eth0",
                "netns",
                "celaptop",
            ]
        )
        run("ip", "address", "add", f"{INTERNET}/24", "dev", "cewan")
        # Nothing in the internet has a route to an address at home.
        run("ip", "route", "add", "unreachable", "192.168.213.0/24")
        run("ip", "link", "set", "cewan", "up")
        for name, device, address in (
            (self.router, "wan", ROUTER),
            (self.router, "lan", HOME),
            (self.laptop, "eth0", LAPTOP),
        ):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", device)
            run("ip", "-n", name, "link", "set", device, "up")
        for name in (self.laptop, self.router):
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "-n", self.laptop, "route", "add", "default", "via", HOME)
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
            f"-A FORWARD -i lan -p tcp -d {INTERNET} --dport {port} -j ACCEPT",
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
        run("ip", "link", "delete", "cewan")
        run("ip", "route", "delete", "unreachable", "192.168.213.0/24")
        for name in (self.laptop, self.router):
            run("ip", "netns", "delete", name)


@pytest.fixture
def home() -> Iterator[Home]:
    made = Home()
    yield made
    made.close()


@pytest.fixture
def outside(home: Home) -> Iterator[RelayProcess]:
    """A relay in the internet, at the port that networks let through."""
    process = RelayProcess(f"{INTERNET}:443")
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
        for address in (ROUTER, LAPTOP):
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


def starts(command: list[str], port: int) -> subprocess.Popen[bytes]:
    """Start a server of the internet, and wait until it listens."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            socket.create_connection((INTERNET, port), 1).close()
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
        f"Port 8888\nListen {INTERNET}\nConnectPort 443\nMaxClients 50\n"
        + "BasicAuth laptop s3cret\n" * login
    )
    home.only_through(8888)
    proxy = starts(["tinyproxy", "-d", "-c", str(settings)], 8888)
    try:
        word = "laptop:s3cret@" * login
        url = f"http://{word}{INTERNET}:8888"
        assert home.client(script, outside.address, HTTPS_PROXY=url) == ANSWER
        # Without it there is no way.
        with pytest.raises(AssertionError, match=r"cannot reach the relay at .*443"):
            home.client(script, outside.address, CLOUDEXEC_TEST_REGISTER="3")
        if login:
            wrong = f"http://laptop:wrong@{INTERNET}:8888"
            with pytest.raises(AssertionError) as caught:
                home.client(script, outside.address, HTTPS_PROXY=wrong, CLOUDEXEC_TEST_REGISTER="3")
            said = str(caught.value)
            assert f"the proxy http://{INTERNET}:8888 does not connect to" in said
            assert "Unauthorized" in said
            assert "wrong@" not in said
    finally:
        proxy.kill()
        proxy.wait()


@pytest.mark.skipif(shutil.which("microsocks") is None, reason="microsocks is not installed")
def test_the_way_out_is_a_socks_proxy(home: Home, outside: RelayProcess, script: Path) -> None:
    home.only_through(1080)
    proxy = starts(["microsocks", "-i", INTERNET, "-p", "1080"], 1080)
    try:
        url = f"socks5h://{INTERNET}:1080"
        assert home.client(script, outside.address, ALL_PROXY=url) == ANSWER
    finally:
        proxy.kill()
        proxy.wait()
