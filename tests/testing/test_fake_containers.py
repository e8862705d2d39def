"""The same jobs in containers: own address, memory limit, signals, ends."""

from __future__ import annotations

import http.server
import json
import os
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from botocore.exceptions import ClientError
from fake_helpers import Account

from cloudexec.testing import FakeAWS

BASE = os.environ.get(
    "CLOUDEXEC_TEST_BASE",
    f"localhost/python-base:{sys.version_info.major}.{sys.version_info.minor}",
)
SMALL = [{"type": "VCPU", "value": "0.25"}, {"type": "MEMORY", "value": "512"}]
LOOP = "while :; do sleep 0.05; done"


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    """A client of a container engine that has the base image."""
    docker = pytest.importorskip("docker", reason="docker is not installed: no containers")
    from cloudexec.testing._aws.containers import engine_answers

    if not engine_answers():
        pytest.skip("no container engine answers here (see DOCKER_HOST)")
    client = docker.from_env()
    try:
        client.images.get(BASE)
    except docker.errors.ImageNotFound:
        client.close()
        pytest.skip(f"no base image {BASE} here (name another in CLOUDEXEC_TEST_BASE)")
    yield client
    client.close()


def test_a_container_that_ends_meanwhile_is_removed_all_the_same(engine: Any) -> None:
    """Podman refuses what is just ending: "container state improper"; only for a moment."""
    import docker.errors

    from cloudexec.testing._aws.containers import remove_container

    container = engine.containers.create(BASE, command=["true"])
    remove = container.remove
    asked = 0

    def refused_once(**options: Any) -> None:
        nonlocal asked
        asked += 1
        if asked == 1:
            raise docker.errors.APIError("container state improper: stopped")
        remove(**options)

    container.remove = refused_once
    remove_container(container)
    with pytest.raises(docker.errors.NotFound):
        engine.containers.get(container.id)
    remove_container(container)  # gone: so be it


@pytest.fixture
def containers(engine: Any) -> FakeAWS:
    """Not entered yet."""
    images = {"worker:*": BASE}
    return FakeAWS(mode="container", grace=1.0, calls_per_second=1000.0, images=images)


@pytest.fixture
def account(containers: FakeAWS) -> Iterator[Account]:
    with containers as aws:
        account = Account(aws)
        yield account
        account.close()


def test_job_runs_in_a_container(account: Account) -> None:
    """With Batch's variables, a stream of its own, and this machine within reach."""
    assert account.aws.mode == "container"
    assert account.aws.environment["CLOUDEXEC_ADVERTISE"] != "127.0.0.1"
    script = (
        "echo $AWS_BATCH_JOB_ID; cat /proc/1/comm; python3 -c 'import os,urllib.request as u; "
        'u.urlopen(os.environ["ECS_CONTAINER_METADATA_URI_V4"]); print("reached")\'; exit 3'
    )
    job_id = account.submit(script)
    job = account.ended(job_id, timeout=30)
    assert job.exit_code == 3
    assert account.aws.logs(job_id) == [job_id, "sh", "reached"]


