"""How this worker came to be: when its process began, how long its image took to arrive."""

from __future__ import annotations

import datetime
import json
import os
import urllib.parse

__all__ = ["pull_seconds", "seconds_since_start"]

_METADATA = "ECS_CONTAINER_METADATA_URI_V4"
_TIMEOUT = 1.0


def seconds_since_start() -> float:
    """Return how long ago this process began; 0.0 where the system does not say."""
    try:
        with open("/proc/self/stat") as file:
            # The name of the program, in parentheses, may hold anything.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        with open("/proc/uptime") as file:
            uptime = float(file.read().split()[0])
    except (OSError, ValueError, IndexError):
        return 0.0
    return max(0.0, uptime - ticks / os.sysconf("SC_CLK_TCK"))


def pull_seconds() -> float:
    """Ask the platform how long pulling the image took; 0.0 where it does not say.

    References:
        Amazon ECS Developer Guide, "Task metadata endpoint version 4".
    """
    where = urllib.parse.urlsplit(os.environ.get(_METADATA, ""))
    if where.scheme != "http" or not where.hostname:
        return 0.0
    import http.client  # most platforms have no such address

    connection = http.client.HTTPConnection(where.hostname, where.port or 80, timeout=_TIMEOUT)
    try:
        connection.request("GET", f"{where.path}/task")
        task = json.loads(connection.getresponse().read())
        began = datetime.datetime.fromisoformat(task["PullStartedAt"])
        ended = datetime.datetime.fromisoformat(task["PullStoppedAt"])
        return max(0.0, (ended - began).total_seconds())
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError):
        return 0.0
    finally:
        connection.close()
