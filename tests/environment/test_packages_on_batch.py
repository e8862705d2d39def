"""``Batch`` and ``cloudexec image push`` put packages into the repository without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from click.testing import CliRunner, Result
from environment_helpers import (
    PYTHON,
    Client,
    contents,
    library,
    make_wheel,
    worker_wheels,
)

from cloudexec import BatchExecutor, ConfigError, LaunchError
from cloudexec._environment import assembly
from cloudexec._environment.registry import Repository
from cloudexec.aws import Batch, Packages, Profile
from cloudexec.cli.image import image_command
from cloudexec.testing import FakeAWS

SITE = f"opt/worker/lib/python{PYTHON}/site-packages"
SECRET = "5a" * 32


@pytest.fixture
def aws(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """An emulated AWS, whose ECR is the registry."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("CLOUDEXEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/engine.sock")
    with FakeAWS(grace=2.0, calls_per_second=1000, registry=address) as fake:
        yield fake


@pytest.fixture
def profile(aws: Any, request: pytest.FixtureRequest) -> Profile:
    """A profile with a repository and without an image."""
    name = "".join(each if each.isalnum() else "-" for each in request.node.name).strip("-")
    setup = aws.set_up("ondemand", max_vcpus=8)
    secret = boto3.client("secretsmanager").create_secret(Name="key", SecretString=SECRET)
    made = boto3.client("ecr").create_repository(repositoryName=f"on-batch/{name}")
    profile = Profile(
        name="team",
        region=aws.region,
        queues={"fargate": setup.queue},
        job_role=setup.job_role,
        execution_role=setup.execution_role,
        key_secret=secret["ARN"],
        repository=made["repository"]["repositoryUri"],
    )
    profile.save()
    return profile


@pytest.fixture
def here(client: Client, monkeypatch: pytest.MonkeyPatch) -> Client:
    """An environment that stands for the one of this process."""
    worker_wheels(client.wheels)
    monkeypatch.setattr(assembly, "take_inventory", client.inventory)
    return client


def definitions(aws: Any) -> list[str]:
    """Return the images of job definitions that were registered."""
    found = [each for each in aws.requests if each.operation == "RegisterJobDefinition"]
    return [each.parameters["containerProperties"]["image"] for each in found]


def files_of(address: str, image: str) -> dict[str, bytes]:
    """Return the files of an image by its name, pinned by digest."""
    name, _, digest = image.partition("/")[2].partition("@")
    with Repository(address, name) as repository:
        return contents(repository, digest)


def test_batch_without_an_image_takes_the_packages_that_are_here(
    aws: Any, address: str, here: Client, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pushed before anything is launched, and named by digest; the second time nothing is sent."""
    monkeypatch.setattr(
        "cloudexec._environment.assembly.default_base", lambda python: f"{address}/python:amd64"
    )
    # The init alone is fetched: all else is installed.
    monkeypatch.setenv("UV_FIND_LINKS", str(here.wheels))
    monkeypatch.setenv("UV_NO_INDEX", "1")
    make_wheel(here.wheels, "thing", "7.1")
    here.install(
        "thing", *(each.partition("==")[0] for each in ("cloudpickle", "grpcio", "protobuf"))
    )
    for _ in range(2):
        with BatchExecutor(1, launcher=Batch(profile="team")) as executor:
            assert executor.submit(len, "abc").result(timeout=60) == 3
    (image,) = definitions(aws)
    assert "@sha256:" in image
    assert files_of(address, image)[f"{SITE}/thing.py"] == b"VERSION = '7.1'\n"


def test_package_without_a_wheel_fails_before_anything_is_launched(
    aws: Any, address: str, here: Client, profile: Profile
) -> None:
    """By name, at the first call."""
    make_wheel(
        here.wheels, "rare", files={"rare/_c.so": library("x86_64")}, tag="py3-none-linux_x86_64"
    )
    here.install("rare")
    packages = Packages(base=f"{address}/python:arm64", wheelhouse=here.wheels)
    executor = BatchExecutor(1, launcher=Batch(profile="team", arch="arm64", packages=packages))
    with pytest.raises(ConfigError, match=r"linux/arm64.*\n.*rare==1\.0"):
        executor.submit(len, "abc")
    executor.shutdown()
    assert not definitions(aws)
    assert not [each for each in aws.requests if each.operation == "SubmitJob"]


def test_named_packages_are_used_instead_of_the_profiles_image(
    aws: Any, address: str, here: Client, profile: Profile
) -> None:
    """The profile's image stays what it is, for those who name none."""
    profile.with_image(PYTHON, "linux/amd64", "example.com/worker:1").save()
    packages = Packages(source="none", base=f"{address}/python:amd64", wheelhouse=here.wheels)
    for given in (packages, None):
        with BatchExecutor(1, launcher=Batch(profile="team", packages=given)) as executor:
            executor.submit(len, "abc").result(timeout=60)
    first, second = definitions(aws)
    assert "@sha256:" in first
    assert second == "example.com/worker:1"


def test_base_that_cannot_be_read_says_which(aws: Any, here: Client, profile: Profile) -> None:
    """And that its registry does not answer."""
    packages = Packages(source="none", base="127.0.0.1:9/python", wheelhouse=here.wheels)
    executor = BatchExecutor(1, launcher=Batch(profile="team", packages=packages))
    with pytest.raises(LaunchError, match=r"registry 127\.0\.0\.1:9 cannot be reached"):
        executor.submit(len, "abc")
    executor.shutdown()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"packages": "here", "image": "some:1"}, "either packages or image"),
        ({"packages": "here", "definition": "some"}, "either packages or definition"),
        ({"packages": "nowhere.txt"}, "there is no file"),
        ({"packages": 7}, "not 7"),
    ],
)
def test_wrong_settings_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    """With what was given."""
    with pytest.raises(ConfigError, match=message):
        Batch(profile="team", **options)


