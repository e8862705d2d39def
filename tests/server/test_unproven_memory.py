"""What peers may make the client hold before they have proved anything."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hostile_peers import (
    END_HEADERS,
    GOAWAY,
    HEADERS,
    MIB,
    PING,
    RST,
    SESSION,
    SETTINGS,
    WINDOW,
    Frames,
    frame,
    headers,
    message,
    secured,
)

from cloudexec._launchers.base import Contact

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="no /proc to measure memory by"),
]

VICTIM = """
import json, sys, threading, psutil
from hostile_peers import contact_of, double, executor_at

executor = executor_at("tls")
assert executor.submit(double, 1).result(30) == 2
contact = contact_of(executor)
facts = (contact.target, contact.executor_id, contact.key.hex(), contact.certificate_sha256)
print(json.dumps(facts), flush=True)
process, over = psutil.Process(), threading.Event()
before = peak = process.memory_info().rss

def watch():
    global peak
    while not over.wait(0.02):
        peak = max(peak, process.memory_info().rss)

watching = threading.Thread(target=watch)
watching.start()
sys.stdin.readline()
over.set()
watching.join()
print(peak - before, flush=True)
assert executor.submit(double, 2).result(30) == 4
executor.kill_workers()
"""


class Hoarder:
    """A peer that sends all that it may, lets its windows grow, and never ends a message."""

    def __init__(self, contact: Contact) -> None:
        self._connection = secured(contact)
        self._connection.settimeout(None)
        self._changed = threading.Condition()
        self._initial = self._whole = 65535
        self._windows: dict[int, int] = {}
        self._frames = Frames(self._connection)
        self.sent = 0
        self.is_over = False
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        try:
            with self._connection.makefile("rb") as frames:
                while len(head := frames.read(9)) == 9:
                    content = frames.read(int.from_bytes(head[:3]))
                    with self._changed:
                        self._take(head[3], head[4], int.from_bytes(head[5:]), content)
                        self._changed.notify_all()
        except (OSError, ValueError):
            pass
        with self._changed:
            self.is_over = True
            self._changed.notify_all()

    def _take(self, kind: int, flags: int, stream: int, content: bytes) -> None:
        if kind == SETTINGS and not flags:
            for at in range(0, len(content), 6):
                if int.from_bytes(content[at : at + 2]) == 4:
                    value = int.from_bytes(content[at + 2 : at + 6])
                    for each in self._windows:
                        self._windows[each] += value - self._initial
                    self._initial = value
            self._frames.raw(frame(SETTINGS, 1, 0))
        elif kind == PING and not flags:
            self._frames.raw(frame(PING, 1, 0, content))
        elif kind == WINDOW and stream:
            if stream in self._windows:
                self._windows[stream] += int.from_bytes(content)
        elif kind == WINDOW:
            self._whole += int.from_bytes(content)
        elif kind == RST or (kind == HEADERS and flags & 1):
            self._windows.pop(stream, None)
        elif kind == GOAWAY:
            self.is_over = True

    def hoard(self, streams: int, until: float) -> None:
        """Send a message of almost 8 MiB over each of many streams, but for its end."""
        content = message(bytes(8 * MIB - 64))[:-1]
        places = {}
        with self._changed:
            for stream in range(1, 2 * streams, 2):
                self._windows[stream] = self._initial
                places[stream] = 0
                self._frames.raw(frame(HEADERS, END_HEADERS, stream, headers(SESSION)))
            while not self.is_over and (left := until - time.monotonic()) > 0:
                if not self._send_some(places, content):
                    self._changed.wait(left)

    def _send_some(self, places: dict[int, int], content: bytes) -> int:
        count = 0
        for stream, window in list(self._windows.items()):
            at = places[stream]
            size = min(window, self._whole, 16384, len(content) - at)
            if size > 0:
                self._frames.raw(frame(0, 0, stream, content[at : at + size]))
                places[stream] += size
                self._windows[stream] -= size
                self._whole -= size
                count += size
        self.sent += count
        return count

    def close(self) -> None:
        with self._changed:
            self.is_over = True
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        self._connection.close()
        self._reading.join()


@pytest.fixture
def victim() -> Iterator[tuple[Contact, subprocess.Popen[str]]]:
    path = os.pathsep.join([os.path.dirname(__file__), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, "-c", VICTIM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
        text=True,
    ) as process:
        assert process.stdout is not None
        target, executor_id, key, sha256 = json.loads(process.stdout.readline())
        yield Contact(target, executor_id, bytes.fromhex(key), sha256), process
        process.kill()


@pytest.mark.parametrize(("peers", "streams"), [(60, 1), (3, 100)])
def test_strangers_have_little_held_for_them(
    victim: tuple[Contact, subprocess.Popen[str]], peers: int, streams: int
) -> None:
    """Messages of four of them, 8 MiB each, and 64 KiB for each of the others."""
    contact, process = victim
    hoarders = [Hoarder(contact) for _ in range(peers)]
    until = time.monotonic() + 2.5
    threads = [threading.Thread(target=each.hoard, args=(streams, until)) for each in hoarders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    grown = int(process.stdout.readline())
    print(f"grown by {grown / MIB:.0f} MiB")
    for hoarder in hoarders:
        hoarder.close()
    assert sum(hoarder.sent for hoarder in hoarders) > 32 * MIB  # they tried
    assert grown / MIB < 110
    assert process.wait(30) == 0
