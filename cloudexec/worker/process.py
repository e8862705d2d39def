"""A slot as ``multiprocessing`` sees it: a child of the client, as a process pool's processes are.

Progress bars, log formats and generators of random numbers go by the number, the name and the
parent of ``multiprocessing.current_process()``.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping
from multiprocessing import process
from typing import Any

__all__ = ["become", "number_of"]

_LOOK = 0.05
"""Seconds between two looks whether the client is still there."""


def number_of(slot: int, worker: int, slots: int, inheritance: Mapping[str, Any]) -> int:
    """Return the number of a process among all of its executor; none has the same, ever.

    The first processes of the workers that there are at the start count from 1 without a gap, as
    those of a process pool do.

    Args:
        slot: Number of the slot on its worker, from 1; one that takes another's place goes on.
        worker: Number of the worker's launch, from 1.
        slots: Slots of a worker.
        inheritance: What the client said.
    """
    workers = -(-int(inheritance.get("max_workers", slots)) // slots)
    replaced, place = divmod(slot - 1, slots)
    generation, block = divmod(worker - 1, workers)
    return ((generation << 20) + replaced) * workers * slots + block * slots + place + 1


class BatchWorker(process.BaseProcess):
    """This process; its name is that of the class and its number."""


class _Client(process.BaseProcess):
    """The client, which is no parent of this process and cannot be waited for as one."""

    def __init__(self, name: str, pid: int) -> None:
        self._identity = ()
        self._name = name
        self._pid = pid
        self._parent_pid = None
        self._popen = None
        self._closed = False
        self._config: dict[str, Any] = {}
        self._sentinel = -1

    @property
    def ident(self) -> int:
        return self._pid

    pid = ident

    @property
    def sentinel(self) -> int:
        if self._sentinel < 0:
            self._sentinel = os.pidfd_open(self._pid)
        return self._sentinel

    def is_alive(self) -> bool:
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def join(self, timeout: float | None = None) -> None:
        ends = None if timeout is None else time.monotonic() + timeout
        while self.is_alive() and (ends is None or time.monotonic() < ends):
            time.sleep(_LOOK)


def become(number: int, client_pid: int, authkey: bytes, inheritance: Mapping[str, Any]) -> None:
    """Make this process what ``multiprocessing.current_process()`` returns.

    Args:
        number: Which one it is of its executor's.
        client_pid: The client's process, if that is on this machine; 0: elsewhere. The parent is
            then the process that this one was forked from.
        authkey: That of the client; empty: it stays here.
        inheritance: What the client said.
    """
    own: Any = BatchWorker()
    own._identity = (*inheritance.get("identity", ()), number)
    own._name = f"{BatchWorker.__name__}-{':'.join(map(str, own._identity))}"
    own._parent_name = inheritance.get("name", "MainProcess")
    own._parent_pid = client_pid or os.getppid()
    if authkey:
        own.authkey = authkey
    seen_by_all: Any = process
    seen_by_all._process_counter = itertools.count(1)
    seen_by_all._children = set()
    seen_by_all._current_process = own
    seen_by_all._parent_process = _Client(own._parent_name, own._parent_pid)
