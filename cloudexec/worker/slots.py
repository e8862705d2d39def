"""The slot processes of a worker: how they are started, told to end, and killed."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from cloudexec import _plain_json
from cloudexec._record_class import record
from cloudexec.worker.blobs import BlobCache
from cloudexec.worker.child import Child
from cloudexec.worker.frames import COMPOSED, HEADER, SPILL, Kind
from cloudexec.worker.functions import Functions
from cloudexec.worker.process import number_of
from cloudexec.worker.reporting import Answers
from cloudexec.worker.slot_model import SlotState
from cloudexec.worker.zygote import (
    EXITED,
    FORK,
    KILL,
    MESSAGE,
    ORPHAN_GRACE,
    STARTED,
    kill_children,
)

__all__ = ["Settings", "Slots"]

_REFORK_PAUSE = 0.5
"""Seconds after which a slot is started again, if it failed because too many files were open."""
_STOP_GRACE = 5.0
"""Seconds that a slot which was told to stop may take for its exit handlers."""
_FAILED_STARTS = 3


@record
class Settings:
    """The client's settings for slots, from its first message."""

    slots: int
    cwd: str = ""
    sys_path: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()
    settings: bytes = b""
    initializer: bytes = b""
    initializer_blobs: tuple[int, ...] = ()
    initializer_needs: int = 0
    main: Mapping[str, str] = MappingProxyType({})
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
    inheritance: Mapping[str, Any] = MappingProxyType({})


