"""Shows in the client what tasks print, as soon as it arrives."""

from __future__ import annotations

import codecs
import logging
import queue
import sys
from collections.abc import Callable
from typing import TextIO

from cloudexec import _plain_json
from cloudexec._forked import OwnThread, end_if_forked
from cloudexec._log import Log
from cloudexec._logs import LOG_STREAM

__all__ = ["OutputThread"]

_MOST_PARTIAL = 1000

Taken = Callable[[int], None]


class OutputThread:
    """Writes to the client's streams in a thread of its own, because a terminal may block.

    Args:
        mode: ``"inherit"`` writes to ``sys.stdout`` and ``sys.stderr``; if that is a terminal, line
            by line with a prefix. ``"logging"`` logs each line to the logger ``cloudexec.output``.
    """

    def __init__(self, mode: str) -> None:
        self._mode = mode
        self._queue: queue.SimpleQueue[
            tuple[str, int, int, bytes, Taken, str] | Callable[[], object] | None
        ]
        self._queue = queue.SimpleQueue()
        self._partial: dict[tuple[str, int, int], bytes] = {}
        self._names: dict[int, str] = {}
        self._decoders: dict[tuple[str, int, int], codecs.IncrementalDecoder] = {}
        self._logger = Log("cloudexec.output")
        # Started now, because no thread can be started while the interpreter ends.
        self._thread = OwnThread(self._run, "cloudexec-output")
        self._thread.start()

    def put(
        self, worker: str, number: int, stream: int, data: bytes, taken: Taken, name: str = ""
    ) -> None:
        """Show what a task printed, then call ``taken`` with its size in bytes."""
        self._queue.put((worker, number, stream, data, taken, name))

    def after(self, call: Callable[[], object]) -> None:
        """Call a function in the thread, once all output that was put before has been shown."""
        self._queue.put(call)

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if not isinstance(item, tuple):
                item()
                continue
            worker, number, stream, data, taken, name = item
            if name:
                if len(self._names) > _MOST_PARTIAL:
                    self._names.clear()
                self._names[number] = name
            try:
                self._show(worker, number, stream, data)
                end_if_forked()
            except BaseException as exc:
                # The program has closed its stream, or replaced it by an object that raises.
                end_if_forked(exc)
            taken(len(data))
        for (worker, number, stream), rest in self._partial.items():
            try:
                self._write_lines(worker, number, stream, rest)
            except BaseException:
                pass

    def _show(self, worker: str, number: int, stream: int, data: bytes) -> None:
        if stream == LOG_STREAM:
            self._log(worker, number, data)
            return
        target = sys.stdout if stream == 1 else sys.stderr
        key = (worker, number, stream)
        if self._mode == "inherit" and not _is_terminal(target):
            # A character's bytes may be split between two pieces.
            decoder = self._decoders.pop(key, None) or codecs.getincrementaldecoder("utf-8")(
                "replace"
            )
            self._write(target, decoder.decode(data))
            if decoder.getstate()[0]:
                self._decoders[key] = decoder
            return
        data = self._partial.pop(key, b"") + data
        lines, newline, rest = data.rpartition(b"\n")
        if rest:
            if len(self._partial) > _MOST_PARTIAL:
                self._partial.clear()  # beginnings of lines that were never finished
            self._partial[key] = rest
        if newline:
            self._write_lines(worker, number, stream, lines)

    def _log(self, worker: str, number: int, data: bytes) -> None:
        """Pass a task's log record to the logger of the same name in this process."""
        record = logging.makeLogRecord(_plain_json.decode(data))
        where = {"worker": worker, "task": number, "task_name": self._names.get(number, "")}
        for key, value in where.items():
            record.__dict__.setdefault(key, value)
        logging.getLogger(record.name).handle(record)

    def _write_lines(self, worker: str, number: int, stream: int, data: bytes) -> None:
        where = f"{worker} task {number}" if number else worker
        name = self._names.get(number, "")
        if name:
            where += f" ({name})"
        lines = data.decode("utf-8", "replace").split("\n")
        if self._mode == "logging":
            level = logging.INFO if stream == 1 else logging.WARNING
            extra = {"worker": worker, "task": number, "task_name": name}
            for line in lines:
                self._logger.log(level, "%s: %s", where, line, extra=extra)
        else:
            target = sys.stdout if stream == 1 else sys.stderr
            self._write(target, "".join(f"[{where}] {line}\n" for line in lines))

    def _write(self, target: TextIO | None, text: str) -> None:
        if target is None:
            return  # the program has no console
        try:
            target.write(text)
        except UnicodeEncodeError:
            encoding = target.encoding or "ascii"
            target.write(text.encode(encoding, "backslashreplace").decode(encoding))
        target.flush()

    def stop(self) -> None:
        """End the thread after all output that was put has been shown."""
        self._queue.put(None)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()


def _is_terminal(stream: object) -> bool:
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]
    except (AttributeError, ValueError):
        return False
