"""A line between two network namespaces that delays packets and loses some of them.

It is a process with one end of a network device in each namespace (``TUN``), so it needs no support
for slow networks in the kernel. Run as a program: the two namespaces, the delay of each packet in
seconds, and the share of packets that are lost.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import select
import struct
import subprocess
import sys
import time
from collections import deque
from types import TracebackType
from typing import IO, cast

__all__ = ["DEVICE", "SlowLine"]

DEVICE = "slow0"
"""Name of the device in each namespace."""
_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_PACKET = 65536
_KEPT = 500
"""Packets that each direction keeps at most: the others are lost, as in a router."""


class SlowLine:
    """A line that exists as long as the context is entered.

    Args:
        first: Name of a namespace.
        second: Name of another one.
        delay: Seconds that each packet takes.
        loss: Share of packets that are lost.
    """

    def __init__(self, first: str, second: str, *, delay: float, loss: float) -> None:
        self._command = [sys.executable, __file__, first, second, str(delay), str(loss)]

    def __enter__(self) -> SlowLine:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._output.readline() == b"ready\n", "the line cannot be made"
        return self

    @property
    def _output(self) -> IO[bytes]:
        return cast("IO[bytes]", self._process.stdout)

    def end(self) -> dict[str, int]:
        """End the line; return how many packets it has ``passed`` and ``lost``."""
        said, _ = self._process.communicate(timeout=20)
        passed, lost = map(int, said.split())
        return {"passed": passed, "lost": lost}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.wait()
        for each in (self._process.stdin, self._process.stdout):
            if each is not None:
                each.close()


def _device(namespace: str) -> int:
    """Enter a namespace, and make the device there; return its other end."""
    library = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{namespace}") as file:
        if library.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH22x", DEVICE.encode(), _IFF_TUN | _IFF_NO_PI))
    return end


def _main(first: str, second: str, delay: float, loss: float) -> None:
    """Move packets until the standard input is closed."""
    ends = [_device(first), _device(second)]
    other = dict(zip(ends, reversed(ends), strict=True))
    waiting: dict[int, deque[tuple[float, bytes]]] = {end: deque() for end in ends}
    passed = lost = 0
    choose = random.Random(1)
    print("ready", flush=True)
    while True:
        now = time.monotonic()
        for end, packets in waiting.items():
            while packets and packets[0][0] <= now:
                try:
                    os.write(end, packets.popleft()[1])
                except OSError:  # a device that is not up yet
                    lost += 1
                else:
                    passed += 1
        due = [packets[0][0] for packets in waiting.values() if packets]
        timeout = max(0.0, min(due) - now) if due else None
        readable, _, _ = select.select([*ends, sys.stdin], [], [], timeout)
        if sys.stdin in readable:
            break
        for end in readable:
            packet = os.read(end, _PACKET)
            to = other[end]
            if choose.random() < loss or len(waiting[to]) >= _KEPT:
                lost += 1
            else:
                waiting[to].append((time.monotonic() + delay, packet))
    print(passed, lost)


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]))
