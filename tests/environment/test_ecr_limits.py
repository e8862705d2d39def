"""Layers of any size get into a registry with the limits of Amazon ECR."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import boto3
import pytest
from click.testing import CliRunner
from ecr_registry import LARGEST_PART, SMALLEST_PART, EcrRegistry, serving_ecr
from environment_helpers import (
    PYTHON,
    Client,
    contents,
    digest_of,
    make_base,
    make_wheel,
    worker_wheels,
)

from cloudexec import LaunchError
from cloudexec._environment import assembly
from cloudexec._environment.base import MANIFEST_TYPE
from cloudexec._environment.registry import Repository
from cloudexec.aws import Profile
from cloudexec.cli.image import image_command
from cloudexec.testing import FakeAWS


@pytest.fixture(scope="module", params=[True, False], ids=["whole", "parts"])
def registry(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[EcrRegistry]:
    """A registry that takes large layers in one request, and one that does not."""
    folder = tmp_path_factory.mktemp("ecr")
    with serving_ecr(folder, takes_whole=request.param) as found:
        with Repository(found.address, "python") as bases:
            make_base(bases, "arm64", "arm64")
        yield found


@pytest.fixture(autouse=True)
def nothing_sent(registry: EcrRegistry) -> None:
    """Counts what each test sends."""
    registry.sent.clear()


@pytest.fixture
def push_large(
    registry: EcrRegistry, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], str]]:
    """Pushes a package of 25 MB to an emulated ECR; returns the name of the image."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("CLOUDEXEC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(assembly, "take_inventory", client.inventory)
    worker_wheels(client.wheels)
    make_wheel(client.wheels, "large", files={"large.bin": random.Random(1).randbytes(25_000_000)})
    client.install("large")

    def push() -> str:
        options = ["--packages", "here", "--platform", "linux/arm64"]
        options += ["--base", f"{registry.address}/python:arm64"]
        options += ["--wheelhouse", str(client.wheels), "--profile", "team"]
        done = CliRunner().invoke(image_command, ["push", *options])
        assert done.exit_code == 0, done.output
        return done.stdout.strip()

    with FakeAWS(registry=registry.address) as fake:
        made = boto3.client("ecr").create_repository(repositoryName="large/worker")
        uri = made["repository"]["repositoryUri"]
        Profile(name="team", region=fake.region, queues={}, repository=uri).save()
        yield push


def check_sizes(registry: EcrRegistry, total: int) -> None:
    """Check that a layer was sent as the registry takes it, and once."""
    taken = [size for _, size in registry.sent if registry.takes_whole or size <= LARGEST_PART]
    assert sum(taken) == total
    if not registry.takes_whole:
        *parts, last = [size for method, size in registry.sent if method == "PATCH"]
        assert all(SMALLEST_PART <= size <= LARGEST_PART for size in parts)
        assert parts
        assert last <= LARGEST_PART


@pytest.mark.parametrize("size", [LARGEST_PART + 1, 3 * 10 * 2**20])
@pytest.mark.parametrize("is_file", [True, False])
def test_layer_that_is_larger_than_a_part_comes_back_as_it_was(
    registry: EcrRegistry, tmp_path: Path, size: int, is_file: bool
) -> None:
    """Also one that ends with a part."""
    content = random.Random(size).randbytes(size)
    (tmp_path / "layer").write_bytes(content)
    with Repository(registry.address, f"layers/{size}-{is_file}".lower()) as repository:
        repository.push_blob(digest_of(content), tmp_path / "layer" if is_file else content)
        check_sizes(registry, size)
        assert repository.read_blob(digest_of(content)) == content


def test_several_large_layers_are_sent_at_once(registry: EcrRegistry) -> None:
    """Each is refused as a whole at most once."""
    layers = [random.Random(number).randbytes(LARGEST_PART + 1) for number in range(3)]
    with Repository(registry.address, "several") as repository, ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda each: repository.push_blob(digest_of(each), each), layers))
        assert all(repository.has_blob(digest_of(each)) for each in layers)
    refused = [size for _, size in registry.sent if size > LARGEST_PART]
    assert len(refused) <= 3


def test_manifest_that_is_too_large_is_refused(registry: EcrRegistry) -> None:
    """With what the registry says: no part would help."""
    with Repository(registry.address, "manifests") as repository:
        with pytest.raises(LaunchError, match=r"push big in manifests: 413 .*SIZE_INVALID"):
            repository.push_manifest("big", b" " * (4 * 2**20 + 1), MANIFEST_TYPE)


def test_upload_that_broke_is_begun_again_from_its_first_byte(
    registry: EcrRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts as well, where no part may be there twice."""
    busy = (503, "UNAVAILABLE")
    wanted, refusals = ("PUT", [busy]) if registry.takes_whole else ("PATCH", [None, None, busy])
    left, known = iter(refusals), registry.refusal

    def refuse(method: str, path: str, size: int) -> tuple[int, str] | None:
        found = known(method, path, size)
        return found or (next(left, None) if method == wanted else None)

    monkeypatch.setattr("cloudexec._environment.registry._pause", lambda attempt: 0.0)
    content = random.Random(0).randbytes(LARGEST_PART + 5)
    with Repository(registry.address, "broken") as repository:
        monkeypatch.setattr(registry, "refusal", refuse)
        repository.push_blob(digest_of(content), content)
        assert repository.read_blob(digest_of(content)) == content
    assert [method for method, _ in registry.sent].count(wanted) == 2 * len(refusals)


def test_packages_with_a_large_layer_are_pushed_for_another_processor(
    registry: EcrRegistry, push_large: Callable[[], str]
) -> None:
    """By the command, with the login of an emulated ECR."""
    uri = push_large()
    name, _, digest = uri.partition("/")[2].partition("@")
    with Repository(registry.address, name) as repository:
        files = contents(repository, digest)
    site = f"opt/worker/lib/python{PYTHON}/site-packages"
    assert files[f"{site}/large.bin"] == random.Random(1).randbytes(25_000_000)
