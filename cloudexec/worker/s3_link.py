"""One HTTP connection to the host of a signed URL, through a proxy if the environment names one."""

from __future__ import annotations

import base64
import functools
import http.client
import os
import re
import socket
import ssl
import urllib.request
from collections.abc import Callable, Sequence
from urllib.parse import unquote, urlsplit

__all__ = ["Link", "tag", "total_size"]

_CONNECT_TIMEOUT = 10.0


class Link:
    """One connection at a time to a URL's host, which is kept open for the next request."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._connection: http.client.HTTPConnection | None = None
        self._response: http.client.HTTPResponse | None = None
        self._key: tuple[str, str] = ("", "")
        self._proxied = False
        self.place = "S3"
        """The URL of the last request without its signature, for messages."""

    def request(
        self,
        method: str,
        url: str,
        headers: Sequence[tuple[str, str]],
        body: Callable[[], bytes] | None = None,
    ) -> http.client.HTTPResponse:
        """Make a request. The caller must read the answer to its end before the next one."""
        split = urlsplit(url)
        self.place = f"{split.netloc}{unquote(split.path)}"
        if self._connection is None or self._key != (split.scheme, split.netloc):
            self.close()
            self._connection, self._proxied = _connect(split.scheme, split.netloc)
            self._key = (split.scheme, split.netloc)
            self._connection.connect()
            self._connection.sock.settimeout(self._timeout)
        connection = self._connection
        target = url if self._proxied else f"{split.path or '/'}?{split.query}"
        connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
        connection.putheader("Host", split.netloc)
        for name, value in headers:
            connection.putheader(name, value)
        sent: OSError | None = None
        try:
            connection.endheaders()
            while body is not None and (data := body()):
                connection.send(data)
        except (BrokenPipeError, ConnectionResetError) as exc:
            # A server may refuse a request before it has read all of it. The answer says why.
            sent = exc
        try:
            response = self._response = connection.getresponse()
        except (OSError, http.client.HTTPException):
            if sent is not None:
                raise sent from None
            raise
        if sent is not None and response.status < 300:
            raise sent
        return response

    def interrupt(self) -> None:
        """Let the thread that uses the connection fail at once."""
        connection = self._connection
        sock = connection.sock if connection is not None else None
        if sock is not None:
            try:
                # The plain socket's method: a TLS socket's own shutdown() may be called only by the
                # thread that uses it.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                pass

    def close(self) -> None:
        """Close the connection; the next request makes a new one."""
        response, self._response = self._response, None
        if response is not None:
            response.close()  # the answer may own the socket
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


@functools.lru_cache(maxsize=2)
def _tls(authorities: str | None) -> ssl.SSLContext:
    """Return a TLS context, which is cached: reading the authorities takes long."""
    return ssl.create_default_context(cafile=authorities)


def _connect(scheme: str, netloc: str) -> tuple[http.client.HTTPConnection, bool]:
    """Return a connection that is not open yet, and whether requests on it name the whole URL.

    It uses the proxy that the environment names (``https_proxy``, ``no_proxy``).
    """
    proxy = urllib.request.getproxies_environment().get(scheme, "")
    trust = _tls(os.environ.get("AWS_CA_BUNDLE") or None) if scheme == "https" else None
    # typeshed does not declare this function.
    if proxy and urllib.request.proxy_bypass_environment(netloc):  # type: ignore[attr-defined]
        proxy = ""
    if not proxy:
        if scheme == "https":
            return http.client.HTTPSConnection(
                netloc, timeout=_CONNECT_TIMEOUT, context=trust
            ), False
        return http.client.HTTPConnection(netloc, timeout=_CONNECT_TIMEOUT), False
    split = urlsplit(proxy if "//" in proxy else f"//{proxy}")
    where = f"{split.hostname}:{split.port or 80}"
    auth = {}
    if split.username is not None:
        pair = f"{unquote(split.username)}:{unquote(split.password or '')}"
        auth["Proxy-Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
    if scheme == "https":
        secure = http.client.HTTPSConnection(where, timeout=_CONNECT_TIMEOUT, context=trust)
        secure.set_tunnel(netloc, headers=auth)
        return secure, False
    return http.client.HTTPConnection(where, timeout=_CONNECT_TIMEOUT), True


def total_size(response: http.client.HTTPResponse) -> int | None:
    """Return the size of the whole object, according to the answer's headers."""
    if response.status == 200:
        return response.length
    found = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None


def tag(text: str, name: str) -> str:
    """Return the text of an XML tag; empty if there is no such tag."""
    return text.partition(f"<{name}>")[2].partition(f"</{name}>")[0]
