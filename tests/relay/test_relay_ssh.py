"""OpenSSH in the place of a relay: a real sshd forwards a port to the executor."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import cloudpickle
import pytest
from relay_helpers import RelayLauncher

from cloudexec import Batch, BatchExecutor, ConfigError, LaunchError

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"
pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(
        not os.path.exists(SSHD) or shutil.which("ssh") is None or os.geteuid() != 0,
        reason="an sshd of one's own needs root and OpenSSH",
    ),
]
cloudpickle.register_pickle_by_value(sys.modules[__name__])
PATIENCE = 60.0


class Sshd:
    """An SSH server on this machine, and a client's settings that lead to it as ``bastion``."""

    def __init__(self, directory: Path, gateway_ports: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        for name in ("host", "user"):
            subprocess.run(
                ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(directory / name)],
                check=True,
            )
        Path("/run/sshd").mkdir(exist_ok=True)
        self._config = directory / "sshd_config"
        self._config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {directory}/host\n"
            f"AuthorizedKeysFile {directory}/user.pub\nPidFile none\nUsePAM no\n"
            f"StrictModes no\nPermitRootLogin yes\nGatewayPorts {gateway_ports}\n"
        )
        settings = directory / "ssh_config"
        settings.write_text(
            f"Host *\n  IdentityFile {directory}/user\n  UserKnownHostsFile {directory}/known\n"
            "  StrictHostKeyChecking accept-new\n  LogLevel INFO\n"
        )
        self.wrapper = directory / "bin"
        self.wrapper.mkdir()
        command = self.wrapper / "ssh"
        command.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {settings} "$@"\n')
        command.chmod(0o755)
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [SSHD, "-D", "-e", "-f", str(self._config)],
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
            except OSError:
                assert self.process.poll() is None
                assert time.monotonic() < deadline
                threading.Event().wait(0.05)
            else:
                return

    def stop(self) -> None:
        """End it, with all its connections."""
        import psutil

        everything = psutil.Process(self.process.pid).children(recursive=True)
        for each in [psutil.Process(self.process.pid), *everything]:
            each.kill()
        self.process.wait()
        psutil.wait_procs(everything, PATIENCE)


@pytest.fixture
def sshd(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Sshd]:
    server = Sshd(tmp_path, getattr(request, "param", "clientspecified"))
    monkeypatch.setenv("PATH", f"{server.wrapper}{os.pathsep}{os.environ['PATH']}")
    yield server
    server.stop()


def test_workers_reach_the_client_through_a_host_of_the_users(
    sshd: Sshd, caplog: pytest.LogCaptureFixture
) -> None:
    """Also after that host was down for a while; the log says both."""
    caplog.set_level(logging.DEBUG, "cloudexec")
    launcher = RelayLauncher(f"ssh://root@127.0.0.1:{sshd.port}", advertise="127.0.0.2")
    executor = BatchExecutor(1, launcher=launcher, retries=0)
    try:
        assert list(executor.map(abs, range(-100, 0))) == list(range(100, 0, -1))
        sshd.stop()
        future = executor.submit(bytes, 3 << 20)
        sshd.start()
        assert future.result(PATIENCE) == bytes(3 << 20)
        deadline = time.monotonic() + PATIENCE
        while caplog.text.count("registered with the relay") < 2:
            assert time.monotonic() < deadline
            threading.Event().wait(0.05)
        assert caplog.text.count("the connection to the relay is lost") == 1
        executor.shutdown(wait=False)
        assert [each.wait(PATIENCE) for each in launcher.workers.values()] == [0]
        launcher.end_all()
        executor.shutdown()
    finally:
        launcher.close_workers()


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("ssh://root@127.0.0.1:1", r"Connection refused"),
        ("ssh://nobody-of-that-name@127.0.0.1:{port}", r"Permission denied"),
    ],
)
def test_what_openssh_says_is_in_the_error(sshd: Sshd, url: str, why: str) -> None:
    launcher = RelayLauncher(url.format(port=sshd.port))
    with pytest.raises(LaunchError, match=rf"cannot reach the relay at ssh://.*{why}"):
        BatchExecutor(1, launcher=launcher).submit(abs, -1).result(PATIENCE)


@pytest.mark.parametrize("sshd", ["no"], indirect=True)
def test_a_host_that_opens_ports_for_itself_alone_is_an_error_that_says_so(sshd: Sshd) -> None:
    launcher = RelayLauncher(f"ssh://root@127.0.0.1:{sshd.port}", advertise="127.0.0.2")
    with pytest.raises(LaunchError, match=r"127\.0\.0\.2:\d+ accepts no conn.*GatewayPorts client"):
        BatchExecutor(1, launcher=launcher).submit(abs, -1).result(PATIENCE)


@pytest.mark.parametrize(
    "url",
    [
        *("ssh://", "ssh://-oProxyCommand=x", "somewhere", "ssh://a:secret@c", "ssh://a:99999"),
        *("ssh://a/path", "ssh://a?query", "ssh://a#fragment", "ssh://a:sec/secret@c"),
        *("ssh://a b@c", "ssh://a@@b", "ssh://a@b?X-Token=secret"),
        *("host:ssh", "host:0", "host:99999", "https://host:443", "me@host:22", "::1:443"),
        *("me:secret@host:443", "http://me:secret@host:443", "me:sec/secret@host", "a b:443"),
    ],
)
def test_what_is_no_relay_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="relay must be"):
        BatchExecutor(1, launcher=RelayLauncher(url)).submit(abs, -1).result(PATIENCE)
    with pytest.raises(ConfigError, match="relay must be") as caught:
        Batch(relay=url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("ssh://me:secret@c", r"'ssh://\*\*\*\*@c': OpenSSH takes no password from an address"),
        ("ssh://me@c/path", r"'ssh://me@c/path': nothing may follow the host and its port"),
    ],
)
def test_what_is_wrong_with_an_address_is_said(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Batch(relay=url)
