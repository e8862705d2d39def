"""Real workers that reach their executor through a relay, which fails in every way."""

from __future__ import annotations

import itertools
import logging
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
from relay_helpers import KEY, PACKAGE, RelayLauncher, RelayProcess
from relay_tasks import noted

from cloudexec import BatchExecutor, LaunchError
from cloudexec._server.certificate import make_certificate
from cloudexec.testing import ManualLauncher

TASKS = int(os.environ.get("CLOUDEXEC_TEST_TASKS", "6000"))
"""Number of tasks while a relay dies; with 100000 of them, 1 GiB goes through it."""
pytestmark = pytest.mark.timeout(120 + TASKS // 100)
cloudpickle.register_pickle_by_value(sys.modules[__name__])
PATIENCE = 60.0
SIZE = 2**30 // 100_000
MARKER = b"a-word-that-nobody-may-read"

Make = Callable[..., RelayLauncher]


def until(condition: Callable[[], Any]) -> Any:
    """Wait for something to hold; return what it says."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline
        threading.Event().wait(0.02)
    return found


def numbers() -> Iterator[int]:
    """Which of 1,000 arguments each task has."""
    return itertools.cycle(range(1_000))


def end(executor: BatchExecutor, launcher: RelayLauncher) -> None:
    """End an executor whose workers end in order."""
    executor.shutdown(wait=False)
    assert [worker.wait(PATIENCE) for worker in launcher.workers.values()] == [0] * len(
        launcher.workers
    )
    launcher.end_all()
    executor.shutdown()


def test_a_relay_that_dies_three_times_loses_and_doubles_nothing(
    relay: RelayProcess, launcher: Make, tmp_path: Path
) -> None:
    workers = launcher(slots_per_worker=2)
    executor = BatchExecutor(4, launcher=workers, retries=0)
    data = os.urandom(3 * 2**20)
    arguments = [data[at : at + SIZE] for at in range(1_000)]
    results = executor.map(
        noted, range(TASKS), map(arguments.__getitem__, numbers()), itertools.repeat(str(tmp_path))
    )
    large = [executor.submit(bytes.__add__, data, bytes([n])) for n in range(12)]
    for at, number in zip(range(TASKS), numbers(), strict=False):
        assert next(results) == (at, zlib.crc32(arguments[number]))
        if at in (TASKS // 6, TASKS // 3, TASKS // 2):
            relay.restart()
    assert [each.result(PATIENCE) for each in large] == [data + bytes([n]) for n in range(12)]
    assert executor.stats().lost_attempts == 0
    end(executor, workers)
    ran = Counter(line for file in tmp_path.iterdir() for line in file.read_text().split())
    assert len(ran) == TASKS
    assert set(ran.values()) == {1}


def test_workers_may_dial_a_relay_before_it_is_there(launcher: Make) -> None:
    """It is told of the executor again as soon as it is back."""
    process = RelayProcess()
    workers = launcher(process.address)
    try:
        with BatchExecutor(1, launcher=workers) as executor:
            assert executor.submit(abs, -1).result(PATIENCE) == 1
            process.kill()
            future = executor.submit(abs, -2)
            process._start(process.address)
            assert future.result(PATIENCE) == 2
            end(executor, workers)
    finally:
        process.kill()


def test_the_process_of_the_client_is_replaced_when_it_is_killed(
    launcher: Make, caplog: pytest.LogCaptureFixture
) -> None:
    workers = launcher()
    executor = BatchExecutor(1, launcher=workers)
    with caplog.at_level(logging.WARNING, "cloudexec"):
        assert executor.submit(abs, -1).result(PATIENCE) == 1
        (tunnel,) = _tunnels()
        tunnel.kill()
        assert executor.submit(abs, -2).result(PATIENCE) == 2
    assert "the connection to the relay is lost, and dialed again: its process" in caplog.text
    end(executor, workers)
    assert not _tunnels()


def test_modules_in_the_current_folder_do_not_reach_the_process_of_the_client(
    launcher: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script's neighbour may have the name of one of Python's own modules."""
    for name in ("random", "json", "asyncio"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('not this one')")
    monkeypatch.chdir(tmp_path)
    workers = launcher(prefix=["env", "-C", "/"])  # workers are on other machines
    executor = BatchExecutor(1, launcher=workers)
    assert executor.submit(abs, -1).result(PATIENCE) == 1
    end(executor, workers)


def _tunnels(of: int | None = None) -> list[psutil.Process]:
    return [
        each
        for each in psutil.Process(of).children(recursive=True)
        if each.status() != psutil.STATUS_ZOMBIE
        and "cloudexec._relay.tunnel" in " ".join(each.cmdline())
    ]


def test_several_executors_share_a_relay(relay: RelayProcess, launcher: Make) -> None:
    several = [launcher() for _ in range(3)]
    executors = [BatchExecutor(1, launcher=each) for each in several]
    futures = [executor.submit(pow, n, 2) for n, executor in enumerate(executors)]
    assert [future.result(PATIENCE) for future in futures] == [0, 1, 4]
    for executor, each in zip(executors, several, strict=True):
        end(executor, each)


def test_a_client_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    """Its tunnel ends at once, workers when they have lost it, and the relay when all have left."""
    relay = RelayProcess(idle=15.0)
    script = tmp_path / "client.py"
    script.write_text(
        "import sys, time\n"
        "from cloudexec import BatchExecutor\n"
        "from relay_helpers import RelayLauncher\n"
        "launcher = RelayLauncher(sys.argv[1])\n"
        "executor = BatchExecutor(1, launcher=launcher, reconnect_grace=1.0)\n"
        "print(executor.submit(abs, -1).result(), flush=True)\n"
        "time.sleep(600)\n"
    )
    path = os.pathsep.join([PACKAGE, str(Path(__file__).parent)])
    client = subprocess.Popen(
        [sys.executable, str(script), relay.address],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert client.stdout is not None
        assert client.stdout.readline() == "1\n"
        children = psutil.Process(client.pid).children(recursive=True)
        (tunnel,) = _tunnels(client.pid)
        client.kill()
        client.wait()
        tunnel.wait(PATIENCE)
        for each in children:
            if each.is_running():
                each.kill()  # a worker waits for a client that may come back
        psutil.wait_procs(children, PATIENCE)
        assert relay.process.wait(PATIENCE) == 0
    finally:
        client.kill()
        client.communicate()
        relay.kill()


@pytest.mark.parametrize("wrong", ["key", "relay", "port"])
def test_a_relay_that_does_not_take_the_client_is_an_error_that_says_why(
    wrong: str, relay: RelayProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloudexec._server import listener

    monkeypatch.setattr(listener, "_REGISTER_TIMEOUT", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as other:
        address, why = relay.address, "not that of this relay's key"
        if wrong == "relay":
            threading.Thread(target=_answer_as_a_web_server, args=[other], daemon=True).start()
            address, why = f"127.0.0.1:{other.getsockname()[1]}", "it is no relay of cloudexec"
        if wrong == "port":
            address, why = "127.0.0.1:9", "Connect call failed"
        workers = RelayLauncher(address, key=b"another key".ljust(32) if wrong == "key" else KEY)
        with pytest.raises(LaunchError, match=rf"cannot reach the relay at {address}: .*{why}"):
            BatchExecutor(1, launcher=workers).submit(abs, -1).result(PATIENCE)
    assert not _tunnels()


def _answer_as_a_web_server(listening: socket.socket) -> None:
    try:
        while True:
            connection, _ = listening.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    except OSError:
        return


class Wiretap:
    """Passes on what workers and a relay say to each other, and keeps all of it."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._to = host, int(port)
        self.heard: list[bytes] = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        try:
            while True:
                near, _ = self._listening.accept()
                far = socket.create_connection(self._to)
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass, args=[source, target], daemon=True).start()
        except OSError:
            return

    def _pass(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(1 << 20):
                self.heard.append(data)
                target.sendall(data)
        except OSError:
            pass
        for each in (source, target):
            each.close()

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def wiretap(relay: RelayProcess) -> Iterator[Wiretap]:
    tap = Wiretap(relay.address)
    yield tap
    tap.close()


def test_the_relay_sees_ciphertext(wiretap: Wiretap, launcher: Make) -> None:
    """No function, argument, result or key is in what passes it, on either side."""
    workers = launcher(wiretap.address)
    executor = BatchExecutor(1, launcher=workers)
    data = MARKER * 50_000
    assert executor.submit(lambda x: x + MARKER, data).result(PATIENCE) == data + MARKER
    end(executor, workers)
    heard = b"".join(wiretap.heard)
    assert len(heard) > 2 * len(data)
    assert b"HTTP/1.1 200 Joined" in heard
    for secret in (MARKER, KEY, KEY.hex().encode(), b"cloudpickle", b"numpy"):
        assert secret not in heard


class Impostor:
    """A relay that answers workers itself, with a certificate of its own."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self.asked: list[bytes] = []
        certificate = make_certificate()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        directory = Path(os.environ.get("TMPDIR", "/tmp"))
        both = directory / f"impostor-{os.getpid()}.pem"
        both.write_bytes(certificate.key_pem + certificate.pem)
        self._context.load_cert_chain(both)
        both.unlink()
        threading.Thread(target=self._take, daemon=True).start()

    def _take(self) -> None:
        try:
            while True:
                connection, _ = self._listening.accept()
                threading.Thread(target=self._serve, args=[connection], daemon=True).start()
        except OSError:
            return

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                first = connection.recv(4096)
                self.asked.append(first)
                if not first.startswith(b"CONNECT"):
                    connection.sendall(b"nonce abc\n")
                    connection.recv(4096)
                    connection.sendall(b"ok ticket\n")
                    return
                connection.sendall(b"HTTP/1.1 200 Joined\r\n\r\n")
                with self._context.wrap_socket(connection, server_side=True) as secured:
                    self.asked.append(secured.recv(4096))
        except OSError:
            return

    def close(self) -> None:
        self._listening.close()


def test_a_relay_that_answers_itself_is_not_talked_to() -> None:
    """Workers know the certificate of their client."""
    impostor = Impostor()
    launcher = ManualLauncher(needs_network=True)
    with BatchExecutor(1, launcher=launcher) as executor:
        executor.submit(abs, -1)
        contact = launcher.wait(1, PATIENCE)[0].contact
        worker = subprocess.run(
            [sys.executable, "-m", "cloudexec.worker"],
            env={
                **os.environ,
                "PYTHONPATH": PACKAGE,
                "CLOUDEXEC_TARGET": f"{contact.executor_id}.cloudexec.invalid:443",
                "CLOUDEXEC_RELAY": impostor.address,
                "CLOUDEXEC_EXECUTOR_ID": contact.executor_id,
                "CLOUDEXEC_IDENTITY": "1",
                "CLOUDEXEC_KEY": contact.key.hex(),
                "CLOUDEXEC_SLOTS": "1",
                "CLOUDEXEC_CERTIFICATE_SHA256": contact.certificate_sha256,
            },
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        launcher.end_all()
        executor.kill_workers()
    impostor.close()
    assert "has another certificate than the one pinned for this worker" in worker.stderr
    assert worker.returncode != 0
    assert contact.key.hex().encode() not in b"".join(impostor.asked)
