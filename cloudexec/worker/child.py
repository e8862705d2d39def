"""One slot process as its supervisor sees it: its pipes, its shared page, what it holds."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections import deque
from dataclasses import dataclass
from mmap import mmap

from cloudexec.worker.frames import PAGE_BYTES, RESULTS_AT
from cloudexec.worker.slot_model import SlotModel

__all__ = ["PIPE_BYTES", "Child", "OpenFiles"]

PIPE_BYTES = 1024 * 1024


@dataclass(slots=True)
class OpenFiles:
    """What is open here of one slot's large results. ``LargeResults`` alone writes it.

    Attributes:
        arena: The file with its small ones; -1: there is none.
        small: How many of these have not been taken.
        small_bytes: Of those.
        is_waiting: Whether the slot goes on only when some have been taken. It may do so in any
            state: the task that it runs has ended, and it takes what was sent behind that later.
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
        number: Of the slot.
        loop: That its pipes are served by.
        last: The delivery after which it is to end.

    Attributes:
        start_is_open: Whether its end would count as a failed start: it has not said that it is
            ready, its initializer has not raised, and nobody has told it to end. The state does not
            say so: what it said last is read when it has exited.
        functions: Numbers of the callables that it knows.
        idle_since: When it last answered all that it was sent.
        files: What is open here of its results.
        input: Part of a frame that has been read.
        tail: The last part of what tasks printed, by the number of the delivery.
        is_paused: Whether neither its answers nor what it prints is read, until the client has
            taken output. That has nothing to do with its state: it goes on until its pipes are
            full.

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
        """Write frames for it, now or when its pipe has room, unless nothing reaches it."""
        if self.is_over:
            return
        self.written += len(data)
        if not self._out:
            try:
                done = os.write(self.tasks_fd, data)
            except BlockingIOError:
                done = 0
            except OSError:
                return  # it is dying; its exit tells the rest
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
        """Close its pipes."""
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
