"""Packages get into a repository as an image, once for each content: with a real registry."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from environment_helpers import (
    PYTHON,
    Client,
    configuration,
    contents,
    make_base,
    make_project,
    make_wheel,
)

from cloudexec import ConfigError
from cloudexec._aws.image_contents import own_version
from cloudexec._environment.assembly import Pushed
from cloudexec._environment.cache import Cache
from cloudexec._environment.registry import Repository

SITE = f"opt/worker/lib/python{PYTHON}/site-packages"
Pushing = Callable[..., Pushed]


def layers_of(repository: Repository, pushed: Pushed) -> list[str]:
    """Return the digests of an image's layers."""
    found = repository.manifest(pushed.tag)
    assert found is not None
    return [each["digest"] for each in found.data["layers"]]


@pytest.mark.parametrize("machine", ["amd64", "arm64"])
def test_image_has_base_environment_packages_and_cloudexec(
    client: Client, repository: Repository, push: Pushing, machine: str
) -> None:
    """For each platform, from any machine: what a worker needs to start."""
    make_wheel(client.wheels, "thing", "4.0")
    client.install("thing")
    pushed = push(machine)
    files = contents(repository, pushed.uri.partition("@")[2])
    assert files[f"{SITE}/thing.py"] == b"VERSION = '4.0'\n"
    assert f"{SITE}/thing-4.0.dist-info/METADATA" in files
    assert f"{SITE}/cloudexec/worker/__main__.py" in files
    assert f"{SITE}/cloudpickle.py" in files
    assert files["opt/worker/bin/python"] == f"/usr/local/bin/python{PYTHON}".encode()
    assert files["opt/worker/pyvenv.cfg"].startswith(b"home = /usr/local/bin\n")
    assert files["etc/passwd"].decode().splitlines()[0].startswith("root:")
    assert "worker:x:10001:10001:" in files["etc/passwd"].decode()
    elf = {"amd64": b"\x3e\x00", "arm64": b"\xb7\x00"}[machine]
    assert files["opt/worker/bin/dumb-init"][18:20] == elf
    cache_tag = sys.implementation.cache_tag
    assert f"usr/local/lib/python{PYTHON}/__pycache__/lonely.{cache_tag}.pyc" in files
    assert not any("unwanted" in path and path.endswith(".pyc") for path in files)
    config = configuration(repository, pushed.tag)
    assert (config["os"], config["architecture"]) == ("linux", machine)
    inner = config["config"]
    assert inner["User"] == "10001:10001"
    assert inner["Entrypoint"][-2:] == ["-m", "cloudexec.worker"]
    assert "Cmd" not in inner
    assert "LANG=C.UTF-8" in inner["Env"]
    assert "PATH=/opt/worker/bin:/usr/local/bin:/usr/bin:/bin" in inner["Env"]
    assert inner["Labels"]["cloudexec.python"] == PYTHON
    assert pushed.tag.startswith(f"{own_version()}-py{PYTHON}-{machine}-")
    assert len(config["rootfs"]["diff_ids"]) == len(layers_of(repository, pushed))


def test_unchanged_environment_is_checked_in_two_seconds_and_not_sent(
    client: Client, push: Pushing
) -> None:
    """The second start asks the registry whether the image is still there."""
    for number in range(100):
        make_wheel(client.wheels, f"thing{number}")
    client.install(*(f"thing{number}" for number in range(100)))
    first = push()
    assert first.was_pushed
    said: list[str] = []
    before = time.process_time()
    second = push(said=said)
    assert time.process_time() - before < 2
    assert (second.uri, second.tag) == (first.uri, first.tag)
    assert (second.sent_layers, second.was_pushed) == (0, False)
    assert said == []


def test_edit_in_a_project_sends_its_layer_alone(
    client: Client, repository: Repository, push: Pushing, tmp_path: Path
) -> None:
    """And the layer comes last, so that all below stays."""
    source = make_project(tmp_path / "mine", "mine", {"src/mine/__init__.py": "A = 1\n"})
    make_wheel(client.wheels, "thing")
    client.install("thing", "-e", str(source))
    first = push()
    (source / "src" / "mine" / "__init__.py").write_text("A = 2\n")
    second = push()
    assert second.sent_layers == 1
    assert layers_of(repository, first)[:-1] == layers_of(repository, second)[:-1]
    files = contents(repository, second.tag)
    assert files[f"{SITE}/mine/__init__.py"] == b"A = 2\n"


def test_changed_package_sends_one_layer(client: Client, push: Pushing) -> None:
    """Whatever else is installed."""
    for name in ("one", "two", "three"):
        make_wheel(client.wheels, name)
    client.install("one", "two", "three")
    push()
    make_wheel(client.wheels, "two", "2.0")
    client.install("--upgrade", "two")
    assert push().sent_layers == 1


def test_another_machine_of_the_account_sends_nothing(
    client: Client, push: Pushing, tmp_path: Path
) -> None:
    """It finds the base and the image that the first one has pushed, and copies no base."""
    make_wheel(client.wheels, "thing")
    client.install("thing")
    said: list[str] = []
    first = push(said=said)
    assert any("copying the base image" in line for line in said)
    said.clear()
    second = push(said=said, cache=Cache(tmp_path / "another machine"))
    assert second.uri == first.uri
    assert not second.was_pushed
    assert not any("copying the base image" in line for line in said)


