"""The supervisor's slots: who runs what, what came of it, and how each one died."""

from __future__ import annotations

import asyncio
import errno
import itertools
import json
import os
import platform
import signal
import socket
import struct
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cloudexec._logs import LOG_STREAM, line_of
from cloudexec._objects.places import Place, unpack_places
from cloudexec._objects.segments import block_size
from cloudexec.worker import frames
from cloudexec.worker.blobs import BlobCache
from cloudexec.worker.child import PIPE_BYTES, Child, SlotState, WorkItem, oom_kills
from cloudexec.worker.footprint import memory_taken
from cloudexec.worker.frames import (
    COMPOSED,
    CURRENT,
    FENCE,
    FLUSHES,
    FUNCTION,
    HEADER,
    KEPT,
    RESULT,
    RESULTS_AT,
    SPILL,
    USED,
    WAITING,
    Kind,
)
from cloudexec.worker.process import number_of
from cloudexec.worker.results import MOST_WAITING
from cloudexec.worker.zygote import (
    EXITED,
    FORK,
    KILL,
    MESSAGE,
    ORPHAN_GRACE,
    STARTED,
    kill_children,
)

if TYPE_CHECKING:
    from cloudexec._proto import tasks_pb2 as pb

__all__ = [
    "KILLED",
    "PICKLE_FAILED",
    "Answers",
    "Failure",
    "ResultBlob",
    "Settings",
    "SlotPool",
    "WorkItem",
]

_BATCH_SECONDS = 0.002
"""Estimated work that a slot holds: enough to hide a wake-up, too little to miss."""
_BATCH_TASKS = 256
_BATCH_BYTES = 256 * 1024
_STRAGGLER = 0.01
"""Seconds after which what waits behind a task in its slot is taken back."""
_TICK = 0.005
_TAIL_BYTES = 8 * 1024
"""Of a task's output, what is kept for the exception if it fails."""
_READ_BYTES = 64 * 1024
_REFORK_PAUSE = 0.5
"""Seconds until another slot is tried after one could not be had for want of files."""
_STOP_GRACE = 5.0
"""Seconds that a slot told to stop may take for its exit handlers."""
_FULL = 0.8
"""Part of its share of the container's memory past which a slot that was killed filled it."""
_MEMORY_TICK = 0.02
"""Seconds between looks at what tasks with a limit have taken."""
_REORDERS_WRITES = platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686")
_WRITES_ARRIVE = 50e-6
"""Seconds after which another processor sees all that was written before what it sees already,
where that is not always so, as on Arm."""
_FAILED_STARTS = 3
_MOST_WAITING_FILES = 256
"""Large results that may wait to be taken: each has a file that is open here."""
_COMPOSED_RESULT = struct.Struct("<f?")
_SPARED = 5
"""Slots that may die before they begin a task that was sent to them, before it is to blame."""

UNPICKLE_FAILED, PICKLE_FAILED = 2, 3
SLOT_LOST, TIMED_OUT, KILLED, RECLAIMED, OUTGREW = 4, 5, 6, 7, 8
"""``Failure.Kind`` of the wire, where the slot itself cannot say what happened."""


@dataclass(slots=True)
class Failure:
    """An attempt without a result, and what is known about it."""

    lease: int
    kind: int
    payload: bytes = b""
    message: str = ""
    output: str = ""
    exit_code: int = 0
    peak_memory_bytes: int = 0
    seconds: float = 0.0
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """What the client said at the start."""

    slots: int
    cwd: str = ""
    sys_path: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()
    settings: bytes = b""
    initializer: bytes = b""
    initializer_blobs: tuple[int, ...] = ()
    initializer_needs: int = 0
    main: dict[str, str] = field(default_factory=dict)
    max_tasks_per_child: int = 0
    min_slots: int = 0
    idle_timeout: float = -1.0
    direct_path: str = ""
    token: bytes = b""
    authkey: bytes = b""
    depth: int = 0
    memory_mib: int = 0
    modules: str = ""
    number: int = 1
    client_pid: int = 0
    inheritance: dict[str, Any] = field(default_factory=dict)


class Answers(Protocol):
    """Where the pool's answers go: the session, or a test."""

    def result(self, lease: int, payload: bytes, seconds: float) -> None:
        """A task returned."""

    def delivered(self, lease: int, seconds: float) -> None:
        """A task returned something large that has reached the client already."""

    def failure(self, failure: Failure) -> None:
        """An attempt failed."""

    def returned(self, lease: int) -> None:
        """A task is handed back unstarted."""

    def output(self, lease: int, number: int, stream: int, data: bytes) -> bool:
        """A task printed; False asks to hold the slot's answers until ``resume_output``."""

    def ready(self) -> None:
        """The first slot is ready; ``announced`` is to be called when the client was told."""

    def groups_changed(self) -> None:
        """Slots came or went."""

    def initializer_failed(self, payload: bytes) -> None:
        """The initializer raised, or killed its slot time and again."""

    def composed(
        self, lease: int, seconds: float, head: bytes, blobs: Sequence[ResultBlob], *, keep: bool
    ) -> None:
        """A task returned something large, which is in files; it is to be kept here, or sent."""

    def wake(self) -> None:
        """There is something to send."""


@dataclass(slots=True)
class _Function:
    """A callable's pickle, or the head of it and the blobs that this refers to.

    Attributes:
        needs: Numbers of what is to be there first.
        globals: What this binds in the script; none: it is a callable.
        module: The module that this is, if it is one.
        all_blobs: Its own, and those of what it needs.
    """

    pickle: bytes
    fresh: bool
    blobs: tuple[int, ...] = ()
    needs: tuple[int, ...] = ()
    globals: tuple[str, ...] = ()
    module: str = ""
    all_blobs: tuple[int, ...] = ()


@dataclass(slots=True)
class ResultBlob:
    """A part of a result, in a file that is open here.

    Attributes:
        fd: Of the file.
        place: Where in it.
        owner: The slot that wants to know when it has been taken; ``None``: the file is ours.
    """

    fd: int
    place: Place
    owner: Child | None = None


