"""What the tests of relays run on workers, which so need not import the tests."""

from __future__ import annotations

import os
import time
import zlib


def square(x: int) -> int:
    return x * x


def pause(path: str, x: int, seconds: float = 60.0) -> int:
    """Say that it runs, and wait to be told to end."""
    with open(f"{path}/{x}.{time.monotonic_ns()}.began", "w"):
        pass
    deadline = time.monotonic() + seconds
    while not os.path.exists(f"{path}/go"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return x


def noted(x: int, data: bytes, directory: str) -> tuple[int, int]:
    """Leave a line for each time that this is run; return ``x`` and a sum of the data."""
    with open(f"{directory}/{os.getpid()}", "a") as file:
        file.write(f"{x}\n")
    return x, zlib.crc32(data)
