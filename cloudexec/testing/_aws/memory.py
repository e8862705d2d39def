"""Enforces the memory limit of a container on a tree of plain processes."""

from __future__ import annotations

import os
import signal
import threading
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import psutil

__all__ = ["MemoryWatcher", "Tree"]

INTERVAL = 0.2
"""Seconds between two measurements."""


class Tree:
    """A main process and the processes that it has started, as far as they were seen."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.main_was_starved = False
        # Processes that left the main process's session, with their start times, because the system
        # reuses process ids.
        self._seen: dict[int, float] = {}
        self._members: dict[int, psutil.Process] = {}

    def members(self, children: Mapping[int, Sequence[int]]) -> list[psutil.Process]:
        """Return the processes that are in the tree now, given the children of each process."""
        found: dict[int, psutil.Process] = {}
        waiting = [self.pid]
        while waiting:
            pid = waiting.pop()
            process = self._members.get(pid)
            if process is None:
                try:
                    process = psutil.Process(pid)
                except psutil.Error:
                    continue
            found[pid] = process
            waiting.extend(children.get(pid, ()))
        self._members = found
        self.see(found.values())
        return list(found.values())

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
        children = _children()
        for tree, limit in limits.items():
            self._check(tree, tree.members(children), limit)

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


def _children() -> Mapping[int, Sequence[int]]:
    """Return the children of each process of this machine that has some."""
    found: dict[int, list[int]] = defaultdict(list)
    if not os.path.exists("/proc/self/stat"):
        for process in psutil.process_iter(["ppid"]):
            found[process.info["ppid"]].append(process.pid)
        return found
    # A fifth of the time that psutil takes, as no object is made for each process.
    for name in os.listdir("/proc"):
        if not name.isdecimal():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb", buffering=0) as file:
                words = file.read(1024)
        except OSError:
            continue  # it has ended
        # Behind the program's name, which may have any character: state, parent.
        parent = int(words[words.rindex(b")") + 1 :].split(None, 2)[1])
        found[parent].append(int(name))
    return found


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
