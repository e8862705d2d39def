"""Relays that the launcher starts: in an emulated AWS, as processes with real traffic."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import json
import logging
import os
import re
import signal
import socket
import socketserver
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import click.testing
import pytest
from relay_helpers import PACKAGE
from relay_tasks import pause, square

from cloudexec import Batch, BatchExecutor, ConfigError, LaunchError
from cloudexec._aws.address import _is_ec2_instance, _outward_address
from cloudexec._aws.policy import policy
from cloudexec._aws.profile import Profile
from cloudexec.cli import _group
from cloudexec.testing import FakeAWS

PATIENCE = 60.0
IMAGE = f"registry.example/w@sha256:{'0' * 64}"


def _may_listen() -> bool:
    """Whether a process of this user may have port 443 at an address of its own."""
    try:
        socket.create_server(("127.200.0.1", 443)).close()
    except OSError:
        return False
    return True


pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not _may_listen(), reason="port 443 of 127.200.0.1 cannot be had"),
]


@pytest.fixture
def aws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAWS]:
    """An account with a set-up whose image is there."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path / "profiles"))
    monkeypatch.delenv("CLOUDEXEC_RELAY", raising=False)
    with FakeAWS(grace=0.5, calls_per_second=1000, stack_seconds=0.0) as fake:
        for words in (["up", "--yes"], ["image", "use", IMAGE]):
            done = click.testing.CliRunner().invoke(_group, words)
            assert done.exit_code == 0, done.output
        yield fake


