"""Is anything lost, doubled or left behind when many things fail at once?

Workers run on this machine but connect as from other machines: over TLS, and through a proxy that
cuts, stalls and half-opens their connections. Meanwhile slots (the processes that run tasks) and
workers are killed or stopped, and the client itself is stopped. Tasks of every kind run: short,
long and large ones, and tasks that raise, exit, take too long, depend on others, or are cancelled.
Each future must have exactly one outcome, and the right one. The benchmark runs on Linux only.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import logging
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from typing import Any

import _memory
import _soak_tasks as tasks
import psutil

from cloudexec import (
    BatchExecutor,
    DependencyError,
    Local,
    ObjectOptions,
    TaskTimeoutError,
    WorkerLostError,
)

_MARK = "CLOUDEXEC_SOAK"
"""Environment variable that all processes of a run inherit, by which they are found at the end."""
_PATIENCE = 120.0
"""Seconds after the last fault within which every future must be done."""
_END_PATIENCE = 15.0
"""Seconds after shutdown() within which all processes must have ended."""
_SLOTS_PER_WORKER = 2
_MANY = 1_000_000
"""Retries of tasks whose attempts may be lost to faults that the task did not cause."""


# Tasks, and the outcomes that they must have.


@dataclass(slots=True)
class Check:
    """The kind of one future's task, and the check of its outcome."""

    kind: str
    wrong: Callable[[Future[Any]], str]
    """Returns what is wrong with the outcome, or an empty string."""


def _is(expected: object) -> Callable[[Future[Any]], str]:
    def wrong(future: Future[Any]) -> str:
        error = future.exception()
        if error is not None:
            return f"raised {error!r} in place of a result"
        result = future.result()
        return "" if result == expected else f"returned {str(result)[:60]}, not {expected!r}"

    return wrong


def _raises(
    kind: type[BaseException], args: tuple[object, ...] | None = None
) -> Callable[[Future[Any]], str]:
    def wrong(future: Future[Any]) -> str:
        error = future.exception()
        if not isinstance(error, kind) or (args is not None and error.args != args):
            return f"ended with {error!r}, not {kind.__name__}"
        return ""

    return wrong


