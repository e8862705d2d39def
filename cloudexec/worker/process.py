"""A slot as a process of Python's: a child of the client, as a process pool's processes are.

Progress bars, log formats and generators of random numbers go by the number, the name and the
parent of ``multiprocessing.current_process()``.
"""

from __future__ import annotations

import gc
import io
import itertools
import os
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from multiprocessing import process
from typing import Any, NoReturn

from cloudexec._forked import run_exit_functions

__all__ = ["become", "leave", "number_of"]

_PLAIN = ("_io", "io", __package__ + ".slot")
"""Where classes of files are from that are flushed, or have nothing to be written."""
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


def leave() -> NoReturn:
    """Do what the interpreter does at its end, and end this process.

    Threads are waited for, functions that are registered for the end are called, and what is in the
    buffers of files is written.
    """
    try:
        threading._shutdown()  # type: ignore[attr-defined]
    except BaseException:
        traceback.print_exc()
    run_exit_functions(_finish)


def _finish() -> NoReturn:
    try:
        _finish_files()
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            pass  # a task closed it, or put something of its own there
    os._exit(0)


def _finish_files() -> None:
    gc.collect()
    # By their types: asking some objects what they are runs code of theirs.
    files: list[Any] = [each for each in gc.get_objects() if issubclass(type(each), io.IOBase)]
    # What writes to another file comes before that one.
    for kind in (io.TextIOWrapper, io.IOBase, io.BufferedWriter, io.BufferedRandom):
        for file in files:
            try:
                if type(file) is kind and not file.closed:
                    file.flush()
                elif kind is io.IOBase and type(file).__module__ not in _PLAIN:
                    file.close()  # a compressed file has an end of its own
            except BaseException:
                pass  # its disk is full, or its file has been closed