def eventually(holds: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + PATIENCE
    while not (found := holds()):
        assert time.monotonic() < deadline, holds
        time.sleep(0.02)
    return found


def relays(aws: FakeAWS) -> list[Any]:
    return [job for job in aws.jobs() if job.queue.endswith("-relay")]


def command(*words: str) -> str:
    """Run a command; return what it prints."""
    done = click.testing.CliRunner().invoke(_group, [*words], standalone_mode=False)
    assert not done.return_value, done.output
    return done.output


class Forwarder(socketserver.ThreadingTCPServer):
    """Passes connections on to a port of this machine's loopback address."""

    daemon_threads = True

    def __init__(self, host: str, port: int) -> None:
        self.port = port
        super().__init__((host, 0), _Forwarding)


class _Forwarding(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, Forwarder)
        with socket.create_connection(("127.0.0.1", self.server.port)) as server:
            back = threading.Thread(target=_copy, args=(server, self.request))
            back.start()
            _copy(self.request, server)
            back.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


@pytest.fixture
def laptop(aws: FakeAWS, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAWS]:
    """This machine as one in a private network, for which AWS is elsewhere."""
    own = _outward_address()
    if not own or ipaddress.ip_address(own).is_global or _is_ec2_instance():
        pytest.skip("this machine is one that workers could reach")
    monkeypatch.delenv("CLOUDEXEC_ADVERTISE")
    port = int(aws.endpoint_url.rpartition(":")[2])
    with Forwarder(own, port) as forwarder:
        threading.Thread(target=forwarder.serve_forever, args=(0.05,), daemon=True).start()
        url = f"http://{own}:{forwarder.server_address[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        yield aws
        forwarder.shutdown()


def test_an_executor_has_a_relay_of_its_own_for_as_long_as_it_lives(aws: FakeAWS) -> None:
    """Everything goes through it: the workers know of nothing else."""
    aws.faults.allow_only(policy(Profile.load("default")))
    aws.clear_requests()
    with BatchExecutor(2, launcher=Batch(relay=True), output="off") as executor:
        assert sum(executor.map(square, range(300))) == sum(x * x for x in range(300))
        data = os.urandom(3 << 20)
        assert executor.submit(bytes, data).result() == data
        (relay,) = relays(aws)
        assert relay.status == "RUNNING"
        assert (relay.vcpus, relay.memory_mib) == (0.25, 512)
        assert relay.environment["CLOUDEXEC_RELAY_PORT"] == "443"
        assert relay.tags["cloudexec:executor"]
        if os.geteuid() == 0:  # it had to be root for its port, and is it no more
            assert os.stat(f"/proc/{relay.pid}").st_uid == 10001
        workers = [job for job in aws.jobs() if job.queue.endswith("-fargate")]
        assert all(":443 http" in job.environment["CLOUDEXEC_RELAY"] for job in workers)
        assert workers[0].environment["CLOUDEXEC_TARGET"].endswith(".cloudexec.invalid:443")
        cost = executor.cost()
        assert "a relay at $0.017 an hour included" in cost.note
    submitted = next(
        each.parameters
        for each in aws.requests
        if each.operation == "SubmitJob" and each.parameters["jobQueue"].endswith("-relay")
    )
    assert submitted["timeout"] == {"attemptDurationSeconds": 24 * 3600}
    ends = [
        each.operation
        for each in aws.requests
        if each.parameters.get("jobId") == relay.job_id or each.operation == "DeleteObjects"
    ]
    assert ends == ["TerminateJob", "DeleteObjects"]  # what costs money first
    eventually(lambda: relays(aws)[0].status == "FAILED")
    assert relays(aws)[0].status_reason == "cloudexec: the executor has shut down"
    assert not [each for each in aws.requests if each.error and each.service != "logs"]


def test_a_relay_lives_a_day_although_workers_may_not(aws: FakeAWS) -> None:
    """All workers of the executor come through it, one after the other."""
    aws.clear_requests()
    with BatchExecutor(1, launcher=Batch(relay=True, max_runtime=600.0), output="off") as executor:
        assert executor.submit(square, 3).result(PATIENCE) == 9
    relay, worker = (each.parameters for each in aws.requests if each.operation == "SubmitJob")
    assert relay["timeout"] == {"attemptDurationSeconds": 24 * 3600}
    assert worker["timeout"] == {"attemptDurationSeconds": 600}
    expires = [
        datetime.fromisoformat(each["tags"]["cloudexec:expires"]) for each in (relay, worker)
    ]
    assert expires[0] - expires[1] > timedelta(hours=23)


def test_the_relay_is_paid_for_and_counts_for_the_ceiling(aws: FakeAWS) -> None:
    """Its price is in the rate, beside that of the worker."""
    rates = {}
    for relay in (True, False):
        with BatchExecutor(1, launcher=Batch(relay=relay), output="off") as executor:
            assert executor.submit(square, 3).result() == 9
            rates[relay] = executor.cost().per_hour_usd
    assert rates[True] - rates[False] == pytest.approx(0.0173, abs=0.001)


def test_a_relay_that_dies_is_followed_by_another_and_no_task_runs_twice(
    aws: FakeAWS, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cloudexec")
    launcher = Batch(relay=True)
    with BatchExecutor(2, launcher=launcher, output="off") as executor:
        futures = [executor.submit(pause, str(tmp_path), x) for x in range(2)]
        eventually(lambda: len(list(tmp_path.glob("*.began"))) == 2)
        first = relays(aws)[0]
        # Neither of these is in the way of the next one.
        aws.faults.lose_response("SubmitJob")
        aws.faults.deny("s3:PutObject", count=1)
        os.kill(first.pid, signal.SIGKILL)
        second = eventually(
            lambda: next((job for job in relays(aws)[1:] if job.status == "RUNNING"), None)
        )
        eventually(lambda: executor.stats().workers.reconnected == 2)
        (tmp_path / "go").touch()
        assert [future.result(PATIENCE) for future in futures] == [0, 1]
        assert list(executor.map(square, range(100))) == [x * x for x in range(100)]
        assert executor.stats().workers.lost == 0
        platform: Any = launcher._running.site.platform
        assert f"the relay is now at {platform._inquiry.relay}" in caplog.text
    assert len(list(tmp_path.glob("*.began"))) == 2
    assert [job.job_id for job in relays(aws)] == [first.job_id, second.job_id]
    assert "the relay cannot be checked or replaced now: s3:PutObject" in caplog.text
    assert "another relay is started: the relay, job" in caplog.text
    assert "the relay is now at 127." in caplog.text


def test_a_worker_that_may_not_read_the_address_dials_where_the_relay_was(aws: FakeAWS) -> None:
    """The URL ends with the credentials of its time, and workers are launched later, too."""
    with BatchExecutor(1, launcher=Batch(relay=True), idle_timeout=0.2, output="off") as executor:
        assert executor.submit(square, 3).result(PATIENCE) == 9
        aws.faults.expire_credentials()
        aws.faults.renew_credentials()
        eventually(lambda: executor.stats().workers.idle == 0)
        assert executor.submit(square, 4).result(PATIENCE) == 16
        worker = next(job for job in reversed(aws.jobs()) if job.queue.endswith("-fargate"))
        eventually(
            lambda: any("whether the relay has moved" in line for line in aws.logs(worker.job_id))
        )


def test_a_relay_that_ends_at_once_is_why_the_executor_cannot_start(aws: FakeAWS) -> None:
    aws.faults.image_pull_fails()
    with (
        BatchExecutor(1, launcher=Batch(relay=True)) as executor,
        pytest.raises(LaunchError, match=r"the relay, job .* has ended: the worker's image cannot"),
    ):
        executor.submit(square, 3).result(PATIENCE)
    assert len(relays(aws)) == 1  # another one would end as well


@pytest.mark.parametrize("fail", [2, 3])
def test_a_first_relay_that_ends_gets_as_many_tries_as_workers(
    aws: FakeAWS, fail: int, caplog: pytest.LogCaptureFixture
) -> None:
    # Each is a job that AWS tries to start three times.
    aws.faults.start_fails("ResourceInitializationError: i/o timeout", count=3 * fail)
    with BatchExecutor(1, launcher=Batch(relay=True), output="off") as executor:
        if fail == 3:
            with pytest.raises(LaunchError, match=r"the relay, job .* has ended: .*i/o timeout"):
                executor.submit(square, 3).result(PATIENCE)
        else:
            assert executor.submit(square, 3).result(PATIENCE) == 9
    assert len(relays(aws)) == 3
    assert caplog.text.count("another relay is started: the relay, job") == 2


def test_all_tries_of_a_first_relay_share_the_time_of_a_start(aws: FakeAWS) -> None:
    aws.faults.start_fails("ResourceInitializationError: i/o timeout", count=9)
    aws.faults.slow_response("SubmitJob", 1.0, count=1)
    with (
        BatchExecutor(1, launcher=Batch(relay=True), launch_timeout=0.8, output="off") as executor,
        pytest.raises(LaunchError, match=r"the relay, job"),
    ):
        executor.submit(square, 3).result(PATIENCE)
    assert len(relays(aws)) == 1


def test_a_relay_that_was_given_up_and_not_ended_is_ended_later(aws: FakeAWS) -> None:
    with BatchExecutor(1, launcher=Batch(relay=True), launch_timeout=5.0, output="off") as executor:
        assert executor.submit(square, 3).result(PATIENCE) == 9
        aws.faults.no_capacity()
        aws.faults.deny("batch:TerminateJob", count=1)
        os.kill(relays(aws)[0].pid, signal.SIGKILL)
        # It is given up once it has not come in 5 s; that it is to end is refused the first time.
        eventually(lambda: len(relays(aws)) == 3)
    assert Counter(relay.status for relay in relays(aws)) == {"FAILED": len(relays(aws))}


def test_a_relay_that_cannot_be_ended_is_an_error_that_says_what_to_do(
    aws: FakeAWS, caplog: pytest.LogCaptureFixture
) -> None:
    with BatchExecutor(1, launcher=Batch(relay=True), output="off") as executor:
        assert executor.submit(square, 3).result(PATIENCE) == 9
        aws.faults.deny("batch:TerminateJob")
    (relay,) = relays(aws)
    stop = f"`cloudexec stop --executor {relay.tags['cloudexec:executor']}` tries again"
    assert f"the relay, job {relay.job_id}, could not be terminated: batch:Term" in caplog.text
    assert stop in caplog.text[caplog.text.index("the relay, job") :]


def test_a_relay_that_ends_while_its_address_is_looked_up_is_not_an_error_of_aws(
    aws: FakeAWS,
) -> None:
    """Its network interface goes with it. Another relay is started."""
    aws.faults.slow_response("DescribeNetworkInterfaces", 3.0, count=1)
    with BatchExecutor(1, launcher=Batch(relay=True), output="off") as executor:
        with ThreadPoolExecutor(1) as pool:
            called = pool.submit(lambda: executor.submit(square, 3).result(PATIENCE))
            eventually(lambda: any(each.operation == "DescribeTasks" for each in aws.requests))
            os.kill(relays(aws)[0].pid, signal.SIGKILL)
            assert called.result(PATIENCE) == 9
    gone = [each.error for each in aws.requests if each.operation == "DescribeNetworkInterfaces"]
    assert "InvalidNetworkInterfaceID.NotFound" in gone


def test_a_relay_that_does_not_come_is_why_the_executor_cannot_start(aws: FakeAWS) -> None:
    aws.faults.no_capacity()
    with (
        BatchExecutor(1, launcher=Batch(relay=True), launch_timeout=2.0) as executor,
        pytest.raises(LaunchError, match=r"the relay, job .*, is RUNNABLE after 2 s: .*capacity"),
    ):
        executor.submit(square, 3).result(PATIENCE)
    eventually(lambda: relays(aws)[0].status == "FAILED")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"queues": {"fargate": "q"}}, "has no queue for relays: `cloudexec up --name default`"),
        ({"assign_public_ip": False}, "give no public addresses .* relay='ssh://user@host'"),
        ({"stack": ""}, "it needs the stack of a profile"),
        ({"stack": "theirs", "queues": {"fargate": "q"}}, "its administrator can bring it up"),
    ],
)
def test_a_set_up_that_cannot_have_a_relay_is_told_why(
    aws: FakeAWS, changes: dict[str, Any], said: str
) -> None:
    dataclasses.replace(Profile.load("default"), **changes).save()
    with (
        BatchExecutor(1, launcher=Batch(relay=True)) as executor,
        pytest.raises(ConfigError, match=f"no relay can be started: .*{said}"),
    ):
        executor.submit(square, 3).result(PATIENCE)


