"""What the tests of faults run on workers, and what breaks on its way; importable there."""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

EXIT_CODE = 7
SIGNAL = signal.SIGKILL
LIMIT = 100 * 2**20
"""Bytes that a task may take where its memory is limited."""


def _error() -> None:
    raise ArithmeticError("broken on purpose")


def _exit() -> None:
    os._exit(EXIT_CODE)


def _signal() -> None:
    os.kill(os.getpid(), SIGNAL)
    signal.pause()


def _memory_error() -> None:
    """Ask for more than any process may have."""
    bytearray(2**60)


def _outgrow() -> None:
    """Take three times what was asked for, and keep it."""
    taken = bytearray(b"x") * (3 * LIMIT)
    signal.pause()
    del taken


def _hang() -> None:
    signal.pause()


FAULTS: dict[str, Callable[[], None]] = {
    "error": _error,
    "exit": _exit,
    "signal": _signal,
    "memory refused": _memory_error,
    "memory limit": _outgrow,
    "hang": _hang,
}


def break_down(fault: str) -> None:
    """Do what the fault's name says, here."""
    FAULTS[fault]()
    raise AssertionError(f"{fault} went by")


class Breaks:
    """Breaks whoever unpickles it."""

    def __init__(self, fault: str) -> None:
        self._fault = fault

    def __reduce__(self) -> tuple[Any, ...]:
        return break_down, (self._fault,)


class BreaksWhenPickled:
    """Breaks whoever pickles it."""

    def __init__(self, fault: str) -> None:
        self._fault = fault

    def __reduce__(self) -> tuple[Any, ...]:
        break_down(self._fault)
        raise AssertionError


def identity(value: object = None) -> object:
    return value


def breaks_as_result(fault: str) -> object:
    return BreaksWhenPickled(fault)


def surrounded(fault: str) -> list[object]:
    """Return much, and in the middle of it what breaks: by then, much has left the process."""
    return [bytes(3_000_000), large(3_000_000), BreaksWhenPickled(fault), large(3_000_000)]


def large(size: int) -> Any:
    return np.ones(size, np.uint8)


def size_of(value: Any) -> int:
    return len(value)


def large_without_room(size: int) -> Any:
    """Return what this process may write to no file, in memory or on disk."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    return large(size)


def fill(path: str) -> None:
    """Write to a file until there is no room."""
    with open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(100_000))


class FillsWhenPickled:
    """Writes to a file until there is no room, when it is pickled."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        fill(self._path)
        raise AssertionError


def mark(path: str) -> None:
    """Leave a trace of one call: a byte appended at once."""
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, b"x")
    os.close(fd)


def mark_and_wait(
    directory: str,
    number: int,
    seconds: float,
    size: int = 0,
    argument: Any = b"",
    gate: str = "",
) -> tuple[int, int, Any]:
    """Leave a trace, take a while, or until a file is there, and return much or little."""
    mark(os.path.join(directory, str(number)))
    time.sleep(seconds)
    while gate and not os.path.exists(gate):
        time.sleep(0.01)
    return number, len(argument), np.full(size, number % 251, np.uint8)


def tell_and_wait(told: str, gate: str) -> int:
    """Say who this is on one pipe, and go on when there is a byte on the other."""
    with open(told, "w") as file:
        file.write(f"{os.getpid()}\n")
    with open(gate, "rb", buffering=0) as file:
        file.read(1)
    sys.stdout.flush()
    return os.getpid()
