"""Forks children of a program that uses executors, by the hundred, and says how they ended.

As a program: ``python fork_storm.py EXECUTORS FORKS [grpc]``; with ``grpc``, that is imported
first. Executors come and go all the while, and each is used, and given up in one of several ways.
The children do what is ordinary for Python, and never touch an executor.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from cloudexec import BatchExecutor

HANGS = 20.0
"""Seconds that a child may take."""


def storm(executors: int, forks: int) -> Counter[str]:
    """Use executors one after another, and fork meanwhile.

    Args:
        executors: How many in all; one of them runs at any time.
        forks: Children in all.

    Returns:
        How children ended, and what was wrong with executors: ``ok`` for all that is right.
    """
    ways = [_forked_and_left, _forked_to_the_end, _process, _manager]
    ends = [_shut_down, _shut_down_later, _killed, _abandoned]
    found: Counter[str] = Counter()
    done = 0
    for number in range(executors):
        executor = BatchExecutor(1)
        wanted = [-i for i in range(20)]
        results = executor.map(_negative, range(20))
        while done < forks * (number + 1) // executors:
            done += 1
            found[ways[done % len(ways)]()] += 1
        found["ok" if list(results) == wanted else "wrong results"] += 1
        ends[number % len(ends)](executor)
    return found


def _negative(value: int) -> int:
    return -value


def _shut_down(executor: BatchExecutor) -> None:
    executor.shutdown()


def _shut_down_later(executor: BatchExecutor) -> None:
    executor.submit(time.sleep, 0.01)
    executor.shutdown(wait=False)


def _killed(executor: BatchExecutor) -> None:
    executor.submit(time.sleep, 60)
    executor.kill_workers()


def _abandoned(executor: BatchExecutor) -> None:
    executor.cycle = executor  # type: ignore[attr-defined]  # so that it is garbage some day


# Children.


def _work() -> None:
    """What a child does: it makes garbage and collects it, and has a thread."""
    garbage: list[Any] = [[number] for number in range(5000)]
    for each in garbage:
        each.append(each)
    del garbage, each
    thread = threading.Thread(target=sum, args=(range(1000),))
    thread.start()
    thread.join()
    gc.collect()
    if sys.platform == "linux" and len(tasks := os.listdir("/proc/self/task")) != 1:
        raise SystemExit(f"{len(tasks)} threads are in a child that has started none")


def _forked_and_left() -> str:
    def child() -> None:
        _work()
        os._exit(0)

    return _fork(child)


def _forked_to_the_end() -> str:
    def child() -> None:
        _work()
        sys.exit(0)

    return _fork(child)


def _fork(child: Callable[[], None]) -> str:
    pid = os.fork()
    if pid == 0:
        child()
    until = time.monotonic() + HANGS
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return _said(os.waitstatus_to_exitcode(status))
        time.sleep(0.001)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return f"a forked child was at work for {HANGS:g} s"


def _process() -> str:
    process = multiprocessing.get_context("fork").Process(target=_work)
    process.start()
    process.join(HANGS)
    if process.exitcode is None:
        process.kill()
        return f"a process was at work for {HANGS:g} s"
    return _said(process.exitcode)


def _manager() -> str:
    with multiprocessing.get_context("fork").Manager() as manager:
        shared = manager.dict()
        shared["key"] = 1
        if dict(shared) != {"key": 1}:
            return "a manager lost what it was given"
    return _said(manager._process.exitcode)  # type: ignore[attr-defined]


def _said(code: int) -> str:
    return "ok" if code == 0 else f"a child ended with exit code {code}"


if __name__ == "__main__":
    if sys.argv[3:] == ["grpc"]:
        import grpc  # noqa: F401
    print(dict(storm(int(sys.argv[1]), int(sys.argv[2]))), flush=True)
    # Where the interpreter's end collects them, too, executors are to end.
