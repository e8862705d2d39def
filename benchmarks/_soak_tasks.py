"""The tasks of soak.py, each of which leaves a result or a trace that can be checked."""

from __future__ import annotations

import hashlib
import os
import time

__all__ = [
    "Mistake",
    "add",
    "append_once",
    "digest",
    "exit_at_once",
    "exit_the_first_time",
    "large",
    "make_array",
    "raise_mistake",
    "say",
    "scramble",
    "slow",
    "total",
]


class Mistake(Exception):
    """An exception that some tasks raise on purpose."""


def scramble(number: int) -> int:
    """Return a result that differs from that of each other task, with little work."""
    return number * 2_654_435_761 % 4_294_967_291


def slow(number: int, seconds: float) -> int:
    time.sleep(seconds)
    return scramble(number)


def add(*numbers: int) -> int:
    return sum(numbers)


def large(number: int, size: int) -> bytes:
    """Return a result so large that it is sent in pieces; ``digest()`` checks it."""
    seed = hashlib.sha256(number.to_bytes(8, "little")).digest()
    return (seed * (size // len(seed) + 1))[:size]


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def make_array(number: int, size: int) -> list[bytes]:
    """Return a value that is kept on the worker."""
    return [large(number, size), large(number + 1, size)]


def total(parts: list[bytes]) -> int:
    return sum(map(len, parts)) + sum(part[0] for part in parts)


def say(number: int) -> int:
    for line in range(20):
        print(f"{number}: line {line} of 20")
    return scramble(number)


def raise_mistake(number: int) -> None:
    raise Mistake(number)


def exit_at_once() -> None:
    os._exit(7)


def exit_the_first_time(path: str, number: int) -> int:
    """End the process, unless an earlier attempt has made the file."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return scramble(number)
    os._exit(7)


def append_once(path: str, number: int, seconds: float) -> int:
    """Write a line for each run, for tasks that must run at most once."""
    log = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.write(log, number.to_bytes(8, "little"))
    os.close(log)
    time.sleep(seconds)
    return scramble(number)
