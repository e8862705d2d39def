"""Forks hundreds of children of a program that uses executors, and reports how they ended.

It can be run as ``python fork_storm.py EXECUTORS FORKS [grpc]``; with ``grpc`` that package is
imported first. Meanwhile executors are made, used, and abandoned in one of several ways. The
children run ordinary Python code, and never use an executor.
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
        executors: Total number of executors, which run one after another.
        forks: Total number of children.

    Returns:
        Numbers of the ways in which children ended and of errors of executors; ``ok`` counts the
        children without an error.
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
    executor.cycle = executor  # type: ignore[attr-defined]  # only the garbage collector frees it


# Children.


def _work() -> None:
    """Make and collect garbage, and run a thread, in a child."""
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
    # Executors must also end if only the end of the interpreter collects them.
