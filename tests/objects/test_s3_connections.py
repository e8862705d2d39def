"""Transfers with servers that answer as S3 and proxies may, but the emulated S3 does not."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import re
import socket
import ssl
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from package_index import make_certificates
from relay import Relay
from s3_helpers import MIB, PART, download_into, file_of

from cloudexec._objects import s3_transfer as transfers
from cloudexec._transfer import File, SignedRequest

pytestmark = pytest.mark.timeout(60)

DATA = os.urandom(3 * MIB)
SHA256 = hashlib.sha256(DATA).digest()
SECRET = "X-Amz-Signature=0123456789abcdef"

Answer = Callable[[socket.socket, str, int], bool]
"""Answers a request, given its head and its number; says whether the connection stays open."""


class Server:
    """A server that answers as a function says; it is a context manager.

    Attributes:
        heads: The heads of the requests, in the order of their arrival.
        times: When they arrived.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self.heads: list[str] = []
        self.times: list[float] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._threads = [threading.Thread(target=self._accept)]

    def __enter__(self) -> Server:
        self._threads[0].start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        with self._lock:
            for each in self._open:
                with suppress(OSError):  # the other side may be gone
                    each.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()

    def signed(self, host: str = "") -> SignedRequest:
        return SignedRequest(
            f"http://{host or self.address}/bucket/key?{SECRET}", (), time.time() + 3600
        )

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self._open.add(client)
            self._threads.append(threading.Thread(target=self._serve, args=(client,)))
            self._threads[-1].start()

    def _serve(self, client: socket.socket) -> None:
        try:
            while head := _head(client):
                with self._lock:
                    self.heads.append(head)
                    self.times.append(time.monotonic())
                    number = len(self.heads)
                if not self._answer(client, head, number):
                    break
        except OSError:
            pass
        with self._lock:
            self._open.discard(client)
            client.close()


def _head(client: socket.socket) -> str:
    head = b""
    while b"\r\n\r\n" not in head:
        data = client.recv(1)
        if not data:
            return ""
        head += data
    return head.decode()


def _send(client: socket.socket, status: str, body: bytes = b"", *headers: str) -> None:
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}", *headers]
    client.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)


def _send_range(client: socket.socket, head: str) -> None:
    found = re.search(r"Range: bytes=(\d+)-(\d+)", head)
    assert found is not None
    first, last = int(found[1]), int(found[2])
    place = f"Content-Range: bytes {first}-{last}/{len(DATA)}"
    _send(client, "206 Partial Content", DATA[first : last + 1], place)


def _error(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>because of {code}</Message></Error>".encode()


@contextmanager
def _download(**settings: Any) -> Iterator[tuple[transfers.Download, Callable[[], bytes]]]:
    """Yield a download of DATA, and a function that returns what has come."""
    with tempfile.TemporaryFile() as file:

        def found() -> bytes:
            return os.pread(file.fileno(), 2 * len(DATA), 0)

        yield download_into(file, len(DATA), SHA256, range_bytes=MIB, **settings), found


def _run_upload(server: Server, size: int = PART, **settings: Any) -> transfers.Upload:
    request = server.signed()
    with file_of(bytes(size)) as file:
        terms = transfers.Settings(**{"patience": 0.0, "timeout": 5.0, **settings})
        upload = transfers.Upload(File(file.fileno()).read, size, terms)
        upload.run(lambda _: request)
        return upload


def test_a_connection_that_the_server_closes_between_requests_is_replaced() -> None:
    def answer(client: socket.socket, head: str, number: int) -> bool:
        _send_range(client, head)
        return False

    with Server(answer) as server, _download(parallel=1, patience=0.0) as (download, found):
        request = server.signed()
        download.run(lambda _: request)
        assert found() == DATA
        assert len(server.heads) == 3


@pytest.mark.parametrize("when", ["3", "date"])
def test_s3_says_how_long_to_wait(when: str) -> None:
    """In seconds, or until a time of day."""

    def answer(client: socket.socket, head: str, number: int) -> bool:
        if number > 1:
            _send_range(client, head)
        else:
            ends = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 3))
            after = f"Retry-After: {ends if when == 'date' else when}"
            _send(client, "503 Slow Down", _error("SlowDown"), after)
        return True

    with Server(answer) as server, _download(parallel=1, patience=20.0) as (download, found):
        request = server.signed()
        download.run(lambda _: request)
        assert found() == DATA
        assert server.times[1] - server.times[0] > 1.5  # seconds of a date are whole ones


