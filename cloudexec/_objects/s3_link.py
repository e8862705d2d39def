"""One HTTP connection to the host of a signed URL, through a proxy if there is one on the way."""

from __future__ import annotations

import base64
import functools
import logging
import os
import re
import socket
import ssl
import threading
import urllib.request
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import urllib3
from urllib3.connection import HTTPConnection, HTTPSConnection

from cloudexec._record_class import record

if TYPE_CHECKING:
    from urllib3.response import BaseHTTPResponse

__all__ = ["Link", "Settings", "total_size"]

_CONNECT_TIMEOUT = 10.0
_LOGGERS = ("urllib3.connection", "urllib3.connectionpool")
_reading = threading.Lock()


@record
class Settings:
    """How objects are moved to and from S3.

    Attributes:
        parallel: Number of requests of one transfer at a time.
        timeout: Seconds that one send or receive may take.
        patience: Seconds without a byte from any request after which a transfer fails.
        proxies: URLs of proxies by the scheme of the URLs that they are for, such as ``"https"``;
            ``None`` for those of the environment (``https_proxy``).
        authorities: File of the certificates that are trusted; empty for those of the system or of
            ``SSL_CERT_FILE``, ``None`` for what ``AWS_CA_BUNDLE`` says.
    """

    parallel: int = 4
    timeout: float = 30.0
    patience: float = 60.0
    proxies: Mapping[str, str] | None = None
    authorities: str | None = None


class Link:
    """One connection at a time to a URL's host, which is kept open for the next request."""

    def __init__(self, settings: Settings) -> None:
        for name in _LOGGERS:
            logging.getLogger(name).addFilter(_may_be_logged)  # once, however often this is done
        self.timeout = settings.timeout
        self.interrupted = False
        self.connection: HTTPConnection | None = None
        self._settings = settings
        self._manager: urllib3.PoolManager | None = None
        self._response: BaseHTTPResponse | None = None
        self.place = "S3"
        """The URL of the last request without its signature, for messages."""

    def request(
        self,
        method: str,
        url: str,
        headers: Iterable[tuple[str, str]],
        body: Iterable[bytes | bytearray | memoryview] | None = None,
    ) -> BaseHTTPResponse:
        """Make a request to the host of the first one.

        The caller must read the answer to its end before the next request.

        Raises:
            urllib3.exceptions.HTTPError: If there is no answer.
        """
        split = urlsplit(url)
        self.place = f"{split.netloc}{unquote(split.path)}"
        if self._manager is None:
            self._manager = self._open(split.scheme, split.hostname or "")
        sent = None if body is None else _Sent(body)
        self._response = response = self._manager.urlopen(
            method,
            url,
            body=sent,
            headers=dict(headers),
            timeout=urllib3.Timeout(connect=_CONNECT_TIMEOUT, read=self.timeout),
            retries=False,  # nor are redirections followed, for which the URL is not signed
            preload_content=False,
            decode_content=False,
        )
        if sent is not None and not sent.is_whole and response.status < 300:
            # A server may refuse a request before it has read all of it, but not accept it.
            raise urllib3.exceptions.ProtocolError("the connection was closed too early")
        return response

    def _open(self, scheme: str, host: str) -> urllib3.PoolManager:
        proxies, authorities = self._settings.proxies, self._settings.authorities
        if proxies is None:
            # Without those in the settings of macOS, for which a forked process may not ask.
            proxies = urllib.request.getproxies_environment()
        if authorities is None:
            authorities = os.environ.get("AWS_CA_BUNDLE", "")
        options: dict[str, Any] = {"maxsize": 1}
        if scheme == "https":
            options["ssl_context"] = _tls(authorities)
        proxy = proxies.get(scheme, "")
        if not proxy or urllib.request.proxy_bypass(host):
            manager = urllib3.PoolManager(**options)
        else:
            proxy = proxy if "//" in proxy else f"http://{proxy}"
            if login := unquote(urllib3.util.parse_url(proxy).auth or ""):
                login = "Basic " + base64.b64encode(login.encode()).decode()
                options["proxy_headers"] = {"Proxy-Authorization": login}
            if proxy.startswith("https:"):
                options["proxy_ssl_context"] = _tls(authorities)
            manager = urllib3.ProxyManager(proxy, **options)
        pools: Any = {
            "http": functools.partial(self._pool, urllib3.HTTPConnectionPool, _Connection),
            "https": functools.partial(self._pool, urllib3.HTTPSConnectionPool, _TlsConnection),
        }
        manager.pool_classes_by_scheme = pools
        return manager

    def _pool(self, pool_class: Any, connection_class: Any, *args: Any, **options: Any) -> Any:
        pool = pool_class(*args, **options)
        pool.ConnectionCls = functools.partial(connection_class, self)
        return pool

    def interrupt(self) -> None:
        """Let the thread that uses the connection fail at once; it must not be used after this."""
        self.interrupted = True  # before the socket is looked for, which may be connecting
        sock: Any = self.connection.sock if self.connection is not None else None
        # Where a proxy is spoken to by TLS as well, urllib3 wraps the socket to the proxy.
        while sock is not None and not isinstance(sock, socket.socket):
            sock = getattr(sock, "socket", None)
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
        if self.connection is not None:
            self.connection.close()


class _Connection(HTTPConnection):
    """A connection that its link can interrupt."""

    def __init__(self, link: Link, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._link = link
        link.connection = self

    def request(self, *args: Any, **options: Any) -> None:
        """Send a request."""
        if self.sock is None:
            self.connect()
        if self._link.interrupted:
            raise ConnectionAbortedError("the transfer has stopped")
        # urllib3 lets a send take as long as connecting may take.
        self.timeout = self._link.timeout
        try:
            super().request(*args, **options)
        except ConnectionResetError as exc:
            # The server may have answered before it closed the connection: each version of urllib3
            # looks for an answer after this error.
            raise BrokenPipeError(exc.errno, exc.strerror) from exc


class _TlsConnection(_Connection, HTTPSConnection):
    """The same, over TLS."""


class _Sent:
    """The body of a request, which knows whether all of it was sent."""

    def __init__(self, pieces: Iterable[bytes | bytearray | memoryview]) -> None:
        self._pieces = pieces
        self.is_whole = False

    def __iter__(self) -> Iterator[bytes | bytearray | memoryview]:
        yield from self._pieces
        self.is_whole = True


def _may_be_logged(record: logging.LogRecord) -> bool:
    """Keep signed URLs out of urllib3's logs: anyone who has one can use it."""
    return "X-Amz-" not in record.getMessage()


def _tls(authorities: str) -> ssl.SSLContext:
    """Return a TLS context, which is cached: reading the authorities takes long."""
    with _reading:  # or each thread of the first transfer would read them
        return _read_authorities(authorities)


@functools.lru_cache(maxsize=2)
def _read_authorities(authorities: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authorities or None)
    except OSError as exc:
        raise ssl.SSLCertVerificationError(f"{authorities or 'certificates'}: {exc}") from exc


def total_size(response: BaseHTTPResponse) -> int | None:
    """Return the size of the whole object, according to the answer's headers."""
    if response.status == 200:
        return response.length_remaining
    found = re.fullmatch(r"bytes \d+-\d+/(\d+)", response.headers.get("Content-Range", ""))
    return int(found[1]) if found else None
