"""The image as the local engine builds, runs and pushes it."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import io
import shutil
import sys
import tarfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from cloudexec import BatchExecutor, LaunchError
from cloudexec._aws.image_contents import ImageSpec, worker_pins
from cloudexec._aws.images import Engine, LocalImage, build, plan, push, push_to_profile
from cloudexec._aws.profile import Profile
from cloudexec.testing._aws.containers import remove_container

# The workers here have no directory of tests to import from.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

pytestmark = pytest.mark.timeout(300)

Worker = Callable[..., AbstractContextManager[tuple[BatchExecutor, Any]]]


@pytest.fixture(scope="module")
def client(engine: Engine) -> Any:
    """The engine, for what the product has no need of."""
    return engine.client


@pytest.fixture(scope="module")
def image(engine: Engine, spec: ImageSpec) -> LocalImage:
    """The worker's image."""
    return build(plan(spec, engine=engine), engine=engine)


def ended(container: Any) -> tuple[int, str]:
    """Wait for a container's end; return its exit code and what it printed."""
    said = b"".join(container.logs(stream=True, follow=True)).decode()
    return container.wait(timeout=60)["StatusCode"], said


def run(client: Any, image: LocalImage, *command: str, **options: Any) -> tuple[int, str]:
    """Run something else in the image."""
    container = client.containers.create(
        image.name, entrypoint=list(command) or None, detach=True, **options
    )
    try:
        container.start()
        return ended(container)
    finally:
        remove_container(container)


def facts_of_a_worker() -> dict[str, Any]:
    import getpass
    import importlib.util
    import os
    import sys
    import tempfile

    modules = ("boto3", "botocore", "aiobotocore", "click", "rich", "cryptography", "pip")
    with tempfile.NamedTemporaryFile():
        pass
    return {
        "uid": os.getuid(),
        "user": getpass.getuser(),
        "home": os.path.expanduser("~"),
        "can write home": os.access(".", os.W_OK),
        "can write packages": os.access("/opt/worker", os.W_OK),
        "python": sys.executable,
        "first process": open("/proc/1/comm").read().strip(),
        "found": [name for name in modules if importlib.util.find_spec(name)],
        "key": os.environ.get("CLOUDEXEC_KEY"),
    }


def test_worker_runs_as_a_user_under_an_init_without_an_sdk(
    worker: Worker, image: LocalImage
) -> None:
    """A task sees a user of its own that can write nothing but its home, and no AWS SDK."""
    with worker(image.name) as (executor, _):
        assert executor.submit(facts_of_a_worker).result(60) == {
            "uid": 10001,
            "user": "worker",
            "home": "/home/worker",
            "can write home": True,
            "can write packages": False,
            "python": "/opt/worker/bin/python",
            "first process": "dumb-init",
            "found": [],
            "key": None,
        }


def test_worker_runs_on_a_read_only_file_system(worker: Worker, image: LocalImage) -> None:
    """``readonlyRootFilesystem`` is a common demand; /tmp is all that is needed."""
    with worker(image.name, read_only=True, tmpfs={"/tmp": ""}) as (executor, _):
        assert executor.submit(pow, 2, 10).result(60) == 1024


def test_sigterm_reaches_the_worker(worker: Worker, image: LocalImage) -> None:
    """The platform's notice goes through the init: the worker hands back and ends by itself."""
    with worker(image.name) as (executor, container):
        executor.submit(int).result(60)
        started = time.monotonic()
        container.kill("SIGTERM")
        code, output = ended(container)
        assert code == 143, output
        assert time.monotonic() - started < 15


def test_init_reaps_what_tasks_leave_behind(client: Any, image: LocalImage) -> None:
    """No zombie stays, however many daemons a task started."""
    program = (
        "import os, time\n"
        "for _ in range(5):\n"
        "    if os.fork() == 0:\n"
        "        if os.fork() == 0: time.sleep(0.2)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "time.sleep(1)\n"
        "print(sum(name.isdigit() for name in os.listdir('/proc')))\n"
    )
    init = "/opt/worker/bin/dumb-init"
    code, output = run(client, image, init, "--", "/opt/worker/bin/python", "-c", program)
    assert (code, output.strip()) == (0, "2")


def test_image_alone_says_what_is_missing(client: Any, image: LocalImage) -> None:
    """Whoever runs it by hand learns what it is."""
    container = client.containers.run(image.name, detach=True)
    try:
        code, output = ended(container)
    finally:
        remove_container(container)
    assert code == 1
    assert "not set: CLOUDEXEC_TARGET" in output


