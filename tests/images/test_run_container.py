"""``cloudexec run`` in a real container, with workers in containers of their own."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from run_helpers import PYTHON, account

import cloudexec
from cloudexec._aws.image_contents import ImageSpec
from cloudexec._aws.images import Engine
from cloudexec._aws.profile import Profile
from cloudexec._environment.assembly import push_packages
from cloudexec._environment.cache import Cache
from cloudexec._environment.packages import Packages
from cloudexec._environment.registry import Repository
from cloudexec.testing import FakeAWS

pytestmark = pytest.mark.timeout(500)

PROGRAM = """
import os, pathlib, tasks
from cloudexec import Batch, BatchExecutor

print("user", os.getuid(), "below", pathlib.Path("/proc/1/comm").read_text().strip())
with BatchExecutor(2, launcher=Batch(), journal=os.environ["CLOUDEXEC_RUN_JOURNAL"]) as executor:
    print("total", sum(executor.map(tasks.square, range(100))))
pathlib.Path("out/total.txt").write_text("328350")
raise SystemExit(7)
"""


def _pins() -> list[str]:
    """Return what cloudexec requires on a client, in the versions that are installed here."""
    pins: dict[str, str] = {}
    wanted = ["cloudexec"]
    while wanted:
        name = wanted.pop()
        for text in importlib.metadata.distribution(name).requires or ():
            required = Requirement(text)
            if required.marker is not None and not required.marker.evaluate({"extra": ""}):
                continue
            if required.name not in pins:
                version = importlib.metadata.version(required.name)
                pins[required.name] = f"{required.name}=={version}"
                wanted.append(required.name)
    return sorted(pins.values())


@pytest.fixture(scope="module")
def image(
    engine: Engine, spec: ImageSpec, open_registry: str, tmp_path_factory: pytest.TempPathFactory
) -> str:
    """An image with what a client needs, in the registry."""
    folder = tmp_path_factory.mktemp("run-image")
    requirements = folder / "requirements.txt"
    requirements.write_text("\n".join(_pins()))
    assert spec.wheelhouse is not None
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d"]
    subprocess.run([*command, str(spec.wheelhouse), *_pins()], check=True, timeout=200)
    engine.push(spec.base_image, f"{open_registry}/base", "latest", None)
    with Repository(open_registry, "runs") as repository:
        pushed = push_packages(
            Packages(
                source=requirements, base=f"{open_registry}/base:latest", wheelhouse=spec.wheelhouse
            ),
            repository,
            python=spec.python,
            platform=spec.platform,
            report=lambda line: None,
            cache=Cache(folder / "cache"),
        )
    return pushed.uri


@pytest.fixture
def aws(
    image: str, open_registry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[FakeAWS]:
    """An account that was set up, whose jobs are containers."""
    profiles = tmp_path / "profiles"
    with account(profiles, monkeypatch, mode="container", registry=open_registry) as fake:
        Profile.load("default").with_image(PYTHON, "linux/amd64", image).save()
        yield fake


def test_a_program_runs_in_a_container_and_starts_workers_in_others(
    aws: FakeAWS, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("tasks.py").write_text("def square(n):\n    return n * n\n")
    Path("job.py").write_text(PROGRAM)
    run = cloudexec.run("job.py", outputs=["out"])
    lines = list(run.lines())
    assert run.wait(timeout=200) == 7, "\n".join(lines)
    assert "user 10001 below dumb-init" in lines
    assert "total 328350" in lines
    assert [each.read_text() for each in run.fetch()] == ["328350"]
    run = cloudexec.run(args=["sleep", "600"])
    while run.info().state != "running":
        pass
    run.stop()
    assert run.wait(timeout=100) in (137, 143)
    assert run.info().state == "stopped"
    assert not [each for each in aws.requests if each.status == 403]
