"""One slot process as its supervisor sees it: its pipes, its shared page, what it holds."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import deque
from dataclasses import dataclass
from enum import Enum
from mmap import mmap

from cloudexec.worker.frames import PAGE_BYTES, RESULTS_AT

__all__ = ["PIPE_BYTES", "Child", "SlotState", "Terms", "WorkItem", "oom_kills"]

PIPE_BYTES = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Terms:
    """What few tasks have.

    Attributes:
        env: Variables that it has while it runs.
        memory: Bytes that its processes may take; 0: no limit.
        last: Whether its slot ends with it.
    """

    env: dict[str, str]
    memory: int = 0
    last: bool = False


@dataclass(slots=True)
class WorkItem:
    """A task on this worker."""

    lease: int
    function: int
    payload: bytes
    number: int
    seconds: float
    timeout: float = 0.0
    blobs: tuple[int, ...] | None = None  # of a composed payload
    keep: bool = False
    spared: int = 0
    recalled: bool = False  # to be handed back rather than sent once more
    kill: int = 0  # a Failure kind: its slot is to be killed once it holds nothing else
    terms: Terms | None = None


class SlotState(Enum):
    """How far a slot's process is in its life. ``TRANSITIONS`` says what may follow what."""

    STARTING = "starting"
    """It is being forked, or runs the initializer."""
    READY = "ready"
    """It takes tasks."""
    STOPPING = "stopping"
    """It was told to end, and may take a few seconds for its exit handlers."""
    KILLED = "killed"
    """It is being killed. Nothing more is written to it, and what it wrote is still read."""
    EXITED = "exited"
    """Its process is gone. What is left in its pipes is read once more."""


TRANSITIONS: dict[SlotState, frozenset[SlotState]] = {
    SlotState.STARTING: frozenset(
        (SlotState.READY, SlotState.STOPPING, SlotState.KILLED, SlotState.EXITED)
    ),
    SlotState.READY: frozenset((SlotState.STOPPING, SlotState.KILLED, SlotState.EXITED)),
    SlotState.STOPPING: frozenset((SlotState.KILLED, SlotState.EXITED)),
    SlotState.KILLED: frozenset((SlotState.EXITED,)),
    SlotState.EXITED: frozenset(),
}


class Child:
    """One child process as the supervisor sees it.

    Attributes:
        state: How far its process is in its life; only ``enter`` writes it.
        is_staying: Whether it is starting or ready: nothing has begun to end it.
        is_over: Whether it was killed or has exited: nothing reaches it any more. These two follow
            from the state, and are kept as they are asked for with each task.
        start_is_open: Whether its end would count as a failed start: it has not said that it is
            ready, its initializer has not raised, and nobody has told it to end.

    Raises:
        OSError: If no more files can be opened.
    """

    def __init__(self, number: int) -> None:
        self.number = number
        self.pid = 0
        self.state = SlotState.STARTING
        self.is_staying = True
        self.is_over = False
        self.start_is_open = True
        self.kill_reason = 0  # a Failure kind, when we killed it
        self.kill_lease = 0
        self.kill_message = ""
        self.limit = 0  # bytes that its task may take; 0: no limit
        self.taken_before = 0  # bytes that it had when the task came
        self.ends = False  # after its task
        # What it was sent and has not answered, by the number of the delivery, in that order.
        self.held: dict[int, WorkItem] = {}
        self.seconds = 0.0  # estimated, of that
        self.sent = 0  # deliveries; the number of the last one
        self.fence = 0  # the last one that it was told not to begin any more
        self.written = 0  # bytes of frames for it
        self.is_lost = False  # it holds tasks, as far as we know, and waits for some
        self.exclusive = False  # holds a task behind which nothing may be sent
        self.taking_back = False
        self.straggling = False  # its task takes longer than estimated: send nothing behind it
        self.progress_at = 0.0
        self.reported = 0  # the delivery last reported as started
        self.functions: set[int] = set()
        self.idle_since = 0.0
        self.tail: dict[int, bytearray] = {}
        self.timer: asyncio.TimerHandle | None = None
        self.stop_timer: asyncio.TimerHandle | None = None
        self.unopened: set[int] = set()  # deliveries that it has run, and whose results are lost
        self.arena = -1  # the file with its small results
        self.small = 0  # of these, those that have not been taken
        self.small_bytes = 0
        self.blocked = False  # it goes on when some of its results have been taken
        self.paused = False  # its answers are not read
        self.raw_paused = False  # nor what it prints past sys.stdout
        self.out: deque[memoryview] = deque()
        self.input = bytearray()

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

    def enter(self, state: SlotState) -> None:
        """Go on to another state.

        Raises:
            RuntimeError: If ``TRANSITIONS`` does not list that; nothing has changed then.
        """
        if state not in TRANSITIONS[self.state]:
            raise RuntimeError(
                f"slot {self.number} cannot become {state.value}: it is {self.state.value}"
            )
        self.state = state
        self.is_staying = state is SlotState.READY
        self.is_over = state is SlotState.KILLED or state is SlotState.EXITED

    def fds(self) -> list[int]:
        return [self.tasks_fd, self.results_fd, self.stdout_fd, self.stderr_fd]

    def close_arena(self) -> None:
        if self.arena >= 0:
            os.close(self.arena)
            self.arena = -1


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


_CONTAINER_EVENTS = (
    "/sys/fs/cgroup/memory.events",  # version 2
    "/sys/fs/cgroup/memory/memory.oom_control",  # version 1
)


def oom_kills(*, alone: bool) -> int:
    """How often the kernel has killed for want of memory, as far as can be seen from here.

    Args:
        alone: Whether this is a container with a limit of its own: what happens on the rest of
            the machine says nothing then.
    """
    count = 0
    for path in _CONTAINER_EVENTS if alone else (*_CONTAINER_EVENTS[:1], "/proc/vmstat"):
        try:
            with open(path) as file:
                for line in file:
                    if line.startswith("oom_kill "):
                        count += int(line.split()[1])
        except (OSError, ValueError):
            continue
    return count