def test_where_nothing_leads_in_a_profile_says_auto_and_doctor_why(laptop: FakeAWS) -> None:
    """From `up` to the first task, with nothing about relays in the program."""
    assert "Executors start a relay for them here, for about $0.02" in command("up", "--yes")
    assert Profile.load("default").relay == "auto"
    said = command("doctor")
    assert (
        "workers connect through a relay that each executor starts, for about $0.02 an hour" in said
    )
    assert "(auto, from the profile 'default'), as workers in AWS cannot reach this machine" in said
    parts = re.search(r"ran a task in ([\d.]+) s: preparation (.*?);", said)
    assert parts is not None
    spent = [float(each) for each in re.findall(r"([\d.]+) s", f"{parts[2]},")]
    assert sum(spent) == pytest.approx(float(parts[1]), abs=0.5)
    assert " ms for a task, and " in said
    assert " s for 4 MiB there and back" in said
    assert len(relays(laptop)) == 1
    with BatchExecutor(1, launcher=Batch(), output="off") as executor:
        assert executor.submit(square, 3).result() == 9
    assert len(relays(laptop)) == 2
    with (
        BatchExecutor(1, launcher=Batch(relay=False)) as executor,
        pytest.raises(ConfigError, match="cannot reach this machine"),
    ):
        executor.submit(square, 3).result(PATIENCE)
    assert len(relays(laptop)) == 2


