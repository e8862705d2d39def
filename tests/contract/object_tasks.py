"""Tasks of the tests of large arguments and results, in a module that workers import."""

from __future__ import annotations

import hashlib
import os
import signal
from dataclasses import dataclass
from typing import Any

import numpy as np

KEPT: dict[str, Any] = {}
SETTING: Any = None


def total(*values: Any) -> float:
    return float(sum(np.asarray(value).sum() for value in values))


def total_of_held(held: Any) -> float:
    """Add up all arrays in a nested container."""
    if isinstance(held, dict):
        return sum(map(total_of_held, held.values()))
    if isinstance(held, (list, tuple)):
        return sum(map(total_of_held, held))
    if isinstance(held, Holder):
        return total_of_held(held.array) + held.other
    return float(np.asarray(held).sum())


@dataclass
class Holder:
    array: Any
    other: float = 0.0


def overwrite(array: Any, value: int) -> float:
    before = float(array.sum())
    array[:] = value
    return before


def keep_for_later(name: str, array: Any) -> int:
    KEPT[name] = array
    return os.getpid()


def digest_of_kept(name: str) -> tuple[int, str]:
    return os.getpid(), digest(KEPT[name]) if name in KEPT else ""


def digest(value: Any) -> str:
    return hashlib.sha256(value).hexdigest()


def set_up(value: Any) -> None:
    global SETTING
    SETTING = value


def total_of_setting(_: int = 0) -> float:
    return float(SETTING.sum())


def slow_total(*values: Any) -> float:
    import time

    time.sleep(0.3)
    return total(*values)


def filled(size: int, value: int = 1) -> Any:
    return np.full(size, value, np.uint8)


def arrays(count: int, size: int) -> list[Any]:
    return [np.full(size, index % 251, np.uint8) for index in range(count)]


def large_parts(count: int, size: int) -> dict[str, Any]:
    """Return what is pickled in large pieces, some of them twice, with arrays and small ones."""
    found: dict[str, Any] = {}
    for number in range(count):
        found[f"bytes {number}"] = bytes([number]) * size
        found[f"small {number}"] = b"small"
        found[f"array {number}"] = np.full(20_000, number)
        found[f"again {number}"] = found[f"bytes {number}"]
    found["text"] = "ä" * (size // 2)
    found["list"] = [bytearray(b"a" * size), ("b" * size,), b"c" * (size - 1), b"d" * (size + 1)]
    return found


def mixed(size: int) -> dict[str, Any]:
    return {
        "array": np.arange(size),
        "bytes": bytes(size),
        "bytearray": bytearray(size),
        "text": "x" * size,
        "empty": np.zeros(0),
        "small": list(range(20_000)),
    }


def add(*values: Any) -> Any:
    return sum(values[1:], values[0])


def grow(value: Any) -> Any:
    return value + 1


def add_and_note(path: str, *values: Any) -> Any:
    """Return the sum, and write a trace of the call to a file."""
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, b".")
    os.close(descriptor)
    return add(*values)


def filled_and_note(path: str, size: int, value: int = 1) -> Any:
    add_and_note(path, 0)
    return filled(size, value)


def nothing(_: int = 0) -> None:
    return None


def supervisor() -> int:
    return os.getppid()


class Explodes:
    """Raises when it is unpickled."""

    def __init__(self, error: str = "ValueError", size: int = 200_000) -> None:
        self.error = error
        self.data = np.zeros(size)

    def __setstate__(self, state: dict[str, Any]) -> None:
        raise getattr(__builtins__, state["error"], None) or __builtins__[state["error"]](  # type: ignore[index]
            "on purpose"
        )


class Kills:
    """Ends the process that unpickles it."""

    def __init__(self, size: int = 200_000) -> None:
        self.data = np.zeros(size)

    def __setstate__(self, state: dict[str, Any]) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Bloats:
    """Uses more memory than is allowed when it is unpickled."""

    def __init__(self, mib: int) -> None:
        self.mib = mib
        self.data = np.zeros(200_000)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.taken = bytearray(b"x") * (state["mib"] * 2**20)
        KEPT["bloat"] = self.taken
        import time

        time.sleep(30)  # until the worker notices


class Bound:
    """An object whose methods, or which itself, are submitted, and are pickled with its state."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def add(self, *values: Any) -> float:
        return total(self.value, *values)

    __call__ = add


def called(fn: Any, *args: Any) -> Any:
    return fn(*args)


def nested_executor(value: Any) -> float:
    """Use an executor that the task makes, with the task's argument."""
    from cloudexec import BatchExecutor

    with BatchExecutor(1) as inner:
        return float(inner.submit(total, value).result(timeout=60))
