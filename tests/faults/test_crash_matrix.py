"""What breaks, and where: the outcome of each pair. docs/concepts/failures.md has this table."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fault_tasks as tasks
import psutil
import pytest
from fault_helpers import PATIENCE, assert_gone, descendants, start, start_client, until

from cloudexec import (
    BatchExecutor,
    ObjectOptions,
    PayloadError,
    PayloadTooLargeError,
    TaskTimeoutError,
    WorkerLostError,
)

pytestmark = [
    pytest.mark.timeout(90),
    pytest.mark.skipif(sys.platform == "win32", reason="signals and process groups"),
]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a task comes to.

    Attributes:
        words: As the page says it.
        error: The type of its exception.
        attempts: How many were begun.
        lost: How many of them were lost.
        evidence: Attributes of the exception.
        says: What its message says.
    """

    words: str
    error: type[BaseException]
    attempts: int = 1
    lost: int = 0
    evidence: tuple[tuple[str, Any], ...] = ()
    says: str = ""


def payload_error(says: str, *, sent: bool = True) -> Outcome:
    words = (
        "It fails with `PayloadError`."
        if sent
        else "It fails with `PayloadError`; nothing is sent."
    )
    return Outcome(words, PayloadError, attempts=int(sent), says=says)


EXITED = Outcome(
    "It fails with `WorkerLostError` after three attempts, with `exit_code`.",
    WorkerLostError,
    attempts=3,
    lost=3,
    evidence=(("exit_code", tasks.EXIT_CODE), ("signal", None), ("out_of_memory", False)),
    says="exited with code 7",
)
KILLED = Outcome(
    "It fails with `WorkerLostError` after three attempts, with `signal` and peak memory.",
    WorkerLostError,
    attempts=3,
    lost=3,
    evidence=(("exit_code", None), ("signal", tasks.SIGNAL), ("out_of_memory", False)),
    says="SIGKILL",
)
OUTGREW = Outcome(
    "It fails at once with `WorkerLostError`, with `out_of_memory` and peak memory.",
    WorkerLostError,
    evidence=(("out_of_memory", True),),
    says="100 MiB",
)
HUNG = Outcome("It fails at once with `TaskTimeoutError`.", TaskTimeoutError, says="timeout")
NO_ROOM = Outcome("It fails with `PayloadTooLargeError`.", PayloadTooLargeError, says="no room")
NO_ROOM_HERE = Outcome(
    "It fails with `PayloadTooLargeError`; nothing is sent.",
    PayloadTooLargeError,
    attempts=0,
    says="no room",
)
YOURS = Outcome("Your program ends, and its workers with it.", BaseException)
INTERRUPTED = Outcome("`submit()` hangs until you press Ctrl-C.", KeyboardInterrupt)
UNLIMITED = Outcome("It goes on as far as your machine allows.", BaseException)

PHASES = (
    "when its arguments are pickled, in your thread",
    "when its arguments are unpickled",
    "while it runs",
    "when its result is pickled",
    "when a large result is sent",
)
MATRIX: dict[str, tuple[Outcome, ...]] = {
    "error": (
        payload_error("on purpose", sent=False),
        payload_error("on purpose"),
        Outcome("It fails with the exception itself.", ArithmeticError, says="on purpose"),
        payload_error("on purpose"),
        payload_error("on purpose"),
    ),
    "exit": (YOURS, EXITED, EXITED, EXITED, EXITED),
    "signal": (YOURS, KILLED, KILLED, KILLED, KILLED),
    "memory refused": (
        payload_error("MemoryError", sent=False),
        payload_error("too little memory"),
        Outcome("It fails with `MemoryError`.", MemoryError),
        payload_error("too little memory"),
        payload_error("too little memory"),
    ),
    "memory limit": (UNLIMITED, OUTGREW, OUTGREW, OUTGREW, OUTGREW),
    "hang": (INTERRUPTED, HUNG, HUNG, HUNG, HUNG),
    "disk full": (
        NO_ROOM_HERE,
        NO_ROOM,
        Outcome("It fails with the `OSError` itself.", OSError, says="No space left"),
        payload_error("disk is full"),
        NO_ROOM,
    ),
}
NAMES = {
    "error": "The task raises an error.",
    "exit": "The task exits (`os._exit`).",
    "signal": "A signal ends the process (SIGKILL, a segmentation fault).",
    "memory refused": "The system refuses memory (`ulimit -v`).",
    "memory limit": "The task takes more memory than `with_options(memory=)`.",
    "hang": "The task hangs, and has a `timeout=`.",
    "disk full": "The disk is full.",
}


def table() -> str:
    """Return the matrix as the page has it."""
    lines = ["| what happens | " + " | ".join(PHASES) + " |"]
    lines.append("| --- " * (len(PHASES) + 1) + "|")
    for fault, outcomes in MATRIX.items():
        lines.append("| " + " | ".join((NAMES[fault], *(each.words for each in outcomes))) + " |")
    return "\n".join(lines)