def test_a_wanted_pause_that_makes_no_sense_is_ignored() -> None:
    def answer(client: socket.socket, head: str, number: int) -> bool:
        _send(client, "503 Slow Down", _error("SlowDown"), "Retry-After: soon")
        return True

    with Server(answer) as server, _download(parallel=1, patience=0.0) as (download, _):
        request = server.signed()
        with pytest.raises(transfers.S3TransferError, match="because of SlowDown") as caught:
            download.run(lambda _: request)
        assert caught.value.code == "SlowDown"


def test_an_upload_that_is_refused_before_it_was_read_says_why() -> None:
    def answer(client: socket.socket, head: str, number: int) -> bool:
        _send(client, "400 Bad Request", _error("EntityTooLarge"), "Connection: close")
        return False  # with content that was not read, so the client's next send fails

    with Server(answer) as server:
        with pytest.raises(transfers.S3TransferError, match="because of EntityTooLarge"):
            _run_upload(server, 16 * MIB)
        assert len(server.heads) == 1


def test_an_upload_that_was_not_read_to_its_end_is_no_success() -> None:
    def answer(client: socket.socket, head: str, number: int) -> bool:
        _send(client, "200 OK", b"", 'ETag: "1"')
        return False

    with Server(answer) as server:
        with pytest.raises(transfers.S3TransferError, match="closed too early") as caught:
            _run_upload(server, 16 * MIB)
        assert caught.value.code == "Unreachable"
        assert len(server.heads) == 3


def test_a_redirection_to_another_region_is_an_error_and_not_followed() -> None:
    """The signature holds for one host only."""

    def answer(client: socket.socket, head: str, number: int) -> bool:
        _send(client, "307 Temporary Redirect", b"", f"Location: http://{server.address}/other")
        return True

    with Server(answer) as server, _download(parallel=1) as (download, _):
        request = server.signed()
        with pytest.raises(transfers.S3TransferError, match="another region") as caught:
            download.run(lambda _: request)
        assert caught.value.status == 307
        assert len(server.heads) == 1


@pytest.mark.parametrize("way", ["send", "receive", "headers", "https proxy"])
def test_a_transfer_that_is_cancelled_while_it_is_blocked_ends_at_once(
    way: str, tmp_path: Path
) -> None:
    """And so do its threads and its connections; nothing is written afterwards."""
    begun, leave = threading.Event(), threading.Event()

    def answer(client: socket.socket, head: str, number: int) -> bool:
        if way == "receive":
            client.sendall(
                f"HTTP/1.1 206 Partial Content\r\nContent-Length: {MIB}\r\n"
                f"Content-Range: bytes 0-{MIB - 1}/{len(DATA)}\r\n\r\n".encode()
                + bytes(1000)
            )
        begun.set()
        leave.wait(30)
        return False

    with ExitStack() as stack:
        server = stack.enter_context(Server(answer))
        request = server.signed()
        settings: dict[str, Any] = {}
        if way == "https proxy":
            made = make_certificates(tmp_path, ["localhost", "s3.test"])
            tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            tls.load_cert_chain(made.server, made.key)
            inner = stack.enter_context(Relay(int(server.address.rpartition(":")[2]), tls=tls))
            outer = stack.enter_context(Relay(inner.port, tunnel=True, proxy_tls=tls))
            settings["proxies"] = {"https": f"https://localhost:{outer.port}"}
            settings["authorities"] = str(made.authority)
            request = SignedRequest(f"https://s3.test/key?{SECRET}", (), time.time() + 3600)
        download, found = stack.enter_context(_download(parallel=1, timeout=50.0, **settings))
        transfer: transfers.Download | transfers.Upload = download
        if way == "send":
            terms = transfers.Settings(timeout=50.0)
            transfer = transfers.Upload(lambda at, n: bytes(n), 64 * MIB, terms)
        errors: list[BaseException] = []

        def run() -> None:
            try:
                transfer.run(lambda _: request)
            except transfers.S3TransferError as exc:
                errors.append(exc)

        before = set(threading.enumerate())
        thread = threading.Thread(target=run)
        thread.start()
        assert begun.wait(20)
        of_transfer = [
            each
            for each in set(threading.enumerate()) - before
            if each.name.startswith("cloudexec-s3")
        ]
        assert of_transfer
        transfer.cancel()
        for each in (thread, *of_transfer):
            each.join(10)
            assert not each.is_alive()
        leave.set()
        assert "cancelled" in str(errors[0])
        assert found() == b""


