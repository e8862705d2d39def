"""Tasks of the journal's tests; each call leaves a file that shows that it has run."""

from __future__ import annotations

import os
import random
import time
import uuid
from pathlib import Path
from typing import Any


def count(directory: str, name: object) -> None:
    """Note that a call has run."""
    Path(directory, f"{name}.{uuid.uuid4()}").touch()


def calls(directory: str | Path) -> dict[str, int]:
    """Return how often each call has run."""
    found: dict[str, int] = {}
    for path in Path(directory).iterdir():
        name = path.name.rpartition(".")[0]
        found[name] = found.get(name, 0) + 1
    return found


def square(directory: str, x: int) -> int:
    count(directory, x)
    return x * x


def draw(directory: str) -> float:
    count(directory, "draw")
    return random.SystemRandom().random()


def large(directory: str, size: int) -> bytes:
    count(directory, size)
    return os.urandom(16) * (size // 16)


def total(directory: str, data: Any) -> int:
    count(directory, "total")
    return len(data)


def words(directory: str, words: set[str], *, factor: int = 1) -> int:
    count(directory, "words")
    return len(words) * factor


def gated(directory: str, x: int, free: int) -> int:
    """Note the call; if ``x`` is at least ``free``, first wait until the gate's file exists."""
    while x >= free and not Path(directory, "..", "open").exists():
        time.sleep(0.01)
    count(directory, x)
    return x * x


def fails_once(directory: str) -> str:
    seen = calls(directory).get("fails", 0)
    count(directory, "fails")
    if not seen:
        raise ValueError("the first time")
    return "well"


def talks(directory: str) -> str:
    count(directory, "talks")
    for line in range(100):
        print("line", line)
    return "done"


class Model:
    """An object with a state, whose method is a task."""

    def __init__(self, directory: str, weight: int) -> None:
        self.directory = directory
        self.weight = weight

    def predict(self, x: int) -> int:
        count(self.directory, f"predict-{x}")
        return self.weight * x


def held(directory: str, x: int) -> int:
    """Note that the call has begun, wait until the gate's file exists, and note the end."""
    count(directory, f"begun-{x}")
    while not Path(directory, "..", "open").exists():
        time.sleep(0.01)
    count(directory, x)
    return x * x


def roll(directory: str, x: int) -> bytes:
    """Do the same as ``held``, with a result that is too large for a message."""
    held(directory, x)
    return os.urandom(3_000_000 + x)


_noted = ""


def note(what: str) -> None:
    """Note a text, as an initializer of workers."""
    global _noted
    _noted = what