def test_bytecode_of_all_that_starts_is_in_the_image(client: Any, image: LocalImage) -> None:
    """The user could not keep what it compiles, and every start would compile again."""
    program = (
        "import sys, os, cloudexec.worker.running, cloudexec.worker.slot\n"
        "print([m.__name__ for m in list(sys.modules.values())\n"
        "       if (s := getattr(m, '__spec__', None)) and s.origin and s.origin.endswith('.py')\n"
        "       and not os.path.exists(s.cached)])\n"
    )
    code, output = run(client, image, "/opt/worker/bin/python", "-c", program)
    assert (code, output.strip()) == (0, "[]")


def test_image_says_what_it_is(engine: Engine, spec: ImageSpec, image: LocalImage) -> None:
    """Labels and entry point are those promised."""
    found = engine.find(image.name)
    assert found is not None
    planned = plan(spec, engine=engine)
    labels = found["Config"]["Labels"]
    assert labels["cloudexec.version"] == planned.contents.version
    assert labels["cloudexec.python"] == spec.python
    assert labels["cloudexec.platform"] == "linux/amd64"
    assert found["Config"]["User"] == "10001:10001"
    assert found["Config"]["Entrypoint"][0] == "/opt/worker/bin/dumb-init"
    assert found["Config"]["Entrypoint"][-2:] == ["-m", "cloudexec.worker"]


def test_second_build_asks_the_engine_for_nothing(engine: Engine, spec: ImageSpec) -> None:
    """The image of the first build is found, by its content's hash."""
    planned = plan(spec, engine=engine)
    first = build(planned, engine=engine)
    log: list[str] = []
    second = build(planned, engine=engine, report=log.append)
    assert second == dataclasses.replace(first, was_built=False)
    assert log == []


def test_builds_leave_one_stage_behind_and_not_one_each(
    engine: Engine, spec: ImageSpec, image: LocalImage, wheelhouse: Path, tmp_path: Path
) -> None:
    """What an engine keeps to begin the next build with has no name, and nobody would remove it."""
    stages = {"dangling": True, "label": "cloudexec.stage=builder"}
    wheels = tmp_path / "wheels"
    shutil.copytree(wheelhouse, wheels)
    for name in ("shop", "store"):
        wheel_of(wheels, name, "PRICE = 7\n")
        requirements = tmp_path / f"{name}.txt"
        requirements.write_text(f"{name}==1.0\n")
        other = dataclasses.replace(spec, requirements=requirements, wheelhouse=wheels)
        planned = plan(other, engine=engine)
        assert build(planned, engine=engine).was_built
        assert len(engine.client.api.images(filters=stages)) == 1


def test_same_layers_under_another_name_have_labels_of_their_own(
    engine: Engine, spec: ImageSpec, image: LocalImage
) -> None:
    """A cache that took the other image as it is would have it built again each time."""
    name, _, tag = spec.base.rpartition(":")
    engine.client.images.get(spec.base).tag(f"{name}-again", tag)
    planned = plan(dataclasses.replace(spec, base=f"{name}-again:{tag}"), engine=engine)
    try:
        assert build(planned, engine=engine).was_built
        assert not build(planned, engine=engine).was_built
        assert not build(plan(spec, engine=engine), engine=engine).was_built
    finally:
        engine.client.images.remove(f"{name}-again:{tag}")


def wheel_of(directory: Path, name: str, code: str) -> None:
    """Write a wheel with one module."""
    import zipfile

    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(directory / f"{name}-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", code)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")


@pytest.mark.parametrize("is_hashed", [False, True])
def test_requirements_of_the_user_are_in_the_image(
    engine: Engine, client: Any, spec: ImageSpec, wheelhouse: Path, tmp_path: Path, is_hashed: bool
) -> None:
    """From a requirements file or a lock file with hashes; cloudexec in it is left out."""
    import hashlib

    wheels = tmp_path / "wheels"
    shutil.copytree(wheelhouse, wheels)
    wheel_of(wheels, "shop", "PRICE = 7\n")
    digest = hashlib.sha256((wheels / "shop-1.0-py3-none-any.whl").read_bytes()).hexdigest()
    requirements = tmp_path / "requirements.txt"
    hashes = f" --hash=sha256:{digest}" if is_hashed else ""
    requirements.write_text(f"cloudexec==0.0.1{hashes}\nshop==1.0{hashes}\n")
    spec = ImageSpec(base=spec.base, wheelhouse=wheels, requirements=requirements)
    built = build(plan(spec, engine=engine), engine=engine)
    program = "import shop, cloudexec.worker.running; print(shop.PRICE)"
    assert run(client, built, "/opt/worker/bin/python", "-c", program) == (0, "7\n")