class Load:
    """Submits random tasks of all kinds, and checks their outcomes.

    Args:
        executor: The executor.
        seed: Seed of the choice of tasks.
        directory: Directory for the files with which tasks show that they have run.
    """

    def __init__(self, executor: BatchExecutor, seed: int, directory: str) -> None:
        self._random = random.Random(f"tasks {seed}")
        self._directory = directory
        self._plain = executor.with_options(retries=_MANY)
        self._twice = executor.with_options(retries=1)
        self._once = executor.with_options(retries=0)
        self._hasty = executor.with_options(retries=_MANY, timeout=0.5)
        self._keeping = executor.with_options(retries=_MANY, keep=True)
        self._shared = executor.put(tasks.large(0, 3 << 20))
        self._shared_digest = tasks.digest(tasks.large(0, 3 << 20))
        self._once_log = os.path.join(directory, "once")
        self._concluded: deque[tuple[int, Future[Any]]] = deque()
        self._calls = bytearray()  # done-callbacks by number: a byte each, for millions of tasks
        self._checks: dict[int, tuple[Check, Future[Any]]] = {}
        self._cancelling: list[tuple[float, Future[Any], set[int], int]] = []
        self.submitted: Counter[str] = Counter()
        self.concluded: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.lost = 0
        self._kinds: list[Callable[[], None]] = []
        weights = []
        for kind, weight in (
            (self._some_short, 60),
            (self._a_slow_one, 60),
            (self._a_large_result, 12),
            (self._a_large_argument, 8),
            (self._a_shared_argument, 8),
            (self._one_that_raises, 30),
            (self._one_that_exits, 4),
            (self._one_that_exits_the_first_time, 6),
            (self._one_that_takes_too_long, 4),
            (self._dependent_ones, 20),
            (self._one_that_is_cancelled, 20),
            (self._one_that_runs_once, 30),
            (self._one_that_prints, 10),
            (self._one_whose_result_is_kept, 6),
        ):
            self._kinds.append(kind)
            weights.append(weight)
        self._weights = weights

    @property
    def open(self) -> int:
        """Number of futures that are not done, or not checked yet."""
        return len(self._checks)

    def submit_some(self) -> None:
        self._random.choices(self._kinds, self._weights)[0]()

    def _expect(self, kind: str, future: Future[Any], wrong: Callable[[Future[Any]], str]) -> int:
        number = len(self._calls)
        self._calls.append(0)
        self._checks[number] = Check(kind, wrong), future
        self.submitted[kind] += 1
        future.add_done_callback(lambda done: self._concluded.append((number, done)))
        return number

    def _number(self) -> int:
        return self._random.getrandbits(32)

    def _some_short(self) -> None:
        numbers = [self._number() for _ in range(self._random.choice((1, 10, 100)))]
        for n in numbers:
            future = self._plain.submit(tasks.scramble, n)
            self._expect("short", future, _is(tasks.scramble(n)))

    def _a_slow_one(self) -> None:
        n, seconds = self._number(), self._random.uniform(0.05, 0.6)
        future = self._plain.submit(tasks.slow, n, seconds)
        self._expect("slow", future, _is(tasks.scramble(n)))

    def _a_large_result(self) -> None:
        n, size = self._number(), self._random.randint(100_000, 6_000_000)
        expected = tasks.digest(tasks.large(n, size))

        def wrong(future: Future[Any]) -> str:
            error = future.exception()
            if error is not None:
                return f"raised {error!r} in place of {size} bytes"
            return "" if tasks.digest(future.result()) == expected else f"{size} bytes are others"

        self._expect("large result", self._plain.submit(tasks.large, n, size), wrong)

    def _a_large_argument(self) -> None:
        data = tasks.large(self._number(), self._random.randint(100_000, 4_000_000))
        future = self._plain.submit(tasks.digest, data)
        self._expect("large argument", future, _is(tasks.digest(data)))

    def _a_shared_argument(self) -> None:
        future = self._plain.submit(tasks.digest, self._shared)
        self._expect("shared argument", future, _is(self._shared_digest))

    def _one_that_raises(self) -> None:
        n = self._number()
        future = self._plain.submit(tasks.raise_mistake, n)
        self._expect("raises", future, _raises(tasks.Mistake, (n,)))

    def _one_that_exits(self) -> None:
        future = self._twice.submit(tasks.exit_at_once)
        self._expect("exits", future, _raises(WorkerLostError))

    def _one_that_exits_the_first_time(self) -> None:
        n = self._number()
        path = os.path.join(self._directory, f"exit-{len(self._calls)}")
        future = self._plain.submit(tasks.exit_the_first_time, path, n)
        self._expect("exits the first time", future, _is(tasks.scramble(n)))

    def _one_that_takes_too_long(self) -> None:
        future = self._hasty.submit(tasks.slow, self._number(), 60.0)
        self._expect("takes too long", future, _raises(TaskTimeoutError))

    def _dependent_ones(self) -> None:
        n, m = self._number(), self._number()
        submit = self._plain.submit
        first = submit(tasks.slow, n, 0.05)
        second = submit(tasks.scramble, m)
        third = submit(tasks.add, first, second)
        fourth = submit(tasks.add, third, first, 1)
        a, b = tasks.scramble(n), tasks.scramble(m)
        self._expect("dependent", first, _is(a))
        self._expect("dependent", second, _is(b))
        self._expect("dependent", third, _is(a + b))
        self._expect("dependent", fourth, _is(a + b + a + 1))
        if self._random.random() < 0.3:
            failing = submit(tasks.raise_mistake, n)
            self._expect("raises", failing, _raises(tasks.Mistake, (n,)))
            after = submit(tasks.add, failing, second)
            self._expect("depends on one that raises", after, _raises(DependencyError))

    def _one_that_is_cancelled(self) -> None:
        n = self._number()
        future = self._plain.submit(tasks.slow, n, self._random.uniform(0.0, 0.5))
        granted: set[int] = set()
        right = _is(tasks.scramble(n))

        def wrong(done: Future[Any]) -> str:
            if done.cancelled():
                return "" if granted else "was cancelled by nobody"
            if granted:
                return "has a result although cancel() returned True"
            return right(done)

        number = self._expect("cancelled", future, wrong)
        when = time.monotonic() + self._random.uniform(0.0, 1.0)
        self._cancelling.append((when, future, granted, number))

    def _one_that_runs_once(self) -> None:
        number = len(self._calls)
        future = self._once.submit(
            tasks.append_once, self._once_log, number, self._random.uniform(0.0, 0.1)
        )
        right, lost = _is(tasks.scramble(number)), _raises(WorkerLostError)
        self._expect("runs once", future, lambda done: lost(done) and right(done))

    def _one_that_prints(self) -> None:
        n = self._number()
        self._expect("prints", self._plain.submit(tasks.say, n), _is(tasks.scramble(n)))

    def _one_whose_result_is_kept(self) -> None:
        n, size = self._number(), self._random.randint(10_000, 500_000)
        kept = self._keeping.submit(tasks.make_array, n, size)
        expected = tasks.total(tasks.make_array(n, size))
        future = self._plain.submit(tasks.total, kept)
        self._expect("kept result", future, _is(expected))

    def cancel_what_is_due(self) -> None:
        now = time.monotonic()
        due = [each for each in self._cancelling if each[0] <= now]
        self._cancelling = [each for each in self._cancelling if each[0] > now]
        for _, future, granted, number in due:
            # Noted before cancel(), as cancel() itself calls the callback.
            granted.add(number)
            if not future.cancel():
                granted.clear()

    def check(self) -> None:
        """Check the futures that are done."""
        while self._concluded:
            number, future = self._concluded.popleft()
            calls = self._calls[number] = min(255, self._calls[number] + 1)
            if calls > 1:
                continue  # doubled() counts it at the end
            check, submitted = self._checks.pop(number)
            self.concluded[check.kind] += 1
            self._judge(check, number, future if future is submitted else None)

    def _judge(self, check: Check, number: int, future: Future[Any] | None) -> None:
        try:
            what = "its callback got another future" if future is None else check.wrong(future)
        except CancelledError:
            what = "was cancelled"
        if what:
            self.wrong.append(f"task {number} ({check.kind}) {what}")

    def give_up(self) -> None:
        """Count all futures without an outcome as lost."""
        self.lost = len(self._checks)
        for number, (check, future) in list(self._checks.items())[:20]:
            print(f"no outcome: task {number} ({check.kind}), {future!r}", file=sys.stderr)

    def doubled(self) -> int:
        """Return the number of doubled outcomes, and of second runs of tasks that must run once."""
        again = sum(calls - 1 for calls in self._calls if calls > 1)
        runs: Counter[bytes] = Counter()
        if os.path.exists(self._once_log):
            with open(self._once_log, "rb") as log:
                while number := log.read(8):
                    runs[number] += 1
        return again + sum(count - 1 for count in runs.values())


