"""A program with a low limit of open files: ``few_files.py WHAT LIMIT WORKERS LINES``."""

from __future__ import annotations

import json
import logging
import os
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from cloudexec import BatchExecutor, Local

_kept: list[int] = []


def _take_all() -> int:
    """Open as many files as this process may have open."""
    try:
        while True:
            _kept.append(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return len(_kept)


def _note(number: int, lines: str, kind: type = bytes, size: int = 0) -> Any:
    with open(lines, "a") as file:
        file.write(f"{number}\n")
    return kind(size)


def _limit() -> int:
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _said(future: Future[Any]) -> str:
    error = future.exception(50)
    return "" if error is None else f"{type(error).__name__}: {error}"


def at_the_start(executor: BatchExecutor, lines: str) -> list[str]:
    """Run tasks with the files that the limit leaves."""
    return [_said(each) for each in [executor.submit(_note, n, lines) for n in range(100)]]


def in_the_client(executor: BatchExecutor, lines: str) -> list[str]:
    """Run tasks with large results while this program has no file left; then close its files."""
    executor.submit(_note, -1, lines).result(30)
    _take_all()
    futures = [executor.submit(_note, n, lines) for n in range(6)]
    # One result is sent over the direct socket, the other one is left in a file. Until they are
    # received, each blocks its slot.
    futures.append(executor.submit(_note, 6, lines, bytes, 3_000_000))
    futures.append(executor.submit(_note, 7, lines, bytearray, 3_000_000))
    while os.stat(lines).st_size < len("-1\n") + 8 * len("0\n"):  # until all tasks have run
        time.sleep(0.01)
    for fd in _kept:
        os.close(fd)
    return [_said(future) for future in futures]


def to_the_end(executor: BatchExecutor, lines: str) -> list[str]:
    """Run tasks whose large results need no file here, while this program has no file left."""
    executor.submit(_note, -1, lines).result(30)
    _take_all()
    ways = [bytes, bytes, bytes, bytes, bytes]
    futures = [executor.submit(_note, n, lines, way, 300_000) for n, way in enumerate(ways)]
    return [_said(future) for future in futures]


def in_a_slot(executor: BatchExecutor, lines: str) -> list[str]:
    """Run a task that uses up the open files of its process, and more tasks in that process."""
    taken = executor.submit(_take_all).result(30)
    assert _limit() - 40 < taken < _limit()  # the limit is the program's, as cloudexec sets none
    return [
        _said(executor.submit(_note, 0, os.devnull)),
        _said(executor.submit(len, bytes(3_000_000))),
        _said(executor.submit(bytes, 3_000_000)),
    ]


if __name__ == "__main__":
    what, limit, workers, lines = sys.argv[1:]
    logging.basicConfig(format="%(message)s")
    run: Callable[[BatchExecutor, str], list[str]] = globals()[what]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = (int(limit), hard if what == "in_a_slot" else int(limit))
    resource.setrlimit(resource.RLIMIT_NOFILE, files)
    with BatchExecutor(int(workers), launcher=Local(), retries=2) as executor:
        print(json.dumps(run(executor, lines)))