class Slots:
    """The slots of one worker.

    Args:
        settings: The client's settings.
        zygote: The socket to the zygote.
        functions: The callables, one of which the initializer may need.
        blobs: The blobs that the initializer refers to.
        answers: Told when the first slot is ready, when process groups change, and when no slot can
            start.
        watch: Called with a slot whose pipes must be read from now on.
        exited: Called with a slot whose process has ended, its status as from ``os.wait``, and the
            most memory that it had, in bytes.
        may_fork: Called when slots can be started again after too many files were open.
        on_zygote_gone: Called when the zygote has died, so that the worker cannot go on.
    """

    def __init__(
        self,
        settings: Settings,
        zygote: socket.socket,
        functions: Functions,
        blobs: BlobCache,
        answers: Answers,
        *,
        watch: Callable[[Child], None],
        exited: Callable[[Child, int, int], None],
        may_fork: Callable[[], None],
        on_zygote_gone: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._zygote = zygote
        self._functions = functions
        self._blobs = blobs
        self._answers = answers
        self._watch = watch
        self._exited = exited
        self._may_fork = may_fork
        self._on_zygote_gone = on_zygote_gone
        self._loop = asyncio.get_running_loop()
        self.children: dict[int, Child] = {}
        """By number: the slots whose end has not been handled. Only this class writes it."""
        self.announced = False
        """Whether the client was told that a slot is ready, so that tasks may begin."""
        self.stopped = asyncio.Event()
        """Set when no slot is left after ``stop``."""
        self._is_stopping = False
        self._numbers = 0
        self._forking: deque[Child] = deque()
        self._refork: asyncio.TimerHandle | None = None  # set while no further slot can be started
        self._trim_handle: asyncio.TimerHandle | None = None
        self._failed_starts = 0
        self._is_broken = False  # whether the initializer has failed, so that no slot is started
        self._spill = False
        self._input = b""
        zygote.setblocking(False)
        self._loop.add_reader(zygote.fileno(), self._on_zygote)

    # Their start.

    def start(self) -> None:
        """Start the slots that are kept ready even without tasks."""
        for _ in range(min(self._settings.min_slots, self._settings.slots)):
            if self.fork() is None:
                break

    def fork(self) -> Child | None:
        """Start another slot.

        Returns:
            The slot; ``None`` if too many files are open, but other slots exist, or if the
            initializer has failed.

        Raises:
            OSError: If too many files are open, and no slot exists.
        """
        if self._refork is not None or self._is_broken:
            return None
        self._numbers += 1
        try:
            last = self._settings.max_tasks_per_child or sys.maxsize
            slot = Child(self._numbers, self._loop, last)
        except OSError as exc:
            if not self.children:
                raise
            print(f"cloudexec worker: no further slot: {exc}", file=sys.stderr, flush=True)
            self._refork = self._loop.call_later(_REFORK_PAUSE, self._fork_again)
            return None
        slot.idle_since = self._loop.time()
        slot.cells[SPILL] = self._spill
        self.children[slot.number] = slot
        self._forking.append(slot)
        if len(self._forking) == 1:
            self._fork_next()
        return slot

    def _fork_again(self) -> None:
        self._refork = None
        self._may_fork()

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
            "inheritance": dict(settings.inheritance),
            "main": dict(settings.main),
        }
        body = _plain_json.encode(setup)
        slot.write(HEADER.pack(Kind.SETUP, len(body), 0) + body)
        if settings.initializer:
            number = settings.initializer_needs
            if number:
                self._functions.send(slot, number)
            body = settings.initializer
            if settings.initializer_blobs:
                body = self._blobs.places(settings.initializer_blobs) + body
                number |= COMPOSED
            slot.write(HEADER.pack(Kind.INITIALIZER, len(body), number) + body)
        else:
            slot.write(HEADER.pack(Kind.READY, 0, 0))
        self._watch(slot)

    def note_ready(self, slot: Child) -> None:
        """Note that a slot has reported that it is ready."""
        slot.start_is_open = False
        if slot.state is SlotState.STARTING:  # otherwise its end came before this message
            slot.enter(SlotState.READY)
        self._failed_starts = 0
        if not self.announced:
            self._answers.ready()

    def note_initializer_failed(self, slot: Child, error: bytes) -> None:
        """Note that a slot has reported an exception of its initializer."""
        slot.start_is_open = False
        self.kill(slot)
        self._break(error)

    def _break(self, error: bytes) -> None:
        """Report that the initializer has failed, after which it does not run again here."""
        self._is_broken = True
        self._answers.initializer_failed(error)

    # Their end.

    def end(self, slot: Child) -> None:
        """Tell a slot to end by itself; kill it if it takes too long."""
        slot.enter(SlotState.STOPPING)
        slot.start_is_open = False
        slot.write(HEADER.pack(Kind.STOP, 0, 0))
        slot.stop_timer = self._loop.call_later(_STOP_GRACE, self.kill, slot)

    def kill(self, slot: Child) -> None:
        """Kill a slot and the processes that its tasks have started."""
        if slot.state is SlotState.EXITED:
            return
        if slot.state is not SlotState.KILLED:
            slot.enter(SlotState.KILLED)
        if slot.pid:
            try:
                self._zygote.send(MESSAGE.pack(KILL, slot.pid, 0, 0, slot.number))
            except OSError:
                self._on_zygote_gone()

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
            slot = self.children.get(number)
            if slot is None:
                continue
            if kind == STARTED:
                slot.pid = pid
                self._answers.groups_changed()
                self._forking.popleft()
                if self._forking:
                    self._fork_next()
                if slot.state is SlotState.KILLED:
                    self.kill(slot)  # the kill was requested before the slot had a process
            elif kind == EXITED:
                slot.enter(SlotState.EXITED)
                self._exited(slot, status, peak)

    def remove(self, slot: Child) -> None:
        """Remove a slot that has exited, and whose pipes have been read to the end."""
        del self.children[slot.number]
        if slot.stop_timer is not None:
            slot.stop_timer.cancel()
        slot.close()
        if self._is_stopping and not self.children:
            self.stopped.set()

    def note_failed_start(self, code: int) -> None:
        """Note that a slot has ended before it was ready.

        Args:
            code: Its exit code, or the negative number of the signal that ended it.
        """
        self._failed_starts += 1
        if self._failed_starts < _FAILED_STARTS:
            return
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
        self._break(dumps_exception(error))

    def arrange_trim(self) -> None:
        """Set the timer that ends slots which have been idle for long."""
        timeout = self._settings.idle_timeout
        if timeout >= 0 and self._trim_handle is None and self.children:
            self._trim_handle = self._loop.call_later(max(0.05, timeout), self._trim)

    def _trim(self) -> None:
        self._trim_handle = None
        now = self._loop.time()
        alive = [slot for slot in self.children.values() if slot.is_staying]
        spare = len(alive) - self._settings.min_slots
        for slot in alive:
            if spare <= 0:
                break
            if (
                not slot.held
                and slot.state is SlotState.READY
                and now - slot.idle_since >= self._settings.idle_timeout
            ):
                self.end(slot)
                spare -= 1
        self.arrange_trim()

    def stop(self, *, kill: bool) -> None:
        """End all slots; ``stopped`` is set when the last one has exited."""
        self._is_stopping = True
        for slot in list(self.children.values()):
            if kill:
                self.kill(slot)
            elif slot.is_staying:
                self.end(slot)
        if not self.children:
            self.stopped.set()

    def kill_groups(self) -> None:
        """Kill the slots and the processes of their tasks, without the zygote, which is gone."""
        for pid in self.groups():
            try:
                os.killpg(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        # Processes that have left these groups became this process's children when the zygote died.
        kill_children(grace=ORPHAN_GRACE)

    def close(self) -> None:
        """Close the connection to the zygote, which then kills all slots."""
        if self._refork is not None:
            self._refork.cancel()
        self._loop.remove_reader(self._zygote.fileno())
        self._zygote.close()

    # All slots.

    def groups(self) -> list[int]:
        """Return the process groups of the slots, one for each."""
        return [slot.pid for slot in self.children.values() if slot.pid]

    def spill(self, *, on: bool) -> None:
        """Set whether slots write large results to disk; this holds for later slots, too."""
        if on != self._spill:
            self._spill = on
            for slot in self.children.values():
                slot.cells[SPILL] = on
