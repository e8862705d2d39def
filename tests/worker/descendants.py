"""Finds descendants of a test's process, except those of multiprocessing, which live longer."""

from __future__ import annotations

import psutil

__all__ = ["descendants"]


def descendants() -> list[psutil.Process]:
    """Return the descendants of this process that belong to executors."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        # It starts with the first semaphore of any test, and ends with this process.
        if "multiprocessing.resource_tracker" not in command:
            found.append(process)
    return found
