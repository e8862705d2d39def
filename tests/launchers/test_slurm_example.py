"""The launcher for Slurm of the documentation, on a real cluster of one node."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launcher_helpers import eventually
from process_farm import ProcessFarm
from slurm_cluster import SlurmCluster, why_not

from cloudexec import BatchExecutor, ConfigError, Fallback, LaunchError
from cloudexec.launchers import PlatformError
from cloudexec.testing import check_launcher

EXAMPLES = Path(__file__).parents[2] / "docs" / "launchers"
WHY_NOT = why_not()

pytestmark = [
    pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT),
    pytest.mark.xdist_group("slurm"),
]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    cluster = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
    assert not cluster.processes()


@pytest.fixture
def cluster(running: SlurmCluster, monkeypatch: pytest.MonkeyPatch) -> Iterator[SlurmCluster]:
    """The cluster, without jobs before and after."""
    monkeypatch.setenv("SLURM_CONF", str(running.conf))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield running
    eventually(lambda: not running.unfinished())


def slurm(**settings: Any) -> Any:
    from slurm_launcher import Slurm

    return Slurm(host="127.0.0.1", memory_mib=100, **settings)


def test_the_launcher_does_what_executors_expect(cluster: SlurmCluster) -> None:
    assert len(check_launcher(slurm(), timeout=60)) == 6


def where(_: int = 0) -> str:
    time.sleep(0.2)
    return f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"


def test_workers_that_are_asked_for_together_are_one_array_job(cluster: SlurmCluster) -> None:
    with BatchExecutor(3, launcher=slurm(cpus=2), min_workers=3) as executor:
        eventually(lambda: executor.stats().workers.slots == 3)
        found = set(executor.map(where, range(30)))
        assert {each.partition("_")[2] for each in found} == {"0", "1", "2"}
        assert len({each.partition("_")[0] for each in found}) == 1
        assert {each.job_id for each in executor.stats().launches} == found


def test_a_job_that_somebody_cancels_is_replaced(cluster: SlurmCluster) -> None:
    with BatchExecutor(1, launcher=slurm()) as executor:
        future = executor.submit(time.sleep, 1.5)
        eventually(future.running)
        cluster.run("scancel", "--user=root")
        future.result(60)
        assert executor.submit(abs, -1).result(60) == 1
        assert executor.stats().workers.launched == 2


def test_a_task_gets_as_many_processors_as_it_asks_for(cluster: SlurmCluster) -> None:
    with BatchExecutor(8, launcher=slurm()) as executor:
        future = executor.with_options(cpus=3, memory="300MiB").submit(
            os.getenv, "SLURM_CPUS_PER_TASK"
        )
        assert future.result(60) == "3"


def test_a_cluster_without_room_says_so_and_others_do_the_rest(cluster: SlurmCluster) -> None:
    """Two workers with four processors fill the node."""
    fallback = Fallback([slurm(cpus=4), ProcessFarm()])
    with BatchExecutor(3, launcher=fallback, min_workers=3) as executor:
        eventually(lambda: executor.stats().workers.slots == 3)
        there, here = executor.stats().launchers
        assert (there.active, here.active) == (2, 1)
        assert "Resources" in there.why or "Priority" in there.why


def test_why_workers_wait_is_told(cluster: SlurmCluster) -> None:
    launcher = slurm(cpus=8)
    with BatchExecutor(2, launcher=launcher, min_workers=2) as executor:
        eventually(lambda: "Slurm has no place for workers yet: Resources" in launcher.explain())
        assert executor.submit(abs, -1).result(60) == 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"partition": "nowhere"}, r"sbatch: .*invalid partition"),
        ({"cpus": 64}, "Slurm will never have a place for such workers: PartitionConfig"),
        ({"environment": {"PYTHONHOME": "/nowhere"}, "logs": "."}, r"(?s)exit code 1.*encodings"),
    ],
)
def test_what_cannot_work_is_told_in_the_words_of_slurm(
    cluster: SlurmCluster, tmp_path: Path, settings: dict[str, Any], words: str
) -> None:
    if "logs" in settings:
        settings = {**settings, "logs": str(tmp_path)}
    with BatchExecutor(1, launcher=slurm(**settings)) as executor:
        with pytest.raises(LaunchError, match=words):
            executor.submit(abs, -1).result(90)


def test_without_slurm_the_error_says_where_to_run(
    cluster: SlurmCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.setenv("PATH", "/nowhere")
        with pytest.raises(ConfigError, match="run the program on a login node"):
            BatchExecutor(1, launcher=slurm()).submit(abs, -1)


def test_a_controller_that_does_not_answer_may_do_so_later(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = cluster.conf.read_text()
    port = next(line.split("=")[1] for line in text.splitlines() if "SlurmctldPort" in line)
    (tmp_path / "slurm.conf").write_text(text.replace(port, "9", 1) + "\nMessageTimeout=2\n")
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    from slurm_launcher import SlurmPlatform

    with pytest.raises(PlatformError, match="ontact slurm controller") as caught:
        asyncio.run(SlurmPlatform(slurm()).find("a-job", spot=False))
    assert caught.value.may_pass


def test_a_command_that_is_given_up_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No process is left when it is said to be over."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    from slurm_launcher import _run

    path = tmp_path / "pid"

    async def give_up() -> None:
        command = ["sh", "-c", f"echo $$ > {path}.new; mv {path}.new {path}; exec sleep 60"]
        running = asyncio.ensure_future(_run(command))
        await asyncio.to_thread(eventually, path.exists)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.read_text()), 0)

    asyncio.run(give_up())


TAKEN_OVER = """
    import os
    import time
    from cloudexec import BatchExecutor
    from slurm_launcher import Slurm

    def slowly(n):
        with open(f"begun-{n}", "a") as file:
            file.write("x")
        while not os.path.exists("go"):
            time.sleep(0.01)
        return n + 1

    if __name__ == "__main__":
        launcher = Slurm(host="127.0.0.1", memory_mib=100)
        with BatchExecutor(2, launcher=launcher, journal="journal", orphan_timeout=60) as executor:
            futures = [executor.submit(slowly, n) for n in (1, 2)]
            print([future.result(60) for future in futures], executor.stats().workers.launched)
            print(executor.stats().workers.taken_over, executor.stats().tasks.taken_over)
"""


def test_workers_outlive_a_program_that_was_killed(cluster: SlurmCluster, tmp_path: Path) -> None:
    """And do their tasks for the one that is run again."""
    (tmp_path / "script.py").write_text(textwrap.dedent(TAKEN_OVER))
    command = [sys.executable, "script.py"]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    first = subprocess.Popen(command, cwd=tmp_path, env=environment)
    try:
        eventually(lambda: all((tmp_path / f"begun-{n}").exists() for n in (1, 2)))
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert len(cluster.unfinished()) == 2
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
    assert second.stdout.splitlines() == ["[2, 3] 0", "2 2"]
    assert [(tmp_path / f"begun-{n}").read_text() for n in (1, 2)] == ["x", "x"]
