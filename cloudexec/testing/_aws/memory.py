"""Enforces the memory limit of a container on a tree of plain processes."""

from __future__ import annotations

import os
import signal
import threading
from collections import defaultdict
from collections.abc import Iterable

import psutil

__all__ = ["MemoryWatcher", "Tree"]

INTERVAL = 0.2
"""Seconds between two measurements. One costs about 30 microseconds per process of the machine."""


class Tree:
    """A main process and the processes that it has started, as far as they were seen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.main_was_starved = False
        # Processes that left the main process's session, with their start times, because the system
        # reuses process ids.
        self._seen: dict[int, float] = {}

    def see(self, processes: Iterable[psutil.Process]) -> None:
        """Note members of the tree."""
        for process in processes:
            if process.pid != self.pid and process.pid not in self._seen:
                try:
                    self._seen[process.pid] = process.create_time()
                except psutil.Error:
                    pass

    def kill(self) -> None:
        """Send SIGKILL to every member, except a main process that has been waited for."""
        try:
            members = psutil.Process(self.pid).children(recursive=True)
        except psutil.Error:
            members = []
        self.see(members)
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        for pid, started in self._seen.items():
            try:
                process = psutil.Process(pid)
                if process.create_time() == started:
                    process.kill()
            except psutil.Error:
                pass


class MemoryWatcher:
    """Kills the largest process of a tree that exceeds its limit of memory, as a cgroup does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._limits: dict[Tree, int] = {}
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

    def watch(self, tree: Tree, limit: int) -> None:
        """Limit a tree to ``limit`` bytes from now on."""
        with self._lock:
            self._limits[tree] = limit
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._run, name="fake-aws-memory", daemon=True
                )
                self._thread.start()

    def forget(self, tree: Tree) -> None:
        """Stop watching a tree."""
        with self._lock:
            self._limits.pop(tree, None)

    def close(self) -> None:
        """Stop watching all trees."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._closed.wait(INTERVAL):
            with self._lock:
                limits = dict(self._limits)
            if limits:
                self._look(limits)

    def _look(self, limits: dict[Tree, int]) -> None:
        children: dict[int, list[psutil.Process]] = defaultdict(list)
        by_pid = {}
        for process in psutil.process_iter(["ppid"]):
            children[process.info["ppid"]].append(process)
            by_pid[process.pid] = process
        for tree, limit in limits.items():
            members = []
            waiting = [by_pid[tree.pid]] if tree.pid in by_pid else []
            while waiting:
                process = waiting.pop()
                members.append(process)
                waiting.extend(children[process.pid])
            tree.see(members)
            self._check(tree, members, limit)

    def _check(self, tree: Tree, members: list[psutil.Process], limit: int) -> None:
        sizes = {process: _resident(process) for process in members}
        if sum(sizes.values()) <= limit:
            return
        # Forked processes share pages, which a cgroup counts once, so a second look is exact.
        sizes = {process: _proportional(process) for process in members}
        if sum(sizes.values()) <= limit:
            return
        largest = max(sizes, key=lambda process: sizes[process])
        with self._lock:
            if tree not in self._limits:
                return
            if largest.pid == tree.pid:
                tree.main_was_starved = True
            try:
                largest.kill()
            except psutil.Error:
                pass


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _proportional(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
    except (psutil.Error, OSError):
        return _resident(process)
    # Only Linux has the proportional size. On other systems, the unique size is a lower bound.
    return int(getattr(full, "pss", 0) or full.uss)