def test_a_transfer_that_gets_no_thread_says_so_and_may_run_later() -> None:
    def answer(client: socket.socket, head: str, number: int) -> bool:
        _send_range(client, head)
        return True

    async def carry_out(download: transfers.Download, request: SignedRequest) -> None:
        async def ask(_: transfers.UrlRefusedError | None) -> transfers.Sign:
            return lambda _: request

        await transfers.carry_out(download, ask)

    with Server(answer) as server, _download() as (download, found):
        request = server.signed()
        before = threading.stack_size(1 << 46)  # more than there is
        try:
            with pytest.raises(transfers.S3TransferError, match="no thread can be started"):
                download.run(lambda _: request)
            with pytest.raises(transfers.S3TransferError, match="no thread can be started"):
                asyncio.run(carry_out(download, request))
        finally:
            threading.stack_size(before)
        download.run(lambda _: request)
        assert found() == DATA


@pytest.mark.parametrize(
    ("status", "advice"), [("503 Slow Down", "fewer objects"), ("502 Bad", "an error of its own")]
)
def test_errors_that_stay_come_with_advice_that_fits(status: str, advice: str) -> None:
    def answer(client: socket.socket, head: str, number: int) -> bool:
        _send(client, status)
        return True

    with Server(answer) as server, _download(parallel=1, patience=0.0) as (download, _):
        request = server.signed()
        with pytest.raises(transfers.S3TransferError, match=advice) as caught:
            download.run(lambda _: request)
        assert "check the way" not in str(caught.value)


def test_no_signed_url_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Not by urllib3 either, which logs the URL of each request, and of each answer it dislikes."""

    def answer(client: socket.socket, head: str, number: int) -> bool:
        if number == 1:
            _send(client, "503 Slow Down", _error("SlowDown"))
        elif number == 2:
            _send(client, "500 Error", b"", "Fine: yes", "this is no header")
        elif head.startswith("GET"):
            _send_range(client, head)
        else:
            client.recv(10_000_000, socket.MSG_WAITALL)
            _send(client, "403 Forbidden", _error("AccessDenied"))
        return True

    caplog.set_level(logging.DEBUG)
    with Server(answer) as server, _download() as (download, found):
        request = server.signed()
        download.run(lambda _: request)
        assert found() == DATA
        with pytest.raises(transfers.UrlRefusedError) as caught:
            _run_upload(server, 10_000_000)
    assert "X-Amz" not in str(caught.value)
    assert "Failed to parse headers" not in caplog.text
    assert "X-Amz" not in caplog.text
    assert any(SECRET in head for head in server.heads)


def test_a_proxy_gets_its_password_and_the_hosts_of_no_proxy_are_reached_without_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer(client: socket.socket, head: str, number: int) -> bool:
        if "Proxy-Authorization: Basic dXNlcjpwQHNz" in head:  # user:p@ss
            _send_range(client, head)
        else:
            _send(client, "407 Proxy Authentication Required")
        return True

    def refuse(client: socket.socket, head: str, number: int) -> bool:
        _send(client, "404 Not Found", _error("NoSuchKey"))
        return True

    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server(answer) as proxy, Server(refuse) as direct:
        request = direct.signed()
        monkeypatch.setenv("http_proxy", f"http://user:p%40ss@{proxy.address}")
        with _download() as (download, found):
            download.run(lambda _: request)
            assert found() == DATA
        assert all(head.startswith(f"GET {request.url} HTTP") for head in proxy.heads)
        monkeypatch.setenv("http_proxy", f"http://{proxy.address}")
        with _download() as (download, _):
            with pytest.raises(transfers.S3TransferError, match=r"407: .*proxy wants a password"):
                download.run(lambda _: request)
        assert direct.heads == []
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        with _download() as (download, _):
            with pytest.raises(transfers.S3TransferError, match="NoSuchKey"):
                download.run(lambda _: request)
        assert direct.heads != []


def test_a_server_that_resets_connections_is_given_up_in_time() -> None:
    def answer(client: socket.socket, head: str, number: int) -> bool:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        return False

    with Server(answer) as server, _download(parallel=1, patience=0.0) as (download, _):
        request = server.signed()
        with pytest.raises(transfers.S3TransferError, match=r"after 3 tries; .*prox") as caught:
            download.run(lambda _: request)
        assert caught.value.code == "Unreachable"
        assert caught.value.transient
        assert len(server.heads) == 3
