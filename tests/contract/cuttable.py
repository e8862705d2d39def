"""A TCP proxy between workers and their client, with which tests cut connections."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

__all__ = ["CuttableLink"]

WORKER, CLIENT = 0, 1
"""Sides of a connection."""


class _Connection:
    """One connection that is forwarded."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.ends = near, far
        self.tells = True  # whether the end of one side is passed on to the other
        self._open = 2
        self._lock = threading.Lock()

    def end(self, *sides: int) -> None:
        for side in sides:
            with contextlib.suppress(OSError):
                # Makes closing send a reset instead of a regular end.
                linger = struct.pack("ii", 1, 0)
                self.ends[side].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.ends[side].shutdown(socket.SHUT_RDWR)

    def pumped(self, sink: socket.socket) -> None:
        """Handle the end of one direction."""
        if self.tells:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)
        with self._lock:
            self._open -= 1
            if not self._open:
                for end in self.ends:
                    end.close()


class CuttableLink:
    """Forwards connections to a port of this machine, and cuts them on request.

    Args:
        target_port: The port to which connections are forwarded.

    Attributes:
        port: The port on which the proxy listens.
        accepted: Number of accepted connections.
    """

    def __init__(self, target_port: int) -> None:
        self.accepted = 0
        self._target_port = target_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        self._connections: list[_Connection] = []
        self._is_up = True
        self._budget: int | None = None
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def cut(self, *, stay_down: bool = False) -> None:
        """Reset every connection.

        Args:
            stay_down: Whether new connections are reset, too, until ``heal()``.
        """
        with self._lock:
            self._is_up = not stay_down
            connections, self._connections = self._connections, []
        for each in connections:
            each.end(WORKER, CLIENT)

    def cut_one_side(self, side: int) -> None:
        """Reset connections on one side; the other side gets no more bytes, and no reset."""
        with self._lock:
            connections = list(self._connections)
        for each in connections:
            each.tells = False
            each.end(side)

    def cut_after(self, size: int) -> None:
        """Reset all connections after ``size`` more bytes, in the middle of a message."""
        with self._lock:
            self._budget = size

    @property
    def is_cut_yet(self) -> bool:
        """Whether the reset that ``cut_after`` requested has happened."""
        with self._lock:
            return self._budget is None

    def heal(self) -> None:
        """Let new connections through."""
        with self._lock:
            self._is_up = True

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def _start(self, work: object, *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            with self._lock:
                is_up = self._is_up
            try:
                far = socket.create_connection(("127.0.0.1", self._target_port if is_up else 1))
            except OSError:
                near.close()
                continue
            connection = _Connection(near, far)
            with self._lock:
                self._connections.append(connection)
            self._start(self._pump, connection, near, far)
            self._start(self._pump, connection, far, near)

    def _pump(self, connection: _Connection, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self._is_spent(len(data)):
                    sink.sendall(data[: len(data) // 2])
                    self.cut()
                    break
                sink.sendall(data)
        connection.pumped(sink)

    def _is_spent(self, size: int) -> bool:
        with self._lock:
            if self._budget is None:
                return False
            self._budget -= size
            if self._budget > 0:
                return False
            self._budget = None
            return True