def test_page_on_failures_has_this_table() -> None:
    page = Path(__file__).parents[2] / "docs" / "concepts" / "failures.md"
    assert table() in page.read_text()


def cells(*phases: int, without: tuple[str, ...] = ()) -> pytest.MarkDecorator:
    """Give a test the pairs of these phases, but for some faults."""
    return pytest.mark.parametrize(
        ("fault", "phase"),
        [(fault, phase) for phase in phases for fault in MATRIX if fault not in without],
    )


@pytest.fixture(scope="module")
def executors() -> Iterator[dict[str, BatchExecutor]]:
    """One executor of each kind for all cells: whatever has broken in it before, it works."""
    with start("local") as local, start("wire") as wire:
        yield {"local": local, "wire": wire}
    until(lambda: not descendants())


class Bystanders:
    """Tasks beside one that breaks: they have their results, at the first attempt."""

    def __init__(self, executor: BatchExecutor) -> None:
        self._executor = executor
        self._futures: list[Any] = []
        self.before = executor.stats()
        self.add()

    def add(self) -> None:
        first = len(self._futures)
        self._futures += [self._executor.submit(pow, n, 2) for n in range(first, first + 20)]

    def check(self, outcome: Outcome) -> None:
        """All as ever, and the counts say so."""
        assert [future.result(PATIENCE) for future in self._futures] == [
            n * n for n in range(len(self._futures))
        ]
        assert {future.attempts for future in self._futures} == {1}
        before, stats = self.before, self._executor.stats()
        # What has no room here has succeeded there.
        ended = stats.tasks.succeeded + stats.tasks.failed
        ended_before = before.tasks.succeeded + before.tasks.failed
        assert ended - ended_before == len(self._futures) + bool(outcome.attempts)
        assert stats.lost_attempts - before.lost_attempts == outcome.lost
        assert stats.workers.lost == before.workers.lost
        assert stats.duplicates == before.duplicates


def check(error: BaseException | None, outcome: Outcome) -> None:
    assert type(error) is outcome.error, error
    assert outcome.says in str(error)
    for name, value in outcome.evidence:
        assert getattr(error, name) == value, name
    if isinstance(error, WorkerLostError):
        peak = error.peak_memory_bytes
        assert peak is not None
        assert tasks.LIMIT < peak < 4 * tasks.LIMIT if error.out_of_memory else peak > 2**20
        assert error.attempts == outcome.attempts
        assert error.worker_id


def break_one(executor: BatchExecutor, outcome: Outcome, *call: Any, **options: Any) -> None:
    """Run a call that breaks among others, and look at all that came of it."""
    bystanders = Bystanders(executor)
    resolved: list[Future[Any]] = []
    future = (executor.with_options(**options) if options else executor).submit(*call)
    future.add_done_callback(resolved.append)
    bystanders.add()
    check(future.exception(PATIENCE), outcome)
    assert future.attempts == outcome.attempts
    bystanders.add()
    bystanders.check(outcome)
    until(lambda: resolved)
    assert resolved == [future]


def options_for(fault: str) -> dict[str, Any]:
    if fault == "hang":
        return {"timeout": 0.4}
    return {"memory": tasks.LIMIT} if fault == "memory limit" else {}


CALLS: dict[int, Any] = {
    1: lambda fault: (tasks.size_of, tasks.Breaks(fault)),
    2: lambda fault: (tasks.break_down, fault),
    3: lambda fault: (tasks.breaks_as_result, fault),
    4: lambda fault: (tasks.surrounded, fault),
}


@cells(1, 2, 3, 4, without=("disk full",))
def test_what_breaks_on_this_machine(
    executors: dict[str, BatchExecutor], fault: str, phase: int
) -> None:
    """One outcome, with its evidence; all others are as if nothing had been."""
    outcome = MATRIX[fault][phase]
    break_one(executors["local"], outcome, *CALLS[phase](fault), **options_for(fault))


@cells(1, 4, without=("disk full",))
def test_what_breaks_over_the_network(
    executors: dict[str, BatchExecutor], fault: str, phase: int
) -> None:
    """The same where large payloads travel in pieces."""
    outcome = MATRIX[fault][phase]
    call = CALLS[phase](fault)
    if phase == 1:
        call = (tasks.identity, [bytes(3_000_000), tasks.Breaks(fault), bytearray(3_000_000)])
    break_one(executors["wire"], outcome, *call, **options_for(fault))


# In the caller's own process.


@cells(0, without=("exit", "signal", "memory limit", "hang", "disk full"))
def test_arguments_that_cannot_be_pickled(
    executors: dict[str, BatchExecutor], fault: str, phase: int
) -> None:
    """The future says so; no worker hears of it."""
    break_one(
        executors["local"],
        MATRIX[fault][phase],
        tasks.identity,
        [bytes(3_000_000), tasks.BreaksWhenPickled(fault)],
    )


