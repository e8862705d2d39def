"""What tasks print, shown in the client as it comes."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Callable

__all__ = ["OUTPUT_MODES", "OutputThread"]

OUTPUT_MODES = ("inherit", "logging", "off")

Taken = Callable[[int], None]


class OutputThread:
    """Writes to the client's streams in a thread of its own: a terminal may be slow, or stopped.

    Args:
        mode: ``"inherit"`` writes to ``sys.stdout`` and ``sys.stderr``, line by line with a prefix
            where that is a terminal; ``"logging"`` logs each line to ``cloudexec.output``.
    """

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._queue: queue.SimpleQueue[tuple[str, int, int, bytes, Taken] | None]
        self._queue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._partial: dict[tuple[str, int, int], bytes] = {}
        self._logger = logging.getLogger("cloudexec.output")

    def put(self, worker: str, number: int, stream: int, data: bytes, taken: Taken) -> None:
        """Show what a task printed, then call ``taken`` with its size in bytes."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="cloudexec-output", daemon=True)
            self._thread.start()
        self._queue.put((worker, number, stream, data, taken))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            worker, number, stream, data, taken = item
            try:
                self._show(worker, number, stream, data)
            except (OSError, ValueError):
                pass  # the client closed its own stream
            taken(len(data))
        for (worker, number, stream), rest in self._partial.items():
            try:
                self._write_lines(worker, number, stream, rest)
            except (OSError, ValueError):
                pass

    def _show(self, worker: str, number: int, stream: int, data: bytes) -> None:
        target = sys.stdout if stream == 1 else sys.stderr
        if target is None and self._mode == "inherit":
            return
        if self._mode == "inherit" and not _is_terminal(target):
            target.write(data.decode("utf-8", "replace"))
            target.flush()
            return
        key = (worker, number, stream)
        data = self._partial.pop(key, b"") + data
        lines, newline, rest = data.rpartition(b"\n")
        if rest:
            if len(self._partial) > 1000:
                # Ends of lines that never came.
                self._partial.clear()
            self._partial[key] = rest
        if newline:
            self._write_lines(worker, number, stream, lines)

    def _write_lines(self, worker: str, number: int, stream: int, data: bytes) -> None:
        target = sys.stdout if stream == 1 else sys.stderr
        where = f"{worker} task {number}" if number else worker
        for line in data.decode("utf-8", "replace").split("\n"):
            if self._mode == "logging":
                level = logging.INFO if stream == 1 else logging.WARNING
                extra = {"worker": worker, "task": number}
                self._logger.log(level, "%s: %s", where, line, extra=extra)
            else:
                target.write(f"[{where}] {line}\n")
        if self._mode == "inherit":
            target.flush()

    def stop(self) -> None:
        """End the thread once all that was put has been shown."""
        if self._thread is not None:
            self._queue.put(None)

    def join(self) -> None:
        """Wait for the end."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()


def _is_terminal(stream: object) -> bool:
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except (AttributeError, ValueError):
        return False
