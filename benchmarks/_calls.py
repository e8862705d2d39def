"""The functions that the benchmarks run as tasks, in a module that workers import."""

from __future__ import annotations

import importlib
import os
import time
from typing import Any

_blobs: dict[int, bytes] = {}
_arrays: dict[int, Any] = {}


def noop(value: object = None) -> None:
    """Do nothing, with any argument or none."""


def total(*values: int) -> int:
    """Take the results of other tasks."""
    return sum(values)


def sleep(seconds: float) -> float:
    """Sleep unless ``seconds`` is 0; return the time afterwards, by the clock of all processes."""
    if seconds:
        time.sleep(seconds)
    return time.monotonic()


def spin(seconds: float) -> None:
    """Keep a core busy."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def length(data: bytes) -> int:
    """Take a large argument, return a small result."""
    return len(data)


def blob(size: int) -> bytes:
    """Return a large result, made once in each process, so that only its transfer is measured."""
    if size not in _blobs:
        _blobs.clear()
        _blobs[size] = b"x" * size
    return _blobs[size]


def double(array: Any) -> Any:
    """Take an array, return another one of the same size."""
    return array * 2


def first(array: Any) -> float:
    """Take an array and read one page of it."""
    return float(array[0])


def add_up(array: Any) -> float:
    """Take an array and read all of it."""
    return float(array.sum())


def ones(count: int) -> Any:
    """Return an array, made once in each process, so that only its transfer is measured."""
    if count not in _arrays:
        import numpy

        _arrays.clear()
        _arrays[count] = numpy.ones(count)
    return _arrays[count]


def wait_for_file(path: str, started: str) -> None:
    """Occupy a slot until the file ``path`` exists; create ``started`` when it is occupied."""
    with open(started, "w"):
        pass
    while not os.path.exists(path):
        time.sleep(0.001)


def use(modules: tuple[str, ...], seconds: float) -> None:
    """Import modules, then sleep."""
    for name in modules:
        importlib.import_module(name)
    time.sleep(seconds)
