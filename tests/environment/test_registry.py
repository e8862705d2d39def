"""Images are read and written over the registry's HTTP API alone."""

from __future__ import annotations

import base64
import contextlib
import functools
import http.server
import json
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import urllib3
from environment_helpers import contents, digest_of, make_base, push_image
from local_registry import PASSWORD, PASSWORD_HASH, serving

from cloudexec import ConfigError, LaunchError
from cloudexec._environment import docker_login
from cloudexec._environment import registry as module
from cloudexec._environment.base import MANIFEST_TYPE
from cloudexec._environment.docker_login import Login, find_login
from cloudexec._environment.registry import Repository, parse_reference


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits between two tries."""
    monkeypatch.setattr(module, "_pause", lambda attempt: 0.0)


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry that wants a password: its address."""
    with serving(tmp_path_factory.mktemp("locked"), users=f"AWS:{PASSWORD_HASH}\n") as found:
        yield found


@pytest.mark.parametrize(
    ("text", "host", "name", "tag"),
    [
        ("python:3.11-slim", "docker.io", "library/python", "3.11-slim"),
        ("someone/thing", "docker.io", "someone/thing", "latest"),
        ("localhost:5000/a/b:c", "localhost:5000", "a/b", "c"),
        (f"public.ecr.aws/x/y@sha256:{'a' * 64}", "public.ecr.aws", "x/y", f"sha256:{'a' * 64}"),
    ],
)
def test_names_are_read_as_engines_read_them(text: str, host: str, name: str, tag: str) -> None:
    """Docker Hub is what is meant where no host is named."""
    found = parse_reference(text)
    assert (found.host, found.name, found.tag) == (host, name, tag)


@pytest.mark.parametrize("text", ["", "Upper/case", "a b", "x@sha256:12", "x:tag with blanks"])
def test_what_cannot_be_a_name_is_refused(text: str) -> None:
    """With the text in the message."""
    with pytest.raises(ConfigError, match="is not the name of an image"):
        parse_reference(text)


def test_image_comes_back_as_it_was_pushed(locked: str) -> None:
    """With a password, as Amazon ECR wants one."""
    with Repository(locked, "some/where", {"username": "AWS", "password": PASSWORD}) as repository:
        make_base(repository, "first", "amd64")
        found = repository.manifest("first")
        assert found is not None
        assert repository.manifest(found.digest) == found
        assert "usr/local/bin/python" in "".join(contents(repository, "first"))
        assert repository.manifest("second") is None
        assert not repository.has_blob(digest_of(b"never pushed"))


def test_wrong_password_names_the_registry_and_not_the_password(locked: str) -> None:
    """And says what to look at."""
    with Repository(locked, "some", {"username": "AWS", "password": "wrong-one"}) as repository:
        with pytest.raises(
            LaunchError, match=f"{locked} refused to begin to push a layer"
        ) as caught:
            repository.push_blob(digest_of(b"x"), b"x")
    assert "UNAUTHORIZED" in str(caught.value)
    assert "wrong-one" not in str(caught.value)


def test_registry_that_does_not_answer_is_named() -> None:
    """After some tries."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        with Repository(f"127.0.0.1:{port}", "some") as repository:
            with pytest.raises(LaunchError, match=rf"127\.0\.0\.1:{port} cannot be reached"):
                repository.manifest("latest")


def test_blob_of_another_repository_is_mounted(locked: str) -> None:
    """Without sending it: the bytes here are not those."""
    credentials = {"username": "AWS", "password": PASSWORD}
    with (
        Repository(locked, "mount/from", credentials) as source,
        Repository(locked, "mount/into", credentials) as into,
    ):
        source.push_blob(digest_of(b"bytes"), b"bytes")
        into.push_blob(digest_of(b"bytes"), b"never sent", "mount/from")
        assert into.read_blob(digest_of(b"bytes")) == b"bytes"


def test_other_bytes_than_their_name_are_refused(locked: str) -> None:
    """The registry checks what it takes."""
    with Repository(locked, "some", {"username": "AWS", "password": PASSWORD}) as repository:
        with pytest.raises(LaunchError, match="DIGEST_INVALID"):
            repository.push_blob(digest_of(b"one"), b"another")


def test_closed_repository_makes_no_request(locked: str) -> None:
    """Who has been interrupted goes on with nothing."""
    repository = Repository(locked, "some")
    repository.close()
    with pytest.raises(LaunchError, match="stopped"):
        repository.manifest("latest")


@contextmanager
def server(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve HTTP on the loopback; yield the address."""
    serves = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=serves.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{serves.server_port}"
    finally:
        serves.shutdown()
        serves.server_close()
        thread.join()


