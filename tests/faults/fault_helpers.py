"""What the tests of faults share: waiting, processes of workers, clients, what is left."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

import cloudexec
from cloudexec import BatchExecutor, Local

__all__ = [
    "PATIENCE",
    "assert_gone",
    "descendants",
    "is_alive",
    "start",
    "start_client",
    "until",
    "worker_processes",
]

PATIENCE = 40.0
"""Seconds after which what was to happen counts as never happening."""
PACKAGE = str(Path(cloudexec.__file__).parents[1])
HERE = str(Path(__file__).parent)


def start(mode: str, workers: int = 2, **options: Any) -> BatchExecutor:
    """Start an executor whose workers share the client's memory, or are reached over TLS."""
    if mode == "wire":
        options.setdefault("launcher", Local())
        options["listen"] = "127.0.0.1:0"
    return BatchExecutor(workers, output="off", **options)


def until(condition: Callable[[], Any]) -> Any:
    """Ask again and again until there is an answer that is true; return it."""
    deadline = time.monotonic() + PATIENCE
    pause = threading.Event()
    while not (answer := condition()):
        assert time.monotonic() < deadline, f"not so after {PATIENCE} s"
        pause.wait(0.002)
    return answer


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return [child for child in process.children() if is_alive(child)]
    except psutil.NoSuchProcess:
        return []


def worker_processes(pid: int | None = None) -> dict[str, list[psutil.Process]]:
    """Return a client's supervisors, zygotes and slots that live now, the oldest first."""
    found: dict[str, list[psutil.Process]] = {"supervisor": [], "zygote": [], "slot": []}
    for supervisor in _children(psutil.Process(pid)):
        try:
            command = " ".join(supervisor.cmdline())
        except psutil.NoSuchProcess:
            continue
        if "cloudexec.worker" not in command:
            continue
        found["supervisor"].append(supervisor)
        for zygote in _children(supervisor):
            found["zygote"].append(zygote)
            found["slot"] += _children(zygote)
    return found


def descendants(pid: int | None = None) -> list[psutil.Process]:
    """Return all that runs below a process, but for multiprocessing's own."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "multiprocessing" not in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass  # it has ended
    return found


def assert_gone(processes: list[psutil.Process]) -> None:
    """Wait until these have ended; whoever reaps them."""
    until(lambda: not [process for process in processes if is_alive(process)])


def start_client(script: str, *args: str, **environment: str) -> subprocess.Popen[str]:
    """Run a script that uses an executor, in a process of its own."""
    path = os.pathsep.join((environment.pop("PYTHONPATH", ""), PACKAGE, HERE)).lstrip(os.pathsep)
    return subprocess.Popen(
        [sys.executable, "-c", script, *args],
        env={**os.environ, **environment, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
