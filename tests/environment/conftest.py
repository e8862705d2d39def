"""What the tests of the environment share: installers, an environment, a registry with a base."""

from __future__ import annotations

import functools
import importlib.util
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from environment_helpers import PYTHON, Client, make_base, make_client, worker_wheels
from local_registry import serving
from pip_server import pip_served

from cloudexec._aws import image_contents
from cloudexec._environment.assembly import Pushed, push_packages
from cloudexec._environment.cache import Cache
from cloudexec._environment.fetching import Installer
from cloudexec._environment.packages import Packages
from cloudexec._environment.registry import Repository


@pytest.fixture(scope="session")
def uv(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installer]:
    """uv, where it is, with a cache of its own."""
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        pytest.skip("uv is not here")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UV_CACHE_DIR", str(tmp_path_factory.mktemp("uv-cache")))
        yield Installer((found,), True)


@pytest.fixture(scope="module")
def pip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installer]:
    """pip, where it is."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("this environment has no pip")
    with pip_served(tmp_path_factory.mktemp("pip")) as command:
        yield Installer(command, False)


@pytest.fixture(params=["uv", "pip"])
def installer(request: pytest.FixtureRequest) -> Installer:
    """Each of both."""
    found: Installer = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def client(tmp_path: Path, uv: Installer) -> Client:
    """An environment with nothing in it yet."""
    return make_client(tmp_path / "venv", tmp_path / "wheels", uv)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    """A cache with nothing in it yet."""
    return Cache(tmp_path / "cache")


@pytest.fixture(scope="session", autouse=True)
def frozen_code() -> Iterator[None]:
    """Who edits the code while these tests run does not change the layer of cloudexec."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_contents, "_own_wheel", functools.cache(image_contents._own_wheel))
        yield


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A registry on the loopback, with bases for both platforms: its address."""
    with serving(tmp_path_factory.mktemp("registry")) as found:
        with Repository(found, "python") as bases:
            for machine in ("amd64", "arm64"):
                make_base(bases, machine, machine)
        yield found


@pytest.fixture
def repository(address: str, request: pytest.FixtureRequest) -> Iterator[Repository]:
    """A repository of that registry with nothing in it yet."""
    name = "".join(each if each.isalnum() else "-" for each in request.node.name.lower()).strip("-")
    with Repository(address, f"tests/{name}") as found:
        yield found


@pytest.fixture
def push(
    address: str, repository: Repository, client: Client, cache: Cache
) -> Callable[..., Pushed]:
    """Pushes an image with the packages of the environment."""
    worker_wheels(client.wheels)

    def run(
        machine: str = "amd64",
        said: list[str] | None = None,
        cache: Cache = cache,
        refresh: bool = False,
        **options: object,
    ) -> Pushed:
        settings = {"base": f"{address}/python:{machine}", "wheelhouse": client.wheels, **options}
        return push_packages(
            Packages(**settings),  # type: ignore[arg-type]
            repository,
            python=PYTHON,
            platform=f"linux/{machine}",
            report=(said if said is not None else []).append,
            cache=cache,
            refresh=refresh,
            inventory=client.inventory(),
        )

    return run