def test_image_that_was_deleted_is_pushed_again(
    client: Client, address: str, push: Pushing, tmp_path: Path
) -> None:
    """Its layers are packed again, as they are not kept here, and come out the same."""
    make_wheel(client.wheels, "thing")
    client.install("thing")
    first = push()
    with Repository(address, "elsewhere") as other:
        from cloudexec._environment.assembly import push_packages
        from cloudexec._environment.packages import Packages

        again = push_packages(
            Packages(base=f"{address}/python:amd64", wheelhouse=client.wheels),
            other,
            python=PYTHON,
            platform="linux/amd64",
            report=lambda line: None,
            cache=Cache(tmp_path / "cache"),
            inventory=client.inventory(),
        )
    assert again.was_pushed
    assert again.uri.partition("@")[2] == first.uri.partition("@")[2]


def test_refresh_copies_what_the_base_is_now(
    client: Client, address: str, repository: Repository, push: Pushing
) -> None:
    """A tag such as 3.11-slim moves; who wants the newer one says so."""
    with Repository(address, "moving") as bases:
        make_base(bases, "latest", "amd64", files={"etc/version": b"1"})
        first = push(base=f"{address}/moving")
        make_base(bases, "latest", "amd64", files={"etc/version": b"2"})
        assert push(base=f"{address}/moving").uri == first.uri
        fresh = push(base=f"{address}/moving", refresh=True)
    assert contents(repository, fresh.tag)["etc/version"] == b"2"


def test_refresh_takes_newer_versions_of_what_is_not_pinned(
    client: Client,
    repository: Repository,
    push: Pushing,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without it, the same file stands for what it stood for before, if it is not the wheelhouse
    that has changed."""
    for tool in ("UV", "PIP"):
        monkeypatch.setenv(f"{tool}_FIND_LINKS", str(client.wheels))
        monkeypatch.setenv(f"{tool}_NO_INDEX", "1")
    file = tmp_path / "requirements.txt"
    file.write_text("thing\n")
    versions = []
    for number, refresh in ((1, False), (2, False), (2, True)):
        make_wheel(client.wheels, "thing", f"{number}.0")
        files = contents(repository, push(source=file, refresh=refresh, wheelhouse=None).tag)
        versions.append(files[f"{SITE}/thing.py"].decode())
    assert versions == ["VERSION = '1.0'\n", "VERSION = '1.0'\n", "VERSION = '2.0'\n"]


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        ({"python": "3.5"}, rf"has no Python {PYTHON} in its PATH"),
        (
            {"files": {"var/lib/dpkg/status": b"", "lib/ld-musl-x86_64.so.1": b""}},
            "musl as its C library",
        ),
    ],
)
def test_image_that_cannot_be_a_base_is_refused(
    address: str, push: Pushing, base: dict[str, Any], reason: str
) -> None:
    """With what is wrong, and which one would do."""
    with Repository(address, "unfit") as bases:
        make_base(bases, "latest", "amd64", **base)
    with pytest.raises(ConfigError, match=reason):
        push(base=f"{address}/unfit")


def test_wheelhouse_may_be_given_as_text(client: Client, push: Pushing) -> None:
    """As other paths."""
    make_wheel(client.wheels, "thing")
    pushed = push(source="none", extra=["thing"], wheelhouse=str(client.wheels))
    assert pushed.was_pushed


def test_base_for_another_platform_is_refused(address: str, push: Pushing) -> None:
    """It would not start."""
    with pytest.raises(ConfigError, match="is for linux/amd64, and not for linux/arm64"):
        push("arm64", base=f"{address}/python:amd64")


def test_base_that_is_not_there_is_named(address: str, push: Pushing) -> None:
    """As it was given."""
    with pytest.raises(ConfigError, match=f"there is no base image {address}/python:absent"):
        push(base=f"{address}/python:absent")


def test_base_of_many_platforms_is_one_of_them(
    address: str, repository: Repository, push: Pushing
) -> None:
    """An index lists them."""
    with Repository(address, "python") as bases:
        listed = []
        for machine in ("amd64", "arm64"):
            found = bases.manifest(machine)
            assert found is not None
            size = len(json.dumps(found.data))
            platform = {"os": "linux", "architecture": machine}
            listed.append(
                {
                    "mediaType": found.media_type,
                    "digest": found.digest,
                    "size": size,
                    "platform": platform,
                }
            )
        kind = "application/vnd.oci.image.index.v1+json"
        index = {"schemaVersion": 2, "mediaType": kind, "manifests": listed}
        bases.push_manifest("both", json.dumps(index).encode(), kind)
    pushed = push("arm64", base=f"{address}/python:both")
    assert configuration(repository, pushed.tag)["architecture"] == "arm64"


def test_only_what_a_worker_needs(client: Client, repository: Repository, push: Pushing) -> None:
    """What is installed stays here, if nothing of it is wanted."""
    make_wheel(client.wheels, "thing")
    client.install("thing")
    files = contents(repository, push(source="none").tag)
    assert f"{SITE}/cloudpickle.py" in files
    assert f"{SITE}/thing.py" not in files
