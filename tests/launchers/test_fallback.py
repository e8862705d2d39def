"""``Fallback``: what one launcher cannot start, the next one does, once."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import fallback_farms as farms
import pytest
from fallback_farms import Placed, nothing_runs, workers_of
from launcher_helpers import eventually
from launcher_tasks import run_once
from process_farm import Farm, ProcessFarm

from cloudexec import BatchExecutor, BudgetExceededError, ConfigError, Fallback, LaunchError, Local
from cloudexec._launchers import ending, watching
from cloudexec._launchers.base import Network, Survivor
from cloudexec._server import listener
from cloudexec.launchers import (
    ExecutorInfo,
    Inspection,
    JobRequest,
    JobStatus,
    PlatformError,
    Site,
    WorkerCapacity,
)
from cloudexec.testing import ManualLauncher, check_launcher


@pytest.fixture(autouse=True)
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten what a submission that fails is waited for, and what has no answer."""
    monkeypatch.setattr(watching, "_TROUBLE_PATIENCE", 0.5)
    monkeypatch.setattr(ending, "PATIENCE", 0.5)


@pytest.mark.parametrize("first", ["works, for one", "refuses", "is full"])
def test_two_launchers_of_other_packages_pass_as_one(first: str) -> None:
    """Whether both of them start workers, or only the second one can."""
    kind = {"refuses": farms.RefusingFarm, "is full": farms.DryFarm}.get(first)
    several = [ProcessFarm(kind=kind), ProcessFarm()]
    limits = [1, None] if first == "works, for one" else None
    fallback = Fallback(several, limits=limits)
    assert len(check_launcher(fallback)) == 5
    assert workers_of(several[1])
    assert bool(workers_of(several[0])) == (first == "works, for one")
    eventually(lambda: nothing_runs(*several))


class Prompt(ProcessFarm):
    linger = 0.02


PHASES = {
    "refused": (farms.RefusingFarm, "wolves in the farm"),
    "a bug": (farms.BuggyFarm, "'submit'"),
    "not answered": (farms.MuteFarm, "the farm has not taken the job within 1 s"),
    "cannot be asked": (farms.BusyFarm, "the farm does not answer"),
    "no capacity": (farms.DryFarm, "there is no capacity: the well is dry"),
    "a limit": (farms.LimitedFarm, "the limit of the farm is reached"),
    "no place": (farms.FullFarm, "no place was found within 1 s"),
    "closed": (farms.FatalFarm, "the farm is closed for good"),
    "workers end": (farms.BrokenFarm, "exit code 7"),
    "workers do not fit": (farms.OldFarm, "the worker speaks wire version 0, the client 1"),
    "workers do not connect": (farms.SilentFarm, "no worker connected within 4 s"),
    "workers are killed": (farms.DeadlyFarm, "exit code 137"),
}