# Faults.


class Links:
    """The proxy's process.

    Args:
        listen: The proxy's port, to which workers connect.
        target: The client's port.
        seed: Seed of the choice of links that break.
    """

    def __init__(self, listen: int, target: int, seed: int) -> None:
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "_links.py")
        self._process = subprocess.Popen(
            [sys.executable, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._ask({"listen": listen, "target": target, "seed": seed})

    def hit(self, fault: str, share: float = 1.0, seconds: float = 0.0) -> int:
        """Make some links fail; return the number of affected links."""
        return self._ask({"fault": fault, "share": share, "seconds": seconds})

    def _ask(self, request: dict[str, object]) -> int:
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the proxy ended with exit code {process.wait()}")
        return int(line)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()


class Faults:
    """Causes faults at random times.

    Args:
        links: The proxy with the workers' connections.
        seed: Seed of the choice of faults and their victims.
        period: Mean of the seconds between two faults.
        grace: Seconds that a worker may be cut off without being lost.
    """

    def __init__(self, links: Links, seed: int, period: float, grace: float) -> None:
        self._links = links
        self._random = random.Random(f"faults {seed}")
        self._period = period
        self._grace = grace
        self._stopped = threading.Event()
        self._frozen: list[tuple[float, psutil.Process]] = []
        self.injected: Counter[str] = Counter()
        self.error: BaseException | None = None
        pick = self._random.uniform
        self._kinds: list[tuple[str, float, Callable[[], int]]] = [
            ("slot killed", 40, lambda: self._kill("slot", signal.SIGKILL)),
            ("slot crashed (SIGSEGV)", 10, lambda: self._kill("slot", signal.SIGSEGV)),
            ("slots' parent killed", 4, lambda: self._kill("zygote", signal.SIGKILL)),
            ("worker killed", 8, lambda: self._kill("supervisor", signal.SIGKILL)),
            ("worker told to drain (SIGTERM)", 4, lambda: self._kill("supervisor", signal.SIGTERM)),
            ("worker stopped for a while", 6, lambda: self._freeze(pick(0.2, 3.0))),
            ("connection reset", 15, lambda: links.hit("reset", 0.3)),
            ("all connections reset", 4, lambda: links.hit("reset")),
            ("connection closed", 6, lambda: links.hit("close", 0.3)),
            (
                "half-open, the worker knows",
                6,
                lambda: links.hit("half-open to the client", 0.25),
            ),
            (
                "half-open, the client knows",
                4,
                lambda: links.hit("half-open to the worker", 0.25),
            ),
            ("silent for a while", 8, lambda: links.hit("silent", 0.5, pick(0.2, 4.0))),
            ("150 ms late for a while", 6, lambda: links.hit("late", 0.5, pick(1.0, 5.0))),
            ("512 KiB/s for a while", 6, lambda: links.hit("slow", 0.5, pick(1.0, 5.0))),
            ("cut off, for less than the grace", 5, lambda: self._cut_off(0.5)),
            ("cut off, for more than the grace", 2, lambda: self._cut_off(1.5)),
            ("client stopped for a while", 3, lambda: links.hit("asleep", 1.0, pick(0.5, 3.0))),
        ]

    def _cut_off(self, graces: float) -> int:
        """Reset all connections, and accept none for ``graces`` times the grace."""
        self._links.hit("refuse", 1.0, self._grace * graces)
        return self._links.hit("reset")

    def _kill(self, role: str, number: signal.Signals) -> int:
        victim = self._victim(role)
        if victim is None:
            return 0
        try:
            os.kill(victim.pid, number)
        except ProcessLookupError:
            return 0
        return 1

    def _freeze(self, seconds: float) -> int:
        victim = self._victim("supervisor")
        if victim is None:
            return 0
        try:
            os.kill(victim.pid, signal.SIGSTOP)
        except ProcessLookupError:
            return 0
        self._frozen.append((time.monotonic() + seconds, victim))
        return 1

    def _thaw(self, now: float) -> None:
        for until, victim in list(self._frozen):
            if until <= now:
                self._frozen.remove((until, victim))
                with contextlib.suppress(psutil.NoSuchProcess):
                    victim.resume()

    def _victim(self, role: str) -> psutil.Process | None:
        found = _workers()
        for _ in range(("supervisor", "zygote", "slot").index(role)):
            found = [child for each in found for child in _children(each)]
        return self._random.choice(found) if found else None

    def _run(self) -> None:
        weights = [weight for _, weight, _ in self._kinds]
        try:
            while not self._stopped.wait(self._random.expovariate(1 / self._period)):
                self._thaw(time.monotonic())
                kind, _, inject = self._random.choices(self._kinds, weights)[0]
                hit = inject()
                if hit:
                    self.injected[kind] += hit
        except Exception as exc:
            self.error = exc
        finally:
            self._thaw(float("inf"))
            self._links.hit("heal")

    @contextlib.contextmanager
    def injected_meanwhile(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run, name="faults")
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join()
        if self.error is not None:
            raise self.error


def _workers() -> list[psutil.Process]:
    """Return the supervisors of this process's workers."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any("cloudexec.worker" in word for word in child.cmdline()):
                found.append(child)
    return found


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        found = process.children()
        return [child for child in found if child.status() != psutil.STATUS_ZOMBIE]
    except psutil.NoSuchProcess:
        return []


# Processes, files and memory that are left behind.


def _marked(mark: str) -> list[psutil.Process]:
    """Return the processes of this run that still exist, including orphans."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if (
                process.pid != os.getpid()
                and process.environ().get(_MARK) == mark
                and process.status() != psutil.STATUS_ZOMBIE
                and "multiprocessing" not in " ".join(process.cmdline())
            ):
                found.append(process)
    return found


def _descriptors() -> dict[str, str]:
    """Return the open files of this process by descriptor."""
    found = {}
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[name] = os.readlink(f"/proc/self/fd/{name}")
    return found


def _opened_since(before: dict[str, str]) -> tuple[int, int]:
    """Return the number of files and of sockets that were opened since and are still open."""
    kinds = [
        Counter("sockets" if each.startswith("socket:") else "files" for each in fds.values())
        for fds in (before, _descriptors())
    ]
    more = kinds[1] - kinds[0]
    return more["files"], more["sockets"]


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate()}


