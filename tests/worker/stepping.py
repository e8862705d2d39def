"""Runs a supervisor and its slots line by line, in an order that the caller chooses.

The code under test is the real ``SlotPool`` and ``Slot`` with their pipes and their shared page of
memory. Each runs in its own thread, and only one thread runs at a time. A thread can be stopped
before each line that reads or writes a shared object, for any time, or for ever, which stands for a
killed slot.

This module takes the place of all else: the event loop, whose time it advances, and the zygote, the
process from which slots are forked.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gc
import heapq
import itertools
import os
import pickle
import random
import re
import select
import signal
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import process
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from cloudexec import _nesting, _payload
from cloudexec._objects.options import Limits
from cloudexec._payload import INLINE_BYTES
from cloudexec._proto import tasks_pb2 as pb
from cloudexec.worker import slot as slot_module
from cloudexec.worker import supervisor as supervisor_module
from cloudexec.worker.blobs import BlobCache
from cloudexec.worker.reporting import ResultBlob
from cloudexec.worker.slots import Settings
from cloudexec.worker.tasks import Failure, WorkItem
from cloudexec.worker.zygote import EXITED, FORK, KILL, MESSAGE, STARTED

SHARED = re.compile(r"cells\[|page\[|os\.(read|write|open)\(|write_all\(|pack_into\(page|_header\(")
"""Matches a line that reads or writes an object which supervisor and slot share."""
PARTS = (
    "answers",
    "child",
    "dispatch",
    "large_results",
    "outlet",
    "slot",
    "slots",
    "supervisor",
    "taking_back",
)
"""Names of the modules of both sides that have such lines."""
Action = Callable[[Any, int], None]
"""Called in the supervisor's thread with the pool and the number of earlier calls."""
TICKS = 8
"""Ticks of the supervisor that pass while a slot is stopped. They are enough to notice that the
slot makes no progress, to take its tasks back, and to send them again."""
_MOST_TICKS = 60


class Stop:
    """A step before which the running thread stops and another thread continues.

    Args:
        step: Number of the step, counted from the beginning over all threads.
        kill: Whether the slot that is stopped there never continues.
    """

    def __init__(self, step: int, *, kill: bool = False) -> None:
        self.step = step
        self.kill = kill

    def __repr__(self) -> str:
        return f"Stop({self.step}{', kill=True' if self.kill else ''})"


