"""``cloudexec image`` on the command line."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from cloudexec._aws.image_contents import ImageSpec
from cloudexec._aws.images import Engine
from cloudexec._aws.profile import Profile
from cloudexec.cli.image import image_command

pytestmark = pytest.mark.timeout(300)
REPOSITORY = "123456789012.dkr.ecr.eu-central-1.amazonaws.com/cloudexec-default"


@pytest.fixture(autouse=True)
def profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("CLOUDEXEC_PROFILE", raising=False)


def command(*arguments: str) -> Result:
    return CliRunner().invoke(image_command, list(arguments))


def like(spec: ImageSpec) -> list[str]:
    return ["--base", spec.base, "--wheelhouse", str(spec.wheelhouse)]


@pytest.fixture
def ecr(monkeypatch: pytest.MonkeyPatch, open_registry: str) -> Iterator[set[str]]:
    """An endpoint that answers two calls of ECR for a registry of ours; gives tags pushed."""
    tags: dict[str, str] = {}
    seen: set[str] = set()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or b"{}")
            operation = self.headers["X-Amz-Target"].rpartition(".")[2]
            seen.add(operation)
            answer: dict[str, Any]
            status = 200
            if operation == "GetAuthorizationToken":
                token = base64.b64encode(b"AWS:secret").decode()
                entry = {"authorizationToken": token, "proxyEndpoint": f"http://{open_registry}"}
                answer = {"authorizationData": [entry]}
            elif (tag := body["imageIds"][0]["imageTag"]) in tags:
                answer = {"imageDetails": [{"imageDigest": tags[tag]}]}
            else:
                status, answer = 400, {"__type": "ImageNotFoundException", "message": "no"}
                tags[tag] = "sha256:" + "7" * 64  # the next time, as if it had been pushed
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/x-amz-json-1.1")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    yield seen
    server.shutdown()
    server.server_close()
    thread.join()


def test_build_prints_the_name_and_nothing_else(engine: Engine, spec: ImageSpec) -> None:
    """Standard output is for programs; what was done goes to standard error."""
    first, second = command("build", *like(spec)), command("build", *like(spec))
    assert first.exit_code == second.exit_code == 0, first.output
    assert first.stdout == second.stdout
    assert engine.find(first.stdout.strip()) is not None
    assert "already built" in second.stderr


def test_verbose_build_shows_the_log(engine: Engine, spec: ImageSpec) -> None:
    """All that the engine says goes to standard error."""
    name = command("build", *like(spec)).stdout.strip()
    engine.client.images.remove(name, force=True)
    result = command("build", "-v", *like(spec))
    assert result.stdout.strip() == name
    assert "FROM " in result.stderr


def test_show_tells_what_would_be_built_and_what_is_used(engine: Engine, spec: ImageSpec) -> None:
    """Nothing is built or pulled for it."""
    Profile(name="default", region="eu-central-1", images={"3.11-linux/amd64": "uri@1"}).save()
    result = command("show", "--apt", "never-built", *like(spec))
    assert result.exit_code == 0
    assert "here      no" in result.stdout
    assert "cloudpickle==" in result.stdout
    assert "3.11-linux/amd64  uri@1" in result.stdout


def test_push_notes_the_image_in_the_profile(
    engine: Engine, spec: ImageSpec, ecr: set[str]
) -> None:
    """Through the SDK, with the token that the registry gave; the second time nothing is sent."""
    Profile(name="mine", region="eu-central-1", repository=REPOSITORY).save()
    first = command("push", "--profile", "mine", *like(spec))
    assert first.exit_code == 0, first.output
    assert "pushed as" in first.stderr
    uri = first.stdout.strip()
    assert "@sha256:" in uri
    assert Profile.load("mine").image(spec.python, spec.platform) == uri
    second = command("push", "--profile", "mine", *like(spec))
    assert "already pushed" in second.stderr
    assert ecr == {"GetAuthorizationToken", "DescribeImages"}


def test_push_without_a_profile_says_what_makes_one() -> None:
    """Before anything is built."""
    result = command("push")
    assert result.exit_code == 2
    assert "cloudexec up" in result.output


def test_no_engine_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has never used containers learns what to start."""
    pytest.importorskip("docker")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/engine.sock")
    result = command("build")
    assert result.exit_code == 2
    assert "no container engine answers at unix:///nowhere/engine.sock" in result.output
    assert "Docker" in result.output


def test_show_without_an_engine_still_shows_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the tag is not known."""
    pytest.importorskip("docker")
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/engine.sock")
    result = command("show")
    assert result.exit_code == 0
    assert "tag       not known" in result.output
    assert "there is no profile default" in result.output


@pytest.mark.parametrize(
    "arguments",
    [["--python", "3"], ["--platform", "linux/s390x"], ["-r", "/nowhere.txt"], ["--apt", "a b"]],
)
def test_wrong_options_end_with_code_2(arguments: list[str]) -> None:
    """Nothing is asked of an engine."""
    assert command("build", *arguments).exit_code == 2


def test_packages_that_are_named_by_nothing_are_refused() -> None:
    """As by a variable of the shell that is not set: no image without packages is meant."""
    Profile(name="default", region="eu-central-1", repository=REPOSITORY).save()
    result = command("push", "--packages", "")
    assert result.exit_code == 2
    assert "packages must be 'here', 'none' or the path of a file, not ''" in result.output
