"""Workers on a machine of their own (a network namespace) whose network fails in earnest."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest
from contract_helpers import Signals, until

from cloudexec import BatchExecutor
from cloudexec.testing import ManualLauncher

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("ip") is None,
        reason="network namespaces need root and iproute2",
    ),
    pytest.mark.usefixtures("nothing_left"),
]
cloudpickle.register_pickle_by_value(sys.modules[__name__])
PATIENCE = 60.0


def _ip(*args: str, inside: str = "") -> None:
    namespace = ["-n", inside] if inside else []
    subprocess.run(["ip", *namespace, *args], check=True, capture_output=True)


class Machine:
    """A network namespace with one cable to this one.

    Attributes:
        name: Of the namespace, and of this end of the cable.
        here: This machine's address.
    """

    def __init__(self, number: int) -> None:
        self.name = f"ce{number}"
        self._net = f"10.{200 + number // 250}.{number % 250}"
        self.here = f"{self._net}.1"
        _ip("netns", "add", self.name)
        _ip("link", "add", self.name, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        _ip("address", "add", f"{self.here}/24", "dev", self.name)
        _ip("link", "set", self.name, "up")
        _ip("link", "set", "lo", "up", inside=self.name)
        self.take_address(2)

    def take_address(self, host: int) -> None:
        """Have another address than before, as after a move to another network."""
        _ip("address", "flush", "dev", "eth0", inside=self.name)
        _ip("address", "add", f"{self._net}.{host}/24", "dev", "eth0", inside=self.name)
        _ip("link", "set", "eth0", "up", inside=self.name)

    def plug(self, *, into: bool) -> None:
        """Pull the cable, or put it back."""
        _ip("link", "set", self.name, "up" if into else "down")

    def drop(self) -> None:
        """Let no packet through any more; nobody is told."""
        self._firewall("-A")

    def let_through(self) -> None:
        self._firewall("-D")

    def _firewall(self, verb: str) -> None:
        for chain, way in (("INPUT", "-i"), ("OUTPUT", "-o")):
            rule = ["iptables", "-w", verb, chain, way, self.name, "-j", "DROP"]
            subprocess.run(rule, check=True, capture_output=True)

    def run(self, *command: str, env: dict[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["ip", "netns", "exec", self.name, *command], env=env)

    def close(self) -> None:
        _ip("netns", "delete", self.name)


class Cluster:
    """An executor, and one worker on another machine."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._launcher = ManualLauncher(needs_network=True)
        self.executor = BatchExecutor(
            1,
            launcher=self._launcher,
            min_workers=1,
            listen=f"{machine.here}:0",
            advertise=machine.here,
        )
        (launch,) = self._launcher.wait(1, PATIENCE)
        contact = launch.contact
        self._process = machine.run(
            sys.executable,
            "-m",
            "cloudexec.worker",
            env={
                **os.environ,
                "CLOUDEXEC_TARGET": contact.target,
                "CLOUDEXEC_EXECUTOR_ID": contact.executor_id,
                "CLOUDEXEC_IDENTITY": launch.launch_id,
                "CLOUDEXEC_KEY": contact.key.hex(),
                "CLOUDEXEC_SLOTS": "1",
                "CLOUDEXEC_CERTIFICATE_SHA256": contact.certificate_sha256,
            },
        )

    def close(self) -> None:
        self.executor.shutdown()
        self._process.wait(PATIENCE)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    try:
        machine = Machine(os.getpid() % 12_000)
    except subprocess.CalledProcessError as exc:
        pytest.skip(f"network namespaces are not permitted here: {exc.stderr.decode().strip()}")
    try:
        made = Cluster(machine)
        try:
            yield made
        finally:
            made.close()
    finally:
        machine.close()


def _meet(told: str, gate: str, log: str) -> int:
    with open(told, "ab", 0) as pipe:
        pipe.write(b"here\n")
    with open(gate, "rb", 0) as pipe:
        pipe.read(1)
    with open(log, "ab", 0) as file:
        file.write(b".")
    return 7


def _assert_unharmed(cluster: Cluster, log: Path) -> None:
    assert log.read_bytes() == b"."
    stats = cluster.executor.stats()
    assert (stats.lost_attempts, stats.duplicates, stats.workers.lost) == (0, 0, 0)


def test_a_cable_that_is_pulled_for_a_moment(
    cluster: Cluster, signals: Signals, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    future = cluster.executor.submit(_meet, signals.told, signals.gate, str(log))
    signals.wait()
    cluster.machine.plug(into=False)
    signals.release()
    until(log.exists)
    assert not future.done()
    cluster.machine.plug(into=True)
    assert future.result(PATIENCE) == 7
    _assert_unharmed(cluster, log)


@pytest.mark.skipif(shutil.which("iptables") is None, reason="dropping packets needs iptables")
def test_a_worker_whose_address_changes_while_packets_vanish(
    cluster: Cluster, signals: Signals, tmp_path: Path
) -> None:
    """Nobody is told that the connection is dead; it is found out, and replaced."""
    log = tmp_path / "log"
    future = cluster.executor.submit(_meet, signals.told, signals.gate, str(log))
    signals.wait()
    cluster.machine.drop()
    try:
        cluster.machine.take_address(3)
        signals.release()
        until(log.exists)
        assert not future.done()
    finally:
        cluster.machine.let_through()
    assert future.result(PATIENCE) == 7
    assert cluster.executor.stats().workers.reconnected == 1
    _assert_unharmed(cluster, log)
    assert cluster.executor.submit(pow, 2, 3).result(PATIENCE) == 8