@pytest.mark.parametrize("phase", PHASES)
def test_workers_come_from_the_next_launcher(
    phase: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """At whatever phase the first one fails; and it is said who did what, and why."""
    kind, why = PHASES[phase]
    first, second = Prompt(kind=kind), Prompt()
    patience = 1.0 if "within 1 s" in why else None
    fallback = Fallback({"first": first, "second": second}, patience=patience)
    timeout = 4.0 if "within 4 s" in why else None
    # Three workers: that each of them fails is one failure of their launcher.
    with BatchExecutor(3, launcher=fallback, launch_timeout=timeout) as executor:
        futures = [executor.submit(abs, n) for n in (-1, -2, -3)]
        assert [future.result(60) for future in futures] == [1, 2, 3]
        counts = {each.launcher: each for each in executor.stats().launchers}
        assert counts["first"].passed_on >= 1
        assert not counts["first"].connected
        assert counts["first"].is_passed_over
        assert why in counts["first"].why
        assert counts["second"].connected >= 1
        assert not counts["second"].why
        story = str(executor.explain(futures[0]))
        assert f"of second): instead of first: {counts['first'].why}" in story
        assert f"({counts['first'].why})" in repr(executor.stats())
    assert caplog.text.count("first cannot start workers; for 600 s, new ones come from sec") == 1
    receipt = capfd.readouterr().err
    assert "cloudexec: 3 tasks on " in receipt
    assert f"; first: {counts['first'].launched} launched" in receipt
    assert f"; second: {counts['second'].launched} launched" in receipt
    eventually(lambda: nothing_runs(first, second))


def test_a_job_whose_submission_has_no_answer_is_ended_though_others_do_its_work() -> None:
    """When its answer comes, or at the end."""
    first, second = ProcessFarm(kind=farms.DeafFarm), ProcessFarm()
    with BatchExecutor(1, launcher=Fallback([first, second], patience=0.5)) as executor:
        assert executor.submit(abs, -1).result(60) == 1
        (path,) = workers_of(first)
    eventually(lambda: path.with_suffix("").exists() or nothing_runs(first))


def test_workers_that_arrive_after_they_were_given_up_are_refused(tmp_path: Path) -> None:
    """Their tasks run on the workers that came instead of them, once."""
    first, second = ProcessFarm(kind=farms.LateFarm), ProcessFarm()
    with BatchExecutor(2, launcher=Fallback([first, second], patience=1.0)) as executor:
        paths = [tmp_path / str(n) for n in range(2)]
        futures = [executor.submit(run_once, path, 3.0) for path in paths]
        for future in futures:
            future.result(60)
        late = workers_of(first)
        assert len(late) == 2
        eventually(lambda: all(path.with_suffix("").exists() for path in late))
        assert all("nobody launched a worker" in p.with_suffix(".log").read_text() for p in late)
        assert executor.stats().workers.slots == 2
    assert [path.read_text() for path in paths] == ["x", "x"]
    eventually(lambda: nothing_runs(first, second))


def test_the_first_launcher_is_tried_again_after_a_while() -> None:
    first = ProcessFarm(faults=[PlatformError("wolves")])
    second = ProcessFarm()
    fallback = Fallback([first, second], return_after=2.0)
    with BatchExecutor(1, launcher=fallback, idle_timeout=0.1) as executor:
        assert executor.submit(abs, -1).result(60) == 1
        assert not workers_of(first)
        eventually(lambda: not executor.stats().launchers[0].is_passed_over)
        eventually(lambda: not executor.stats().workers.slots)
        assert executor.submit(abs, -1).result(60) == 1
        assert workers_of(first)
        assert executor.stats().launchers[0].active == 1


def test_workers_that_wait_move_when_the_other_launcher_may_be_tried_again() -> None:
    """Both had none; a place has come up at the first one meanwhile."""
    first, second = ProcessFarm(faults=[PlatformError("wolves")]), ProcessFarm(kind=farms.DryFarm)
    with BatchExecutor(1, launcher=Fallback([first, second], return_after=3.0)) as executor:
        future = executor.submit(abs, -1)
        eventually(lambda: executor.stats().launchers[1].launched)
        assert future.result(60) == 1
        assert executor.stats().launchers[1].passed_on == 1
    assert len(workers_of(first)) == 1


def test_if_no_launcher_has_a_place_workers_wait_where_they_are() -> None:
    """They do not go to and fro, and the platform is not asked which of them have a place."""
    asked: list[int] = []

    class Watched(farms.DryFarm):
        def start(self, request: JobRequest, path: Path, index: int) -> None:
            (Farm.start if index == 0 else farms.DryFarm.start)(self, request, path, index)

        async def describe(self, inspections: Sequence[Inspection]) -> Mapping[str, JobStatus]:
            asked.extend(len(each.wanted) for each in inspections)
            return await super().describe(inspections)

    both = [ProcessFarm(kind=Watched) for _ in range(2)]
    with BatchExecutor(7, launcher=Fallback(both)) as executor:
        futures = [executor.submit(time.sleep, 600) for _ in range(7)]
        eventually(lambda: executor.stats().launchers[1].connected)
        eventually(lambda: "ProcessFarm #1: there is no cap" in str(executor.explain(futures[-1])))
        asked.clear()
        eventually(lambda: asked.count(3) > 1)  # looks at the platform, and why some of them wait
        assert max(asked) == 3
        assert [each.launched for each in executor.stats().launchers] == [7, 6]
        executor.kill_workers()


def test_if_all_launchers_fail_one_error_names_each_cause() -> None:
    first = ProcessFarm(faults=[PlatformError("wolves")] * 10)
    second = ProcessFarm(faults=[PlatformError("bears")] * 10)
    with BatchExecutor(1, launcher=Fallback([first, second])) as executor:
        with pytest.raises(LaunchError, match=r"ProcessFarm #1: wolves; ProcessFarm #2: bears$"):
            executor.submit(abs, -1).result(60)
        assert [each.launched for each in executor.stats().launchers] == [1, 1]
        # The next task has them tried again.
        first.faults.clear()
        assert executor.submit(abs, -1).result(60) == 1


def test_all_launchers_are_tried_again_before_tasks_fail_if_that_may_help() -> None:
    """As with a single launcher: after the third time in a row."""
    both = [ProcessFarm(kind=farms.BrokenFarm) for _ in range(2)]
    with BatchExecutor(1, launcher=Fallback(both)) as executor:
        with pytest.raises(LaunchError, match=r"(?s)ProcessFarm #1: exit code 7.*#2: exit code 7"):
            executor.submit(abs, -1).result(60)
        assert [each.launched for each in executor.stats().launchers] == [3, 3]


def test_workers_beyond_the_limit_of_one_launcher_come_from_the_next() -> None:
    first, second = ProcessFarm(), ProcessFarm()
    with BatchExecutor(4, launcher=Fallback([first, second], limits=[1, None])) as executor:
        list(executor.map(abs, range(4)))
        eventually(lambda: executor.stats().workers.slots == 4)
        assert [each.active for each in executor.stats().launchers] == [1, 3]
        assert not any(each.why for each in executor.stats().launchers)
    assert (len(workers_of(first)), len(workers_of(second))) == (1, 3)


def test_a_limit_is_kept_though_there_is_no_other_launcher() -> None:
    """Tasks are done by the workers that there may be."""
    first, second = ProcessFarm(), ProcessFarm(kind=farms.RefusingFarm)
    with BatchExecutor(3, launcher=Fallback([first, second], limits=[1, 1])) as executor:
        assert list(executor.map(abs, range(-30, 0))) == list(range(30, 0, -1))
        assert executor.stats().launchers[0].active == 1
    assert len(workers_of(first)) == 1


def small_machine(monkeypatch: pytest.MonkeyPatch, cpus: float) -> Local:
    """A launcher for this machine, which has so many processors."""
    local = Local()
    monkeypatch.setattr(local, "_machine", WorkerCapacity(cpus=cpus, memory=8 << 30))
    return local


@pytest.mark.parametrize("order", ["here first", "here last"])
def test_this_machine_has_as_many_workers_as_fit(
    monkeypatch: pytest.MonkeyPatch, order: str
) -> None:
    """The rest comes from elsewhere, or waits there."""
    local = small_machine(monkeypatch, 2.0)
    farm = ProcessFarm(cpus=1.0, kind=None if order == "here first" else farms.DryFarm)
    several: list[Any] = [local, farm] if order == "here first" else [farm, local]
    with BatchExecutor(3, launcher=Fallback(several)) as executor:
        futures = [executor.submit(run_once, Path(os.devnull), 0.5) for _ in range(6)]
        assert all(future.result(60) for future in futures)
        here = next(each for each in executor.stats().launchers if "this machine" in each.launcher)
        assert here.active == 2
        if order == "here first":
            eventually(lambda: executor.stats().workers.slots == 3)
    assert len(workers_of(farm)) == (order == "here first")
    eventually(lambda: nothing_runs(farm))
    assert not local._processes


def test_workers_here_and_elsewhere_do_the_same_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """With large arguments and results, own functions, and their output."""
    local, farm = small_machine(monkeypatch, 1.0), ProcessFarm(cpus=1.0)
    data = os.urandom(3 << 20)

    def reverse(value: bytes, n: int) -> tuple[bytes, int]:
        return value[::-1], n

    with BatchExecutor(2, launcher=Fallback([local, farm])) as executor:
        list(executor.map(abs, range(2)))
        eventually(lambda: executor.stats().workers.slots == 2)
        found = list(executor.map(reverse, [data] * 8, range(8)))
        assert [n for _, n in found] == list(range(8))
        assert all(value == data[::-1] for value, _ in found)


def test_what_only_the_second_launcher_has_is_started_there() -> None:
    """And an error says of each why it has no such worker."""
    small, large = ProcessFarm(cpus=1.0), ProcessFarm(cpus=4.0)
    with BatchExecutor(8, launcher=Fallback({"small": small, "large": large})) as executor:
        assert executor.with_options(cpus=3).submit(abs, -1).result(60) == 1
        assert executor.submit(abs, -2).result(60) == 2
        with pytest.raises(ConfigError, match=r"no launcher has .*small: no worker .*; large: no"):
            executor.with_options(cpus=5)
        assert {str(each.size) for each in executor.stats().sizes} >= {"4 CPUs"}
        assert [each.passed_on for each in executor.stats().launchers] == [0, 0]
    assert len(workers_of(large)) == 1


def test_a_launcher_that_has_no_such_worker_is_passed_over() -> None:
    """Also if the one that has it fails: the error says so, and the small workers go on."""
    large = ProcessFarm(cpus=4.0, faults=[PlatformError("wolves")] * 10)
    small = ProcessFarm(cpus=1.0)
    with BatchExecutor(4, launcher=Fallback([small, large])) as executor:
        assert executor.submit(abs, -1).result(60) == 1
        with pytest.raises(LaunchError, match=r"wanted: 4 CPUs.*wolves"):
            executor.with_options(cpus=4).submit(abs, -1).result(60)
        assert executor.submit(abs, -2).result(60) == 2


def test_the_ceiling_of_costs_holds_for_all_launchers_together() -> None:
    """A worker of the second one is not launched for which the first has left too little."""
    first = ProcessFarm(hourly_usd=36.0)
    second = ProcessFarm(hourly_usd=36_000.0)
    fallback = Fallback([first, second], limits=[1, None])
    with BatchExecutor(2, launcher=fallback, max_cost_usd=8.0) as executor:
        list(executor.map(abs, range(2)))
        eventually(lambda: executor.stats().workers.slots == 1)
        assert executor.cost().accrued_usd > 0
        assert "price of electricity" in executor.cost().note
        assert [each.launched for each in executor.stats().launchers] == [1, 0]
    assert not workers_of(second)
    total = executor.cost().accrued_usd
    counts = executor.stats().launchers
    assert sum(each.cost_usd for each in counts) == pytest.approx(total, rel=0.1)


def test_tasks_fail_when_all_launchers_together_have_reached_the_ceiling() -> None:
    both = [ProcessFarm(hourly_usd=3600.0) for _ in range(2)]
    with BatchExecutor(2, launcher=Fallback(both, limits=[1, 1]), max_cost_usd=75.0) as executor:
        futures = [executor.submit(time.sleep, 60) for _ in range(2)]
        with pytest.raises(BudgetExceededError, match=r"max_cost_usd=\$75"):
            futures[0].result(60)
    eventually(lambda: nothing_runs(*both))


def test_a_launcher_that_cannot_be_started_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    first, second = farms.Unreachable(), ProcessFarm()
    with BatchExecutor(1, launcher=Fallback([first, second])) as executor:
        future = executor.submit(abs, -1)
        assert future.result(60) == 1
        (out, _) = executor.stats().launchers
        assert out.is_passed_over
        assert "instead of Unreachable: the road to the farm" in str(executor.explain(future))
    assert "Unreachable cannot be used, and is left out: the road to the farm is" in caplog.text
    with BatchExecutor(1, launcher=first) as executor:  # it is free for another executor
        with pytest.raises(PlatformError, match="the road"):
            executor.submit(abs, -1)


def test_if_none_can_be_started_one_error_names_each_cause() -> None:
    """And nothing is left of the try: the launchers can be used again."""
    fallback = Fallback([farms.Unreachable(), farms.Unreachable()])
    for _ in range(2):
        with pytest.raises(LaunchError, match=r"no launcher can be used: Unr.* #1: the .* #2: the"):
            BatchExecutor(1, launcher=fallback).submit(abs, -1)


@dataclasses.dataclass(frozen=True)
class Leaving(ProcessFarm):
    """Says when it is left."""

    left: threading.Event = dataclasses.field(default_factory=threading.Event)

    @contextlib.asynccontextmanager
    async def connect(self, executor: ExecutorInfo) -> AsyncIterator[Site]:
        async with super().connect(executor) as site:
            yield site
        self.left.set()


class NeverThere(ManualLauncher):
    """Is still being started when its start is interrupted."""

    def __init__(self) -> None:
        super().__init__(needs_network=True)
        self.began = asyncio.Event()

    async def start(self, *_: object) -> Network:
        self.began.set()
        await asyncio.Event().wait()
        raise AssertionError


def test_a_launcher_is_let_go_of_if_the_start_of_another_one_is_interrupted() -> None:
    """As by Ctrl-C."""
    connected, slow = Leaving(), NeverThere()

    async def run() -> None:
        fallback = Fallback([connected, slow])
        starting = asyncio.ensure_future(fallback.start("0123456789abcdef", "", "", 60.0))
        await slow.began.wait()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    asyncio.run(run())
    assert connected.left.is_set()
    with BatchExecutor(1, launcher=connected) as executor:
        assert executor.submit(abs, -1).result(60) == 1


def test_a_launcher_that_does_not_become_ready_holds_nobody_up(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As an API that never answers: the others wait for it as long as for a worker."""
    fallback = Fallback({"slow": NeverThere(), "ready": ProcessFarm()})
    with BatchExecutor(1, launcher=fallback, launch_timeout=3.0) as executor:
        assert executor.submit(abs, -1).result(60) == 1
    assert "slow cannot be used, and is left out: it was not ready within 3 s" in caplog.text


def test_each_launcher_has_its_own_address_and_key() -> None:
    """The executor listens where all of them can reach it."""
    several = [
        Placed(listen="127.0.0.1:0", key=bytes(range(32))),
        Placed(listen="0.0.0.0:0", advertise="localhost", key=bytes(range(1, 33))),
        Placed(listen="127.0.0.1:0", advertise="127.0.0.1"),
    ]
    with BatchExecutor(4, launcher=Fallback([*several, Local()], limits=[1, 1, 1, 1])) as executor:
        list(executor.map(abs, range(4)))
        eventually(lambda: executor.stats().workers.slots == 4)
        assert [each.connected for each in executor.stats().launchers] == [1, 1, 1, 1]
        assert not executor.stats().refused
    assert [len(workers_of(farm)) for farm in several] == [1, 1, 1]


def test_a_launcher_that_wants_another_port_is_left_out(
    caplog: pytest.LogCaptureFixture, free_port: Callable[[], int]
) -> None:
    ports = free_port(), free_port()
    several = [Placed(listen=f"127.0.0.1:{port}") for port in ports]
    with BatchExecutor(1, launcher=Fallback(several)) as executor:
        assert executor.submit(abs, -1).result(60) == 1
    assert (
        f"it needs port {ports[1]}, but the executor already listens on port {ports[0]}"
        in caplog.text
    )
    with BatchExecutor(1, launcher=Fallback(several), listen="127.0.0.1:0") as executor:
        assert executor.submit(abs, -1).result(60) == 1
        assert not any(each.why for each in executor.stats().launchers)


def test_a_launcher_whose_relay_cannot_be_reached_is_left_out(
    caplog: pytest.LogCaptureFixture, free_port: Callable[[], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listener, "_REGISTER_TIMEOUT", 2.0)
    behind = Placed(relay=f"127.0.0.1:{free_port()}", key=bytes(32))
    with BatchExecutor(1, launcher=Fallback([behind, ProcessFarm()])) as executor:
        assert executor.submit(abs, -1).result(60) == 1
        assert "cannot reach the relay" in executor.stats().launchers[0].why
    assert "Placed cannot be used, and is left out: cannot reach the relay" in caplog.text


@pytest.fixture
def free_port() -> Callable[[], int]:
    def find() -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    return find


TAKEN_OVER = """
    import os
    import time
    from cloudexec import BatchExecutor, Fallback
    from process_farm import Farm, ProcessFarm
    from cloudexec.launchers import PlatformError

    def slowly(n):
        with open(f"begun-{n}", "a") as file:
            file.write("x")
        while not os.path.exists("go"):
            time.sleep(0.01)
        return n + 1

    if __name__ == "__main__":
        wolves = [] if os.path.exists("farm-1") else [PlatformError("wolves")]
        for name in ("farm-1", "farm-2"):
            os.makedirs(name, exist_ok=True)
        first = ProcessFarm(folder="farm-1", cpus=1, faults=wolves, hourly_usd=1.0)
        second = ProcessFarm(folder="farm-2", cpus=2, hourly_usd=1.0)
        fallback = Fallback([first, second], limits=[None, 2])
        with BatchExecutor(2, launcher=fallback, journal="journal", orphan_timeout=60) as executor:
            futures = [executor.submit(slowly, n) for n in (1, 2)]
            print([future.result(60) for future in futures], executor.stats().workers.launched)
            print(executor.stats().workers.taken_over, executor.stats().tasks.taken_over)
            print([each.active for each in executor.stats().launchers])
"""


def test_workers_of_every_launcher_are_taken_over_from_a_program_that_was_killed(
    tmp_path: Path,
) -> None:
    """They run on, and their tasks are not run a second time."""
    (tmp_path / "script.py").write_text(textwrap.dedent(TAKEN_OVER))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "script.py"]
    first = subprocess.Popen(command, cwd=tmp_path, env=environment)
    try:
        eventually(lambda: all((tmp_path / f"begun-{n}").exists() for n in (1, 2)))
    finally:
        first.kill()
        first.wait()
    (tmp_path / "go").touch()
    second = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=90,
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines() == ["[2, 3] 0", "2 2", "[0, 2]"]
    assert [(tmp_path / f"begun-{n}").read_text() for n in (1, 2)] == ["x", "x"]
    assert not list((tmp_path / "farm-1").iterdir())


class Forgetful(Leaving):
    """Cannot understand what was left."""

    async def take_over(self, left: dict[str, Any], on_end: object) -> Mapping[str, Survivor]:
        raise KeyError("jobs")


def test_a_launcher_whose_workers_cannot_be_taken_over_is_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Also if that is a bug of its own."""
    several = Forgetful(), Leaving()

    async def run() -> None:
        fallback = Fallback({"first": several[0], "second": several[1]})
        await fallback.start("0123456789abcdef", "", "", 60.0)
        left: dict[str, Any] = {"launchers": [{"jobs": []}, {}]}
        assert not await fallback.take_over(left, lambda *_: None)
        assert [each.is_passed_over for each in fallback.counts()] == [True, False]
        await fallback.close()

    asyncio.run(run())
    assert "internal error while first took over workers" in caplog.text
    assert "first cannot be used, and is left out: its workers cannot be" in caplog.text


def test_an_address_matters_to_a_successor_unless_all_workers_come_through_relays() -> None:
    relayed, direct = Network(relay="relay.example.com:443"), Network("127.0.0.1:0")
    assert relayed.is_relayed
    assert Network("0.0.0.0:0", others=(relayed, relayed)).is_relayed
    assert not Network("0.0.0.0:0", others=(relayed, direct)).is_relayed


def test_one_fallback_serves_one_executor_at_a_time() -> None:
    fallback = Fallback([Local(), Local()])
    with BatchExecutor(1, launcher=fallback) as executor:
        executor.submit(abs, -1).result(60)
        with pytest.raises(LaunchError, match=r"this Fallback\(...\) serves an executor already"):
            BatchExecutor(1, launcher=fallback).submit(abs, -1)
        assert executor.submit(abs, -2).result(60) == 2
    with BatchExecutor(1, launcher=fallback) as executor:
        assert executor.submit(abs, -3).result(60) == 3


def test_workers_of_this_machine_alone_need_no_network() -> None:
    """What each task has of the machine is seen to as with one launcher."""
    with BatchExecutor(2, launcher=Fallback([Local(), Local()])) as executor:
        views = [executor.with_options(cpus=n) for n in (0.1, 0.2, 0.5)]
        futures = [view.submit(abs, -n) for n in range(3) for view in views]
        assert [future.result(30) for future in futures] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert list(executor.map(abs, range(-5, 0))) == [5, 4, 3, 2, 1]
        assert executor._driver is not None
        assert executor._driver.launches.contact is not None
        assert executor._driver.launches.contact.target.startswith("plain:")
        assert [each.active for each in executor.stats().launchers] == [1, 0]


@dataclasses.dataclass(frozen=True)
class BadToClose(ProcessFarm):
    @contextlib.asynccontextmanager
    async def connect(self, executor: ExecutorInfo) -> AsyncIterator[Site]:
        async with super().connect(executor) as site:
            yield site
        raise KeyError("close")


def test_the_end_is_that_of_all_launchers_though_one_cannot_be_closed() -> None:
    both = [BadToClose(), ProcessFarm()]
    executor = BatchExecutor(2, launcher=Fallback(both, limits=[1, 1]))
    futures = [executor.submit(time.sleep, 600) for _ in range(2)]
    eventually(lambda: all(future.running() for future in futures))
    executor.kill_workers()
    executor.shutdown()
    assert len(workers_of(both[0])) == len(workers_of(both[1])) == 1
    eventually(lambda: nothing_runs(*both))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"launchers": []}, ConfigError, "at least one"),
        ({"launchers": Local()}, TypeError, "must be a list, such as .*, not Local"),
        ({"launchers": None}, TypeError, "must be a list, such as .*, not None"),
        ({"launchers": [Local]}, TypeError, "objects like Local"),
        ({"launchers": ["local"]}, TypeError, "not 'local'"),
        ({"launchers": [Fallback([Local()])]}, ConfigError, "must not have a Fallback"),
        ({"launchers": [Local()], "limits": [1, 2]}, ConfigError, "each of 1 launchers, not 2"),
        ({"launchers": [Local()], "limits": [0]}, ConfigError, "limits must be"),
        ({"launchers": [Local()], "patience": 0}, ConfigError, "patience must be"),
        ({"launchers": [Local()], "return_after": -1}, ConfigError, "return_after must be"),
    ],
)
def test_wrong_settings_are_refused(
    settings: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        Fallback(**settings)


def test_a_launcher_cannot_be_there_twice() -> None:
    local = Local()
    with pytest.raises(ConfigError, match="must not name the same object twice"):
        Fallback([local, local])
