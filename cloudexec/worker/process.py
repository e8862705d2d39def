"""Makes a slot look like a process of a process pool: a child of the client with a number.

Progress bars, log formats and random generators use the number, the name and the parent of
``multiprocessing.current_process()``.
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
"""Modules whose classes of files are flushed at the end, and need not be closed."""
_LOOK = 0.05
"""Seconds between two checks whether the client still exists."""


def number_of(slot: int, worker: int, slots: int, inheritance: Mapping[str, Any]) -> int:
    """Return the number of a slot's process, which is unique in its executor.

    The first processes of the first workers are numbered from 1 without a gap, as those of a
    process pool are.

    Args:
        slot: The slot's number on its worker, from 1; a slot that replaces another has a new one.
        worker: The number of the worker's launch, from 1.
        slots: Number of slots of a worker.
        inheritance: The settings that slots inherit from the client's process.
    """
    workers = -(-int(inheritance.get("max_workers", slots)) // slots)
    replaced, place = divmod(slot - 1, slots)
    generation, block = divmod(worker - 1, workers)
    return ((generation << 20) + replaced) * workers * slots + block * slots + place + 1


class BatchWorker(process.BaseProcess):
    """The slot's process. By default, its name consists of the class's name and its number."""


class _Client(process.BaseProcess):
    """The client's process, which is not really the parent, so that it cannot be waited for."""

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
        number: The number of this process, from ``number_of``.
        client_pid: The client's process id; 0 if the client is on another machine, in which case
            the parent is the process that this one was forked from.
        authkey: The client's ``authkey`` of multiprocessing; empty to keep this process's own.
        inheritance: The settings that slots inherit from the client's process.
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
    """End this process as the interpreter ends.

    Threads are waited for, functions that are registered with ``atexit`` are called, and buffered
    files are flushed.
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
            pass  # a task has closed the stream, or replaced it by another object
    os._exit(0)


def _finish_files() -> None:
    gc.collect()
    # Found by their types, because isinstance() may run code of the objects.
    files: list[Any] = [each for each in gc.get_objects() if issubclass(type(each), io.IOBase)]
    # A file that writes to another file is flushed before that one.
    for kind in (io.TextIOWrapper, io.IOBase, io.BufferedWriter, io.BufferedRandom):
        for file in files:
            try:
                if type(file) is kind and not file.closed:
                    file.flush()
                elif kind is io.IOBase and type(file).__module__ not in _PLAIN:
                    file.close()  # a compressed file must be closed to be complete
            except BaseException:
                pass  # the disk is full, or the file has been closed