@pytest.mark.parametrize("wheelhouse", ["", "nowhere", 7])
def test_wheelhouse_that_is_no_directory_is_refused(wheelhouse: Any) -> None:
    """With what was given."""
    with pytest.raises(ConfigError, match=f"wheelhouse .*{wheelhouse}"):
        Packages(wheelhouse=wheelhouse)


@pytest.mark.parametrize("name", ["Pipfile", "environment.yml"])
def test_file_of_another_tool_is_refused(tmp_path: Path, name: str) -> None:
    """With what other tools can write."""
    (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=r"requirements file \(\.txt\)"):
        Packages(source=tmp_path / name)


def command(*arguments: str) -> Result:
    """Run ``cloudexec image push`` for the profile."""
    return CliRunner().invoke(image_command, ["push", "--profile", "team", *arguments])


def test_image_push_needs_no_engine(
    aws: Any, address: str, here: Client, profile: Profile, tmp_path: Path
) -> None:
    """The profile then uses what was pushed; the second time nothing is."""
    make_wheel(here.wheels, "thing", "7.1")
    (tmp_path / "requirements.txt").write_text("thing\n")
    options = ["-r", str(tmp_path / "requirements.txt"), "--base", f"{address}/python:amd64"]
    options += ["--wheelhouse", str(here.wheels)]
    first = command(*options)
    assert first.exit_code == 0, first.output
    assert "no container engine answers here, but none is needed" in first.stderr
    uri = first.stdout.strip()
    assert Profile.load("team").image(PYTHON, "linux/amd64") == uri
    assert f"{SITE}/thing.py" in files_of(address, uri)
    second = command(*options)
    assert second.stdout == first.stdout
    assert "already pushed as" in second.stderr


def test_image_push_takes_the_packages_that_are_here(
    aws: Any, address: str, here: Client, profile: Profile
) -> None:
    """Without some, and with others."""
    for name in ("kept", "left", "added"):
        make_wheel(here.wheels, name)
    here.install("kept", "left")
    options = ["--packages", "here", "--exclude", "left", "--extra", "added==1.0"]
    done = command(
        *options,
        "--base",
        f"{address}/python:arm64",
        "--platform",
        "linux/arm64",
        "--wheelhouse",
        str(here.wheels),
    )
    assert done.exit_code == 0, done.output
    files = files_of(address, done.stdout.strip())
    found = {name for name in ("kept", "left", "added") if f"{SITE}/{name}.py" in files}
    assert found == {"kept", "added"}


def test_debian_packages_need_an_engine(aws: Any, profile: Profile) -> None:
    """Something has to run to install them."""
    with_packages = command("--packages", "here", "--apt", "libgomp1")
    assert with_packages.exit_code == 2
    assert "--apt needs a container engine" in with_packages.output
    alone = command("--apt", "libgomp1")
    assert alone.exit_code == 2
    assert "no container engine answers" in alone.output
