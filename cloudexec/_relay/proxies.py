"""Opens connections through the HTTP or SOCKS proxy that the environment or the system names."""

from __future__ import annotations

import asyncio
import base64
import socket
import urllib.parse
import urllib.request
from typing import Any

from cloudexec._relay.joining import dial

__all__ = ["ProxyError", "ProxySettingError", "connect", "named_proxy", "proxy_for"]

_LONGEST_HEAD = 64 * 1024
_SOCKS_PORT = 1080
"""Where a SOCKS proxy listens if its URL names no port. RFC 1928, section 3."""


class ProxyError(OSError):
    """A proxy refuses a connection, or cannot be used; the message says why, without a password."""


class ProxySettingError(ProxyError):
    """No proxy that is named so can be used, however often it is tried."""


def proxy_for(host: str) -> str:
    """Return the URL of the proxy for connections to a host; empty if no proxy is needed.

    The variables ``HTTPS_PROXY`` and ``ALL_PROXY`` name it, or the system's settings on macOS and
    Windows. ``NO_PROXY`` names hosts that are reached without a proxy.
    """
    proxies = urllib.request.getproxies()
    found = proxies.get("https") or proxies.get("all") or ""
    if not found or urllib.request.proxy_bypass(host):
        return ""
    return found if "://" in found else f"http://{found}"


def named_proxy(host: str) -> str:
    """Return the URL, without its password, of the proxy for a host; empty if none is needed.

    Raises:
        ProxySettingError: If no connection can be opened through such a proxy.
    """
    proxy = proxy_for(host)
    if proxy and _parts_of(proxy).scheme.startswith("socks"):
        _socks(proxy)
    return _shown(proxy) if proxy else ""


async def connect(host: str, port: int, proxy: str = "") -> socket.socket:
    """Open a connection.

    Args:
        host: The host to connect to.
        port: The port to connect to.
        proxy: URL of an ``http``, ``socks5`` or ``socks4`` proxy; empty to connect directly.

    Returns:
        A connected socket that does not block.

    Raises:
        ProxySettingError: If the proxy's URL cannot be read, or is of an unknown kind.
        ProxyError: If the proxy refuses, or cannot be reached.
        OSError: If the connection cannot be opened.
    """
    if not proxy:
        return await dial(host, port)
    url = _parts_of(proxy)
    if url.scheme.startswith("socks"):
        if url.port is None:
            proxy = url._replace(netloc=f"{url.netloc.rstrip(':')}:{_SOCKS_PORT}").geturl()
        return await _over_socks(proxy, host, port)
    try:
        connection = await dial(url.hostname or "", url.port or 80)
    except OSError as exc:
        raise ProxyError(f"the proxy {_shown(proxy)} cannot be reached: {exc}") from exc
    try:
        await _ask(connection, proxy, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    except BaseException:
        connection.close()
        raise
    return connection


def _parts_of(proxy: str) -> urllib.parse.SplitResult:
    """Return the parts of a proxy's URL.

    Raises:
        ProxySettingError: If it has none, or is of an unknown kind. A URL that cannot be read is
            not in the message, as the password may be anywhere.
    """
    try:
        url = urllib.parse.urlsplit(proxy)
        # "#", "?" and "/" end the part of a URL that a password is in.
        is_read = url.port != 0 and "@" not in f"{url.path}{url.query}{url.fragment}"
    except ValueError:  # the port is no number, or too large
        is_read = False
    if not is_read:
        raise ProxySettingError(
            "HTTPS_PROXY or ALL_PROXY cannot be read: it must be like "
            "http://user:password@host:port with a port of 1 to 65535, and in a user name or "
            "password, '#' is written as %23, '/' as %2F, '?' as %3F and '@' as %40"
        )
    if not url.scheme.startswith("socks") and url.scheme != "http":
        raise ProxySettingError(
            f"the proxy {_shown(proxy)} is of an unknown kind: http://host:port and "
            f"socks5://host:port are known"
        )
    if not url.hostname:
        raise ProxySettingError(f"the proxy {_shown(proxy)} (HTTPS_PROXY, ALL_PROXY) has no host")
    return url


async def _ask(connection: socket.socket, proxy: str, target: str) -> None:
    """Ask an HTTP proxy to connect to a target; read its answer, and no byte behind it."""
    loop = asyncio.get_running_loop()
    url = urllib.parse.urlsplit(proxy)
    head = f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n"
    if url.username is not None:
        user = urllib.parse.unquote(url.username)
        word = f"{user}:{urllib.parse.unquote(url.password or '')}"
        head += f"Proxy-Authorization: Basic {base64.b64encode(word.encode()).decode()}\r\n"
    await loop.sock_sendall(connection, f"{head}\r\n".encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        byte = await loop.sock_recv(connection, 1)
        answer += byte
        if not byte or len(answer) > _LONGEST_HEAD:
            raise ProxyError(f"the proxy {_shown(proxy)} has closed the connection to {target}")
    line = answer.split(b"\r\n", 1)[0].decode("latin-1")
    words = line.split(" ", 2)
    if not line.startswith("HTTP/1.") or len(words) < 2 or not words[1].startswith("2"):
        why = " ".join(words[1:]) or line
        raise ProxyError(f"the proxy {_shown(proxy)} does not connect to {target}: {why}")


def _socks(proxy: str) -> tuple[Any, type[Exception]]:
    """Return the class of connections through SOCKS proxies, and its error.

    Raises:
        ProxySettingError: If what they need is not installed.
    """
    try:
        from python_socks import ProxyError as SocksError
        from python_socks.async_.asyncio import Proxy
    except ImportError:
        raise ProxySettingError(
            f"the proxy {_shown(proxy)} speaks SOCKS: install what that needs with `pip install "
            f"'cloudexec[socks]'`"
        ) from None
    return Proxy, SocksError


async def _over_socks(proxy: str, host: str, port: int) -> socket.socket:
    proxies, refusals = _socks(proxy)
    # The "h" (and "a") asks the proxy to look up names, which rdns=True does in any case.
    url = proxy.replace("socks5h://", "socks5://").replace("socks4a://", "socks4://")
    if url.startswith("socks://"):
        url = url.replace("socks://", "socks5://")
    try:
        found: socket.socket = await proxies.from_url(url, rdns=True).connect(host, port)
    except refusals as exc:
        why = f"the proxy {_shown(proxy)} does not connect to {host}:{port}: {exc}"
        raise ProxyError(why) from exc
    found.setblocking(False)
    return found


def _shown(proxy: str) -> str:
    """Return a proxy's URL without its password."""
    url = urllib.parse.urlsplit(proxy)
    host = url.netloc.rpartition("@")[2]
    return f"{url.scheme}://{host}"
