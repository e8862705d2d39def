"""Tasks that the tests run in containers, which have no pytest."""

from __future__ import annotations

import time


def slow(number: int) -> int:
    time.sleep(0.1)
    return number


def fill(mib: int) -> int:
    block = bytearray(mib * 2**20)
    for at in range(0, len(block), 4096):
        block[at] = 1
    return len(block) // 2**20