def _settled_memory() -> int:
    """Return the memory of this process in bytes, without memory that malloc keeps in reserve."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _memory.resident()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# The run.


@dataclass(slots=True)
class Outcome:
    """The results of a run."""

    seconds: float
    submitted: Counter[str]
    injected: Counter[str]
    lost: int
    doubled: int
    wrong: list[str]
    processes: int
    threads: int
    files: int
    sockets: int
    directories: int
    memory: tuple[float, float]
    """MiB of the client after a fifth of the run and at its end, both times without tasks."""
    attempts: int
    duplicates: int
    workers: int

    @property
    def is_clean(self) -> bool:
        """Whether all numbers that must be zero are zero."""
        left = self.processes + self.threads + self.files + self.sockets + self.directories
        return not (self.lost or self.doubled or self.wrong or left)

    def markdown(self) -> str:
        """Return the results as a Markdown table."""
        rows = [
            ("duration", f"{self.seconds:,.0f} s"),
            ("**faults injected**", f"**{self.injected.total():,}**"),
            *((kind, f"{count:,}") for kind, count in sorted(self.injected.items())),
            ("**tasks run**", f"**{self.submitted.total():,}**"),
            *((kind, f"{count:,}") for kind, count in sorted(self.submitted.items())),
            ("attempts lost and made again", f"{self.attempts:,}"),
            ("workers launched", f"{self.workers:,}"),
            ("late results dropped", f"{self.duplicates:,}"),
            ("**results lost**", f"**{self.lost}**"),
            ("**results doubled**", f"**{self.doubled}**"),
            ("**results wrong**", f"**{len(self.wrong)}**"),
            ("processes left", f"{self.processes}"),
            ("threads left", f"{self.threads}"),
            ("files left open", f"{self.files}"),
            ("sockets left open", f"{self.sockets}"),
            ("directories left", f"{self.directories}"),
            (
                "client memory after a fifth, at the end",
                f"{self.memory[0]:.1f} MiB, {self.memory[1]:.1f} MiB",
            ),
        ]
        lines = ["| what | number |", "| --- | ---: |"]
        return "\n".join(lines + [f"| {what} | {number} |" for what, number in rows])


def soak(options: argparse.Namespace, directory: str) -> Outcome:
    """Run the tasks under faults, and return the results.

    Args:
        options: The options of the command line.
        directory: An empty directory for temporary files; files that are left in it are counted.
    """
    port, inner = _free_port(), _free_port()
    links = Links(port, inner, options.seed)
    mark = os.environ[_MARK] = secrets.token_hex(8)
    files = tempfile.mkdtemp(prefix="soak-", dir=directory)

    def executor(**more: Any) -> BatchExecutor:
        return BatchExecutor(
            options.workers * _SLOTS_PER_WORKER,
            launcher=Local(slots_per_worker=_SLOTS_PER_WORKER),
            listen=f"127.0.0.1:{inner}",
            advertise=f"127.0.0.1:{port}",
            output="logging",
            objects=ObjectOptions(cache="16MiB"),  # a small cache, as a cache is no leak
            **more,
        )

    # The first executor of a process starts threads and opens files that stay; these are no leak.
    with executor() as first:
        assert first.submit(tasks.scramble, 1).result(60) == tasks.scramble(1)
    gc.collect()
    descriptors, threads = _descriptors(), _threads()

    begin = time.monotonic()
    faults = Faults(links, options.seed, options.period, options.grace)
    busy = executor(reconnect_grace=options.grace, orphan_timeout=max(10.0, 3 * options.grace))
    load = Load(busy, options.seed, files)
    early = _under_faults(load, faults, begin + options.minutes * 60 / 5, options.open)
    late = 0
    rest = Faults(links, options.seed + 1, options.period, options.grace)
    late = _under_faults(load, rest, begin + options.minutes * 60, options.open)
    load.give_up()
    stats = busy.stats()
    busy.shutdown(wait=True, cancel_futures=True)
    load.check()
    seconds = time.monotonic() - begin
    submitted, lost, doubled, wrong = load.submitted, load.lost, load.doubled(), load.wrong
    # From here on this function keeps no executor or future alive.
    del first, busy, load

    _wait_until(lambda: not _marked(mark), _END_PATIENCE)
    left = _marked(mark)
    for process in left:
        print(f"left: {process}", file=sys.stderr)
        with contextlib.suppress(psutil.Error):
            process.kill()
    del os.environ[_MARK]

    def nothing_left() -> bool:
        gc.collect()  # at each check, as threads that end only now have kept objects alive
        return not (_threads() - threads or any(_opened_since(descriptors)))

    _wait_until(nothing_left, 5.0)
    opened = _opened_since(descriptors)
    if any(opened):
        fresh = {fd: what for fd, what in _descriptors().items() if descriptors.get(fd) != what}
        print(f"left open, among others: {fresh}", file=sys.stderr)
    outcome = Outcome(
        seconds=seconds,
        submitted=submitted,
        injected=faults.injected + rest.injected,
        lost=lost,
        doubled=doubled,
        wrong=wrong,
        processes=len(left),
        threads=len(_threads() - threads),
        files=opened[0],
        sockets=opened[1],
        directories=sum(name.startswith("cloudexec") for name in os.listdir(directory)),
        memory=(early / _memory.MIB, late / _memory.MIB),
        attempts=stats.retries,
        duplicates=stats.duplicates,
        workers=stats.workers.launched,
    )
    links.close()
    return outcome


def _under_faults(load: Load, faults: Faults, until: float, most: int) -> int:
    """Keep the executor busy under faults, then wait for all tasks; return the memory then."""
    said = time.monotonic()
    with faults.injected_meanwhile():
        while (now := time.monotonic()) < until:
            while load.open < most:
                load.submit_some()
            load.cancel_what_is_due()
            load.check()
            if now - said > 10.0:
                said = now
                done, injected = load.concluded.total(), faults.injected.total()
                print(f"{done:,} tasks, {injected:,} faults", file=sys.stderr, flush=True)
            time.sleep(0.01)
    deadline = time.monotonic() + _PATIENCE
    while load.open and time.monotonic() < deadline:
        load.cancel_what_is_due()
        load.check()
        time.sleep(0.01)
    return _settled_memory()


def _wait_until(condition: Callable[[], bool], timeout: float) -> None:
    deadline = time.monotonic() + timeout
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=10.0, help="how long (10)")
    add("--seed", type=int, default=secrets.randbelow(1 << 31), help="for what happens (random)")
    add("--workers", type=int, default=3, help=f"of {_SLOTS_PER_WORKER} slots each (3)")
    add("--period", type=float, default=0.5, help="seconds between two faults, on average (0.5)")
    add("--grace", type=float, default=5.0, help="reconnect_grace of the executor, in seconds (5)")
    add("--open", type=int, default=300, help="tasks that are under way at once (300)")
    options = parser.parse_args()
    print(f"seed {options.seed}", flush=True)
    logging.getLogger("cloudexec").addHandler(logging.NullHandler())
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as directory:
        os.environ["TMPDIR"] = tempfile.tempdir = directory
        outcome = soak(options, directory)
        tempfile.tempdir = None
    for each in outcome.wrong[:50]:
        print(f"wrong: {each}", file=sys.stderr)
    print(outcome.markdown())
    print(f"\nseed {options.seed}: {'clean' if outcome.is_clean else 'NOT CLEAN'}")
    return 0 if outcome.is_clean else 1


if __name__ == "__main__":
    sys.exit(main())