class SlotPool:
    """Runs tasks in slot processes; all of it on one event loop.

    Args:
        settings: From the client.
        answers: Where answers go.
        zygote: Socket to the zygote.
        on_zygote_gone: Called when the zygote died: the worker cannot go on.
        blobs: What tasks and callables refer to.
    """

    def __init__(
        self,
        settings: Settings,
        answers: Answers,
        zygote: socket.socket,
        on_zygote_gone: Callable[[], None],
        blobs: BlobCache,
    ) -> None:
        self._blobs = blobs
        self._settings = settings
        self._answers = answers
        self._waiting_bytes = 0  # of results that have not been taken
        self._waiting_files = 0
        self._most_waiting = blobs.store.limits.memory
        self._blocked: deque[tuple[Child, list[int]]] = deque()
        self._spill = False
        self._zygote = zygote
        self._on_zygote_gone = on_zygote_gone
        self._loop = asyncio.get_running_loop()
        self._queue: deque[WorkItem] = deque()
        self._slots: dict[int, Child] = {}
        self._numbers = 0
        self._forking: deque[Child] = deque()
        self._refork: asyncio.TimerHandle | None = None  # while no further slot can be had
        self._functions: dict[int, _Function] = {}
        self._parked: dict[int, WorkItem] = {}  # their blobs are on the way
        self._tick_handle: asyncio.TimerHandle | None = None
        self._trim_handle: asyncio.TimerHandle | None = None
        self._memory_handle: asyncio.TimerHandle | None = None
        self._failed_starts = 0
        self._oom_kills = oom_kills(alone=settings.memory_mib > 0)
        self._draining = False
        self._announced = False
        self._input = b""
        self.idle = asyncio.Event()
        """Set when, after ``drain``, no task is left."""
        self.stopped = asyncio.Event()
        """Set when, after ``stop``, no slot is left."""
        zygote.setblocking(False)
        self._loop.add_reader(zygote.fileno(), self._on_zygote)

    # What the client asks.

    def start(self) -> None:
        """Start the slots that are to be kept warm."""
        for _ in range(min(self._settings.min_slots, self._settings.slots)):
            if self._fork() is None:
                break

    def add_functions(self, functions: Iterable[pb.Function]) -> None:
        """Learn callables that tasks will name, each behind what it needs."""
        for each in functions:
            needs, blobs = tuple(each.needs), tuple(each.blobs)
            below = [self._functions[need].all_blobs for need in needs if need in self._functions]
            self._functions[each.number] = _Function(
                each.pickle,
                each.fresh,
                blobs,
                needs,
                tuple(each.globals),
                each.module,
                tuple(dict.fromkeys(itertools.chain(blobs, *below))),
            )

    def forget_functions(self, numbers: list[int]) -> None:
        """Drop callables that no task will name again."""
        for number in numbers:
            self._functions.pop(number, None)
            for slot in self._slots.values():
                if number in slot.functions and not slot.is_over:
                    slot.functions.discard(number)
                    self._write(slot, HEADER.pack(Kind.FORGET, 0, number))

    def add(self, items: list[WorkItem]) -> None:
        """Take tasks, in order; those whose blobs are still to come wait for these."""
        if self._draining:  # they were sent before the client had heard of that
            for item in items:
                self._answers.returned(item.lease)
            self._answers.wake()
            return
        for item in items:
            if item.blobs is None and not item.function:
                self._queue.append(item)
                continue
            function = self._functions.get(item.function)
            needs = item.blobs or ()
            if function is not None and function.all_blobs:
                needs += function.all_blobs
            if needs and self._blobs.missing(needs):
                self._park(item, needs)
            else:
                self._queue.append(item)
        self.dispatch()

    def _park(self, item: WorkItem, needs: tuple[int, ...]) -> None:
        self._parked[item.lease] = item

        def ready(error: BaseException | None) -> None:
            if self._parked.pop(item.lease, None) is None:
                return  # it was taken back
            if error is None:
                self._queue.append(item)
                self.dispatch()
                return
            self._refuse(item, error)
            self._answers.wake()

        self._blobs.when_ready(needs, ready)

    def _refuse(self, item: WorkItem, error: BaseException) -> None:
        """Answer for a task whose blobs cannot be had."""
        from cloudexec._errors import PayloadError
        from cloudexec._payload import dumps_exception

        if isinstance(error, PayloadError):
            payload = dumps_exception(error)
            self._answers.failure(Failure(item.lease, UNPICKLE_FAILED, payload))
        else:
            self._answers.returned(item.lease)  # the connection failed: tried again

    def blobs_in_use(self) -> set[int]:
        """Return the blobs that tasks which are here, or callables, refer to."""
        used = set(self._settings.initializer_blobs)
        for function in self._functions.values():
            used.update(function.blobs)
        for item in self._parked.values():
            used.update(item.blobs or ())
        for item in self._queue:
            used.update(item.blobs or ())
        for slot in self._slots.values():
            for item in slot.held.values():
                used.update(item.blobs or ())
        return used

    def announced(self) -> None:
        """The client has been told that tasks may begin here: begin."""
        self._announced = True
        self.dispatch()

    def recall(self, leases: list[int]) -> None:
        """Hand these back unless they have begun."""
        wanted = set(leases)
        for lease in leases:
            self._parked.pop(lease, None)  # and so it is unknown
        unknown = wanted - {item.lease for item in self._queue}
        for slot in self._slots.values():
            inside = [number for number, item in slot.held.items() if item.lease in wanted]
            for number in inside:
                slot.held[number].recalled = True
                unknown.discard(slot.held[number].lease)
            if inside and inside != [slot.cells[CURRENT]]:
                self._take_back(slot)
        for lease in unknown:
            self._answers.returned(lease)  # never sent, or answered already
        if any(item.lease in wanted for item in self._queue):
            kept: deque[WorkItem] = deque()
            for item in self._queue:
                if item.lease in wanted:
                    self._answers.returned(item.lease)
                else:
                    kept.append(item)
            self._queue = kept
        self._answers.wake()

    def kill(self, leases: list[int], kind: int) -> None:
        """Kill the slots that run these; hand back those that have not begun.

        A slot that was sent other tasks as well gives these back first: it may be done with the one
        and begin with another of them while it is being killed.
        """
        wanted = set(leases)
        for slot in list(self._slots.values()):
            marked = [item for item in slot.held.values() if item.lease in wanted]
            for item in marked:
                item.kill = kind
            if len(slot.held) > 1 and marked:
                self._take_back(slot)
            elif marked:
                self._kill_marked(slot)
        self.recall(leases)

    def _kill_marked(self, slot: Child) -> None:
        """Kill a slot if the only task that it holds is to be killed."""
        (item,) = slot.held.values()
        if item.kill:
            slot.kill_reason, slot.kill_lease = item.kill, item.lease
            self._kill(slot)

    def drain(self) -> None:
        """Hand back what has not begun, and take nothing more."""
        self._draining = True
        for item in (*self._parked.values(), *self._queue):
            self._answers.returned(item.lease)
        self._parked.clear()
        self._queue.clear()
        for slot in self._slots.values():
            if len(slot.held) > 1:
                self._take_back(slot)
        self._note_idle()
        self._answers.wake()

    def hand_back(self) -> list[int]:
        """Hand back what has not begun, and go on; return the leases of what has."""
        running = []
        for slot, current in self._look([slot for slot in self._slots.values() if slot.held]):
            if current in slot.held:
                running.append(slot.held[current].lease)
        self.recall([lease for lease in self.leases() if lease not in running])
        return running

    def leases(self) -> list[int]:
        """Return the leases of all tasks that are here."""
        held = [item.lease for slot in self._slots.values() for item in slot.held.values()]
        return [*self._parked, *(item.lease for item in self._queue), *held]

    def functions(self) -> list[int]:
        """Return the numbers of all callables that tasks may name."""
        kept = {self._settings.initializer_needs}
        for number in sorted(self._functions, reverse=True):  # behind what they need
            if number in kept:
                kept.update(self._functions[number].needs)
        return [number for number in self._functions if number not in kept]

    @property
    def has_begun(self) -> bool:
        """Whether the client was told that a slot is ready."""
        return self._announced

    def reclaim(self) -> None:
        """Hand back, unfinished, what runs: the platform gives no more time."""
        for slot in list(self._slots.values()):
            if slot.held:
                slot.kill_reason, slot.kill_lease = RECLAIMED, 0  # whichever it runs by then
                self._kill(slot)

    def _note_idle(self) -> None:
        if self._draining and not any(slot.held for slot in self._slots.values()):
            self.idle.set()

    @property
    def running(self) -> int:
        """Slots that have a task."""
        return sum(1 for slot in self._slots.values() if slot.held)

    @property
    def queued(self) -> int:
        """Tasks that wait here for a slot."""
        return len(self._queue) + len(self._parked)

    def started(self) -> list[int]:
        """Leases that run, and were not reported as running before."""
        now = self._loop.time()
        found = []
        for slot in self._slots.values():
            if slot.held and now - slot.progress_at > 0.002:
                current = slot.cells[CURRENT]
                if current != slot.reported and current > slot.fence and current in slot.held:
                    slot.reported = current
                    found.append(slot.held[current].lease)
        return found

    def stop(self, *, kill: bool) -> None:
        """End every slot; ``stopped`` is set when the last one is gone."""
        self._draining = True
        for slot in list(self._slots.values()):
            if kill:
                self._kill(slot)
            elif slot.is_staying:
                self._stop_slot(slot)
        if not self._slots:
            self.stopped.set()

    def groups(self) -> list[int]:
        """Return the process groups of the slots, one each."""
        return [slot.pid for slot in self._slots.values() if slot.pid]

    def kill_groups(self) -> None:
        """Kill the slots without the zygote, which is gone, and what their tasks started."""
        for pid in self.groups():
            try:
                os.killpg(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        # What left those groups came to us when the zygote died.
        kill_children(grace=ORPHAN_GRACE)

    def close(self) -> None:
        """Let go of the zygote, which kills whatever slot is left."""
        if self._refork is not None:
            self._refork.cancel()
        self._loop.remove_reader(self._zygote.fileno())
        self._zygote.close()

    # Slots come and go.

    def _fork(self) -> Child | None:
        """Have another slot started; ``None``: not now, for want of files, and there are others.

        Raises:
            OSError: If there are no others.
        """
        self._numbers += 1
        try:
            slot = Child(self._numbers)
        except OSError as exc:
            if not self._slots:
                raise
            if self._refork is None:
                print(f"cloudexec worker: no further slot: {exc}", file=sys.stderr, flush=True)
                self._refork = self._loop.call_later(_REFORK_PAUSE, self._fork_again)
            return None
        slot.idle_since = self._loop.time()
        slot.cells[SPILL] = self._spill
        self._slots[slot.number] = slot
        self._forking.append(slot)
        if len(self._forking) == 1:
            self._fork_next()
        return slot

    def _fork_again(self) -> None:
        self._refork = None
        self.dispatch()

    def _fork_next(self) -> None:
        slot = self._forking[0]
        message = MESSAGE.pack(FORK, 0, 0, 0, slot.number)
        try:
            socket.send_fds(self._zygote, [message], slot.child_fds)
        except OSError:
            self._on_zygote_gone()
            return
        for fd in slot.child_fds:
            os.close(fd)
        settings = self._settings
        setup = {
            "cwd": settings.cwd,
            "sys_path": list(settings.sys_path),
            "modules": settings.modules,
            "argv": list(settings.argv),
            "settings": settings.settings.hex(),
            "direct_path": settings.direct_path,
            "token": settings.token.hex(),
            "authkey": settings.authkey.hex(),
            "depth": settings.depth,
            "client_pid": settings.client_pid,
            "number": number_of(slot.number, settings.number, settings.slots, settings.inheritance),
            "inheritance": settings.inheritance,
            "main": settings.main,
        }
        body = json.dumps(setup).encode()
        self._write(slot, HEADER.pack(Kind.SETUP, len(body), 0) + body)
        if settings.initializer:
            number = settings.initializer_needs
            if number:
                self._send_function(slot, number, self._functions[number])
            body = settings.initializer
            if settings.initializer_blobs:
                body = self._blobs.places(settings.initializer_blobs) + body
                number |= COMPOSED
            self._write(slot, HEADER.pack(Kind.INITIALIZER, len(body), number) + body)
        else:
            self._write(slot, HEADER.pack(Kind.READY, 0, 0))
        self._loop.add_reader(slot.results_fd, self._on_answers, slot)
        self._watch_raw_output(slot)

    def _watch_raw_output(self, slot: Child) -> None:
        for fd, stream in ((slot.stdout_fd, 1), (slot.stderr_fd, 2)):
            self._loop.add_reader(fd, self._on_raw_output, slot, fd, stream)

    def _on_zygote(self) -> None:
        try:
            data = self._zygote.recv(MESSAGE.size * 64)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._zygote.fileno())
            self._on_zygote_gone()
            return
        data = self._input + data
        whole = len(data) - len(data) % MESSAGE.size
        self._input = data[whole:]
        for kind, pid, status, peak, number in MESSAGE.iter_unpack(data[:whole]):
            slot = self._slots.get(number)
            if slot is None:
                continue
            if kind == STARTED:
                slot.pid = pid
                self._answers.groups_changed()
                self._forking.popleft()
                if self._forking:
                    self._fork_next()
                if slot.state is SlotState.KILLED:
                    self._kill(slot)  # that was asked for before it had a process
            elif kind == EXITED:
                self._on_exit(slot, status, peak)

    def _kill(self, slot: Child) -> None:
        if slot.state is SlotState.EXITED:
            return
        if slot.state is not SlotState.KILLED:
            slot.enter(SlotState.KILLED)
        if slot.pid:
            try:
                self._zygote.send(MESSAGE.pack(KILL, slot.pid, 0, 0, slot.number))
            except OSError:
                self._on_zygote_gone()

    def _stop_slot(self, slot: Child) -> None:
        slot.enter(SlotState.STOPPING)
        slot.start_is_open = False
        self._write(slot, HEADER.pack(Kind.STOP, 0, 0))
        slot.stop_timer = self._loop.call_later(_STOP_GRACE, self._kill, slot)

    def _on_exit(self, slot: Child, status: int, peak: int) -> None:
        slot.enter(SlotState.EXITED)
        slot.paused = False
        self._read_answers(slot, last=True)
        self._take_finished(slot, self._finished(slot))
        for fd, stream in ((slot.stdout_fd, 1), (slot.stderr_fd, 2)):
            self._on_raw_output(slot, fd, stream, last=True)
        del self._slots[slot.number]
        for timer in (slot.timer, slot.stop_timer):
            if timer is not None:
                timer.cancel()
        for fd in slot.fds():
            self._loop.remove_reader(fd)
            self._loop.remove_writer(fd)
            os.close(fd)
        if not slot.small:
            slot.close_arena()
        code = os.waitstatus_to_exitcode(status)
        self._blame(slot, code, peak)
        if slot.start_is_open and not slot.kill_reason:
            self._on_failed_start(code)
        self._note_idle()
        if self._draining and not self._slots:
            self.stopped.set()
        self.dispatch()
        self._answers.wake()

    def _blame(self, slot: Child, code: int, peak: int) -> None:
        """Report the task that ran when the slot died; the others never began."""
        current = slot.cells[CURRENT]
        if slot.is_lost:  # nobody knows what became of these
            guilty = list(slot.held)
        else:
            guilty = [n for n in slot.held if n == current or n in slot.unopened]
        if not guilty and slot.held:
            # It had not begun with any: nobody is to blame, unless this happens time and again.
            number, first = next(iter(slot.held.items()))
            first.spared += 1
            if first.spared > _SPARED:
                guilty = [number]
        kills = oom_kills(alone=self._settings.memory_mib > 0) if guilty else 0
        for number in guilty:
            item = slot.held.pop(number)
            killed_us = slot.kill_reason and slot.kill_lease in (0, item.lease)
            self._answers.failure(
                Failure(
                    item.lease,
                    slot.kill_reason if killed_us else SLOT_LOST,
                    message=slot.kill_message,
                    output=self._tail(slot, number),
                    exit_code=code,
                    peak_memory_bytes=peak,
                    seconds=self._loop.time() - slot.progress_at,
                    out_of_memory=code == -signal.SIGKILL
                    and not (slot.kill_reason or slot.is_lost)
                    and (kills > self._oom_kills or self._filled_memory(peak)),
                )
            )
            self._oom_kills = kills
        self._requeue(list(slot.held.values()))
        slot.held.clear()

    def _filled_memory(self, peak: int) -> bool:
        """Whether a slot that somebody killed had its share of the container's memory in use.

        Where the container's own counters cannot be read, that is the evidence there is.
        """
        share = self._settings.memory_mib * 2**20 / self._settings.slots
        return 0 < _FULL * share <= peak

    def _tail(self, slot: Child, delivery: int) -> str:
        return bytes(slot.tail.get(delivery, b"")).decode("utf-8", "replace")

    def _on_failed_start(self, code: int) -> None:
        self._failed_starts += 1
        if self._failed_starts >= _FAILED_STARTS:
            from cloudexec._errors import InitializerError
            from cloudexec._payload import dumps_exception

            why = f"with exit code {code}; does the initializer end its process?"
            memory = self._settings.memory_mib
            if code == -signal.SIGKILL and memory:
                why = (
                    f"killed; this worker has {memory} MiB for {self._settings.slots} slots: "
                    f"if the initializer needs more, give memory= a larger size"
                )
            error = InitializerError(
                f"{_FAILED_STARTS} slots in a row ended before they were ready, the last one {why}"
            )
            self._answers.initializer_failed(dumps_exception(error))

    def _requeue(self, items: list[WorkItem]) -> None:
        """Put items that never began back at the head of the queue, or hand them back."""
        back = []
        for item in items:
            if item.recalled or self._draining:
                self._answers.returned(item.lease)
            else:
                back.append(item)
        self._queue.extendleft(reversed(back))

    # Tasks to slots.

    def dispatch(self) -> None:
        """Give waiting tasks to slots that have room."""
        queue = self._queue
        if queue and not self._draining:
            idle: list[Child] = []
            busy: list[Child] = []
            alive = 0
            for slot in self._slots.values():
                if not slot.is_staying:
                    continue
                alive += 1
                if slot.blocked:
                    continue
                if not slot.held:
                    idle.append(slot)
                elif not (slot.exclusive or slot.taking_back or slot.straggling):
                    busy.append(slot)
            # Ready slots first; forking ones take tasks too, they come up in milliseconds.
            idle.sort(key=lambda slot: slot.state is SlotState.STARTING)
            room = self._settings.slots - len(self._slots)
            starting = sum(1 for slot in idle if slot.state is SlotState.STARTING)
            wanted = len(queue) - len(idle)
            while room > 0 and wanted > 0 and starting < 4:
                forked = None if self._refork is not None else self._fork()
                if forked is None:
                    break
                idle.append(forked)
                room -= 1
                wanted -= 1
                starting += 1
                alive += 1
            for slot in idle:
                if not queue:
                    break
                self._send_batch(slot, -(-len(queue) // max(alive, 1)))
            for slot in busy:
                if not queue:
                    break
                if slot.seconds < _BATCH_SECONDS / 2:
                    self._send_batch(slot, -(-len(queue) // max(alive, 1)))
        self._arrange_tick()
        if self._settings.idle_timeout >= 0 and self._trim_handle is None and self._slots:
            pause = max(0.05, self._settings.idle_timeout)
            self._trim_handle = self._loop.call_later(pause, self._trim)

    def _send_batch(self, slot: Child, share: int) -> None:
        """Send as many tasks as the slot should hold, at most ``share`` of them."""
        if slot.state is not SlotState.READY or not self._announced:
            return
        queue = self._queue
        most = min(share, _BATCH_TASKS - len(slot.held))
        if self._settings.max_tasks_per_child:
            most = min(most, self._settings.max_tasks_per_child - slot.sent)
        leases: list[int] = []
        functions: list[int] = []
        payloads: list[bytes] = []
        size = 0
        held = slot.held
        if not held:
            slot.progress_at = self._loop.time()
            slot.seconds = 0.0
        seconds = slot.seconds
        while queue and len(leases) < most:
            item = queue[0]
            function = self._functions.get(item.function) if item.function else None
            terms = item.terms
            alone = item.timeout > 0 or item.seconds > _BATCH_SECONDS or terms is not None
            if held and (alone or seconds + item.seconds > _BATCH_SECONDS):
                break
            if size and size + len(item.payload) > _BATCH_BYTES:
                break
            if function is not None and item.function not in slot.functions:
                if leases:
                    self._write_batch(slot, leases, functions, payloads)
                    leases, functions, payloads = [], [], []
                self._send_function(slot, item.function, function)
            queue.popleft()
            if alone:
                self._apply_terms(slot, item)
            number, payload = item.function, item.payload
            if item.blobs is not None:
                number |= COMPOSED
                payload = self._blobs.places(item.blobs) + payload
            if item.keep:
                number |= KEPT
            slot.sent += 1
            held[slot.sent] = item
            leases.append(item.lease)
            functions.append(number)
            payloads.append(payload)
            size += len(payload)
            seconds += item.seconds
            if alone:
                slot.exclusive = True
                if item.timeout > 0:
                    self._start_timer(slot, item)
                break
        slot.seconds = seconds
        if leases:
            self._write_batch(slot, leases, functions, payloads)

    def _apply_terms(self, slot: Child, item: WorkItem) -> None:
        """Prepare a slot that has nothing to do for what was said about its next task."""
        terms = item.terms
        slot.limit = 0
        if terms is None:
            return
        if terms.env:
            body = json.dumps(terms.env).encode()
            self._write(slot, HEADER.pack(Kind.ENVIRONMENT, len(body), slot.sent + 1) + body)
        if terms.memory:
            slot.limit = terms.memory
            slot.taken_before = memory_taken(slot.pid, terms.memory)
            if self._memory_handle is None:
                self._memory_handle = self._loop.call_later(_MEMORY_TICK, self._look_at_memory)
        slot.ends = terms.last

    def _look_at_memory(self) -> None:
        """Kill the slots whose tasks have taken more than they may."""
        self._memory_handle = None
        for slot in list(self._slots.values()):
            current = slot.cells[CURRENT]
            if not slot.limit or current not in slot.held or slot.is_over:
                continue
            taken = memory_taken(slot.pid, slot.limit + slot.taken_before) - slot.taken_before
            if taken > slot.limit:
                slot.kill_message = str(taken)
                self.kill([slot.held[current].lease], OUTGREW)
        if any(slot.limit and slot.held for slot in self._slots.values()):
            self._memory_handle = self._loop.call_later(_MEMORY_TICK, self._look_at_memory)

    def _write_batch(
        self, slot: Child, leases: list[int], functions: list[int], payloads: list[bytes]
    ) -> None:
        count = len(leases)
        sizes = list(map(len, payloads))
        columns = struct.pack(f"<I{count}Q{count}I{count}I", count, *leases, *functions, *sizes)
        length = len(columns) + sum(sizes)
        header = HEADER.pack(Kind.BATCH, length, slot.sent - count + 1)
        self._write(slot, b"".join((header, columns, *payloads)))

    def _send_function(self, slot: Child, number: int, function: _Function) -> None:
        slot.functions.add(number)
        for need in function.needs:
            if need not in slot.functions and need in self._functions:
                self._send_function(slot, need, self._functions[need])
        pickle = function.pickle
        if function.blobs:
            pickle = self._blobs.places(function.blobs) + pickle
        about = b""
        if function.needs or function.globals:
            about = json.dumps([function.needs, function.globals, function.module]).encode()
        flags = FUNCTION.pack(function.fresh, bool(function.blobs), len(about))
        header = HEADER.pack(Kind.FUNCTION, len(flags) + len(about) + len(pickle), number)
        self._write(slot, b"".join((header, flags, about, pickle)))

    def _start_timer(self, slot: Child, item: WorkItem) -> None:
        slot.timer = self._loop.call_later(item.timeout, self.kill, [item.lease], TIMED_OUT)

    def _write(self, slot: Child, data: bytes | memoryview) -> None:
        if slot.is_over:
            return
        slot.written += len(data)
        if not slot.out:
            try:
                done = os.write(slot.tasks_fd, data)
            except BlockingIOError:
                done = 0
            except OSError:
                return  # it is dying; its exit tells the rest
            if done == len(data):
                return
            data = memoryview(data)[done:]
            self._loop.add_writer(slot.tasks_fd, self._on_writable, slot)
        slot.out.append(memoryview(data))

    def _on_writable(self, slot: Child) -> None:
        try:
            while slot.out:
                data = slot.out[0]
                done = os.write(slot.tasks_fd, data)
                if done < len(data):
                    slot.out[0] = data[done:]
                    return
                slot.out.popleft()
        except BlockingIOError:
            return
        except OSError:
            slot.out.clear()
        self._loop.remove_writer(slot.tasks_fd)

    # Answers from slots.

    def _on_answers(self, slot: Child) -> None:
        self._read_answers(slot)
        self.dispatch()
        self._answers.wake()

    def _read_answers(self, slot: Child, *, last: bool = False, rest: bool = False) -> None:
        """Read from the slot's pipe.

        Args:
            slot: Whose.
            last: To its end: the slot is gone.
            rest: All that is there, though nobody may have room for what is printed now.
        """
        # The first read is a small one: room for a megabyte costs more than most answers.
        read_bytes = _READ_BYTES
        done = 0
        while True:
            try:
                data = os.read(slot.results_fd, read_bytes)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            if not data:
                if not last:
                    self._loop.remove_reader(slot.results_fd)
                break
            done += len(data)
            is_short = len(data) < read_bytes
            if slot.input:
                slot.input += data
                data = bytes(slot.input)
                slot.input.clear()
            used = self._parse(slot, data)
            if used < len(data):
                slot.input += data[used:]
            if not last and (is_short or (done >= PIPE_BYTES if rest else slot.paused)):
                break
            read_bytes = PIPE_BYTES

    def _parse(self, slot: Child, data: bytes) -> int:
        at = 0
        size = len(data)
        while size - at >= HEADER.size:
            kind, length, number = HEADER.unpack_from(data, at)
            if size - at - HEADER.size < length:
                break
            at += HEADER.size
            if kind == Kind.RESULTS:
                if not slot.raw_paused:
                    # What was printed before this is of one of these tasks, not of the next.
                    first = RESULT.unpack_from(data, at)[0]
                    self._on_raw_output(slot, slot.stdout_fd, 1, delivery=first)
                    self._on_raw_output(slot, slot.stderr_fd, 2, delivery=first)
                self._take_results(slot, data, at, at + length)
            else:
                self._take_frame(slot, kind, number, data[at : at + length])
            at += length
        return at

    def _take_results(self, slot: Child, data: bytes | memoryview, at: int, end: int) -> None:
        held = slot.held
        unpack = RESULT.unpack_from
        header = RESULT.size
        result = self._answers.result
        while at < end:
            delivery, seconds, status, size = unpack(data, at)
            at += header
            payload = bytes(data[at : at + size])
            at += size
            item = held.pop(delivery, None)
            if item is None:
                continue  # known from the shared page already
            slot.seconds -= item.seconds
            if status == frames.OK:
                result(item.lease, payload, seconds)
            elif status == frames.DELIVERED:
                self._answers.delivered(item.lease, seconds)
            else:
                failure = Failure(item.lease, status, payload, seconds=seconds)
                failure.output = self._tail(slot, delivery)
                self._answers.failure(failure)
            if slot.tail:
                slot.tail.pop(delivery, None)
        self._after_answer(slot)

    def _after_answer(self, slot: Child) -> None:
        slot.progress_at = self._loop.time()
        slot.straggling = False
        if slot.timer is not None and slot.exclusive:
            slot.timer.cancel()
            slot.timer = None
        if not slot.held:
            # Nothing is left to be taken back, and what is sent now is not to be.
            slot.taking_back = False
            slot.exclusive = False
            slot.seconds = 0.0
            slot.idle_since = slot.progress_at
            slot.tail.clear()
            self._note_idle()
            most = self._settings.max_tasks_per_child
            if ((most and slot.sent >= most) or slot.ends) and slot.is_staying:
                self._stop_slot(slot)

    def _take_frame(self, slot: Child, kind: int, number: int, body: bytes) -> None:
        if kind == Kind.OUTPUT:
            self._take_output(slot, number, body[0], body[1:])
        elif kind == Kind.RESULT_COMPOSED:
            self._take_composed(slot, number, body)
        elif kind == Kind.FAILURE:
            item = slot.held.pop(number, None)
            if item is not None:
                slot.seconds -= item.seconds
                seconds, status = struct.unpack_from("<fB", body)
                tail = self._tail(slot, number)
                self._answers.failure(
                    Failure(item.lease, status, body[5:], output=tail, seconds=seconds)
                )
            self._after_answer(slot)
        elif kind in (Kind.DROPPED, Kind.GONE):
            item = slot.held.pop(number, None)
            if item is not None:  # else it was taken back already
                slot.seconds -= item.seconds
                if kind == Kind.GONE:
                    # The client knows where else to have it from.
                    self._answers.returned(item.lease)
                else:
                    self._requeue([item])
                self._after_answer(slot)
        elif kind == Kind.READY:
            slot.start_is_open = False
            if slot.state is SlotState.STARTING:  # else its end overtook what it says here
                slot.enter(SlotState.READY)
            self._failed_starts = 0
            if not self._announced:
                self._answers.ready()
        elif kind == Kind.INITIALIZER_FAILED:
            slot.start_is_open = False
            self._kill(slot)
            self._answers.initializer_failed(body)

    def _take_composed(self, slot: Child, delivery: int, body: bytes) -> None:
        """Take hold of the files that a large result is in."""
        seconds, keep = _COMPOSED_RESULT.unpack_from(body)
        places, at = unpack_places(memoryview(body)[_COMPOSED_RESULT.size :])
        head = body[_COMPOSED_RESULT.size + at :]
        blobs: list[ResultBlob] = []
        try:
            for place in places:
                if place.mappable:
                    fd = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
                    blobs.append(ResultBlob(fd, place))
                    continue
                if slot.arena < 0:
                    slot.arena = os.open(place.path, os.O_RDONLY | os.O_CLOEXEC)
                    self._write(slot, HEADER.pack(Kind.RELEASE, 0, 0))
                slot.small += 1
                slot.small_bytes += block_size(place.size)
                blobs.append(ResultBlob(slot.arena, place, slot))
        except OSError as exc:
            for blob in blobs:
                self._drop(blob)
            slot.unopened.add(delivery)
            if exc.errno in (errno.EMFILE, errno.ENFILE) and slot.state is not SlotState.EXITED:
                self._refuse_result(slot, delivery, [place.number for place in places], exc)
            elif slot.state is not SlotState.EXITED:
                self._kill(slot)  # it is dying, or its files are hidden from us: it waits for us
            return  # it is to blame for this delivery, which it has run
        files = [blob.place.number for blob in blobs if blob.owner is None]
        self._waiting_files += len(files)
        self._waiting_bytes += sum([blob.place.size for blob in blobs])
        if files and self._is_full() and not keep:
            # Its process waits, and with it what it would go on to make.
            slot.blocked = True
            self._blocked.append((slot, files))
        else:
            self._release(slot, files)
        item = slot.held.pop(delivery, None)
        if item is None:
            for blob in blobs:
                self.let_go(blob)
        else:
            slot.seconds -= item.seconds
            self._answers.composed(item.lease, seconds, head, blobs, keep=keep)
        self._after_answer(slot)

    def _refuse_result(
        self, slot: Child, delivery: int, numbers: list[int], error: OSError
    ) -> None:
        """Fail a task whose result cannot be opened here; its slot goes on."""
        from cloudexec._errors import PayloadError
        from cloudexec._payload import dumps_exception

        for number in numbers:
            self._write(slot, HEADER.pack(Kind.RELEASE, 0, number))
        item = slot.held.pop(delivery, None)
        if item is not None:
            slot.seconds -= item.seconds
            why = PayloadError(
                f"the worker could not open the task's result ({error.strerror}): it needs a file "
                f"descriptor for each large result that waits to be sent; raise its limit "
                f"(ulimit -n)"
            )
            self._answers.failure(Failure(item.lease, PICKLE_FAILED, dumps_exception(why)))
        self._after_answer(slot)

    def _drop(self, blob: ResultBlob) -> None:
        """Close a part of a result that was never counted."""
        slot = blob.owner
        if slot is None:
            os.close(blob.fd)
        else:
            slot.small -= 1
            slot.small_bytes -= block_size(blob.place.size)

    def _release(self, slot: Child, files: Sequence[int]) -> None:
        """Tell a slot that files of its results are open here."""
        if slot.state is not SlotState.EXITED:
            for number in files:
                self._write(slot, HEADER.pack(Kind.RELEASE, 0, number))
        slot.blocked = slot.small_bytes > MOST_WAITING or any(
            each is slot for each, _ in self._blocked
        )

    def _is_full(self) -> bool:
        waiting = self._waiting_bytes
        return waiting > self._most_waiting or self._waiting_files > _MOST_WAITING_FILES

    def let_go(self, blob: ResultBlob, *, close: bool = True) -> None:
        """A part of a result has been taken, or nobody wants it.

        Args:
            blob: Which.
            close: Whether to close its file, if it is the only one in it.
        """
        slot = blob.owner
        self._waiting_bytes -= blob.place.size
        if slot is None:
            self._waiting_files -= 1
            if close:
                os.close(blob.fd)
        else:
            slot.small -= 1
            slot.small_bytes -= block_size(blob.place.size)
            if slot.state is not SlotState.EXITED:
                self._release(slot, [blob.place.number])
            elif not slot.small and slot.number not in self._slots:
                slot.close_arena()  # all that it said has been read
        while self._blocked and not self._is_full():
            self._release(*self._blocked.popleft())
        if self._queue:
            self._loop.call_soon(self.dispatch)

    def spill(self, *, on: bool) -> None:
        """Say whether large results are to go to disk."""
        if on != self._spill:
            self._spill = on
            for slot in self._slots.values():
                slot.cells[SPILL] = on

    def _resume(self, slot: Child) -> None:
        if slot.paused and slot.state is not SlotState.EXITED:
            slot.paused = False
            self._loop.add_reader(slot.results_fd, self._on_answers, slot)
            self._loop.call_soon(self._on_answers_again, slot)

    def _on_answers_again(self, slot: Child) -> None:
        if slot.state is not SlotState.EXITED and not slot.paused:
            self._on_answers(slot)

    def resume_output(self) -> None:
        """The client has taken output: go on reading from slots that were held for it."""
        for slot in list(self._slots.values()):
            if slot.raw_paused and slot.state is not SlotState.EXITED:
                slot.raw_paused = False
                self._watch_raw_output(slot)
            self._resume(slot)

    def _take_output(self, slot: Child, delivery: int, stream: int, data: bytes) -> None:
        item = slot.held.get(delivery)
        tail = slot.tail.get(delivery)
        if tail is None:
            tail = slot.tail[delivery] = bytearray()
        tail += data if stream != LOG_STREAM else line_of(data)
        if len(tail) > 2 * _TAIL_BYTES:
            del tail[:-_TAIL_BYTES]
        lease, number = (item.lease, item.number) if item is not None else (0, 0)
        go_on = self._answers.output(lease, number, stream, data)
        if not go_on and slot.state is not SlotState.EXITED:
            if not slot.paused:
                slot.paused = True
                self._loop.remove_reader(slot.results_fd)
            if not slot.raw_paused:
                slot.raw_paused = True
                self._loop.remove_reader(slot.stdout_fd)
                self._loop.remove_reader(slot.stderr_fd)

    def _on_raw_output(
        self, slot: Child, fd: int, stream: int, *, last: bool = False, delivery: int = 0
    ) -> None:
        """Output that did not go through ``sys.stdout``: from C, or from a task's children."""
        while True:
            try:
                data = os.read(fd, 65536)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                if not last:
                    self._loop.remove_reader(fd)
                return
            self._take_output(slot, delivery or slot.cells[CURRENT], stream, data)
            self._answers.wake()
            if not last:
                return

    def _finished(self, slot: Child) -> bytes:
        """Return the results that the slot has finished and not written to its pipe."""
        cells = slot.cells
        flushes, used = cells[FLUSHES], cells[USED]
        results = bytes(slot.page[RESULTS_AT : RESULTS_AT + used])
        # Otherwise others may have been put there meanwhile, and these are in the pipe.
        return results if cells[FLUSHES] == flushes else b""

    def _take_finished(self, slot: Child, results: bytes) -> None:
        if results:
            progress = slot.progress_at
            self._take_results(slot, results, 0, len(results))
            slot.progress_at = progress  # how long ago these were finished is not known

    def _look(self, slots: Sequence[Child]) -> list[tuple[Child, int]]:
        """Take all results that slots have finished.

        Returns:
            Each slot with the delivery that it runs, or is about to answer or to drop, if that is
            still held. Of the others that are held it has begun none. It will begin some if it
            goes on, unless they are behind its fence.
        """
        # In the order in which a task goes on, from cell to page to pipe. Asked the other way
        # round, one that went on meanwhile would be seen nowhere, and be taken for not begun.
        found = [(slot, slot.cells[CURRENT]) for slot in slots]
        if found and _REORDERS_WRITES:
            time.sleep(_WRITES_ARRIVE)
        for slot, _ in found:
            results = self._finished(slot)
            self._read_answers(slot, rest=True)  # first: what these tasks printed is there
            self._take_finished(slot, results)
        return found

    # Time.

    def _arrange_tick(self) -> None:
        if self._tick_handle is None and any(
            slot.held and (len(slot.held) > 1 or slot.reported not in slot.held)
            for slot in self._slots.values()
        ):
            self._tick_handle = self._loop.call_later(_TICK, self._tick)

    def _tick(self) -> None:
        self._tick_handle = None
        now = self._loop.time()
        slots = list(self._slots.values())
        for slot, current in self._look([slot for slot in slots if slot.taking_back]):
            self._finish_taking_back(slot, current)
        stuck = [
            slot
            for slot in slots
            if len(slot.held) > 1 and not slot.taking_back and now - slot.progress_at > _STRAGGLER
        ]
        for slot, _ in self._look(stuck):
            slot.straggling = True
            if len(slot.held) > 1:
                self._take_back(slot)
        self.audit()
        self.dispatch()
        self._answers.wake()

    def audit(self) -> None:
        """Find slots that wait for tasks and are believed to hold some; nothing else would.

        Whatever led to that is a fault of ours. Such a task has been lost, or its answer has: that
        counts as an attempt, and it is tried again if it may be.
        """
        for slot in self._slots.values():
            if slot.taking_back or slot.is_over:
                continue  # what it has dropped without a word is taken back at the next tick
            if slot.held and slot.cells[WAITING] == slot.written + 1:
                self._look([slot])
                if slot.held:
                    leases = [item.lease for item in slot.held.values()]
                    print(f"slot {slot.pid} has lost its tasks {leases}", file=sys.stderr)
                    slot.kill_message = "the process that was to run it has lost it"
                    slot.is_lost = True
                    self._kill(slot)

    def _take_back(self, slot: Child) -> None:
        """Begin to take back what the slot has not begun: see ``frames`` for how."""
        if not slot.taking_back:
            slot.taking_back = True
            slot.fence = slot.cells[FENCE] = slot.sent
            self._arrange_tick()

    def _finish_taking_back(self, slot: Child, current: int) -> None:
        """A tick later the slot sees the fence before whatever it begins."""
        if not slot.taking_back:
            return  # it has answered all meanwhile
        slot.taking_back = False
        # Also those before that one: they were dropped, with a batch that ended before its time.
        taken = [
            slot.held.pop(number)
            for number in list(slot.held)
            if number != current and number <= slot.fence and number not in slot.unopened
        ]
        for item in taken:
            slot.seconds -= item.seconds
        self._requeue(taken)
        if slot.held:
            self._kill_marked(slot)
        else:
            self._after_answer(slot)

    def _trim(self) -> None:
        """End slots that have had nothing to do for long."""
        self._trim_handle = None
        settings = self._settings
        now = self._loop.time()
        alive = [slot for slot in self._slots.values() if slot.is_staying]
        spare = len(alive) - settings.min_slots
        for slot in alive:
            if spare <= 0:
                break
            if (
                not slot.held
                and slot.state is SlotState.READY
                and now - slot.idle_since >= settings.idle_timeout
            ):
                self._stop_slot(slot)
                spare -= 1
        if self._slots and settings.idle_timeout >= 0:
            pause = max(0.05, settings.idle_timeout)
            self._trim_handle = self._loop.call_later(pause, self._trim)
