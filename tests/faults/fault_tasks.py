"""Tasks of the tests of faults, and values that fail when they are pickled; workers import it."""

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
    """Request more memory than any process can have."""
    bytearray(2**60)


def _outgrow() -> None:
    """Use three times the memory that the task may have, and keep it."""
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
    """Cause the fault of this name in this process."""
    FAULTS[fault]()
    raise AssertionError(f"{fault} went by")


class Breaks:
    """Causes a fault in the process that unpickles it."""

    def __init__(self, fault: str) -> None:
        self._fault = fault

    def __reduce__(self) -> tuple[Any, ...]:
        return break_down, (self._fault,)


class BreaksWhenPickled:
    """Causes a fault in the process that pickles it."""

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
    """Return large data with a faulty value in the middle, so that part of it is sent before."""
    return [bytes(3_000_000), large(3_000_000), BreaksWhenPickled(fault), large(3_000_000)]


def large(size: int) -> Any:
    return np.ones(size, np.uint8)


def size_of(value: Any) -> int:
    return len(value)


def large_without_room(size: int) -> Any:
    """Return a large value that this process cannot write to any file, in memory or on disk."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    return large(size)


def fill(path: str) -> None:
    """Write to a file until the disk is full."""
    with open(path, "wb", buffering=0) as file:
        while True:
            file.write(bytes(100_000))


class FillsWhenPickled:
    """Writes to a file until the disk is full, when it is pickled."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        fill(self._path)
        raise AssertionError


def mark(path: str) -> None:
    """Append one byte to a file, as a trace of one call."""
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
    """Leave a trace, take some time or wait for a file, and return a large or small result."""
    mark(os.path.join(directory, str(number)))
    time.sleep(seconds)
    while gate and not os.path.exists(gate):
        time.sleep(0.01)
    return number, len(argument), np.full(size, number % 251, np.uint8)


def tell_and_wait(told: str, gate: str) -> int:
    """Write this process's id to one pipe, and wait for a byte on the other."""
    with open(told, "w") as file:
        file.write(f"{os.getpid()}\n")
    with open(gate, "rb", buffering=0) as file:
        file.read(1)
    sys.stdout.flush()
    return os.getpid()
