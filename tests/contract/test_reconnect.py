"""Connections that are cut: what runs goes on, what is done arrives, nothing is lost or doubled."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import as_completed
from pathlib import Path

import cloudpickle
import numpy as np
import psutil
import pytest
from contract_helpers import Signals, descendants, supervisors, until
from cuttable import CLIENT, WORKER, CuttableLink

from cloudexec import BatchExecutor, Local
from cloudexec.testing import ManualLauncher

pytestmark = [pytest.mark.timeout(120), pytest.mark.usefixtures("nothing_left")]
cloudpickle.register_pickle_by_value(sys.modules[__name__])
PATIENCE = 60.0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


class _Cluster:
    """An executor whose workers dial through a link that can be cut."""

    def __init__(self, workers: int = 2, **options: object) -> None:
        port = _free_port()
        self.link = CuttableLink(port)
        options = {"launcher": Local(slots_per_worker=1), **options}
        self.executor = BatchExecutor(
            workers,
            listen=f"127.0.0.1:{port}",
            advertise=f"127.0.0.1:{self.link.port}",
            **options,  # type: ignore[arg-type]
        )

    def __enter__(self) -> _Cluster:
        self.executor.__enter__()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.executor.__exit__(*exc_info)  # type: ignore[arg-type]
        self.link.close()

    @property
    def lost(self) -> tuple[int, int, int]:
        """Attempts lost, results dropped, workers lost."""
        stats = self.executor.stats()
        return stats.lost_attempts, stats.duplicates, stats.workers.lost


@pytest.fixture
def signals(tmp_path: Path) -> Iterator[Signals]:
    made = Signals(tmp_path)
    yield made
    made.close()


def _meet(told: str, gate: str, log: str, number: int) -> int:
    """Say that one has begun, wait, and leave a trace of having run."""
    with open(told, "ab", 0) as pipe:
        pipe.write(b"%d\n" % number)
    with open(gate, "rb", 0) as pipe:
        pipe.read(1)
    with open(log, "ab", 0) as file:
        file.write(b"%d\n" % number)
    return number


def _note(log: str, number: int) -> int:
    with open(log, "ab", 0) as file:
        file.write(b"%d\n" % number)
    return number * number


def _runs(log: Path) -> Counter[int]:
    return Counter(map(int, log.read_text().split()))


def test_what_runs_goes_on_while_the_connection_is_cut(signals: Signals, tmp_path: Path) -> None:
    """Its result is handed over afterwards; nothing runs twice."""
    log = tmp_path / "log"
    with _Cluster() as cluster:
        submit = cluster.executor.submit
        futures = [submit(_meet, signals.told, signals.gate, str(log), n) for n in range(2)]
        signals.wait(2)
        cluster.link.cut(stay_down=True)
        until(lambda: cluster.executor.stats().workers.cut == 2)
        signals.release(2)
        until(lambda: log.exists() and len(_runs(log)) == 2)
        assert not any(future.done() for future in futures)
        cluster.link.heal()
        assert [future.result(PATIENCE) for future in futures] == [0, 1]
        assert _runs(log) == {0: 1, 1: 1}
        assert cluster.lost == (0, 0, 0)
        assert cluster.executor.stats().workers.cut == 0
        assert submit(pow, 2, 3).result(PATIENCE) == 8


def test_a_worker_that_its_platform_ends_does_not_wait_for_a_client_that_is_gone() -> None:
    """It can hand nothing back. Its platform would kill it half a minute later, and bill that."""
    launcher = ManualLauncher(needs_network=True)
    with _Cluster(1, launcher=launcher) as cluster:
        future = cluster.executor.submit(abs, -1)
        contact = launcher.wait(1, PATIENCE)[0].contact
        worker = subprocess.Popen(
            [sys.executable, "-m", "cloudexec.worker"],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "CLOUDEXEC_TARGET": contact.target,
                "CLOUDEXEC_EXECUTOR_ID": contact.executor_id,
                "CLOUDEXEC_IDENTITY": "1",
                "CLOUDEXEC_KEY": contact.key.hex(),
                "CLOUDEXEC_SLOTS": "1",
                "CLOUDEXEC_CERTIFICATE_SHA256": contact.certificate_sha256,
            },
        )
        try:
            assert future.result(PATIENCE) == 1
            cluster.link.cut(stay_down=True)
            until(lambda: cluster.executor.stats().workers.cut == 1)
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(30) == 128 + signal.SIGTERM
        finally:
            worker.kill()
            worker.wait()
        launcher.end_all()


class _Elsewhere(Local):
    """Workers that fetch this program's modules first, as on another machine."""

    def needs_network(self) -> bool:
        """Say that the files of this machine are not there."""
        return True


