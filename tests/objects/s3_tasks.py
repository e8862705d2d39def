"""What the tests of the way through S3 run on workers, which so need not import the tests."""

from __future__ import annotations

import hashlib
import os
import random
import time

MIB = 1024 * 1024
BIG = 20 * MIB  # in parts, where S3 takes them


def random_bytes(seed: int, size: int = BIG) -> bytes:
    return random.Random(seed).randbytes(size)


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def seen(data: bytes, number: int) -> tuple[str, int, int]:
    """Digest, worker and number; slow enough that no worker gets all of them."""
    time.sleep(0.02)
    return digest(data), os.getppid(), number


def make(seed: int, size: int = BIG) -> bytes:
    return random_bytes(seed, size)


def make_once(path: str, seed: int) -> bytes:
    with open(path, "a") as file:
        file.write("made\n")
    return random_bytes(seed)
