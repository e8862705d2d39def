"""The processes below a test's own, but for multiprocessing's, which outlive what started them."""

from __future__ import annotations

import psutil

__all__ = ["descendants"]


def descendants() -> list[psutil.Process]:
    """Return what runs below this process on behalf of executors."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            command = " ".join(process.cmdline())
        except psutil.NoSuchProcess:
            continue
        # Started with the first semaphore that any test has made; ends with this process.
        if "multiprocessing.resource_tracker" not in command:
            found.append(process)
    return found