def test_the_engine_is_not_asked_to_wait_for_a_container_that_runs(
    account: Account, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Podman 4 takes half a processor while it is."""
    import requests

    asked: list[str] = []
    send = requests.Session.send

    def noted(session: Any, request: Any, **options: Any) -> Any:
        asked.append(request.path_url.partition("?")[0].rpartition("/")[2])
        return send(session, request, **options)

    monkeypatch.setattr(requests.Session, "send", noted)
    job_id = account.submit(f"trap 'exit 5' TERM; echo up; {LOOP}")
    account.prints(job_id, "up")
    assert "logs" in asked
    assert "wait" not in asked
    account.batch.terminate_job(jobId=job_id, reason="enough")
    assert account.ended(job_id, timeout=30).exit_code == 5
    assert asked.count("wait") == 1


@pytest.mark.parametrize(("user", "uid"), [("", "0"), ("12345", "12345")])
def test_container_has_the_user_of_its_definition(account: Account, user: str, uid: str) -> None:
    """The image's where it names none; here that is root."""
    definition = account.define("id -u", **({"user": user} if user else {}))
    job_id = account.submit(jobDefinition=definition)
    assert account.ended(job_id, timeout=30).exit_code == 0
    assert account.aws.logs(job_id) == [uid]


def test_container_is_told_before_it_is_killed(account: Account) -> None:
    polite = account.submit(f"trap 'echo told; exit 143' TERM; echo up; {LOOP}")
    stubborn = account.submit(f"trap '' TERM; echo up; {LOOP}")
    for job_id in (polite, stubborn):
        account.prints(job_id, "up")
        account.batch.terminate_job(jobId=job_id, reason="enough")
    assert account.ended(polite, timeout=30).exit_code == 143
    assert "told" in account.aws.logs(polite)
    job = account.ended(stubborn, timeout=30)
    assert job.exit_code == 137
    assert job.attempts[0].reason is None


def test_container_that_outgrows_its_memory_is_killed(account: Account) -> None:
    definition = account.define(
        command=["python3", "-c", "x = bytearray(700 << 20)"], resourceRequirements=SMALL
    )
    job = account.ended(account.submit(jobDefinition=definition), timeout=30)
    assert job.exit_code == 137
    assert (job.attempts[0].reason or "").startswith("OutOfMemoryError")


def test_image_that_the_engine_does_not_have_cannot_be_pulled(account: Account) -> None:
    definition = account.define("exit 0", image="nowhere.invalid/worker:1")
    job = account.ended(account.submit(jobDefinition=definition), timeout=30)
    assert (job.status_reason or "").startswith("CannotPullContainerError")
    assert job.attempts[0].reason is None


def test_leaving_removes_containers(containers: FakeAWS, engine: Any) -> None:
    with containers as aws:
        account = Account(aws)
        job_id = account.submit(f"trap '' TERM; echo up; {LOOP}", arrayProperties={"size": 2})
        for index in range(2):
            account.prints(f"{job_id}:{index}", "up")
        account.close()
    left = engine.api.containers(all=True, filters={"label": "cloudexec.fake-aws"})
    assert not [entry for entry in left if job_id in str(entry["Names"])]


class Registry(http.server.BaseHTTPRequestHandler):
    """The two answers of a registry that ECR's face needs."""

    manifests: ClassVar[dict[str, Any]] = {}

    def do_GET(self) -> None:
        found = self.manifests.get(self.path)
        self.send_response(404 if found is None else 200)
        self.send_header("Docker-Content-Digest", "sha256:" + "a" * 64)
        self.send_header("Content-Type", "application/vnd.oci.image.manifest.v1+json")
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass


def test_what_is_pushed_to_the_registry_appears_in_ecr() -> None:
    """Once: an image that has been deleted through ECR stays so."""
    Registry.manifests = {
        "/v2/mine/tags/list": {"tags": ["one"]},
        "/v2/mine/manifests/one": {"schemaVersion": 2, "config": {}, "layers": []},
    }
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        address = f"127.0.0.1:{server.server_port}"
        with FakeAWS(registry=address) as aws:
            account = Account(aws)
            token = account.ecr.get_authorization_token()["authorizationData"][0]
            assert token["proxyEndpoint"] == f"http://{address}"
            account.ecr.create_repository(repositoryName="mine")
            found = account.ecr.describe_images(repositoryName="mine")["imageDetails"]
            assert [image["imageTags"] for image in found] == [["one"]]
            assert found[0]["imageDigest"] == "sha256:" + "a" * 64
            account.ecr.batch_delete_image(repositoryName="mine", imageIds=[{"imageTag": "one"}])
            assert account.ecr.describe_images(repositoryName="mine")["imageDetails"] == []
            account.close()
        server.shutdown()
        thread.join()


def test_a_registry_that_is_down_is_named_at_once() -> None:
    """An error of the server would be tried again for a while, and name nothing."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    with FakeAWS(registry=address) as aws:
        account = Account(aws)
        with pytest.raises(ClientError, match=f"does not answer at {address}") as caught:
            account.ecr.get_authorization_token()
        assert caught.value.response["ResponseMetadata"]["RetryAttempts"] == 0
        account.close()
