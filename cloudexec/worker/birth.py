"""Measures this worker's start: the age of its process, and how long its image took to pull."""

from __future__ import annotations

import datetime
import os

from cloudexec.worker.platform import ask_metadata, find_place

__all__ = ["pull_seconds", "seconds_since_start", "set_earlier"]

_earlier = 0.0


def set_earlier(seconds: float) -> None:
    """Say how long the start of this process has waited for that of the one it was forked from."""
    global _earlier
    _earlier = seconds


def seconds_since_start() -> float:
    """Return the seconds since this process began; 0.0 if the system does not say."""
    try:
        with open("/proc/self/stat") as file:
            # The program's name, in parentheses, may contain any character.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime") as file:
            uptime = float(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return _earlier + max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))


def pull_seconds() -> float:
    """Ask the platform how many seconds pulling the image took; 0.0 if it does not say."""
    try:
        task = ask_metadata(find_place(os.environ))
        began = datetime.datetime.fromisoformat(task["PullStartedAt"])
        ended = datetime.datetime.fromisoformat(task["PullStoppedAt"])
        return max(0.0, (ended - began).total_seconds())
    except (ValueError, KeyError, TypeError):
        return 0.0
