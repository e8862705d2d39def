"""Finds the processors, memory and GPUs of this machine that its workers may use."""

from __future__ import annotations

import math
import os
import re

from cloudexec._config import WorkerCapacity

__all__ = ["this_machine"]

_NVIDIA = re.compile(r"nvidia(\d+)")


def this_machine(root: str = "/") -> WorkerCapacity:
    """Return the resources that this process and its children may use together.

    Args:
        root: Folder with the system's files, which tests replace.
    """
    groups = _groups(root)
    gpu_ids = _gpus(root)
    return WorkerCapacity(
        cpus=_cpus(groups), memory=_memory(root, groups), gpus=len(gpu_ids), gpu_ids=gpu_ids
    )


def _cpus(groups: list[str]) -> float:
    try:
        count = float(len(os.sched_getaffinity(0)) or 1)
    except AttributeError:  # not Linux
        count = float(os.cpu_count() or 1)
    for group in groups:
        quota, period = _numbers(group, "cpu.max") or (0, 0)
        if not period:
            first = _numbers(group, "cpu.cfs_quota_us")
            second = _numbers(group, "cpu.cfs_period_us")
            quota, period = (first[0], second[0]) if first and second else (0, 0)
        if quota > 0 and period > 0:
            count = min(count, max(quota / period, 0.01))
    return count


def _memory(root: str, groups: list[str]) -> int:
    """Return the usable memory in bytes; 0 if it cannot be known."""
    total = 0
    try:
        if root == "/":
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        else:
            line = _read(root, "proc/meminfo").partition("\n")[0]
            total = int(line.split()[1]) * 1024
    except (AttributeError, ValueError, OSError, IndexError):
        pass
    for group in groups:
        for name in ("memory.max", "memory.limit_in_bytes"):
            found = _numbers(group, name)
            # For "no limit", version 1 has a number that is larger than any machine's memory.
            if found and 0 < found[0] < 1 << 60:
                total = min(total or found[0], found[0])
    return total


def _groups(root: str) -> list[str]:
    """Return the folders of this process's control groups, of either version, and their parents."""
    mount = os.path.join(root, "sys/fs/cgroup")
    found: list[str] = []
    try:
        lines = _read(root, "proc/self/cgroup").splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, names, path = [*line.split(":", 2), "", ""][:3]
        top = os.path.join(mount, names) if names else mount
        group = os.path.normpath(os.path.join(top, path.strip("/")))
        # In a container, the path is often the host's, while ``top`` is the group itself.
        while group.startswith(f"{top}/"):
            found.append(group)
            group = os.path.dirname(group)
        found.append(top)
    return found or [mount]


def _read(*path: str) -> str:
    with open(os.path.join(*path), encoding="utf-8") as file:
        return file.read()


def _numbers(group: str, name: str) -> list[int] | None:
    try:
        return [math.floor(float(word)) for word in _read(group, name).split()]
    except (OSError, ValueError, OverflowError):
        return None  # there is no such file, or it contains "max"


def _gpus(root: str) -> tuple[str, ...]:
    """Return the names for ``CUDA_VISIBLE_DEVICES`` of the GPUs that this process may use."""
    try:
        names = sorted(
            int(found[1])
            for name in os.listdir(os.path.join(root, "dev"))
            if (found := _NVIDIA.fullmatch(name))
        )
    except OSError:
        return ()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None or not names:
        return tuple(map(str, range(len(names))))
    chosen: list[str] = []
    for word in visible.split(","):
        word = word.strip()
        if not word or word.startswith("-"):
            break  # CUDA ignores an invalid name and all names after it
        chosen.append(word)
    return tuple(chosen)