class Answers(http.server.BaseHTTPRequestHandler):
    """Answers requests; a test says how."""

    protocol_version = "HTTP/1.1"

    def reply(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None: ...


def test_token_is_got_where_the_registry_wants_one() -> None:
    """As public registries do, for everybody."""
    asked: list[str] = []

    class Handler(Answers):
        def do_GET(self) -> None:
            if self.path.startswith("/token"):
                asked.append(self.path)
                self.reply(200, json.dumps({"token": "a-token"}).encode())
            elif self.headers.get("Authorization") == "Bearer a-token":
                self.reply(200, b'{"schemaVersion": 2}', Content_Type=MANIFEST_TYPE)
            else:
                realm = f"http://{self.headers['Host']}/token"
                challenge = f'Bearer realm="{realm}",service="here",scope="repository:a/b:pull"'
                self.reply(401, WWW_Authenticate=challenge)

    with server(Handler) as address, Repository(address, "a/b") as repository:
        assert repository.manifest("latest") is not None
        assert repository.manifest("latest") is not None
    assert asked == ["/token?service=here&scope=repository%3Aa%2Fb%3Apull"]


def test_errors_that_pass_are_waited_for() -> None:
    """A registry that has too much to do says so."""
    statuses = iter([503, 429, 200])

    class Handler(Answers):
        def do_GET(self) -> None:
            self.reply(next(statuses), b'{"schemaVersion": 2}', Content_Type=MANIFEST_TYPE)

    with server(Handler) as address, Repository(address, "a") as repository:
        assert repository.manifest("latest") is not None


def test_registry_that_limits_reads_says_how_long_to_wait() -> None:
    """What it says is done; if it is too long, the error says what else can be done."""
    asked: list[float] = []
    waits = ["1", "3600"]

    class Handler(Answers):
        def do_GET(self) -> None:
            asked.append(time.monotonic())
            self.reply(429, Retry_After=waits[len(asked) - 1])

    with server(Handler) as address, Repository(address, "a") as repository:
        with pytest.raises(LaunchError, match=r"refused to look for latest .*429.*another regist"):
            repository.manifest("latest")
    first, second = asked
    assert second - first >= 1.0


@pytest.mark.parametrize(("waits", "uploads"), [(["1", "0", "201"], 3), (["1", "3600"], 2)])
def test_registry_that_limits_uploads_says_how_long_to_wait(waits: list[str], uploads: int) -> None:
    """What it says is done; if it is too long, the error says that, and nothing about reading."""
    asked: list[float] = []

    class Handler(Answers):
        def do_POST(self) -> None:
            self.reply(202, Location="/upload")

        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(time.monotonic())
            wait = waits[len(asked) - 1]
            if wait == "201":
                self.reply(201)
            else:
                self.reply(429, Retry_After=wait)

    with server(Handler) as address, Repository(address, "a") as repository:
        if waits[-1] == "201":
            repository.push_blob(digest_of(b"bytes"), b"bytes")
        else:
            with pytest.raises(LaunchError, match=r"push a layer .*429.* is sent to it: wait"):
                repository.push_blob(digest_of(b"bytes"), b"bytes")
    assert len(asked) == uploads
    assert asked[1] - asked[0] >= 1.0


@pytest.mark.parametrize("status", [429, 503])
def test_token_server_that_is_busy_is_named(status: int) -> None:
    """It is asked again first; nobody has to sign in."""
    asked: list[str] = []

    class Handler(Answers):
        def do_GET(self) -> None:
            if self.path.startswith("/token"):
                asked.append(self.path)
                self.reply(status)
            else:
                realm = f"http://{self.headers['Host']}/token"
                self.reply(401, WWW_Authenticate=f'Bearer realm="{realm}"')

    with server(Handler) as address, Repository(address, "a") as repository:
        with pytest.raises(
            LaunchError, match=rf"tokens from {address}, .*{status}.*Wait"
        ) as caught:
            repository.manifest("latest")
    assert "docker login" not in str(caught.value)
    assert len(asked) == module._ATTEMPTS


def test_token_that_cannot_be_got_names_where() -> None:
    """Its server may be another one."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        realm = f"127.0.0.1:{probe.getsockname()[1]}"

        class Handler(Answers):
            def do_GET(self) -> None:
                self.reply(401, WWW_Authenticate=f'Bearer realm="http://{realm}/token"')

        with server(Handler) as address, Repository(address, "a") as repository:
            with pytest.raises(LaunchError, match=f"cannot be reached to sign in at {realm}"):
                repository.manifest("latest")


@pytest.mark.parametrize("what", ["manifest", "blob", "layer", "token"])
@pytest.mark.parametrize("times", [2, 100])
def test_answer_that_was_cut_short_is_read_again(tmp_path: Path, what: str, times: int) -> None:
    """If it never comes whole, the error says what was to be read."""
    content = {
        "manifest": b'{"schemaVersion": 2}',
        "token": b'{"token": "a-token"}',
    }.get(what, b"bytes")
    asked: list[str] = []

    class Handler(Answers):
        def do_GET(self) -> None:
            if what == "token" and not self.path.startswith("/token"):
                if self.headers.get("Authorization") == "Bearer a-token":
                    self.reply(200, b'{"schemaVersion": 2}')
                    return
                realm = f"http://{self.headers['Host']}/token"
                self.reply(401, WWW_Authenticate=f'Bearer realm="{realm}"')
                return
            asked.append(self.path)
            if len(asked) > times:
                self.reply(200, content)
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:-1])
            self.close_connection = True

    def read(repository: Repository) -> None:
        if what == "blob":
            assert repository.read_blob(digest_of(content)) == content
        elif what == "layer":
            repository.save_blob(digest_of(content), tmp_path / "layer")
            assert (tmp_path / "layer").read_bytes() == content
        else:
            assert repository.manifest("latest") is not None

    with server(Handler) as address, Repository(address, "a") as repository:
        if times == 2:
            read(repository)
        else:
            with pytest.raises(LaunchError, match=f"registry {address} broke while it was to"):
                read(repository)


def test_password_of_a_proxy_is_sent_to_it_and_in_no_message(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As it is in the address, where what has a meaning there is escaped."""
    seen: list[str | None] = []

    class Proxy(Answers):
        def do_CONNECT(self) -> None:
            seen.append(self.headers.get("Proxy-Authorization"))
            self.reply(502)

    with server(Proxy) as address:
        monkeypatch.setenv("https_proxy", f"http://user:hun%40ter2@{address}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        with Repository("registry.invalid", "a") as repository:
            with pytest.raises(LaunchError, match=r"registry\.invalid cannot be reached") as caught:
                repository.manifest("latest")
    assert set(seen) == {f"Basic {base64.b64encode(b'user:hun@ter2').decode()}"}
    assert "ter2" not in "".join(traceback.format_exception(caught.value))


def test_upload_that_broke_is_begun_again(tmp_path: Path) -> None:
    """From the first byte, at the place that the registry then names."""
    received: list[bytes] = []
    begun: list[int] = []

    class Handler(Answers):
        def do_POST(self) -> None:
            begun.append(1)
            self.reply(202, Location=f"/upload/{len(begun)}?state=x")

        def do_PUT(self) -> None:
            size = int(self.headers["Content-Length"])
            if len(begun) == 1:
                self.rfile.read(size // 2)
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            elif len(begun) == 2:
                self.rfile.read(size)
                self.reply(404)
            else:
                received.append(self.path.encode() + self.rfile.read(size))
                self.reply(201)

    content = bytes(range(256)) * 4096
    (tmp_path / "layer").write_bytes(content)
    with server(Handler) as address, Repository(address, "a") as repository:
        repository.push_blob(digest_of(content), tmp_path / "layer")
    (one,) = received
    assert one.startswith(b"/upload/3?state=x&digest=sha256%3A")
    assert one.endswith(content)


class Uploads(Answers):
    """Reads the first part of an upload, and the rest once the test says so."""

    begun: list[int]
    is_reading: threading.Event
    may_go_on: threading.Event
    received: list[int]

    def do_POST(self) -> None:
        self.begun.append(1)
        self.reply(202, Location="/upload/1")

    def do_PUT(self) -> None:
        self.rfile.read(1)
        self.is_reading.set()
        self.may_go_on.wait(60)
        with contextlib.suppress(OSError):
            for _ in range(int(self.headers["Content-Length"]) // 2**16):
                self.received.append(len(self.rfile.read(2**16)))
            self.reply(201)


@pytest.fixture
def uploads(tmp_path: Path) -> Iterator[tuple[type[Uploads], str, str, Path]]:
    """A registry that can be stopped, its address, and a large layer."""

    class Handler(Uploads): ...

    Handler.begun, Handler.received = [], []
    Handler.is_reading, Handler.may_go_on = threading.Event(), threading.Event()
    # More than sockets hold.
    content = bytes(64 * 2**20 + 1)
    (tmp_path / "layer").write_bytes(content)
    with server(Handler) as address:
        yield Handler, address, digest_of(content), tmp_path / "layer"
        Handler.may_go_on.set()


def test_upload_outlasts_a_connection_that_stalls(
    uploads: tuple[type[Uploads], str, str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For longer than it takes to find out that a server is not there."""
    monkeypatch.setattr(module, "_TIMEOUT", urllib3.Timeout(connect=1.0, read=60.0))
    handler, address, digest, path = uploads
    with Repository(address, "a") as repository, ThreadPoolExecutor(1) as pool:
        pushed = pool.submit(repository.push_blob, digest, path)
        assert handler.is_reading.wait(60)
        with pytest.raises(FutureTimeoutError):
            pushed.result(timeout=2.0)
        handler.may_go_on.set()
        pushed.result(timeout=60)
    assert handler.begun == [1]


def test_upload_ends_when_the_repository_is_closed(
    uploads: tuple[type[Uploads], str, str, Path],
) -> None:
    """Who has been interrupted does not send the rest of a layer, which may be gigabytes."""
    handler, address, digest, path = uploads
    with Repository(address, "a") as repository, ThreadPoolExecutor(1) as pool:
        pushed = pool.submit(repository.push_blob, digest, path)
        assert handler.is_reading.wait(60)
        repository.close()
        handler.may_go_on.set()
        with pytest.raises(LaunchError, match="stopped while it was to push a layer"):
            pushed.result(timeout=60)
    assert sum(handler.received) < path.stat().st_size / 2


@pytest.mark.parametrize("same", [True, False])
def test_tag_that_must_not_change_is_right_if_it_has_the_image(same: bool) -> None:
    """Amazon ECR refuses a second push where tags are immutable; another image is an error."""
    content = b'{"schemaVersion": 2}'

    class Handler(Answers):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            said = {"errors": [{"code": "TAG_INVALID", "message": "The image tag already exists"}]}
            self.reply(400, json.dumps(said).encode())

        def do_GET(self) -> None:
            self.reply(200, content if same else b"{}", Content_Type=MANIFEST_TYPE)

    with server(Handler) as address, Repository(address, "a") as repository:
        if same:
            assert repository.push_manifest("tag", content, MANIFEST_TYPE) == digest_of(content)
        else:
            with pytest.raises(LaunchError, match="TAG_INVALID: The image tag already exists"):
                repository.push_manifest("tag", content, MANIFEST_TYPE)


def test_password_is_not_sent_to_where_a_layer_really_is() -> None:
    """Registries redirect readers to a store, which has nothing to do with it."""
    seen: list[str | None] = []

    class Store(Answers):
        def do_GET(self) -> None:
            seen.append(self.headers.get("Authorization"))
            self.reply(200, b"bytes")

    class Handler(Answers):
        store = ""

        def do_GET(self) -> None:
            self.reply(307, Location=f"http://localhost:{self.store.rpartition(':')[2]}/blob")

    with server(Store) as store:
        Handler.store = store
        credentials = {"username": "AWS", "password": "x"}
        with server(Handler) as address, Repository(address, "a", credentials) as repository:
            assert repository.read_blob(digest_of(b"bytes")) == b"bytes"
    assert seen == [None]


def test_login_of_docker_is_used(
    locked: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base image may be in a private registry."""
    login = base64.b64encode(f"AWS:{PASSWORD}".encode()).decode()
    (tmp_path / "config.json").write_text(json.dumps({"auths": {locked: {"auth": login}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with Repository(locked, "by/login") as repository:
        assert push_image(repository, "latest", {"os": "linux"}, [b"layer"]).startswith("sha256:")


SCRIPT = """#!/bin/sh
read registry
echo "$1 $registry" >> {folder}/asked
{then}
"""


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes Docker's configuration, and a credential helper ``own`` that does something."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)

    def write(then: str | None, **config: Any) -> Path:
        (tmp_path / "bin").mkdir()
        if then is not None:
            helper = tmp_path / "bin" / "docker-credential-own"
            helper.write_text(SCRIPT.format(folder=tmp_path, then=then))
            helper.chmod(0o755)
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path / "asked"

    return write


def printed(username: str, secret: str) -> str:
    """Return a command that prints a login as helpers do."""
    return f"echo '{json.dumps({'ServerURL': 'x', 'Username': username, 'Secret': secret})}'"


@pytest.mark.parametrize("is_of_all", [True, False])
def test_credential_helper_of_docker_is_asked(
    locked: str, configured: Callable[..., Path], is_of_all: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """That of the registry before that of all of them; its password is in no log."""
    caplog.set_level(0)
    then = printed("AWS", PASSWORD)
    helpers = {"credsStore": "own"} if is_of_all else {"credHelpers": {locked: "own"}}
    others = {} if is_of_all else {"credsStore": "absent"}
    asked = configured(then, auths={locked: {}}, **helpers, **others)
    with Repository(locked, "by/helper") as repository:
        assert push_image(repository, "latest", {"os": "linux"}, [b"layer"]).startswith("sha256:")
    assert asked.read_text() == f"get {locked}\n"
    assert PASSWORD not in caplog.text


def test_docker_hub_has_the_name_that_docker_gives_it(configured: Callable[..., Path]) -> None:
    """Helpers know it under an address."""
    asked = configured(printed("me", "hunter2"), credsStore="own")
    assert find_login("docker.io") == Login({"username": "me", "password": "hunter2"})
    assert asked.read_text() == "get https://index.docker.io/v1/\n"


def test_login_in_the_file_is_used_where_a_helper_has_none(
    locked: str, configured: Callable[..., Path]
) -> None:
    """As of a registry that was signed in to before there was a helper."""
    login = base64.b64encode(f"AWS:{PASSWORD}".encode()).decode()
    then = "echo credentials not found in native keychain; exit 1"
    configured(then, credsStore="own", auths={f"https://{locked}": {"auth": login}})
    assert find_login(locked).credentials == {"username": "AWS", "password": PASSWORD}


@pytest.mark.parametrize(
    ("then", "helper", "said"),
    [
        (None, "own", "no program docker-credential-own in PATH: install it"),
        (None, "../own", r"no program docker-credential-\.\./own in PATH"),
        ("echo hunter2; echo hunter2 >&2; exit 3", "own", "ended with code 3: `echo .* shows"),
        ("echo hunter2", "own", "printed no user name and secret"),
        ("echo '[\"hunter2\"]'", "own", "printed no user name and secret"),
        (printed("<token>", "hunter2"), "own", "identity token"),
    ],
)
def test_credential_helper_that_fails_is_named_where_a_login_is_needed(
    locked: str, configured: Callable[..., Path], then: str | None, helper: str, said: str
) -> None:
    """With the file that names it, and without what it printed."""
    configured(then, credHelpers={locked: helper})
    with Repository(locked, "some") as repository:
        with pytest.raises(
            ConfigError, match=rf"{locked} refused .*config\.json names .*'{helper}'.*{said}"
        ) as caught:
            repository.manifest("latest")
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


def test_public_registry_is_read_without_asking_a_credential_helper(
    configured: Callable[..., Path],
) -> None:
    """It might ask the user, or be gone, as on a machine where Docker Desktop was."""
    asked = configured(printed("me", "hunter2"), credsStore="own")

    class Handler(Answers):
        def do_GET(self) -> None:
            self.reply(200, b'{"schemaVersion": 2}', Content_Type=MANIFEST_TYPE)

    with server(Handler) as address, Repository(address, "a") as repository:
        assert repository.manifest("latest") is not None
    assert not asked.exists()


def test_what_is_not_there_is_said_before_a_credential_helper_that_fails(
    configured: Callable[..., Path],
) -> None:
    """The registry has let everybody in, so the login is not why."""
    configured("exit 3", credsStore="own")

    class Handler(Answers):
        def do_GET(self) -> None:
            if self.path.startswith("/token"):
                self.reply(200, json.dumps({"token": "for all"}).encode())
            elif "Authorization" in self.headers:
                self.reply(404)
            else:
                realm = f"http://{self.headers['Host']}/token"
                self.reply(401, WWW_Authenticate=f'Bearer realm="{realm}"')

    with server(Handler) as address, Repository(address, "a") as repository:
        with pytest.raises(
            LaunchError, match=r"no such repository or image, or it is shown only .*with code 3"
        ):
            repository.read_blob(digest_of(b""))


def test_credential_helper_that_does_not_answer_is_ended(
    configured: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may wait for a user who is not there."""
    monkeypatch.setattr(docker_login, "_LONGEST", 0.2)
    configured("exec sleep 600", credsStore="own")
    assert "did not answer within" in find_login("example.com").problem


def test_threads_may_push_at_once(locked: str) -> None:
    """As many layers are."""
    with Repository(locked, "many", {"username": "AWS", "password": PASSWORD}) as repository:
        blobs = [bytes([number]) * 10_000 for number in range(20)]
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda blob: repository.push_blob(digest_of(blob), blob), blobs))
        assert all(map(functools.partial(Repository.has_blob, repository), map(digest_of, blobs)))
