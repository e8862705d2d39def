"""Images that were made without an engine start workers: in real containers."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from cloudexec import BatchExecutor
from cloudexec._aws.image_contents import ImageSpec
from cloudexec._aws.images import Engine
from cloudexec._environment.assembly import Pushed, push_packages
from cloudexec._environment.cache import Cache
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