class HandLoop:
    """The part of an event loop that ``SlotPool`` uses, run step by step."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._order = itertools.count()
        self._soon: list[asyncio.Handle] = []
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._readers: dict[int, asyncio.Handle] = {}
        self._writers: dict[int, asyncio.Handle] = {}

    def time(self) -> float:
        return self.now

    def get_debug(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        raise context["exception"]

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        pass  # a cancelled timer is skipped when it is due

    def _handle(self, call: Callable[..., object], args: tuple[object, ...]) -> asyncio.Handle:
        return asyncio.Handle(call, args, self)  # type: ignore[arg-type]

    def call_soon(self, call: Callable[..., object], *args: object) -> asyncio.Handle:
        self._soon.append(self._handle(call, args))
        return self._soon[-1]

    def call_later(
        self, delay: float, call: Callable[..., object], *args: object
    ) -> asyncio.TimerHandle:
        when = self.now + delay
        handle = asyncio.TimerHandle(when, call, args, self)  # type: ignore[arg-type]
        heapq.heappush(self._timers, (when, next(self._order), handle))
        return handle

    def add_reader(self, fd: int, call: Callable[..., object], *args: object) -> None:
        self._readers[fd] = self._handle(call, args)

    def remove_reader(self, fd: int) -> None:
        self._readers.pop(fd, None)

    def add_writer(self, fd: int, call: Callable[..., object], *args: object) -> None:
        self._writers[fd] = self._handle(call, args)

    def remove_writer(self, fd: int) -> None:
        self._writers.pop(fd, None)

    def run_ready(self) -> bool:
        """Run all callbacks that are due; return whether there were any."""
        soon, self._soon = self._soon, []
        handles = soon
        readable, writable, _ = select.select([*self._readers], [*self._writers], [], 0)
        handles += [self._readers[fd] for fd in readable]
        handles += [self._writers[fd] for fd in writable]
        for handle in handles:
            if not handle.cancelled():
                handle._callback(*handle._args)  # type: ignore[attr-defined]
        return bool(handles)

    def run_timer(self) -> bool:
        """Advance the time to the next timer and run it; return whether there was one."""
        while self._timers:
            when, _, handle = heapq.heappop(self._timers)
            if not handle.cancelled():
                self.now = max(self.now, when)
                handle._callback(*handle._args)  # type: ignore[attr-defined]
                return True
        return False


@contextlib.contextmanager
def _this_process_unchanged() -> Iterator[None]:
    """Undo the changes that slots make to their process, which here is this process."""
    multi: Any = process
    names = ("_process_counter", "_children", "_current_process", "_parent_process")
    numbered = {name: getattr(multi, name) for name in names}
    modules = {name: sys.modules.get(name) for name in ("__main__", "__mp_main__")}
    streams = sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__
    pickler, depth = _payload.result_pickler, os.environ.get(_nesting.DEPTH)
    try:
        yield
    finally:
        sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__ = streams  # type: ignore[misc]
        _payload.result_pickler = pickler
        for name, value in numbered.items():
            setattr(multi, name, value)
        for name, module in modules.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module
        os.environ.pop(_nesting.DEPTH, None)
        if depth is not None:
            os.environ[_nesting.DEPTH] = depth


class Actor:
    """A thread that runs only when it has the turn."""

    def __init__(self, run: Run, body: Callable[[], None]) -> None:
        self.turn = threading.Semaphore(0)
        self.done = False
        self.dead = False  # a killed thread never continues
        self.slot: Any = None
        self.waits_for: int | None = None  # the end of a pipe that it is about to read from
        self._run = run
        self._body = body
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.thread.start()

    def _main(self) -> None:
        self.turn.acquire()
        sys.settrace(self._run.trace)
        try:
            self._body()
        except BaseException as exc:
            if not self.dead and not self._run.over:
                self._run.problems.append(f"{type(exc).__name__}: {exc}")
        finally:
            sys.settrace(None)
            self.done = True
            self._run.pass_on(self)

    @property
    def can_go_on(self) -> bool:
        if self.done or self.dead:
            return False
        if self.waits_for is None:
            return True
        return bool(select.select([self.waits_for], [], [], 0)[0])


class Run:
    """One run of a scenario under one schedule.

    Args:
        items: The messages that the pool gets, in order.
        stops: The steps before which the thread that has the turn stops.
        slots: Number of slots.
        large: Whether some results are so large that they are left in the slot's file.
        during: The client's requests during the run.
        modules: The supervisor's and the slot's modules. Modules with a mistake show whether the
            search finds it.
    """

    def __init__(
        self,
        items: int,
        stops: Sequence[Stop] = (),
        *,
        slots: int = 1,
        large: bool = False,
        during: Action | None = None,
        modules: tuple[ModuleType, ModuleType] = (supervisor_module, slot_module),
    ) -> None:
        self.results: Counter[int] = Counter()
        self.failures: list[Failure] = []
        self.returned_leases: Counter[int] = Counter()
        self.ran: Counter[int] = Counter()
        self.problems: list[str] = []
        self.steps = 0
        self.kills = 0
        self.over = False
        self.trail: list[str] = []
        self._stops = {stop.step: stop for stop in stops}
        self._items = items
        self._large = large
        self._during = during
        self._supervisor, self._slot = modules
        self._files = _shared_lines(modules)
        self._loop = HandLoop()
        self._ended = threading.Event()
        self._slots: dict[int, Actor] = {}  # by process number
        self._patience = 0
        self._settings = Settings(slots=slots, argv=tuple(sys.argv))
        self._boss: Actor | None = None
        self._current: Actor | None = None
        self._boss_waits = False

    def judge(self) -> str:
        """Return what is wrong, or an empty string if each task has exactly one, right outcome."""
        if self.problems:
            return "; ".join(self.problems)
        failed = Counter(failure.lease for failure in self.failures)
        for lease in range(1, self._items + 1):
            outcomes = self.results[lease], failed[lease], self.returned_leases[lease]
            ran = self.ran[lease]
            if sum(outcomes) != 1:
                return f"task {lease} has {outcomes} results, failures, returns"
            if (
                ran > 1
                or (self.results[lease] and not ran)
                or (self.returned_leases[lease] and ran)
            ):
                return f"task {lease} ran {ran} times and has {outcomes} results, failures, returns"
        if len(self.failures) > self.kills:
            return f"{self.kills} slots were killed, and {self.failures} failed"
        return ""

    # Answers of the pool.

    def result(self, lease: int, payload: bytes, seconds: float) -> None:
        self.results[lease] += 1

    def composed(
        self, lease: int, seconds: float, head: bytes, blobs: Sequence[ResultBlob], *, keep: bool
    ) -> None:
        """Release some results at once, as a session that has sent them on, and others later."""
        if lease % 3:
            self._take(lease, blobs)
        else:
            self._loop.call_soon(self._take, lease, blobs)

    def _take(self, lease: int, blobs: Sequence[ResultBlob]) -> None:
        (blob,) = blobs
        content = os.pread(blob.fd, blob.place.size, blob.place.offset)
        if pickle.loads(content) != _large_value(lease):
            self.problems.append(f"the result of task {lease} is not what it returned")
        self.pool.let_go(blob)
        self.results[lease] += 1

    def failure(self, failure: Failure) -> None:
        self.failures.append(failure)

    def returned(self, lease: int) -> None:
        self.returned_leases[lease] += 1

    def output(self, lease: int, number: int, stream: int, data: bytes) -> bool:
        self.problems.append(f"output: {data.decode()}")
        return True

    def ready(self) -> None:
        self.pool.announced()

    def groups_changed(self) -> None:
        pass

    def wake(self) -> None:
        self.pool.started()

    # The schedule.

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        lines = self._files.get(frame.f_code.co_filename)
        if lines is None:
            return None

        def each_line(frame: FrameType, event: str, arg: object) -> Any:
            if event == "line" and frame.f_lineno in lines:
                self.step(frame)
            return each_line

        return each_line

    def step(self, frame: FrameType | None) -> None:
        """Handle that the thread which has the turn is about to run a line of ``SHARED``."""
        actor = self._current
        if self.over or actor is None or threading.current_thread() is not actor.thread:
            return
        self.steps += 1
        stop = self._stops.get(self.steps)
        if frame is not None and frame.f_code.co_name == "_need":
            fd = frame.f_locals["self"]._tasks_fd
            if "os.read(" in _text(frame):
                actor.waits_for = fd
        if stop is not None:
            if stop.kill and actor is not self._boss:
                self._die(actor)
            self._patience = TICKS
            self._yield(actor)
        elif not actor.can_go_on:
            self._yield(actor)
        actor.waits_for = None

    def _die(self, actor: Actor) -> None:
        actor.dead = True
        self.kills += 1
        results = None if actor.slot is None else actor.slot._paths._files
        if results is not None and results._arena is not None:
            # Nobody can open the file of a process that has ended. Here its path is made to lead to
            # a socket, so that opening it fails, too.
            os.dup2(self._zygote.fileno(), results._arena.segment.fd, inheritable=False)
        (number,) = [number for number, each in self._slots.items() if each is actor]
        self._zygote.send(MESSAGE.pack(EXITED, number, int(signal.SIGKILL), 0, number))

    def _yield(self, actor: Actor) -> None:
        """Let other threads run, and wait until this thread has the turn again."""
        if self._pass(actor):
            actor.turn.acquire()

    def _pass(self, actor: Actor) -> bool:
        """Give the turn to another thread that can run; return whether there is one."""
        boss = self._boss
        assert boss is not None
        if actor is boss:
            for other in self._slots.values():
                if other.can_go_on:
                    self._give(other)
                    return True
            return False
        self._give(boss)
        return True

    def _give(self, actor: Actor) -> None:
        self._current = actor
        actor.turn.release()

    def pass_on(self, actor: Actor) -> None:
        """Give the turn of a thread that has ended to another one."""
        if actor is self._boss or self.over:
            self._ended.set()
            return
        boss = self._boss
        assert boss is not None
        self._give(boss)

    # The threads.

    def go(self) -> Run:
        """Run to the end, and return this run with its ``problems`` and answers."""
        self._zygote, ours = socket.socketpair()
        self._zygote.setblocking(False)
        with _this_process_unchanged():
            asyncio._set_running_loop(self._loop)  # type: ignore[arg-type]
            limits = Limits(2**30, 0)
            try:
                blobs = BlobCache(_no_blob, limits, set, direct=False)
                self.pool = self._supervisor.SlotPool(
                    self._settings, self, ours, lambda: self.problems.append("no zygote"), blobs
                )
            finally:
                asyncio._set_running_loop(None)
            self._boss = self._current = Actor(self, self._supervise)
            self._boss.turn.release()
            if not self._ended.wait(30):
                self.problems.append("the run hangs")
            self._clear_up()
        ours.close()
        self._zygote.close()
        return self

    def _supervise(self) -> None:
        pool, loop = self.pool, self._loop
        pool.add_functions([pb.Function(number=1, pickle=pickle.dumps(_Task.call, 5))])
        _Task.run = self
        pool.add([WorkItem(n, 1, pickle.dumps((n,), 5), n, 0.0) for n in range(1, self._items + 1)])
        idle = looks = 0
        streams = sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__
        while True:
            # A slot that starts replaces the streams, as it normally has its own process.
            sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__ = streams  # type: ignore[misc]
            if self._during is not None:
                self._during(pool, looks)
                looks += 1
            if self._serve_zygote() or loop.run_ready():
                idle = 0
                continue
            if self._is_answered and not any(s.can_go_on for s in self._slots.values()):
                break
            # The supervisor has nothing to do. If a slot is stopped, time passes; otherwise the
            # slots run.
            if self._patience:
                self._patience -= 1
                loop.run_timer()
                continue
            if any(slot.can_go_on for slot in self._slots.values()):
                assert self._boss is not None
                self._yield(self._boss)
                idle = 0
                continue
            idle += 1
            if not loop.run_timer() or idle > _MOST_TICKS:
                self.problems.append(f"tasks are lost: {sorted(pool.leases())}")
                break
        if not self.problems and pool.leases():
            self.problems.append(f"answered, and believed to be here: {pool.leases()}")

    @property
    def _is_answered(self) -> bool:
        answered = self.results.total() + self.returned_leases.total() + len(self.failures)
        return answered >= self._items

    def _serve_zygote(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self._zygote, MESSAGE.size, 8)
        except BlockingIOError:
            return False
        kind, pid, _, _, number = MESSAGE.unpack(data)
        if kind == FORK:
            self._slots[number] = Actor(self, lambda: self._be_slot(number, fds))
            self._zygote.send(MESSAGE.pack(STARTED, number, 0, 0, number))
        elif kind == KILL:
            slot = self._slots[pid]
            if slot.can_go_on and self._boss is not None:
                self._give(slot)  # it runs up to its stop, as a signal takes time to arrive
                self._boss.turn.acquire()
            if not (slot.done or slot.dead):
                self._die(slot)
        return True

    def _be_slot(self, number: int, fds: list[int]) -> None:
        tasks_fd, results_fd, page_fd, out_fd, err_fd = fds
        slot = self._slots[number].slot = self._slot.Slot(tasks_fd, results_fd, page_fd)
        try:
            slot.run()
        except EOFError:
            pass
        finally:
            for fd in (tasks_fd, results_fd, out_fd, err_fd):
                os.close(fd)

    def _clear_up(self) -> None:
        """End all threads; stopped ones fail at closed pipes."""
        self.over = True
        self.pool.close()
        for child in self.pool._slots.children.values():
            child.close()
            child.files.close()
        for actor in self._slots.values():
            actor.turn.release()
            actor.thread.join(10)
            if actor.thread.is_alive():
                self.problems.append("a thread does not end")


class _Task:
    """A task: it notes that it runs, and may be stopped while it runs."""

    run: Run

    @staticmethod
    def call(number: int) -> bytes | None:
        run = _Task.run
        actor = run._current
        if run.over or actor is None or threading.current_thread() is not actor.thread:
            return None  # its slot was killed, so the task no longer runs
        run.ran[number] += 1
        run.step(None)
        return _large_value(number) if run._large and number % 4 else None


def _large_value(number: int) -> bytes:
    """Return a value that is too large for the pipe."""
    return number.to_bytes(8, "little") * (INLINE_BYTES // 8)


@functools.cache
def _shared_lines(modules: tuple[ModuleType, ...]) -> dict[str, frozenset[int]]:
    """Return the numbers of the lines that match ``SHARED``, by file, for these modules."""
    found = {}
    for folder in {Path(str(module.__file__)).parent for module in modules}:
        for part in PARTS:
            file = folder / f"{part}.py"
            lines = file.read_text().splitlines()
            found[str(file)] = frozenset(
                n for n, line in enumerate(lines, 1) if SHARED.search(line)
            )
    return found


_texts: dict[str, list[str]] = {}


def _text(frame: FrameType) -> str:
    name = frame.f_code.co_filename
    if name not in _texts:
        with open(name) as file:
            _texts[name] = file.read().splitlines()
    return _texts[name][frame.f_lineno - 1]


async def _no_blob(*args: object) -> None:
    raise AssertionError("no task here takes a blob")


def search(
    items: int,
    schedules: Iterable[tuple[Sequence[Stop], Action | None]],
    *,
    slots: int = 1,
    large: bool = False,
    modules: tuple[ModuleType, ModuleType] = (supervisor_module, slot_module),
) -> str:
    """Run a scenario under each schedule, up to the first under which something is wrong.

    Args:
        items: Number of tasks.
        schedules: The stops of each run, and the client's requests during it.
        slots: Number of slots.
        large: Whether some results are so large that they are left in the slot's file.
        modules: The supervisor's and the slot's modules.

    Returns:
        The first problem with its schedule, or an empty string.
    """
    for n, (stops, during) in enumerate(schedules):
        run = Run(items, stops, slots=slots, large=large, during=during, modules=modules).go()
        wrong = run.judge()
        if wrong:
            return f"{wrong} with {list(stops)}, after {n} schedules"
        if n % 50 == 0:
            gc.collect()  # slots' shared pages are in reference cycles, and each has an open file
    gc.collect()
    return ""


def one_stop(steps: int, *, kill: bool = False) -> Iterator[tuple[Sequence[Stop], None]]:
    """Yield one schedule for each step, with a stop before that step."""
    for step in range(1, steps + 1):
        yield [Stop(step, kill=kill)], None


def many_stops(
    rng: random.Random, runs: int, steps: int, *, kill: bool = False
) -> Iterator[tuple[Sequence[Stop], None]]:
    """Yield random schedules with up to six stops, of which the last may kill a slot."""
    for _ in range(runs):
        # A run with stops has more steps than a run without.
        chosen = sorted(rng.sample(range(1, steps * 8 // 5), rng.randint(1, 6)))
        stops = [Stop(step) for step in chosen]
        stops[-1].kill = kill
        yield stops, None
