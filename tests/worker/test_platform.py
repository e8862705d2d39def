"""Where a worker finds itself, as its environment says."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cloudexec import BatchExecutor
from cloudexec.testing import ManualLauncher
from cloudexec.worker.birth import pull_seconds
from cloudexec.worker.platform import Place, ask_metadata, find_place

BATCH = {
    "AWS_BATCH_JOB_ID": "job:3",
    "AWS_BATCH_JOB_ARRAY_INDEX": "3",
    "AWS_BATCH_JOB_ATTEMPT": "2",
    "ECS_CONTAINER_METADATA_URI_V4": "http://169.254.170.2/v4/x",
}
STOP = "cloudexec stop --executor {executor}"
ADDRESS = BATCH["ECS_CONTAINER_METADATA_URI_V4"]


@pytest.mark.parametrize(
    ("environ", "place"),
    [
        ({"HOME": "/root"}, Place(platform="this machine")),
        (
            BATCH,
            Place(
                platform="AWS Batch",
                launch_index=3,
                job_id="job:3",
                attempt=2,
                metadata=ADDRESS,
                stop=STOP,
            ),
        ),
        ({"AWS_BATCH_JOB_ID": "job"}, Place(platform="AWS Batch", job_id="job", stop=STOP)),
        (
            {"ECS_CONTAINER_METADATA_URI_V4": ADDRESS},
            Place(platform="Amazon ECS", metadata=ADDRESS),
        ),
        (
            {"CLOUDEXEC_INDEX": "4", "CLOUDEXEC_JOB_ID": "n4", "CLOUDEXEC_ATTEMPT": "3"},
            Place(platform="this machine", launch_index=4, job_id="n4", attempt=3),
        ),
    ],
    ids=["a process here", "a child of an array job", "a plain job", "a task", "told by us"],
)
def test_a_platform_says_who_a_worker_is(environ: dict[str, str], place: Place) -> None:
    assert find_place(environ) == place


def test_what_the_launcher_says_counts_more_than_where_the_client_runs() -> None:
    """A client in a child of an array job may start workers that inherit its variables."""
    found = find_place({**BATCH, "CLOUDEXEC_INDEX": "0", "CLOUDEXEC_ATTEMPT": "1"})
    assert (found.launch_index, found.attempt, found.stop) == (0, 1, "")


@pytest.mark.parametrize(
    ("name", "value"),
    [("CLOUDEXEC_INDEX", "-1"), ("CLOUDEXEC_ATTEMPT", "0"), ("CLOUDEXEC_INDEX", "x")],
)
def test_a_number_that_is_none_ends_the_worker_with_the_reason(name: str, value: str) -> None:
    needed = ("TARGET", "EXECUTOR_ID", "KEY", "LAUNCH", "SLOTS")
    done = subprocess.run(
        [sys.executable, "-m", "cloudexec.worker"],
        env={**os.environ, **{f"CLOUDEXEC_{each}": "1" for each in needed}, name: value},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == 1
    assert f"{name} must be a whole number" in done.stderr
    assert repr(value) in done.stderr


def test_a_platform_that_says_nonsense_costs_a_worker_only_the_time_of_its_pull(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The launcher has said which worker it is, and that counts: so it is not to end for this."""
    monkeypatch.setenv("AWS_BATCH_JOB_ID", "job")
    monkeypatch.setenv("AWS_BATCH_JOB_ARRAY_INDEX", "x")
    assert find_place({**os.environ, "CLOUDEXEC_INDEX": "2"}).launch_index == 2
    assert pull_seconds() == 0.0


class _Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b"no such page"
        if self.path == "/v4/x/task":
            body = json.dumps({"TaskARN": "arn:aws:ecs:x:1:task/c/t"}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def metadata() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Metadata) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v4"
        server.shutdown()
        thread.join()


def test_what_cannot_be_asked_says_nothing(metadata: str) -> None:
    answers = [
        ask_metadata(Place(platform="Amazon ECS", metadata=where))
        for where in ("", "file:///etc/passwd", "http://127.0.0.1:9/x", f"{metadata}/y")
    ]
    assert answers == [{}] * 4


def test_a_task_of_amazon_ecs_learns_its_name_from_the_platform(metadata: str) -> None:
    """The client is told the name, and tasks inherit nothing of how the worker was launched."""
    launcher = ManualLauncher()
    with BatchExecutor(1, launcher=launcher, listen="127.0.0.1:0") as executor:
        future = executor.submit(lambda: {each for each in os.environ if "CLOUDEXEC" in each})
        (launch,) = launcher.wait(1, 30)
        contact = launch.contact
        worker = subprocess.Popen(
            [sys.executable, "-m", "cloudexec.worker"],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "ECS_CONTAINER_METADATA_URI_V4": f"{metadata}/x",
                "CLOUDEXEC_TARGET": contact.target,
                "CLOUDEXEC_EXECUTOR_ID": contact.executor_id,
                "CLOUDEXEC_LAUNCH": str(int(launch.launch_id) - 1),
                "CLOUDEXEC_INDEX": "1",
                "CLOUDEXEC_KEY": contact.key.hex(),
                "CLOUDEXEC_CERTIFICATE_SHA256": contact.certificate_sha256,
                "CLOUDEXEC_SLOTS": "1",
            },
        )
        of_the_user = {each for each in os.environ if "CLOUDEXEC" in each}
        assert future.result(60) == {"CLOUDEXEC_DEPTH", *of_the_user}
        assert executor.stats().launches[0].job_id == "arn:aws:ecs:x:1:task/c/t"
        executor.shutdown(wait=False)
        assert worker.wait(30) == 0
        launcher.end_all()