def test_packages_are_installed_on_top(engine: Engine, client: Any, spec: ImageSpec) -> None:
    """The image is otherwise the same, its user too."""
    planned = plan(dataclasses.replace(spec, packages=("hello",)), engine=engine)
    try:
        built = build(planned, engine=engine)
    except LaunchError as exc:
        if "Temporary failure resolving" in exc.reason or "Could not connect" in exc.reason:
            pytest.skip("containers here reach no Debian mirror")
        raise
    assert run(client, built, "/usr/bin/hello") == (0, "Hello, world!\n")
    found = engine.find(built.name)
    assert found is not None
    assert found["Config"]["User"] == "10001:10001"


def test_requirements_that_cannot_be_had_end_the_build_with_what_pip_says(
    engine: Engine, spec: ImageSpec, wheelhouse: Path, tmp_path: Path
) -> None:
    """The reason is in the message, not in some log."""
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("nowhere-to-be-had==3\n")
    spec = ImageSpec(base=spec.base, wheelhouse=wheelhouse, requirements=requirements)
    with pytest.raises(LaunchError, match="No matching distribution found for nowhere-to-be-had"):
        build(plan(spec, engine=engine), engine=engine)


def test_conflict_with_the_worker_ends_the_build(
    engine: Engine, spec: ImageSpec, wheelhouse: Path, tmp_path: Path
) -> None:
    """Other versions than the client's would be found out in the middle of a run otherwise."""
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("cloudpickle==1.0\n")
    spec = ImageSpec(base=spec.base, wheelhouse=wheelhouse, requirements=requirements)
    with pytest.raises(LaunchError, match="cloudpickle"):
        build(plan(spec, engine=engine), engine=engine)


def test_base_with_another_python_is_refused(engine: Engine, spec: ImageSpec) -> None:
    """The message names both versions and both remedies."""
    spec = dataclasses.replace(spec, python="3.9")
    with pytest.raises(LaunchError, match=r"has Python 3\.\d+, but .* for Python 3\.9: .*--base"):
        build(plan(spec, engine=engine), engine=engine)


def test_base_that_cannot_be_pulled_names_the_remedy(engine: Engine) -> None:
    """Nothing listens on port 1."""
    with pytest.raises(LaunchError, match=r"127\.0\.0\.1:1/nothing.* --base"):
        plan(ImageSpec(base="127.0.0.1:1/nothing:1"), engine=engine)