def test_a_worker_that_is_cut_while_it_fetches_modules_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Tasks were sent to it already, and with retries=0 no other may have them."""
    log = tmp_path / "log"
    (tmp_path / "large_module.py").write_text(f"TEXT = {os.urandom(1_000_000).hex()!r}\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("large_module")
    request.addfinalizer(lambda: sys.modules.pop("large_module"))
    with _Cluster(1, retries=0, launcher=_Elsewhere(slots_per_worker=1)) as cluster:
        cluster.link.cut_after(300_000)
        futures = [cluster.executor.submit(_note, str(log), n) for n in range(50)]
        assert [future.result(PATIENCE) for future in futures] == [n * n for n in range(50)]
        assert cluster.link.is_cut_yet
        assert cluster.link.accepted > 2  # the certificate, what was cut, and another
        assert cluster.lost == (0, 0, 0)
    assert set(_runs(log).values()) == {1}


@pytest.mark.parametrize("first", [4000, 5000, 6000])
def test_a_worker_that_is_cut_while_it_enrols_comes_back(first: int, tmp_path: Path) -> None:
    """Cut anywhere in the enrolment, which takes about 5,700 bytes, and in the first task."""
    log = tmp_path / "log"
    for size in range(first, first + 1000, 250):
        with _Cluster(1, retries=0) as cluster:
            cluster.link.cut_after(size)
            assert cluster.executor.submit(_note, str(log), size).result(PATIENCE) == size * size
            assert cluster.lost == (0, 0, 0), f"cut after {size} bytes"
    assert set(_runs(log).values()) == {1}


def test_many_cuts_under_load(tmp_path: Path) -> None:
    """Cut in the middle of messages, time and again: each task runs once."""
    log = tmp_path / "log"
    with _Cluster() as cluster:
        executor, link = cluster.executor, cluster.link
        for first in range(0, 3000, 300):
            futures = [executor.submit(_note, str(log), n) for n in range(first, first + 300)]
            link.cut_after(1 + 331 * first % 997)
            for future in as_completed(futures, PATIENCE):
                future.result()
            until(lambda: link.is_cut_yet)  # by a sign of life, if it was not before
            assert [future.result() for future in futures] == [
                n * n for n in range(first, first + 300)
            ]
        assert set(_runs(log).values()) == {1}
        assert cluster.lost == (0, 0, 0)
        assert link.accepted >= 2 * 2 + 10  # each dials twice at first: once for the certificate


@pytest.mark.parametrize("at", [100_000, 3_000_000, 20_000_000])
def test_large_arguments_and_results_go_on_where_they_were_cut(at: int, tmp_path: Path) -> None:
    array = np.random.default_rng(7).random(2_500_000)  # 20 MB, and as much back
    with _Cluster(1) as cluster:
        executor = cluster.executor
        assert executor.submit(pow, 2, 3).result(PATIENCE) == 8
        cluster.link.cut_after(at)
        log = tmp_path / "log"
        result = executor.submit(_double, array, str(log)).result(PATIENCE)
        assert np.array_equal(result, 2 * array)
        assert cluster.link.is_cut_yet
        assert _runs(log) == {1: 1}
        assert cluster.lost == (0, 0, 0)


def _double(array: np.ndarray, log: str) -> np.ndarray:
    _note(log, 1)
    return 2 * array


def test_a_large_result_that_is_ready_while_nobody_can_be_reached(
    signals: Signals, tmp_path: Path
) -> None:
    """It is begun to be sent between two dials in vain, and arrives once one gets through."""
    log = tmp_path / "log"

    def grow(told: str, gate: str, log: str) -> bytes:
        return bytes(3_000_000 + _meet(told, gate, log, 1))

    with _Cluster(1) as cluster:
        link = cluster.link
        future = cluster.executor.submit(grow, signals.told, signals.gate, str(log))
        signals.wait(1)
        link.cut(stay_down=True)
        dialed = link.accepted
        until(lambda: link.accepted >= dialed + 2)
        signals.release(1)
        until(lambda: log.exists() and len(_runs(log)) == 1)
        dialed = link.accepted
        until(lambda: link.accepted >= dialed + 2)
        link.heal()
        assert len(future.result(PATIENCE)) == 3_000_001
        assert _runs(log) == {1: 1}
        assert cluster.lost == (0, 0, 0)


@pytest.mark.parametrize("side", [WORKER, CLIENT], ids=["worker", "client"])
def test_one_side_that_notices_nothing(side: int, signals: Signals, tmp_path: Path) -> None:
    """A half-open connection: the worker dials again although the client holds it for connected,
    or finds out by itself that nobody listens any more."""
    log = tmp_path / "log"
    with _Cluster(1) as cluster:
        future = cluster.executor.submit(_meet, signals.told, signals.gate, str(log), 5)
        signals.wait()
        accepted = cluster.link.accepted
        cluster.link.cut_one_side(side)
        signals.release()
        assert future.result(PATIENCE) == 5
        assert _runs(log) == {5: 1}
        assert cluster.lost == (0, 0, 0)
        assert cluster.link.accepted > accepted


def test_who_stays_away_too_long_is_replaced_and_told_to_stop(
    signals: Signals, tmp_path: Path
) -> None:
    """Its tasks run on another worker; it finds its session gone, and ends."""
    log = tmp_path / "log"
    with _Cluster(1, reconnect_grace=0.5) as cluster:
        executor = cluster.executor
        executor.submit(pow, 2, 3).result(PATIENCE)  # the client has heard that it is ready
        future = executor.submit(_meet, signals.told, signals.gate, str(log), 5)
        signals.wait()
        workers = supervisors()
        for worker in workers:
            worker.send_signal(signal.SIGSTOP)  # else it is back before the grace is over
        cluster.link.cut()
        signals.wait()  # it has begun elsewhere
        for worker in workers:
            with contextlib.suppress(psutil.NoSuchProcess):  # its launcher kills it in the end
                worker.send_signal(signal.SIGCONT)
        psutil.wait_procs(workers, timeout=20)
        assert not any(worker.is_running() for worker in workers)
        signals.release(2)
        assert future.result(PATIENCE) == 5
        stats = executor.stats()
        assert stats.lost_attempts == 1
        assert stats.workers.lost == 1


def test_without_grace_a_cut_is_a_loss(signals: Signals, tmp_path: Path) -> None:
    with _Cluster(1, reconnect_grace=0) as cluster:
        cluster.executor.submit(pow, 2, 3).result(PATIENCE)  # the client heard that it is ready
        future = cluster.executor.submit(
            _meet, signals.told, signals.gate, str(tmp_path / "log"), 5
        )
        signals.wait()
        cluster.link.cut()
        signals.wait()
        signals.release(2)
        assert future.result(PATIENCE) == 5
        assert cluster.executor.stats().lost_attempts == 1


def test_cut_in_the_middle_of_shutting_down(signals: Signals, tmp_path: Path) -> None:
    """Whoever waits for the end waits for what the worker still has."""
    log = tmp_path / "log"
    with _Cluster(2) as cluster:
        submit = cluster.executor.submit
        futures = [submit(_meet, signals.told, signals.gate, str(log), n) for n in range(2)]
        signals.wait(2)
        cluster.executor.shutdown(wait=False)
        cluster.link.cut(stay_down=True)
        until(lambda: cluster.executor.stats().workers.cut == 2)
        signals.release(2)
        cluster.link.heal()
        cluster.executor.shutdown()
        assert [future.result(0) for future in futures] == [0, 1]
        assert _runs(log) == {0: 1, 1: 1}


def test_shutting_down_does_not_wait_for_who_has_nothing(signals: Signals) -> None:
    """A worker that is cut off and had nothing to do is not waited for."""
    with _Cluster(1, reconnect_grace=600) as cluster:
        assert cluster.executor.submit(pow, 2, 3).result(PATIENCE) == 8
        cluster.link.cut(stay_down=True)
        until(lambda: cluster.executor.stats().workers.cut == 1)
    assert not descendants()


def test_cancelling_what_runs_out_of_reach(signals: Signals, tmp_path: Path) -> None:
    """It is cancelled at once here, and killed there when the worker is back."""
    log = tmp_path / "log"
    with _Cluster(1) as cluster:
        future = cluster.executor.submit(_meet, signals.told, signals.gate, str(log), 5)
        signals.wait()
        cluster.link.cut(stay_down=True)
        until(lambda: cluster.executor.stats().workers.cut == 1)
        future.cancel(running=True)
        assert future.cancelled()
        cluster.link.heal()
        assert cluster.executor.submit(pow, 2, 3).result(PATIENCE) == 8
        assert not log.exists()


def test_a_client_that_is_stopped_for_a_while(tmp_path: Path) -> None:
    """As when a laptop sleeps: its connections are gone when it wakes; its workers come back."""
    log = tmp_path / "log"
    with _Cluster(2) as cluster:
        futures = [cluster.executor.submit(_note, str(log), n) for n in range(200)]
        for future in futures[:20]:
            future.result(PATIENCE)
        waker = os.fork()
        if waker == 0:
            import time

            time.sleep(2.0)
            os.kill(os.getppid(), signal.SIGCONT)
            os._exit(0)
        cluster.link.cut()
        os.kill(os.getpid(), signal.SIGSTOP)
        os.waitpid(waker, 0)
        assert [future.result(PATIENCE) for future in futures] == [n * n for n in range(200)]
        assert set(_runs(log).values()) == {1}
        assert cluster.lost == (0, 0, 0)
