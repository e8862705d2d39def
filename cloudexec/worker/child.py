"""One slot process as its supervisor sees it: its state, its pipes and its shared page."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections import deque
from mmap import mmap

from cloudexec._record_class import record
from cloudexec.worker.frames import PAGE_BYTES, RESULTS_AT
from cloudexec.worker.slot_model import SlotModel

__all__ = ["PIPE_BYTES", "Child", "OpenFiles"]

PIPE_BYTES = 1024 * 1024


@record(frozen=False)
class OpenFiles:
    """The open files of one slot's large results. Only ``LargeResults`` writes it.

    Attributes:
        arena: The file that holds small parts of results; -1 if there is none.
        small: Number of small parts that have not been taken.
        small_bytes: Bytes of these parts.
        is_waiting: Whether the slot waits until some parts have been taken. This is independent of
            its state: the slot has finished a task, and takes the next one later.
    """

    arena: int = -1
    small: int = 0
    small_bytes: int = 0
    is_waiting: bool = False

    def close(self) -> None:
        if self.arena >= 0:
            os.close(self.arena)
            self.arena = -1


class Child(SlotModel):
    """One slot with the pipes and the page that it shares with its process.

    Args:
        number: The slot's number.
        loop: The event loop that serves its pipes.
        last: The delivery after which the slot must end.

    Attributes:
        start_is_open: Whether its end would count as a failed start: it has not reported that it is
            ready or that its initializer raised, and was not told to end. The state does not tell,
            because its last messages are read only after it has exited.
        functions: Numbers of the callables that the slot knows.
        idle_since: When it last answered all its tasks.
        files: The open files of its large results.
        input: Bytes of an incomplete frame that were read from its pipe.
        tail: By delivery: the last part of a task's output.
        is_paused: Whether nothing is read from its pipes until the client has taken output. This is
            independent of its state: the slot works on until its pipes are full.

    Raises:
        OSError: If no more files can be opened.
    """

    def __init__(
        self, number: int, loop: asyncio.AbstractEventLoop, last: int = sys.maxsize
    ) -> None:
        super().__init__(number, last)
        self.pid = 0
        self.start_is_open = True
        self.functions: set[int] = set()
        self.idle_since = 0.0
        self.stop_timer: asyncio.TimerHandle | None = None
        self.files = OpenFiles()
        self.input = bytearray()
        self.tail: dict[int, bytearray] = {}
        self.is_paused = False
        self._loop = loop
        self._out: deque[memoryview] = deque()

        opened: list[int] = []
        try:
            for _ in range(4):
                opened += os.pipe()
            opened.append(_shared_file())
            self.page = memoryview(mmap(opened[-1], PAGE_BYTES))
        except OSError:
            for fd in opened:
                os.close(fd)
            raise
        tasks_read, self.tasks_fd, self.results_fd, results_write = opened[:4]
        self.stdout_fd, stdout_write, self.stderr_fd, stderr_write, page_fd = opened[4:]
        self.cells = self.page[:RESULTS_AT].cast("Q")
        self.child_fds = [tasks_read, results_write, page_fd, stdout_write, stderr_write]
        for fd in (self.tasks_fd, self.results_fd, self.stdout_fd, self.stderr_fd):
            os.set_blocking(fd, False)
        for fd in (self.tasks_fd, self.results_fd):
            _widen(fd)

    def write(self, data: bytes | memoryview) -> None:
        """Write frames to the slot, now or when its pipe has room; drop them if it has ended."""
        if self.is_over:
            return
        self.written += len(data)
        if not self._out:
            try:
                done = os.write(self.tasks_fd, data)
            except BlockingIOError:
                done = 0
            except OSError:
                return  # the slot is dying, which is handled when it has exited
            if done == len(data):
                return
            data = memoryview(data)[done:]
            self._loop.add_writer(self.tasks_fd, self._on_writable)
        self._out.append(memoryview(data))

    def _on_writable(self) -> None:
        out = self._out
        try:
            while out:
                data = out[0]
                done = os.write(self.tasks_fd, data)
                if done < len(data):
                    out[0] = data[done:]
                    return
                out.popleft()
        except BlockingIOError:
            return
        except OSError:
            out.clear()
        self._loop.remove_writer(self.tasks_fd)

    def fds(self) -> list[int]:
        return [self.tasks_fd, self.results_fd, self.stdout_fd, self.stderr_fd]

    def close(self) -> None:
        """Close the slot's pipes."""
        for fd in self.fds():
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)
            os.close(fd)


def _shared_file() -> int:
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("cloudexec-slot")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, PAGE_BYTES)
    return fd


def _widen(fd: int) -> None:
    try:
        import fcntl

        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except (ImportError, AttributeError, OSError):
        pass  # not Linux, or over the user's limit: a smaller pipe is only slower
