"""Opens connections through the HTTP or SOCKS proxy that the environment or the system names."""

from __future__ import annotations

import asyncio
import base64
import socket
import urllib.parse
import urllib.request

from cloudexec._relay.joining import dial

__all__ = ["ProxyError", "connect", "named_proxy", "proxy_for"]

_LONGEST_HEAD = 64 * 1024
_SOCKS_PORT = 1080
"""Where a SOCKS proxy listens if its URL names no port. RFC 1928, section 3."""


class ProxyError(OSError):
    """A proxy refuses a connection, or cannot be used; the message says why, without a password."""


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
        ProxyError: If the URL cannot be read.
    """
    proxy = proxy_for(host)
    if proxy:
        _parts_of(proxy)
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
        ProxyError: If the proxy refuses, cannot be reached, or is of an unknown kind, or if its URL
            cannot be read.
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
        ProxyError: If it has none, or is of an unknown kind. A URL that cannot be read is not in
            the message, as the password may be anywhere.
    """
    try:
        url = urllib.parse.urlsplit(proxy)
        # "#", "?" and "/" end the part of a URL that a password is in.
        is_read = url.port != 0 and "@" not in f"{url.path}{url.query}{url.fragment}"
    except ValueError:  # the port is no number, or too large
        is_read = False
    if not is_read:
        raise ProxyError(
            "HTTPS_PROXY or ALL_PROXY cannot be read: it must be like "
            "http://user:password@host:port, and in a user name or password, '#' is written as "
            "%23, '/' as %2F, '?' as %3F and '@' as %40"
        )
    if not url.scheme.startswith("socks") and (url.scheme != "http" or not url.hostname):
        raise ProxyError(
            f"the proxy {_shown(proxy)} is of an unknown kind: http://host:port and "
            f"socks5://host:port are known"
        )
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


async def _over_socks(proxy: str, host: str, port: int) -> socket.socket:
    try:
        from python_socks import ProxyError as SocksError
        from python_socks.async_.asyncio import Proxy
    except ImportError:
        raise ProxyError(
            f"the proxy {_shown(proxy)} speaks SOCKS: install it with `pip install "
            f"'cloudexec[socks]'`"
        ) from None
    # The "h" (and "a") asks the proxy to look up names, which rdns=True does in any case.
    url = proxy.replace("socks5h://", "socks5://").replace("socks4a://", "socks4://")
    if url.startswith("socks://"):
        url = url.replace("socks://", "socks5://")
    try:
        found = await Proxy.from_url(url, rdns=True).connect(host, port)
    except SocksError as exc:
        why = f"the proxy {_shown(proxy)} does not connect to {host}:{port}: {exc}"
        raise ProxyError(why) from exc
    found.setblocking(False)
    return found


def _shown(proxy: str) -> str:
    """Return a proxy's URL without its password."""
    url = urllib.parse.urlsplit(proxy)
    host = url.netloc.rpartition("@")[2]
    return f"{url.scheme}://{host}"
