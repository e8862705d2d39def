"""Images that were made without an engine start workers: in real containers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import cloudpickle
import pytest
from environment_helpers import make_client, make_project, make_wheel

from cloudexec import BatchExecutor
from cloudexec._aws.image_contents import ImageSpec
from cloudexec._aws.images import Engine
from cloudexec._environment.assembly import Pushed, push_packages
from cloudexec._environment.cache import Cache
from cloudexec._environment.fetching import find_installer
from cloudexec._environment.packages import Packages
from cloudexec._environment.registry import Repository

# The workers here have no directory of tests to import from.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.timeout(300)

Worker = Callable[..., AbstractContextManager[tuple[BatchExecutor, Any]]]


@pytest.fixture(scope="module")
def base(engine: Engine, spec: ImageSpec, open_registry: str) -> str:
    """The base image, in the registry."""
    engine.push(spec.base_image, f"{open_registry}/base", "latest", None)
    return f"{open_registry}/base:latest"


@pytest.fixture
def pushed(base: str, open_registry: str, spec: ImageSpec, tmp_path: Path) -> Pushed:
    """An image of the worker's own packages, from the wheels."""
    with Repository(open_registry, "without-engine") as repository:
        return push_packages(
            Packages(source="none", base=base, wheelhouse=spec.wheelhouse),
            repository,
            python=spec.python,
            platform=spec.platform,
            report=lambda line: None,
            cache=Cache(tmp_path / "cache"),
        )


def about() -> dict[str, Any]:
    """Say what a worker is, in which environment."""
    import getpass
    import importlib.util
    import json
    import os

    import cloudexec

    found = cloudexec.__spec__
    return {
        "prefix": sys.prefix,
        "uid": os.getuid(),
        "user": getpass.getuser(),
        "home": os.path.expanduser("~"),
        "compiled": [
            bool(each and each.cached and os.path.exists(each.cached))
            for each in (found, json.__spec__, importlib.util.find_spec("google.protobuf.message"))
        ],
        "init": Path("/proc/1/comm").read_text().strip(),
    }


def use() -> dict[str, Any]:
    """Use what an environment has that is out of the ordinary."""
    import importlib.metadata
    import importlib.resources
    import subprocess

    import helper
    import mine
    import space.one

    done = subprocess.run(["tool"], capture_output=True, text=True, check=True)
    return {
        "project": mine.ANSWER,
        "data": (importlib.resources.files("mine") / "data.txt").read_text(),
        "path": helper.HELP,
        "namespace": space.one.ONE,
        "script": done.stdout,
        "settings": Path(sys.prefix, "share", "tool", "settings.ini").read_text(),
        "version": importlib.metadata.version("tool"),
    }


def test_environment_works_as_it_does_here(
    base: str, open_registry: str, spec: ImageSpec, tmp_path: Path, worker: Worker
) -> None:
    """An editable project with data, a path file, a name space, a script and a data file."""
    client = make_client(tmp_path / "venv", tmp_path / "wheels", find_installer())
    make_wheel(client.wheels, "space-one", files={"space/one.py": "ONE = 1\n"})
    files = {
        "tool.py": "def main():\n    print('run')\n",
        "tool-1.0.data/data/share/tool/settings.ini": "[tool]\n",
        "tool-1.0.dist-info/entry_points.txt": "[console_scripts]\ntool = tool:main\n",
    }
    make_wheel(client.wheels, "tool", files=files)
    sources = {"src/mine/__init__.py": "ANSWER = 42\n", "src/mine/data.txt": "data\n"}
    source = make_project(tmp_path / "mine", "mine", sources)
    client.install("space-one", "tool", "-e", str(source))
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "helper.py").write_text("HELP = 1\n")
    (client.site / "ours.pth").write_text(f"{tmp_path}/shared\n")
    with Repository(open_registry, "here") as repository:
        pushed = push_packages(
            Packages(base=base, wheelhouse=spec.wheelhouse),
            repository,
            python=spec.python,
            platform=spec.platform,
            report=lambda line: None,
            cache=Cache(tmp_path / "cache"),
            inventory=client.inventory(),
        )
    with worker(pushed.uri) as (executor, _):
        found = executor.submit(use).result(timeout=60)
    assert found == {
        "project": 42,
        "data": "data\n",
        "path": 1,
        "namespace": 1,
        "script": "run\n",
        "settings": "[tool]\n",
        "version": "1.0",
    }


def test_worker_starts_from_layers(pushed: Pushed, worker: Worker) -> None:
    """As its user, below an init, in its environment, with nothing left to compile."""
    with worker(pushed.uri) as (executor, _):
        found = executor.submit(about).result(timeout=60)
    assert found == {
        "prefix": "/opt/worker",
        "uid": 10001,
        "user": "worker",
        "home": "/home/worker",
        "compiled": [True, True, True],
        "init": "dumb-init",
    }
