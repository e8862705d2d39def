"""A slot's end of the pipe for answers and of the shared page: what it writes, in which order.

``frames`` describes the protocol. The supervisor's half is in ``answers`` and ``slot_model``.
"""

from __future__ import annotations

import io
import os
import threading
from struct import Struct
from time import perf_counter
from typing import Any, cast

from cloudexec._objects.segments import map_file
from cloudexec.worker.frames import (
    CURRENT,
    FLUSHES,
    HEADER,
    PAGE_BYTES,
    RESULT,
    RESULTS_AT,
    USED,
    Kind,
    write_all,
)

__all__ = ["Outlet", "text_stream"]

_OUTPUT_BYTES = 32 * 1024
_FAILURE = Struct("<fB")
_result_header = RESULT.pack_into


class Outlet:
    """Writes the answers and the output of a slot's process.

    Args:
        results_fd: Write end of the pipe with its answers.
        page_fd: File of the shared page.

    Attributes:
        cells: The cells of the shared page.
        used: Bytes of finished results in the page that are not in the pipe yet.
        flushed_at: When results were last written to the pipe, by ``perf_counter``.
        forked: Whether a task has forked this process, which must not write for the slot then.
    """

    def __init__(self, results_fd: int, page_fd: int) -> None:
        self._results_fd = results_fd
        self._page = map_file(page_fd, PAGE_BYTES, writable=True)
        os.close(page_fd)
        self._room = PAGE_BYTES - RESULTS_AT
        self._lock = threading.Lock()
        self.cells = self._page[:RESULTS_AT].cast("Q")
        self.used = 0
        self.flushed_at = 0.0
        self.forked = False
        os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        """Write nothing for the slot any more, in a process that a task has forked."""
        self.forked = True
        self._lock = threading.Lock()

    def put(self, delivery: int, seconds: float, status: int, payload: bytes) -> None:
        """Put one result into the page, where the supervisor finds it even if this process dies."""
        size = RESULT.size + len(payload)
        if self.used + size > self._room:
            self.flush()
            if size > self._room:
                self.send(Kind.FAILURE, delivery, _FAILURE.pack(seconds, status) + payload)
                return
        at = RESULTS_AT + self.used
        page = self._page
        _result_header(page, at, delivery, seconds, status, len(payload))
        at += RESULT.size
        page[at : at + len(payload)] = payload
        self.used += size
        self.cells[USED] = self.used

    def flush(self) -> None:
        """Write the results that are in the page to the pipe."""
        used = self.used
        if used:
            page = self._page
            start = RESULTS_AT - HEADER.size
            HEADER.pack_into(page, start, Kind.RESULTS, used, 0)
            with self._lock:
                write_all(self._results_fd, page[start : RESULTS_AT + used])
            self.cells[FLUSHES] += 1  # before other results are put into the page
            self.cells[USED] = self.used = 0
        self.flushed_at = perf_counter()

    def send(self, kind: Kind, number: int = 0, body: bytes | memoryview = b"") -> None:
        """Send one frame, after the results that are waiting."""
        self.flush()
        with self._lock:
            write_all(self._results_fd, HEADER.pack(kind, len(body), number) + body)

    def send_output(self, stream: int, data: bytes) -> None:
        """Send a task's output; any thread of the task may call this."""
        frame = HEADER.pack(Kind.OUTPUT, len(data) + 1, self.cells[CURRENT])
        with self._lock:
            write_all(self._results_fd, frame + bytes((stream,)) + data)


class _Output(io.RawIOBase):
    """The raw stream below ``sys.stdout`` or ``sys.stderr`` of a task: it sends frames."""

    def __init__(self, outlet: Outlet, stream: int) -> None:
        self._outlet = outlet
        self._stream = stream
        self.name = "<stderr>" if stream == 2 else "<stdout>"
        self.mode = "wb"

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._stream

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if self._outlet.forked:
            # A child of the task writes directly, as only its parent may write frames.
            write_all(self._stream, view)
            return len(view)
        for start in range(0, len(view), _OUTPUT_BYTES):
            self._outlet.send_output(self._stream, bytes(view[start : start + _OUTPUT_BYTES]))
        return len(view)


def text_stream(outlet: Outlet, stream: int) -> io.TextIOWrapper:
    """Return the stream that a task has as ``sys.stdout`` (1) or ``sys.stderr`` (2)."""
    buffer = io.BufferedWriter(_Output(outlet, stream), _OUTPUT_BYTES)
    errors = "backslashreplace" if stream == 2 else "surrogateescape"
    text: Any = io.TextIOWrapper(buffer, encoding="utf-8", errors=errors, line_buffering=True)
    text.mode = "w"
    return cast("io.TextIOWrapper", text)