def test_where_workers_reach_this_machine_auto_starts_nothing(aws: FakeAWS) -> None:
    command("up", "--yes")
    assert Profile.load("default").relay == ""
    with BatchExecutor(1, launcher=Batch(relay="auto"), output="off") as executor:
        assert executor.submit(square, 3).result() == 9
    assert not relays(aws)


@pytest.mark.parametrize(
    ("variable", "outcome"),
    [
        ("true", "ok      address: workers connect through a relay that each executor starts"),
        ("false", "ok      address: workers are told to dial 127.0.0.1"),
        (
            "relay.example:443",
            "ok      address: workers connect through the relay relay.example:443",
        ),
    ],
)
def test_doctor_says_what_the_variable_means(
    aws: FakeAWS, monkeypatch: pytest.MonkeyPatch, variable: str, outcome: str
) -> None:
    monkeypatch.setenv("CLOUDEXEC_RELAY", variable)
    assert outcome in command("doctor", "--dry")
    expected = {"true": True, "false": False}.get(variable, variable)
    assert Batch().relay == expected


def test_doctor_refuses_what_no_executor_takes(
    aws: FakeAWS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOUDEXEC_RELAY", "nonsense")
    done = click.testing.CliRunner().invoke(_group, ["doctor", "--dry"], standalone_mode=False)
    assert done.return_value == 1
    assert "failed  address: no executor can start: relay must be" in done.output
    assert "not 'nonsense', which CLOUDEXEC_RELAY has" in done.output


@pytest.mark.parametrize(
    ("relay", "proxy", "outcome", "said"),
    [
        ("203.0.113.5:443", "http://me:secret@p.test:8080", 0, "by the proxy http://p.test:8080"),
        ("true", "socks5h://p.test", 0, "by the proxy socks5h://p.test"),
        ("127.0.0.1:9", "http://p.test:8080", 1, "127.0.0.1 is an address that each machine has"),
        ("[::1]:443", "http://p.test:8080", 1, "::1 is an address that each machine has"),
        ("203.0.113.5:443", "http://", 1, "the proxy http:// (HTTPS_PROXY, ALL_PROXY) has no host"),
        ("203.0.113.5:443", "http://me:sec#ret@p.test:8080", 1, "HTTPS_PROXY or ALL_PROXY cannot"),
        ("true", "https://me:secret@p.test:8080", 1, "https://p.test:8080 is of an unknown kind"),
        ("ssh://me@203.0.113.5", "http://p.test:8080", 0, ": from CLOUDEXEC_RELAY\n"),
    ],
)
def test_doctor_says_by_which_proxy_a_relay_is_reached(
    aws: FakeAWS, monkeypatch: pytest.MonkeyPatch, relay: str, proxy: str, outcome: int, said: str
) -> None:
    monkeypatch.setenv("CLOUDEXEC_RELAY", relay)
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")  # the emulated AWS
    done = click.testing.CliRunner().invoke(_group, ["doctor", "--dry"], standalone_mode=False)
    (line,) = [each for each in done.output.splitlines(True) if " address: " in each]
    assert said in line
    assert "me:sec" not in done.output
    assert line.startswith("failed" if outcome else "ok")


SCRIPT = """
import os, sys, time
from pathlib import Path
from cloudexec import Batch, BatchExecutor

def task(folder, x):
    Path(folder, f"{x}.{time.monotonic_ns()}.began").touch()
    deadline = time.monotonic() + 60
    while not Path(folder, "go").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return x

if __name__ == "__main__":
    folder = sys.argv[1]
    launcher = Batch(relay=True)
    with BatchExecutor(2, launcher=launcher, journal=f"{folder}/journal", output="off") as executor:
        futures = [executor.submit(task, folder, x) for x in range(2)]
        Path(folder, "submitted").touch()
        print([future.result() for future in futures], executor.stats().tasks.taken_over)
"""


def left_port(journal: Path) -> int:
    """Return the port at which a killed program listened."""
    with contextlib.closing(sqlite3.connect(journal)) as opened:
        (state,) = opened.execute("SELECT value FROM state WHERE name = 'takeover'").fetchone()
    return int(json.loads(state[16:])["listen"].rpartition(":")[2])


@pytest.mark.parametrize(
    "between", ["nothing", "port taken", "start refused", "Ctrl-C", "Ctrl-C at the relay"]
)
def test_a_killed_program_is_taken_over_through_its_relay(
    aws: FakeAWS, tmp_path: Path, between: str
) -> None:
    """The next run finds the relay and the workers of the one before; no call runs twice.

    A start that fails leaves them to the run after it. The port at which the killed program
    listened on this machine does not matter.
    """
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)

    def run(**environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(script), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": PACKAGE, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    first = run()
    try:
        eventually(lambda: len(list(tmp_path.glob("*.began"))) == 2)
    finally:
        first.kill()
        first.communicate()
    (tmp_path / "submitted").unlink()
    with contextlib.ExitStack() as stack:
        if between == "port taken":
            port = left_port(tmp_path / "journal")
            stack.enter_context(socket.create_server(("127.0.0.1", port)))
        elif between == "Ctrl-C at the relay":
            is_stopped_at_the_relay(aws, run)
        elif between != "nothing":
            fails_to_start(aws, run(), between)
        follow(aws, run(), tmp_path)


def fails_to_start(aws: FakeAWS, process: subprocess.Popen[str], how: str) -> None:
    """Have a program end while it starts, when it has found the relay."""
    aws.clear_requests()
    if how == "Ctrl-C":
        aws.faults.slow_response("s3:PutObject", 5.0, count=1)
    else:
        aws.faults.deny("s3:PutObject", count=1)
    try:
        if how == "Ctrl-C":
            eventually(lambda: any(each.operation == "ListJobs" for each in aws.requests))
            process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert ("KeyboardInterrupt" if how == "Ctrl-C" else "s3:PutObject") in errors
    assert relays(aws)[0].status == "RUNNING"


def is_stopped_at_the_relay(aws: FakeAWS, run: Callable[..., subprocess.Popen[str]]) -> None:
    """Have a program end while it registers with the relay, through a proxy that says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        proxy.settimeout(PATIENCE)
        url = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        process = run(HTTPS_PROXY=url, https_proxy=url, NO_PROXY="", no_proxy="")
        interrupt(process, lambda: proxy.accept()[0].close())
    assert relays(aws)[0].status == "RUNNING"


def interrupt(process: subprocess.Popen[str], wait: Callable[[], object]) -> None:
    """Interrupt a program with Ctrl-C after a wait, and see it end of that."""
    try:
        wait()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
        process.wait()
    assert "KeyboardInterrupt" in errors


def follow(aws: FakeAWS, second: subprocess.Popen[str], tmp_path: Path) -> None:
    """See a program through that takes over all of the run before."""
    try:
        eventually((tmp_path / "submitted").exists)
        (tmp_path / "go").touch()
        said, errors = second.communicate(timeout=PATIENCE)
    finally:
        second.kill()
        second.wait()
    assert said == "[0, 1] 2\n", errors
    assert len(list(tmp_path.glob("*.began"))) == 2
    assert len(relays(aws)) == 1
    eventually(lambda: relays(aws)[0].status == "FAILED")


def test_ctrl_c_while_a_relay_is_waited_for_leaves_nothing(aws: FakeAWS, tmp_path: Path) -> None:
    aws.faults.no_capacity()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": PACKAGE},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    interrupt(
        process, lambda: eventually(lambda: relays(aws) and relays(aws)[0].status == "RUNNABLE")
    )
    assert relays(aws)[0].status == "FAILED"
    assert len(aws.jobs()) == 1
