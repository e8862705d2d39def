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
from home_network import Home, needs_namespaces
from relay_helpers import PACKAGE, RelayProcess
from slow_line import DEVICE, SlowLine

pytestmark = [
    pytest.mark.timeout(120),
    needs_namespaces,
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
    data = os.urandom(int(os.environ.get("CLOUDEXEC_TEST_BYTES", 5 << 20)))
    assert executor.submit(bytes, data).result() == data
    print(sum(x for x, _ in results), flush=True)
    executor.shutdown(wait=False)
    for worker in launcher.workers.values():
        worker.wait(30)
    launcher.end_all()
"""


def client(home: Home, script: Path, relay: str, **environment: str) -> str:
    """Run a script on the laptop; return what it prints."""
    path = os.pathsep.join([PACKAGE, str(Path(__file__).parent)])
    pid = str(os.getpid())
    done = subprocess.run(
        [*("ip", "netns", "exec", home.laptop, sys.executable), str(script), relay, pid],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


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
    assert client(home, script, outside.address) == ANSWER


@pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="there are no TUN devices")
def test_a_slow_network_that_loses_packets_loses_no_task(
    home: Home, outside: RelayProcess, script: Path
) -> None:
    """50 ms there and back, and each hundredth packet is lost."""
    with SlowLine(home.laptop, home.router, delay=0.025, loss=0.01) as line:
        home.leads_through(DEVICE)
        answer = client(home, script, outside.address, CLOUDEXEC_TEST_BYTES=str(1 << 20))
        packets = line.end()
    assert answer == ANSWER
    assert packets["lost"] > 5, packets


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
        assert client(home, script, outside.address, HTTPS_PROXY=url) == ANSWER
        # Without it there is no way.
        with pytest.raises(AssertionError, match=r"cannot reach the relay at .*443"):
            client(home, script, outside.address, CLOUDEXEC_TEST_REGISTER="3")
        if login:
            wrong = f"http://laptop:wrong@{home.internet}:8888"
            with pytest.raises(AssertionError) as caught:
                client(
                    home, script, outside.address, HTTPS_PROXY=wrong, CLOUDEXEC_TEST_REGISTER="3"
                )
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
        assert client(home, script, outside.address, ALL_PROXY=url) == ANSWER
    finally:
        proxy.kill()
        proxy.wait()
