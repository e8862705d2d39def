"""Stages of the graph tests, in a module that workers import."""

from __future__ import annotations

import os
import threading
from typing import Any

from contract_tasks import append, hold

from cloudexec import stage

LOCK = threading.Lock()  # cannot be pickled, so these functions must be pickled by name


@stage
def value(x: Any, log: str = "") -> Any:
    with LOCK:
        if log:
            append(log, "ran")
        return x


@stage(name="sum", timeout=30.0)
def total(*values: Any) -> Any:
    flat = values[0] if len(values) == 1 else values
    return sum(flat)


@stage
def repeated(value: int, size: int, log: str) -> bytearray:
    append(log, "ran")
    return bytearray([value]) * size


@stage
def total_if(path: str, parts: list[bytearray]) -> int:
    if not os.path.exists(path):
        raise RuntimeError("not yet")
    return sum(map(sum, parts))


@stage(retries=0)
def divide(x: float, y: float) -> float:
    return x / y


@stage
def wait_at_gate(told: str, gate: str, word: str = "begun") -> str:
    hold(told, gate)
    return word


class Stages:
    """A class that a user has as a namespace for stages."""

    @stage
    @staticmethod
    def length(x: Any) -> int:
        with LOCK:
            return len(x)