class Registry:
    """A registry that is not Amazon's."""

    def __init__(self, host: str, password: str, given: str | None = None) -> None:
        self._host = host
        self._password = password
        self._given = password if given is None else given

    async def login(self) -> tuple[str, dict[str, str]]:
        credentials = {"username": "AWS", "password": self._given}
        return f"{self._host}/cloudexec-default", credentials

    async def digest(self, tag: str) -> str | None:
        token = base64.b64encode(f"AWS:{self._password}".encode()).decode()
        request = urllib.request.Request(
            f"http://{self._host}/v2/cloudexec-default/manifests/{tag}",
            method="HEAD",
            headers={
                "Authorization": f"Basic {token}",
                "Accept": "application/vnd.oci.image.manifest.v1+json, "
                "application/vnd.docker.distribution.manifest.v2+json",
            },
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as response:  # noqa: ASYNC210  # a test
                return str(response.headers["Docker-Content-Digest"])
        except urllib.error.HTTPError as exc:
            exc.close()
            if exc.code == 404:
                return None
            raise


def test_image_is_pushed_once_and_can_be_pulled_by_its_digest(
    engine: Engine, client: Any, spec: ImageSpec, registry: str, password: str
) -> None:
    """What is noted in the profile is what workers get."""
    planned = plan(spec, engine=engine)
    events: list[Any] = []
    repository = Registry(registry, password)
    first = asyncio.run(push(planned, repository, engine=engine, report_push=events.append))
    assert first.was_pushed
    assert events
    assert first.uri == f"{registry}/cloudexec-default@{asyncio.run(repository.digest(first.tag))}"
    second = asyncio.run(push(planned, repository, engine=engine))
    assert second == dataclasses.replace(first, was_pushed=False)
    credentials = {"username": "AWS", "password": password}
    client.images.pull(first.uri, auth_config=credentials)
    found = engine.find(first.uri)
    local = engine.find(planned.name)
    assert found is not None
    assert local is not None
    assert found["Id"] == local["Id"]


def test_wrong_password_ends_the_push(
    engine: Engine, spec: ImageSpec, registry: str, password: str
) -> None:
    """The registry's words are in the message."""
    repository = Registry(registry, password, given="wrong")
    planned = plan(dataclasses.replace(spec, base=spec.base), engine=engine)

    async def forget(tag: str) -> None:
        return None

    repository.digest = forget  # type: ignore[method-assign]  # as if it were not there yet
    with pytest.raises(LaunchError, match=r"could not be pushed|could not push"):
        asyncio.run(push(planned, repository, engine=engine))


def test_login_of_ecr_is_what_the_push_uses(
    engine: Engine,
    spec: ImageSpec,
    registry: str,
    password: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The token of GetAuthorizationToken opens the registry; the digest goes into the profile."""
    monkeypatch.setenv("CLOUDEXEC_CONFIG_DIR", str(tmp_path))

    class Aws:
        async def call(self, service: str, operation: str, /, **parameters: Any) -> Any:
            if operation == "get_authorization_token":
                token = base64.b64encode(f"AWS:{password}".encode()).decode()
                entry = {"authorizationToken": token, "proxyEndpoint": f"http://{registry}"}
                return {"authorizationData": [entry]}
            digest = await Registry(registry, password).digest(
                parameters["imageIds"][0]["imageTag"]
            )
            if digest is None:
                from cloudexec._errors import AwsError

                raise AwsError("no", code="ImageNotFoundException")
            return {"imageDetails": [{"imageDigest": digest}]}

    profile = Profile(
        name="default",
        region="eu-central-1",
        repository="123456789012.dkr.ecr.eu-central-1.amazonaws.com/cloudexec-default",
    )
    planned = plan(spec, engine=engine)
    aws: Any = Aws()
    pushed = asyncio.run(push_to_profile(planned, profile, aws, engine=engine))
    assert Profile.load("default").image(spec.python, spec.platform) == pushed.uri


def test_image_for_another_platform_is_built_without_emulation(
    engine: Engine,
    client: Any,
    spec: ImageSpec,
    open_registry: str,
    download: Callable[..., Path],
) -> None:
    """On x86-64, an image for arm64 has everything for arm64."""
    if engine.platform() != "linux/amd64":
        pytest.skip("this test builds for arm64 on x86-64")
    machine = [f"--platform=manylinux_2_{minor}_aarch64" for minor in (17, 28)]
    wheels = download(*machine, "--platform=manylinux2014_aarch64", "--only-binary=:all:")
    base = f"{open_registry}/base:arm64"
    publish_as_arm64(client, base)
    spec = ImageSpec(platform="linux/arm64", base=base, builder=spec.base, wheelhouse=wheels)
    built = build(plan(spec, engine=engine), engine=engine)
    found = engine.find(built.name)
    assert found is not None
    assert found["Architecture"] == "arm64"
    container = client.containers.create(built.name, platform="linux/arm64")
    try:
        stream, _ = container.get_archive("/opt/worker")
        content = b"".join(stream)
    finally:
        remove_container(container)
    machines = set()
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        names = archive.getnames()
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            start = file.read(20) if file else b""
            if start[:4] == b"\x7fELF":
                machines.add(int.from_bytes(start[18:20], "little"))
    assert machines == {183}  # EM_AARCH64
    assert "worker/bin/dumb-init" in names
    for pin in worker_pins():
        project = pin.partition("==")[0].replace("-", "_")
        assert any(f"/{project}-" in name for name in names), pin


def publish_as_arm64(client: Any, name: str) -> None:
    """Push an almost empty image for arm64: nothing of a base is run for another platform."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for folder in ("etc", "home", "opt", "usr"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(entry)
    repository, _, tag = name.rpartition(":")
    # docker-py has no argument for the platform.
    client.api.post(
        f"{client.api.base_url}/images/create",
        params={"fromSrc": "-", "repo": name, "platform": "linux/arm64"},
        data=content.getvalue(),
        headers={"Content-Type": "application/tar"},
    ).raise_for_status()
    log = client.api.push(repository, tag=tag)
    assert "error" not in log, log
