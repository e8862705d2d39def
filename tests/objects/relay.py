"""A TCP relay between clients and a server that can be slow or cut connections."""

from __future__ import annotations

import socket
import ssl
import struct
import threading
import time


class Relay:
    """Forwards bytes in both directions; it is a context manager.

    Args:
        port: Port of the server, on this machine.
        tls: Whether to use TLS with clients.
        tunnel: Whether to be a proxy to which clients send ``CONNECT`` first; any address in it
            leads to the server.
        proxy_tls: Whether clients use TLS with the proxy itself, which then uses none behind it.
        rate: Bytes per second in each direction of a connection; 0 means no limit.

    Attributes:
        passed: Bytes forwarded so far, to the server (``"up"``) and from it (``"down"``).
    """

    def __init__(
        self,
        port: int,
        *,
        tls: ssl.SSLContext | None = None,
        tunnel: bool = False,
        proxy_tls: ssl.SSLContext | None = None,
        rate: float = 0.0,
    ) -> None:
        self._target = port
        self._rate = rate
        self.passed = {"up": 0, "down": 0}
        self._tls = tls
        self._tunnel = tunnel
        self._proxy_tls = proxy_tls
        self._lock = threading.Lock()
        self._cuts: dict[str, list[int]] = {"up": [], "down": []}
        self._sockets: list[socket.socket] = []
        self.connects: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Relay:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.refuse()

    def cut_up(self, *after: int) -> None:
        """Reset the next connections after they have sent these numbers of bytes."""
        with self._lock:
            self._cuts["up"].extend(after)

    def cut_down(self, *after: int) -> None:
        """Reset the next connections after they have received these numbers of bytes."""
        with self._lock:
            self._cuts["down"].extend(after)

    @property
    def cuts_left(self) -> int:
        """Number of requested resets that have not happened yet."""
        with self._lock:
            return len(self._cuts["up"]) + len(self._cuts["down"])

    def refuse(self) -> None:
        """Accept no more connections, and end the open ones."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listener.close()
        self._thread.join()
        with self._lock:
            sockets = list(self._sockets)
        for each in sockets:
            _reset(each)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            if self._proxy_tls is not None:
                client = self._proxy_tls.wrap_socket(client, server_side=True)
            if self._tunnel:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += client.recv(1)
                self.connects.append(head.decode().split("\r\n")[0])
                client.sendall(b"HTTP/1.1 200 Go on\r\n\r\n")
            if self._tls is not None:
                client = self._tls.wrap_socket(client, server_side=True)
            server = socket.create_connection(("127.0.0.1", self._target))
        except OSError:
            client.close()
            return
        if self._rate:  # small buffers, as bytes in a buffer look already sent to the sender
            for each in (client, server):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 128 * 1024)
        with self._lock:
            self._sockets += [client, server]
        up = threading.Thread(target=self._pass_on, args=(client, server, "up"), daemon=True)
        up.start()
        self._pass_on(server, client, "down")
        up.join()
        for each in (client, server):
            each.close()
        with self._lock:
            self._sockets = [each for each in self._sockets if each not in (client, server)]

    def _pass_on(self, source: socket.socket, sink: socket.socket, way: str) -> None:
        passed = 0
        free_at = time.monotonic()
        while True:
            try:
                data = source.recv(65536)
            except OSError:
                data = b""
            passed += len(data)
            with self._lock:
                self.passed[way] += len(data)
                cut = next((each for each in self._cuts[way] if passed >= each), None)
                if cut is not None:
                    self._cuts[way].remove(cut)
            if cut is not None:
                _reset(source)
                _reset(sink)
                return
            if self._rate:
                free_at = max(free_at, time.monotonic()) + len(data) / self._rate
                time.sleep(max(0.0, free_at - time.monotonic()))
            try:
                if not data:
                    socket.socket.shutdown(sink, socket.SHUT_WR)
                    return
                sink.sendall(data)
            except OSError:
                _reset(source)
                return


def _reset(each: socket.socket) -> None:
    try:
        each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        socket.socket.shutdown(each, socket.SHUT_RDWR)
    except OSError:
        pass
