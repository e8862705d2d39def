"""Helpers of the tests of faults: waiting, workers' processes, clients, and processes left over."""

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
"""Seconds after which a test stops waiting and fails."""
PACKAGE = str(Path(cloudexec.__file__).parents[1])
HERE = str(Path(__file__).parent)


def start(mode: str, workers: int = 2, **options: Any) -> BatchExecutor:
    """Start an executor whose workers share the client's memory, or are reached over TLS."""
    if mode == "wire":
        options.setdefault("launcher", Local())
        options["listen"] = "127.0.0.1:0"
    return BatchExecutor(workers, output="off", **options)


def until(condition: Callable[[], Any]) -> Any:
    """Call ``condition`` until its result is true; return the result."""
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
    """Return a client's running supervisors, zygotes and slots, the oldest first."""
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
    """Return all descendants of a process, except those of multiprocessing itself."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if "multiprocessing" not in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass  # it has ended
    return found


def assert_gone(processes: list[psutil.Process]) -> None:
    """Wait until these processes have ended, whichever process reaps them."""
    until(lambda: not [process for process in processes if is_alive(process)])


def start_client(script: str, *args: str, **environment: str) -> subprocess.Popen[str]:
    """Run a script that uses an executor in a new process."""
    path = os.pathsep.join((environment.pop("PYTHONPATH", ""), PACKAGE, HERE)).lstrip(os.pathsep)
    return subprocess.Popen(
        [sys.executable, "-c", script, *args],
        env={**os.environ, **environment, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