def test_pickling_that_hangs_is_interrupted(executors: dict[str, BatchExecutor]) -> None:
    """Ctrl-C comes out of submit(), and there is no such task."""
    executor = executors["local"]
    bystanders = Bystanders(executor)
    hanging = threading.Event()

    class Hangs:
        def __reduce__(self) -> tuple[Any, ...]:
            hanging.set()
            while True:
                time.sleep(0.01)  # pause() might begin when the signal has been noted already

    def interrupt() -> None:
        hanging.wait(PATIENCE)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(INTERRUPTED.error):
        executor.submit(tasks.identity, [bytes(3_000_000), Hangs()])
    thread.join()
    bystanders.add()
    assert executor.submit(tasks.break_down, "error").exception(PATIENCE)
    bystanders.check(Outcome("", ArithmeticError))


CLIENT = """
import sys
from cloudexec import BatchExecutor
import fault_tasks as tasks

with BatchExecutor(2) as executor:
    executor.submit(abs, 1).result()
    executor.submit(tasks.tell_and_wait, *sys.argv[2:])
    sys.stdin.readline()
    executor.submit(tasks.identity, [bytes(3_000_000), tasks.BreaksWhenPickled(sys.argv[1])])
"""


@pytest.mark.usefixtures("nothing_left")
@pytest.mark.parametrize(("fault", "code"), [("exit", tasks.EXIT_CODE), ("signal", -tasks.SIGNAL)])
def test_pickling_that_ends_the_program(fault: str, code: int, tmp_path: Path) -> None:
    """Its workers end too, with what they run."""
    told, gate = str(tmp_path / "told"), str(tmp_path / "gate")
    os.mkfifo(told)
    os.mkfifo(gate)
    with start_client(CLIENT, fault, told, gate) as client:
        try:
            with open(told) as file:
                task = psutil.Process(int(file.readline()))
            below = descendants(client.pid)
            assert task in below
            _, err = client.communicate("\n", timeout=PATIENCE)
        finally:
            client.kill()
    assert client.returncode == code, err
    assert_gone(below)


# Full disks.


@pytest.mark.parametrize("mode", ["local", "wire"])
@pytest.mark.usefixtures("nothing_left")
def test_arguments_and_results_that_find_the_disk_here_full(mode: str, small_disk: str) -> None:
    """Past the memory they may take they go to disk; what does not fit there fails alone."""
    objects = ObjectOptions(memory="1MiB", spill_directory=small_disk, cache=0)
    with start(mode, objects=objects) as executor:
        held = []
        for _ in range(3):
            break_one(executor, NO_ROOM_HERE, tasks.size_of, tasks.large(9_000_000))
            break_one(executor, NO_ROOM, tasks.large, 9_000_000)
            # Those who keep the exception do not keep the disk full.
            future = executor.submit(tasks.size_of, tasks.large(9_000_000))
            held.append(future.exception(PATIENCE))
            assert executor.submit(tasks.size_of, tasks.large(2_500_000)).result(PATIENCE)
            assert len(executor.submit(tasks.large, 2_500_000).result(PATIENCE)) == 2_500_000
    assert not os.listdir(small_disk)


@pytest.mark.usefixtures("nothing_left")
def test_arguments_that_find_the_disk_of_a_worker_full(
    small_disk: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no room for what its tasks need: they fail alone, and are not tried elsewhere."""
    monkeypatch.setenv("TMPDIR", small_disk)  # the workers': this process has chosen already
    with start("wire", objects=ObjectOptions(worker_memory="1MiB", cache=0)) as executor:
        for _ in range(2):
            break_one(executor, NO_ROOM, tasks.size_of, tasks.large(9_000_000))
            assert executor.submit(tasks.size_of, tasks.large(2_500_000)).result(PATIENCE)


def test_tasks_that_find_a_disk_full(executors: dict[str, BatchExecutor], small_disk: str) -> None:
    """While they run it is their exception, while their result is pickled a PayloadError."""
    path = os.path.join(small_disk, "filling")
    for phase, call in ((2, (tasks.fill, path)), (3, (tasks.FillsWhenPickled, path))):
        break_one(executors["local"], MATRIX["disk full"][phase], *call)
        os.unlink(path)


@pytest.mark.parametrize("mode", ["local", "wire"])
def test_results_that_no_file_has_room_for(mode: str) -> None:
    """Neither in memory nor on disk: RLIMIT_FSIZE holds for both."""
    with start(mode, max_tasks_per_child=1) as executor:
        break_one(executor, NO_ROOM, tasks.large_without_room, 9_000_000)
        assert len(executor.submit(tasks.large, 9_000_000).result(PATIENCE)) == 9_000_000
