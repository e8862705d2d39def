"""What the tests of images share: an engine, a base image, wheels, and a registry to push to."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from local_registry import PASSWORD, PASSWORD_HASH, serving
from tidy_engine import BASE, TidyEngine

from cloudexec import BatchExecutor
from cloudexec._aws import image_contents
from cloudexec._aws.image_contents import ImageSpec, worker_pins
from cloudexec._aws.images import Engine
from cloudexec._errors import ConfigError
from cloudexec.testing import ManualLauncher
from cloudexec.testing._aws.containers import remove_container


@pytest.fixture(scope="session")
def password() -> str:
    """What the registry wants from the user ``AWS``."""
    return PASSWORD


@pytest.fixture(scope="session")
def frozen_code() -> Iterator[None]:
    """Make edits of the code during these tests not change the image between two builds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_contents, "_own_wheel", functools.cache(image_contents._own_wheel))
        yield


@pytest.fixture(scope="session")
def engine(frozen_code: None) -> Iterator[Engine]:
    """A container engine that has a base image with this Python."""
    pytest.importorskip("docker", reason="docker is not installed: no images")
    try:
        found = TidyEngine()
    except ConfigError as exc:
        pytest.skip(f"no images: {exc}")
    with found:
        if found.find(BASE) is None:
            pytest.skip(
                f"no base image {BASE} here (.ci/containers makes one, or name another in "
                f"CLOUDEXEC_TEST_BASE)"
            )
        yield found


@pytest.fixture(scope="session")
def download(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function that downloads a worker's wheels into a new directory; it takes options of pip."""

    pytest.importorskip("pip", reason="this environment has no pip")

    def fetch(*options: str) -> Path:
        target = tmp_path_factory.mktemp("wheels")
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(target)]
        subprocess.run([*command, *options, *worker_pins()], check=True, timeout=100)
        return target

    return fetch


@pytest.fixture(scope="session")
def wheelhouse(download: Callable[..., Path]) -> Path:
    """The wheels of a worker, so that containers in these tests need no network."""
    return download()


@pytest.fixture(scope="session")
def spec(wheelhouse: Path) -> ImageSpec:
    """The image that the tests use."""
    return ImageSpec(base=BASE, wheelhouse=wheelhouse)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a registry on the loopback address that requires a password."""
    directory = tmp_path_factory.mktemp("registry")
    with serving(directory, users=f"AWS:{PASSWORD_HASH}\n") as address:
        yield address


@pytest.fixture(scope="module")
def open_registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a registry on the loopback address without a password."""
    with serving(tmp_path_factory.mktemp("open-registry")) as address:
        yield address


def gateway(client: Any) -> str:
    """Return the address at which containers reach this machine."""
    for network in client.networks.list():
        if network.name in ("podman", "bridge"):
            return str(network.attrs["IPAM"]["Config"][0]["Gateway"])
    raise LookupError("the engine has no default network")


@pytest.fixture
def worker(engine: Engine) -> Callable[..., AbstractContextManager[tuple[BatchExecutor, Any]]]:
    """A function that runs an executor and its one worker in a container, as a platform does.

    It takes the name of the image and options of ``containers.run``, and yields the executor and
    the container.
    """

    @contextmanager
    def run(image: str, **options: Any) -> Iterator[tuple[BatchExecutor, Any]]:
        launcher = ManualLauncher(needs_network=True)
        executor = BatchExecutor(
            max_workers=1,
            launcher=launcher,
            listen="0.0.0.0:0",
            advertise=gateway(engine.client),
        )
        container = None
        try:
            executor.submit(int)
            (launch,) = launcher.wait(1, timeout=20)
            container = engine.client.containers.run(
                image,
                environment={
                    "CLOUDEXEC_TARGET": launch.contact.target,
                    "CLOUDEXEC_EXECUTOR_ID": launch.contact.executor_id,
                    "CLOUDEXEC_LAUNCH": launch.launch_id,
                    "CLOUDEXEC_KEY": launch.contact.key.hex(),
                    "CLOUDEXEC_SLOTS": str(launch.slots),
                    "CLOUDEXEC_CERTIFICATE_SHA256": launch.contact.certificate_sha256,
                },
                detach=True,
                **options,
            )
            yield executor, container
        finally:
            executor.shutdown(wait=False, cancel_futures=True)
            launcher.end_all()
            if container is not None:
                remove_container(container)
            executor.shutdown()

    return run
