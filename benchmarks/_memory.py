"""Measures the memory of processes, with Linux's /proc."""

from __future__ import annotations

import os
import re

MIB = 1024 * 1024


def resident(pid: int | str = "self") -> int:
    """Return the resident memory of a process in bytes; 0 if it has ended."""
    return _field(pid, "VmRSS")


def share(pid: int | str = "self") -> int:
    """Return the memory of a process in bytes, with its share of shared pages; 0 if it ended."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            found = re.search(r"^Pss:\s*(\d+) kB", file.read(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0


def peak(pid: int | str = "self") -> int:
    """Return the largest resident memory since ``reset_peak()`` in bytes; 0 if it has ended."""
    return _field(pid, "VmHWM")


def available() -> int:
    """Return the free memory of this machine in bytes."""
    with open("/proc/meminfo") as file:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", file.read(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def reset_peak(pid: int | str = "self") -> None:
    """Reset the peak of a process's memory (proc(5), "clear_refs", value 5)."""
    with open(f"/proc/{pid}/clear_refs", "w") as file:
        file.write("5")


def descendants() -> list[int]:
    """Return the ids of this process's children, their children, and so on."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat") as file:
                # The command, in parentheses, may contain anything; state and parent follow.
                parent = int(file.read().rpartition(")")[2].split()[1])
        except OSError:
            continue
        parents.setdefault(parent, []).append(int(name))
    found: list[int] = []
    unseen = [os.getpid()]
    while unseen:
        children = parents.get(unseen.pop(), [])
        found += children
        unseen += children
    return found


def _field(pid: int | str, name: str) -> int:
    try:
        with open(f"/proc/{pid}/status") as file:
            found = re.search(rf"^{name}:\s*(\d+) kB", file.read(), re.MULTILINE)
    except OSError:
        return 0
    return int(found[1]) * 1024 if found else 0
