"""What is said of a proxy that is named wrongly, or that is not there: nothing of a password."""

from __future__ import annotations

import asyncio
import socket
import sys
import time
from collections.abc import Iterator

import pytest
from relay_helpers import RelayLauncher

from cloudexec import BatchExecutor, LaunchError
from cloudexec._relay.proxies import ProxyError, connect, named_proxy
from cloudexec._server import listener


def said_by(proxy: str) -> str:
    """Connect through a proxy that cannot work; return the message."""
    with pytest.raises(ProxyError) as caught:
        asyncio.run(connect("203.0.113.5", 443, proxy))
    return str(caught.value)


@pytest.fixture
def closed() -> Iterator[int]:
    """A port of this machine at which nobody listens, and nobody else can."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@pytest.mark.parametrize(
    "proxy",
    [
        "http://anna:s3c#ret@proxy.example:3128",
        "http://anna:s3c/ret@proxy.example:3128",
        "http://anna:12?s3cret@proxy.example:3128",
        "socks5h://anna:s3c#ret@proxy.example:1080",
        "http://proxy.example:http",
        "http://proxy.example:99999",
        "http://proxy.example:0",
        "http://[::1:3128",
    ],
)
def test_a_proxy_that_cannot_be_read_is_an_error_that_says_how_to_write_it(proxy: str) -> None:
    said = said_by(proxy)
    assert "HTTPS_PROXY or ALL_PROXY cannot be read" in said
    assert "'#' is written as %23" in said
    assert "s3c" not in said


def test_a_proxy_that_is_not_there_is_named_without_its_password(closed: int) -> None:
    said = said_by(f"http://anna:s3c@127.0.0.1:{closed}")
    assert said.startswith(f"the proxy http://127.0.0.1:{closed} cannot be reached: ")
    assert "s3c" not in said


def test_a_socks_proxy_without_a_port_listens_at_the_usual_one() -> None:
    pytest.importorskip("python_socks")
    # An address of this machine at which nobody listens.
    with pytest.raises(OSError, match=r"proxy 127\.255\.255\.254:1080"):
        asyncio.run(connect("203.0.113.5", 443, "socks5h://127.255.255.254"))


def test_a_socks_proxy_without_what_it_needs_is_named_before_anything_is_tried(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "socks5h://anna:s3c@127.0.0.1:1080")
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setitem(sys.modules, "python_socks", None)
    with pytest.raises(ProxyError, match=r"socks5h://127\.0\.0\.1:1080 speaks SOCKS: .*\[socks\]"):
        named_proxy("203.0.113.5")


def test_a_proxy_that_can_never_work_is_not_tried_for_a_minute(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "ftp://proxy.example:21")
    monkeypatch.delenv("NO_PROXY", raising=False)
    executor = BatchExecutor(1, launcher=RelayLauncher("203.0.113.5:443"))
    began = time.monotonic()
    with pytest.raises(LaunchError, match=r"ftp://proxy\.example:21 is of an unknown kind"):
        executor.submit(abs, -1).result(60)
    assert time.monotonic() - began < 30


def test_a_relay_that_is_tried_for_long_is_said_to_be(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, closed: int
) -> None:
    """Once, with the reason."""
    monkeypatch.setattr(listener, "_REGISTER_USUALLY", 0.5)
    monkeypatch.setattr(listener, "_REGISTER_TIMEOUT", 3.0)
    executor = BatchExecutor(1, launcher=RelayLauncher(f"127.0.0.1:{closed}"))
    with pytest.raises(LaunchError, match=r"cannot reach the relay at .* Connect call failed"):
        executor.submit(abs, -1).result(60)
    (said,) = [each.getMessage() for each in caplog.records]
    assert said.startswith(f"the relay at 127.0.0.1:{closed} cannot be reached yet, and is tried")
    assert "Connect call failed" in said
