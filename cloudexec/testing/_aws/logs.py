"""Writes the output of jobs to CloudWatch Logs, line by line, while they run."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from cloudexec.testing._aws.runners import StartError

__all__ = ["LogWriter"]

DEFAULT_GROUP = "/aws/batch/job"
INTERVAL = 0.2
"""Seconds between two writes."""
LINE_MAX = 256 * 1024 - 26
"""Largest event in bytes. Quota "Event size", Amazon CloudWatch Logs User Guide."""


class LogWriter:
    """Writes to moto's log streams from one thread.

    Args:
        backend: Returns moto's logs backend of a region.
    """

    def __init__(self, backend: Callable[[str], Any]) -> None:
        self._backend = backend
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._parts: dict[tuple[str, str, str], bytes] = defaultdict(bytes)
        self._events: dict[tuple[str, str, str], list[dict[str, Any]]] = defaultdict(list)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fake-aws-logs", daemon=True)
        self._thread.start()

    def open(
        self, region: str, group: str, stream: str, *, create: bool
    ) -> Callable[[bytes], None]:
        """Make a log stream, and return a function that writes to it.

        Raises:
            StartError: If there is no such group.
        """
        backend = self._backend(region)
        if create or group == DEFAULT_GROUP:
            backend.ensure_log_group(group)
        if group not in backend.groups:
            raise StartError(
                "ResourceInitializationError: failed to validate logger args: create stream has "
                "been retried 1 times: failed to create Cloudwatch log stream: "
                "ResourceNotFoundException: The specified log group does not exist. : exit status 1"
            )
        backend.ensure_log_stream(group, stream)
        key = (region, group, stream)
        return lambda data: self._take(key, data)

    def finish(self, region: str, group: str, stream: str) -> None:
        """Write all output of a stream, including a last line without an end."""
        key = (region, group, stream)
        with self._lock:
            if rest := self._parts.pop(key, b""):
                self._add(key, rest)
        self._write()

    def close(self) -> None:
        """Write the remaining output, and end the thread."""
        self._closed.set()
        self._thread.join()
        self._write()

    def _take(self, key: tuple[str, str, str], data: bytes) -> None:
        with self._lock:
            *lines, rest = (self._parts[key] + data).split(b"\n")
            self._parts[key] = rest
            for line in lines:
                self._add(key, line)

    def _add(self, key: tuple[str, str, str], line: bytes) -> None:
        now = int(time.time() * 1000)
        line = line.rstrip(b"\r") or b" "
        # CloudWatch refuses empty messages, so the awslogs driver sends a blank. A line that is too
        # long for an event becomes several: processEvent() in moby, daemon/logger/awslogs.
        while line:
            end = len(line)
            if end > LINE_MAX:
                end = LINE_MAX
                while end > LINE_MAX - 4 and line[end] & 0xC0 == 0x80:
                    end -= 1  # a character is not divided
            text = line[:end].decode("utf-8", "replace")
            self._events[key].append({"timestamp": now, "message": text})
            line = line[end:]

    def _run(self) -> None:
        while not self._closed.wait(INTERVAL):
            self._write()

    def _write(self) -> None:
        # One writer at a time, as moto's streams have no lock, and lines must keep their order.
        with self._writing:
            with self._lock:
                events, self._events = self._events, defaultdict(list)
            for (region, group, stream), lines in events.items():
                found = self._backend(region).groups.get(group)
                if found is not None and stream in found.streams:
                    found.put_log_events(stream, lines)
